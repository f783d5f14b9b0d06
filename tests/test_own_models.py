"""``personal`` of a stage that prunes: with the opened sums a client prunes for itself, and nothing of that leaves it."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedgrove import run as server
from fedgrove.client.hidden_states import Calibration
from fedgrove.data import windows
from fedgrove.engines.local import LocalEngine
from fedgrove.errors import FedgroveError
from fedgrove.input_statistics.exchange import SCALE
from fedgrove.input_statistics.probe import probe
from fedgrove.job.load import load
from fedgrove.models.blocks import Decoder
from fedgrove.models.stream import Checkpoint
from fedgrove.models.tensor_files import raw_bytes
from fedgrove.rounds import wire
from fedgrove.rounds.request import CHANGE
from fedgrove.runfolder import RunFolder
from fedgrove.stages.prune.exchanges.personal import CHOICE, POOLED, ChooseOwn, SolveOwnBlock
from fedgrove.stages.prune.exchanges.statistics import SumInputs
from fedgrove.stages.prune.personal import OTHERS_WEIGHTS, candidates_folder, chosen, with_others
from small import CLIENTS, LENGTH, Moment, Small, cli, complaint, killed, make_model, measurements

SAMPLES = 4
STAGE = {"aggregation": "pooled", "samples": SAMPLES, "personal": 0.5}
PERSONAL = {f"stages__0__{key}": value for key, value in STAGE.items()} | {"evaluate": {}}
FIRST, LAST = 0, len(OTHERS_WEIGHTS) - 1


class Watching(LocalEngine):
    """Keeps what clients answer to the requests of ``personal``, and their candidates before they choose."""

    def __init__(self, clients: Any, copies: Path):
        super().__init__(clients)
        self.owners, self.copies = {client.name: client for client in clients}, copies
        self.answers: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = []

    def request(
        self, kind: str, messages: Mapping[str, bytes], timeout: float | None = None, largest: int | None = None
    ) -> Iterator[tuple[str, bytes | None, str | None]]:
        if kind == ChooseOwn.KIND:
            for name in messages:
                shutil.copytree(candidates_folder(self.owners[name], 0), self.copies / name)
        for client, answer, error in super().request(kind, messages, timeout):
            if kind.startswith("prune/personal/"):
                assert answer is not None, error
                self.answers.append((kind, client, *wire.unpack(answer)))
            yield client, answer, error


def federate(small: Small, folder: Path, **changes: Any) -> tuple[Path, Watching]:
    """Runs a job; the run folder, and what clients answered."""
    job = load(small.job(folder.name, **{**PERSONAL, **changes}))
    run = RunFolder(folder / "run", job)
    engine = Watching(server.local_clients(job, server.open_model(job.model), run.path / "clients"), folder / "candidates")
    server.run_job(job, engine, run)
    run.close()
    return run.path, engine


def shared(run: Path) -> dict[str, str]:
    """The hash of every tensor that was pruned for all."""
    return {row["name"]: row["sha256"] for row in json.loads((run / "pruning.json").read_text())["tensors"]}


def candidate(folder: Path, client: str, index: int) -> dict[str, str]:
    """The hash of every tensor of a candidate."""
    hashes = {}
    for file in (folder / "candidates" / client / str(index)).iterdir():
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                hashes[name] = hashlib.sha256(raw_bytes(opened.get_tensor(name))).hexdigest()
    return hashes


def choice(run: Path, client: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "clients" / client / "personal" / "stage-0" / CHOICE).read_text())
    return content


@pytest.fixture(scope="module")
def one_block(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """A federation whose model has one block."""
    folder = tmp_path_factory.mktemp("one-block")
    return Small(folder, make_model(folder / "model", num_hidden_layers=1))


def only(small: Small, *clients: str) -> dict[str, Any]:
    return {"clients": [{"name": name, "data": str(small.texts[name])} for name in clients]}


@pytest.mark.parametrize(
    "stage",
    [
        {"pruner": "sparsegpt"},
        {"pruner": "alps"},
        {"pruner": "dsnot"},
        {"pruner": "wanda", "allocation": "owl"},
        {"pruner": "sparsegpt", "mixed": True, "protect_first_block": True, "pattern": "2:4", "sparsity": None},
    ],
    ids=lambda stage: " ".join(map(str, stage.values())),
)
def test_the_ends_are_the_shared_model_and_that_of_the_client_alone_bit_for_bit(
    small: Small, one_block: Small, tmp_path: Path, stage: dict[str, Any]
) -> None:
    small = one_block if len(stage) == 1 else small  # the others choose by block
    changes = {f"stages__0__{key}": value for key, value in stage.items()}
    (tmp_path / "all").mkdir()
    run, _ = federate(small, tmp_path / "all", **changes, **only(small, "ash", "birch"))
    for client in ("ash", "birch"):
        assert candidate(tmp_path / "all", client, LAST) == shared(run)
        assert len({tuple(sorted(candidate(tmp_path / "all", client, i).items())) for i in range(LAST + 1)}) > 2
    if "allocation" in stage:  # whose sparsities are measured on everybody's text
        return
    (tmp_path / "ash").mkdir()
    lonely, _ = federate(small, tmp_path / "ash", **changes, **only(small, "ash"))
    assert shared(lonely) == candidate(tmp_path / "all", "ash", FIRST) != shared(run)
    assert all(candidate(tmp_path / "ash", "ash", index) == shared(lonely) for index in range(LAST + 1))
    assert choice(lonely, "ash")["others_weight"] == 1.0  # all candidates are equal, so the shared model is chosen


def test_a_client_tells_three_losses_and_nothing_of_its_choice(small: Small, tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    run, engine = federate(small, tmp_path / "open")
    metrics = measurements(run)
    assert {kind for kind, *_ in engine.answers} == {SolveOwnBlock.KIND, ChooseOwn.KIND}
    for kind, client, tensors, reply in engine.answers:
        assert not tensors
        del reply["request"]
        if kind == SolveOwnBlock.KIND:
            assert not reply
            continue
        content = choice(run, client)
        measured = {row["others_weight"]: row["loss_to_report"] for row in content["measured"]}
        own = content["others_weight"]
        assert content["others_weight"] == OTHERS_WEIGHTS[chosen([row["loss_to_choose"] for row in content["measured"]])]
        said = {"shared": measured[1.0], "own": measured[own], "alone": measured[0.0], "error": None, "keeps_own": own != 1.0}
        assert reply == said == content["losses"]
        assert {key: metrics[0, None, client, f"personal/{key}"] for key in ("shared", "own", "alone")} == {
            key: said[key] for key in ("shared", "own", "alone")
        }
        assert metrics[0, None, client, "personal/keeps"] == said["keeps_own"]
    assert not list((run / "clients").glob("*/candidates-*"))


def test_under_secure_aggregation_the_models_are_the_same_and_nothing_is_told(small: Small, tmp_path: Path) -> None:
    (tmp_path / "secure").mkdir()
    secure, engine = federate(small, tmp_path / "secure", privacy={"secure_aggregation": True})
    runs = {"open": small.undisturbed(**PERSONAL), "secure": secure}
    for run in runs.values():
        files = sorted(file.relative_to(run) for file in run.glob("clients/*/personal/stage-0/*"))
        assert {str(file.parent.parent.parent.name) for file in files} == set(CLIENTS)
    for file in files:
        assert (runs["open"] / file).read_bytes() == (runs["secure"] / file).read_bytes()
    assert engine.answers
    for _, _, tensors, reply in engine.answers:
        del reply["request"]
        assert not tensors
        assert not any(reply.values())
    assert not (runs["secure"] / "metrics.jsonl").exists()
    plans = {name: json.loads((run / "plan-0-prune.json").read_text()) for name, run in runs.items()}
    assert "HELD_OUT_LOSSES" in plans["open"]["discloses"]
    assert "HELD_OUT_LOSSES" not in plans["secure"]["discloses"]


def test_the_model_of_ones_own_loads_like_any_other(small: Small) -> None:
    run = small.undisturbed(**PERSONAL)
    kept = {client: choice(run, client) for client in CLIENTS}
    assert any(content["losses"]["keeps_own"] for content in kept.values())
    for client, content in kept.items():
        folder = run / "clients" / client / "personal" / "stage-0"
        assert (folder / "config.json").is_file() == content["losses"]["keeps_own"]
        if content["losses"]["keeps_own"]:
            model = AutoModelForCausalLM.from_pretrained(folder)
            weight = model.model.layers[0].mlp.down_proj.weight
            assert int((weight == 0).sum()) == weight.numel() // 2
            AutoTokenizer.from_pretrained(folder)


KILLS = (
    Moment("os.rename", "*/candidates-0/1/block-0000.safetensors", "cut"),
    Moment("os.rename", "*/round-0/block-0001.safetensors"),
    Moment("os.rename", "*/birch/personal/stage-0"),
    Moment("os.rename", "*/personal/stage-0/choice.json", "cut"),
    Moment("open", "*/metrics.jsonl", "cut", 3),
)


def test_own_models_of_a_run_that_was_killed_at_every_step_are_the_same(small: Small, tmp_path: Path) -> None:
    whole, out = small.undisturbed(**PERSONAL), tmp_path / "run"
    job = small.job(**PERSONAL)
    for moment in KILLS:
        killed("run", job, "--out", out, "--resume", moment=moment)
    assert cli("run", job, "--out", out, "--resume")[0] == 0
    files = [file.relative_to(whole) for file in sorted(whole.glob("clients/*/personal/*/*"))]
    assert files == [file.relative_to(out) for file in sorted(out.glob("clients/*/personal/*/*"))]
    assert all((out / file).read_bytes() == (whole / file).read_bytes() for file in files)
    assert measurements(out) == measurements(whole)


def test_a_client_that_lost_its_candidates_has_no_model_of_its_own(small: Small, tmp_path: Path) -> None:
    out, job = tmp_path / "run", small.job(**PERSONAL)
    killed("run", job, "--out", out, moment=Moment("os.rename", "*/round-0/block-0001.safetensors"))
    shutil.rmtree(out / "clients" / "birch")
    status, _, err = cli("run", job, "--out", out, "--resume")
    assert status == 0
    assert "client 'birch' was not in the sums of every block: no model of its own" in err
    assert {file.parent.parent.parent.name for file in out.glob("clients/*/personal/*/choice.json")} == {"ash", "cedar"}


def test_the_report_has_shared_own_and_alone_side_by_side(small: Small) -> None:
    run = small.undisturbed(**PERSONAL)
    metrics = measurements(run)
    page = (run / "report.html").read_text()
    assert "Pruned alone" in page
    for client in CLIENTS:
        row = [f"{metrics[0, None, client, f'personal/{which}']:.3f}" for which in ("shared", "own", "alone")]
        assert all(value in page for value in row)
    out = " ".join(cli("plan", small.job(**PERSONAL))[1].split())
    assert "4 + 2 held out" in out
    assert "Every client gets the sums of all clients back, so it can tell the sum over all others." in out


def test_the_largest_weight_within_a_percent_of_the_best_perplexity_is_chosen() -> None:
    best = 3.0
    near, far = best + 0.99 * math.log1p(0.01), best + 1.01 * math.log1p(0.01)
    assert chosen([best, 4.0, near, far, 4.0, 4.0]) == 2
    assert chosen([best, far, far, far, far, far]) == 0
    assert chosen([far, best, 4.0, 4.0, 4.0, near]) == 5
    assert chosen([best] * 6) == 5


def test_the_ends_of_the_weighted_sum_are_exact() -> None:
    own, pooled = torch.tensor([1, 2**52 + 1, -3]), torch.tensor([2**60 + 2**20, 2**52 + 2, 4])
    assert torch.equal(with_others({"a": own}, {"a": pooled}, 0.0)["a"], own.double())
    assert torch.equal(with_others({"a": own}, {"a": pooled}, 1.0)["a"], pooled.double())
    half = with_others({"a": torch.tensor([2])}, {"a": torch.tensor([10])}, 0.25)["a"]
    assert half.tolist() == [4.0]


def test_windows_that_are_held_out_are_none_that_the_client_calibrates_on(small: Small, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(small.model)
    file = tmp_path / "text.jsonl"
    rows = [" ".join(f"{number}{letter}" for letter in "abcdefgh") for number in range(300)]
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    drawn = windows.calibration_windows([file], None, tokenizer, 6, LENGTH, "0/0/ash")
    held_out = windows.held_out_windows([file], None, tokenizer, 6, LENGTH, "0/0/ash", 3)
    longer = windows.calibration_windows([file], None, tokenizer, 9, LENGTH, "0/0/ash")
    assert torch.equal(torch.cat([drawn, held_out]), longer)
    with pytest.raises(FedgroveError, match=r"there are \d+ to hold out, but personal needs 9000"):
        windows.held_out_windows([file], None, tokenizer, 6, LENGTH, "0/0/ash", 9000)
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"text": " ".join(rows * 60)}) + "\n")  # begun at a drawn place, which depends on how much
    calibrated = windows.calibration_windows([long], None, tokenizer, 6, LENGTH, "0/0/ash")
    held_out = windows.held_out_windows([long], None, tokenizer, 6, LENGTH, "0/0/ash", 3)
    text = tokenizer.decode(torch.cat([calibrated.flatten(), held_out.flatten()]))
    assert text.strip() in " ".join(rows * 60)  # one piece, so none of the second windows is among the first


@pytest.fixture(scope="module")
def block(small: Small, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, SolveOwnBlock, dict[str, torch.Tensor]]:
    """A client, a request to prune block 0 for itself, and honest tensors: everybody's sums are twice its own."""
    job = load(small.job("block", **PERSONAL, stages__0__pruner="sparsegpt"))
    client = server.local_clients(job, server.open_model(job.model), tmp_path_factory.mktemp("block"))[0]
    inputs = probe(Decoder(Checkpoint(small.model)), LENGTH, 0)[0]
    calibration = Calibration(stage=0, samples=SAMPLES, length=LENGTH, seed="0/0")
    sums = SumInputs(
        stage=0, block=0, calibration=calibration,
        consumers={name: first for first, one in inputs.items() for name in one.consumers},
        widths={first: one.scale.numel() for first, one in inputs.items()}, products=tuple(inputs), mixed=False, moments=False,
        limit=2**61,
    )  # fmt: skip
    scales = {SCALE + name: one.scale for name, one in inputs.items()}
    own = sums.respond(scales, client, "cpu").tensors
    request = SolveOwnBlock(
        stage=0, block=0, calibration=calibration, held_out=2, statistics=sums, tokens=2 * calibration.tokens,
        pruner="sparsegpt", damping="each", sparsity=0.5, pattern=None,
    )  # fmt: skip
    pooled = {POOLED + name.removeprefix(CHANGE): 2 * total for name, total in own.items()}
    return client, request, {**scales, **pooled}


def a_little_less(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The client's own sums, as if nobody else had any, but for one square that is smaller by a rounding."""
    own = {name: total // 2 for name, total in tensors.items() if name.startswith(POOLED)}
    own[SQUARES][own[SQUARES].argmax()] -= 1
    return own


SQUARES, PRODUCTS = (f"{POOLED}mlp.down_proj/{part}" for part in ("squares", "products"))


def test_honest_sums_are_taken(block: Any) -> None:
    client, request, tensors = block
    assert not request.respond(tensors, client, "cpu").tensors


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensors: tensors.update(a_little_less(tensors)), "squares is out of range"),
        (lambda tensors: tensors[SQUARES].fill_(2**62 + 1), "squares is out of range"),
        (lambda tensors: tensors[PRODUCTS].fill_(2**61), "products is larger than the squares allow"),
        (lambda tensors: tensors[PRODUCTS].copy_(tensors[PRODUCTS].neg()), "products is larger than the squares allow"),
        (lambda tensors: tensors.pop(PRODUCTS), "products"),
        (lambda tensors: tensors.update({PRODUCTS: tensors[PRODUCTS].double()}), "products"),
        (lambda tensors: tensors.update({SQUARES: tensors[SQUARES][:-1]}), "squares"),
        (lambda tensors: tensors.update({f"{POOLED}x/squares": tensors[SQUARES]}), "x/squares"),
    ],
    ids=[
        "less than its own",
        "too large",
        "products",
        "products of the others",
        "none",
        "floats",
        "short",
        "more",
    ],
)
def test_sums_that_cannot_hold_its_own_are_refused(block: Any, change: Any, says: str) -> None:
    client, request, tensors = block
    moved = {name: tensor.clone() for name, tensor in tensors.items()}
    change(moved)
    with pytest.raises(FedgroveError, match=f"that came cannot hold its own: .*{says}.*; refused"):
        request.respond(moved, client, "cpu")


def test_one_client_is_sent_its_own_sums_or_refuses_them(block: Any) -> None:
    client, request, tensors = block
    alone = request.model_copy(update={"tokens": request.calibration.tokens})
    with pytest.raises(FedgroveError, match="nobody else's text is in them, but they differ; refused"):
        alone.respond(tensors, client, "cpu")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"aggregation": "fedspallm"}, 'personal belongs to aggregation = "pooled"; leave it out'),
        ({"source": "sequential"}, 'personal: with source "sequential" text passes through the shared model; use "dense"'),
        (
            {"layers": {"sample": 0.5}},
            'personal: a client needs the sums of every block to prune for itself; use layers = "all"',
        ),
        (
            {"pruner": "wanda", "epsilon": 8.0},
            "personal: losses on held-out text get no noise",
        ),
        ({"personal": 0.6}, "stages.0.personal"),
        ({"samples": 3, "personal": 0.25}, "stages.0.personal: client 'ash' would hold out fewer than two windows"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line(small: Small, changes: dict[str, Any], says: str) -> None:
    stage = {f"stages__0__{key}": value for key, value in changes.items()}
    assert says in complaint("plan", small.job("refused", **{**PERSONAL, **stage}))


def test_a_secure_sum_of_two_is_not_sent_back(small: Small) -> None:
    privacy = {"secure_aggregation": True, "min_group": 2}
    says = "personal: in a sum of two clients either could tell the other's; set privacy.min_group to 3"
    assert says in complaint("plan", small.job("two", **PERSONAL, **only(small, "ash", "birch"), privacy=privacy))
