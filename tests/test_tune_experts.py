"""The stage ``tune`` on mixtures of experts: what is trained, whose text counts, who holds which experts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from fedgrove import run as server
from fedgrove.client.local_client import LocalClient
from fedgrove.client.windows import training_windows
from fedgrove.errors import FedgroveError
from fedgrove.job.load import load
from fedgrove.job.stage_config import Cut
from fedgrove.models.blocks import Decoder
from fedgrove.models.cost import measure_cost
from fedgrove.models.expert_cut import KeptExperts, check_kept, routing_of
from fedgrove.models.expert_sums import blocks_with_experts
from fedgrove.models.experts import TYPES
from fedgrove.models.held import HeldDecoder, write_reduced
from fedgrove.models.next_tokens import loss_sum
from fedgrove.models.stream import Checkpoint
from fedgrove.models.tensor_files import save_tensors
from fedgrove.rounds import wire
from fedgrove.rounds.disclosure import Disclosure
from fedgrove.rounds.wire import WireError
from fedgrove.run import local_clients, open_model
from fedgrove.runfolder import RunFolder
from fedgrove.stages.tune.client_model import TuneRequest, keep_held
from fedgrove.stages.tune.exchanges.experts import chosen, own_sums
from fedgrove.stages.tune.exchanges.train import Train
from fedgrove.stages.tune.routed import TOKENS, Counted, check_tokens, fractions
from fedgrove.stages.tune.train_settings import Training
from fedgrove.stages.tune.training import draw
from small import CLIENTS, LENGTH, Meddling, Moment, Small, cli, complaint, killed, lines, measurements
from test_architectures import plain, same_bits, tensors_of
from test_expert_cut import EXPERTS, forced, mixture, routers, some_kept
from test_experts import fuse

TUNE = {
    "kind": "tune", "method": "lora", "rounds": 2, "steps": 2, "length": LENGTH, "ranks": [2], "batches": [2], "bits": [32],
    "learning_rate": 0.01,
}  # fmt: skip
LITTLE = "2.65 MB"  # of memory, in which a client holds four of eight experts


def small(folder: Path, grove: Path) -> Small:
    """A federation with a mixture whose first block has no experts, and whose experts are large beside its attention."""
    return Small(folder, mixture("qwen3_moe", folder / "mixture", grove, mlp_only_layers=[0], moe_intermediate_size=96))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, grove: Path) -> Small:
    return small(tmp_path_factory.mktemp("mixed"), grove)


def clients_of(mixed: Small, memory: str = LITTLE) -> list[dict[str, Any]]:
    """The clients of a job, of which the last has little memory."""
    return [
        {"name": name, "data": str(mixed.texts[name])} | ({"memory": memory} if name == "cedar" else {}) for name in CLIENTS
    ]


def some_hold_few(mixed: Small, **changes: Any) -> Path:
    """The run of a job in which a client holds half of the experts, and every client writes a model of its own."""
    stages = [{**TUNE, "personal_experts": 0.5, **changes}]
    return mixed.undisturbed(stages=stages, clients=clients_of(mixed), evaluate={})


def one_client(mixed: Small, folder: Path) -> LocalClient:
    job = load(mixed.job("one", stages=[TUNE]))
    return local_clients(job, open_model(job.model), folder)[0]


# A step


@pytest.mark.parametrize(("name", "held"), [*((name, False) for name in TYPES), ("qwen3_moe", True), ("deepseek_v3", True)])
def test_a_step_changes_experts_as_in_plain_transformers_and_counts_their_tokens(
    name: str, held: bool, tmp_path: Path, grove: Path
) -> None:
    """SGD on one batch: a change is the gradient; of a client that holds half, the router can choose no other expert."""
    mixed = Small(tmp_path, mixture(name, tmp_path / "model", grove))
    client = one_client(mixed, tmp_path / "clients")
    decoder, model = Decoder(Checkpoint(mixed.model)), plain(mixed.model)
    everything = dict.fromkeys(blocks_with_experts(decoder), tuple(range(EXPERTS)))
    routing = routing_of(decoder.checkpoint.config)
    has: KeptExperts = some_kept(routers(model), routing.groups) if held else everything
    shapes = {linear: decoder.read_shape(linear) for linear in decoder.linear_names()}
    names = list(HeldDecoder(decoder.checkpoint, has).linear_names())
    if held:
        keep_held(client, 0, has, "")
    ids, labels = training_windows(client, LENGTH)
    request = Train(
        stage=0, parts=0, cut=None, held=EXPERTS // 2 if held else None, bits=32, length=LENGTH, seed="0/0", personal=0.0,
        parametrization="full", trainer="sgd", shared_a=False, ranks=dict.fromkeys(names, 1), scales={}, masked=(),
        tokens=ids.numel(), seen=0, dtype="float32",
        training=Training(
            steps=1, batch=3, micro=1, learning_rate=1.0, optimizer="sgd", max_grad_norm=0.0, proximal=0.0
        ),
    )  # fmt: skip
    sent = dict(request.respond({}, client, "cpu").tensors)
    tokens = sent.pop(f"change/{TOKENS}")
    assert {key.split("/")[1] for key in sent} == set(names), "no router, and of experts those that it holds"

    counts = torch.zeros_like(tokens)
    for row, block in enumerate(everything):

        def count(module: nn.Module, args: tuple[Tensor, ...], row: int = row) -> None:
            counts[row] += torch.bincount(args[1].flatten(), minlength=EXPERTS)

        model.model.layers[block].mlp.experts.register_forward_pre_hook(count)  # type: ignore[union-attr,index]
    batch, wanted = next(draw(ids, labels, 3, 0, "0/0/ash"))
    with forced(model, has), torch.enable_grad():
        model.requires_grad_()
        (loss_sum(model, batch, wanted) / int((wanted[:, 1:] != -100).sum())).backward()  # type: ignore[no-untyped-call]
    assert torch.equal(tokens, counts)
    assert tokens.sum(1).tolist() == [3 * LENGTH * routing.per_token] * len(tokens)
    for block in everything:
        experts = model.model.layers[block].mlp.experts  # type: ignore[union-attr,index]
        for number in has[block]:
            gate, up = experts.gate_up_proj.grad[number].chunk(2)  # type: ignore[union-attr,index]
            gradients = {"gate_proj": gate, "up_proj": up, "down_proj": experts.down_proj.grad[number]}  # type: ignore[union-attr,index]
            for leaf, gradient in gradients.items():
                linear = f"model.layers.{block}.mlp.experts.{number}.{leaf}"
                found = sent[f"change/{linear}/weight"]
                assert found.shape == shapes[linear]
                assert torch.allclose(found, -gradient, rtol=1e-3, atol=1e-6 + 1e-4 * float(gradient.abs().max()))


# What counts in a sum


def test_an_expert_counts_by_its_tokens_and_changes_only_if_enough_clients_trained_it(mixed: Small, tmp_path: Path) -> None:
    stage = {**TUNE, "method": "full", "rounds": 1, "optimizer": "sgd", "precision": "float32", "max_change": 1e6}
    job = load(mixed.job("counted", stages=[stage], evaluate={}))
    run = RunFolder(tmp_path / "run", job)
    sent: list[dict[str, Tensor]] = []

    def note(tensors: dict[str, Tensor], reply: dict[str, Any]) -> None:
        if len(sent) == 1:  # the second client's text reaches expert 2 of the first row no more; it changed its weights before
            tokens = tensors[f"change/{TOKENS}"]
            tokens[0, 3] += tokens[0, 2]
            tokens[0, 2] = 0
        sent.append({**tensors, "weight": torch.tensor(float(reply["tokens"]))})

    server.run_job(job, Meddling(server.local_engine(job, tmp_path / "clients"), Train.KIND, CLIENTS, note), run)
    run.close()
    before, after = (Decoder(Checkpoint(folder)) for folder in (mixed.model, tmp_path / "run" / "model"))
    most = 2 * 2 * LENGTH * stage["rounds"]  # type: ignore[operator]
    weights = [min(float(one["weight"]), most) for one in sent]
    parts = [fractions(one[f"change/{TOKENS}"], 2) for one in sent]
    assert len({tuple(part.flatten().tolist()) for part in parts}) == 3, "clients whose experts are alike tell nothing"
    for linear in before.linear_names():
        old, new = before.read_matrix(linear), after.read_matrix(linear)
        place = next(((block, int(linear.split(".")[5])) for block in (1, 2) if f"layers.{block}.mlp.experts." in linear), None)
        counts = [w * float(p[place[0] - 1, place[1]]) if place else w for w, p in zip(weights, parts, strict=True)]
        if sum(count > 0 for count in counts) < 3:
            assert same_bits(old, new), linear
            continue
        change = sum(c * one[f"change/{linear}/weight"].double() for c, one in zip(counts, sent, strict=True)) / sum(counts)
        assert torch.allclose(new, (old.double() + change).float(), rtol=0, atol=1e-6), linear
    untouched = "model.layers.1.mlp.experts.2.up_proj"
    assert same_bits(before.read_matrix(untouched), after.read_matrix(untouched))
    assert all(one[f"change/{untouched}/weight"].any() for one in sent)
    one, other = tensors_of(mixed.model), tensors_of(tmp_path / "run" / "model")
    assert all(same_bits(one[name], other[name]) for name in one if ".mlp.gate.weight" in name)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ([[3, 5, 0, 2], [5, 5, 0, 0]], None),
        ([[3, 5, 0, 1], [5, 5, 0, 0]], "does not add up to 2 experts"),
        ([[6, 4, 0, 0], [5, 5, 0, 0]], "does not add up"),
        ([[5, 6, -1, 0], [5, 5, 0, 0]], "does not add up"),
        ([[6, 6, 0, 0], [6, 6, 0, 0]], "more than the 5 tokens"),
    ],
)
def test_numbers_of_tokens_that_no_round_has_are_refused(tokens: list[list[int]], words: str | None) -> None:
    if words is None:
        check_tokens(torch.tensor(tokens), 2, 5)
        return
    with pytest.raises(WireError, match=words):
        check_tokens(torch.tensor(tokens), 2, 5)


def test_weights_of_experts_are_bounded_by_the_clients(mixed: Small) -> None:
    counted = Counted.encode(fractions(torch.tensor([[4, 2, 0, 2]]), 2), 0.5)
    assert [counted.of((0, expert)) for expert in range(4)] == [0.5, 0.25, 0.0, 0.25]
    assert counted.reached.tolist() == [[1, 1, 0, 1]]
    counted.check(0.5, 1)
    counted.check_change("x", torch.tensor([2**28]), (0, 1))
    with pytest.raises(WireError, match="x is out of range"):
        counted.check_change("x", torch.tensor([2**28 + 1]), (0, 1))
    with pytest.raises(WireError, match="x is out of range"):
        counted.check_change("x", torch.tensor([1]), (0, 2))
    with pytest.raises(WireError, match="weights is out of range"):
        counted.check(0.4, 1)
    for reached in ([[2, 1, 0, 1]], [[1, 1, 1, 1]]):
        with pytest.raises(WireError, match="reached does not fit weights"):
            Counted(counted.weights, torch.tensor(reached)).check(0.5, 1)


def test_with_noise_nothing_is_told_of_experts(mixed: Small) -> None:
    stage = {**TUNE, "epsilon": 8.0, "dp_unit": "client", "aggregation": "ffa_lora", "precision": "fixed"}
    plans = json.loads(cli("plan", mixed.job("noise", stages=[stage]), "--json")[1])
    assert plans[0]["discloses"] == ["FACTORS"]
    why = complaint("plan", mixed.job("noise-little", stages=[stage], clients=clients_of(mixed, "1 MB")))
    assert "rank 2 in every linear needs" in why


# Clients that hold some experts


def held_by(mixed: Small, run: Path, client: str) -> dict[int, tuple[int, ...]]:
    """The experts that matter most to a client's text."""
    job = load(run / "job.toml")
    one = next(one for one in local_clients(job, open_model(job.model), run / "again") if one.name == client)
    decoder = Decoder(Checkpoint(mixed.model))
    sums = own_sums(decoder, training_windows(one, LENGTH)[0], one, 0, "0/0")
    return dict(chosen(sums, blocks_with_experts(decoder), "outputs", 4, 1))


def test_a_client_of_little_memory_holds_the_experts_of_its_text(mixed: Small) -> None:
    run = some_hold_few(mixed)
    plan = json.loads((run / "plan-0-tune.json").read_text())
    assert {name: one["experts"] for name, one in plan["clients"].items()} == {"ash": 8, "birch": 8, "cedar": 4}
    held = held_by(mixed, run, "cedar")
    ranks: dict[str, dict[str, int]] = {name: one["ranks"] for name, one in plan["clients"].items()}
    assert plan["clients"]["cedar"]["memory"] <= 2.65e6 < plan["clients"]["ash"]["memory"]
    before, after = (Decoder(Checkpoint(folder)) for folder in (mixed.model, run / "model"))
    for linear in before.linear_names():
        place = next(((block, int(linear.split(".")[5])) for block in (1, 2) if f"layers.{block}.mlp.experts." in linear), None)
        enough = place is None or place[1] in held[place[0]]  # three clients, of which all have to train what changes
        assert [linear in ranks[client] for client in CLIENTS] == [enough] * 3, linear
        assert enough or same_bits(before.read_matrix(linear), after.read_matrix(linear)), linear
    assert not same_bits(before.read_matrix("model.layers.0.mlp.up_proj"), after.read_matrix("model.layers.0.mlp.up_proj"))
    assert not (run / "adapter").exists()
    told = [line for line in lines(run / "ledger.jsonl") if line["kind"] == "tune/experts"]
    assert {line["client"] for line in told} == {"cedar"}
    page = (run / "report.html").read_text()
    assert "4 of 8 experts" in page
    assert Disclosure.EXPERTS_HELD.sentence in page
    assert Disclosure.EXPERT_TOKENS.sentence in page


def test_every_client_writes_the_model_of_its_own_experts_and_sends_nothing(mixed: Small, tmp_path: Path) -> None:
    run = some_hold_few(mixed)
    for client in CLIENTS:
        folder = run / "clients" / client / "personal" / "experts-0"
        smaller = AutoModelForCausalLM.from_pretrained(folder)
        assert routing_of(smaller.config).experts == EXPERTS // 2
        whole = Checkpoint(run / "model")
        router = smaller.model.layers[1].mlp.gate.weight
        rows = whole.read("model.layers.1.mlp.gate.weight")
        kept = [int((rows == row).all(1).nonzero()) for row in router]
        assert sorted(kept) == kept
        both = {block: tuple(int((whole.read(f"model.layers.{block}.mlp.gate.weight") == row).all(1).nonzero())
                             for row in smaller.model.layers[block].mlp.gate.weight) for block in (1, 2)}  # fmt: skip
        whole.over(kept_experts=both).write(tmp_path / client)
        one, other = tensors_of(folder), tensors_of(tmp_path / client)
        assert list(one) == list(other)
        assert all(same_bits(one[name], other[name]) for name in one)
        assert f"{client}'s own experts" in (folder / "README.md").read_text()
    up = [line for line in lines(run / "ledger.jsonl") if (line["kind"], line["direction"]) == ("tune/reduced", "up")]
    assert [line["client"] for line in up] == list(CLIENTS)
    assert all(line["bytes"] < 250 for line in up), "a digest, and no tensor"


def test_a_killed_run_goes_on_to_the_same_bits(mixed: Small, tmp_path: Path) -> None:
    job = mixed.job("killed", stages=[{**TUNE, "personal_experts": 0.5}], clients=clients_of(mixed), evaluate={})
    killed("run", job, "--out", tmp_path / "run", "--quiet", moment=Moment("os.rename", "*/stage-0/changes-0001.safetensors"))
    assert cli("run", job, "--out", tmp_path / "run", "--resume")[0] == 0
    undisturbed = some_hold_few(mixed)
    assert measurements(tmp_path / "run") == measurements(undisturbed)
    for folder in ("model", *(f"clients/{client}/personal/experts-0" for client in CLIENTS)):
        one, other = tensors_of(tmp_path / "run" / folder), tensors_of(undisturbed / folder)
        assert all(same_bits(one[name], other[name]) for name in other), folder


def test_under_secure_aggregation_nobody_says_which_experts_it_holds_and_the_bits_are_the_same(
    mixed: Small, tmp_path: Path
) -> None:
    results = []
    for secure in (False, True):
        job = mixed.job(
            f"secure-{secure}",
            stages=[{**TUNE, "rounds": 1, "aggregation": "ffa_lora", "precision": "fixed"}],
            clients=clients_of(mixed),
            evaluate={},
            privacy={"secure_aggregation": secure, "min_group": 2},
        )
        assert cli("run", job, "--out", tmp_path / f"{secure}")[0] == 0
        results.append(tensors_of(tmp_path / f"{secure}" / "model"))
    assert all(same_bits(results[0][name], results[1][name]) for name in results[0])
    start = tensors_of(mixed.model)
    changed = {
        name.split(".")[5] for name in start if ".1.mlp.experts." in name and not same_bits(start[name], results[1][name])
    }
    assert len(changed) > 4, "experts that two hold change as well"
    plan = json.loads((tmp_path / "True" / "plan-0-tune.json").read_text())
    assert plan["clients"]["cedar"]["experts"] == 4
    assert plan["clients"]["cedar"]["ranks"] == plan["clients"]["ash"]["ranks"], "the server knows how many, not which"


def test_after_a_cut_of_experts_the_rest_is_tuned_and_zeros_stay(tmp_path: Path, grove: Path) -> None:
    """In one job; the checkpoint has fused experts, of which half of the weights are zero."""
    mixed = small(tmp_path, grove)
    fused = fuse(mixed.model, tmp_path / "fused")
    tensors = tensors_of(fused)
    sparse = {
        name: one.masked_fill(one.abs() < one.abs().median(), 0.0) if one.dim() == 3 else one for name, one in tensors.items()
    }
    save_tensors(sparse, fused / "model.safetensors", {"format": "pt"})
    mixed.model = fused
    cut = {"kind": "structured", "experts": 0.25, "samples": 2, "length": LENGTH}
    job = mixed.job("cut", stages=[cut, {**TUNE, "rounds": 1, "personal_experts": 0.5}], evaluate={})
    assert cli("run", job, "--out", tmp_path / "run")[0] == 0
    gone = json.loads((tmp_path / "run" / "structured.json").read_text())["blocks"]
    kept = {row["block"]: tuple(sorted(set(range(EXPERTS)) - set(row["experts"]))) for row in gone[1:]}
    before, after = Checkpoint(fused).over(kept_experts=kept), Checkpoint(tmp_path / "run" / "model")
    assert routing_of(after.config).experts == 6
    changed = 0
    for name in after.names():
        one, other = before.read(name), after.read(name)
        if one.dim() == 3:
            assert torch.equal(one == 0, other == 0), name
            changed += not torch.equal(one, other)
    assert changed == 4
    own = Checkpoint(tmp_path / "run" / "clients" / "ash" / "personal" / "experts-1")
    assert routing_of(own.config).experts == 3
    assert {own.spec(name)[0][0] for name in own.names() if len(own.spec(name)[0]) == 3} == {3}
    client = local_clients(load(job), open_model(load(job).model), tmp_path / "few")[0]
    keep_held(client, 1, {1: (0, 4), 2: (1, 5)}, "")
    request = TuneRequest(
        stage=1,
        parts=0,
        cut=Cut(0.0, 0.0, 0.0, 0.25),
        kept_experts=tuple(kept.items()),
        held=2,
        bits=32,
        length=LENGTH,
        seed="0/1",
        personal=0.0,
    )
    decoder = request.model_and_windows(client, "cpu")[0]
    assert torch.equal(
        decoder.read_matrix("model.layers.2.mlp.experts.5.up_proj"), before.read("model.layers.2.mlp.experts.5.up_proj.weight")
    )
    with decoder.loaded(2) as block:
        assert torch.equal(block.mlp.gate.weight, before.read("model.layers.2.mlp.gate.weight")[[1, 5]])  # type: ignore[union-attr]
    for wrong in ({1: (0, 1, 2, 3), 2: (0, 1, 2, 3)}, {1: kept[1]}):
        with pytest.raises(FedgroveError, match="the request is for a model with other"):
            request.model_copy(update={"kept_experts": tuple(wrong.items())}).model_and_windows(client, "cpu")


class Listening:
    """An engine that notes the tensors of one kind of request."""

    def __init__(self, engine: Any, kind: str):
        self.engine, self.kind, self.names = engine, kind, set[str]()

    def clients(self) -> list[str]:
        return self.engine.clients()  # type: ignore[no-any-return]

    def request(self, kind: str, messages: Mapping[str, bytes], *rest: Any) -> Any:
        for client in messages if kind == self.kind else ():
            self.names |= set(wire.unpack(messages[client])[0])
        return self.engine.request(kind, messages, *rest)


def test_what_pruning_made_of_fused_experts_reaches_the_clients(tmp_path: Path, grove: Path) -> None:
    mixed = small(tmp_path, grove)
    mixed.model = fuse(mixed.model, tmp_path / "fused")
    prune = {"kind": "prune", "pruner": "magnitude", "sparsity": 0.5, "samples": 2, "length": LENGTH}
    job = load(mixed.job("pruned", stages=[prune, {**TUNE, "rounds": 1, "steps": 1, "aggregation": "ffa_lora"}], evaluate={}))
    run = RunFolder(tmp_path / "run", job)
    engine = Listening(server.local_engine(job, tmp_path / "clients"), "tune/base")
    server.run_job(job, engine, run)
    run.close()
    experts = {f"model.layers.{block}.mlp.experts.{part}" for block in (1, 2) for part in ("gate_up_proj", "down_proj")}
    assert experts <= engine.names
    after = Checkpoint(tmp_path / "run" / "model")
    for stored in Decoder(after).linear_names().values():
        assert int((after.read(stored) == 0).sum()) == after.read(stored).numel() // 2, stored


# Plans and mistakes


def test_the_plan_counts_a_tokens_way_and_all_weights(mixed: Small) -> None:
    decoder = Decoder(Checkpoint(mixed.model))
    cost = measure_cost(decoder, LENGTH, masked=False)
    expert = 3 * 32 * 96
    assert cost.parameters - cost.multiplied == 2 * (8 - 2) * expert
    half = cost.holding(4)
    assert half.parameters == cost.parameters - 2 * 4 * expert
    assert half.multiplied == cost.multiplied
    assert half.others == cost.others - 2 * 4 * 32
    assert cost.holding(8) is cost


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"stages": [{**TUNE, "personal_experts": 0.1}]}, "0.1 of 8 experts is 1, but the router takes 2 at least"),
        ({"stages": [{**TUNE, "personal_experts": 0.95}]}, "all of them are no smaller model; give 0.25 to 0.88, or 0"),
        ({"stages": [{**TUNE, "personal": 0.2}]}, "personal: plain peft has no adapters for single experts"),
        ({"privacy": {"min_group": 4}}, "an expert changes only if 4 clients train it, but 3 take part; set it to 3"),
        (
            {"stages": [{**TUNE, "method": "fedpipe", "aggregation": "ffa_lora", "precision": "fixed"}]},
            'planner: with experts and precision "fixed", all clients need the same ranks; set method = "lora"',
        ),
        ({"stages": [{**TUNE, "method": "seeds", "personal_experts": 0.5}]}, "personal_experts: it has no effect"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(changes: dict[str, Any], why: str, mixed: Small) -> None:
    stages = {"stages": [TUNE], **changes}
    if any(stage["method"] == "seeds" for stage in stages["stages"]):
        stages["stages"] = [{"kind": "tune", "method": "seeds", "personal_experts": 0.5}]
    assert why in complaint("plan", mixed.job("mistake", **stages))


def test_who_has_no_memory_or_may_not_hold_some_is_named(mixed: Small) -> None:
    little = [{**client, "memory": "1 MB"} if client["name"] == "cedar" else client for client in clients_of(mixed)]
    assert "client 'cedar'" in complaint("plan", mixed.job("little", stages=[TUNE], clients=little))
    only_all = [{**TUNE, "hold_experts": "all"}]
    assert "client 'cedar'" in complaint("plan", mixed.job("all", stages=only_all, clients=clients_of(mixed)))
    assert "the model has no experts" in complaint(
        "plan", Small(mixed.folder).job("dense", stages=[{**TUNE, "personal_experts": 0.5}])
    )


@pytest.mark.parametrize(
    ("kept", "wrong"),
    [
        ({1: (0, 1, 2, 3), 2: (4, 5, 6, 7)}, None),
        ({1: (0, 1, 2, 3)}, "other blocks"),
        ({0: (0, 1, 2, 3), 1: (0, 1, 2, 3), 2: (0, 1, 2, 3)}, "other blocks"),
        ({1: (0, 1, 2, 3), 2: (5, 6, 7, 8)}, "other numbers"),
        ({1: (0, 1, 2, 3), 2: (5, 6, 7)}, "other numbers"),
    ],
)
def test_experts_that_no_cut_leaves_are_refused(kept: Mapping[int, tuple[int, ...]], wrong: str | None, mixed: Small) -> None:
    checkpoint = Checkpoint(mixed.model)
    found = check_kept(kept, checkpoint.names(), routing_of(checkpoint.config), 4, 3)
    assert found is None if wrong is None else wrong in str(found)


def test_a_smaller_model_of_changed_weights_is_in_the_shards_of_the_whole(mixed: Small, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(mixed.model)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "sharded" / file).write_bytes((mixed.model / file).read_bytes())
    checkpoint = Checkpoint(tmp_path / "sharded")
    assert len(checkpoint.shards) > 2
    kept = {1: (0, 2, 5), 2: (1, 3, 4)}
    write_reduced(checkpoint, kept, tmp_path / "smaller")
    checkpoint.over(kept_experts=kept).write(tmp_path / "expected")
    assert sorted(file.name for file in (tmp_path / "smaller").iterdir()) == sorted(
        file.name for file in (tmp_path / "expected").iterdir()
    )
    one, other = tensors_of(tmp_path / "smaller"), tensors_of(tmp_path / "expected")
    assert list(one) == list(other)
    assert all(same_bits(one[name], other[name]) for name in one)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "smaller").config.num_experts == 3


def test_a_client_whose_choice_is_another_is_told_to_continue(mixed: Small, tmp_path: Path) -> None:
    client = one_client(mixed, tmp_path)
    keep_held(client, 0, {1: (0, 1), 2: (0, 1)}, "")
    request = {"stage": 0, "parts": 0, "cut": None, "bits": 32, "length": LENGTH, "seed": "0/0", "personal": 0.0}
    with pytest.raises(FedgroveError, match="chose its experts for another model or number"):
        TuneRequest(**request, held=3).model_and_windows(client, "cpu")
    with pytest.raises(FedgroveError, match="another number of experts than it chose before"):
        keep_held(client, 0, {1: (0, 1, 2), 2: (0, 1, 2)}, "")
    with pytest.raises(FedgroveError, match="its working files are gone"):
        TuneRequest(**{**request, "stage": 1}, held=2).model_and_windows(client, "cpu")
