"""What a model is worth besides perplexity, and how sure one may be of it."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import tomli_w
from sacrebleu.metrics.bleu import BLEU
from transformers import PreTrainedTokenizerBase

from fedgrove.errors import FedgroveError
from fedgrove.evaluation.metrics import Measured, bootstrap, interval, mean, resampled
from fedgrove.evaluation.metrics.accuracy import accuracy
from fedgrove.evaluation.metrics.generation import Written, compare, write
from fedgrove.evaluation.metrics.harness import harness
from fedgrove.models.blocks import Decoder
from fedgrove.models.labels import score_labels
from fedgrove.models.stream import Checkpoint
from small import Small, cli, complaint, forked_jobs, lines, measurements
from test_report import Page

PROMPTS = ["The river is", "A small tree", "He said that", "Once upon a", "In the garden", "She had no"]
LABELS = [" deep", " green", " old"]


@pytest.fixture(scope="module")
def tokenizer(grove: Path) -> PreTrainedTokenizerBase:
    return Checkpoint(grove).tokenizer()


@pytest.fixture(scope="module")
def model(grove: Path):  # type: ignore[no-untyped-def]
    return Decoder(Checkpoint(grove)).load_all()


def test_an_interval_is_that_of_the_textbook() -> None:
    values = [float(i % 7) for i in range(700)]
    found = mean(values)
    error = math.sqrt(sum((value - 3.0) ** 2 for value in values) / 700 / 700)
    assert found.value == 3.0
    assert found.low == pytest.approx(3.0 - 1.96 * error, abs=0.3 * error)
    assert found.high == pytest.approx(3.0 + 1.96 * error, abs=0.3 * error)
    assert mean(values) == found, "the same draw every time"
    assert mean([1.0, 1.0, 1.0]) == Measured(1.0, 1.0, 1.0)
    assert mean([2.0]) == Measured(2.0), "of one example nothing can be drawn again"


def test_an_interval_of_a_ratio_weighs_examples_by_their_size() -> None:
    parts = [(10.0, 10.0), (0.0, 1.0)] * 50
    assert bootstrap(parts, lambda sums: sums[0] / sums[1]).value == pytest.approx(10 / 11)


def test_accuracy_counts_the_label_that_the_model_finds_likeliest(model, tokenizer: PreTrainedTokenizerBase) -> None:  # type: ignore[no-untyped-def]
    likeliest = [LABELS[int(row.argmax())] for row in score_labels(model, tokenizer, PROMPTS, LABELS)]
    right = list(zip(PROMPTS, likeliest, strict=True))
    assert accuracy(model, tokenizer, right, LABELS)["accuracy"] == Measured(1.0, 1.0, 1.0)
    wrong = [(prompt, LABELS[(LABELS.index(label) + (i % 2)) % 3]) for i, (prompt, label) in enumerate(right)]
    half = accuracy(model, tokenizer, wrong, LABELS)
    assert half["accuracy"].value == 0.5
    assert 0 <= half["accuracy"].low < 0.5 < half["accuracy"].high <= 1  # type: ignore[operator]
    frequent = max(sum(answer == label for _, answer in wrong) for label in LABELS)
    assert half["majority"].value == frequent / len(wrong)
    with pytest.raises(FedgroveError, match="' blue' is none of the labels"):
        accuracy(model, tokenizer, [("The sky is", " blue")], LABELS)


def test_what_a_model_writes_is_compared_with_all_references(model, tokenizer: PreTrainedTokenizerBase) -> None:  # type: ignore[no-untyped-def]
    pairs = [(prompt, "nothing alike") for prompt in PROMPTS]
    written = write(model, tokenizer, pairs, tokens=12)
    assert [one.prompt for one in written] == PROMPTS
    assert all("\n" not in one.output for one in written)
    again = [Written(one.prompt, one.output, ("nothing alike", one.output)) for one in written if len(one.output.split()) >= 4]
    assert len(again) >= 3
    best = compare(again)
    assert best["rougeL"].value == pytest.approx(1.0)
    assert best["bleu"].value == pytest.approx(1.0)
    both = write(model, tokenizer, [(PROMPTS[0], "one"), (PROMPTS[0], "two")], tokens=4)
    assert [one.references for one in both] == [("one", "two")], "records with the same prompt are one"


def test_bleu_is_that_of_the_corpus() -> None:
    said = ["the cat sat on the mat today", "a dog ran over the green hill", "birds sing in the old tree"]
    meant = ["the cat sat on a mat today", "the dog ran over a green hill", "birds sing in an old tree"]
    written = [Written(str(i), output, (reference,)) for i, (output, reference) in enumerate(zip(said, meant, strict=True))]
    found = compare(written)["bleu"]
    assert found.value == pytest.approx(BLEU().corpus_score(said, [meant]).score / 100)
    assert found.low is not None
    assert found.low <= found.value <= (found.high or 0)


TASK = """
task: ash_or_birch
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: [" ash", " birch"]
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def test_tasks_of_local_files_are_those_of_the_harness(grove: Path, tmp_path: Path, model, tokenizer) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("lm_eval")
    questions = [f"{prompt} than the" for prompt in PROMPTS]
    (tmp_path / "data.jsonl").write_text(
        "".join(json.dumps({"question": question, "answer": i % 2}) + "\n" for i, question in enumerate(questions))
    )
    (tmp_path / "ash.yaml").write_text(TASK.format(file=tmp_path / "data.jsonl"))
    found = harness(grove, ["ash_or_birch"], tmp_path, dtype="float32")
    likeliest = score_labels(model, tokenizer, questions, [" ash", " birch"]).argmax(1).tolist()
    expected = sum(answer == i % 2 for i, answer in enumerate(likeliest)) / len(questions)
    assert found["ash_or_birch"]["acc"].value == pytest.approx(expected)
    assert found["ash_or_birch"]["acc"].low is not None
    with pytest.raises(FedgroveError, match="task 'oak'"):
        harness(grove, ["oak"], tmp_path)


def test_what_is_not_installed_is_one_line(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert 'pip install "fedgrove[lm-eval]"' in complaint("evaluate", small.model, "--task", "arc_easy")
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(FedgroveError, match=r'pip install "fedgrove\[evaluate\]"'):
        compare([Written("a", "b", ("c",))])


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    file = tmp_path / "questions.jsonl"
    rows = [{"q": prompt, "a": ("ash", "birch")[i % 2]} for i, prompt in enumerate(PROMPTS)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_what_is_hard_for_both_models_cancels_in_their_difference() -> None:
    hard = [float(i % 7) for i in range(100)]
    before, after = ([(value + own, 1.0) for value in hard] for own in (0.0, 0.1))
    drawn = resampled([{"before": before, "after": after}])
    low, high = interval(drawn["after"] - drawn["before"])
    assert low == pytest.approx(0.1)
    assert high == pytest.approx(0.1)
    alone = interval(drawn["before"])
    assert alone[1] - alone[0] > 0.5
    assert alone == pytest.approx((mean(hard).low, mean(hard).high)), "one model by itself: the bootstrap"
    several = resampled([{"before": before}, {"before": [(1.0, 2.0), (1.0, 2.0)]}])["before"]
    assert several.mean() == pytest.approx((sum(hard) / 100 + 0.5) / 2, abs=0.1), "the mean over texts"


def test_a_job_measures_answers_and_speed_before_and_after(
    small: Small, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", forked_jobs())
    asked = {"path": str(questions), "prompt": "{q}", "answer": " {a}"}
    data = [
        str(small.texts["held-0"]),
        {"name": "trees", "measure": "accuracy", **asked},
        {"name": "words", "measure": "generation", **asked},
    ]
    spec = small.spec(evaluate={"data": data, "length": 32, "windows": 4, "records": 4, "tokens": 4, "speed": True})
    job, run = tmp_path / "job.toml", tmp_path / "run"
    job.write_text(tomli_w.dumps(spec))
    status, _, err = cli("run", job, "--out", run, "--quiet")
    assert status == 0, err
    found = measurements(run)
    for stage in (None, 0):
        assert 0 <= found[stage, None, None, "accuracy/trees"] <= 1
        assert found[stage, None, None, "majority/trees"] == 0.5, "of the first four records"
        assert 0 <= found[stage, None, None, "rougeL/words"] <= 1
        low, value, high = (found[stage, None, None, f"decode{end}/speed"] for end in (".low", "", ".high"))
        assert 0 < low <= value <= high
        folder = small.model if stage is None else run / "model"
        assert found[stage, None, None, "disk/speed"] == sum(file.stat().st_size for file in folder.iterdir())
        assert found[stage, None, None, "memory/speed"] > (folder / "model.safetensors").stat().st_size / 2
        low, value, high = (found[stage, None, None, f"perplexity{end}/held-0"] for end in (".low", "", ".high"))
        assert low < value < high
    kept = {(line["stage"], line["name"]): line["parts"] for line in lines(run / "examples.jsonl")}
    for stage in (None, 0):
        for name, number in (("perplexity/held-0", 4), ("accuracy/trees", 4), ("rougeL/words", 4)):
            parts = kept[stage, name]
            assert len(parts) == number
            ratio = sum(total for total, _ in parts) / sum(count for _, count in parts)
            assert found[stage, None, None, name] == pytest.approx(math.exp(ratio) if "perp" in name else ratio)
    _head, *rows = Page((run / "report.html").read_text()).csv("measures")
    shown = {row[0]: row[1] for row in rows}
    assert {"trees: accuracy", "words: rouge1", "words: rougeL", "words: bleu", "speed: prefill", "speed: decode",
            "speed: disk", "speed: memory"} <= shown.keys()  # fmt: skip
    assert float(shown["speed: disk"]) == found[None, None, None, "disk/speed"]
    assert cli("run", job, "--out", run, "--resume", "--quiet")[0] == 0
    assert measurements(run) == found, "what was measured is not measured again"


def test_evaluate_says_how_sure_it_is(small: Small, questions: Path) -> None:
    status, out, _ = cli("evaluate", small.model, "--data", questions, "--measure", "accuracy", "--prompt", "{q}", "--answer",
                         " {a}", "--quiet")  # fmt: skip
    assert status == 0
    assert "6 records" in out
    assert " to " in out
    _, out, _ = cli("evaluate", small.model, "--data", small.texts["held-0"], "--length", 32, "--json", "--quiet")
    told = json.loads(out)["texts"][str(small.texts["held-0"])]
    assert told["perplexity.low"] < told["perplexity"] < told["perplexity.high"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "nothing to measure: give --data, --speed or --task"),
        (("--data", "x.jsonl", "--measure", "accuracy"), "--prompt"),
    ],
)
def test_an_evaluation_that_cannot_be_is_named(small: Small, args: tuple[object, ...], words: str) -> None:
    assert words in complaint("evaluate", small.model, *args)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ({"measure": "accuracy"}, 'measure "accuracy": give prompt and answer'),
        ({"prompt": "{q}"}, 'prompt and answer belong to measure = "accuracy"'),
        ({"labels": ["a"]}, 'labels belong to measure = "accuracy"'),
        ({"measure": "generation", "prompt": "{q}", "answer": "{a}", "text": "{q}"}, 'measure "generation" has no text'),
    ],
)
def test_a_text_of_a_job_that_cannot_be_measured_is_named(small: Small, text: dict[str, object], words: str) -> None:
    data = [{"name": "trees", "path": str(small.texts["held-0"]), **text}]
    assert words in complaint("plan", small.job("bad", evaluate={"data": data}))
