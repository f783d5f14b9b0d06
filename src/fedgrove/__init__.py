"""Several owners of private text make one large language model smaller and better together.

``fedgrove.run(job)``, ``fedgrove.plan(job)`` and ``fedgrove.evaluate(model, data)`` are the commands of the same names; see
:mod:`fedgrove.api`. Importing fedgrove imports nothing else: the first use of one of them does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedgrove.api import Result, evaluate, plan, run
    from fedgrove.errors import FedgroveError

__all__ = ["FedgroveError", "Result", "evaluate", "plan", "run"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'fedgrove' has no attribute {name!r}")
    if name == "FedgroveError":
        from fedgrove.errors import FedgroveError

        return FedgroveError
    from fedgrove import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return __all__
