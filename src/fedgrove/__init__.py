"""Several owners of private text make one large language model smaller and better together.

The Python API is :mod:`fedgrove.api`:

>>> from fedgrove import api
>>> result = api.run("job.toml", out="runs/first")  # doctest: +SKIP

Importing fedgrove itself imports nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedgrove.errors import FedgroveError

__all__ = ["FedgroveError"]


def __getattr__(name: str) -> Any:
    if name == "FedgroveError":
        from fedgrove.errors import FedgroveError  # importing fedgrove must import nothing else

        return FedgroveError
    raise AttributeError(f"module 'fedgrove' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
