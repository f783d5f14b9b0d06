"""Masks that are improved at the server: by sums over the clients' text, exactly, whoever made them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedgrove import plugins
from fedgrove.input_statistics.statistics import InputStatistics
from fedgrove.models.masks import Target
from fedgrove.rounds.disclosure import Disclosure
from fedgrove.stages.prune.menders import dsnot
from small import LENGTH, SAMPLES, Moment, Small, cli, complaint, killed, lines
from test_statistics import hashes, owners, prune  # noqa: F401 (one is a fixture)

VOTES = {"kind": "prune", "pruner": "wanda", "sparsity": 0.5, "samples": SAMPLES, "length": LENGTH, "mend": "dsnot"}
TUNE = {
    "kind": "tune", "method": "lora", "rounds": 1, "steps": 1, "length": LENGTH, "batches": [1], "ranks": [2], "bits": [32],
}  # fmt: skip


def moments(*columns: list[float]) -> InputStatistics:
    """Statistics of one window: a column of tokens for each input."""
    inputs = InputStatistics("moments")
    inputs.add(torch.tensor(columns).T)
    return inputs


def test_a_weight_comes_back_for_the_cheapest_that_may_go() -> None:
    """Means 1, 2, 1, 1; ε is 3 + 8 = 11 at first: 4·2 comes back, of the kept ones with negative effect the smaller goes."""
    inputs = moments([0.0, 2.0], [1.0, 3.0], [0.0, 2.0], [0.0, 2.0])
    before = torch.tensor([[3.0, 4.0, -5.0, -6.0]])
    mask = torch.tensor([[False, False, True, True]])
    after, kept = dsnot.mend(before, before * mask, mask.clone(), inputs, Target(0.5))
    # the swap leaves 11 − 8 − 5 = −2; the next would have to bring −5 back, which is not pruned before it
    assert after.tolist() == [[0.0, 4.0, 0.0, -6.0]]
    assert kept.tolist() == [[False, True, False, True]]


def test_a_swap_that_costs_more_variance_than_it_earns_is_not_made() -> None:
    """As above, but ε = 11 falls to −2 at the cost of the third channel's variance: 4·25·Var − 16 against 121 − 4."""
    before = torch.tensor([[3.0, 4.0, -5.0, -6.0]])
    mask = torch.tensor([[False, False, True, True]])
    for apart, kept in ((1.1, [False, True, False, True]), (1.2, [False, False, True, True])):  # Var = apart²
        inputs = moments([0.0, 2.0], [1.0, 3.0], [1 - apart, 1 + apart], [-1.0, 3.0])
        assert dsnot.mend(before, before * mask, mask.clone(), inputs, Target(0.5))[1].tolist() == [kept]


def test_weights_that_changed_count_as_they_are_now() -> None:
    """The kept weight makes up for the pruned one, so ε is 0 and nothing is swapped; if it does not, the row is mended."""
    inputs = moments([0.0, 2.0], [0.0, 2.0], [0.0, 2.0])
    before, mask = torch.tensor([[2.0, 3.0, -1.0]]), torch.tensor([[False, True, True]])
    for value, result in ((5.0, [0.0, 5.0, -1.0]), (3.0, [2.0, 3.0, 0.0])):
        after, _ = dsnot.mend(before, torch.tensor([[0.0, value, -1.0]]), mask.clone(), inputs, Target(1 / 3))
        assert after.tolist() == [result]


@pytest.mark.parametrize("start", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("target", [Target(0.3), Target(0.5), Target(0.7), Target.of(None, (2, 4))], ids=str)
def test_no_row_gets_worse_and_no_count_changes(target: Target, start: str) -> None:
    random = torch.Generator().manual_seed(4)
    before = torch.randn(24, 48, generator=random)
    x = torch.randn(4, 64, 48, generator=random) * torch.rand(48, generator=random) + torch.randn(48, generator=random)
    known, inputs = InputStatistics("gram"), InputStatistics("moments")
    for statistics in (known, inputs):
        statistics.add(x)
    after, mask = plugins.load("stages.prune.pruners", start).prune(before.clone(), known, target)
    mended, kept = dsnot.mend(before, after, mask.clone(), inputs, target)
    assert torch.equal(mended, torch.where(mask, after, before) * kept)
    assert torch.equal(mended != 0, kept)
    assert torch.equal(kept.sum(1), mask.sum(1))
    if target.pattern:
        assert (kept.view(-1, target.pattern[1]).sum(1) == target.pattern[0]).all()
    error, mended_error = (((before - weight).double() @ inputs.means).abs() for weight in (after, mended))
    assert (mended_error <= error * (1 + 1e-9)).all()
    if start != "sparsegpt":  # which has restored the mean outputs itself
        assert mended_error.mean() < error.mean()
        spread = [((before - weight).double().square() * inputs.variances).sum(1) for weight in (after, mended)]
        assert (mended_error.square() + spread[1] <= (error.square() + spread[0]) * (1 + 1e-9)).all()


def test_inputs_without_a_token_leave_a_mask_as_it_is() -> None:
    before, mask = torch.randn(3, 8), torch.rand(3, 8) > 0.5
    after, kept = dsnot.mend(before, before * mask, mask, InputStatistics("moments"), Target(0.5))
    assert torch.equal(after, before * mask)
    assert torch.equal(kept, mask)


def test_votes_of_four_owners_are_mended_to_the_bits_of_the_pooled_text(
    small: Small,
    owners: dict[str, list[str]],  # noqa: F811
    tmp_path: Path,
) -> None:
    """Masks by magnitude are the same for every owner, so only the sums can differ between one owner and four."""
    votes = {"pruner": "magnitude", "aggregation": "fedspallm", "sparsity": 0.4}
    apart = prune(small, tmp_path / "apart", owners, **votes, mend="dsnot")
    everything = [record for records in reversed(owners.values()) for record in records]
    assert hashes(apart) == hashes(prune(small, tmp_path / "pooled", {"pool": everything}, **votes, mend="dsnot"))
    unmended = prune(small, tmp_path / "unmended", owners, **votes)
    assert any(apart[name][0] != row[0] for name, row in unmended.items())
    assert all(apart[name][1:] == row[1:] for name, row in unmended.items())


def test_the_same_mask_is_mended_alike_wherever_it_was_made(
    small: Small,
    owners: dict[str, list[str]],  # noqa: F811
    tmp_path: Path,
) -> None:
    stage = {"pruner": "magnitude", "source": "dense", "mend": "dsnot"}
    voted = prune(small, tmp_path / "voted", owners, **stage, aggregation="fedspallm")
    assert hashes(voted) == hashes(prune(small, tmp_path / "pooled", owners, **stage))


def test_wanda_mended_is_dsnot(small: Small, owners: dict[str, list[str]], tmp_path: Path) -> None:  # noqa: F811
    mended = prune(small, tmp_path / "mended", owners, pruner="wanda", mend="dsnot")
    assert hashes(mended) == hashes(prune(small, tmp_path / "dsnot", owners, pruner="dsnot"))


def test_secure_aggregation_changes_no_bit(small: Small, owners: dict[str, list[str]], tmp_path: Path) -> None:  # noqa: F811
    stage = {"pruner": "wanda", "aggregation": "fedprllm", "mend": "dsnot"}
    hidden = prune(small, tmp_path / "hidden", owners, privacy={"secure_aggregation": True}, **stage)
    assert hidden == prune(small, tmp_path / "plain", owners, **stage)


@pytest.fixture(scope="module")
def tuned(small: Small) -> Path:
    """Votes, mended, then tuned."""
    return small.undisturbed(stages=[VOTES, TUNE], evaluate={})


def test_a_killed_run_goes_on_to_the_same_bits(small: Small, tmp_path: Path, tuned: Path) -> None:
    job = small.job("killed", stages=[VOTES, TUNE], evaluate={})
    killed("run", job, "--out", tmp_path / "run", moment=Moment("os.rename", "*/round-1/block-0001.safetensors"))
    assert cli("run", job, "--out", tmp_path / "run", "--resume", "--quiet")[0] == 0
    for name in ("model/model.safetensors", "pruning.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tuned / name).read_bytes()


def test_zeros_are_exact_and_stay_when_the_model_is_tuned(tuned: Path) -> None:
    model = load_file(tuned / "model" / "model.safetensors")
    records = json.loads((tuned / "pruning.json").read_text())["tensors"]
    assert len(records) == 14
    for record in records:
        assert int((model[record["name"]] == 0).sum()) == record["pruned"] == record["numel"] // 2
    assert any(record["restored"] for record in records)


def test_what_leaves_a_client_is_planned_and_told(small: Small, tuned: Path) -> None:
    plan = json.loads((tuned / "plan-0-prune.json").read_text())
    assert set(plan["discloses"]) == {"MASKS", "WEIGHTS", "MOMENTS"}
    sent = [row for row in lines(tuned / "ledger.jsonl") if row["kind"] == "prune/statistics" and row["direction"] == "up"]
    assert [row["round"] for row in sent] == [0] * 6  # one more response for each client and block
    page = (tuned / "report.html").read_text(encoding="utf-8")
    for words in (
        "aggregation fedspallm, mended with dsnot",
        "Mending the masks swapped",
        "Every client pruned and sent sums of all 2 blocks.",
        Disclosure.MOMENTS.sentence,
    ):
        assert words in page, words
    assert "were not answered" not in page
    status, out, _ = cli("plan", small.job("planned", stages=[VOTES]), "--json")
    assert status == 0
    assert "sums over the inputs of every block" in json.loads(out)[0]["notes"][0]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mend": "wanda"}, "stages.0.mend: choose one of dsnot"),
        ({"aggregation": "pooled", "pruner": "dsnot"}, "has done this already"),
        ({"aggregation": "pooled", "epsilon": 1.0}, "mend: epsilon adds noise to sums of squares alone"),
        ({"trim": 1}, "mend: one dishonest client can decide the sums"),
        ({"layers": {"sample": 0.5}}, 'set layers to "all"'),
    ],
)
def test_what_does_not_go_together_is_refused(small: Small, changes: dict[str, object], says: str) -> None:
    job = small.job("refused", stages=[{**VOTES, **changes}], evaluate={})
    assert says in complaint("plan", job)


def test_only_a_first_stage_can_be_mended(small: Small) -> None:
    job = small.job("second", stages=[VOTES, VOTES], evaluate={})
    assert "stages.1.mend: it needs the model that the clients have" in complaint("plan", job)
