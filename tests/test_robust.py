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
from fedgrove.stages.tune.exchanges.train import Train
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
        ({"privacy__secure_aggregation": True, "evaluate__alone": False}, "the server does not see single values"),
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
