"""Gate "user_centric": each owner's weights of all owners' changes are those of the least error, and members are those sums."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fedgrove import run as server
from fedgrove.job.load import load
from fedgrove.runfolder import RunFolder
from fedgrove.stages.tune.gates.user_centric import least, on_simplex, weights
from fedgrove.stages.tune.parametrizations import mixable_of
from fedgrove.stages.tune.pool.finished import Pool
from fedgrove.stages.tune.pool.weighing import Changes
from small import CLIENTS, Heard, Meddling, Moment, Small, cli, complaint, killed
from test_pool import OWN, SCALES, tune


def draw(seed: int, owners: int = 8, size: int = 200, rounds: int = 5) -> tuple[Tensor, Tensor]:
    """True changes (owners, size) of kinds that are more or less alike, and those of noisy rounds (rounds, owners, size)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    kinds = int(torch.randint(1, owners + 1, (1,), generator=generator))
    apart, noise = torch.rand(2, generator=generator, dtype=torch.float64) * torch.tensor([1.5, 4.0])
    true = normal(size) + apart * normal(kinds, size)[torch.arange(owners) % kinds] + 0.2 * apart * normal(owners, size)
    return true, true + (0.3 + noise) * normal(rounds, owners, size)


def found(changes: Tensor) -> Tensor:
    """The weights of these changes of every round, (rounds, owners, size)."""
    total, rounds, owners = changes.sum(0), *changes.shape[:2]
    squares = changes.square().sum((0, 2))
    return weights(total @ total.T, squares, torch.full((owners,), rounds), torch.ones(owners).double())


def published(gradients: np.ndarray, noise: np.ndarray, number: np.ndarray, divisor: float) -> np.ndarray:
    """W of User-Centric FL: n_j exp(−‖g_i − g_j‖²/(2 σ_i σ_j)), rows adding up to 1; σ² is that of a part of the data."""
    apart = np.square(gradients[:, None] - gradients[None]).sum(2)
    scale = np.sqrt(np.outer(noise, noise)) * divisor
    kernel = number[None] * np.exp(-apart / (2 * scale))
    return kernel / kernel.sum(1, keepdims=True)


def test_weights_are_the_best_of_a_fine_grid() -> None:
    _, changes = draw(3, owners=3)
    mean = changes.mean(0)
    products, wanted = mean @ mean.T, (mean @ mean.T) - torch.diag(torch.tensor([40.0, 80.0, 20.0]).double())
    best = least(products, wanted, torch.full((3, 3), 1 / 3, dtype=torch.float64))
    grid = torch.tensor([(a, b, 100 - a - b) for a, b in itertools.product(range(101), repeat=2) if a + b <= 100]) / 100
    every = torch.cat([best, grid.double()])
    errors = (every @ products * every).sum(1)[:, None] - 2 * every @ wanted.T
    assert bool((errors[:3].diagonal() <= errors[3:].amin(0) + 1e-9).all())
    assert torch.allclose(best.sum(1), torch.ones(3).double())
    assert bool((best >= 0).all())


def test_the_nearest_weights_add_up_to_one() -> None:
    rows = torch.tensor([[0.2, 0.5, 0.3], [3.0, 0.0, 0.0], [0.4, 0.4, -5.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
    nearest = [[0.2, 0.5, 0.3], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [1 / 3] * 3]
    assert torch.allclose(on_simplex(rows), torch.tensor(nearest, dtype=torch.float64))


def test_the_error_is_that_of_the_best_of_averaging_of_staying_alone_and_of_the_published_kernel() -> None:
    errors: dict[str, list[float]] = {}
    for seed in range(100):
        true, changes = draw(seed)
        mean, owners = changes.mean(0), len(true)
        same, own = torch.full((owners, owners), 1 / owners, dtype=torch.float64), torch.eye(owners, dtype=torch.float64)
        ways = {"ours": found(changes), "all": same, "alone": own}
        noise = changes.var(0).sum(1).numpy() / len(changes)
        for divisor in (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0):
            kernel = published(mean.numpy(), noise, np.ones(owners), divisor)
            ways[f"kernel, {divisor}"] = torch.from_numpy(kernel)
        for name, of in ways.items():
            errors.setdefault(name, []).append(float((of @ mean - true).square().sum(1).mean()))
    means = {name: sum(of) / len(of) for name, of in errors.items()}
    ours = means.pop("ours")
    assert ours <= 1.02 * min(means.values()), (ours, means)
    assert min(means, key=means.__getitem__).startswith("kernel"), "the kernel at its best is the one to beat"


def test_owners_who_are_alike_share_and_others_do_not() -> None:
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(2, 500, generator=generator, dtype=torch.float64)
    true = kinds[torch.tensor([0, 1, 0, 1])]
    changes = true + 2 * torch.randn(5, 4, 500, generator=generator, dtype=torch.float64)
    of = found(changes)
    own = of[0, [0, 2]].sum(), of[1, [1, 3]].sum()
    assert min(own) > 0.75
    alike = found(kinds[0] + 2 * torch.randn(5, 4, 500, generator=generator, dtype=torch.float64))
    assert bool((alike - 0.25).abs().max() < 0.1)


def test_an_owner_that_was_hardly_there_gets_what_one_adapter_for_all_would_be() -> None:
    _, changes = draw(5, owners=4)
    total, squares = changes.sum(0), changes.square().sum((0, 2))
    windows = torch.tensor([1.0, 2.0, 3.0, 10.0], dtype=torch.float64)
    first = weights(total @ total.T, squares, torch.tensor([1, 1, 1, 1]), windows)
    assert torch.allclose(first, (windows / 16).expand(4, 4))
    total[3], squares[3] = 0.0, 0.0
    later = weights(total @ total.T, squares, torch.tensor([5, 5, 5, 0]), windows)
    assert bool((later[:, 3] == 0).all())
    assert torch.allclose(later[3], torch.tensor([1.0, 2.0, 3.0, 0.0]).double() / 6)
    assert torch.allclose(later.sum(1), torch.ones(4).double())


@pytest.mark.parametrize("stage", [{}, {"precision": "fixed"}, SCALES], ids=["lora", "fixed", "ia3"])
def test_one_owner_gets_the_run_without_a_pool_bit_for_bit(small: Small, stage: dict[str, Any]) -> None:
    job = {"clients": [{"name": "ash", "data": str(small.texts["ash"])}]}
    alone, own = (small.undisturbed(stages=tune(of, rounds=3, **stage), **job) for of in (None, OWN))
    for name, tensor in load_file(alone / "model" / "model.safetensors").items():
        assert torch.equal(tensor, load_file(own / "model" / "model.safetensors")[name]), name


@pytest.mark.parametrize("stage", [{}, SCALES], ids=["lora", "ia3"])
def test_members_are_the_weighted_sums_of_what_owners_have_changed(small: Small, tmp_path: Path, stage: dict[str, Any]) -> None:
    job, run = small.job("sums", stages=tune(OWN, rounds=3, **stage)), tmp_path / "run"
    killed("run", job, "--out", run, moment=Moment("os.rename", "*/pool"))
    file = run / "work" / "stage-0" / "owners-0002.safetensors"
    changes = Changes.read(mixable_of("ia3" if stage else "lora"), file)
    kept = {int(one.stem.split("-")[1]) for kind in ("owners", "member") for one in file.parent.glob(f"{kind}-*")}
    assert kept == {1, 2}, "only those from which a killed run goes on"
    assert cli("run", job, "--out", run, "--resume")[0] == 0
    pool = Pool.read(run)
    of = pool.facts["weights"]
    assert list(of) == list(CLIENTS)
    assert len(pool.members) == len(CLIENTS)
    assert all(abs(sum(row) - 1) < 1e-9 and min(row) >= 0 for row in of.values())
    assert pool.facts["clients"].keys() == set(CLIENTS)
    assert changes.rounds == [3, 3, 3]
    for row, member in zip(of.values(), pool.members, strict=True):
        for name, change in member.items():
            for part, value in change.parts().items():
                if part != "a":
                    sums = [one[name].parts()[part].double() for one in changes.sums]
                    by_hand = sum(weight * of_owner for weight, of_owner in zip(row, sums, strict=True))
                    assert torch.allclose(value.double(), by_hand, atol=1e-7), (name, part)


def test_it_sends_what_one_adapter_does_and_every_client_takes_part_in_one_exchange(small: Small) -> None:
    one, own = (small.undisturbed(stages=tune(of, rounds=3)) for of in (None, OWN))
    lines = [[json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()] for run in (one, own)]
    up, own_up = ([line["bytes"] for line in of if line["direction"] == "up"] for of in lines)
    assert own_up == pytest.approx(up, rel=0.01)
    kinds, own_kinds = ([line["kind"] for line in of] for of in lines)
    assert kinds == own_kinds


def test_owners_of_other_text_keep_it_to_themselves(small: Small) -> None:
    small.one_word("tree", "river", "tree")
    names = {"ash": "tree", "birch": "river", "cedar": "tree", "date": "river"}
    clients = [{"name": name, "data": str(small.folder / f"only-{word}.txt")} for name, word in names.items()]
    run = small.undisturbed(stages=tune(OWN, rounds=4, learning_rate=0.03), clients=clients, evaluate={})
    of = torch.tensor(list(Pool.read(run).facts["weights"].values()))
    assert bool((of[[0, 2]][:, [0, 2]].sum(1) > 0.6).all()), of
    assert bool((of[[1, 3]][:, [1, 3]].sum(1) > 0.6).all()), of
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "How much of what each client changed its member has" in page


def test_a_plan_says_that_two_rounds_are_few(small: Small) -> None:
    two, three = (cli("plan", small.job("few", stages=tune(OWN, rounds=rounds)))[1] for rounds in (2, 3))
    assert "two show who is like whom" in " ".join(two.split())
    assert "who is like whom" not in " ".join(three.split())


def test_an_owner_gets_its_own_member_and_a_newcomer_the_best_one(small: Small, tmp_path: Path) -> None:
    small.one_word("tree", "river", "tree")
    words = {"ash": "tree", "birch": "river", "cedar": "tree"}
    clients = [{"name": name, "data": str(small.folder / f"only-{word}.txt")} for name, word in words.items()]
    run = small.undisturbed(stages=tune(OWN, rounds=4, learning_rate=0.03), clients=clients, evaluate={})
    river = small.folder / "only-river.txt"
    status, out, err = cli("adopt", run, "--data", river, "--out", tmp_path / "own", "--group", "birch", "--json")
    assert status == 0, err
    assert json.loads(out)["weights"] == [0.0, 1.0, 0.0]
    status, out, err = cli("adopt", run, "--data", river, "--out", tmp_path / "new", "--json")
    assert status == 0, err
    assert json.loads(out)["choice"] == "member 1"
    line = complaint("adopt", run, "--data", river, "--out", tmp_path / "x", "--group", "oak")
    assert "no such group; choose one of ash, birch, cedar" in line


def test_windows_can_be_protected_with_noise_in_every_step(small: Small) -> None:
    pytest.importorskip("dp_accounting")
    run = small.undisturbed(stages=tune(OWN, epsilon=8.0, delta=1e-3))
    assert len(Pool.read(run).members) == len(CLIENTS)


def test_a_liar_is_scaled_down_by_name_and_others_get_little_of_it(small: Small, tmp_path: Path) -> None:
    def lie(tensors: dict[str, Tensor], reply: dict[str, Any]) -> None:
        generator = torch.Generator().manual_seed(len(heard.lines))
        for name in sorted(tensors):
            tensors[name] = torch.randn(tensors[name].shape, generator=generator).to(tensors[name].dtype)

    heard, out = Heard(), tmp_path / "run"
    job = load(small.job("lies", stages=tune(OWN, rounds=4)))
    run = RunFolder(out, job, listener=heard)
    try:
        server.run_job(job, Meddling(server.local_engine(job, out / "clients"), "tune/train", change=lie), run)
    finally:
        run.close()
    assert any(line.startswith("birch: its change is more than 4 times the median") for line in heard.lines)
    of = Pool.read(out).facts["weights"]
    assert max(of["ash"][1], of["cedar"][1]) < 0.15


def test_a_client_that_never_responds_gets_what_the_others_have_learnt_and_gives_nothing(small: Small, tmp_path: Path) -> None:
    out = tmp_path / "run"
    job = load(small.job("dies", stages=tune(OWN, rounds=3), rounds__quorum=2))
    run = RunFolder(out, job)
    try:
        server.run_job(job, Meddling(server.local_engine(job, out / "clients"), "tune/train"), run)
    finally:
        run.close()
    of = Pool.read(out).facts["weights"]
    assert [row[1] for row in of.values()] == [0.0, 0.0, 0.0]
    assert sum(of["birch"]) == pytest.approx(1)
