"""What a small model's confidence is worth, and that private records stay with it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedgrove import api
from fedgrove.evaluation.examiner import Examiner
from fedgrove.evaluation.routing import routing
from fedgrove.report.routing import verdict
from fedgrove.route import route
from small import cli, complaint, make_model

LABELS = [" ash", " birch", " cedar"]
TEMPLATES = {"prompt": "{text} is", "answer": " {tree}"}
OPTIONS = ["--prompt", TEMPLATES["prompt"], "--answer", TEMPLATES["answer"], "--length", 32]
RECORDS = 24


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return make_model(folder / "small", seed=1), make_model(folder / "large", seed=2)


def records(file: Path, word: str) -> Path:
    rows = [{"text": f"{word} number {i}", "tree": LABELS[i % 3].strip()} for i in range(RECORDS)]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return file


def drawn(number: int) -> tuple[list[float], list[bool], list[bool]]:
    rng = np.random.default_rng(3)
    confidence = rng.integers(0, 12, number) / 12  # with ties
    small = rng.random(number) < 0.3 + 0.5 * confidence
    return confidence.tolist(), small.tolist(), (rng.random(number) < 0.8).tolist()


def test_auroc_counts_pairs_of_a_wrong_and_a_right_answer() -> None:
    confidence, small, large = drawn(90)
    pairs = [(c, d) for c, right in zip(confidence, small, strict=True) if not right
             for d, also in zip(confidence, small, strict=True) if also]  # fmt: skip
    by_pairs = sum((c < d) + (c == d) / 2 for c, d in pairs) / len(pairs)
    found = routing(confidence, small, large).auroc
    assert found is not None
    assert found.value == pytest.approx(by_pairs, abs=1e-12)
    assert found.low is not None
    assert found.high is not None
    assert 0.5 < found.low < found.value < found.high < 1
    constant = routing([0.4] * 90, small, large).auroc
    assert constant is not None
    assert (constant.value, constant.low, constant.high) == (0.5, 0.5, 0.5)
    assert routing(confidence, [True] * 90, large).auroc is None


def test_the_least_confident_records_are_the_large_models() -> None:
    confidence, small, large = drawn(100)
    found = routing(confidence, small, large, [0.25, 1.0])
    order = sorted(range(100), key=lambda i: confidence[i])
    together = [large[i] if i in order[:25] else small[i] for i in range(100)]
    quarter, everything = found.points
    assert quarter.accuracy.value == pytest.approx(sum(together) / 100)
    assert quarter.below == confidence[order[25]]
    assert quarter.random == pytest.approx(0.75 * sum(small) / 100 + 0.25 * sum(large) / 100)
    assert quarter.more.value == pytest.approx(quarter.accuracy.value - quarter.random)
    assert everything.accuracy.value == pytest.approx(found.large.value) == pytest.approx(sum(large) / 100)
    assert everything.more.value == pytest.approx(0)
    assert everything.below is None
    assert found == routing(confidence, small, large, [1.0, 0.25]), "the same draws every time"


def test_an_interval_of_the_gain_covers_what_other_records_of_the_kind_give() -> None:
    found = routing(*drawn(400), [0.3])
    [point] = found.points
    [many] = routing(*drawn(40_000), [0.3]).points
    assert point.more.low is not None
    assert point.more.high is not None
    assert 0 < point.more.low < many.more.value < point.more.high


def test_private_records_count_but_are_not_escalated() -> None:
    confidence, small, large = drawn(100)
    found = routing(confidence, small, large[:40], [0.2, 0.9])
    least = sorted(range(40), key=lambda i: confidence[i])[:20]
    together = [large[i] if i in least else small[i] for i in range(100)]
    assert [point.share for point in found.points] == [0.2, 0.4], "no more than may be"
    assert found.points[0].accuracy.value == pytest.approx(sum(together) / 100)
    assert found.points[1].accuracy.value == pytest.approx((sum(large[:40]) + sum(small[40:])) / 100)
    assert (found.records, found.private) == (100, 60)


def test_the_verdict_says_when_not_to_route() -> None:
    confidence, small, large = drawn(400)
    assert "is less confident where it is wrong" in verdict(routing(confidence, small, large))[1]
    assert "does not tell where it is wrong" in verdict(routing([0.4] * 400, small, large))[1]
    assert "is more confident where it is wrong" in verdict(routing([-c for c in confidence], small, large))[1]
    assert "cannot be judged" in verdict(routing(confidence, [True] * 400, large))[1]


def test_two_models_answer_and_the_large_one_sees_no_private_record(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def spy(self: Examiner, pairs: Sequence[tuple[str, str]], *more: Any) -> Any:
        seen.append([prompt for prompt, _ in pairs])
        return choices(self, pairs, *more)

    choices = Examiner.choices
    monkeypatch.setattr(Examiner, "choices", spy)
    public, private = records(tmp_path / "public.jsonl", "river"), records(tmp_path / "private.jsonl", "meadow")
    found = route(*models, [public], **TEMPLATES, private=[private], labels=LABELS, length=32)
    assert [len(prompts) for prompts in seen] == [2 * RECORDS, RECORDS]
    assert not any("meadow" in prompt for prompt in seen[1])
    monkeypatch.undo()
    both = {"measure": "accuracy", **TEMPLATES, "labels": LABELS, "length": 32, "quiet": True}
    alone = api.evaluate(models[1], public, **both)  # type: ignore[arg-type]
    assert found.large.plain("accuracy").items() <= alone[str(public)].items()
    ours = api.evaluate(models[0], [public, private], **both)  # type: ignore[arg-type]
    assert found.small.value == pytest.approx(sum(of["accuracy"] for of in ours.values()) / 2)


def test_the_command_shows_a_table_and_json(models: tuple[Path, Path], tmp_path: Path) -> None:
    public = records(tmp_path / "public.jsonl", "river")
    status, out, _ = cli("route", *models, "--data", public, *OPTIONS, "--share", 0.25, "--quiet")
    assert status == 0
    assert "Accuracy on 24 records" in out
    assert "The large model alone, on all records" in out
    status, out, _ = cli("route", *models, "--data", public, *OPTIONS, "--share", 0.25, "--quiet", "--json")
    found = json.loads(out)
    assert found["escalated"][0]["share"] == 0.25
    assert 0 <= found["small.low"] <= found["small"] <= found["small.high"] <= 1


def test_mistakes_are_one_line(models: tuple[Path, Path], tmp_path: Path) -> None:
    public = records(tmp_path / "public.jsonl", "river")
    asked = ["--data", public, *OPTIONS, "--quiet"]
    assert "are the same model; name two models" in complaint("route", models[0], models[0], *asked)
    assert "--share 1.5: give a fraction above 0" in complaint("route", *models, *asked, "--share", 1.5)
    assert "every answer is ' ash', so there is nothing to choose" in complaint("route", *models, *asked, "--records", 1)
    assert "nowhere" in complaint("route", tmp_path / "nowhere", models[1], *asked)
    assert "' cedar' is none of the labels" in complaint("route", *models, *asked, "--label", " ash", "--label", " birch")
    assert "no field 'animal'" in complaint("route", *models, "--data", public, "--prompt", "{animal}", "--answer", "{tree}")
