"""Noise on Wanda's statistics: as much as the promise needs, once, and never without the rest of what it rests on."""

from __future__ import annotations

import html
import json
from pathlib import Path

import pytest

from fedgrove.privacy import release
from small import Small, cli, complaint, lines
from test_statistics import prune

NOISY = {"pruner": "wanda", "epsilon": 8.0, "delta": 1e-5}
SECURE = {"secure_aggregation": True}


def test_a_job_with_noise_says_what_it_promises(small: Small, tmp_path: Path) -> None:
    spec = {f"stages__0__{key}": value for key, value in {**NOISY, "aggregation": "pooled"}.items()}
    job = small.job("noisy", evaluate={}, privacy=SECURE, **spec)
    status, out, _ = cli("plan", job)
    assert status == 0
    assert "(8, 1e-05)-differential privacy of one window of 16 tokens" in " ".join(out.split())
    assert "at least 2 clients" in " ".join(out.split())
    runs = []
    for name in ("one", "two"):
        assert cli("run", job, "--out", tmp_path / name, "--quiet")[0] == 0
        runs.append(json.loads((tmp_path / name / "pruning.json").read_text())["tensors"])
        notes = json.loads((tmp_path / name / "plan-0-prune.json").read_text())["notes"]
        assert notes[:-1] == [release.statistics_statement(8.0, 1e-5, 16, 2)]
        assert notes[0] in html.unescape((tmp_path / name / "report.html").read_text())
    for one, two in zip(*runs, strict=True):
        assert one["sha256"] != two["sha256"]  # the noise is nobody's to repeat
        assert one["pruned"] == two["pruned"]
    assert not any("epsilon" in json.dumps(line) for line in lines(tmp_path / "one" / "ledger.jsonl"))


def test_little_noise_leaves_the_result_almost_as_it_was(small: Small, tmp_path: Path) -> None:
    text = " ".join(path.read_text() for path in small.texts.values()).split()
    texts = {name: [" ".join(text[200 * i : 200 * i + 200])] for i, name in enumerate(("ash", "birch", "cedar"))}
    plain = prune(small, tmp_path / "plain", texts, pruner="wanda")
    noisy = prune(small, tmp_path / "noisy", texts, privacy=SECURE, pruner="wanda", epsilon=50.0, delta=0.05)
    assert plain.keys() == noisy.keys()
    assert [row[1:] for row in plain.values()] == [row[1:] for row in noisy.values()]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"privacy": {}}, "epsilon: the noise protects only the sum"),
        ({"stages__0__pruner": "sparsegpt"}, 'epsilon: noise is possible only for pruner "wanda"'),
        ({"stages__0__source": "sequential"}, 'epsilon: noise is possible only for pruner "wanda"'),
        ({"stages__0__aggregation": "fedspallm"}, 'epsilon belongs to aggregation = "pooled"'),
        ({"stages__0__epsilon": 0.0}, "stages.0.epsilon"),
    ],
)
def test_no_promise_is_made_where_none_holds(small: Small, changes: dict[str, object], says: str) -> None:
    spec = {"stages__0__aggregation": "pooled", "stages__0__epsilon": 1.0, "privacy": SECURE, "evaluate": {}, **changes}
    assert says in complaint("plan", small.job("refused", **spec))
