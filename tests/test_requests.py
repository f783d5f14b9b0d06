"""Requests on their way there and back: what is no request is refused by the client, and what is no response by the server."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fedgrove import run as server
from fedgrove.client.hidden_states import Calibration
from fedgrove.client.serve import pack, read, serve
from fedgrove.deploy.flare.exchanges.done import EndRun
from fedgrove.deploy.flare.exchanges.join import Joined, JoinRun
from fedgrove.deploy.flare.exchanges.result import DeliverResult
from fedgrove.deploy.flare.installation import Declared
from fedgrove.errors import FedgroveError
from fedgrove.evaluation.held_out import Losses
from fedgrove.input_statistics.exchange import Tokens as InputTokens
from fedgrove.job.load import load
from fedgrove.job.stage_config import Cut
from fedgrove.models.blocks import Decoder
from fedgrove.models.masks import keep
from fedgrove.models.stream import Checkpoint
from fedgrove.privacy.secagg.session import Session
from fedgrove.rounds import wire
from fedgrove.rounds.capabilities import Capabilities
from fedgrove.rounds.collect import collect
from fedgrove.rounds.exchanges import secagg
from fedgrove.rounds.exchanges.capabilities import DescribeYourself, Windows
from fedgrove.rounds.request import (
    CHANGE,
    WEIGHT,
    Message,
    Reply,
    Request,
    RequestError,
    Response,
    parse,
    request_type,
    request_types,
)
from fedgrove.rounds.wire import WireError
from fedgrove.runfolder import RunFolder
from fedgrove.stages.head.exchanges.guesses import SumGuesses
from fedgrove.stages.head.exchanges.moments import SumMoments
from fedgrove.stages.head.exchanges.personal import Compared, CompareHeads
from fedgrove.stages.prompt.exchanges.local import SearchAlone, Searched
from fedgrove.stages.prompt.exchanges.score import ScorePrompts
from fedgrove.stages.prompt.exchanges.votes import VoteForWords
from fedgrove.stages.prune.exchanges import block as blocks
from fedgrove.stages.prune.exchanges.alone import EvaluateAlone
from fedgrove.stages.prune.exchanges.block import PruneBlock
from fedgrove.stages.prune.exchanges.outliers import MeasureBlocks
from fedgrove.stages.prune.exchanges.personal import ChooseOwn, OwnLosses, SolveOwnBlock
from fedgrove.stages.prune.exchanges.statistics import SumInputs
from fedgrove.stages.prune.recipe import Recipe
from fedgrove.stages.structured.exchanges import scores
from fedgrove.stages.structured.exchanges.blocks import ScoreBlocks
from fedgrove.stages.structured.exchanges.experts import ScoreExperts
from fedgrove.stages.structured.exchanges.inputs import SumInputs as RepairInputs
from fedgrove.stages.structured.exchanges.scores import ScoreGroups
from fedgrove.stages.tune.exchanges import alone as tune_alone
from fedgrove.stages.tune.exchanges import importance
from fedgrove.stages.tune.exchanges.base import KeepWeights
from fedgrove.stages.tune.exchanges.deal import WINDOWS, DealByFeatures, DealByLoss, Dealt, SumDeals
from fedgrove.stages.tune.exchanges.experts import ChooseExperts
from fedgrove.stages.tune.exchanges.gate import NUMBER, FitGate, SendDirection, SumFeatures
from fedgrove.stages.tune.exchanges.importance import ScoreLinears
from fedgrove.stages.tune.exchanges.members import TrainMembers
from fedgrove.stages.tune.exchanges.personal import ComparePersonal
from fedgrove.stages.tune.exchanges.reduced import KeepExperts
from fedgrove.stages.tune.exchanges.seeds import Measure, Step, Took
from fedgrove.stages.tune.exchanges.train import Train, Trained
from fedgrove.stages.tune.fixed_point import FixedPointChanges
from fedgrove.stages.tune.train_settings import Training
from small import LENGTH, ROOT, Small, python

Q = "self_attn.q_proj"
TOKENS = 2 * LENGTH
CALIBRATION = Calibration(stage=0, samples=2, length=LENGTH, seed="0/0")
RECIPE = Recipe(pruner="wanda", damping="mean", sparsities=(0.5, 0.5), pattern=None, blocks=(0, 1))
BLOCK = PruneBlock(stage=0, block=1, calibration=CALIBRATION, recipe=RECIPE, aggregation="fedspallm")
SESSION = Session(name="s", clients=("ash", "birch", "cedar"))
TUNED: dict[str, Any] = {
    "stage": 0, "parts": 0, "cut": None, "bits": 32, "length": LENGTH, "seed": "0/0", "personal": 0.0,
}  # fmt: skip
GATE: dict[str, Any] = {"gate": "mixture", "blocks": (0.5,), "prefix": 8}
TRAINING = Training(steps=1, batch=1, micro=1, learning_rate=0.1, optimizer="adamw", max_grad_norm=1.0, proximal=0.0)
HEX = "00" * 32


@dataclass(frozen=True)
class Exchange:
    """A request, and an honest reply to it."""

    request: Request
    reply: Reply


HEAD: dict[str, Any] = {
    "stage": 0, "head": "ridge", "labels": ("bird", "fish"), "layers": (-1,), "pool": "mean", "length": LENGTH, "size": 8,
    "seed": "0/0", "personal": 0.2, "limit": 2**20,
}  # fmt: skip

PROMPT: dict[str, Any] = {
    "stage": 0, "method": "evolution", "aggregation": "pooled", "labels": (" bird", " fish"), "score": "loss", "place": "end",
    "length": LENGTH, "records": 2**10, "seed": "0/0", "subspace": {"dimension": 4, "scale": 0.1, "base": (1, 2)},
}  # fmt: skip

OWN: dict[str, Any] = {"stage": 0, "calibration": CALIBRATION, "held_out": 2}
SOLVED: dict[str, Any] = {"pruner": "wanda", "damping": "each", "sparsity": 0.5, "pattern": None}

EXCHANGES = [  # one at least of every kind: a test sees to it
    Exchange(
        JoinRun(stage=0, clock=0.0, digests={}),
        Joined(result=True, capabilities=Declared()),
    ),
    Exchange(DeliverResult(stage=0, file="header", last=True), Reply()),
    Exchange(EndRun(stage=0), Reply()),
    Exchange(EvaluateAlone(stage=0, texts={"held-0": 2}, prune=BLOCK), Reply()),
    Exchange(BLOCK, blocks.Tokens(tokens=TOKENS)),
    Exchange(BLOCK.model_copy(update={"aggregation": "fedprllm"}), blocks.Tokens(tokens=TOKENS)),
    Exchange(BLOCK.model_copy(update={"aggregation": "fedavg"}), blocks.Tokens(tokens=TOKENS)),
    Exchange(MeasureBlocks(stage=0, allocation="owl", owl_m=5.0, owl_lambda=0.1, calibration=CALIBRATION), Reply()),
    Exchange(
        SumInputs(
            stage=0, block=0, calibration=CALIBRATION, consumers={Q: Q}, widths={Q: 64}, products=(Q,), moments=False,
            mixed=False, limit=2**40,
        ),
        InputTokens(tokens=TOKENS),
    ),
    Exchange(SolveOwnBlock(**OWN, block=1, statistics=None, tokens=99, **SOLVED), Reply()),
    Exchange(ChooseOwn(**OWN, tell=True), OwnLosses(shared=1.0, own=2.0, alone=3.0, error=0.1, keeps_own=True)),
    Exchange(ChooseOwn(**OWN, tell=False), OwnLosses()),
    Exchange(
        DescribeYourself(calibrations=(Windows(samples=1, length=LENGTH, seed="s"),), lengths=(LENGTH,)),
        Capabilities(tokens={LENGTH: 2 * LENGTH}),
    ),
    Exchange(
        secagg.Keys(stage=0, session=SESSION), secagg.Advert(mask_key=HEX, channel_key=HEX, commitment=HEX, signature=2 * HEX)
    ),
    Exchange(secagg.Shares(stage=0, session=SESSION, adverts={}, hashes={}), secagg.Ciphertexts(sealed_shares={})),
    Exchange(secagg.Received(stage=0, session=SESSION, sealed_shares={}), secagg.Unreadable(unreadable=[])),
    Exchange(secagg.Check(stage=0, session=SESSION, survivors=["ash", "birch"]), secagg.Signed(signature=2 * HEX)),
    Exchange(secagg.Open(stage=0, session=SESSION, signatures={}), secagg.Revealed(shares={})),
    Exchange(ScoreGroups(stage=0, score="fisher", calibration=CALIBRATION, limit=2**40), scores.Tokens(tokens=TOKENS)),
    Exchange(
        RepairInputs(
            stage=0, block=0, calibration=CALIBRATION, consumers={Q: Q}, widths={Q: 64}, products=(Q,), moments=False,
            limit=2**40,
        ),
        InputTokens(tokens=TOKENS),
    ),
    Exchange(ScoreExperts(stage=0, score="reap", calibration=CALIBRATION, limit=2**40), scores.Tokens(tokens=TOKENS)),
    Exchange(ScoreBlocks(stage=0, span=1, calibration=CALIBRATION), scores.Tokens(tokens=TOKENS)),
    Exchange(KeepWeights(stage=0, part=0, cut=Cut(0.0, 0.0, 0.5), kept_blocks=(1,)), Reply()),
    Exchange(SumMoments(**HEAD), Reply()),
    Exchange(SumMoments(**{**HEAD, "head": "prototypes"}), Reply()),
    Exchange(
        CompareHeads(**HEAD, classes=("bird", "fish"), ridge=0.1, base="b", title="t"),
        Compared(records=5, shared=3, personal=4, own=5),
    ),
    Exchange(SumGuesses(**HEAD, guesses=3, exchange=2, classes=("bird", "fish")), Reply()),
    Exchange(ScorePrompts(**PROMPT, candidates=4), Reply()),
    Exchange(
        VoteForWords(
            **{**PROMPT, "method": "tokens", "aggregation": "votes", "score": "correct", "subspace": None}, population=4,
            generations=2, tokens=3, words=20,
        ),
        Reply(),
    ),
    *(
        Exchange(
            SearchAlone(
                **{**PROMPT, **changes}, population=4, generations=2, learning_rate=0.1, against_overfitting=0.0, tokens=2,
                words=3,
            ),
            Searched(records=5, weight=40, skipped=0, cost=1.0, calls=45),
        )
        for changes in ({}, {"method": "categories", "subspace": None})
    ),
    Exchange(ChooseExperts(**TUNED, number=4, value="outputs", reached=False), Reply()),
    Exchange(
        KeepExperts(**TUNED, parametrization="lora", masked=(), number=4, value="outputs", base="b", title="t"), Reply()
    ),
    Exchange(ScoreLinears(**TUNED, tokens=99, steps=1, micro=1, learning_rate=0.1, ranks=(2, 4)), importance.Tokens(tokens=99)),
    Exchange(
        ComparePersonal(**TUNED, parametrization="lora", masked=(), micro=1, base="b", title="t"),
        Losses(shared=1.0, own=2.0, error=0.1, keeps_own=False),
    ),
    Exchange(
        tune_alone.EvaluateAlone(
            stage=0, texts={"held-0": 2}, learning_rates=(0.1, 0.1),
            train=Train(
                **TUNED, parametrization="lora", trainer="sgd", shared_a=False, masked=(), tokens=99, seen=0,
                ranks={f"model.layers.0.{Q}": 4}, scales={f"model.layers.0.{Q}": 1.0}, dtype="float32", training=TRAINING,
            ),
        ),
        tune_alone.OwnLoss(own=1.0),
    ),
    Exchange(SumFeatures(**TUNED, **GATE, between=False), Reply()),
    Exchange(SumFeatures(**TUNED, **GATE, between=True), Reply()),
    Exchange(SendDirection(**TUNED, **GATE | {"gate": "similar"}, size=4, halves=True, budget=None), Reply()),
    Exchange(SendDirection(**TUNED, **GATE | {"gate": "similar"}, size=4, halves=False, budget=(8.0, 1e-5)), Reply()),
    Exchange(FitGate(**TUNED, **GATE, members=2, starts=3, size=4), Reply()),
    Exchange(FitGate(**TUNED, **GATE, members=2, starts=1, size=4, last=True), Reply()),
    Exchange(DealByFeatures(**TUNED, **GATE, members=2, starts=1, size=4, tokens=TOKENS), Dealt(windows=(2, 0))),
    Exchange(SumDeals(**TUNED, **GATE, members=2, starts=1, size=4, tokens=TOKENS, steps=2), Reply()),
    Exchange(
        TrainMembers(
            **TUNED, parametrization="lora", trainer="sgd", shared_a=True, masked=(), tokens=99, seen=0, members=2,
            ranks={f"model.layers.0.{Q}": 4}, scales={f"model.layers.0.{Q}": 1.0}, dtype="float32", training=TRAINING,
            fixed=FixedPointChanges(everything=99, most=99, widest={f"model.layers.0.{Q}": 4}),
        ),
        Trained(tokens=99),
    ),
    Exchange(
        DealByLoss(
            **TUNED, gate="losses", members=2, windows=1, micro=1, parametrization="lora", masked=(), tokens=TOKENS,
        ),
        Dealt(windows=(2, 0)),
    ),
    Exchange(
        Measure(**TUNED, tokens=99, batch=1, clients=1, masked=(), perturbations=(0.1,), directions=2),
        Reply(),
    ),
    *(
        Exchange(
            Step(
                **TUNED, tokens=99, batch=1, clients=1, masked=(), aggregation=aggregation, trainer="zeroth_order", seeds=4,
                steps=2, seen=0, learning_rate=0.1, perturbation=0.1, says_loss=True,
            ),
            Took(tokens=99, loss=1.0, skipped=0),
        )
        for aggregation in ("common", "own")
    ),
    *(
        Exchange(
            Train(
                **TUNED, parametrization=parametrization, trainer="sgd", shared_a=False, masked=(), tokens=99, seen=0,
                ranks={f"model.layers.0.{Q}": 4}, scales={f"model.layers.0.{Q}": 1.0}, dtype="float32", training=TRAINING,
            ),
            Trained(tokens=99, loss=1.0),
        )
        for parametrization in ("lora", "full", "ia3")
    ),
]  # fmt: skip


def name_of(exchange: Exchange) -> str:
    fields = (getattr(exchange.request, field, None) for field in ("aggregation", "parametrization", "head", "method"))
    return " ".join([exchange.request.KIND, *(field for field in fields if isinstance(field, str))])


every_exchange = pytest.mark.parametrize("exchange", EXCHANGES, ids=name_of)


def test_every_kind_of_request_is_tried_here() -> None:
    assert {exchange.request.KIND for exchange in EXCHANGES} == {one.KIND for one in request_types()}


class Canned:
    """An engine on which the only client responds to everything with these bytes."""

    def __init__(self, response: bytes):
        self.response = response
        self.received: list[tuple[str, bytes]] = []

    def clients(self) -> list[str]:
        return ["ash"]

    def request(
        self, kind: str, messages: Mapping[str, bytes], timeout: float | None = None, largest: int | None = None
    ) -> Iterator[Any]:
        for client, message in messages.items():
            self.received.append((kind, message))
            yield client, self.response, None


@pytest.fixture
def ask(small: Small, tmp_path: Path) -> Iterator[Callable[..., list[Any]]]:
    """Sends one request to one client, who responds with these bytes; gives what the server takes of it."""
    only = [{"name": "ash", "data": str(small.texts["ash"])}]
    run = RunFolder(tmp_path / "run", load(small.job("requests", clients=only, evaluate={})))
    layout = Decoder(Checkpoint(small.model))

    def ask(request: Request, response: bytes, masked: bool = False) -> list[Any]:
        masking = {"ash": {}} if masked else None
        return list(collect(Canned(response), run, {"ash": Message(request)}, layout=layout, masking=masking))

    yield ask
    run.close()


def honest(request: Request, layout: Decoder) -> dict[str, torch.Tensor]:
    """Tensors as the request expects them, and such as a client could have made: half of the weights are pruned."""
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in request.expected(layout).items()}
    for name, tensor in tensors.items():
        if name.startswith(WEIGHT) and tensor.dtype == torch.bool:
            assert isinstance(request, PruneBlock)
            tensors[name] = keep([torch.arange(tensor.numel()).view_as(tensor)], request.recipe.target(request.block))
        elif name.startswith(WEIGHT):
            tensors[name] = torch.full_like(tensor, TOKENS)
        elif name == CHANGE + WINDOWS:
            tensors[name] = torch.tensor([TOKENS // LENGTH, *[0] * (len(tensor) - 1)])
        elif name == CHANGE + NUMBER:
            tensors[name] = torch.ones_like(tensor)
    return tensors


def packed(tensors: Mapping[str, torch.Tensor], request: Request, reply: Mapping[str, Any]) -> bytes:
    return wire.pack(tensors, {"request": request.digest, **reply})


# What the server refuses


@every_exchange
def test_an_honest_response_is_taken(small: Small, ask: Callable[..., list[Any]], exchange: Exchange) -> None:
    request, reply = exchange.request, exchange.reply
    tensors = honest(request, Decoder(Checkpoint(small.model)))
    (answer,) = ask(request, pack(request, Response(tensors, reply)))
    assert answer.client == "ash"
    assert answer.reply == reply
    assert answer.tensors.keys() == tensors.keys()
    assert all(torch.equal(answer.tensors[name], tensor) for name, tensor in tensors.items())


@every_exchange
def test_a_response_to_another_request_is_refused(small: Small, ask: Callable[..., list[Any]], exchange: Exchange) -> None:
    request, reply = exchange.request, exchange.reply.model_dump(mode="json")
    tensors = honest(request, Decoder(Checkpoint(small.model)))
    later = request.model_copy(update={"round": request.round + 1})
    for info in (
        {"request": later.digest, **reply},
        {"request": None, **reply},
        {"request": request.digest[:-1], **reply},
        reply,
    ):
        with pytest.raises(FedgroveError, match="client 'ash': its response was refused: it belongs to another request"):
            ask(request, wire.pack(tensors, info))


@every_exchange
@pytest.mark.parametrize("masked", [False, True])
def test_a_reply_of_other_fields_is_refused(
    small: Small, ask: Callable[..., list[Any]], exchange: Exchange, masked: bool
) -> None:
    request, reply = exchange.request, exchange.reply.model_dump(mode="json")
    tensors = honest(request, Decoder(Checkpoint(small.model)))
    with pytest.raises(FedgroveError, match=r"its reply is not understood \(secret\)"):
        ask(request, packed(tensors, request, {**reply, "secret": "a sentence of its text"}), masked)
    for field, about in type(exchange.reply).model_fields.items():
        less = {key: value for key, value in reply.items() if key != field}
        if about.is_required():
            with pytest.raises(FedgroveError, match=rf"its reply is not understood \({field}\)"):
                ask(request, packed(tensors, request, less), masked)
        with pytest.raises(FedgroveError, match=rf"its reply is not understood \({field}"):
            ask(request, packed(tensors, request, {**reply, field: {"no": ["such", "value"]}}), masked)


@every_exchange
@pytest.mark.parametrize("masked", [False, True])
def test_tensors_of_other_names_shapes_and_dtypes_are_refused(
    small: Small, ask: Callable[..., list[Any]], exchange: Exchange, masked: bool
) -> None:
    request, reply = exchange.request, exchange.reply.model_dump(mode="json")
    tensors = honest(request, Decoder(Checkpoint(small.model)))
    refused = partial(pytest.raises, FedgroveError)
    with refused(match="'note' was not requested"):
        ask(request, packed({**tensors, "note": torch.ones(3)}, request, reply), masked)
    for name, tensor in tensors.items():
        linear = name.partition("/")[2]
        pair = [key for key in (CHANGE + linear, WEIGHT + linear) if key in tensors]  # values lie where the mask keeps them
        others = {key: value for key, value in tensors.items() if key not in pair}
        with refused(match="is missing"):
            ask(request, packed(others, request, reply), masked)
        longer = {key: torch.cat([tensors[key].view(-1), tensors[key].view(-1)]) for key in pair}
        with refused(match=r"has shape \[\d+\], not \["):
            ask(request, packed({**others, **longer}, request, reply), masked)
        with refused(match=f"{name} has dtype int16, not "):
            ask(request, packed({**tensors, name: tensor.to(torch.int16)}, request, reply), masked)
        if tensor.dtype.is_floating_point:
            mask = tensors.get(WEIGHT + linear)
            kept = mask if mask is not None and mask.dtype == torch.bool else torch.ones_like(tensor, dtype=torch.bool)
            with refused(match=f"{name} holds NaN or infinity"):
                bad = torch.full_like(tensor, torch.nan).masked_fill(~kept, 0.0)
                ask(request, packed({**tensors, name: bad}, request, reply), masked)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("claimed", [0, 1, -1, TOKENS + 1, 2**63])
@pytest.mark.parametrize(
    "kind",
    [
        "prune/block",
        "prune/statistics",
        "structured/blocks",
        "structured/experts",
        "structured/inputs",
        "structured/scores",
        "tune/importance",
        "tune/train",
    ],
)
def test_a_client_that_claims_other_tokens_is_refused(
    small: Small, ask: Callable[..., list[Any]], kind: str, claimed: int, masked: bool
) -> None:
    """Under secure aggregation too: tokens travel beside the masked tensors, where anybody can read them."""
    for exchange in EXCHANGES:
        if kind == exchange.request.KIND:
            request, reply = exchange.request, exchange.reply.model_dump(mode="json")
            tensors = honest(request, Decoder(Checkpoint(small.model)))
            with pytest.raises(FedgroveError, match=f"it claims {claimed} tokens, "):
                ask(request, packed(tensors, request, {**reply, "tokens": claimed}), masked)


# What the client refuses


@every_exchange
def test_a_request_arrives_as_it_was_sent(small: Small, tmp_path: Path, exchange: Exchange) -> None:
    only = [{"name": "ash", "data": str(small.texts["ash"])}]
    run = RunFolder(tmp_path / "run", load(small.job("sent", clients=only, evaluate={}, rounds={"quorum": 1})))
    engine = Canned(b"")
    messages = {"ash": Message(exchange.request, {"start/q": torch.ones(2)})}
    with pytest.raises(FedgroveError):
        list(collect(engine, run, messages, layout=Decoder(Checkpoint(small.model))))
    run.close()
    ((kind, message),) = engine.received
    request, tensors, masking = read(kind, message)
    assert (kind, request, masking) == (exchange.request.KIND, exchange.request, None)
    assert request.digest == exchange.request.digest
    assert torch.equal(tensors["start/q"], torch.ones(2))


@every_exchange
def test_a_request_with_other_fields_is_refused(exchange: Exchange) -> None:
    kind, fields = exchange.request.KIND, exchange.request.model_dump(mode="json")
    assert parse(kind, fields) == exchange.request
    with pytest.raises(RequestError, match="secret") as error:
        parse(kind, {**fields, "secret": 1})
    assert error.value.field == "secret"
    for wrong in (None, [], "stage", 3, [fields]):
        with pytest.raises(WireError, match=kind):
            parse(kind, wrong)
    for name, about in type(exchange.request).model_fields.items():
        if about.is_required():
            with pytest.raises(RequestError, match=name) as error:
                parse(kind, {key: value for key, value in fields.items() if key != name})
            assert error.value.field == name
        with pytest.raises(RequestError, match=name):
            parse(kind, {**fields, name: {"no": ["such", "value"]}})
    for stage in (-1, 0.5, "0", None, True):
        with pytest.raises(RequestError, match="stage"):
            parse(kind, {**fields, "stage": stage})


ODD_KINDS = [
    "", "/", "//", " ", "\n", "\0", "prune", "prune/", "/block", "prune/nothing", "prune/block/", "prune/block/x",
    "prune//block",
    "Prune/block", "prune/Block", " prune/block", "prune/block\n", "prune/__init__", "prune/.block", "prune/../block",
    "prune/../../cli", "prune/exchanges.block", "prune.exchanges/block", "prune/block.Recipe", "prune/plan", "prune/stage",
    "stages/prune", "stages.prune/block", "rounds", "rounds/secagg", "rounds/secagg/", "rounds/secagg/keys/x", "rounds/collect",
    "rounds/exchanges", "deploy", "deploy/flare", "deploy/site", "fedgrove/cli", "fedgrove.cli", "os", "os/path",
    "subprocess/Popen",
    "__main__/x", "exchanges/block", "prüne/block", "prune\\block", "prune/block" * 10_000,
]  # fmt: skip


@pytest.mark.parametrize("kind", ODD_KINDS, ids=lambda kind: ascii(kind)[:30])
def test_a_kind_that_does_not_exist_is_refused_in_one_line(kind: str) -> None:
    with pytest.raises(WireError) as error:
        request_type(kind)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 200
    with pytest.raises(WireError):
        parse(kind, {"stage": 0})


def test_a_kind_that_does_not_exist_imports_nothing() -> None:
    code = """
import json, sys
from fedgrove.rounds.request import request_type, request_types
from fedgrove.rounds.wire import WireError
request_types()
before = set(sys.modules)
for kind in json.loads(sys.argv[1]):
    try:
        request_type(kind)
    except WireError:
        pass
    else:
        print("found", kind)
print(sorted(set(sys.modules) - before))
"""
    status, out, err = python(code, json.dumps(ODD_KINDS), path=ROOT / "src")
    assert (status, out) == (0, "[]\n"), err


def test_every_kind_is_found_by_its_name() -> None:
    for one in request_types():
        assert request_type(one.KIND) is one


@pytest.mark.parametrize(
    "masking", [[], "x", {}, {"session": {}}, {"session": None, "sealed_shares": {}}, {"sealed_shares": {"ash": "00"}}], ids=str
)
def test_what_should_mask_a_response_and_cannot_is_no_request(small: Small, tmp_path: Path, masking: Any) -> None:
    job = load(small.job("masking", evaluate={}))
    client = server.local_clients(job, server.open_model(job.model), tmp_path)[0]
    message = wire.pack({}, {"request": BLOCK.model_dump(mode="json"), "masking": masking})
    with pytest.raises(RequestError, match="prune/block: masking"):
        serve(BLOCK.KIND, message, client, "cpu")
    assert not list(tmp_path.rglob("states-*")), "nothing was computed"
