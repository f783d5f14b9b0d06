"""What a round is worth: what clients measure of their gradients, what the planner makes of it, and what rounds gained."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file

from fedgrove.job.tables import Client
from fedgrove.models.cost import ModelCost
from fedgrove.models.next_tokens import loss_sum
from fedgrove.report.page import write_report
from fedgrove.rounds.capabilities import Capabilities
from fedgrove.rounds.request import CHANGE
from fedgrove.rounds.wire import WireError
from fedgrove.stages.tune.config import Config
from fedgrove.stages.tune.exchanges.importance import COHERENCE, IMPORTANCE, KEPT, ImportanceSum, ScoreLinears, Tokens
from fedgrove.stages.tune.factors import initial_a
from fedgrove.stages.tune.fixed_point import FixedPointChanges, encode
from fedgrove.stages.tune.importance import RANK, coherence, kept_by_ranks, measure
from fedgrove.stages.tune.objective import MOST_NOISE, NOISE, Gradients, Progress, is_off, pace
from fedgrove.stages.tune.plan import Plan, even, make_plan, progress
from fedgrove.stages.tune.speeds import BOUND, corrected
from fedgrove.stages.tune.training import Settings
from small import Moment, Small, cli, measurements

SHAPES = {"q": (64, 64), "up": (160, 64), "down": (64, 160)}
SIZES = ModelCost(SHAPES, others=9000, width=64, vocabulary=100, num_blocks=1, saved=20_000, length=32, saved_half=40_000)
STAGE: dict[str, Any] = {
    "kind": "tune", "method": "fedpipe", "rounds": 3, "steps": 2, "length": 16, "batches": [1, 4], "ranks": [2, 4],
    "bits": [32], "learning_rate": 0.01,
}  # fmt: skip
SPEEDS = {"clients__0__speed": 0.001, "clients__1__speed": 0.001, "clients__2__speed": 0.003}
GAINS: dict[str, Any] = {
    "stages": [{**STAGE, "eval_every": 1, "replan_off": True}],
    **SPEEDS,
    "clients__1__claimed_speed": 0.01,
}
REQUEST: dict[str, Any] = {
    "stage": 0, "parts": 0, "cut": None, "bits": 32, "length": 16, "seed": "0/0", "personal": 0.0, "steps": 2, "micro": 1,
    "learning_rate": 0.1, "ranks": (2, 4),
}  # fmt: skip


def test_the_coherence_is_that_of_the_two_batch_sizes() -> None:
    """|G|²/(|G|² + tr Σ), from Σ|g|² and |Σg|²; of Gaussian gradients the noise scale comes out."""
    torch.manual_seed(0)
    number, mean = 4000, torch.full((50,), 0.2)  # |G|² = 2, tr Σ = 50
    gradients = mean + torch.randn(number, 50)
    agree = coherence(float(gradients.square().sum()), float(gradients.sum(0).square().sum()), number)
    assert Gradients(agree).noise == pytest.approx(25, rel=0.1)
    assert coherence(4 * 9.0, 16 * 9.0, 4) == 1, "all alike"
    assert coherence(4 * 9.0, 0.0, 4) == pytest.approx(-1 / 3), "they cancel"
    assert coherence(0.0, 0.0, 4) == 0
    assert (Gradients(-0.1).noise, Gradients(0.0).noise, Gradients(1.0).noise, Gradients().noise) == (
        MOST_NOISE, MOST_NOISE, 0, NOISE
    )  # fmt: skip


def test_a_rank_keeps_the_largest_singular_values() -> None:
    left, right = torch.linalg.qr(torch.randn(9, 3)).Q, torch.linalg.qr(torch.randn(5, 3)).Q
    sketch = left @ torch.diag(torch.tensor([4.0, 3.0, 0.0])) @ right.T
    torch.testing.assert_close(kept_by_ranks(sketch, (1, 2, 8)).float(), torch.tensor([16 / 25, 1.0, 1.0]))
    assert kept_by_ranks(torch.zeros(9, 5), (1, 2)).tolist() == [1, 1]


def test_what_is_measured_is_the_gradient_of_the_weights() -> None:
    """Of a model with one linear: the coherence of P·G·Q and the sketch G·Ωᵀ, from G by automatic differentiation."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = torch.nn.Embedding(50, 16), torch.nn.Linear(12, 50)
            self.blocks = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(16, 12))])

        def get_output_embeddings(self) -> torch.nn.Module:
            return self.head

        def forward(self, input_ids: torch.Tensor, **_: bool) -> object:
            return SimpleNamespace(logits=self.head(self.blocks[0](self.embed(input_ids))))

    torch.manual_seed(0)
    model = Model().requires_grad_(False)
    ids = torch.randint(0, 50, (6, 8))
    got = measure(model, {"blocks.0.0": (12, 16)}, iter([(ids, ids)]), Settings(1, 6, 6, 1e-2), "0", (2, 4, 8))
    weight = cast(torch.nn.Parameter, model.get_submodule("blocks.0.0").weight).requires_grad_(True)
    gradients = torch.stack([torch.autograd.grad(loss_sum(model, one[None], one[None]), weight)[0] for one in ids])
    left, right = initial_a("blocks.0.0/P", RANK, 12, "0"), initial_a("blocks.0.0/Q", RANK, 16, "0")
    projected = torch.einsum("ko,woi,ki->wk", left, gradients, right).double()
    wanted = coherence(float(projected.square().sum()), float(projected.sum(0).square().sum()), 6)
    assert float(got.coherence) == pytest.approx(wanted, rel=1e-3)
    sketch = gradients.sum(0) @ initial_a("blocks.0.0/directions", 8, 16, "0").T
    torch.testing.assert_close(got.kept[0], kept_by_ranks(sketch, (2, 4, 8)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("fixed", [False, True])
def test_the_clients_mean_is_by_tokens_whatever_their_order_and_a_single_window_says_nothing(fixed: bool) -> None:
    tokens = {"ash": 96, "birch": 32, "cedar": 64}
    settings = FixedPointChanges(everything=192, most=96, widest={}) if fixed else None
    steps = {"ash": 2, "birch": 2, "cedar": 1}
    requests = {
        name: ScoreLinears(**{**REQUEST, "steps": steps[name], "tokens": number, "fixed": settings})
        for name, number in tokens.items()
    }
    kept = {"ash": 0.5, "birch": 0.25, "cedar": 1.0}
    agree = {"ash": 0.5, "birch": -0.5, "cedar": 0.0}
    found = []
    for order in (["ash", "birch", "cedar"], ["cedar", "ash", "birch"]):
        total = ImportanceSum(["x"], requests, 96)
        for name in order:
            values = {
                "importance": torch.ones(1),
                "kept": torch.tensor([[kept[name], 1.0]]),
                "coherence": torch.tensor([agree[name]]),
            }
            sent = {CHANGE + key: value.double() for key, value in values.items()}
            sent = encode(values, requests[name].weight) if fixed else sent
            requests[name].check(sent, Tokens(tokens=tokens[name]), None)
            total.add(name, sent, Tokens(tokens=tokens[name]))
        found.append((total.importance(), total.gradients()))
    assert found[0] == found[1]
    importance, gradients = found[0]
    assert importance == {"x": 1.0}
    assert gradients.coherence == pytest.approx((96 * 0.5 - 32 * 0.5) / 128, abs=1e-6)
    assert gradients.kept["x"] == pytest.approx(((96 * 0.5 + 32 * 0.25 + 64) / 192, 1.0), abs=1e-6)


@pytest.mark.parametrize(("name", "value"), [(KEPT, 1.1), (KEPT, -0.1), (COHERENCE, 1.1), (COHERENCE, -1.1), (KEPT, math.nan)])
def test_a_fraction_that_is_none_is_refused(name: str, value: float) -> None:
    request = ScoreLinears(**REQUEST, tokens=32)
    sent = {IMPORTANCE: torch.ones(1).double(), KEPT: torch.ones(1, 2).double(), COHERENCE: torch.ones(1).double()}
    request.check(sent, Tokens(tokens=32), None)
    sent[name][..., 0] = value
    with pytest.raises(WireError, match=name):
        request.check(sent, Tokens(tokens=32), None)


def plan_of(speeds: list[float], **stage: Any) -> Plan:
    capabilities = {f"client-{i}": Capabilities(speed=speed, uplink=10**7, tokens={32: 1000}) for i, speed in enumerate(speeds)}
    return make_plan(0, config_of(**stage), SIZES, capabilities, even(SIZES), gradients=Gradients(0.1))


def config_of(**stage: Any) -> Config:
    usual: dict[str, Any] = {"method": "fedpipe", "ranks": (2, 4), "batches": (1, 2, 4)}
    return Config(**{"kind": "tune", "length": 32, "bits": (16,), **usual, **stage})


def test_faster_clients_take_more_steps_and_none_more_time() -> None:
    plan = plan_of([0.001, 0.002, 0.006], steps=8, max_steps=64)
    windows = [one.steps * one.batch for one in plan.clients.values()]
    assert windows[0] < windows[1] < windows[2] <= 64 * 4
    assert plan.deadline is not None
    for one in plan.clients.values():
        assert one.compute + 8 * one.upload / 10**7 <= plan.deadline * (1 + 1e-6)


@pytest.mark.parametrize("speeds", [[0.001], [0.001] * 4])
def test_one_client_or_clients_that_are_all_alike_are_given_the_same(speeds: list[float]) -> None:
    plan = plan_of(speeds, steps=8)
    (first, *others) = plan.clients.values()
    assert all(other == first for other in others)
    assert first.steps * first.batch >= 8, "as many windows as a deadline of 8 steps has room for"


@pytest.mark.parametrize("speed", [0.0001, 0.01, 1.0])
def test_clients_that_are_all_alike_learn_no_less_in_a_second_than_with_uniform_lora(speed: float) -> None:
    """Wherever the time goes: into training, or into sending. Not every number of steps is tried, so it may be 2 % less."""
    worth = []
    for stage in ({"method": "fedpipe"}, {"method": "lora", "batches": (1,)}):
        plan = plan_of([speed] * 4, steps=64, ranks=(2, 4, 8, 16), **stage)
        config = config_of(steps=64, ranks=(2, 4, 8, 16), **stage)
        seconds = max(one.seconds for one in plan.clients.values())
        worth.append(progress(plan, config, even(SIZES), Gradients(0.1)) / seconds)
    assert worth[0] >= 0.98 * worth[1]


def test_a_deadline_that_nobody_can_hold_is_told_with_one_that_would_do() -> None:
    with pytest.raises(Exception, match=r"takes .* s a round, but deadline is 1e-09 s; raise deadline"):
        plan_of([0.001], deadline=1e-9)


def test_a_speed_is_corrected_by_the_slowdown_beside_the_median_client() -> None:
    plan = plan_of([0.001, 0.002, 0.004, 0.006], steps=8)
    promised = {client: one.seconds for client, one in plan.clients.items()}
    sending = {client: one.seconds - one.compute for client, one in plan.clients.items()}
    assert corrected(plan, promised) == {}
    assert corrected(plan, {client: 30 * seconds for client, seconds in promised.items()}) == {}, "all are slower alike"
    for factor, wanted in ((10.0, 0.0006), (0.1, 0.06), (0.99 * BOUND, None)):
        measured = {**promised, "client-3": sending["client-3"] + factor * plan.clients["client-3"].compute}
        found = corrected(plan, measured)
        assert found == ({} if wanted is None else {"client-3": pytest.approx(wanted, rel=1e-3)})
    assert corrected(plan, {"client-3": 99.0}) == {}, "nobody to compare it with"
    assert corrected(plan, {}) == {}
    assert corrected(plan, {**promised, "client-0": 0.0})["client-0"] == pytest.approx(1.0, rel=1e-3)


def test_a_client_that_claims_ten_times_its_speed_gets_the_plan_of_its_own_speed(small: Small) -> None:
    run, honest = small.undisturbed(**GAINS), small.undisturbed(stages=GAINS["stages"], **SPEEDS)
    plan, wanted = (json.loads((folder / "plan-0-tune.json").read_text()) for folder in (run, honest))
    assert plan["capabilities"] == wanted["capabilities"]
    assert plan["deadline"] == pytest.approx(wanted["deadline"])
    assert plan["clients"]["birch"]["steps"] == wanted["clients"]["birch"]["steps"]
    assert (plan["since"], wanted["since"]) == (1, 0)
    found = measurements(run)
    assert found[0, 0, "birch", "seconds/measured"] > 5 * plan["deadline"] >= found[0, 1, "birch", "seconds/measured"]
    assert [key[1:3] for key in found if key[3] == "speed/corrected"] == [(1, "birch")]
    assert not any(name == "speed/corrected" for *_, name in measurements(honest))
    assert "birch: from round 1 on its speed was taken as 0.001" in write_report(run).read_text(encoding="utf-8")


def test_without_a_number_as_speed_none_can_be_claimed() -> None:
    with pytest.raises(ValueError, match="claimed_speed: speed is measured"):
        Client(name="ash", data=(Path(__file__),), speed="measure", claimed_speed=2.0)


def test_a_plan_with_more_noise_takes_larger_batches() -> None:
    capabilities = {"ash": Capabilities(speed=0.05, tokens={32: 1000})}
    config = Config(kind="tune", method="fedpipe", length=32, ranks=(2, 4), bits=(16,), deadline=20.0, max_steps=4096)
    given = [
        make_plan(0, config, SIZES, capabilities, even(SIZES), gradients=Gradients(agree)).clients["ash"]
        for agree in (0.9, 0.01)
    ]
    assert given[0].batch < given[1].batch
    assert pace(given[0].steps, given[0].batch, 99) < pace(given[1].steps, given[1].batch, 99)


def test_the_worth_of_a_plan_is_the_mean_over_clients_by_their_text() -> None:
    plan = plan_of([0.001, 0.006], steps=8)
    config = Config(kind="tune", method="fedpipe", length=32, ranks=(2, 4), batches=(1, 2, 4), bits=(16,), steps=8)
    gradients, each = Gradients(0.5, dict.fromkeys(SHAPES, (0.25, 1.0))), []
    for one in plan.clients.values():
        kept = sum({0: 0.0, 2: 0.25, 4: 1.0}[one.ranks.get(name, 0)] / 3 for name in SHAPES)
        each.append(kept * one.steps / (1 + one.steps / 512) / (1 + 1 / one.batch))
    assert progress(plan, config, plan.importance, gradients) == pytest.approx(sum(each) / 2)


def test_rounds_on_the_curve_are_predicted_and_others_are_off() -> None:
    known = Progress()
    for after in range(1, 6):
        known.begin(10.0)
        predicted, wanted = known.predicted, 2 * math.log(after / max(1, after - 1))
        gained = known.add(5 - 2 * math.log(after))
        assert (predicted is None) == (after < 3)
        assert (gained is None) == (after == 1)
        if predicted is not None:
            assert predicted == pytest.approx(wanted)
            assert gained == pytest.approx(wanted)
    assert [is_off(1.0, gained) for gained in (0.4, 0.6, 1.9, 2.1, -0.1)] == [True, False, False, True, True]
    assert [is_off(predicted, gained) for predicted, gained in ((-0.1, -0.1), (-0.1, 0.1), (0.0, 0.0))] == [True] * 3


def test_a_round_at_a_quarter_of_the_rate_is_half_as_much_progress() -> None:
    slow, short = Progress(), Progress()
    for loss in (3.0, 2.0):
        for known in (slow, short):
            known.begin(10.0)
            known.add(loss)
    slow.begin(10.0, 0.25)
    short.begin(5.0)
    assert slow.predicted == short.predicted


def test_prediction_and_outcome_are_in_the_metrics_and_the_report(small: Small) -> None:
    run = small.undisturbed(**GAINS)
    found, rounds = measurements(run), range(STAGE["rounds"])
    losses = [
        [math.log(value) for (_, r, _, name), value in found.items() if r == round_ and name.startswith("perplexity/")]
        for round_ in rounds
    ]
    means = [sum(one) / len(one) for one in losses]
    for round_ in rounds[1:]:
        assert found[0, round_, None, "gain/measured"] == pytest.approx(means[round_ - 1] - means[round_])
    assert [(0, r, None, "gain/predicted") in found for r in rounds] == [False, False, True]
    plan = json.loads((run / "plan-0-tune.json").read_text())
    assert -1 <= plan["coherence"] <= 1
    assert all(len(kept) == 2 and 0 <= kept[0] <= kept[1] == pytest.approx(1) for kept in plan["kept"].values())
    assert "gain predicted, nats a token" in write_report(run).read_text(encoding="utf-8")


@pytest.mark.parametrize("moment", [
    Moment("os.rename", "*/changes-0002.safetensors"),
    Moment("open", "*/metrics.jsonl", "cut", count=20),
])  # fmt: skip
def test_a_killed_stage_learns_the_same_of_its_rounds(small: Small, tmp_path: Path, moment: Moment) -> None:
    whole, out = small.undisturbed(**GAINS), small.continued(tmp_path / "run", moment, **GAINS)
    assert measurements(out) == measurements(whole)
    assert (out / "plan-0-tune.json").read_bytes() == (whole / "plan-0-tune.json").read_bytes()
    weights, wanted = (load_file(run / "model" / "model.safetensors") for run in (out, whole))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in wanted.items())


def test_a_round_that_gains_nothing_is_followed_by_a_new_measurement(small: Small, tmp_path: Path) -> None:
    """With a learning rate of next to nothing."""
    stages = [{**STAGE, "rounds": 4, "learning_rate": 1e-12, "eval_every": 1, "replan_off": True}]
    out = tmp_path / "run"
    assert cli("run", small.job("stuck", stages=stages), "--out", out, "--quiet")[0] == 0
    measured = [round_ for (_, round_, _, name) in measurements(out) if name == "noise scale"]
    assert measured == [0, 3]
