"""Pruners against the published algorithms, on the shipped model and on matrices made to be awkward."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import reference
from fedgrove import plugins
from fedgrove.data.windows import calibration_windows
from fedgrove.input_statistics.statistics import FLOOR, OWN, InputStatistics
from fedgrove.models.blocks import Decoder
from fedgrove.models.masks import Target
from fedgrove.models.stream import Checkpoint
from fedgrove.stages.prune import pruners
from fedgrove.stages.prune.calibration_pass import gather
from fedgrove.stages.prune.pruners import alps, dsnot, magnitude, sparsegpt, wanda

PRUNERS = plugins.names("stages.prune.pruners")
TARGETS = [Target(0.5), Target(0.7), Target.of(None, (2, 4)), Target.of(None, (4, 8))]


class Linear(NamedTuple):
    name: str
    weight: Tensor  # float32
    inputs: InputStatistics


@pytest.fixture(scope="module")
def linears(demo: Path, grove: Path) -> list[Linear]:
    """Every second linear of the shipped model's first block and the others of its fifth, with the statistics of real text."""
    decoder = Decoder(Checkpoint(grove))
    windows = calibration_windows([demo / "texts" / "theatre.txt"], None, decoder.checkpoint.tokenizer(), 8, 512, "seed")
    states = [decoder.embed(ids[None])[0] for ids in windows]
    calls = decoder.embed(windows[:1])[1]
    found = []
    for index in range(5):
        with decoder.loaded(index) as block:
            if index in (0, 4):
                gathered = list(gather(decoder, block, states, calls[index], "gram").items())
                for name, inputs in gathered[index // 4 :: 2]:
                    found.append(Linear(f"{index}.{name}", decoder.read_linear(index, name).float(), inputs))
            states = [decoder.run(block, hidden, calls[index]) for hidden in states]
    return found


RESULTS: dict[tuple[str, str, Target], tuple[Tensor, Tensor]] = {}  # several tests look at them


def exactly_published(linear: Linear, target: Target) -> tuple[Tensor, Tensor]:
    """The published algorithm's weight and mask, with exact counts and a factor in float64."""
    key = ("published", linear.name, target)
    if key not in RESULTS:
        given = (linear.weight, linear.inputs.gram, target.sparsity, target.pattern)
        RESULTS[key] = reference.sparsegpt(*given, exact=True, factor=torch.float64)
    return RESULTS[key]


def pruned_by_sparsegpt(linear: Linear, target: Target) -> tuple[Tensor, Tensor]:
    """As it is by default."""
    key = ("ours", linear.name, target)
    if key not in RESULTS:
        RESULTS[key] = sparsegpt.prune(linear.weight.clone(), linear.inputs, target)
    return RESULTS[key]


def made_up(rows: int, columns: int, tokens: int, seed: int = 0, name: str = "sparsegpt") -> tuple[Tensor, InputStatistics]:
    """A random weight and statistics of random inputs of very different scale, as the pruner of that name wants them."""
    random = torch.Generator().manual_seed(seed)
    inputs = inputs_for(name)
    inputs.add(torch.randn(tokens, columns, generator=random) * torch.rand(columns, generator=random).add(0.01))
    return torch.randn(rows, columns, generator=random), inputs


def inputs_for(name: str) -> InputStatistics:
    return InputStatistics("moments" if plugins.load("stages.prune.pruners", name).NEEDS == "moments" else "gram")


def loss(change: Tensor, inputs: InputStatistics) -> float:
    """The squared error of the outputs."""
    return float((change @ inputs.gram.float() * change).sum())


def is_plus_zero(values: Tensor) -> bool:
    return not values.view(torch.int32).any()


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_sparsegpt_is_the_published_one_but_for_the_counts(
    linears: list[Linear], target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparsegpt, "FACTOR_DTYPE", torch.float64)  # both exact: then not even near-ties differ
    assert len({linear.name.partition(".")[2] for linear in linears}) == len(linears) == 7
    for linear in linears:
        name, weight, inputs = linear
        expected, expected_mask = exactly_published(linear, target)
        got, mask = sparsegpt.prune(weight.clone(), inputs, target)
        assert torch.equal(mask, expected_mask), name
        assert (got - expected).abs().max() <= 1e-5 * weight.abs().max(), name


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_sparsegpt_differs_from_the_published_one_in_its_extra_entries_and_what_follows(
    linears: list[Linear], target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparsegpt, "FACTOR_DTYPE", torch.float64)
    for name, weight, inputs in linears:
        expected, expected_mask = reference.sparsegpt(
            weight, inputs.gram, target.sparsity, target.pattern, factor=torch.float64
        )
        got, mask = sparsegpt.prune(weight.clone(), inputs, target)
        # the first block of columns has no past: there the extra entries differ, all tied at the threshold, and no other
        extra = mask[:, :128] & ~expected_mask[:, :128]
        assert torch.equal(mask[:, :128] & ~extra, expected_mask[:, :128]), name
        if target.pattern:
            assert torch.equal(mask, expected_mask), name
        elif extra.any():
            assert extra.any(0).sum() == 1, name
            assert weight[:, :128][extra].abs().unique().numel() == 1, name
        assert int((mask != expected_mask).sum()) <= 1e-3 * mask.numel(), name
        alike = (mask == expected_mask).all(1)  # rows do not touch each other: one mask, one result
        assert alike.sum() > 0.5 * len(alike), name
        assert (got - expected)[alike].abs().max() <= 1e-5 * weight.abs().max(), name


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_sparsegpt_stays_close_to_the_published_one_in_its_own_float32(linears: list[Linear], target: Target) -> None:
    for linear in linears:
        name, weight, inputs = linear
        expected_mask = reference.sparsegpt(weight, inputs.gram, target.sparsity, target.pattern)[1]
        mask = pruned_by_sparsegpt(linear, target)[1]
        assert int((mask != expected_mask).sum()) <= 1e-3 * mask.numel(), name


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_a_float32_factor_decides_near_ties_in_another_way_and_is_no_worse(linears: list[Linear], target: Target) -> None:
    for linear in linears:
        name, weight, inputs = linear
        expected, expected_mask = exactly_published(linear, target)
        got, mask = pruned_by_sparsegpt(linear, target)
        assert int((mask != expected_mask).sum()) <= 5e-4 * mask.numel(), name
        alike = (mask == expected_mask).all(1)
        assert (got - expected)[alike].abs().max() <= 2e-4 * weight.abs().max(), name
        assert loss(got - weight, inputs) <= 1.01 * loss(expected - weight, inputs), name


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_wanda_is_the_published_one_but_for_rounding_down_in_every_row(linears: list[Linear], target: Target) -> None:
    for name, weight, inputs in linears:
        expected, expected_mask = reference.wanda(weight, inputs.squares, target.sparsity, target.pattern)
        got, mask = wanda.prune(weight.clone(), inputs, target)
        if target.pattern or (target.sparsity * weight.shape[1]).is_integer():
            assert torch.equal(mask, expected_mask), name
            assert torch.equal(got, expected), name
        else:
            assert not (mask & ~expected_mask).any(), name  # what the published one prunes, ours prunes
            assert set((expected_mask & ~mask).sum(1).tolist()) <= {0, 1}, name
        assert torch.equal(got[mask], weight[mask]), name


def test_wanda_at_half_is_the_published_one_bit_for_bit(linears: list[Linear]) -> None:
    for name, weight, inputs in linears:
        expected, expected_mask = reference.wanda(weight, inputs.squares, 0.5)
        got, mask = wanda.prune(weight.clone(), inputs, Target(0.5))
        assert torch.equal(mask, expected_mask), name
        assert torch.equal(got, expected), name


@pytest.mark.parametrize("target", [Target(0.7), Target.of(None, (2, 4)), Target.of(None, (4, 8))], ids=str)
def test_the_tile_of_sparsegpt_changes_nothing(linears: list[Linear], target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    for linear in linears[::3]:
        name, weight, inputs = linear
        expected, expected_mask = pruned_by_sparsegpt(linear, target)
        for tile in (8, 32, 128):
            monkeypatch.setattr(sparsegpt, "TILE", tile)
            got, mask = sparsegpt.prune(weight.clone(), inputs, target)
            same = (mask == expected_mask).all(dim=1)  # a last bit may tip a near-tie, and then the rest of its row follows
            assert same.double().mean() > 0.99, (name, tile)
            assert (got - expected)[same].abs().max() <= 1e-5 * weight.abs().max(), (name, tile)


def test_sparsegpt_does_not_depend_on_the_scale_of_the_statistics(linears: list[Linear]) -> None:
    _, weight, inputs = linears[0]
    scaled = InputStatistics("gram", inputs.tokens, inputs.gram * 1024)
    expected = sparsegpt.prune(weight.clone(), inputs, Target(0.6))
    got = sparsegpt.prune(weight.clone(), scaled, Target(0.6))
    assert torch.equal(got[1], expected[1])
    assert torch.allclose(got[0], expected[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("target", [Target(0.7), Target.of(None, (2, 4))], ids=str)
def test_levelled_channels_are_the_published_algorithm_on_a_problem_of_one_size(target: Target) -> None:
    weight, inputs = made_up(64, 200, 1000)
    squares = inputs.squares
    gram = inputs.gram + torch.diag(OWN * squares + FLOOR * squares.median())
    powers = torch.exp2(torch.log2(gram.diagonal().sqrt()).round())
    powers /= powers.max()
    problem = InputStatistics("gram", inputs.tokens, gram / powers[:, None] / powers)
    expected, mask = sparsegpt.prune(weight * powers.float(), problem, target)
    got = pruners.prune("sparsegpt", weight.clone(), inputs, target, "each")
    assert torch.equal(got[0], expected / powers.float())
    assert torch.equal(got[1], mask)
    again = pruners.prune("sparsegpt", weight.clone(), inputs, target, "each")  # another linear that reads the same input
    assert torch.equal(again[0], got[0])


def test_with_damping_each_a_few_large_channels_change_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where two inputs are a thousand times as large and their weights a thousandth, the outputs are nearly the same."""
    weight, inputs = made_up(64, 96, 2000)
    sizes = torch.ones(96).index_fill(0, torch.tensor([3, 50]), 2.0**10)
    results = {}
    for damping in ("each", "mean"):
        plain = InputStatistics("gram", inputs.tokens, inputs.gram.clone())
        scaled = InputStatistics("gram", inputs.tokens, inputs.gram * sizes[:, None] * sizes)
        one = pruners.prune("sparsegpt", weight.clone(), plain, Target(0.6), damping)[1]
        other = pruners.prune("sparsegpt", weight / sizes, scaled, Target(0.6), damping)[1]
        results[damping] = float((one == other).double().mean())
    assert results["each"] > 0.99 > results["mean"], results


def test_weights_of_a_nearly_silent_channel_stay_small() -> None:
    """To the calibration text they hardly matter, so they would take on all that is cut elsewhere."""
    draw = torch.Generator().manual_seed(0)
    weight, x = torch.randn(64, 256, generator=draw), torch.randn(2000, 256, generator=draw)
    x[:, 255] = 1e-4 * x[:, :255].mean(1)  # selected after the first 128 channels, whose errors it can make up for
    inputs = InputStatistics("gram")
    inputs.add(x)
    pruned, _ = pruners.prune("sparsegpt", weight.clone(), inputs, Target(0.6), "each")
    assert pruned.norm() < weight.norm()


def test_sparsegpt_repairs_what_magnitude_breaks(linears: list[Linear]) -> None:
    for name, weight, inputs in linears:
        losses = {}
        for pruner in (alps, sparsegpt, wanda, magnitude):
            change = pruner.prune(weight.clone(), inputs, Target(0.6))[0] - weight
            losses[pruner] = loss(change, inputs)
        assert losses[alps] < losses[sparsegpt] < losses[wanda] < losses[magnitude], name


@pytest.mark.parametrize("target", [Target(0.6), Target.of(None, (2, 4))], ids=str)
def test_alps_solves_for_the_weights_that_stay(target: Target) -> None:
    """With more steps of conjugate gradients the weights on the mask are those that the normal equations of each row give."""
    weight, inputs = made_up(5, 24, tokens=200, name="alps")
    pruned, mask = alps.prune(weight.clone(), inputs, target)
    gram, size = alps.levelled(inputs), alps._sizes(inputs).float()
    goal = weight * size
    solved = alps.resolve(pruned * size, goal @ gram, gram, mask, steps=60) / size
    damped = gram.double() * size.double()[:, None] * size.double()
    for row, stays in enumerate(mask):
        expected = torch.linalg.solve(damped[stays][:, stays], (damped @ weight[row].double())[stays])
        torch.testing.assert_close(solved[row][stays].double(), expected, rtol=1e-3, atol=1e-4)
    assert loss(pruned - weight, inputs) < 1.2 * loss(solved - weight, inputs), "and the few steps of a run come close"


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.7, 0.99])
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (37, 200), (64, 129), (3, 128), (129, 64)], ids=str)
def test_exactly_as_many_weights_go_as_were_asked_for(name: str, sparsity: float, shape: tuple[int, int]) -> None:
    weight, inputs = made_up(*shape, tokens=64, name=name)
    pruned, mask = plugins.load("stages.prune.pruners", name).prune(weight.clone(), inputs, Target(sparsity))
    assert mask.dtype == torch.bool
    assert mask.shape == pruned.shape == weight.shape
    assert int((~mask).sum()) == int(sparsity * weight.numel() + 0.5)
    assert is_plus_zero(pruned[~mask])
    assert pruned[mask].all()
    if sparsity == 0:
        assert torch.equal(pruned, weight)


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("pattern", [(2, 4), (4, 8), (1, 4), (3, 4), (1, 3), (5, 20)], ids=str)
@pytest.mark.parametrize("groups", [1, 7, 11])
def test_a_pattern_keeps_n_of_every_m(name: str, pattern: tuple[int, int], groups: int) -> None:
    n, m = pattern
    weight, inputs = made_up(13, groups * m, tokens=64, name=name)
    pruned, mask = plugins.load("stages.prune.pruners", name).prune(weight.clone(), inputs, Target.of(None, pattern))
    assert (mask.view(13, groups, m).sum(2) == n).all()
    assert is_plus_zero(pruned[~mask])
    assert pruned[mask].all()


@pytest.mark.parametrize("name", PRUNERS)
def test_ties_do_not_make_more_weights_go(name: str) -> None:
    """The published thresholds prune every weight that ties with the last one."""
    inputs = inputs_for(name)
    inputs.add(torch.eye(96))
    weight = torch.where(torch.arange(24 * 96).view(24, 96) % 3 == 0, -1.0, 1.0)
    for sparsity in (0.3, 0.5, 0.9):
        pruned, mask = plugins.load("stages.prune.pruners", name).prune(weight.clone(), inputs, Target(sparsity))
        assert int((~mask).sum()) == int(sparsity * weight.numel() + 0.5)
        assert is_plus_zero(pruned[~mask])


@pytest.mark.parametrize("name", ["alps", "sparsegpt", "wanda"])
@pytest.mark.parametrize("target", [Target(0.3), Target(0.7), Target.of(None, (2, 4))], ids=str)
def test_dead_inputs_lose_their_weights_first_and_the_count_holds(name: str, target: Target) -> None:
    """The published SparseGPT prunes all weights of 100 dead inputs when asked for half: 78 % of the block."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(400, 256, generator=random)
    dead = torch.zeros(256, dtype=torch.bool)
    dead[torch.randperm(256, generator=random)[:100]] = True
    x[:, dead] = 0
    inputs = InputStatistics("gram")
    inputs.add(x)
    weight = torch.randn(32, 256, generator=random)
    pruned, mask = plugins.load("stages.prune.pruners", name).prune(weight.clone(), inputs, target)
    assert int((~mask).sum()) == target.num_pruned(weight.numel())
    assert is_plus_zero(pruned[~mask])
    assert torch.isfinite(pruned).all()
    assert torch.equal(pruned[:, dead][mask[:, dead]], weight[:, dead][mask[:, dead]])  # what stands there is as it was
    width = 4 if target.pattern else 128 if name == "sparsegpt" else 256
    groups = [part.flatten() for part in mask.split(width, dim=1)] if width == 128 else mask.view(-1, width)
    dies = (
        [part.flatten() for part in dead.expand(32, 256).split(width, dim=1)]
        if width == 128
        else dead.repeat(32).view(-1, width)
    )
    for kept, dead_here in zip(groups, dies, strict=True):  # weights that were compared with one another
        assert not kept[dead_here].any() or kept[~dead_here].all(), "a live weight went while a dead one stayed"


@pytest.mark.parametrize("target", [Target(0.5), Target.of(None, (2, 4))], ids=str)
def test_fewer_tokens_than_inputs_raise_the_damping_and_never_become_the_identity(target: Target) -> None:
    weight, inputs = made_up(48, 256, tokens=5)
    assert torch.linalg.matrix_rank(inputs.gram, rtol=1e-5) == 5  # the products are float32
    pruned, mask = sparsegpt.prune(weight.clone(), inputs, target)
    assert torch.isfinite(pruned).all()
    assert int((~mask).sum()) == target.num_pruned(weight.numel())
    by_magnitude = magnitude.prune(weight.clone(), inputs, target)[1]
    assert not torch.equal(mask, by_magnitude)
    assert not torch.equal(pruned, weight.masked_fill(~mask, 0.0)), "the columns to the right were not repaired"


def test_the_damping_rises_tenfold_until_the_matrix_can_be_factored() -> None:
    one = torch.eye(6, dtype=torch.float64)
    gram = one.clone()
    gram[0, 1] = gram[1, 0] = 1.05  # eigenvalue −0.05: damping 0.01 is too little, 0.1 is enough
    assert torch.linalg.cholesky_ex(gram + 0.01 * one).info > 0
    lower = sparsegpt.reversed_factor(InputStatistics("gram", 1, gram))
    assert torch.equal(lower, lower.tril())
    assert torch.allclose((lower @ lower.T).flip(0, 1), gram + 0.1 * one, atol=1e-12)


def test_all_inputs_dead_still_gives_exact_counts() -> None:
    weight = torch.randn(8, 40)
    for name in PRUNERS:
        inputs = inputs_for(name)
        inputs.add(torch.zeros(7, 40))
        pruned, mask = plugins.load("stages.prune.pruners", name).prune(weight.clone(), inputs, Target(0.5))
        assert int((~mask).sum()) == 160
        assert torch.equal(pruned, weight.masked_fill(~mask, 0.0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["sparsegpt", "wanda", "dsnot"])
def test_statistics_that_are_not_finite_are_refused(name: str, bad: float) -> None:
    weight, inputs = made_up(8, 24, tokens=30, name=name)
    assert inputs.total is not None
    inputs.total[-1, 23] = bad
    with pytest.raises(ValueError, match="not finite"):
        plugins.load("stages.prune.pruners", name).prune(weight, inputs, Target(0.5))


def test_a_matrix_that_no_damping_helps_is_refused() -> None:
    gram = -torch.eye(4, dtype=torch.float64)
    with pytest.raises(ValueError, match="cannot be factored"):
        sparsegpt.reversed_factor(InputStatistics("gram", 1, gram))


@pytest.mark.parametrize("name", PRUNERS)
def test_the_same_numbers_come_out_every_time(name: str) -> None:
    weight, inputs = made_up(31, 160, tokens=200, name=name)
    first = plugins.load("stages.prune.pruners", name).prune(weight.clone(), inputs, Target(0.45))
    second = plugins.load("stages.prune.pruners", name).prune(weight.clone(), inputs, Target(0.45))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_statistics_of_clients_add_up_to_those_of_the_pooled_text() -> None:
    random = torch.Generator().manual_seed(1)
    windows = torch.randn(6, 32, 20, generator=random)
    for needs in ("gram", "squares", "moments"):
        pooled = InputStatistics(needs)
        clients = [InputStatistics(needs), InputStatistics(needs)]
        for i, window in enumerate(windows):
            pooled.add(window[None])
            clients[i % 2].add(window)
        together = InputStatistics(needs)
        together.add(windows)
        assert torch.allclose(together.total, pooled.total, rtol=1e-6, atol=1e-4)
        total = clients[0].total + clients[1].total
        assert torch.allclose(total, pooled.total, rtol=1e-14, atol=0)
        assert sum(client.tokens for client in clients) == pooled.tokens == 192
        assert torch.allclose(pooled.squares, windows.double().square().sum((0, 1)), rtol=1e-6)


@pytest.mark.parametrize("target", [Target(0.5), Target(0.7), Target.of(None, (2, 4)), Target.of(None, (4, 8))], ids=str)
def test_dsnot_mends_masks_as_it_was_written_down(target: Target) -> None:
    random = torch.Generator().manual_seed(3)
    weight = torch.randn(24, 48, generator=random)
    windows = (
        torch.randn(5, 32, 48, generator=random) * torch.rand(48, generator=random) + torch.randn(48, generator=random) / 2
    )
    inputs = InputStatistics("moments")
    for window in windows:
        inputs.add(window[None])
    begun = wanda.prune(weight.clone(), inputs, target)[1]
    pruned, mask = dsnot.prune(weight.clone(), inputs, target)
    assert torch.equal(mask, reference.dsnot(weight, windows, begun, target.pattern[1] if target.pattern else None))
    assert torch.equal(pruned, weight.masked_fill(~mask, 0.0))
    assert torch.equal(mask.sum(1), begun.sum(1))
    off, mended = (((weight * ~kept).double() @ inputs.means).abs() for kept in (begun, mask))
    assert (mended <= off).all()
    assert mended.mean() < off.mean()


def test_a_gram_matrix_is_not_made_up_by_a_pruner_that_did_not_ask_for_it() -> None:
    inputs = InputStatistics("squares")
    inputs.add(torch.ones(3, 4))
    with pytest.raises(AssertionError):
        _ = inputs.gram


def test_magnitude_prunes_the_smallest_of_the_whole_matrix() -> None:
    weight, inputs = made_up(17, 23, tokens=1)
    mask = magnitude.prune(weight.clone(), inputs, Target(0.6))[1]
    assert weight[~mask].abs().max() < weight[mask].abs().min()
