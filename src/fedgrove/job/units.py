"""The types of a job's keys and of the fields of messages: quantities such as "8GiB", files, names, methods, and bounds.

A number or a name that another party sends has the same bounds as the key of a job that it comes from.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo

from fedgrove import plugins
from fedgrove.data.template import template_fields

MAX_BLOCKS = 4096  # of a model
MAX_CLIENTS = 10_000  # of a job
MOST = 2**50  # of anything that is counted: bytes, bits per second, tokens
_FACTORS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


class Table(BaseModel):
    """A table of the job file: frozen; unknown keys are refused, and so are numbers that are not finite.

    ``SHORT_FORMS``: additional keys of a file, each of which sets several fields, and the packages whose methods they
    may name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
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
        match = re.fullmatch(rf"\s*(\d+\.?\d*|\.\d+)\s*([KMGT]i?)?(?:{unit})?\s*", value)
        if not match:
            raise ValueError(f"write a quantity such as {example}")
        number = float(match[1]) * _FACTORS[match[2] or ""]
        return round(number) if math.isfinite(number) else MOST + 1

    return BeforeValidator(parse)


def method_of(package: str) -> Any:
    """A validator for the name of a method: a file of ``fedgrove.<package>`` (see :mod:`fedgrove.plugins`)."""

    def check(name: str) -> str:
        if name not in plugins.names(package):
            raise ValueError(f"choose one of {', '.join(plugins.names(package))}")
        return name

    return AfterValidator(check)


def as_name(text: str) -> str:
    """A text reduced to what a :data:`Name` may be, without accents; may become empty."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip("-._")[:64]


def _named(value: Any) -> Any:
    if value == "":  # which is the folder of the file, with everything in it
        raise ValueError("it is empty; name a file or a folder")
    return value


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


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("it has characters that cannot be printed")
    return text


def _stripped(text: str) -> str:
    if text != text.strip():
        raise ValueError("it begins or ends with a space; remove it")
    return text


def _ascending(values: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(set(values)))


def _template(value: str | None) -> str | None:
    if value is not None:
        template_fields(value)
    return value


# Strict: true is no number, and "3" is none either
Natural = Annotated[int, Field(ge=1, le=MOST, strict=True)]
Bytes = Annotated[int, Field(gt=0, le=MOST, strict=True), quantity("B", '"8GiB"')]
BitsPerSecond = Annotated[int, Field(gt=0, le=MOST, strict=True), quantity("bit(?:/s)?", '"20Mbit"')]
Speed = Annotated[float, Field(ge=1e-6, le=1e6, strict=True)]  # relative to other clients
Devices = Annotated[int, Field(ge=1, le=64, strict=True)]
Samples = Annotated[int, Field(ge=1, le=2**30, strict=True)]  # windows of a client
Length = Annotated[int, Field(gt=1, le=2**20, strict=True)]  # tokens of a window
Count = Annotated[int, Field(ge=1, le=2**20, strict=True)]  # rounds, steps, clients, batch sizes, ranks
CountOrZero = Annotated[int, Field(ge=0, le=2**20, strict=True)]
Index = Annotated[int, Field(ge=0, le=2**20, strict=True)]  # of a stage, a round or a block, from 0
Positive = Annotated[float, Field(gt=0, le=MOST, strict=True)]
NonNegative = Annotated[float, Field(ge=0, le=MOST, strict=True)]
Fraction = Annotated[float, Field(ge=0, le=1, strict=True)]
File = Annotated[Path, BeforeValidator(_named), AfterValidator(_existing)]
Files = Annotated[tuple[File, ...], BeforeValidator(_as_list), Field(min_length=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Targets = Annotated[tuple[Name, ...], Field(max_length=64)]  # linears, by the ends of their names
Template = Annotated[str | None, AfterValidator(_template)]
Sparsity = Annotated[float, Field(ge=0, lt=1, strict=True)]
Bits = Literal[32, 16, 8, 4]
BitChoices = Annotated[tuple[Bits, ...], Field(min_length=1, max_length=16)]
Choices = Annotated[tuple[Count, ...], Field(min_length=1, max_length=64), AfterValidator(_ascending)]
ComputeDtype = Literal["auto", "float32", "bfloat16"]
Clip = Annotated[float, Field(gt=0, le=16, strict=True)]
HeldOut = Annotated[float, Field(ge=0, le=0.5, strict=True)]
MOST_HELD_OUT = 64  # windows, whatever the fraction: measuring their loss must not cost more than what is measured
Word = Annotated[str, Field(pattern=r"^[\x21-\x7e]{1,200}$")]  # a seed, or a run's name
Line = Annotated[str, Field(max_length=300), AfterValidator(_printable)]
Label = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_printable), AfterValidator(_stripped)]
Linear = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,255}$")]  # a linear's name
Shares = Annotated[dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.*-]{1,255}$")], Linear], Field(max_length=2**18)]
Linears = Annotated[tuple[Linear, ...], Field(max_length=2**18)]
Epsilon = Annotated[float, Field(gt=0, le=50, strict=True)]
Delta = Annotated[float, Field(gt=0, lt=0.1, strict=True)]
