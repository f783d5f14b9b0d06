"""How far one client that lies can move the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fedgrove.client import HANDLERS, Site
from fedgrove.masks import Target, lowest
from fedgrove.rounds.fold import Sums
from fedgrove.rules import Options, masks, votes
from small import Small, cli, complaint


@pytest.mark.parametrize("rule", [votes, masks])
@pytest.mark.parametrize("lie", ["last", "opposite", "huge"])
def test_one_poisoned_client_of_eight_moves_the_mask_by_its_vote_at_most(rule: object, lie: str) -> None:
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
    sums = Sums()
    for mask in [*kept[:7], poisoned]:
        value = dense * mask * (1e6 if lie == "huge" and mask is poisoned else 1.0)
        sums.add(value if rule is votes else None, mask)
    _, result = rule.finish(dense, sums, target, Options())  # type: ignore[attr-defined]
    assert int((~result).sum()) == target.num_pruned(dense.numel())
    # whatever it sent, no weight is kept over another that more than one honest vote speaks for
    assert honest[result].min() >= honest[~result].max() - 1  # type: ignore[index]


def test_a_client_whose_weights_grow_past_the_bound_is_refused_by_name(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = HANDLERS["prune"]

    def poison(tensors: Any, info: Any, site: Site, device: str) -> Any:
        answer, told = honest(tensors, info, site, device)
        factor = 100 if site.name == "birch" else 1
        return {name: factor * tensor if name.startswith("change/") else tensor for name, tensor in answer.items()}, told

    monkeypatch.setitem(HANDLERS, "prune", poison)
    spec = {"evaluate": {}, "stages__0__bound": 4.0}
    words = complaint("run", small.job("bound", **spec), "--out", tmp_path / "run")
    assert "client 'birch': its answer was refused" in words
    assert "more than 4 times the largest weight before (bound)" in words
    left_out = small.job("bound", **spec, rounds={"quorum": 2})
    assert cli("run", left_out, "--out", tmp_path / "without", "--quiet")[0] == 0
    tensors = json.loads((tmp_path / "without" / "pruning.json").read_text())["tensors"]
    assert all(row["clients"] == ["ash", "cedar"] for row in tensors)
