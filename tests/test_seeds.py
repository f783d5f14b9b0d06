"""Parametrization "seeds": directions from a counter, whole-number steps, and rounds of which only loss differences travel."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedgrove.client.local_client import LocalClient
from fedgrove.client.windows import training_windows
from fedgrove.errors import FedgroveError
from fedgrove.job.load import load
from fedgrove.models import signs as noise
from fedgrove.models.blocks import Decoder
from fedgrove.models.stream import Checkpoint
from fedgrove.privacy.gaussian import GaussianMechanism
from fedgrove.rounds import wire
from fedgrove.stages.tune import training
from fedgrove.stages.tune.aggregation import Drawing, common, own
from fedgrove.stages.tune.exchanges.seeds import COEFFICIENTS, DIFFERENCES, Measure, Step, Took
from fedgrove.stages.tune.fixed_point import ClientNoise
from fedgrove.stages.tune.seeds import offsets, steps, two_sided
from fedgrove.stages.tune.seeds.moving import Weights, moving_of
from fedgrove.stages.tune.seeds.offsets import LARGEST, UNIT, Offsets
from fedgrove.stages.tune.seeds.steps import Steps
from fedgrove.stages.tune.seeds.two_sided import TwoSided
from fedgrove.stages.tune.trainers import dp_zeroth_order, zeroth_order
from small import CLIENTS, LENGTH, Moment, Small, complaint, lines, measurements, result
from test_tune_private import SECURE, Recorder, run
from test_tune_stage import PRUNE, client_of, mean_perplexity, weights

SEEDS = {
    "kind": "tune", "method": "seeds", "rounds": 2, "steps": 3, "length": LENGTH, "batches": [2],
    "learning_rate": 1e-3, "perturbation": 2**-9,
}  # fmt: skip
FLOAT = {"model__dtype": "float32", "evaluate": {}}
NAME = "model.layers.0.mlp.up_proj.weight"


# Directions


def philox(key: tuple[int, int], counter: int) -> list[int]:
    """Philox4x64-10 of its paper (Salmon et al., SC 2011): the four words of a counter."""
    mask, words, (k0, k1) = 2**64 - 1, [counter, 0, 0, 0], key
    for _ in range(10):
        first, second = words[0] * 0xD2E7470EE14C6C93, words[2] * 0xCA5A826395121157
        words = [(second >> 64) ^ words[1] ^ k0, second & mask, (first >> 64) ^ words[3] ^ k1, first & mask]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    return words


def test_signs_are_the_bits_of_philox() -> None:
    """Against the paper's algorithm, and a known answer: another NumPy, or another machine, has to give it, too."""
    key = noise.key_of("0/0", NAME)
    assert key == 0xB7E0F1A850AE3224
    bits = [word >> bit & 1 for counter in (1, 2) for word in philox((key, 5), counter) for bit in range(64)]
    assert noise.signs(key, 5, 0, 512).tolist() == [2 * bit - 1 for bit in bits]
    assert "".join("-+"[bit] for bit in bits[:40]) == "-++-+--+++++++--+-++-+++-+++-+-+--+-+---"


@pytest.mark.parametrize(("start", "count"), [(0, 1), (63, 2), (64, 64), (255, 3), (257, 777), (1000, 5000)])
def test_any_slice_of_a_direction_can_be_made_by_itself(start: int, count: int) -> None:
    whole = noise.signs(7, 3, 0, 6000)
    assert torch.equal(noise.signs(7, 3, start, count), whole[start : start + count])
    assert set(whole.tolist()) == {-1, 1}
    assert whole.float().mean().abs() < 0.05


def test_directions_differ_by_tensor_seed_and_job(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [noise.key_of(seed, name) for seed in ("0/0", "0/1", "1/0") for name in (NAME, "other.weight")]
    drawn = [noise.signs(key, direction, 0, 256) for key in keys for direction in (0, 1)]
    for i, one in enumerate(drawn):
        for other in drawn[:i]:
            assert one.float().dot(other.float()).abs() < 6 * math.sqrt(256)
    like = torch.zeros(37, 41)
    before = noise.direction_like(keys[0], 2, like)
    monkeypatch.setattr(noise, "CHUNK", 256)
    assert torch.equal(noise.direction_like(keys[0], 2, like), before)
    assert before.shape == like.shape


# Replay


def test_steps_add_up_to_the_same_bits_in_any_order(tmp_path: Path) -> None:
    """At once, one by one, after the file is gone, damaged or of another stage, in memory, and with steps taken back."""
    shape, generator = torch.Size([33, 65]), torch.Generator().manual_seed(0)
    coefficients = torch.randint(-(2**44), 2**44, (9,), generator=generator)
    expected = torch.zeros(shape, dtype=torch.int64)
    for direction, coefficient in enumerate(coefficients.tolist()):
        expected += coefficient * noise.direction_like(noise.key_of("0/0", NAME), direction, expected).long()
    one_by_one = Offsets(tmp_path / "a", "0/0")
    for size in range(1, 10):
        found = Offsets(tmp_path / "a", "0/0").at(NAME, shape, coefficients[:size])
    assert torch.equal(found, expected)
    for meddle in (lambda file: None, Path.unlink, lambda file: file.write_bytes(b"rubbish")):
        meddle(tmp_path / "a" / f"{NAME}.safetensors")
        assert torch.equal(one_by_one.at(NAME, shape, coefficients), expected)
    assert torch.equal(one_by_one.at(NAME, shape, coefficients[:0]), torch.zeros(shape, dtype=torch.int64))
    other = Offsets(tmp_path / "a", "0/1").at(NAME, shape, coefficients)
    assert not torch.equal(other, expected)
    assert torch.equal(Offsets(tmp_path / "a", "0/0").at(NAME, shape, coefficients), expected)
    kept = Offsets(tmp_path / "b", "0/0", in_memory=True)
    for size in (4, 9):
        found = kept.at(NAME, shape, coefficients[:size])
    assert torch.equal(found, expected)
    assert not (tmp_path / "b").exists()
    kept.flush()
    assert torch.equal(load_file(tmp_path / "b" / f"{NAME}.safetensors")["sum"], expected)


def test_a_weight_is_rounded_once_and_a_mask_keeps_its_zeros() -> None:
    weight = torch.tensor([0.0, 1.0, -0.5, 2.0**-20], dtype=torch.bfloat16)
    offset = torch.tensor([2**30, 2**38, 1, -(2**20)])  # 2⁻¹⁰, 1/4, nothing, what is there
    after = offsets.moved(weight, offset, weight.dtype)
    assert after.tolist() == [2.0**-10, 1.25, -0.5, 0.0]
    assert offsets.masked_merge(weight, after).tolist() == [0.0, 1.25, -0.5, 2.0**-20]


# Losses on both sides


def two_sided_of(small: Small, folder: Path, whole: bool = True, rank: int = 0, **changes: Any) -> TwoSided:
    decoder = Decoder(Checkpoint(small.model, torch.float32))
    given = {"coefficients": torch.zeros(4, dtype=torch.int64), **changes}
    return TwoSided(decoder, moving_of(Offsets(folder, "0/0", whole), "0/0", rank), whole=whole, **given)


def windows(number: int = 3) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 4000, (number, LENGTH), generator=torch.Generator().manual_seed(1))
    return ids, torch.where(torch.arange(LENGTH) < 4, -100, ids)


def test_losses_are_those_of_plain_transformers_with_moved_weights(small: Small, tmp_path: Path) -> None:
    model = two_sided_of(small, tmp_path)
    model.move(1, round(0.02 / UNIT))
    ids, labels = windows()
    got = model.losses(ids, labels, 2, (0.0, 0.01, -0.01))
    names = Decoder(Checkpoint(small.model)).linear_names().values()
    for side, found in zip((0.0, 0.01, -0.01), got, strict=True):
        plain = AutoModelForCausalLM.from_pretrained(small.model, dtype=torch.float32)
        for name in names:
            weight, key = plain.get_parameter(name), noise.key_of("0/0", name)
            weight.data += 0.02 * noise.direction_like(key, 1, weight) + side * noise.direction_like(key, 2, weight)
        with torch.no_grad():
            wanted = [float(plain(input_ids=i[None], labels=w[None]).loss) for i, w in zip(ids, labels, strict=True)]
        torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("whole", [True, False])
def test_linears_that_are_no_targets_stay_as_they_are(small: Small, tmp_path: Path, whole: bool) -> None:
    """In losses, and in slopes by a backward pass; the other linears move as they do without targets."""
    targets = ("self_attn.v_proj", "down_proj")
    model = two_sided_of(small, tmp_path / "offsets", whole, targets=targets)
    model.move(1, round(0.05 / UNIT))
    ids, labels = windows()
    sides, slopes = (0.0, 0.02, -0.02), model.slopes(ids, labels, (2,))[0]
    names = [
        name for name in Decoder(Checkpoint(small.model)).linear_names().values() if "v_proj" in name or "down_proj" in name
    ]
    plain = AutoModelForCausalLM.from_pretrained(small.model, dtype=torch.float32)
    start = {name: plain.get_parameter(name).detach().clone() for name in names}
    assert len(names) == 4
    for side, found in zip(sides, model.losses(ids, labels, 2, sides), strict=True):
        for name in names:
            weight, key = plain.get_parameter(name), noise.key_of("0/0", name)
            moved = 0.05 * noise.direction_like(key, 1, weight) + side * noise.direction_like(key, 2, weight)
            weight.data = start[name] + moved
        losses = [plain(input_ids=i[None], labels=w[None]).loss for i, w in zip(ids, labels, strict=True)]
        wanted = torch.tensor([float(one.detach()) for one in losses], dtype=torch.float64)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        if side == 0:
            gradients = torch.autograd.grad(sum(losses), [plain.get_parameter(name) for name in names])
            signs = [noise.direction_like(noise.key_of("0/0", name), 2, start[name]) for name in names]
            along = sum(float((one * z).sum()) for one, z in zip(gradients, signs, strict=True))
            assert float(slopes) == pytest.approx(along, rel=1e-3)


def test_block_by_block_from_disk_gives_the_bits_of_the_model_in_memory(small: Small, tmp_path: Path) -> None:
    ids, labels = windows()
    losses = []
    for whole in (True, False):
        model = two_sided_of(small, tmp_path / str(whole), whole)
        for direction in range(3):
            losses.append(model.losses(ids, labels, direction, (2**-8, -(2**-8))))
            model.move(direction, 2**32 * (direction + 1))
        assert torch.equal(model.losses(ids[1:2], labels[1:2], 0, (0.5,))[0, 0], model.losses(ids, labels, 0, (0.5,))[0, 1])
    for one, other in zip(losses[:3], losses[3:], strict=True):
        assert torch.equal(one, other)
    assert len(list((tmp_path / "False").iterdir())) == 14
    assert two_sided_of(small, tmp_path / "none").losses(ids[:0], labels[:0], 0, (0.1,)).shape == (1, 0)


def test_a_slope_is_the_gradient_along_the_direction(small: Small, tmp_path: Path) -> None:
    """And the curvature, over many directions, is the trace of the Hessian, by automatic differentiation."""
    ids, labels = windows()
    epsilon, directions = 2**-10, 3
    model = AutoModelForCausalLM.from_pretrained(small.model, dtype=torch.float32, attn_implementation="eager")
    names = list(Decoder(Checkpoint(small.model)).linear_names().values())
    parameters = [model.get_parameter(name) for name in names]
    loss = sum(model(input_ids=i[None], labels=w[None]).loss for i, w in zip(ids, labels, strict=True)) / len(ids)
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    length = math.sqrt(sum(float(gradient.detach().square().sum()) for gradient in gradients))
    sided = two_sided_of(small, tmp_path)
    curves = []
    for direction in range(directions):
        keys = [noise.key_of("0/0", name) for name in names]
        signs = [noise.direction_like(key, direction, p).float() for key, p in zip(keys, parameters, strict=True)]
        slope = sum((gradient * z).sum() for gradient, z in zip(gradients, signs, strict=True))
        center, above, below = steps.whole(sided.losses(ids, labels, direction, (0.0, epsilon, -epsilon)))
        found = steps.slope(int((above - below).sum()), len(ids), epsilon)
        assert found == pytest.approx(float(slope.detach()), abs=0.01 * length)
        second = torch.autograd.grad(slope, parameters, retain_graph=True)
        curves.append(sum(float((h * z).sum()) for h, z in zip(second, signs, strict=True)))
        total = (above + below - 2 * center).sum()[None]
        assert steps.curvature(total.repeat(2), len(ids), epsilon) == pytest.approx(curves[-1], rel=0.05)


def test_the_curvature_is_a_standard_error_above_the_mean() -> None:
    """Sums over directions of 4 windows each: 1, 1, 1 and 9 in the mean of a window."""
    sums = torch.tensor([4, 4, 4, 36]) * 2**24 / 2**8
    assert steps.curvature(sums.long(), 4, 2**-4) == pytest.approx(3 + 4 / math.sqrt(4))


def test_each_direction_is_measured_with_windows_of_its_own(small: Small, tmp_path: Path) -> None:
    client = clients_of(small, tmp_path, **FLOAT)[0]
    ids, labels = training_windows(client, LENGTH)
    asked = step_request(tokens=ids.numel())
    common = {key: getattr(asked, key) for key in Measure.model_fields.keys() & Step.model_fields.keys()}
    request = Measure(**common, perturbations=(2**-6,), directions=3)
    found = request.respond(start(0), client, "cpu").tensors["change/curves"]
    model = two_sided_of(small, tmp_path / "model", masked=asked.masked)
    batches = training.draw(ids, labels, request.batch, 0, f"{request.seed}/{client.name}/measure/0")
    for probe in range(3):
        center, above, below = steps.whole(model.losses(*next(batches), 2**40 + probe, (0.0, 2**-6, -(2**-6))))
        assert int(found[0, probe]) == int((above + below - 2 * center).sum())


def test_the_largest_perturbation_within_a_percent_is_chosen() -> None:
    sizes = (0.4, 0.2, 0.1, 0.05)
    slopes = torch.tensor([[1.5, 2.0], [1.05, 2.0], [1.001, 2.0], [1.0, 2.0]], dtype=torch.float64)
    differences = (slopes * torch.tensor(sizes, dtype=torch.float64)[:, None] * 2**30).long()
    assert steps.choose_perturbation(sizes, differences) == 0.1
    assert steps.choose_perturbation(sizes[:2], differences[:2]) == 0.4  # none is close: the one that comes closest


def test_a_window_whose_slope_is_far_from_the_others_counts_as_two_of_them() -> None:
    epsilon, slopes = 2.0**-9, torch.tensor([2.0, -1.0, 3.0, 400.0, -2.0], dtype=torch.float64)
    differences = (slopes * 2 * epsilon * 2.0**24).long()
    most = steps.slope_limit(torch.tensor([int(differences[:3].abs().sum())]), 3, epsilon)
    assert most == pytest.approx(2 * 2.0, rel=1e-6)
    clipped = Steps((0,), 5, 1e-3, epsilon, 2**30, most).clipped(differences)
    assert steps.slope(int(clipped.sum()), 5, epsilon) == pytest.approx((2 - 1 + 3 + 4 - 2) / 5, rel=1e-6)
    assert Steps((0,), 5, 1e-3, epsilon, 2**30).clipped(differences).equal(differences)


# Training


def work_of(ids: Tensor, labels: Tensor, **changes: Any) -> training.Work:
    return training.Work(ids, labels, 0, "s", **changes)


def test_steps_that_are_not_finite_are_skipped_and_three_in_a_row_stop(small: Small, tmp_path: Path) -> None:
    class Broken(TwoSided):
        at: tuple[int, ...] = ()

        def losses(self, ids: Tensor, labels: Tensor, direction: int, sides: Any) -> Tensor:
            found = super().losses(ids, labels, direction, sides)
            return found.fill_(math.nan) if direction in self.at else found

    def train(*at: int) -> Any:
        decoder = Decoder(Checkpoint(small.model, torch.float32))
        model = Broken(decoder, Weights(Offsets(tmp_path, "0/0", True), "0/0"), torch.zeros(5, dtype=torch.int64), whole=True)
        model.at = at
        settings = Steps(tuple(range(5)), 1, 1e-3, 2**-9, 2**30)
        return zeroth_order.train(model, work_of(*windows()), settings), model

    taken, model = train(0, 1, 3)
    assert taken.skipped == 3
    assert math.isfinite(taken.loss)
    assert [bool(step) for step in model.coefficients] == [False, False, True, False, True]
    with pytest.raises(training.NotFinite, match=r"3 steps in a row; lower learning_rate or perturbation"):
        train(1, 2, 3)


def test_what_one_window_adds_under_noise_is_bounded(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every window takes part, and the noise is left out: what is left is the sum of clipped slopes."""
    monkeypatch.setattr(GaussianMechanism, "_noisy", lambda self, sums, fraction: sums)
    clip, epsilon = 0.01, 2**-9
    budget = training.Budget(epsilon=8.0, delta=1e-6, noise=50.0, rounds=1, clip=clip)
    ids, labels = windows()
    settings = Steps((0, 1), len(ids), 1e-3, epsilon, 2**30)
    taken = dp_zeroth_order.train(two_sided_of(small, tmp_path), work_of(ids, labels, budget=budget), settings)
    most = len(ids) * clip * 2 * epsilon * 2**24
    assert 0 < taken.differences.abs().max() <= most
    assert taken.loss is None
    weak = training.Budget(epsilon=8.0, delta=1e-6, noise=0.3, rounds=1, clip=clip)
    with pytest.raises(FedgroveError, match="too little for epsilon"):
        dp_zeroth_order.train(two_sided_of(small, tmp_path), work_of(ids, labels, budget=weak), settings)


# Directions of a round


def test_common_directions_are_new_in_each_round_or_begin_again() -> None:
    assert common.draw(Drawing(0, 3, 2, "s")) == common.summed(Drawing(0, 3, 2, "t")) == [6, 7, 8]
    assert common.draw(Drawing(4, 3, 1, "s")) == [3, 0, 1]


def test_own_directions_depend_on_client_and_round_and_prefer_large_slopes() -> None:
    drawn = [own.draw(Drawing(64, 9, round_, seed)) for round_, seed in ((0, "s/a"), (0, "s/b"), (1, "s/a"))]
    assert len(set(map(tuple, drawn))) == 3
    assert own.draw(Drawing(64, 9, 0, "s/a")) == drawn[0]
    assert own.summed(Drawing(5, 9, 0, "s")) == [0, 1, 2, 3, 4]
    moved, draws = torch.tensor([8, -400, 0, 0, 100]), torch.tensor([1, 1, 1, 0, 1])
    assert own.chances(moved, draws, "even") is None
    assert own.chances(moved, draws * 0, "pro") is None
    found = own.chances(moved, draws, "pro")
    assert found is not None
    p = found / found.sum()
    assert p.argmax() == 1
    assert p[1] / p[2] == pytest.approx(math.e, rel=1e-3)  # at most e times as likely
    assert p[2] < p[3] < p[1]  # nobody drew it yet: as likely as the mean of the others
    many = own.draw(Drawing(5, 4000, 0, "s", found))
    assert many.count(1) / 4000 == pytest.approx(float(p[1]), abs=0.03)


# Whole stages


def test_a_stage_lowers_the_loss_and_the_model_loads_anywhere(small: Small) -> None:
    run = small.undisturbed(stages=[{**SEEDS, "steps": 8, "batches": [1], "learning_rate": "auto"}], **small.one_word())
    assert mean_perplexity(run, 0) < 0.8 * mean_perplexity(run, None)
    AutoModelForCausalLM.from_pretrained(run / "model")
    before, after = load_file(small.model / "model.safetensors"), weights(run)
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == ("proj" not in name), name
        assert tensor.dtype == after[name].dtype
    found = measurements(run)
    assert found[0, 0, None, "measured/perturbation"] == 2**-9
    assert found[0, 0, None, "measured/learning_rate"] > 0
    assert found[0, 0, None, "measured/max_slope"] > 0
    assert found[0, 1, None, "loss"] < found[0, 0, None, "loss"]
    plan = json.loads((run / "plan-0-tune.json").read_text())
    assert plan["discloses"] == ["LOSS_DIFFERENCES", "CURVATURE", "LOSS"]
    assert {one["forwards"] for one in plan["clients"].values()} == {16}
    page = (run / "report.html").read_text()
    assert "Loss against the bytes" in page


@pytest.mark.parametrize("change", [{}, {"method": "adapter_seeds", "bits": [8], "ranks": [2]}])
def test_only_targets_move_in_a_stage(small: Small, change: dict[str, Any]) -> None:
    run = small.undisturbed(stages=[{**SEEDS, **change, "target_modules": ["v_proj", "1.mlp.down_proj"]}], **FLOAT)
    before, after = load_file(small.model / "model.safetensors"), weights(run)
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert moved == {
        f"model.layers.{linear}.weight" for linear in ("0.self_attn.v_proj", "1.self_attn.v_proj", "1.mlp.down_proj")
    }


def test_published_seeds_are_federated_averaging_of_the_clients_models(small: Small, tmp_path: Path) -> None:
    """One round of aggregation "own" against clients' models that are trained here, kept as float64 weights, and averaged."""
    stage = {**SEEDS, "aggregation": "own", "seeds": 64, "rounds": 1, "steps": 4}
    run = small.undisturbed(stages=[stage], **FLOAT)
    batches = {name: one["batch"] for name, one in json.loads((run / "plan-0-tune.json").read_text())["clients"].items()}
    names = Decoder(Checkpoint(small.model)).linear_names().values()
    base = {name: Checkpoint(small.model, torch.float32).read(name).double() for name in names}
    mean = {name: torch.zeros_like(weight) for name, weight in base.items()}
    for client, batch in batches.items():
        ids, labels = training_windows(client_of(load(run / "job.toml"), tmp_path, client), LENGTH)
        model = two_sided_of(small, tmp_path / f"of-{client}", coefficients=torch.zeros(64, dtype=torch.int64))
        drawn = own.draw(Drawing(64, 4, 0, f"0/0/{client}"))
        work = training.Work(ids, labels, 0, f"0/0/{client}")
        zeroth_order.train(model, work, Steps(tuple(drawn), batch, 1e-3, 2**-9, steps.limit_for(3)))
        for name, total in mean.items():
            local = base[name].clone()
            for direction in model.coefficients.nonzero().flatten().tolist():
                signs = noise.direction_like(noise.key_of("0/0", name), direction, local)
                local += float(model.coefficients[direction]) * UNIT * signs
            total += batch / sum(batches.values()) * local
    for name, weight in weights(run).items():
        if name in mean:
            step = float((mean[name] - base[name]).norm())
            # the run's weights are float32, and its coefficients multiples of 2⁻⁴⁰
            assert float((weight.double() - mean[name]).norm()) < 2e-4 * step + 1e-7 * float(base[name].norm())
            assert step > 0


def step_request(**changes: Any) -> Step:
    """What a client is asked to do in a round."""
    asked: dict[str, Any] = {
        "stage": 0, "parts": 0, "cut": None, "bits": 32, "length": LENGTH, "seed": "0/0", "personal": 0.0, "tokens": 1,
        "batch": 2, "clients": 3, "masked": (), "aggregation": "common", "trainer": "zeroth_order", "seeds": 0, "steps": 1,
        "seen": 0, "learning_rate": 1e-3, "perturbation": 2**-9, "says_loss": True,
    }  # fmt: skip
    return Step(**{**asked, **changes})


def clients_of(small: Small, folder: Path, **changes: Any) -> list[LocalClient]:
    job = load(small.job("clients", **changes))
    return [client_of(job, folder, name) for name in CLIENTS]


@pytest.mark.parametrize("max_slope", [0.0, 0.02])
def test_the_sum_over_clients_is_that_of_one_owner_of_all_text(small: Small, tmp_path: Path, max_slope: float) -> None:
    """In steps that take all windows, bit for bit; clients of unequal size. Also if most windows' slopes are clipped."""
    changes = {**FLOAT, "clients__0__data": [str(small.texts["ash"]), str(small.texts["held-0"])]}
    clients = clients_of(small, tmp_path, **changes)
    owner = LocalClient("owner", tmp_path / "owner", small.model, torch.float32, (), None, owners=tuple(clients))
    sent = []
    for client in (owner, *clients):
        ids, _ = training_windows(client, LENGTH)
        request = step_request(tokens=ids.numel(), batch=len(ids), steps=3, max_slope=max_slope)
        sent.append(request.respond(start(3), client, "cpu").tensors[DIFFERENCES].long())
        if max_slope:
            assert 0 < sent[-1].abs().max() <= len(ids) * max_slope * 2 * request.perturbation * 2**24
    assert sent[0].equal(torch.stack(sent[1:]).sum(0))
    assert bool(sent[0].all())
    assert len({len(training_windows(client, LENGTH)[0]) for client in clients}) > 1


def start(directions: int) -> dict[str, Tensor]:
    return {COEFFICIENTS: torch.zeros(directions, dtype=torch.int64)}


@pytest.mark.parametrize("change", [{}, {"aggregation": "own", "seeds": 16, "sampling": "pro"}], ids=["common", "own"])
def test_the_secure_sum_gives_the_bits_of_the_open_one(small: Small, tmp_path: Path, change: dict[str, Any]) -> None:
    stage = {**SEEDS, **change}
    opened = small.undisturbed(stages=[stage], **FLOAT)
    unseen = run(small, tmp_path / "unseen", stages=[stage], privacy=SECURE, **FLOAT)
    before = load_file(small.model / "model.safetensors")
    for name, tensor in weights(opened).items():
        assert torch.equal(tensor, weights(unseen)[name]), name
        assert "proj" not in name or not torch.equal(tensor, before[name].float())
    assert "LOSS" not in json.loads((unseen / "plan-0-tune.json").read_text())["discloses"]
    assert not any(name == "loss" for *_, name in measurements(unseen))


def test_a_round_sends_four_bytes_a_direction(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for change, expected in (({"steps": 6}, 24), ({"aggregation": "own"}, 16384)):
        Recorder.seen = []
        path = tmp_path / str(expected)
        run(small, path, engine=Recorder, stages=[{**SEEDS, "rounds": 1, "batches": [1], **change}], **FLOAT)
        sent = [wire.unpack(answer)[0] for _, kind, answer in Recorder.seen if kind == Step.KIND]
        assert [tensor.numel() * tensor.element_size() for one in sent for tensor in one.values()] == [expected] * 3
        assert {one["upload"] for one in json.loads((path / "plan-0-tune.json").read_text())["clients"].values()} == {expected}
        if expected == 24:
            lines = [json.loads(line) for line in (path / "ledger.jsonl").read_text().splitlines()]
            assert all(line["bytes"] < 4096 for line in lines)


def test_zeros_of_a_pruned_model_stay(small: Small) -> None:
    changes = small.one_word()
    pruned = weights(small.undisturbed(stages=[PRUNE], **changes))
    run = small.undisturbed(stages=[PRUNE, {**SEEDS, "rounds": 1, "learning_rate": 8e-3}], **changes)
    after = weights(run)
    for row in json.loads((run / "pruning.json").read_text())["tensors"]:
        assert torch.equal(pruned[row["name"]] == 0, after[row["name"]] == 0)
        assert int((after[row["name"]] == 0).sum()) == row["pruned"] == row["numel"] // 2
        assert not torch.equal(pruned[row["name"]], after[row["name"]])


@pytest.mark.parametrize("moment", [
    Moment("os.rename", "*/changes-0001.safetensors"),
    Moment("os.rename", f"*/offsets-1/{NAME}.safetensors", "kill", 2),
    Moment("os.rename", "*/stage-1/offsets/*", "cut", 9),
])  # fmt: skip
def test_a_killed_stage_goes_on_to_the_same_bits(small: Small, tmp_path: Path, moment: Moment) -> None:
    stages = [PRUNE, {**SEEDS, "steps": 1, "learning_rate": "auto", "replan_every": 1, "eval_every": 1}]
    whole, out = small.undisturbed(stages=stages), small.continued(tmp_path / "run", moment, stages=stages)
    assert result(out) == result(whole) | {"job.toml": result(out)["job.toml"]}


def test_a_rate_stays_where_the_loss_does_not_curve_upwards(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later sample of windows may miss those that curve; without a rate from before, the job ends with one line."""
    traces = iter((50.0, -1.0, 0.0))
    monkeypatch.setattr("fedgrove.stages.tune.loops.seeds.curvature", lambda *args: next(traces))
    stage = {**SEEDS, "steps": 1, "learning_rate": "auto", "replan_every": 1}
    found = measurements(run(small, tmp_path / "run", stages=[stage], **FLOAT))
    assert [found[0, round_, None, "measured/learning_rate"] for round_ in (0, 1)] == [1 / 8 / 50, 1 / 8 / 50]
    line = complaint("run", small.job("flat", stages=[stage], **FLOAT), "--out", tmp_path / "flat")
    assert "learning_rate cannot be measured, because the loss does not curve upwards (0)" in line
    assert "set learning_rate" in line


def test_the_curvature_is_measured_again_and_the_perturbation_is_not(small: Small) -> None:
    again = {"learning_rate": "auto", "perturbation": "auto", "replan_every": 1, "eval_every": 1}
    run = small.undisturbed(stages=[PRUNE, {**SEEDS, "steps": 1, "batches": [6], **again}])
    found = measurements(run)
    assert found[1, 0, None, "measured/learning_rate"] != found[1, 1, None, "measured/learning_rate"]
    assert found[1, 0, None, "measured/perturbation"] == found[1, 1, None, "measured/perturbation"]
    sent = [line for line in lines(run / "ledger.jsonl") if line["kind"] == Measure.KIND and line["direction"] == "up"]
    first, second = (max(line["bytes"] for line in sent if line["round"] == round_) for round_ in (0, 1))
    assert second < first
    plan = json.loads((run / "plan-1-tune.json").read_text())
    client = max(plan["clients"].values(), key=lambda one: one["compute"])
    sides = 8 * (1 + 2 * 7) + 8 * (1 + 2)
    assert plan["total"] == pytest.approx(2 * client["seconds"] + client["compute"] * sides / 2, abs=0.01)


def test_no_order_of_clients_and_no_way_through_memory_matters(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = [PRUNE, {**SEEDS, "steps": 1, "learning_rate": "auto", "replan_every": 1, "eval_every": 1}]
    whole = small.undisturbed(stages=stages)
    monkeypatch.setattr(two_sided, "IN_MEMORY", 0)
    clients = [{"name": name, "data": str(small.texts[name])} for name in reversed(CLIENTS)]
    other = run(small, tmp_path / "other", stages=stages, clients=clients)
    assert all(torch.equal(tensor, weights(other)[name]) for name, tensor in weights(whole).items())


# Noise


@pytest.mark.parametrize("secure", [False, True], ids=["open", "secure"])
@pytest.mark.parametrize("unit", ["window", "client"])
def test_it_trains_with_noise_and_says_nothing_else(small: Small, tmp_path: Path, unit: str, secure: bool) -> None:
    stage = {**SEEDS, "epsilon": 8.0, "dp_unit": unit, "rounds": 1, "delta": 1e-3}
    if unit == "window":
        pytest.importorskip("dp_accounting")
        stage["batches"] = [64]  # all windows: an accountant of samples is slow
    path = run(small, tmp_path / "run", stages=[stage], **({"privacy": SECURE} if secure else {}), **FLOAT)
    plan = json.loads((path / "plan-0-tune.json").read_text())
    assert plan["discloses"] == ["LOSS_DIFFERENCES"]
    assert any("slope" in note and "clipped to a norm of 1" in note for note in plan["notes"])
    assert not any(name in ("loss", "skipped") for *_, name in measurements(path))
    before = load_file(small.model / "model.safetensors")
    assert any(not torch.equal(tensor, before[name].float()) for name, tensor in weights(path).items())


def test_a_clients_slopes_are_clipped_as_one_vector_before_its_noise(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GaussianMechanism, "_noisy", lambda self, sums, fraction: sums)
    client = clients_of(small, tmp_path, **FLOAT)[0]
    tokens = training_windows(client, LENGTH)[0].numel()
    promised = ClientNoise(epsilon=4.0, delta=1e-6, clip=0.01, rounds=1, adders=2)
    request = step_request(tokens=tokens, steps=5, noise=promised, says_loss=False)
    response = request.respond(start(5), client, "cpu")
    slopes = response.tensors[DIFFERENCES].double() * 2**-24 / (2 * 2**-9 * 2)
    assert 0.009 < float(slopes.norm()) <= 0.01
    assert response.reply == Took(tokens=tokens)
    with pytest.raises(FedgroveError, match="its privacy budget is spent"):
        step_request(tokens=tokens, steps=1, round=1, noise=promised, says_loss=False).respond(start(2), client, "cpu")


# Mistakes, and a server that lies


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seeds": 70000}, "seeds: Input should be less than or equal to 65536"),
        ({"rounds": 5000, "steps": 20}, "seeds: 5000 rounds of 20 steps take more than 65536 directions"),
        ({"aggregation": "own", "seeds": 0}, 'seeds: aggregation "own" draws from a number of them; set it, such as 4096'),
        ({"sampling": "pro"}, 'sampling: aggregation "common" takes even only'),
        ({"aggregation": "fedavg"}, 'aggregation "fedavg" does not take what parametrization "seeds" trains'),
        ({"trainer": "sgd"}, 'trainer "sgd" does not train parametrization "seeds"; leave it out'),
        ({"bits": [4]}, 'bits: it has no effect with parametrization "seeds"; leave it out'),
        ({"max_grad_norm": 2.0}, "max_grad_norm: it has no effect"),
        ({"precision": "bfloat16"}, "precision: it has no effect"),
        ({"personal": 0.2}, "leave personal out"),
        ({"server_optimizer": "adam"}, 'server_optimizer "adam" needs aggregation'),
        ({"method": "lora", "length": LENGTH}, "perturbation: it has no effect with parametrization \"lora\""),
        ({"method": "ia3", "perturbation": "auto", "learning_rate": "auto"}, "cannot measure it; set a number"),
        ({"epsilon": 1.0, "learning_rate": "auto"}, "epsilon: learning_rate would be measured on text without noise"),
        ({"perturbation": 0}, "perturbation"),
        ({"target_modules": "v_proj"}, "target_modules: "),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_that_names_the_key(small: Small, change: dict[str, Any], says: str) -> None:
    line = complaint("plan", small.job("mistaken", stages=[{**SEEDS, **change}], evaluate={}))
    assert "stages.0" in line
    assert says in line


def test_a_mistake_that_a_plan_or_a_run_finds_is_one_line(small: Small, tmp_path: Path) -> None:
    private = {**SEEDS, "epsilon": 0.01, "dp_unit": "client", "perturbation": 0.5, "dp_clip": 16.0}
    line = complaint("plan", small.job("noisy", stages=[private], evaluate={}))
    assert "too large for its ring" in line
    tiny = small.job("tiny", stages=[{**SEEDS, "perturbation": 1e-12}], **FLOAT)
    line = complaint("run", tiny, "--out", tmp_path / "tiny")
    assert "at perturbation = 1e-12 no loss differs" in line
    assert "raise perturbation" in line
    other = small.job("other", stages=[{**SEEDS, "target_modules": ["v_proj", "proj"]}], evaluate={})
    line = complaint("plan", other)
    assert "stages.0.target_modules: no linear of the model is called proj; choose from down_proj, " in line
    wild = small.job("wild", stages=[{**SEEDS, "learning_rate": 1e9, "steps": 6}], **FLOAT)
    line = complaint("run", wild, "--out", tmp_path / "wild")
    assert "lower learning_rate" in line


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({}, "other tensors"),
        ({"own/x": torch.zeros(1)}, "other tensors"),
        ({COEFFICIENTS: torch.zeros(1)}, "another shape or dtype"),
        ({COEFFICIENTS: torch.zeros(1, 1, dtype=torch.int64)}, "another shape or dtype"),
        ({COEFFICIENTS: torch.zeros(0, dtype=torch.int64)}, "fewer coefficients than there are directions"),
        ({COEFFICIENTS: torch.full((1,), LARGEST + 1)}, "no stage makes"),
        ({COEFFICIENTS: torch.full((1,), 2**41)}, "grew more than 2 times"),
        ({**start(1), "chances": torch.zeros(1, dtype=torch.int64)}, "chances that are none"),
    ],
)  # fmt: skip
def test_a_client_refuses_a_model_that_no_stage_makes(
    small: Small, tmp_path: Path, tensors: dict[str, Tensor], says: str
) -> None:
    client = clients_of(small, tmp_path, **FLOAT)[0]
    tokens = training_windows(client, LENGTH)[0].numel()
    with pytest.raises(FedgroveError, match=says):
        step_request(tokens=tokens).respond(tensors, client, "cpu")


def test_a_client_refuses_targets_that_its_model_does_not_have(small: Small, tmp_path: Path) -> None:
    client = clients_of(small, tmp_path, **FLOAT)[0]
    request = step_request(tokens=training_windows(client, LENGTH)[0].numel(), target_modules=("v_proj", "x_proj"))
    with pytest.raises(FedgroveError, match="names linears that its model does not have"):
        request.respond(start(1), client, "cpu")


@pytest.mark.parametrize("change", [{"seeds": 2**17}, {"perturbation": 0.0}, {"clients": 0}, {"learning_rate": math.inf}])
def test_a_request_with_a_number_out_of_bounds_is_none(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        step_request(**change)
