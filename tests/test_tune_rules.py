"""What the server makes of adapters, against the same thing computed densely."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fedgrove import plugins
from fedgrove.errors import FedgroveError
from fedgrove.stages.tune.aggregation import Options
from fedgrove.stages.tune.changes import State
from fedgrove.stages.tune.factors import Factors, ProductSum, fill, initial_a
from fedgrove.stages.tune.parametrizations.lora import merge_dense as merge
from fedgrove.stages.tune.server_optimizers import ServerOptimizerState, step

OUT, IN = 12, 9
TOKENS = (100.0, 300.0, 50.0)


def factors(rank: int, seed: int, *, a: Tensor | None = None) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(OUT, rank, generator=generator, dtype=torch.float64)
    return Factors(b, torch.randn(rank, IN, generator=generator, dtype=torch.float64) if a is None else a[:rank].double())


def state(rank: int = 0, seed: int = 99) -> State:
    return State(factors(rank, seed), Factors.none(OUT, IN))


def aggregate(aggregation: str, start: State, clients: Sequence[Factors], rank: int = 8, partition: bool = True) -> State:
    module = plugins.load("stages.tune.aggregation", aggregation)
    sums = module.sums(start, [client.rank for client in clients])
    for client, tokens in zip(clients, TOKENS, strict=False):
        module.add(sums, client, tokens)
    return module.finish(start, sums, Options(rank, partition))


def dense_mean(clients: Sequence[Factors]) -> Tensor:
    total = sum(TOKENS[: len(clients)])
    return sum((t / total * client.product() for client, t in zip(clients, TOKENS, strict=False)), torch.zeros(OUT, IN))


@pytest.mark.parametrize("aggregation", ["flexlora", "flora", "fedex_lora"])
def test_an_exact_rule_gives_the_mean_of_the_products(aggregation: str) -> None:
    clients = [factors(3, seed) for seed in range(3)]
    torch.testing.assert_close(aggregate(aggregation, state(), clients, rank=9).total().product(), dense_mean(clients))


def test_the_frozen_a_rule_is_exact_because_a_is_shared() -> None:
    a = initial_a("linear", 4, IN, "0")
    clients = [factors(4, seed, a=a) for seed in range(3)]
    torch.testing.assert_close(aggregate("ffa_lora", state(), clients).total().product(), dense_mean(clients))


def test_the_mean_rule_is_not_the_mean_of_the_products() -> None:
    clients = [factors(3, seed) for seed in range(3)]
    got = aggregate("fedit", state(), clients).total()
    b = sum(t * c.b for c, t in zip(clients, TOKENS, strict=True)) / sum(TOKENS)
    a = sum(t * c.a for c, t in zip(clients, TOKENS, strict=True)) / sum(TOKENS)
    torch.testing.assert_close(got.product(), b @ a)
    assert (got.product() - dense_mean(clients)).norm() > 0.1 * dense_mean(clients).norm()


def test_the_mean_rule_does_not_dilute_terms_of_few() -> None:
    clients = [factors(2, 0), factors(4, 1)]
    got = aggregate("fedit", state(), clients).live
    torch.testing.assert_close(got.b[:, 2:], clients[1].b[:, 2:])
    torch.testing.assert_close(got.a[2:], clients[1].a[2:])


def test_truncation_is_the_best_approximation_of_its_rank() -> None:
    clients = [factors(4, seed) for seed in range(3)]
    got = aggregate("flexlora", state(), clients, rank=4).live
    u, s, v = torch.linalg.svd(dense_mean(clients))
    assert got.rank == 4
    torch.testing.assert_close(got.product(), u[:, :4] @ torch.diag(s[:4]) @ v[:4])
    torch.testing.assert_close(got.b.norm(dim=0), s[:4].sqrt())
    torch.testing.assert_close(got.a.norm(dim=1), s[:4].sqrt())


def test_partition_weighs_each_band_over_those_who_have_it() -> None:
    clients = [factors(2, 0), factors(5, 1), factors(5, 2)]
    got = aggregate("flexlora", state(), clients, rank=9).total().product()
    want = torch.zeros(OUT, IN, dtype=torch.float64)
    for start, end in itertools.pairwise([0, 2, 5]):
        have = [(client, t) for client, t in zip(clients, TOKENS, strict=True) if client.rank >= end]
        for client, t in have:
            want += t / sum(t for _, t in have) * client.part(start, end).product()
    torch.testing.assert_close(got, want)


def test_without_partition_the_result_is_the_mean_of_the_whole_models() -> None:
    """A client holds the terms that it does not train: its model has them, and so has the mean."""
    start = state(5)
    clients = [factors(2, 0), factors(5, 1), factors(3, 2)]
    whole = [client.product() + start.live.part(client.rank, 5).product() for client in clients]
    want = sum((t / sum(TOKENS) * model for model, t in zip(whole, TOKENS, strict=True)), torch.zeros(OUT, IN))
    got = aggregate("flexlora", start, clients, rank=9, partition=False).total().product()
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("partition", [True, False])
def test_ranks_do_not_collapse_when_clients_of_low_rank_change_nothing(partition: bool) -> None:
    start = State(factors(6, 0).compress(), Factors.none(OUT, IN))
    now = start
    for _ in range(5):
        given = [plugins.load("stages.tune.aggregation", "flexlora").begin(now, rank).own for rank in (2, 4, 6)]
        now = aggregate("flexlora", now, given, rank=6, partition=partition)
    torch.testing.assert_close(now.total().product(), start.total().product())


@pytest.mark.parametrize("aggregation", ["flexlora", "fedit", "ffa_lora"])
def test_terms_that_nobody_trained_keep_their_value(aggregation: str) -> None:
    start = state(6)
    given = start.live.part(0, 2)
    got = aggregate(aggregation, start, [given, given]).total().product()
    torch.testing.assert_close(got, start.total().product())


@pytest.mark.parametrize("aggregation", ["flexlora", "fedit", "ffa_lora", "flora", "fedex_lora"])
def test_where_nobody_answered_nothing_changes(aggregation: str) -> None:
    module, start = plugins.load("stages.tune.aggregation", aggregation), state(3)
    got = module.finish(start, module.sums(start, [3]), Options(3))
    assert torch.equal(got.total().product(), start.total().product())


@pytest.mark.parametrize("aggregation", ["flexlora", "fedit", "ffa_lora", "flora", "fedex_lora"])
@pytest.mark.parametrize("rank", [0, 2, 8])
def test_a_client_begins_with_the_whole_change_whatever_its_rank(aggregation: str, rank: int) -> None:
    start = State(factors(4, 1), factors(3, 2))
    begin = plugins.load("stages.tune.aggregation", aggregation).begin(start, rank)
    own = fill(begin.own, rank, "linear", "0")
    assert own.rank == rank
    torch.testing.assert_close(own.product() + begin.rest.product(), start.total().product())


def test_the_residual_rule_says_that_it_needs_equal_ranks() -> None:
    with pytest.raises(FedgroveError, match="equal ranks"):
        aggregate("fedex_lora", state(), [factors(2, 0), factors(3, 1)])


def test_the_sum_of_products_does_not_grow_with_the_number_of_clients() -> None:
    total, want = ProductSum(OUT, IN), torch.zeros(OUT, IN, dtype=torch.float64)
    for seed in range(60):
        total.add(factors(4, seed), 1.0 + seed)
        want += (1.0 + seed) * factors(4, seed).product()
        assert total.value.rank <= 2 * IN + 4
    torch.testing.assert_close(total.value.product(), want)


def test_clients_of_different_ranks_share_their_first_fresh_terms() -> None:
    assert torch.equal(initial_a("x", 8, IN, "0")[:3], initial_a("x", 3, IN, "0"))
    assert not torch.equal(initial_a("x", 3, IN, "0"), initial_a("y", 3, IN, "0"))
    assert initial_a("x", 500, IN, "0").abs().max() <= IN**-0.5


def test_a_server_optimizer_average_takes_the_change_and_momentum_goes_on() -> None:
    old, new = factors(3, 0), factors(3, 1)
    none = ServerOptimizerState(Factors.none(OUT, IN))
    assert step("average", old, new, none, None, 9)[0] is new
    half = step("average", old, new, none, 0.5, 9)[0]
    torch.testing.assert_close(half.product(), (old.product() + new.product()) / 2)
    change = new.product() - old.product()
    first, memory = step("momentum", old, new, none, None, 9)
    torch.testing.assert_close(first.product(), new.product())
    second, _ = step("momentum", first, first, memory, None, 9)
    torch.testing.assert_close(second.product(), new.product() + 0.9 * change)


def test_a_server_optimizer_adam_steps_by_its_rate_however_large_the_change() -> None:
    old, none = factors(3, 0), ServerOptimizerState(Factors.none(OUT, IN))
    for size in (1e-2, 1e2):
        new = old.plus(factors(3, 1).scaled(size))
        got, _ = step("adam", old, new, none, 1e-3, 9)
        moved = (got.product() - old.product()).square().mean().sqrt()
        torch.testing.assert_close(float(moved), 1e-3 * 0.1 / 0.01**0.5, rtol=1e-2, atol=0.0)


def test_merging_under_a_mask_keeps_the_zeros_and_makes_no_new_ones() -> None:
    weight = torch.tensor([[0.0, 1.0, -2.0, 0.5]])
    change = torch.tensor([[3.0, -1.0, 0.25, 0.5]])
    assert merge(weight, change, masked=True).tolist() == [[0.0, 1.0, -1.75, 1.0]]
    assert merge(weight, change, masked=False).tolist() == [[3.0, 0.0, -1.75, 1.0]]


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)])
def test_compressing_loses_nothing_and_is_always_the_same(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    wide = Factors(torch.randn(shape[0], 20).double(), torch.randn(20, shape[1]).double())
    small = wide.compress()
    assert small.rank == min(shape)
    torch.testing.assert_close(small.product(), wide.product())
    assert abs(small.norm() - float(wide.product().norm())) < 1e-9
    assert torch.equal(small.b, wide.compress().b)
    assert Factors.none(*shape).compress().rank == 0
