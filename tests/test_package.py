"""What is given away: the wheel, an installation from it, its version and its citation."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
import yaml

from small import ROOT, cli

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


def call(*command: object, cwd: Path) -> str:
    """What a program prints; nothing of this environment's Python path reaches it."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built by what is installed here: nothing is fetched."""
    folder = tmp_path_factory.mktemp("wheel")
    call(*PIP, "wheel", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    source = ROOT / "src" / "fedgrove"
    files = {path.relative_to(ROOT / "src").as_posix() for path in source.rglob("*") if path.is_file()}
    files = {name for name in files if "__pycache__" not in name}
    with zipfile.ZipFile(wheel) as opened:
        names = {name for name in opened.namelist() if not name.endswith("/")}
    about = f"fedgrove-{PROJECT['version']}.dist-info/"
    assert {name for name in names if not name.startswith(about)} == files, "no tests either"
    assert {f"{about}entry_points.txt", f"{about}licenses/LICENSE"} <= names
    for wanted in (
        "py.typed", "template.toml", "demo/job.toml", "demo/grove-6m/model.safetensors", "demo/grove-6m/tokenizer.json",
        "demo/texts/publisher.txt", "report/page.html", "report/style.css", "deploy/flare/texts/federation.toml",
    ):  # fmt: skip
        assert f"fedgrove/{wanted}" in names
    assert not [name for name in names if "test" in Path(name).name.lower()]


def test_every_file_that_the_code_opens_of_its_own_package_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        names = opened.namelist()
    opens = re.compile(r'files\("(fedgrove[\w.]*)"\)((?: ?/ ?"[^"]+")+)')
    found = 0
    for file in (ROOT / "src").rglob("*.py"):
        for package, path in opens.findall(file.read_text(encoding="utf-8")):
            place = "/".join([*package.split("."), *re.findall(r'"([^"]+)"', path)])
            assert any(name == place or name.startswith(f"{place}/") for name in names), f"{file}: {place}"
            found += 1
    assert found > 2


def test_the_wheel_says_that_it_is_typed_and_what_it_needs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        about = message_from_bytes(opened.read(f"fedgrove-{PROJECT['version']}.dist-info/METADATA"))
    assert about["Version"] == PROJECT["version"]
    assert about["Requires-Python"] == PROJECT["requires-python"]
    assert "Typing :: Typed" in about.get_all("Classifier", [])
    needs = [need for need in about.get_all("Requires-Dist", []) if "extra ==" not in need]
    assert len(needs) == len(PROJECT["dependencies"])
    assert set(about.get_all("Provides-Extra", [])) == set(PROJECT["optional-dependencies"])


def test_it_works_where_it_is_installed_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    place = tmp_path / "venv"
    venv.create(place, with_pip=False)
    python, command = place / "bin" / "python", place / "bin" / "fedgrove"
    call(*PIP, "--python", python, "install", "--no-index", "--no-deps", wheel, cwd=tmp_path)
    (packages,) = place.glob("lib/python*/site-packages")
    # What it needs comes from here, without what only its .pth files bring: the checkout that is installed in edit mode.
    others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "others.pth").write_text("\n".join(others) + "\n")
    for way in ([command], [python, "-m", "fedgrove"]):
        assert call(*way, "--version", cwd=tmp_path) == f"fedgrove {PROJECT['version']}\n"
    assert call(python, "-c", "import fedgrove; print(fedgrove.__file__)", cwd=tmp_path) == f"{packages}/fedgrove/__init__.py\n"
    call(command, "init", "job", cwd=tmp_path)
    assert "[model]" in (tmp_path / "job" / "job.toml").read_text(encoding="utf-8")


def test_the_command_tells_its_version() -> None:
    assert cli("--version") == (0, f"fedgrove {PROJECT['version']}\n", "")


def test_the_citation_can_be_read_and_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys(), "what the format asks for"
    assert str(citation["version"]) == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    for reference in citation["references"]:
        assert {"type", "title", "authors"} <= reference.keys(), reference
