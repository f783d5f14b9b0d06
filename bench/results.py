"""Results of a benchmark's runs, one JSON object a line, so that what was run once is not run again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fedgrove.runs import read_lines


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
