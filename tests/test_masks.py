"""Which weights go, against brute force: by key after key, then by position."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from fedgrove.models.masks import Target, keep_highest, lowest, lowest_of_few, quotas, split_evenly


def keys_with_ties(shape: tuple[int, ...], num_keys: int, seed: int) -> list[Tensor]:
    """Keys of few different values, so that ties reach the last key and the position."""
    generator = torch.Generator().manual_seed(seed)
    dtypes = [torch.float64, torch.float32, torch.int64]
    return [torch.randint(-2, 3, shape, generator=generator).to(dtypes[i % 3]) for i in range(num_keys)]


def brute_lowest(keys: list[Tensor], count: int) -> Tensor:
    order = sorted(range(keys[0].numel()), key=lambda i: (*(key.reshape(-1)[i].item() for key in keys), i))
    marked = torch.zeros(keys[0].numel(), dtype=torch.bool)
    marked[order[:count]] = True
    return marked.view(keys[0].shape)


@pytest.mark.parametrize("num_keys", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1,), (60,), (7, 9), (2, 3, 5)], ids=str)
def test_lowest_takes_the_lowest_then_the_next_key_then_the_first_position(shape: tuple[int, ...], num_keys: int) -> None:
    keys = keys_with_ties(shape, num_keys, seed=num_keys)
    for count in range(keys[0].numel() + 1):
        marked = lowest(keys, count)
        assert marked.dtype == torch.bool
        assert torch.equal(marked, brute_lowest(keys, count)), count


def test_lowest_of_different_numbers_is_the_head_of_the_sorted_list() -> None:
    key = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    for count in (0, 1, 499, 999, 1000):
        assert torch.equal(key[lowest([key], count)].sort().values, key.sort().values[:count])


def test_lowest_reads_tensors_that_do_not_lie_in_order() -> None:
    key = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).T
    assert torch.equal(lowest([key], 20), lowest([key.contiguous()], 20))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.3, 0.5, 0.7, 0.99])
def test_keep_highest_keeps_the_highest_of_each_row_and_the_later_of_ties(sparsity: float, seed: int) -> None:
    keys = keys_with_ties((7, 13), 1 + seed % 3, seed)
    mask = keep_highest(keys, Target(sparsity))
    counts = split_evenly(Target(sparsity).num_pruned(7 * 13), 7)
    assert int((~mask).sum()) == int(sparsity * 91 + 0.5)
    assert max(counts) - min(counts) <= 1
    for row in range(7):
        assert torch.equal(~mask[row], brute_lowest([key[row] for key in keys], counts[row]))


@pytest.mark.parametrize("pattern", [(2, 4), (4, 8), (1, 4), (3, 4), (1, 2), (2, 3)], ids=str)
def test_keep_highest_keeps_n_of_every_m(pattern: tuple[int, int]) -> None:
    n, m = pattern
    keys = keys_with_ties((5, 6 * m), 2, seed=m)
    mask = keep_highest(keys, Target.of(None, pattern))
    for row in range(5):
        for group in range(0, 6 * m, m):
            part = slice(group, group + m)
            assert torch.equal(~mask[row, part], brute_lowest([key[row, part] for key in keys], m - n))


@pytest.mark.parametrize("target", [Target(0.0), Target(0.3), Target(0.99), *(Target.of(None, p) for p in ((2, 4), (13, 20)))])
@pytest.mark.parametrize("ties", [True, False])
def test_a_single_key_gives_what_it_gives_with_another_that_says_nothing(target: Target, ties: bool) -> None:
    """It is selected where several keys are sorted."""
    key = keys_with_ties((37, 200), 2, seed=1)[1] if ties else torch.randn(37, 200, generator=torch.Generator().manual_seed(0))
    assert torch.equal(keep_highest([key], target), keep_highest([key, torch.zeros_like(key)], target))


@pytest.mark.parametrize("target", [Target(0.3), Target.of(None, (2, 4))], ids=str)
def test_keep_highest_of_more_than_is_sorted_at_once(target: Target) -> None:
    shape = (1100, 1000)
    keys = keys_with_ties(shape, 2, seed=0)
    mask = keep_highest(keys, target)
    width = 4 if target.pattern else 1000
    value = (keys[0].double() * 10 + keys[1]).view(-1, width)  # one key that says what both say
    ranks = value.argsort(dim=1, stable=True).argsort(dim=1)
    counts = torch.full((len(value),), 2) if target.pattern else torch.tensor(split_evenly(330_000, 1100))
    assert torch.equal(mask.view(-1, width), ranks >= counts[:, None])


@pytest.mark.parametrize("entries", [2, 4, 256, 300])
def test_lowest_of_few_is_lowest_of_each_column(entries: int) -> None:
    key = torch.randint(0, 50, (entries, 7), generator=torch.Generator().manual_seed(entries)).float()
    expected = torch.stack([lowest([column], entries // 2) for column in key.T], dim=1)
    assert torch.equal(lowest_of_few(key, entries // 2), expected)


def test_spread_gives_whole_numbers_that_differ_by_one_at_most() -> None:
    rng = random.Random(0)
    for _ in range(500):
        total, parts = rng.randrange(0, 10**7), rng.randrange(1, 400)
        shares = split_evenly(total, parts)
        assert sum(shares) == total
        assert len(shares) == parts
        assert max(shares) - min(shares) <= 1
    assert split_evenly(3, 4) == [0, 1, 1, 1]


def test_a_target_counts_to_the_nearest_whole_number() -> None:
    assert [Target(0.5).num_pruned(n) for n in (1, 2, 3, 4)] == [1, 1, 2, 2]
    assert Target(0.7).num_pruned(10) == 7
    assert Target(0.3).num_pruned(10**9) == 3 * 10**8
    assert Target(0.0).num_pruned(10**6) == 0
    assert Target(0.99).num_pruned(1) == 1
    assert Target.of(None, (2, 4)).num_pruned(64) == 32
    assert str(Target.of(None, (2, 4))) == "2:4"
    assert str(Target(0.7)) == "0.7"


def test_rows_lose_their_zeros_before_anything_else_and_as_many_in_all() -> None:
    chance = random.Random(0)
    for _ in range(500):
        rows, width = chance.randint(1, 7), chance.randint(1, 9)
        zeros = [chance.randint(0, width) for _ in range(rows)]
        total = chance.randint(0, rows * width)
        counts = quotas(zeros, total)
        assert sum(counts) == total
        enough = sum(zeros) >= total
        for count, zero in zip(counts, zeros, strict=True):
            assert 0 <= count <= width
            assert count <= zero if enough else count >= zero
    assert quotas([0, 1, 0, 2, 1], 12) == split_evenly(12, 5), "where the zeros leave room, rows are as even as without them"
