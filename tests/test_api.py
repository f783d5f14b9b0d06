"""The Python API is the command line: same jobs, same bits, same complaints."""

from __future__ import annotations

import importlib.resources
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fedgrove
from fedgrove import api
from fedgrove.cli import app
from small import DEMO, ROOT, Small, cli, make_model, result


def test_importing_fedgrove_imports_nothing_else() -> None:
    code = "import sys, fedgrove; print(sorted(m for m in sys.modules if m.split('.')[0] in {'torch', 'rich', 'pydantic'}));"
    code += "print(sorted(m for m in sys.modules if m.startswith('fedgrove')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n['fedgrove']\n"


def test_the_error_is_there_under_its_short_name() -> None:
    from fedgrove.errors import FedgroveError

    assert fedgrove.FedgroveError is FedgroveError
    assert "FedgroveError" in dir(fedgrove)


def test_a_run_from_python_is_the_run_of_the_command(small: Small, tmp_path: Path) -> None:
    ended = api.run(small.spec(evaluate__alone=True), tmp_path / "run", quiet=True)
    assert result(ended.path) == {**result(small.undisturbed(evaluate__alone=True)), "job.toml": result(ended.path)["job.toml"]}
    assert ended.sparsity == 0.5
    assert set(ended.perplexity) == {"dense", "alone", "federated"}
    assert ended.report.is_file()
    told = api.evaluate(ended.model, small.texts["held-0"], length=32, quiet=True)
    assert told[str(small.texts["held-0"])]["windows"] > 4


def test_a_plan_from_python_is_that_of_the_run(small: Small) -> None:
    (plan,) = api.plan(small.job(), quiet=True)
    assert set(plan.clients) == {"ash", "birch", "cedar"}
    assert plan.num_blocks == 2


def test_complaints_name_the_key(small: Small, tmp_path: Path) -> None:
    with pytest.raises(fedgrove.FedgroveError, match=r"job: stages\.0\.sparsity"):
        api.plan(small.spec(stages__0__sparsity=2))
    with pytest.raises(fedgrove.FedgroveError, match="no such job file"):
        api.run(tmp_path / "nowhere.toml")
    with pytest.raises(AttributeError):
        _ = fedgrove.nothing


def commands(group: object, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    from typer.main import get_command

    found = []
    for name, command in get_command(group).commands.items():  # type: ignore[arg-type, attr-defined]
        found += [(*path, name, inner) for inner in command.commands] if hasattr(command, "commands") else [(*path, name)]
    return found


@pytest.mark.parametrize("command", commands(app), ids=" ".join)
def test_every_help_has_an_example_of_itself(command: tuple[str, ...]) -> None:
    status, out, _ = cli(*command, "--help")
    assert status == 0
    assert f"Example: fedgrove {' '.join(command)}" in " ".join(out.replace("│", " ").split())


def test_the_notebook_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    notebook = json.loads((ROOT / "examples" / "federation.ipynb").read_text(encoding="utf-8"))
    shutil.copytree(DEMO, tmp_path / "demo", ignore=shutil.ignore_patterns("grove-6m"))
    make_model(tmp_path / "demo" / "grove-6m", max_position_embeddings=128)  # in the shipped model's place it takes a fifth
    find = importlib.resources.files
    monkeypatch.setattr(importlib.resources, "files", lambda of: tmp_path if of == "fedgrove" else find(of))
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
            assert cell["outputs"] == [], "a notebook is kept without what it once printed"
    said = capsys.readouterr().out
    assert "50% of the weights are zero" in said
    assert "First Citizen:" in said
    assert Path("runs/notebook/report.html").is_file()
