"""Results of a benchmark, in files, so that nothing is run twice."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fedgrove.files import read_lines


def collect(file: Path | None, wanted: Iterable[dict[str, Any]], run: Callable[..., dict[str, Any]]) -> list[dict[str, Any]]:
    """The result of ``run(**settings)`` for each of the wanted settings, together with these settings.

    Args:
        file: holds earlier results, and gets the new ones; a result is used again if all its settings are the wanted ones.
    """
    known = read_lines(file) if file else []
    found = []
    for settings in wanted:
        result = next((one for one in known if all(one.get(key) == value for key, value in settings.items())), None)
        if result is None:
            result = {**settings, **run(**settings)}
            if file:
                with file.open("a", encoding="utf-8") as opened:
                    opened.write(json.dumps(result) + "\n")
        found.append(result)
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in result.items()}, flush=True)
    return found


class Kept:
    """Results by name, in one JSON file."""

    def __init__(self, file: Path, only: bool = False) -> None:
        """Opens the file; with ``only`` nothing new is measured."""
        self._file, self._only = file, only
        self._results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def __call__(self, name: str, measure: Callable[[], Any]) -> Any:
        """The result of this name, measured if it does not exist yet; None if it does not exist and may not be measured."""
        if name not in self._results and not self._only:
            self._results[name] = measure()
            self._file.write_text(json.dumps(self._results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if name in self._results:
            print(f"{name}: {self._results[name]}", flush=True)
        return self._results.get(name)
