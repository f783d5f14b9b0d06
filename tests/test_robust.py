"""How far one client that lies can move the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedgrove.client.local_client import LocalClient
from fedgrove.models.masks import Target, lowest
from fedgrove.rounds.aggregator.trimmed import TrimmedSum
from fedgrove.rounds.aggregator.weighted_sum import WeightedSum
from fedgrove.rounds.request import CHANGE, Response
from fedgrove.stages.prune.aggregation import Options, fedprllm, fedspallm
from fedgrove.stages.prune.exchanges.block import PruneBlock
from fedgrove.stages.tune.aggregation import Options as TuneOptions
from fedgrove.stages.tune.aggregation import aggregation_of
from fedgrove.stages.tune.changes import State
from fedgrove.stages.tune.config import Config
from fedgrove.stages.tune.exchanges.train import Train, Trained
from fedgrove.stages.tune.fixed_point import FixedPointChanges
from fedgrove.stages.tune.float_round import Bounds, FloatRound
from fedgrove.stages.tune.parametrizations import parametrization_of
from small import Small, cli, complaint


@pytest.mark.parametrize("aggregation", [fedspallm, fedprllm])
@pytest.mark.parametrize("lie", ["last", "opposite", "huge"])
def test_one_poisoned_client_of_eight_moves_the_mask_by_its_vote_at_most(aggregation: object, lie: str) -> None:
    torch.manual_seed(0)
    target = Target(0.5)
    dense = torch.randn(64, 96)
    kept = [~lowest([(dense + 0.5 * torch.randn(64, 96)).abs()], target.num_pruned(dense.numel())) for _ in range(8)]
    honest = sum(mask.double() for mask in kept[:7])
    poisoned = {  # each passes the checks on arrival: exactly half of the weights are kept
        "last": ~lowest([-torch.arange(dense.numel()).view_as(dense)], target.num_pruned(dense.numel())),
        "opposite": ~kept[0],
        "huge": kept[7],
    }[lie]
    sums = WeightedSum()
    for mask in [*kept[:7], poisoned]:
        value = dense * mask * (1e6 if lie == "huge" and mask is poisoned else 1.0)
        sums.add(value if aggregation is fedspallm else None, mask)
    _, result = aggregation.finish(dense, sums, target, Options())  # type: ignore[attr-defined]
    assert int((~result).sum()) == target.num_pruned(dense.numel())
    # whatever it sent, no weight is kept over another that more than one honest vote speaks for
    assert honest[result].min() >= honest[~result].max() - 1  # type: ignore[index]


def test_a_trimmed_mean_is_that_of_the_sorted_values_without_the_outermost() -> None:
    torch.manual_seed(0)
    values, kept = torch.randn(9, 40, 30), torch.rand(9, 40, 30) > 0.4
    values[4] = torch.where(torch.rand(40, 30) > 0.5, 1e30, -1e30)  # a liar
    for trim in (1, 2):
        before = torch.randn(40, 30)
        sums = TrimmedSum(trim=trim, before=before)
        for value, mask in zip(values, kept, strict=True):
            sums.add(value * mask, mask)
        found = sums.mean()
        for i, j in ((i, j) for i in range(40) for j in range(30)):
            own = sorted(float(v) for v, k in zip(values[:, i, j], kept[:, i, j], strict=True) if k)
            if len(own) > 2 * trim:
                wanted = sum(own[trim:-trim]) / (len(own) - 2 * trim)
            else:
                wanted = min(own, key=abs) if len(own) > trim else float(before[i, j]) if own else 0.0
            assert float(found[i, j]) == pytest.approx(wanted, abs=1e-12)
        assert torch.equal(sums.weight_like(values[0]), kept.sum(0).double())


def test_one_poisoned_client_of_eight_moves_no_trimmed_weight_past_the_honest() -> None:
    torch.manual_seed(0)
    target = Target(0.5)
    dense = torch.randn(64, 96)
    honest = [dense + 0.1 * torch.randn(64, 96) for _ in range(7)]
    mask = ~lowest([dense.abs()], target.num_pruned(dense.numel()))
    sums, plain = TrimmedSum(trim=1, before=dense), WeightedSum()
    for value in [*honest, 1000 * dense]:
        sums.add(value * mask, mask)
        plain.add(value * mask, mask)
    weight, _ = fedspallm.finish(dense, sums, target, Options())
    lowest_, highest = torch.stack(honest).amin(0), torch.stack(honest).amax(0)
    assert ((weight >= lowest_) & (weight <= highest))[mask].all()
    assert not ((plain.mean() >= lowest_) & (plain.mean() <= highest))[mask].any()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"stages__0__aggregation": "fedavg"}, 'trim belongs to aggregation = "fedspallm"'),
        ({"stages__0__trim": 2}, "set it to 1 at most"),
        ({"privacy__secure_aggregation": True}, "the server does not see single values"),
    ],
)
def test_trimming_that_cannot_be_is_refused(small: Small, changes: dict[str, Any], says: str) -> None:
    assert says in complaint("plan", small.job("trim", **{"stages__0__trim": 1, **changes}))


def poison(monkeypatch: pytest.MonkeyPatch, name: str, factor: float) -> None:
    """From now on one client sends weights that many times too large."""
    honest = PruneBlock.respond

    def respond(request: PruneBlock, tensors: Any, client: LocalClient, device: str) -> Response:
        response = honest(request, tensors, client, device)
        if client.name != name:
            return response
        sent = {key: factor * value if key.startswith(CHANGE) else value for key, value in response.tensors.items()}
        return Response(sent, response.reply)

    monkeypatch.setattr(PruneBlock, "respond", respond)


def test_a_job_trims_what_a_liar_sends(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, "birch", 1000)
    largest = {}
    for trim in (0, 1):
        job = small.job(f"trim-{trim}", stages__0__trim=trim, stages__0__max_weight_growth=1e6, evaluate={})
        assert cli("run", job, "--out", tmp_path / str(trim), "--quiet")[0] == 0
        weights = load_file(tmp_path / str(trim) / "model" / "model.safetensors")
        largest[trim] = max(float(weights[name].abs().max()) for name in weights if "proj" in name)
    assert largest[0] > 50 * largest[1]


def test_a_client_whose_weights_grow_past_the_bound_is_refused_by_name(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, "birch", 100)
    spec: dict[str, Any] = {"evaluate": {}}
    words = complaint("run", small.job("default", **spec), "--out", tmp_path / "default")
    assert "more than 8 times the largest weight before (max_weight_growth)" in words
    spec["stages__0__max_weight_growth"] = 4.0
    words = complaint("run", small.job("bound", **spec), "--out", tmp_path / "run")
    assert "client 'birch': its response was refused" in words
    assert "more than 4 times the largest weight before (max_weight_growth)" in words
    left_out = small.job("bound", **spec, rounds={"quorum": 2})
    assert cli("run", left_out, "--out", tmp_path / "without", "--quiet")[0] == 0
    tensors = json.loads((tmp_path / "without" / "pruning.json").read_text())["tensors"]
    assert all(row["clients"] == ["ash", "cedar"] for row in tensors)


@pytest.mark.parametrize("method", ["lora", "full", "ia3"])
def test_a_client_whose_trained_numbers_are_out_of_range_is_refused_by_name(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    honest = Train.respond

    def respond(request: Train, tensors: Any, client: LocalClient, device: str) -> Response:
        response = honest(request, tensors, client, device)
        if client.name != "birch":
            return response
        return Response({key: torch.full_like(value, 1e30) for key, value in response.tensors.items()}, response.reply)

    monkeypatch.setattr(Train, "respond", respond)
    stage = {"kind": "tune", "method": method, "rounds": 1, "steps": 1, "length": 16, "batches": [1], "bits": [32]}
    job = small.job("liar", stages=[stage], evaluate={}, rounds={"quorum": 2})
    status, _, err = cli("run", job, "--out", tmp_path / "run")
    assert status == 0
    assert "birch: its response was refused: " in err
    assert "has numbers larger than 64" in err
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(bool(tensor.isfinite().all()) and float(tensor.abs().max()) < 100 for tensor in weights.values())


# One liar among the clients that tune

OUT, IN, RANK = 24, 16, 3
HONEST, TOKENS = 4, 1000
AGGREGATIONS = [
    ("lora", "flexlora"), ("lora", "fedit"), ("lora", "flora"), ("lora", "fedex_lora"), ("lora", "ffa_lora"),
    ("full", "fedavg"), ("ia3", "fedavg"),
]  # fmt: skip


def one_round(folder: Path, method: str, aggregation: str, lie: float, tokens: int = TOKENS) -> tuple[Any, list[str]]:
    """The total change of a linear after a round of honest clients and one whose numbers are that many times too large."""
    what, how = parametrization_of(method), aggregation_of(aggregation)
    generator = torch.Generator().manual_seed(1)

    def numbers(*shape: int) -> torch.Tensor:
        return 0.1 * torch.randn(shape, generator=generator)

    state = State(what.none((OUT, IN)), what.none((OUT, IN)))
    assigned = {f"c{number}": {"x": RANK if what.RANKED else 1} for number in range(HONEST + 1)}
    ranks = {"x": [one["x"] for one in assigned.values()]}
    sums = FloatRound(what, how, {"x": state}, {"x": (OUT, IN)}, ranks, assigned, "s", Bounds(4.0, 2 * TOKENS), folder)
    shapes = {name: shape for name, (shape, _) in what.expected((OUT, IN), RANK, torch.float32, how.SHARED_A).items()}
    for number, client in enumerate(assigned):
        liar = number == HONEST
        factor = lie if liar else 1.0
        tensors = {f"change/x/{part}": factor * numbers(*shape) for part, shape in shapes.items()}
        sums.add(client, tensors, Trained(tokens=tokens if liar else TOKENS, loss=1.0))
    scaled = sums.finish()
    new = how.finish(state, sums.sums["x"], TuneOptions(RANK))
    return new.total(), scaled


def difference(one: Any, other: Any) -> float:
    return float(one.plus(other.scaled(-1.0)).norm())


@pytest.mark.parametrize(("method", "aggregation"), AGGREGATIONS)
@pytest.mark.parametrize("lie", [64.0, -64.0, 600.0, 1e30])
def test_one_liar_moves_a_round_of_tuning_by_its_bound_at_most(
    tmp_path: Path, method: str, aggregation: str, lie: float
) -> None:
    honest, scaled = one_round(tmp_path, method, aggregation, 1.0)
    assert scaled == []
    moved, scaled = one_round(tmp_path, method, aggregation, lie)
    assert scaled == [f"c{HONEST}"]
    assert not list(tmp_path.iterdir()), "nothing waits any more"
    # each of five has a fifth of the weight: the liar's is at most four medians long, and an honest one's about one
    largest = max(4 * honest.norm() * HONEST**0.5 * 2, 1e-9)
    assert difference(moved, honest) <= largest
    assert moved.norm() < 10 * honest.norm()


@pytest.mark.parametrize(("method", "aggregation"), AGGREGATIONS)
def test_claimed_tokens_count_no_more_than_the_job_can_train_on(tmp_path: Path, method: str, aggregation: str) -> None:
    most, _ = one_round(tmp_path, method, aggregation, 1.0, tokens=2 * TOKENS)
    claimed, _ = one_round(tmp_path, method, aggregation, 1.0, tokens=2**50)
    assert difference(claimed, most) == pytest.approx(0, abs=1e-6)
    config = {"kind": "tune", "rounds": 3, "steps": 5, "batches": [2, 4], "length": 7}
    assert Config(**config, max_steps=0).most_tokens == 3 * 5 * 4 * 7
    assert Config(**config, max_steps=9).most_tokens == 3 * 9 * 4 * 7
    numbers = FixedPointChanges(everything=3 * TOKENS, most=TOKENS, widest={})
    assert numbers.weight(2**50) == numbers.weight(TOKENS) == 1 / 3


def test_two_clients_have_no_median_to_be_compared_with(tmp_path: Path) -> None:
    what, how = parametrization_of("full"), aggregation_of("fedavg")
    state = State(what.none((OUT, IN)), what.none((OUT, IN)))
    assigned = {"a": {"x": 1}, "b": {"x": 1}}
    sums = FloatRound(what, how, {"x": state}, {"x": (OUT, IN)}, {"x": [1, 1]}, assigned, "s", Bounds(4.0, TOKENS), tmp_path)
    for client, size in (("a", 1.0), ("b", 9.0)):
        sums.add(client, {"change/x/weight": torch.full((OUT, IN), size)}, Trained(tokens=9, loss=1.0))
    assert sums.finish() == []
