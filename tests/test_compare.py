"""Runs side by side: the numbers are the run folders', and only what was measured alike is compared."""

from __future__ import annotations

import json
import math
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from fedgrove.errors import FedgroveError
from fedgrove.report.compare import names, shared_texts, write_comparison
from fedgrove.report.reader import read
from fedgrove.report.summary import geometric_mean
from small import cli, complaint
from test_report import Page, make_run


def set_keys(run: Path, **changes: Any) -> None:
    job = tomllib.loads((run / "job.toml").read_text())
    for key, value in changes.items():
        place: Any = job
        *path, last = (int(step) if step.isdigit() else step for step in key.split("__"))
        for step in path:
            place = place[step]
        place[last] = value
    (run / "job.toml").write_text(tomli_w.dumps(job))


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    first = make_run(tmp_path / "first")
    second = Path(shutil.copytree(first, tmp_path / "second"))
    set_keys(second, stages__0__sparsity=0.7, stages__0__aggregation="fedavg", clients__1__memory=1000)
    lines = [json.loads(line) for line in (second / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["value"] *= 1 if line["stage"] is None else 1.25
        line["time"] += 90 if line["stage"] == 0 else 0
    (second / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [first, second]


def test_the_numbers_are_those_of_the_runs(runs: list[Path], tmp_path: Path) -> None:
    found = write_comparison(runs, tmp_path / "compare.html")
    page = Page((tmp_path / "compare.html").read_text())
    first, second = map(read, runs)
    head, *rows = page.csv("quality")
    assert head == ["held-out text", "dense", "first", "second"]
    for row in rows[:2]:
        assert [float(value) for value in row[1:]] == [of[row[0]] for of in (first.dense, first.federated, second.federated)]
    assert float(rows[2][3]) == geometric_mean(list(second.federated.values()))
    head, *rows = page.csv("cost")
    costs = [dict(zip(head, row, strict=True)) for row in rows]
    for cost, run in zip(costs, (first, second), strict=True):
        assert int(cost["sent by all"]) == sum(run.uplink.values())
        assert int(cost["model"]) == run.model_bytes
        assert float(cost["zeros"]) == 0.5
    assert [float(cost["time"]) for cost in costs] == [0.0, 90.0]
    assert "first has the lowest perplexity" in page.text
    assert "fewest bytes" not in page.text, "both sent the same"
    assert "+25.0%" in page.text
    assert list(found) == ["first", "second"]


def test_which_is_better_is_left_open_where_other_windows_could_undo_it(runs: list[Path], tmp_path: Path) -> None:
    def says() -> str:
        write_comparison(runs, tmp_path / "compare.html")
        return Page((tmp_path / "compare.html").read_text()).text

    examples = [json.loads(line) for line in (runs[1] / "examples.jsonl").read_text().splitlines()]
    for factor, words in ((1.25, "(+25.0%, 95 %: +25.0% to +25.0%)."), (None, ": no clear difference.")):
        for line in examples:
            if line["stage"] == 0 and factor:
                line["parts"] = [[loss + n * math.log(factor), n] for loss, n in line["parts"]]
            elif line["stage"] == 0:
                line["parts"] = [[loss + (-1) ** i * 60, n] for i, (loss, n) in enumerate(line["parts"])]
        (runs[1] / "examples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in examples))
        assert words in says()


def test_only_settings_that_differ_are_shown(runs: list[Path], tmp_path: Path) -> None:
    write_comparison(runs, tmp_path / "compare.html")
    _, *rows = Page((tmp_path / "compare.html").read_text()).csv("settings")
    assert sorted(rows) == [
        ["clients.1.memory", "", "1000"],
        ["stages.0.aggregation", "fedspallm", "fedavg"],
        ["stages.0.sparsity", "0.5", "0.7"],
    ]
    same = [runs[0], Path(shutil.copytree(runs[0], tmp_path / "same"))]
    write_comparison(same, tmp_path / "same.html")
    assert "the jobs are the same" in Page((tmp_path / "same.html").read_text()).text


def test_a_text_that_was_measured_otherwise_is_not_compared(runs: list[Path], tmp_path: Path) -> None:
    set_keys(runs[1], evaluate__data__0__path="/home/bob/other.txt")
    assert shared_texts({run.name: read(run) for run in runs}) == ["law"]
    write_comparison(runs, tmp_path / "compare.html")
    page = Page((tmp_path / "compare.html").read_text())
    assert "Left out because not every run measured them in the same way: ward" in page.text
    assert [row[0] for row in page.csv("quality")] == ["held-out text", "law", "geometric mean"]
    set_keys(runs[1], evaluate__length=32)
    write_comparison(runs, tmp_path / "compare.html")
    page = Page((tmp_path / "compare.html").read_text())
    assert "it is unknown which model is better" in page.text
    assert "nan" not in page.text


def test_runs_of_different_models_show_each_dense_model(runs: list[Path], tmp_path: Path) -> None:
    lines = (runs[1] / "metrics.jsonl").read_text().replace('"stage": null', '"stage": null, "x": 0')
    dense = [json.loads(line) for line in lines.splitlines()]
    for line in dense:
        line["value"] += 1
    (runs[1] / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in dense))
    write_comparison(runs, tmp_path / "compare.html")
    head = Page((tmp_path / "compare.html").read_text()).csv("quality")[0]
    assert head == ["held-out text", "first: dense", "first", "second: dense", "second"]


def test_the_page_asks_nothing_of_a_network_and_tells_no_folder(runs: list[Path], tmp_path: Path) -> None:
    write_comparison(runs, tmp_path / "compare.html")
    text = (tmp_path / "compare.html").read_text()
    page = Page(text)
    assert "default-src 'none'" in text
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "img", "iframe")]
    assert all(link.startswith("data:text/csv") for link in page.attributes("href"))
    assert "alice" not in text
    assert str(tmp_path) not in text
    tags = [tag for tag, _ in page.tags]
    assert tags.count("caption") == tags.count("table") == 3


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    assert names([tmp_path / "a" / "run", tmp_path / "b" / "run"]) == ["a/run", "b/run"]
    assert names([tmp_path / "x", tmp_path / "y"]) == ["x", "y"]


def test_the_command_prints_a_table_and_names_mistakes(runs: list[Path], tmp_path: Path) -> None:
    status, out, _ = cli("report", *runs, "--out", tmp_path / "c.html")
    assert status == 0
    assert "first" in out
    assert f"{geometric_mean(list(read(runs[1]).federated.values())):.1f}" in out
    assert (tmp_path / "c.html").is_file()
    assert "given twice" in complaint("report", runs[0], runs[0])
    assert "no run folder" in complaint("report", runs[0], tmp_path)
    with pytest.raises(FedgroveError, match="no run folder"):
        write_comparison([runs[0], tmp_path], tmp_path / "none.html")
    assert not list(tmp_path.glob("none*"))
