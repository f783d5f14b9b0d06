"""Parametrization "adapter_seeds", models of 8 and 4 bits, and clients that send exact slopes among those that measure them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedgrove.client.local_client import LocalClient
from fedgrove.client.windows import training_windows
from fedgrove.errors import FedgroveError
from fedgrove.models.blocks import Decoder
from fedgrove.models.signs import direction_like, key_of
from fedgrove.models.stream import Checkpoint
from fedgrove.stages.tune import training
from fedgrove.stages.tune.exchanges.seeds import DIFFERENCES
from fedgrove.stages.tune.factors import initial_a
from fedgrove.stages.tune.seeds import steps
from fedgrove.stages.tune.seeds.moving import moving_of
from fedgrove.stages.tune.seeds.offsets import UNIT, Offsets
from fedgrove.stages.tune.seeds.quantized import Quantized
from fedgrove.stages.tune.seeds.steps import Steps
from fedgrove.stages.tune.seeds.two_sided import TwoSided
from fedgrove.stages.tune.trainers import directional, zeroth_order
from small import LENGTH, Moment, Small, cli, complaint, result
from test_seeds import FLOAT, SEEDS, clients_of, start, step_request, two_sided_of, windows
from test_tune_private import SECURE, run
from test_tune_stage import PRUNE, mean_perplexity, weights

ADAPTERS = {**SEEDS, "method": "adapter_seeds", "ranks": [2], "perturbation": 2**-5, "learning_rate": 0.02}
BITS = pytest.mark.parametrize("bits", [8, 4])


def linears(small: Small) -> dict[str, str]:
    """The names of the linears in the model, and of their weights."""
    return Decoder(Checkpoint(small.model)).linear_names()


def along(model: Path, folder: Path, whole: bool = True, rank: int = 2, **settings: Any) -> TwoSided:
    """A model at the start, for four directions."""
    moving = moving_of(Offsets(folder, "0/0", whole), "0/0", rank)
    return TwoSided(
        Decoder(Checkpoint(model, torch.float32)), moving, torch.zeros(4, dtype=torch.int64), whole=whole, **settings
    )


def test_losses_are_those_of_plain_transformers_with_adapters(small: Small, tmp_path: Path) -> None:
    model = two_sided_of(small, tmp_path, rank=2)
    model.move(1, round(0.2 / UNIT))
    ids, labels = windows()
    sides = (0.0, 0.1, -0.1)
    for side, found in zip(sides, model.losses(ids, labels, 2, sides), strict=True):
        plain = AutoModelForCausalLM.from_pretrained(small.model, dtype=torch.float32)
        for name, stored in linears(small).items():
            weight, key = plain.get_parameter(stored), key_of("0/0", f"{stored}.b")
            b = torch.empty(weight.shape[0], 2)
            moved = 0.2 * direction_like(key, 1, b) + side * direction_like(key, 2, b)
            weight.data += moved @ initial_a(name, 2, weight.shape[1], "0/0")
        with torch.no_grad():
            wanted = [float(plain(input_ids=i[None], labels=w[None]).loss) for i, w in zip(ids, labels, strict=True)]
        torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-5, atol=1e-6)


def test_adapters_block_by_block_from_disk_give_the_bits_of_the_model_in_memory(small: Small, tmp_path: Path) -> None:
    ids, labels = windows()
    found = []
    for whole in (True, False):
        model = two_sided_of(small, tmp_path / str(whole), whole, rank=2)
        model.move(0, 2**37)
        found.append(model.losses(ids, labels, 1, (2**-4, -(2**-4))))
    assert torch.equal(*found)


@pytest.mark.parametrize(("rank", "whole", "masked"), [(0, True, False), (0, False, True), (2, True, True), (2, False, False)])
def test_slopes_by_a_backward_pass_are_those_by_differences(
    small: Small, tmp_path: Path, rank: int, whole: bool, masked: bool
) -> None:
    """Within a percent of the largest, also away from the start, and where zeros stay."""
    folder = small.undisturbed(stages=[PRUNE], **FLOAT) / "model" if masked else small.model
    names = tuple(linears(small)) if masked else ()
    model = along(folder, tmp_path / "offsets", whole, rank, masked=names)
    epsilon = 2.0**-7 if rank else 2.0**-10
    model.move(3, round(epsilon / UNIT))
    ids, labels = windows()
    slopes, losses = model.slopes(ids, labels, (0, 1, 2))
    for direction in range(3):
        center, above, below = model.losses(ids, labels, direction, (0.0, epsilon, -epsilon))
        torch.testing.assert_close(center, losses, rtol=1e-5, atol=1e-6)
        differences = float((above - below).sum()) / (2 * epsilon)
        assert differences == pytest.approx(float(slopes[direction]), abs=0.01 * float(slopes.abs().max()))


def test_a_window_that_is_not_finite_adds_nothing_to_exact_slopes(small: Small, tmp_path: Path) -> None:
    class Broken(TwoSided):
        broken: tuple[int, ...] = ()

        def slopes(self, ids: Tensor, labels: Tensor, directions: Any) -> tuple[Tensor, Tensor]:
            found, losses = super().slopes(ids, labels, directions)
            losses[list(self.broken)] = float("nan")
            return found, losses

    ids, labels = windows(4)
    settings = Steps((0, 1), 2, 1e-3, 2**-9, 2**30, local=False)
    moving = moving_of(Offsets(tmp_path, "0/0", True), "0/0", 0)
    model = Broken(Decoder(Checkpoint(small.model, torch.float32)), moving, torch.zeros(2, dtype=torch.int64), whole=True)
    model.broken = (0, 1)
    assert directional.train(model, training.Work(ids, labels, 0, "s"), settings).loss is not None
    model.broken = (0, 1, 2, 3)
    with pytest.raises(training.NotFinite):
        directional.train(model, training.Work(ids, labels, 0, "s"), settings)


# Few bits


@BITS
def test_slopes_on_few_bits_are_those_of_the_model_with_the_rounded_weights(small: Small, tmp_path: Path, bits: int) -> None:
    if bits == 4:
        pytest.importorskip("bitsandbytes")
    tensors = {name: tensor.float() for name, tensor in load_file(small.model / "model.safetensors").items()}
    for stored in set(linears(small).values()):
        tensors[stored][:, 0] = 0
    unrounded, rounded = tmp_path / "unrounded", tmp_path / "rounded"
    for folder in (unrounded, rounded):
        folder.mkdir()
        for file in small.model.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        for stored in set(linears(small).values()):
            few = Quantized(tensors[stored], bits).matrix()
            assert not few[:, 0].any(), "zero is exact"
            assert float((few - tensors[stored]).abs().max() / tensors[stored].abs().max()) < (0.005 if bits == 8 else 0.2)
            tensors[stored] = few
    before = (unrounded / "model.safetensors").read_bytes()
    ids, labels = windows()
    epsilon = 2.0**-7
    found = [
        along(folder, tmp_path / folder.name / "offsets", False, bits=few).losses(ids, labels, 0, (epsilon, -epsilon))
        for folder, few in ((rounded, 32), (unrounded, bits))
    ]
    slopes = [float((above - below).sum()) / (2 * epsilon) for above, below in found]
    assert slopes[1] == pytest.approx(slopes[0], rel=0.02)
    assert (unrounded / "model.safetensors").read_bytes() == before


@BITS
def test_a_stage_on_few_bits_lowers_the_loss_of_the_model_with_all_of_them(small: Small, bits: int) -> None:
    if bits == 4:
        pytest.importorskip("bitsandbytes")
    run = small.undisturbed(stages=[{**ADAPTERS, "bits": [bits], "steps": 8, "learning_rate": "auto"}], **small.one_word())
    assert mean_perplexity(run, 0) < 0.9 * mean_perplexity(run, None)
    assert {one["bits"] for one in json.loads((run / "plan-0-tune.json").read_text())["clients"].values()} == {bits}


# Whole stages


def test_the_adapter_that_moved_loads_in_plain_peft(small: Small) -> None:
    run = small.undisturbed(stages=[ADAPTERS], **FLOAT)
    ids = torch.tensor([[3, 50, 7, 90]])
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)(input_ids=ids).logits
        base = AutoModelForCausalLM.from_pretrained(small.model, dtype=torch.float32)
        before = base(input_ids=ids).logits
        loaded = PeftModel.from_pretrained(base, run / "adapter").eval()(input_ids=ids).logits
    torch.testing.assert_close(loaded, merged, rtol=0, atol=1e-4)
    assert float((merged - before).abs().max()) > 1e-2


def test_zeros_of_a_pruned_model_stay_beside_adapters(small: Small) -> None:
    changes = small.one_word()
    pruned = weights(small.undisturbed(stages=[PRUNE], **changes))
    run = small.undisturbed(stages=[PRUNE, {**ADAPTERS, "rounds": 1}], **changes)
    for row in json.loads((run / "pruning.json").read_text())["tensors"]:
        after = weights(run)[row["name"]]
        assert torch.equal(pruned[row["name"]] == 0, after == 0)
        assert not torch.equal(pruned[row["name"]], after)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("trainer", ["zeroth_order", "directional"])
def test_the_sum_of_adapters_over_clients_is_that_of_one_owner_of_all_text(
    small: Small, tmp_path: Path, rank: int, trainer: str
) -> None:
    """Bit for bit by differences; exact slopes are floats, added up in another order."""
    clients = clients_of(small, tmp_path, **FLOAT)
    owner = LocalClient("owner", tmp_path / "owner", small.model, torch.float32, (), None, owners=tuple(clients))
    sent = []
    for client in (owner, *clients):
        ids, _ = training_windows(client, LENGTH)
        request = step_request(tokens=ids.numel(), batch=len(ids), steps=2, rank=rank, trainer=trainer, perturbation=2**-7)
        sent.append(request.respond(start(2), client, "cpu").tensors[DIFFERENCES].long())
    total = torch.stack(sent[1:]).sum(0)
    if trainer == "zeroth_order":
        assert sent[0].equal(total)
    assert bool(((sent[0] - total).abs() <= 3 + 1e-4 * total.abs().max()).all())
    assert bool(sent[0].all())


def test_the_secure_sum_of_adapters_gives_the_bits_of_the_open_one(small: Small, tmp_path: Path) -> None:
    opened = small.undisturbed(stages=[ADAPTERS], **FLOAT)
    unseen = run(small, tmp_path / "unseen", stages=[ADAPTERS], privacy=SECURE, **FLOAT)
    for name, tensor in weights(opened).items():
        assert torch.equal(tensor, weights(unseen)[name]), name


@pytest.mark.parametrize("moment", [
    Moment("os.rename", "*/changes-0001.safetensors"),
    Moment("os.rename", "*/offsets-1/*.b.safetensors", "kill", 2),
])  # fmt: skip
def test_a_killed_stage_of_adapters_goes_on_to_the_same_bits(small: Small, tmp_path: Path, moment: Moment) -> None:
    stages = [PRUNE, {**ADAPTERS, "steps": 1, "bits": [8], "learning_rate": "auto", "perturbation": "auto"}]
    whole, out = small.undisturbed(stages=stages), small.continued(tmp_path / "run", moment, stages=stages)
    assert result(out) == result(whole) | {"job.toml": result(out)["job.toml"]}


# Exact slopes


def test_clients_with_memory_send_exact_slopes_that_add_up_with_those_of_the_others(small: Small) -> None:
    """In rounds of one step all look at the same windows: then the models of both federations are nearly the same."""
    stage = {**SEEDS, "steps": 1, "rounds": 2, "length": 256}
    exact = {**stage, "trainer": "directional"}
    plans = [small.undisturbed(stages=[one], **FLOAT) / "plan-0-tune.json" for one in (stage, exact)]
    little, much = (max(one["memory"] for one in json.loads(plan.read_text())["clients"].values()) for plan in plans)
    assert little < much
    clients = [{**one, "memory": (little + much) // 2} for one in small.spec()["clients"][:1]]
    mixed = small.undisturbed(stages=[exact], **FLOAT, clients=[*clients, *small.spec()["clients"][1:]])
    plan = json.loads((mixed / "plan-0-tune.json").read_text())["clients"]
    assert [plan[name]["trainer"] for name in sorted(plan)] == ["zeroth_order", "directional", "directional"]
    assert [plan[name]["forwards"] > 0 for name in sorted(plan)] == [True, False, False]
    before = load_file(small.model / "model.safetensors")
    weak, strong, both = (weights(out) for out in (plans[0].parent, plans[1].parent, mixed))
    for stored in set(linears(small).values()):
        move = weak[stored] - before[stored]
        for other in (strong, both):
            torch.testing.assert_close(other[stored] - before[stored], move, rtol=0, atol=0.02 * float(move.abs().max()))
        assert not torch.equal(both[stored], weak[stored])


def test_an_exact_slope_is_the_mean_over_all_windows_of_the_round(small: Small, tmp_path: Path) -> None:
    ids, labels = windows(6)
    settings = Steps((0, 1, 2), 2, 1e-3, 2**-9, 2**30, local=False)
    model = two_sided_of(small, tmp_path)
    taken = directional.train(model, training.Work(ids, labels, 0, "s"), settings)
    slopes, losses = two_sided_of(small, tmp_path / "other").slopes(ids, labels, (0, 1, 2))
    for difference, slope in zip(taken.differences.tolist(), slopes.tolist(), strict=True):
        assert steps.slope(difference, 2, 2**-9) == pytest.approx(slope / 6, rel=1e-3)
    assert taken.loss == pytest.approx(float(losses.mean()))
    clipped = Steps((0, 1, 2), 2, 1e-3, 2**-9, 2**30, float(slopes.abs().min()) / 12, local=False)
    small_ones = directional.train(two_sided_of(small, tmp_path / "clipped"), training.Work(ids, labels, 0, "s"), clipped)
    assert {abs(one) for one in small_ones.differences.tolist()} == {round(clipped.max_slope * 2 * 2 * 2**-9 * 2**24)}
    by_differences = zeroth_order.train(model, training.Work(ids, labels, 0, "s"), settings)
    assert not taken.differences.equal(by_differences.differences)


# Mistakes


@pytest.mark.parametrize(("change", "says"), [
    ({"method": "seeds", "ranks": [4]}, 'ranks: it has no effect with parametrization "seeds"'),
    ({"ranks": [4096]}, "stages.0.ranks: 4096 is too large for model.layers.0"),
    ({"alpha": 4.0}, "alpha: it has no effect"),
    ({"trainer": "directional", "aggregation": "own"}, 'a client moves after each of its steps; set aggregation = "common"'),
    ({"trainer": "directional", "epsilon": 1.0}, 'trainer "directional" does not protect a window'),
    ({"pool": {"gate": "groups", "groups": {"all": ["ash", "birch", "cedar"]}}}, 'set method = "lora" or "ia3"'),
])  # fmt: skip
def test_a_mistake_is_one_line_that_names_the_key(small: Small, change: dict[str, Any], says: str) -> None:
    line = complaint("plan", small.job("mistaken", stages=[{**ADAPTERS, **change}], evaluate={}))
    assert "stages.0" in line
    assert says in line, line


def test_the_memory_that_a_client_is_said_to_lack_is_enough_for_the_bits_of_the_job(small: Small, grove: Path) -> None:
    def planned(memory: str) -> tuple[int, str, str]:
        clients = [{**one, "memory": memory} for one in small.spec()["clients"]]
        changes = {"model__path": str(grove), "evaluate": {}, "clients": clients}
        return cli("plan", small.job("tight", stages=[{**ADAPTERS, "bits": [8]}], **changes))

    status, _, line = planned("1MiB")
    assert status == 2
    need = re.search(r"two forward passes need ([\d,]+) MiB of memory, but it has 1 MiB", " ".join(line.split()))
    assert need, line
    assert planned(f"{need[1].replace(',', '')}MiB")[0] == 0


def test_a_client_refuses_a_rank_that_no_adapter_has(small: Small, tmp_path: Path) -> None:
    client = clients_of(small, tmp_path, **FLOAT)[0]
    with pytest.raises(FedgroveError, match="'ash': the server sent a rank that is larger than a linear allows; refused"):
        step_request(tokens=training_windows(client, LENGTH)[0].numel(), rank=4096).respond(start(1), client, "cpu")


def test_the_plan_says_who_sends_exact_slopes(small: Small) -> None:
    status, out, _ = cli("plan", small.job("told", stages=[{**SEEDS, "trainer": "directional"}], evaluate={}))
    assert status == 0
    assert "exact" in out
    assert "slopes" in out
