"""Results of a benchmark's runs, in files, so that what was run once is not run again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fedgrove.files import read_lines


def collect(file: Path | None, wanted: Iterable[dict[str, Any]], run: Callable[..., dict[str, Any]]) -> list[dict[str, Any]]:
    """What ``run(**settings)`` gives for each of the wanted settings, which are noted beside it.

    Args:
        file: where results stand and are added; a result counts again where all its settings are those that are wanted.
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
        """Opens it; with ``only`` nothing is measured any more."""
        self._file, self._only = file, only
        self._results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def __call__(self, name: str, measure: Callable[[], Any]) -> Any:
        """The result of this name, measured if it is not there yet; None if it may not be."""
        if name not in self._results and not self._only:
            self._results[name] = measure()
            self._file.write_text(json.dumps(self._results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if name in self._results:
            print(f"{name}: {self._results[name]}", flush=True)
        return self._results.get(name)
