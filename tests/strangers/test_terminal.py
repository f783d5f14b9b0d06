"""Terminals as people have them: what cannot be written there is replaced, and nothing ends in a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from small import Small

TERMINALS = {
    "POSIX": {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "ASCII": {"PYTHONIOENCODING": "ascii"},
    "Western Europe": {"PYTHONIOENCODING": "cp1252"},
    "narrow and dumb": {"COLUMNS": "20", "TERM": "dumb"},
}


def doctor(small: Small, file: Path, terminal: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-c", "from fedgrove.cli import main; main()", "doctor", str(small.job("shown"))]
    environment = {**os.environ, **TERMINALS[terminal]}
    return subprocess.run([*command, "--set", f"clients.0.data={file}"], env=environment, capture_output=True, timeout=240)


@pytest.mark.parametrize("terminal", TERMINALS)
def test_a_text_of_any_language_is_shown_or_replaced(small: Small, tmp_path: Path, terminal: str) -> None:
    file = tmp_path / "notes.jsonl"
    file.write_text("".join(json.dumps({"text": f"病人 {i} – naïve 🌳"}) + "\n" for i in range(40)))
    ended = doctor(small, file, terminal)
    assert ended.returncode == 0, ended.stderr.decode(errors="replace")
    assert b"Traceback" not in ended.stderr
    assert b"40 records" in b" ".join(ended.stdout.split())


def test_a_name_that_the_terminal_cannot_write_is_one_line(small: Small, tmp_path: Path) -> None:
    file = tmp_path / "病人.txt"
    file.write_text("a few words " * 100)
    ended = doctor(small, file, "POSIX")
    assert ended.returncode == 2
    assert b"set PYTHONUTF8=1" in ended.stderr
    assert ended.stderr.count(b"\n") == 1
