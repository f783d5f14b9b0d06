"""How far one client that lies can move the result."""

from __future__ import annotations

import pytest
import torch

from fedgrove.masks import Target, lowest
from fedgrove.rounds.fold import Sums
from fedgrove.rules import Options, masks, votes


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
