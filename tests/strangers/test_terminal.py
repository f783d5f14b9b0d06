"""Terminals as people have them: what cannot be written there is replaced, and nothing ends in a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
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


def doctor(small: Small, file: Path, terminal: Mapping[str, str]) -> tuple[int, str, str]:
    words = ["doctor", str(small.job("shown")), "--set", f"clients.0.data={file}"]
    if terminal != POSIX:
        return process(*words, env=terminal)
    command = [sys.executable, "-c", "from fedgrove.cli import main; main()", *words]  # Python takes it in when it starts
    ended = subprocess.run(command, env={**os.environ, **terminal}, capture_output=True, timeout=240)
    return ended.returncode, ended.stdout.decode(errors="replace"), ended.stderr.decode(errors="replace")


@pytest.mark.parametrize("terminal", TERMINALS.values(), ids=list(TERMINALS))
def test_a_text_of_any_language_is_shown_or_replaced(small: Small, tmp_path: Path, terminal: dict[str, str]) -> None:
    file = tmp_path / "notes.jsonl"
    file.write_text("".join(json.dumps({"text": f"病人 {i} – naïve 🌳"}) + "\n" for i in range(40)))
    status, out, err = doctor(small, file, terminal)
    assert status == 0, err
    assert "Traceback" not in err
    assert "40 records" in " ".join(out.split())


def test_a_name_that_the_terminal_cannot_write_is_one_line(small: Small, tmp_path: Path) -> None:
    file = tmp_path / "病人.txt"
    file.write_text("a few words " * 100)
    status, _, err = doctor(small, file, POSIX)
    assert status == 2
    assert "set PYTHONUTF8=1" in err
    assert err.count("\n") == 1
