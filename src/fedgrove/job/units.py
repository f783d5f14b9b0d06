"""The types of a job's keys: quantities such as "8GiB", files relative to the job file, names, methods."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo

from fedgrove import plugins
from fedgrove.data.template import template_fields

_FACTORS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


class Table(BaseModel):
    """A table of the job file: frozen; unknown keys are refused.

    ``SHORT_FORMS``: additional keys of a file, each of which sets several fields, and the packages whose methods they
    may name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    SHORT_FORMS: ClassVar[Mapping[str, tuple[str, ...]]] = {}


def quantity(unit: str, example: str) -> Any:
    """A validator that reads "8GiB" or "20Mbit" as an integer.

    Args:
        unit: a regular expression of the unit, which a file may leave out.
        example: for the error message.
    """

    def parse(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        match = re.fullmatch(rf"\s*([\d.]+)\s*([KMGT]i?)?(?:{unit})?\s*", value)
        if not match or match[1].count(".") > 1:
            raise ValueError(f"write a quantity such as {example}")
        return round(float(match[1]) * _FACTORS[match[2] or ""])

    return BeforeValidator(parse)


def method_of(package: str) -> Any:
    """A validator for the name of a method: a file of ``fedgrove.<package>`` (see :mod:`fedgrove.plugins`)."""

    def check(name: str) -> str:
        if name not in plugins.names(package):
            raise ValueError(f"choose one of {', '.join(plugins.names(package))}")
        return name

    return AfterValidator(check)


def _existing(path: Path, info: ValidationInfo) -> Path:
    if str(path).startswith("hub:"):
        return path
    context = info.context or {}
    path = context.get("folder", Path()) / path.expanduser()
    if not context.get("elsewhere") and not path.exists():
        raise ValueError(f"no such file or folder: {path}")
    return path.resolve()


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


def _ascending(values: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(set(values)))


def _template(value: str | None) -> str | None:
    if value is not None:
        template_fields(value)
    return value


Bytes = Annotated[int, Field(gt=0), quantity("B", '"8GiB"')]
BitsPerSecond = Annotated[int, Field(gt=0), quantity("bit(?:/s)?", '"20Mbit"')]
File = Annotated[Path, AfterValidator(_existing)]
Files = Annotated[tuple[File, ...], BeforeValidator(_as_list), Field(min_length=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Template = Annotated[str | None, AfterValidator(_template)]
Sparsity = Annotated[float, Field(ge=0, lt=1)]
Bits = Literal[32, 16, 8, 4]
Choices = Annotated[tuple[Annotated[int, Field(gt=0)], ...], Field(min_length=1), AfterValidator(_ascending)]
Epsilon = Annotated[float, Field(gt=0, le=50)]
Delta = Annotated[float, Field(gt=0, lt=0.1)]
