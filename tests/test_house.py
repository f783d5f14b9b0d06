"""The structure of the code: imports point downwards, and a new method is a new file and nothing else."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from fedgrove.rounds.request import OTHER_ROOMS, request_types
from small import LENGTH, ROOT, Small, python

SOURCE = ROOT / "src" / "fedgrove"
LEVELS = [  # rooms from the lowest to the highest: a module imports those of its own level and below
    {"errors", "escape", "events", "files", "heap", "lazy", "machine", "options", "plugins", "quantities"},
    {"data", "job", "models"},
    {"privacy"},
    {"progress", "runfolder"},
    {"client", "engines.base", "input_statistics", "rounds"},
    {"engines", "evaluation", "report", "stages"},
    {"centralized", "exports"},
    {"adopt", "export", "run", "split", "tracking"},
    {"api", "doctor", "route"},
    {"deploy"},
    {"commands", "cli"},
    {"__main__"},
]


def modules() -> dict[str, Path]:
    names = {}
    for file in SOURCE.rglob("*.py"):
        name = ".".join(file.relative_to(SOURCE).with_suffix("").parts)
        names[name.removesuffix(".__init__").removesuffix("__init__")] = file
    return names


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imported(file: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of fedgrove that a file imports when it is imported itself."""
    for node in parsed(file).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fedgrove":
            package = (node.module or "").removeprefix("fedgrove").lstrip(".")
            for alias in node.names:
                name = f"{package}.{alias.name}".lstrip(".")
                yield name if name in known else package
        elif isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("fedgrove.") for alias in node.names if alias.name.startswith("fedgrove."))


def level(name: str) -> int:
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        for number, rooms in enumerate(LEVELS):
            if ".".join(parts[:end]) in rooms:
                return number
    raise AssertionError(f"{name} is in no room of LEVELS")


def test_no_import_points_upwards() -> None:
    known = modules()
    upwards = [
        f"{name} imports {other}"
        for name, file in known.items()
        if name
        for other in imported(file, known)
        if other and level(other) > level(name)
    ]
    assert not upwards


def test_no_circle_of_imports() -> None:
    known = modules()
    edges = {name: sorted(set(imported(file, known)) - {name, ""}) for name, file in known.items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"circle: {' -> '.join((*path, name))}"
        if name not in done:
            for other in edges[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in edges:
        visit(name, ())


def test_stages_do_not_know_each_other() -> None:
    known = modules()
    for name, file in known.items():
        if name.startswith("stages.") and name.count(".") > 1:
            kind = name.split(".")[1]
            others = [other for other in imported(file, known) if re.match(rf"stages\.(?!{kind}\b|base\b)", other)]
            assert not others, f"{name} imports {others}"


def test_every_request_is_named_after_its_file_and_says_what_it_discloses() -> None:
    kinds = [one.KIND for one in request_types()]
    assert len(set(kinds)) == len(kinds) > 10
    for one in request_types():
        room, file, *_ = one.KIND.split("/")
        package = OTHER_ROOMS.get(room, f"stages.{room}.exchanges")
        assert one.__module__ == f"fedgrove.{package}.{file}"
        assert all(field.annotation is not dict for field in one.model_fields.values())
        assert one.__doc__


def test_nobody_asks_which_kind_a_stage_is_or_what_a_method_is_called() -> None:
    """Kinds and methods say what they can do; a name is compared in its own file at most."""
    folders = [
        "stages/prune/pruners",
        "stages/prune/aggregation",
        "stages/prune/allocation",
        "stages/structured/scores",
        "stages/structured/expert_scores",
        "stages/head/heads",
        "stages/prompt/methods",
    ]
    folders += [f"stages/tune/{name}" for name in ("aggregation", "gates", "parametrizations", "planners", "trainers")]
    methods = {file.stem for folder in folders for file in (SOURCE / folder).glob("*.py")} - {"__init__"}
    kinds = {file.parent.name for file in (SOURCE / "stages").glob("*/config.py")}
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(parsed(file)):
            where = f"{file.relative_to(SOURCE)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
                assert not re.fullmatch(r"(.*\.)?(stage|plan)", ast.unparse(node.args[0])), where
            if isinstance(node, ast.Compare):
                names = {one.value for one in [node.left, *node.comparators] if isinstance(one, ast.Constant)}
                assert not names & (methods | kinds) - {file.stem}, where
            if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and isinstance(node.value, ast.Name):
                assert node.value.id not in ("request", "info"), where


def test_no_file_is_long() -> None:
    long = [file.relative_to(SOURCE) for file in SOURCE.rglob("*.py") if len(file.read_text().splitlines()) > 400]
    assert not long


def test_no_text_shows_the_name_of_a_variable() -> None:
    """A line of a text over several lines that lacks its f."""
    shown = re.compile(r"(?<!\{)\{[a-z_.]+\}")
    for file in SOURCE.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.JoinedStr) and "{{" not in (ast.get_source_segment(text, node) or ""):
                parts = [part.value for part in node.values if isinstance(part, ast.Constant)]
                assert not any(shown.search(part) for part in parts), f"{file.relative_to(SOURCE)}:{node.lineno}"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package, to which methods are added."""
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(SOURCE, folder / "fedgrove", copy_function=os.link, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


MAIN = "from fedgrove.cli import main; main()"
RUN = """
import hashlib, json, sys
from pathlib import Path
from fedgrove.cli import main
found = {}
for job in sys.argv[1:]:
    out = Path(job).with_suffix(".run")
    sys.argv = ["fedgrove", "run", job, "--out", str(out), "--quiet"]
    try:
        main()
    except SystemExit as end:
        assert not end.code, f"{job}: {end.code}"
    found[Path(job).stem] = hashlib.sha256((out / "model" / "model.safetensors").read_bytes()).hexdigest()
print("hashes " + json.dumps(found))
"""
TUNE = {"kind": "tune", "rounds": 1, "steps": 1, "length": LENGTH, "batches": [1], "ranks": [2], "bits": [32]}
PRUNE = {"kind": "prune", "pruner": "wanda", "sparsity": 0.5, "samples": 2, "length": LENGTH}
COPIES = {  # the new file, what it is a copy of, a stage that names it
    "stages/prune/aggregation/plain_mean.py": ("fedavg.py", {**PRUNE, "aggregation": "plain_mean"}),
    "stages/prune/aggregation/totals.py": ("pooled.py", {**PRUNE, "aggregation": "totals"}),
    "stages/prune/pruners/wanda_again.py": ("wanda.py", {**PRUNE, "pruner": "wanda_again"}),
    "stages/prune/allocation/outliers.py": ("owl.py", {**PRUNE, "allocation": "outliers"}),
    "stages/structured/scores/squares.py": (
        "fisher.py",
        {"kind": "structured", "heads": 0.5, "samples": 2, "length": LENGTH, "score": "squares"},
    ),
    "stages/tune/aggregation/averages.py": ("fedavg.py", {**TUNE, "parametrization": "full", "aggregation": "averages"}),
    "stages/tune/planners/alike.py": ("uniform.py", {**TUNE, "planner": "alike"}),
    "stages/tune/parametrizations/gains.py": ("ia3.py", {**TUNE, "parametrization": "gains"}),
    "stages/tune/trainers/steps.py": ("sgd.py", {**TUNE, "planner": "uniform", "trainer": "steps"}),
}


def run_in(package: Path, small: Small, jobs: dict[str, list[dict[str, object]]]) -> dict[str, str]:
    """Runs jobs of these stages with a package of its own; the hash of each model."""
    files = [small.job(name, stages=stages, evaluate={}) for name, stages in jobs.items()]
    status, out, err = python(RUN, *files, path=package)
    assert status == 0, err[-2000:]
    line = next(line for line in out.splitlines() if line.startswith("hashes "))
    hashes: dict[str, str] = json.loads(line.removeprefix("hashes "))
    return hashes


def test_a_method_under_another_name_is_one_new_file(package: Path, tmp_path: Path) -> None:
    small = Small(tmp_path)
    jobs: dict[str, list[dict[str, object]]] = {}
    for number, (new, (original, stage)) in enumerate(COPIES.items()):
        target = package / "fedgrove" / new
        shutil.copyfile(target.with_name(original), target)
        key = next(key for key, value in stage.items() if value == target.stem)
        jobs[f"copy-{number}"] = [stage]
        jobs[f"original-{number}"] = [{**stage, key: Path(original).stem}]
    hashes = run_in(package, small, jobs)
    for number, new in enumerate(COPIES):
        assert hashes[f"copy-{number}"] == hashes[f"original-{number}"], new


def test_a_form_of_export_under_another_name_is_one_new_file(package: Path, tmp_path: Path) -> None:
    small = Small(tmp_path)
    exports = package / "fedgrove" / "exports"
    shutil.copyfile(exports / "packed.py", exports / "parcel.py")
    outs = [tmp_path / name for name in ("packed", "parcel")]
    for out in outs:
        status, _, err = python(MAIN, "export", small.model, "--to", out.name, "--out", out, "--no-measure", path=package)
        assert status == 0, err
    first, second = ({file.name: file.read_bytes() for file in out.glob("*.packed")} for out in outs)
    assert first == second


TOY_CONFIG = '''
from typing import Literal
from fedgrove.job.stage_config import StageConfig


class Config(StageConfig):
    """``[[stages]]`` of ``kind = "rescale"``.

    Attributes:
        kind: what the stage does.
        factor: what every norm is multiplied by.
    """

    kind: Literal["rescale"]
    factor: float = 1.0
'''
TOY_STAGE = """
from fedgrove.models.blocks import Decoder
from fedgrove.models.tensor_files import save_tensors
from fedgrove.stages.base import Assignment, Plan, Result


def plan(index, config, decoder, capabilities, job):
    clients = {name: Assignment(memory=0, upload=0, seconds=0.0) for name in capabilities}
    return Plan(stage=index, kind=config.kind, clients=clients)


def run(model, plan, config, federation):
    norms = {name: model.read(name) * config.factor for name in model.names() if "norm" in name}
    overlay = federation.run.overlay(plan.stage, 0)
    save_tensors(norms, overlay / "norms.safetensors")
    return Result(model.over(overlay))


def alone(model, plan, config, clients, windows, federation):
    return iter(())


def typical_memory(decoder, length):
    return {}
"""


def test_a_kind_of_stage_is_one_new_folder(package: Path, tmp_path: Path) -> None:
    """A toy that multiplies all norms by one: alone, and between two other stages."""
    small = Small(tmp_path)
    folder = package / "fedgrove" / "stages" / "rescale"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "config.py").write_text(TOY_CONFIG)
    (folder / "stage.py").write_text(TOY_STAGE)
    toy = {"kind": "rescale"}
    magnitude = {**PRUNE, "pruner": "magnitude", "sparsity": 0.75}  # the same whatever windows its place in the job draws
    hashes = run_in(
        package, small, {"toy": [PRUNE, toy], "pruned": [PRUNE], "between": [PRUNE, toy, magnitude], "both": [PRUNE, magnitude]}
    )
    assert hashes["toy"] == hashes["pruned"]
    assert hashes["between"] == hashes["both"]


def test_a_method_that_lacks_something_is_refused_in_one_line(package: Path, tmp_path: Path) -> None:
    small = Small(tmp_path)
    (package / "fedgrove" / "stages" / "prune" / "pruners" / "hasty.py").write_text("NEEDS = 'nothing'\n")
    job = small.job("hasty", stages=[{**PRUNE, "pruner": "hasty"}], evaluate={})
    status, _, err = python(MAIN, "plan", job, path=package)
    assert status == 2, err
    assert "hasty.py: it lacks the function prune" in err.splitlines()[-1]


def test_the_example_of_the_page_on_extending_runs(package: Path, tmp_path: Path) -> None:
    """The new aggregation that docs/how-to/extend.md shows, as it stands there."""
    page = (ROOT / "docs" / "how-to" / "extend.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(\"\"\"[^`]*?)```", page)
    assert code is not None
    assert len(code[1].splitlines()) <= 42
    (package / "fedgrove" / "stages" / "tune" / "aggregation" / "median.py").write_text(code[1])
    small = Small(tmp_path)
    stage = {**TUNE, "parametrization": "full"}
    hashes = run_in(package, small, {"median": [{**stage, "aggregation": "median"}], "mean": [stage]})
    assert hashes["median"] != hashes["mean"]
