"""Terminals as people have them: what cannot be written there is replaced, and nothing ends in a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from small import Small, process

POSIX = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
TERMINALS = {
    "POSIX": POSIX,
    "ASCII": {"PYTHONIOENCODING": "ascii"},
    "Western Europe": {"PYTHONIOENCODING": "cp1252"},
    "narrow and dumb": {"COLUMNS": "20", "TERM": "dumb"},
}
RECORDS, PROSE = "notes.jsonl", "病人.txt"
COMMANDS = """
import os, sys
from fedgrove.cli import main

for number, words in enumerate(sys.argv[1:]):
    for stream in (1, 2):
        os.dup2(os.open(f"{number}-{stream}", os.O_WRONLY | os.O_CREAT), stream)
    sys.argv = ["fedgrove", *words.split("\\n")]
    try:
        main()
    except SystemExit as end:
        status = end.code or 0
    else:
        status = 0
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.close(os.open(f"{number}-ended-{status}", os.O_CREAT))
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    (folder / RECORDS).write_text("".join(json.dumps({"text": f"病人 {i} – naïve 🌳"}) + "\n" for i in range(40)))
    (folder / PROSE).write_text("a few words " * 100)
    return folder


def words_for(small: Small, file: Path) -> list[str]:
    return ["doctor", str(small.job("shown")), "--set", f"clients.0.data={file}"]


@pytest.fixture(scope="module")
def posix(small: Small, files: Path) -> dict[str, tuple[int, str, str]]:
    """For each file, how the command ends at a POSIX terminal.

    Python takes a terminal in when it starts, so it is started there; one process runs both commands, and imports once.
    """
    names = (PROSE, RECORDS)
    commands = ["\n".join(words_for(small, files / name)) for name in names]
    run = [sys.executable, "-c", COMMANDS, *commands]
    subprocess.run(run, env={**os.environ, **POSIX}, cwd=files, timeout=240, check=True)
    found = {}
    for number, name in enumerate(names):
        (ended,) = files.glob(f"{number}-ended-*")
        out, err = ((files / f"{number}-{stream}").read_text(errors="replace") for stream in (1, 2))
        found[name] = int(ended.name.rpartition("-")[2]), out, err
    return found


@pytest.mark.parametrize("terminal", TERMINALS)
def test_a_text_of_any_language_is_shown_or_replaced(
    small: Small, files: Path, posix: dict[str, tuple[int, str, str]], terminal: str
) -> None:
    words = words_for(small, files / RECORDS)
    status, out, err = posix[RECORDS] if terminal == "POSIX" else process(*words, env=TERMINALS[terminal])
    assert status == 0, err
    assert "Traceback" not in err
    assert "40 records" in " ".join(out.split())


def test_a_name_that_the_terminal_cannot_write_is_one_line(posix: dict[str, tuple[int, str, str]]) -> None:
    status, _, err = posix[PROSE]
    assert status == 2
    assert "set PYTHONUTF8=1" in err
    assert err.count("\n") == 1
