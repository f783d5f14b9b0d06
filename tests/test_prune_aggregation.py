"""Aggregations against the papers' formulas written out position by position, and what holds for every one of them."""

from __future__ import annotations

import doctest
import itertools
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedgrove import plugins
from fedgrove.input_statistics.statistics import InputStatistics
from fedgrove.models.blocks import Decoder
from fedgrove.models.masks import Target
from fedgrove.models.stream import Checkpoint
from fedgrove.rounds.aggregator import weighted_sum
from fedgrove.rounds.aggregator.weighted_sum import WeightedSum
from fedgrove.stages.prune.aggregation import Options
from fedgrove.stages.prune.pruners import magnitude
from small import LENGTH, Small, cli

AGGREGATIONS = ["fedspallm", "fedavg", "fedprllm"]
PAPER = Options()
TARGETS = [Target(0.5), Target(0.7), Target(0.3), Target.of(None, (2, 4)), Target.of(None, (4, 8))]


@dataclass
class Client:
    weight: Tensor
    mask: Tensor
    tokens: int = 100
    scale: float = 1.0  # inverse probability of being given the block


def make_clients(
    num: int, target: Target, dtype: torch.dtype = torch.float32, shape: tuple[int, int] = (12, 40)
) -> tuple[Tensor, list[Client]]:
    """A dense weight, and what clients made of it who agree in part."""
    random = torch.Generator().manual_seed(num)
    dense = torch.randn(shape, generator=random)
    clients = []
    for i in range(num):
        own = dense + 0.3 * torch.randn(shape, generator=random)
        weight, mask = magnitude.prune(own, InputStatistics("nothing"), target)
        clients.append(Client(weight.to(dtype), mask, tokens=100 * (i + 1), scale=1.0))
    return dense.to(dtype), clients


def add_up(aggregation: str, before: Tensor, clients: list[Client]) -> WeightedSum:
    sums = WeightedSum()
    for client in clients:
        change, weight = plugins.load("stages.prune.aggregation", aggregation).weigh(
            before, client.weight, client.mask, client.tokens
        )
        sums.add(change, weight, client.scale)
    return sums


def finish(
    aggregation: str, before: Tensor, clients: list[Client], target: Target, options: Options = PAPER
) -> tuple[Tensor, Tensor]:
    weight, mask = plugins.load("stages.prune.aggregation", aggregation).finish(
        before, add_up(aggregation, before, clients), target, options
    )
    assert weight.dtype == before.dtype
    assert mask.dtype == torch.bool
    assert not weight[~mask].view(torch.uint8).any(), "a pruned weight is not +0.0"
    return weight, mask


def fedspallm(clients: list[Client], target: Target, options: Options = PAPER) -> tuple[Tensor, Tensor]:
    """Equation 5 and section 4.2, one position at a time in Python's own float64."""
    rows, columns = clients[0].weight.shape
    votes, mean = {}, {}
    for j in itertools.product(range(rows), range(columns)):
        votes[j] = sum(client.scale * bool(client.mask[j]) for client in clients)
        kept = sum(client.scale * float(client.weight[j]) for client in clients if client.mask[j])
        mean[j] = kept / votes[j] if votes[j] else 0.0
    zeros = {j for j in votes if votes[j] == 0}
    if options.expand:
        width = target.pattern[1] if target.pattern else rows * columns
        count = target.pattern[1] - target.pattern[0] if target.pattern else int(target.sparsity * rows * columns + 0.5)
        order = list(votes)
        for start in range(0, rows * columns, width):
            group = sorted(order[start : start + width], key=lambda j: (votes[j], abs(mean[j]), j))
            zeros |= set(group[:count])
    weight = torch.zeros(rows, columns, dtype=torch.float64)
    mask = torch.ones(rows, columns, dtype=torch.bool)
    for j in votes:
        if j in zeros:
            mask[j] = False
        else:
            weight[j] = mean[j] * (votes[j] / sum(client.scale for client in clients)) ** options.shrink
    return weight.to(clients[0].weight.dtype), mask


def test_the_example_of_the_weighted_sum_is_true() -> None:
    result = doctest.testmod(weighted_sum)
    assert result.attempted > 3
    assert result.failed == 0


@pytest.mark.parametrize("options", [Options(), Options(shrink=0.5), Options(expand=False), Options(1.0, False)], ids=str)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_fedspallm_is_the_published_one(target: Target, options: Options) -> None:
    before, clients = make_clients(5, target)
    weight, mask = finish("fedspallm", before, clients, target, options)
    expected, expected_mask = fedspallm(clients, target, options)
    assert torch.equal(mask, expected_mask)
    assert torch.allclose(weight, expected, rtol=1e-6, atol=0)


def test_fedspallm_weighs_clients_by_the_inverse_of_their_probability() -> None:
    target = Target(0.6)
    before, clients = make_clients(4, target)
    for client, scale in zip(clients, (1.0, 1.0, 1.5, 6.0), strict=True):
        client.scale = scale
    weight, mask = finish("fedspallm", before, clients, target)
    expected, expected_mask = fedspallm(clients, target)
    assert torch.equal(mask, expected_mask)
    assert torch.allclose(weight, expected, rtol=1e-6, atol=0)
    outvoted = clients[3].mask & ~clients[0].mask & ~clients[1].mask & ~clients[2].mask  # 6 votes to 3.5
    assert outvoted.any()
    assert mask[outvoted].sum() > 0.5 * outvoted.sum()
    assert torch.equal(weight[outvoted & mask], clients[3].weight[outvoted & mask])


def test_inverse_probabilities_make_up_for_clients_with_many_blocks() -> None:
    """Over all draws, Σ a·W and Σ a in the sum are what they would be if everybody had been asked."""
    before, clients = make_clients(3, Target(0.5), torch.float64)
    probability = [1.0, 0.5, 0.25]
    value, weight = torch.zeros_like(before), torch.zeros_like(before)
    for draw in itertools.product([True, False], repeat=3):
        chance, sums = 1.0, WeightedSum()
        for client, asked, p in zip(clients, draw, probability, strict=True):
            chance *= p if asked else 1 - p
            if asked:
                sums.add(client.weight, client.mask, 1 / p)
        if chance:
            assert sums.value is not None
            value += chance * sums.value
            weight += chance * sums.weight_like(before)
    everybody = add_up("fedspallm", before, clients)
    assert torch.allclose(value, everybody.value, rtol=1e-12)
    assert torch.allclose(weight, everybody.weight_like(before), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_equal_masks_give_the_plain_mean(target: Target, dtype: torch.dtype) -> None:
    before, clients = make_clients(4, target, dtype)
    for client in clients[1:]:
        client.weight = torch.where(clients[0].mask, client.weight + 1, 0).to(dtype)
        client.mask = clients[0].mask
    weight, mask = finish("fedspallm", before, clients, target)
    assert torch.equal(mask, clients[0].mask)
    assert torch.equal(weight, torch.stack([client.weight.double() for client in clients]).mean(0).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1.5, 7 / 3, 1e-3])
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_one_client_alone_gets_what_it_pruned_bit_for_bit(target: Target, scale: float, dtype: torch.dtype) -> None:
    before, (client,) = make_clients(1, target, dtype)
    client.scale = scale
    for aggregation in ("fedspallm", "fedavg"):
        weight, mask = finish(aggregation, before, [client], target, Options(shrink=0.5 if aggregation == "fedspallm" else 0.0))
        assert torch.equal(weight.view(torch.uint8), client.weight.view(torch.uint8)), aggregation
        assert torch.equal(mask, client.mask), aggregation
    weight, mask = finish("fedprllm", before, [client], target)
    assert torch.equal(mask, client.mask)
    assert torch.equal(weight, before.masked_fill(~mask, 0.0))


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_the_zeros_are_those_with_the_fewest_votes(target: Target) -> None:
    before, clients = make_clients(7, target)
    votes = sum(client.mask.int() for client in clients)
    for aggregation in ("fedspallm", "fedprllm"):
        mask = finish(aggregation, before, clients, target)[1]
        assert int((~mask).sum()) == target.num_pruned(mask.numel())
        width = target.pattern[1] if target.pattern else mask.numel()
        for kept, vote in zip(mask.view(-1, width), votes.view(-1, width), strict=True):
            assert vote[~kept].max() <= vote[kept].min()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_a_target_is_met_exactly(aggregation: str, target: Target) -> None:
    for shape in ((3, 8), (16, 72)):
        before, clients = make_clients(3, target, shape=shape)
        mask = finish(aggregation, before, clients, target)[1]
        assert int((~mask).sum()) == target.num_pruned(mask.numel())


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("pattern", [(2, 4), (4, 8), (1, 4), (3, 4)], ids=str)
def test_a_pattern_stays_a_pattern(aggregation: str, pattern: tuple[int, int]) -> None:
    n, m = pattern
    target = Target.of(None, pattern)
    before, clients = make_clients(5, target)
    weight, mask = finish(aggregation, before, clients, target)
    assert (mask.view(-1, m).sum(1) == n).all()
    assert ((weight != 0).view(-1, m).sum(1) <= n).all()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_order_of_the_clients_changes_no_bit(aggregation: str) -> None:
    """Rounds add by name; here even the order of the sum changes, and float64 hides it."""
    target = Target(0.5)
    before, clients = make_clients(4, target)
    weight, mask = finish(aggregation, before, clients, target)
    for order in itertools.permutations(clients):
        again, mask_again = finish(aggregation, before, list(order), target)
        assert torch.equal(mask, mask_again)
        assert torch.equal(weight, again)


@pytest.mark.parametrize("poison", ["huge", "inverted", "all in one corner"])
@pytest.mark.parametrize("aggregation", ["fedspallm", "fedprllm"])
def test_one_poisoned_client_of_eight_moves_no_position_by_more_than_its_vote(aggregation: str, poison: str) -> None:
    target = Target(0.5)
    before, clients = make_clients(8, target)
    honest_votes = sum(client.mask.int() for client in clients)
    mask = finish(aggregation, before, clients, target)[1]
    bad = clients[3]
    if poison == "huge":
        bad.weight = bad.weight * 1e30
    elif poison == "inverted":
        bad.mask = ~bad.mask
        bad.weight = torch.where(bad.mask, 1e6, 0.0)
    else:
        bad.mask = (torch.arange(before.numel()) < before.numel() // 2).view_as(before)
        bad.weight = torch.where(bad.mask, -1e6, 0.0)
    poisoned_mask = finish(aggregation, before, clients, target)[1]
    votes = sum(client.mask.int() for client in clients)
    assert (votes - honest_votes).abs().max() <= 1
    # whoever wanted all of a position's votes, or none, gets it whatever one client says: the line lies in between
    line = honest_votes[~mask].max()
    moved = mask != poisoned_mask
    assert ((honest_votes[moved] - line).abs() <= 1).all()
    if poison == "huge":
        assert ((honest_votes[moved]) == line).all()  # values settle ties and nothing more


def test_fedavg_is_the_mean_by_tokens_zeros_counted() -> None:
    target = Target(0.5)
    before, clients = make_clients(4, target)
    weight, mask = finish("fedavg", before, clients, target)
    total = sum(client.tokens for client in clients)
    expected = sum(client.weight.double() * client.tokens for client in clients) / total
    threshold = expected.abs().flatten().kthvalue(target.num_pruned(mask.numel())).values
    assert torch.equal(mask, expected.abs() > threshold)
    assert torch.allclose(weight, torch.where(mask, expected, 0.0).float(), rtol=1e-6)
    dense = finish("fedavg", before, clients, target, Options(expand=False))
    assert torch.equal(dense[1], torch.stack([client.mask for client in clients]).any(0))
    assert torch.allclose(dense[0], expected.float(), rtol=1e-6)


def test_fedprllm_keeps_the_values_of_before() -> None:
    target = Target(0.5)
    before, clients = make_clients(6, target)
    weight, mask = finish("fedprllm", before, clients, target)
    votes = sum(client.mask.int() for client in clients).flatten().tolist()
    values = before.abs().flatten().tolist()
    order = sorted(range(before.numel()), key=lambda j: (votes[j], values[j], j))
    expected = torch.ones(before.numel(), dtype=torch.bool)
    expected[order[: target.num_pruned(before.numel())]] = False
    assert torch.equal(mask.flatten(), expected)
    assert torch.equal(weight[mask], before[mask])


def test_fedprllm_counts_more_clients_than_a_byte_holds() -> None:
    """The published code counts in int8 and wraps at 128."""
    before = torch.tensor([[3.0, 1.0, 2.0, 4.0]])
    sums = WeightedSum()
    for _ in range(300):
        sums.add(None, torch.tensor([[False, True, True, False]]))
    mask = plugins.load("stages.prune.aggregation", "fedprllm").finish(before, sums, Target(0.5), Options())[1]
    assert mask.tolist() == [[False, True, True, False]]


def test_without_expansion_only_what_nobody_kept_is_zero() -> None:
    before, clients = make_clients(4, Target(0.6))
    mask = finish("fedspallm", before, clients, Target(0.6), Options(expand=False))[1]
    assert torch.equal(mask, torch.stack([client.mask for client in clients]).any(0))
    assert int((~mask).sum()) < Target(0.6).num_pruned(mask.numel())


def test_clients_that_prune_more_than_the_target_are_believed_and_those_that_prune_less_are_expanded() -> None:
    _, sparse = make_clients(2, Target(0.8))
    before, mixed = make_clients(2, Target(0.3))
    assert int((~finish("fedspallm", before, mixed, Target(0.5))[1]).sum()) == 240
    agreed = torch.stack([client.mask for client in sparse]).any(0)
    assert torch.equal(finish("fedspallm", before, sparse, Target(0.5))[1], agreed)


def test_shrink_pulls_what_few_kept_towards_zero() -> None:
    target = Target(0.5)
    before, clients = make_clients(4, target)
    plain, mask = finish("fedspallm", before, clients, target)
    share = sum(client.mask.double() for client in clients) / 4
    for gamma in (0.5, 1.0):
        weight, same_mask = finish("fedspallm", before, clients, target, Options(shrink=gamma))
        assert torch.equal(mask, same_mask)
        assert torch.allclose(weight, (plain.double() * share**gamma).float(), rtol=1e-6)
    tokens_alike = [Client(client.weight, client.mask) for client in clients]
    by_mean = finish("fedavg", before, tokens_alike, target, Options(expand=False))[0]
    assert torch.allclose(weight[mask], by_mean[mask], rtol=1e-6)  # γ = 1 is plain averaging's value


def test_sums_hold_one_tensor_whatever_the_number_of_clients() -> None:
    sums = WeightedSum()
    for i in range(50):
        sums.add(torch.full((4, 4), float(i)), torch.ones(4, 4, dtype=torch.bool), 2.0)
    assert sums.value is not None
    assert sums.value.shape == sums.weight_like(sums.value).shape == (4, 4)
    assert sums.clients == 100.0
    assert torch.equal(sums.mean(), torch.full((4, 4), 24.5, dtype=torch.float64))


def test_sums_keep_what_float32_would_lose() -> None:
    sums = WeightedSum()
    for value in (1e8, 1.0, -1e8):
        sums.add(torch.tensor([value]), 1.0)
    assert sums.value is not None
    assert sums.value.item() == 1.0


def test_shrink_measures_against_all_clients_even_where_none_agree() -> None:
    before = torch.ones(1, 2)
    clients = [Client(torch.tensor([[4.0, 0.0]]), torch.tensor([[True, False]]), scale=3.0)]
    clients.append(Client(torch.tensor([[0.0, 8.0]]), torch.tensor([[False, True]])))
    weight = finish("fedspallm", before, clients, Target(0.0), Options(shrink=1.0))[0]
    assert weight.tolist() == [[3.0, 2.0]]  # 4 by 3 votes of 4, 8 by 1 vote of 4


@pytest.mark.parametrize(("pruner", "aggregation"), [("wanda", "fedspallm"), ("dsnot", "fedprllm"), ("wanda", "fedavg")])
def test_a_second_round_makes_no_more_zeros_than_the_target(pruner: str, aggregation: str, tmp_path: Path) -> None:
    """Votes choose among the whole matrix, Wanda in every row: in a second round rows with few zeros would lose more."""
    small = Small(tmp_path)
    stage = {"kind": "prune", "pruner": pruner, "aggregation": aggregation, "sparsity": 0.5, "samples": 3, "length": LENGTH}
    assert cli("run", small.job(stages=[{**stage, "rounds": 2}], evaluate={}), "--out", tmp_path / "run")[0] == 0
    after = Checkpoint(tmp_path / "run" / "model")
    for stored in Decoder(after).linear_names().values():
        weight = after.read(stored)
        assert int((weight == 0).sum()) == weight.numel() // 2, stored
