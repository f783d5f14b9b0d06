"""Results of a benchmark, in a file, so that nothing is run twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedgrove.files import read_lines
from fedgrove.models.digest import digests
from fedgrove.models.stream import Checkpoint


class Kept:
    """Results of one model by their settings, in a JSON-lines file that may hold those of other models too."""

    def __init__(self, file: Path | None, model: Path | str, only: bool = False) -> None:
        """Opens the file.

        Args:
            file: gets a line for every new result; None: nothing is kept.
            model: the folder of the model that is measured.
            only: measure nothing new.
        """
        self._file, self._only = file, only
        self._model = fingerprint(Path(model))
        self._lines: list[dict[str, Any]] = read_lines(file) if file and file.is_file() else []

    def __call__(self, measure: Callable[[], Any], **settings: Any) -> Any:
        """The result with these settings, measured if it does not exist yet; None if it does not and may not be measured."""
        same = json.loads(json.dumps({"model": self._model, **settings}))  # as it is in the file: a tuple is a list there
        for line in self._lines:
            if {key: value for key, value in line.items() if key != "result"} == same:
                return line["result"]
        if self._only:
            return None
        line = {**same, "result": measure()}
        self._lines.append(line)
        if self._file:
            with self._file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
        print(*settings.values(), flush=True)
        return line["result"]


def fingerprint(model: Path) -> str:
    """16 hexadecimal digits of all weights and of the tokenizer of a model."""
    parts = json.dumps(digests(Checkpoint(model)), sort_keys=True)
    return hashlib.sha256(parts.encode()).hexdigest()[:16]
