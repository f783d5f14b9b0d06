"""The stage ``prompt``: the server names candidates, and the sum of the clients' scores is the score of the pooled records."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import cmaes
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedgrove import api
from fedgrove.api import with_prompt
from fedgrove.client.local_client import LocalClient
from fedgrove.data.tokens import encode
from fedgrove.errors import FedgroveError
from fedgrove.job.load import load
from fedgrove.models.blocks import Decoder
from fedgrove.models.continuations import embed
from fedgrove.models.labels import score_labels
from fedgrove.models.stream import Checkpoint
from fedgrove.rounds import wire
from fedgrove.rounds.disclosure import Disclosure
from fedgrove.stages.prompt.config import Config, Place
from fedgrove.stages.prompt.exchanges.local import SearchAlone
from fedgrove.stages.prompt.exchanges.score import ScorePrompts
from fedgrove.stages.prompt.methods import Alone, Found, Task, categories, evolution
from fedgrove.stages.prompt.methods.evolution import FULL
from fedgrove.stages.prompt.records import Records, read_records, records_of
from fedgrove.stages.prompt.requests import Subspace
from fedgrove.stages.prompt.scoring import BITS, MOST_LOSS, Prompt, costs, score, sums
from fedgrove.stages.prompt.searching import task_of
from fedgrove.stages.prompt.subspace import soft_prompts
from small import CLIENTS, Moment, Small, cli, complaint, killed, lines, make_model, measurements
from test_report import Page

LABELS = (" bird", " fish", " tree")
WORDS = {" bird": "wing feather nest", " fish": "sea water scale", " tree": "leaf root bark"}
PROMPT = {
    "kind": "prompt", "labels": list(LABELS), "length": 16, "rounds": 3, "population": 4, "records": 50, "dimension": 6,
    "start": " It is a", "spread": 1.0,
}  # fmt: skip
WORDY = {"method": "categories", "tokens": 2, "choices": 3, "population": 10, "dimension": None, "spread": None}

NUMBER = 3 + 4 + 5  # of the clients' records
LOCAL = {"aggregation": "local", "generations": 2, "rounds": 2, "records": 4, "against_overfitting": 0.5}


@pytest.fixture(scope="module")
def files(small: Small) -> dict[str, Path]:
    """A file of labeled records for every client, one with all of them, and a test."""
    found, every = {}, []
    for offset, client in enumerate((*CLIENTS, "test")):
        rows = []
        for number in range(3 + offset):
            label = LABELS[(number + offset) % 3]
            rows.append({"text": f"{WORDS[label]} {number} of {client}", "label": label.strip()})
        found[client] = _write(small.folder / f"prompted-{client}.jsonl", rows)
        every += rows if client != "test" else []
    found["everybody"] = _write(small.folder / "prompted-everybody.jsonl", every[::-1])
    return found


def _write(file: Path, rows: list[dict[str, str]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def job(files: Mapping[str, Path], owners: tuple[str, ...] = CLIENTS, **changes: Any) -> dict[str, Any]:
    """Changes of the small job: a prompt from these owners' records."""
    stage = {key: changes.pop(key) for key in list(changes) if "__" not in key and key != "privacy"}
    templates = {"prompt": "{text}", "answer": " {label}"}
    data = [{"name": "test", "path": str(files["test"]), "measure": "prompt", **templates}]
    clients = [{"name": name, "data": str(files[name]), **templates} for name in owners]
    return {
        "clients": clients,
        "stages": [{key: value for key, value in {**PROMPT, **stage}.items() if value is not None}],
         "evaluate__data": data, **changes,
    }  # fmt: skip


# Scores


def records(small: Small, files: Mapping[str, Path], labels: tuple[str, ...] = LABELS, who: str = "ash") -> Records:
    return read_records([files[who]], "{text}", " {label}", labels, Checkpoint(small.model).tokenizer(), 16)


def plain_scores(model: Any, of: Records, prompts: list[Prompt], place: str) -> list[list[list[float]]]:
    """log p of each option by plain transformers: one forward of the whole text for each."""
    table, found = model.get_input_embeddings(), []
    for number, text in enumerate(of.texts):
        rows = []
        for prompt in prompts:
            prefix, own = table(torch.tensor(of.prefix).long()), table(torch.tensor(text))
            before = [prefix, own, prompt.embeddings] if place == "end" else [prefix, prompt.embeddings, own]
            if place == "front" and not prompt.written:
                before = [prompt.embeddings, prefix, own]
            row = []
            for option in of.options(number):
                ids = torch.tensor(option)
                with torch.no_grad():
                    logits = model(inputs_embeds=torch.cat([*before, table(ids)])[None]).logits[0, -len(ids) - 1 : -1]
                row.append(float(logits.double().log_softmax(-1).gather(1, ids[:, None]).sum()))
            rows.append(row)
        found.append(rows)
    return found


@pytest.fixture(scope="module")
def plain(small: Small) -> Any:
    return AutoModelForCausalLM.from_pretrained(small.model, dtype=torch.float32).eval()


@pytest.mark.parametrize("place", ["end", "front"])
@pytest.mark.parametrize("labels", [LABELS, ()])
def test_scores_are_those_of_plain_forwards(
    small: Small, files: Mapping[str, Path], plain: Any, monkeypatch: pytest.MonkeyPatch, place: Place, labels: tuple[str, ...]
) -> None:
    """Prompts of several lengths and none, written and soft, in groups or one by one."""
    decoder, of = Decoder(Checkpoint(small.model)), records(small, files, labels).take(range(3))
    generator = torch.Generator().manual_seed(0)
    prompts = [
        Prompt(torch.randn(n, 64, generator=generator) / 10, written) for n, written in ((3, False), (0, True), (3, False))
    ]
    prompts += [Prompt(embed(decoder, torch.tensor([5, 17])), written=True)]
    found = score(decoder, of, prompts, place)
    for one, expected in zip(found, plain_scores(plain, of, prompts, place), strict=True):
        torch.testing.assert_close(one, torch.tensor(expected).double(), rtol=0, atol=1e-5)
    monkeypatch.setattr("fedgrove.stages.prompt.scoring.TOGETHER", 1)
    for one, again in zip(found, score(decoder, of, prompts, place), strict=True):
        torch.testing.assert_close(one, again, rtol=0, atol=1e-5)


def test_bfloat16_scores_nearly_alike_and_holds_half(small: Small, files: Mapping[str, Path]) -> None:
    """Clients compute in the stage's dtype, and held-out records are measured in that of [evaluate]."""
    jobs = [job(files), job(files, compute_dtype="bfloat16", evaluate__compute_dtype="bfloat16")]
    found = [measurements(small.undisturbed(**one)) for one in jobs]
    assert found[0] != found[1]
    assert found[1][0, 0, None, "best"] == pytest.approx(found[0][0, 0, None, "best"], abs=0.1)
    memory = [api.plan(small.job(f"dtype-{i}", **one), quiet=True)[0].clients["ash"].memory for i, one in enumerate(jobs)]
    assert memory[1] - 2**24 == (memory[0] - 2**24) // 2


def test_without_a_prompt_labels_score_as_in_the_measure_accuracy(small: Small, files: Mapping[str, Path]) -> None:
    decoder, of = Decoder(Checkpoint(small.model)), records(small, files)
    found = torch.stack(score(decoder, of, [Prompt(torch.empty(0, 64), written=True)], "end"))[:, 0]
    texts = [line["text"] for line in lines(files["ash"])]
    expected = score_labels(decoder.load_all(), decoder.checkpoint.tokenizer(), texts, LABELS, 16)
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=1e-5)


def test_a_records_text_passes_once_for_all_prompts_behind_it(small: Small, files: Mapping[str, Path]) -> None:
    passed: list[int] = []
    decoder, of = Decoder(Checkpoint(small.model)), records(small, files).take([0])
    run = decoder.run
    decoder.run = lambda block, hidden, call: passed.append(hidden.shape[:2].numel()) or run(block, hidden, call)  # type: ignore
    prompts = [Prompt(torch.zeros(2, 64), written=False)] * 7
    score(decoder, of, prompts, "end")
    longest = max(map(len, of.labels))
    assert sum(passed) == len(decoder) * (len(of.prefix) + len(of.texts[0]) + 7 * (2 + len(LABELS) * (longest - 1)))


def test_what_is_not_finite_is_a_prompts_fault_or_the_record_is_skipped() -> None:
    nan, of = float("nan"), Records((), ((1,), (2,)), ((0,),) * 3, ((0,), (1,), (0,)))
    scores = [torch.tensor([[0.0, 0.0], [nan, 0.0]]), torch.full((2, 2), nan), torch.tensor([[-1e9, 0.0], [0.0, -1.0]])]
    found = sums([one.double() for one in scores], of, "loss")
    assert (found.records, found.skipped) == (2, 1)
    unit = 2**BITS
    expected = [math.log(2) + MOST_LOSS, MOST_LOSS + math.log1p(math.exp(-1))]
    assert [total / unit for total in found.scores.tolist()] == pytest.approx(expected, abs=1e-5)
    assert sums([one.double() for one in scores], of, "correct").scores.tolist() == [1, 1]
    assert costs(found.scores, 2, "loss") == [total / 2 / unit for total in found.scores.tolist()]


def test_an_owner_counts_as_many_records_as_it_has(tmp_path: Path) -> None:
    """The mean over draws of the owners' weighted sum is the sum over all records, whatever part of them is drawn."""
    model, weights, of_owners = make_model(tmp_path / "model"), {}, []
    for name, number, label in (("ash", 12, 0), ("birch", 3, 1)):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"text": f"tree {i}", "label": LABELS[label]}) + "\n" for i in range(number)))
        folder = tmp_path / name
        folder.mkdir()
        client = LocalClient(name, folder, model, None, (file,), None, prompt="{text}", answer="{label}")
        drawn = records_of(client, LABELS, 16, 5, "0/0")
        weights[name] = drawn.weights
        scores = [torch.tensor([[0.0, -math.log(3), -1e9]]).double()] * len(drawn)
        of_owners.append(sums(scores, drawn, "loss"))
    assert weights == {"ash": [12] * 5, "birch": [5] * 3}, "of 12 records 5 are drawn, of 3 all: 12/5 and 1, times 5"
    total, weight = torch.stack([of.scores for of in of_owners]).sum(0), sum(of.weight for of in of_owners)
    expected = (12 * math.log(4 / 3) + 3 * math.log(4)) / 15
    assert costs(total, weight, "loss") == pytest.approx([expected], abs=1e-5)


# The subspace


def test_every_slice_of_the_subspace_is_made_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    points = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    base = torch.ones(2, 7)
    found = soft_prompts(points, base, 0.5, "0/0")
    signs_of = (soft_prompts(torch.eye(5), base, 1.0, "0/0") - base).view(5, -1)
    assert set(signs_of.unique().tolist()) == {-1.0, 1.0}
    torch.testing.assert_close(found, base + 0.5 * (points @ signs_of).view(3, 2, 7))
    assert not torch.equal(soft_prompts(points, base, 0.5, "0/1"), found)
    monkeypatch.setattr("fedgrove.stages.prompt.subspace.CHUNK", 20)
    torch.testing.assert_close(soft_prompts(points, base, 0.5, "0/0"), found, rtol=0, atol=0)


# Methods


def test_evolution_is_the_library_on_the_same_losses() -> None:
    """Bit for bit, and from the history alone."""
    for dimension, library in ((6, cmaes.CMA), (FULL + 1, cmaes.SepCMA)):
        task = Task("0/0", 6, 2, dimension)
        state, alone = evolution.begin(task), library(mean=np.zeros(dimension), sigma=1.0, seed=0, population_size=6)
        history = []
        for round_ in range(5):
            candidates = evolution.propose(state, round_)
            losses = [float((one - 1).square().sum()) for one in candidates]
            alone.reseed_rng(task.seed_of(round_))
            asked = [alone.ask().astype(np.float32).astype(np.float64) for _ in range(6)]
            alone.tell(list(zip(asked, losses, strict=True)))
            state = evolution.tell(state, round_, candidates, losses)
            history.append(losses)
            assert state.search.mean.tobytes() == alone.mean.tobytes()
        again = evolution.begin(task)
        for round_, losses in enumerate(history):
            again = evolution.tell(again, round_, evolution.propose(again, round_), losses)
        assert torch.equal(evolution.finalists(again), evolution.finalists(state))


def test_evolution_touches_no_global_random_numbers() -> None:
    before = str(np.random.get_state()), torch.get_rng_state()  # noqa: NPY002
    state = evolution.begin(Task("0/0", 4, 2, 3))
    evolution.tell(state, 0, evolution.propose(state, 0), [4.0, 3.0, 2.0, 1.0])
    assert str(np.random.get_state()) == before[0]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[1])


def test_what_is_shared_is_the_distribution_that_is_searched() -> None:
    """What the library keeps under these names is what it draws from."""
    for dimension in (3, FULL + 1):
        state = evolution.begin(Task("0/0", 8, 2, dimension))
        for round_ in range(3):
            candidates = evolution.propose(state, round_)
            state = evolution.tell(state, round_, candidates, [float(one.square().sum()) for one in candidates])
        shared = {name: one.numpy() for name, one in evolution.share(state).items()}
        state.search.reseed_rng(7)
        normal = np.random.RandomState(7).randn(dimension)
        root = np.sqrt(shared["spread"]) if dimension > FULL else None
        if root is None:
            values, vectors = np.linalg.eigh((shared["spread"] + shared["spread"].T) / 2)
            root = vectors @ np.diag(np.sqrt(values))
        moved = root * normal if root.ndim == 1 else root @ normal
        np.testing.assert_allclose(state.search.ask(), shared["mean"] + shared["step"] * moved, rtol=1e-6, atol=1e-9)


def test_the_server_of_fedbpt_follows_equation_6() -> None:
    """σ of the better half of the clients, with a floor that holds; "mean" is the mean by records."""
    task = Task("0/0", 5, 2, 3)
    shared = evolution.share(evolution.begin(task))
    means = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double()
    steps = torch.tensor([[0.9, 1.1], [5.0, 5.0], [1.0, 2.0], [7.0, 7.0]]).double()
    found = [
        Found({"mean": m, "steps": s}, n, c) for m, s, n, c in zip(means, steps, (1, 2, 3, 4), (0.1, 3, 0.2, 4), strict=True)
    ]
    local = evolution.merge(evolution.begin(task), "local", found)
    of_the_means = 2 * math.sqrt((0.9**2 + 1.1**2 + 1.0**2 + 2.0**2) / (2 * 5))
    by_hand = cmaes.CMA(mean=shared["mean"].numpy(), sigma=of_the_means, population_size=4, seed=0)
    by_hand.tell(list(zip(means.numpy(), [one.cost for one in found], strict=True)))
    np.testing.assert_allclose(local.search.mean, by_hand.mean, rtol=1e-6)
    np.testing.assert_allclose(local.search._C, by_hand._C, rtol=1e-6)
    assert float(evolution.share(local)["step"]) == pytest.approx(max(by_hand._sigma / of_the_means, evolution.SMALLEST))
    without_steps = [one._replace(tensors={**one.tensors, "steps": 0 * steps[0]}) for one in found]
    floored = evolution.merge(evolution.begin(task), "local", without_steps)
    at_the_floor = cmaes.CMA(mean=shared["mean"].numpy(), sigma=evolution.SMALLEST, population_size=4, seed=0)
    at_the_floor.tell(list(zip(means.numpy(), [one.cost for one in found], strict=True)))
    np.testing.assert_allclose(floored.search.mean, at_the_floor.mean, rtol=1e-6)
    grown = at_the_floor._sigma / evolution.SMALLEST
    assert float(evolution.share(floored)["step"]) == pytest.approx(max(grown, evolution.SMALLEST))
    narrow = evolution.begin(task)
    narrow.search._sigma = evolution.SMALLEST / 2
    assert float(evolution.share(evolution.merge(narrow, "local", found))["step"]) == evolution.SMALLEST
    mean = evolution.merge(evolution.begin(task), "mean", found)
    np.testing.assert_allclose(mean.search.mean, (means.T @ torch.tensor([0.1, 0.2, 0.3, 0.4]).double()).numpy())
    assert float(evolution.share(mean)["step"]) == pytest.approx(0.1 * 1.1 + 0.2 * 5 + 0.3 * 2 + 0.4 * 7)


@pytest.mark.parametrize("dimension", [8, 64])
@pytest.mark.parametrize("aggregation", ["local", "mean"])
def test_searching_alone_for_many_rounds_does_not_diverge(aggregation: str, dimension: int) -> None:
    """Four clients whose costs are the distances to points that are a little apart."""
    generator = torch.Generator().manual_seed(0)
    aims = torch.randn(dimension, generator=generator) + 0.3 * torch.randn(4, dimension, generator=generator)

    def costs(candidates: torch.Tensor, aim: torch.Tensor) -> list[float]:
        return [float((one - aim).square().mean()) for one in candidates]

    def from_all(mean: torch.Tensor) -> float:
        return statistics.mean(costs(mean[None], aim)[0] for aim in aims)

    state = evolution.begin(Task("0/0", 5, 2, dimension))
    for round_ in range(40):
        shared, found = evolution.share(state), []
        for number, aim in enumerate(aims):
            alone = Alone(f"0/0/{round_}/{number}", 5, 8, 1.0)
            tensors, reached = evolution.search(shared, alone, partial(costs, aim=aim))
            found.append(Found(tensors, 1, costs(reached, aim)[0]))
        state = evolution.merge(state, aggregation, found)
    mean = evolution.share(state)["mean"].float()
    assert from_all(mean) < from_all(torch.zeros(dimension))


def test_the_policy_gradient_is_unbiased_and_the_released_one_is_not() -> None:
    """10⁵ draws on three places of four words against the exact gradient."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, generator=generator).double()
    table = torch.rand(4, 4, 4, generator=generator).double()
    exact_logits = logits.clone().requires_grad_()
    p = exact_logits.softmax(1)
    torch.einsum("a,b,c,abc->", p[0], p[1], p[2], table).backward()
    draws = categories.draw(logits, 10**5, 1).view(-1, 10, 3)  # ten prompts a step
    losses = table[draws[..., 0], draws[..., 1], draws[..., 2]]
    steps = torch.stack([categories.gradient(logits, *one) for one in zip(draws, losses, strict=True)])
    error = steps.std(0) / len(steps) ** 0.5
    assert exact_logits.grad is not None
    assert ((steps.mean(0) - exact_logits.grad).abs() / error).max() < 4

    chances = logits.softmax(1)  # BDPL differentiates by p; its estimate, carried over to logits by the chain rule
    drawn = torch.nn.functional.one_hot(draws, 4).double()
    released = drawn / chances - (1 - drawn) / chances
    by_p = ((losses - losses.mean(1, keepdim=True))[..., None, None] * released).sum(1) / 9
    by_logits = chances * (by_p - (chances * by_p).sum(-1, keepdim=True))
    error = by_logits.std(0) / len(by_logits) ** 0.5
    assert ((by_logits.mean(0) - exact_logits.grad).abs() / error).max() > 20


def test_categories_come_to_the_words_that_cost_less() -> None:
    words = ((3,), (4, 5), (6,))
    state = categories.begin(Task("0/0", 10, 2, words=words, start=(9,)))
    for round_ in range(40):
        candidates = categories.propose(state, round_)
        costs = [float((row == 4).sum() == 0) + float((row == 6).sum()) for row in candidates]
        state = categories.tell(state, round_, candidates, costs)
    start, *_, last = categories.finalists(state).tolist()
    assert start[0] == 9
    assert 4 in last
    assert 6 not in last


# A whole stage


def same(one: Path, other: Path) -> None:
    """Two runs found the same prompt, and measured the same."""
    files = [file.name for file in (one / "prompt").iterdir()]
    for name in files:
        if name != "README.md":
            assert (one / "prompt" / name).read_bytes() == (other / "prompt" / name).read_bytes()
    assert measurements(one) == measurements(other)


@pytest.mark.parametrize(("stage", "owners", "changes"), [
    ({}, ("everybody",), {}),
    ({}, CLIENTS, {"privacy": {"secure_aggregation": True}}),
    (WORDY, ("everybody",), {}),
])  # fmt: skip
def test_the_prompt_of_any_number_of_owners_is_that_of_the_pooled_records(
    small: Small,
    files: Mapping[str, Path],
    tmp_path: Path,
    stage: dict[str, Any],
    owners: tuple[str, ...],
    changes: dict[str, Any],
) -> None:
    apart = small.undisturbed(**job(files, **stage))
    assert cli("run", small.job("pooled", **job(files, owners, **stage, **changes)), "--out", tmp_path / "run")[0] == 0
    same(apart, tmp_path / "run")
    found = measurements(apart)
    assert found[0, 3, None, "best"] <= found[0, 3, None, "mean"]
    about = json.loads((apart / "prompt.json").read_text())
    assert about["finalists"][about["best"]] == min(about["finalists"]) <= about["finalists"][0]
    sent = [
        line["bytes"] for line in lines(apart / "ledger.jsonl") if (line["kind"], line["direction"]) == ("prompt/score", "up")
    ]
    assert len(sent) == 4 * 3
    envelope = len(wire.pack({}, {})) + 2 * wire.PART_BYTES
    assert max(sent) < 8 * (10 + 3) + envelope, "a few numbers, however long the prompts"


def test_scores_that_were_computed_are_counted(small: Small, files: Mapping[str, Path]) -> None:
    """A candidate that was drawn twice is computed once."""
    run = small.undisturbed(**job(files, **WORDY))
    found = measurements(run)
    task = Task("0/0", 10, 2, words=tuple((one,) for one in range(3)))
    first = categories.propose(categories.begin(task), 0).unique(dim=0)
    assert len(first) < 10
    assert found[0, 0, None, "calls"] == len(first) * found[0, 0, None, "records"] == len(first) * NUMBER
    whole = small.undisturbed(**job(files))
    assert [measurements(whole)[0, r, None, "calls"] for r in range(4)] == [4 * NUMBER] * 3 + [3 * NUMBER]
    planned = json.loads((whole / "plan-0-prompt.json").read_text())["clients"]["ash"]
    assert planned["forwards"] == 3 * 4 * 50 + 4 * 50


@pytest.mark.parametrize(("stage", "moment"), [
    ({}, Moment("os.rename", "*/work/stage-0/scores-2.json", "cut")),
    (WORDY, Moment("os.rename", "*/run/prompt", "kill")),
    (LOCAL, Moment("os.rename", "*/work/stage-0/found-1.safetensors", "cut")),
])  # fmt: skip
def test_a_killed_run_goes_on_to_the_same_bits(
    small: Small, files: Mapping[str, Path], tmp_path: Path, moment: Moment, stage: dict[str, Any]
) -> None:
    changes = job(files, **stage)
    killed("run", small.job("killed-prompt", **changes), "--out", tmp_path / "run", "--quiet", moment=moment)
    assert cli("run", tmp_path / "run" / "job.toml", "--out", tmp_path / "run", "--resume")[0] == 0
    same(small.undisturbed(**changes), tmp_path / "run")


@pytest.mark.parametrize(("stage", "kind"), [
    ({"aggregation": "mean", "generations": 2, "rounds": 2, "labels": []}, "evolution"),
    ({**WORDY, "aggregation": "local", "generations": 2, "rounds": 1, "population": 3}, "categories"),
])  # fmt: skip
def test_clients_search_alone_and_the_server_combines(
    small: Small, files: Mapping[str, Path], stage: dict[str, Any], kind: str
) -> None:
    run = small.undisturbed(**job(files, **stage))
    found, about = measurements(run), json.loads((run / "prompt.json").read_text())
    assert about["method"] == kind
    assert all(found[0, 0, client, "cost"] > 0 for client in CLIENTS)
    measured = [found[0, None, None, f"{name}/test"] for name in ("no_prompt", "start_prompt", "found_prompt")]
    assert all(value > 1 for value in measured) == (not about["labels"]), "losses of free answers; how often labels are right"
    assert found[0, 0, None, "calls"] == NUMBER * (2 * about["population"] + 1)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert Disclosure.OWN_PROMPTS.sentence in page.replace("&#39;", "'")
    assert "every client searched alone" in page


def test_a_search_of_its_own_that_diverges_is_named(small: Small, files: Mapping[str, Path], tmp_path: Path) -> None:
    client = LocalClient("ash", tmp_path, small.model, None, (files["ash"],), None, prompt="{text}", answer=" {label}")
    request = SearchAlone(
        stage=0, aggregation="local", method="evolution", labels=LABELS, score="loss", place="end", length=16, records=2,
        seed="0/0", subspace=Subspace(dimension=3, scale=0.1, base=(1, 2)), population=4, generations=2, learning_rate=1.0,
        against_overfitting=0.0, tokens=2, words=0,
    )  # fmt: skip
    far = torch.full((3,), evolution.LARGEST).double()
    begin = {"mean": far, "spread": torch.eye(3).double(), "step": torch.tensor([evolution.LARGEST]).double()}
    with pytest.raises(FedgroveError, match="client 'ash': its own search for a prompt diverged") as caught:
        request.respond(begin, client, "cpu")
    assert "smaller spread" in str(caught.value.remedy)


def test_candidates_that_the_model_does_not_have_are_refused(small: Small, files: Mapping[str, Path], tmp_path: Path) -> None:
    client = LocalClient("ash", tmp_path, small.model, None, (files["ash"],), None, prompt="{text}", answer=" {label}")
    common = {
        "stage": 0, "aggregation": "pooled", "labels": LABELS, "score": "loss", "place": "end", "length": 16, "records": 2,
        "seed": "0/0",
    }  # fmt: skip
    soft = ScorePrompts(**common, method="evolution", candidates=2, subspace=Subspace(dimension=3, scale=0.1, base=(1, 2)))
    words = ScorePrompts(**common, method="categories", candidates=2)
    points, ids = torch.zeros(2, 3), torch.tensor([[1, 2], [3, -1]], dtype=torch.int32)
    assert len(soft.respond({"candidates": points}, client, "cpu").tensors["change/scores"]) == 2
    assert len(words.respond({"candidates": ids}, client, "cpu").tensors["change/scores"]) == 2
    for request, candidates in (
        (soft, None), (soft, points.double()), (soft, points[:, :2]), (soft, points[:1]), (soft, points + float("nan")),
        (soft, points + 1e9), (soft.model_copy(update={"subspace": Subspace(dimension=3, scale=0.1, base=(4096,))}), points),
        (words, points), (words, ids.long()), (words, ids + 4095), (words, ids - 5), (words, ids.flip(1)), (words, ids[0]),
        (words, torch.zeros(2, 600, dtype=torch.int32)),
    ):  # fmt: skip
        with pytest.raises(FedgroveError, match=r"client 'ash': .*; refused"):
            request.respond({} if candidates is None else {"candidates": candidates}, client, "cpu")


# Results


def test_peft_loads_a_prompt_in_front(small: Small, files: Mapping[str, Path], plain: Any) -> None:
    run = small.undisturbed(**job(files, place="front"))
    ids = torch.tensor([[3, 50, 7, 90]])
    soft = load_file(run / "prompt" / "adapter_model.safetensors")["prompt_embeddings"]
    with torch.no_grad():
        expected = plain(inputs_embeds=torch.cat([soft[None], plain.get_input_embeddings()(ids)], 1)).logits[:, len(soft) :]
        base = AutoModelForCausalLM.from_pretrained(small.model, dtype=torch.float32)
        found = PeftModel.from_pretrained(base, run / "prompt").eval()(input_ids=ids).logits
    torch.testing.assert_close(found[:, -4:], expected, rtol=0, atol=1e-5)
    assert float((found[:, -1] - plain(ids).logits[:, -1]).abs().max()) > 1e-2


def test_a_prompt_at_the_end_is_loaded_in_one_call(small: Small, files: Mapping[str, Path], plain: Any) -> None:
    """And plain transformers score labels after it as the run did."""
    run = small.undisturbed(**job(files))
    tokenizer, of = AutoTokenizer.from_pretrained(small.model), records(small, files, who="test")
    soft = load_file(run / "prompt" / "prompt.safetensors")["prompt"]
    expected = score(Decoder(Checkpoint(small.model)), of, [Prompt(soft, written=False)], "end")
    for line, scores in zip(lines(files["test"]), expected, strict=True):
        inputs = with_prompt(plain, tokenizer, run / "prompt", line["text"])
        for option, log_p in zip(of.labels, scores[0].tolist(), strict=True):
            ids = torch.tensor(option)
            whole = torch.cat([inputs["inputs_embeds"], plain.get_input_embeddings()(ids)[None]], 1)
            with torch.no_grad():
                logits = plain(inputs_embeds=whole).logits[0, -len(ids) - 1 : -1].log_softmax(-1)
            assert float(logits.gather(1, ids[:, None]).sum()) == pytest.approx(log_p, abs=1e-5)
    assert (run / "model" / "model.safetensors").read_bytes() == (small.model / "model.safetensors").read_bytes()


def test_words_are_a_line_of_text(small: Small, files: Mapping[str, Path]) -> None:
    run = small.undisturbed(**job(files, **WORDY))
    about = json.loads((run / "prompt" / "prompt.json").read_text())
    text = (run / "prompt" / "prompt.txt").read_text()
    assert about["text"] == text == AutoTokenizer.from_pretrained(small.model).decode(about["ids"])
    assert about["exact"]
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    assert f"The prompt: “{text}”" in page.text
    (name, number, *measured) = page.csv("stage-0-prompt")[1]
    found = measurements(run)
    assert (name, number) == ("test", "6")
    names = ("no_prompt/test", "start_prompt/test", "found_prompt/test")
    assert [float(value) for value in measured] == [found[0, None, None, one] for one in names]
    assert len(page.csv("stage-0-rounds")) == 1 + 4


# Mistakes


def test_a_file_of_words_that_cannot_be_read_is_named(small: Small, files: Mapping[str, Path], tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_bytes(b"caf\xe9\n")
    line = complaint("plan", small.job("words", **job(files, **WORDY, words=str(words))))
    assert line == f"{words}: not UTF-8 text (byte 3); convert it"
    line = complaint("plan", small.job("words", **job(files, **WORDY, words=str(tmp_path))))
    assert f"stages.0.words: {tmp_path} cannot be read" in line
    words.write_bytes(b"\xef\xbb\xbftree\nriver\n")
    config = load(small.job("words", **job(files, **WORDY, words=str(words)))).stages[0]
    assert isinstance(config, Config)
    tokenizer = Checkpoint(small.model).tokenizer()
    assert task_of(config, 0, tokenizer, "0/0").words == tuple(tuple(encode(word, tokenizer)) for word in (" tree", " river"))


@pytest.mark.parametrize(("stage", "says"), [
    ({"population": 1}, 'population: 1 is too small to compare; method = "evolution" needs 4 or more'),
    ({**WORDY, "population": 1}, 'population: 1 is too small to compare; method = "categories" needs 2 or more'),
    ({"population": 5000}, "population"),
    ({"tokens": 60}, "stages.0.tokens: a prompt of 60 tokens and records of 16 (length) are more than the 64"),
    ({"tokens": 2}, "stages.0.start: it has 3 tokens, but a prompt has 2 at most; shorten it, or raise tokens"),
    ({"labels": [" bird", " bird"]}, "labels: ' bird' is there twice"),
    ({"labels": [" bird", " bird of"]}, "stages.0.labels: label ' bird' begins label ' bird of'"),
    ({"labels": ["bird", "fish", "tree"]}, "the answer ' bird' is none of the labels; write the label 'bird' exactly so"),
    ({"labels": [" bird", " fish"]}, "the answer ' tree' is none of the labels; add it to labels"),
    ({"labels": [" bird"]}, "labels: one label is always right"),
    ({"labels": [], "score": "correct"}, 'score: "correct" counts right labels'),
    ({"choices": 3}, 'choices: method = "evolution" does not use it; remove it'),
    ({**WORDY, "aggregation": "mean"}, 'aggregation: method = "categories" has "pooled" or "local"'),
    ({"generations": 3}, 'belong to aggregation = "local"'),
    ({"aggregation": "local", "privacy": {"secure_aggregation": True}}, "stages.0.aggregation: what clients find alone is no"),
])  # fmt: skip
def test_what_does_not_fit_is_one_line(
    small: Small, files: Mapping[str, Path], tmp_path: Path, stage: dict[str, Any], says: str
) -> None:
    assert says in complaint("run", small.job("wrong-prompt", **job(files, **stage)), "--out", tmp_path / "run")


def test_a_client_without_records_is_named(small: Small, files: Mapping[str, Path], tmp_path: Path) -> None:
    empty = _write(tmp_path / "empty.jsonl", [])
    line = complaint("run", small.job("no-record", **job({**files, "birch": empty})), "--out", tmp_path / "run")
    assert line.startswith("client 'birch': ")
    changes = job(files)
    del changes["clients"][1]["prompt"], changes["clients"][1]["answer"]
    line = complaint("run", small.job("no-answers", **changes), "--out", tmp_path / "run")
    assert "client 'birch' has no answers; give prompt and answer" in line


def test_losses_that_are_never_finite_end_a_run_after_three_rounds(
    small: Small, files: Mapping[str, Path], tmp_path: Path
) -> None:
    """A model whose weights are finite, and its logits are not."""
    broken = make_model(tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"].fill_(3e38)
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    changes = job(files, rounds=5, model__path=str(broken), evaluate__data=[])
    line = complaint("run", small.job("broken", **changes), "--out", tmp_path / "run")
    assert "in 3 rounds in a row no record's loss was finite under any prompt" in line
    skipped = [one for one in lines(tmp_path / "run" / "metrics.jsonl") if one["name"] == "skipped"]
    assert [one["value"] for one in skipped] == [NUMBER] * 3


def test_without_the_library_the_remedy_is_said(
    small: Small, files: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cmaes", None)
    line = complaint("plan", small.job("no-library", **job(files)))
    assert line == 'method = "evolution" needs cmaes: pip install "fedgrove[prompt]"'
