"""Modules that are imported when they are first used, so that a command that needs none of them starts at once."""

from __future__ import annotations

import importlib
from typing import Any


class lazy:
    """Stands for the module ``fedgrove.<name>``, which is imported when one of its attributes is read.

    ``importlib.util.LazyLoader`` does not do: it puts an empty module into ``sys.modules``, and whatever looks at all modules,
    as importing torch does, loads it in the midst of another import.
    """

    def __init__(self, name: str):
        self._name = f"fedgrove.{name}"

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)
