"""A kind of stage tells the report what it is in its own folder; the report itself knows no kind and no method."""

from __future__ import annotations

import ast
import io
import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from rich.console import Console, RenderableType

import fedgrove.report
import fedgrove.stages
from fedgrove import plugins
from fedgrove.errors import FedgroveError
from fedgrove.report.model_card import card
from fedgrove.report.page import write_report
from fedgrove.report.plans import plan_table
from fedgrove.report.reader import read
from fedgrove.report.stage_reports import report_of, stage_files
from fedgrove.report.summary import ALONE, CAPABILITIES
from fedgrove.report.table import result_table
from fedgrove.report.verdict import verdict
from fedgrove.rounds.disclosure import Disclosure
from fedgrove.rounds.request import request_types
from fedgrove.stages.prune.report import BLOCK, STATISTICS
from test_report import Page, make_run

KINDS = plugins.names("stages", folders=True)
METHODS = (
    "stages.prune.pruners", "stages.prune.aggregation", "stages.prune.allocation", "stages.structured.scores",
    "stages.structured.expert_scores",
    "stages.tune.aggregation", "stages.tune.trainers", "stages.tune.planners", "stages.tune.parametrizations",
)  # fmt: skip
TOY = """
from fedgrove.report.any_stage import *
from fedgrove.report.sections import Figure, Paragraph, Section
from fedgrove.report.summary import Outcome

DID, DOING, FILES, TAGS = "doubled", "doubling", ("doubles.json",), ("doubled",)
CARD = "Every norm is twice what it was."


def describe(config):
    return f"double {config['times']} times"


def limits(config):
    return "Nothing else was sent."


def outcome(stage, files):
    return Outcome(f"{files['doubles.json']['norms']} norms were doubled")


def figures(summary, stage):
    return [Figure("2.0", "times the norms")]


def sections(summary, stage):
    return [Section("doubles", "What was doubled", [Paragraph("Norms <and> nothing else.")])]
"""


@pytest.fixture
def new_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str | None], None]:
    """Adds a kind of stage for one test: a folder with a ``report.py``, or without one."""
    folder = tmp_path / "kinds"
    monkeypatch.setattr(fedgrove.stages, "__path__", [*fedgrove.stages.__path__, str(folder)])

    def add(kind: str, report: str | None) -> None:
        (folder / kind).mkdir(parents=True)
        (folder / kind / "__init__.py").write_text("")
        if report is not None:
            (folder / kind / "report.py").write_text(report)
        for name in (f"fedgrove.stages.{kind}", f"fedgrove.stages.{kind}.report"):
            monkeypatch.setitem(sys.modules, name, None)  # so that it is forgotten after the test
            del sys.modules[name]

    return add


def run_of(folder: Path, kind: str, **files: Any) -> Path:
    """A run that prunes and then does something new."""
    run = make_run(folder / "run")
    job = tomllib.loads((run / "job.toml").read_text())
    job["stages"].append({"kind": kind, "times": 3})
    (run / "job.toml").write_text(tomli_w.dumps(job))
    clients = {"ward": {"memory": 1000, "seconds": 0.5, "blocks": [[0]]}, "law": {"memory": 2000, "seconds": 1.5, "blocks": []}}
    plan = {"stage": 1, "kind": kind, "clients": clients, "discloses": ["SCALES"]}
    (run / f"plan-1-{kind}.json").write_text(json.dumps(plan))
    for name, value in files.items():
        (run / f"{name}.json").write_text(json.dumps(value))
    with (run / "ledger.jsonl").open("a") as ledger:
        for round_ in range(2):
            line = {"stage": 1, "round": round_, "client": "law", "direction": "up", "kind": f"{kind}/any", "bytes": 700}
            ledger.write(json.dumps(line) + "\n")
    return run


def text_of(table: RenderableType) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_a_new_kind_of_stage_is_shown_by_its_own_file(tmp_path: Path, new_kind: Callable[..., None]) -> None:
    new_kind("double", TOY)
    run = run_of(tmp_path, "double", doubles={"norms": 7})
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert "doubles" in page.attributes("id")
    for words in ("What was doubled", "Norms <and> nothing else.", "double 3 times", "times the norms", "7 norms were doubled"):
        assert words in page.text
    assert f"Stage 1, doubling: each client sent {Disclosure.SCALES.sentence}. Nothing else was sent." in page.text
    assert "pruned and doubled one language model together" in verdict(read(run))[0]
    made = card(run, None, "Use it.")
    assert "2. Double 3 times" in made
    assert "Every norm is twice what it was." in made
    assert "- doubled\n" in made
    assert "doubles.json" in stage_files()


def test_a_kind_that_tells_nothing_is_shown_by_its_messages(tmp_path: Path, new_kind: Callable[..., None]) -> None:
    new_kind("blur", None)
    run = run_of(tmp_path, "blur")
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert page.csv("stage-1-messages")[1:] == [["law", "2", "1400", "0", "0"], ["ward", "0", "0", "0", "0"]]
    assert f"Stage 1, blur: each client sent {Disclosure.SCALES.sentence}." in page.text
    assert "pruned and changed one language model together" in verdict(read(run))[0]
    plan = json.loads((run / "plan-1-blur.json").read_text())
    assert "memory" in text_of(plan_table(plan, {"kind": "blur"}))
    assert "2000" in text_of(plan_table(plan, {"kind": "blur"}))
    assert "blocks" not in text_of(plan_table(plan, {"kind": "blur"}))
    assert "no client takes part" in text_of(plan_table({**plan, "clients": {}}, {"kind": "blur"}))


def test_a_report_that_lacks_something_is_refused_in_one_line(new_kind: Callable[..., None]) -> None:
    new_kind("half", TOY.replace("def limits(config):", "del limits\n\n\ndef other(config):"))
    with pytest.raises(
        FedgroveError, match=r"half.report\.py: it lacks the function limits, which .*StageReport requires"
    ) as error:
        report_of("half")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_stage_tells_the_report_what_it_is(kind: str) -> None:
    report = report_of(kind)
    assert report.__name__ == f"fedgrove.stages.{kind}.report"  # type: ignore[attr-defined]
    assert report.DID
    assert report.DOING


def test_the_report_knows_no_kind_of_stage_and_no_method() -> None:
    names = {*KINDS, *(name for package in METHODS for name in plugins.names(package))}
    assert {"prune", "tune", "sparsegpt", "fedspallm", "flexlora"} <= names
    names.remove("prompt")  # also a key of samples.json
    (folder,) = map(Path, fedgrove.report.__path__)
    for file in folder.glob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        found = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        assert not found & names, f"{file.name}: {found & names}"
        imported = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not [name for name in imported if name.startswith("fedgrove.stages")], file.name


def test_the_requests_that_the_report_counts_are_the_real_ones() -> None:
    kinds = {one.KIND for one in request_types()}
    assert {BLOCK, STATISTICS, CAPABILITIES} <= kinds
    own_models = {one.KIND for one in request_types() if Disclosure.WINDOW_LOSSES in one.DISCLOSES}
    assert own_models == {kind for kind in kinds if kind.endswith(ALONE)} != set()


def test_what_stages_tell_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from fedgrove import plugins; from fedgrove.report.stage_reports import report_of; "
        "print([report_of(kind).DID for kind in plugins.names('stages', folders=True)], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("] False\n")


PRUNE = {"kind": "prune", "pruner": "wanda", "aggregation": "pooled", "sparsity": 0.5}
STRUCTURED = {"kind": "structured", "channels": 0.25, "heads": 0.5, "depth": 0.2, "score": "taylor", "repair": True}
CAPABLE = {"memory": 2**23, "speed": 2.0, "uplink": 3_000_000}
COSTS = {"memory": 2**22, "upload": 2_500_000, "seconds": 12.4}
LORA = {
    "kind": "tune", "planner": "fedpipe", "parametrization": "lora", "discloses": ["FACTORS"], "deadline": None, "total": 9.0,
    "left_out": {}, "capabilities": {"ward": CAPABLE},
}  # fmt: skip


@pytest.mark.parametrize(
    ("plan", "config", "says"),
    [
        (
            {"kind": "prune", "num_blocks": 6, "choices": {"wanda": 10**6, "sparsegpt": 10**7},
             "clients": {"[b]ward[/b]": {**COSTS, "blocks": [[0, 1, 2], [4]], "samples": 16, "sparsity": 0.6}}},
            PRUNE,
            ["stage 3: prune, wanda, aggregation pooled", "[b]ward[/b]", "0–2; 4 of 6", "60%", "4 MiB", "2.5 MB", "12 s",
             "by pruner: wanda: 1.0 MB; sparsegpt: 10.0 MB"],
        ),
        (
            {"kind": "prune", "num_blocks": 6, "clients": {"ward": {**COSTS, "blocks": [[5]], "samples": 16, "sparsity": 0.5}}},
            {**PRUNE, "pattern": "2:4"},
            ["5 of 6", "2:4"],
        ),
        (
            {"kind": "structured", "before": {"channels": 96, "heads": 2}, "after": {"channels": 72, "heads": 1}, "queries": 2,
             "num_blocks": 6, "blocks_left": 5, "parameters": [1000, 800], "types": ["llama", "mistral"],
             "clients": {"ward": {**COSTS, "samples": 8, "disk": 2**21}}},
            STRUCTURED,
            ["structured pruning, score taylor, repaired: 24 of 96 channels and 2 of 4 heads out of every block",
             "and 1 of 6 blocks", "2 MiB",
             "1,000 to 800 weights (0.80)", "written as type mistral"],
        ),
        (
            {**LORA, "deadline": 1.5, "left_out": {"law": "it has too little"}, "importance": {"a": 0.5, "b": 0.3, "c": 0.2},
             "clients": {"ward": {**COSTS, "bits": 8, "batch": 4, "micro": 2, "ranks": {"a": 8, "b": 2}}}},
            {"kind": "tune"},
            ["tune lora, planner fedpipe, deadline 1.5 s", "8 MiB, speed 2, 3 Mbit up", "4 (2 at once)",
             "8 in 1, 2 in 1, none in 1", "All rounds together take 9.0 s", "law is left out: it has too little"],
        ),
        (
            {**LORA, "planner": "uniform", "parametrization": "full", "discloses": ["CHANGES"],
             "importance": {"a": 0.6, "b": 0.4},
             "clients": {"ward": {**COSTS, "bits": 32, "batch": 4, "micro": 4, "ranks": {"a": 1, "b": 1}}}},
            {"kind": "tune"},
            ["tune full, planner uniform; each client", "whole matrices in 2"],
        ),
    ],
)  # fmt: skip
def test_a_plan_is_a_table_with_what_each_client_is_given(
    plan: dict[str, Any], config: dict[str, Any], says: list[str]
) -> None:
    text = " ".join(text_of(plan_table({"stage": 3, **plan}, config)).split())
    for words in says:
        assert words in text


def test_a_terminal_shows_the_plan_of_a_stage_that_plans_again(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    job = tomllib.loads((run / "job.toml").read_text())
    job["stages"].append(
        {"kind": "tune", "planner": "fedpipe", "parametrization": "lora", "aggregation": "flexlora", "rounds": 1, "steps": 2}
    )
    (run / "job.toml").write_text(tomli_w.dumps(job))
    assignment = {**COSTS, "tokens": 100, "bits": 8, "batch": 4, "micro": 2, "ranks": {"model.layers.0.mlp.up_proj": 8}}
    plan = {**LORA, "stage": 1, "importance": {"model.layers.0.mlp.up_proj": 1.0}, "clients": {"ward": assignment}}
    (run / "plan-1-tune.json").write_text(json.dumps(plan))
    text = text_of(result_table(read(run)))
    assert text.index("stage 1: tune lora, planner fedpipe") < text.index("2 owners of text")
    assert "low-rank adapters were trained in 1 round" in text
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert page.csv("stage-1-capabilities")[1:] == [["ward", "100", str(2**23), "2.0", "3.0", "1"]]
    assert page.csv("stage-1-given")[1][:4] == ["ward", "8", "4", "2"]
