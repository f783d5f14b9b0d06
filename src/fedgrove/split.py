"""One text becomes that of several owners, to try a federation before there is one: who holds what, drawn by a seed.

The ways to draw are those of the literature on uneven clients; the names of the job file's keys are ours.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fedgrove.data.sources import DEFAULT_TEMPLATE, read_records, template_fields
from fedgrove.errors import FedgroveError
from fedgrove.files import atomic_folder

Way = Literal["iid", "dirichlet", "field", "size"]
HELD_OUT = "heldout"


@dataclass(frozen=True)
class Holding:
    """What one client was given.

    Attributes:
        name: the client's.
        records: how many; characters: of their text.
        labels: records by the value of the field, if one was named.
    """

    name: str
    records: int
    characters: int
    labels: dict[str, int]


@dataclass(frozen=True)
class Split:
    """What :func:`split` wrote.

    Attributes:
        folder: where; ``job.toml`` in it is a job of these clients.
        holdings: by client, in order.
        held_out: records that nobody got, for evaluation.
        empty: clients that would have got nothing and were left out.
    """

    folder: Path
    holdings: tuple[Holding, ...]
    held_out: int
    empty: tuple[str, ...]


def split(
    source: Path,
    out: Path,
    *,
    by: Way = "iid",
    clients: int | None = None,
    field: str | None = None,
    alpha: float = 0.3,
    text: str | None = None,
    held_out: float = 0.1,
    seed: int = 0,
    model: str = "path/to/model",
) -> Split:
    """Deals the records of a source to clients and writes a file for each, a job file, and what is held out.

    Args:
        source: see :mod:`fedgrove.data.sources`; of plain text the passages are dealt.
        out: a folder that does not exist yet.
        by: "iid": at random, as evenly as can be. "dirichlet": each value of ``field`` in proportions over the clients that
            are drawn from a Dirichlet distribution (Yurochkin et al. 2019): a small ``alpha`` gives each client few values.
            "size": at random, but the clients' numbers are drawn from a Dirichlet distribution. "field": all records with
            the same value of ``field`` to one client, the most frequent values first, each to whoever has the fewest.
        clients: how many; None: with "field" one for each value.
        text: how a record becomes text, for the job file.
        held_out: the fraction of the records that nobody gets, drawn at random before anything is dealt.
        model: for the job file.

    Raises:
        FedgroveError: an argument does not fit the others or the source.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FedgroveError(f"--out {out}: it exists already", "name another folder")
    if by in ("dirichlet", "field") and not field:
        raise FedgroveError(f"--by {by}: name the field that decides: --field label")
    if clients is None and by != "field":
        raise FedgroveError(f"--by {by}: say how many clients: --clients 8")
    if clients is not None and clients < 1:
        raise FedgroveError("--clients: 1 at least")
    if not 0 <= held_out < 1:
        raise FedgroveError("--heldout: a fraction of the records, such as 0.1")
    if not (math.isfinite(alpha) and alpha > 0):
        raise FedgroveError("--alpha: a number above 0; small ones make the clients differ more")
    records, labels = _read(source, field, text)
    rng = np.random.default_rng(seed)
    order = [int(i) for i in rng.permutation(len(records))]
    aside = math.ceil(held_out * len(records))
    rest = order[aside:]
    names = [f"client-{i + 1}" for i in range(clients or 0)]
    match by:
        case "iid":
            dealt = [rest[i :: len(names)] for i in range(len(names))]
        case "size":
            dealt = _by_sizes(rest, rng.dirichlet([alpha] * len(names)))
        case "dirichlet":
            dealt = _by_dirichlet(rest, labels, len(names), alpha, rng)
        case "field":
            dealt, names = _by_field(rest, labels, clients, field or "")
    empty = tuple(name for name, its in zip(names, dealt, strict=True) if not its)
    shares = {name: sorted(its) for name, its in zip(names, dealt, strict=True) if its}
    if not shares:
        raise FedgroveError(f"{source}: {len(records)} records are too few", "lower --clients or --heldout")

    title = _plain(out.name) or "split"
    how = {
        "source": source.name,
        "by": by,
        "field": field,
        "alpha": alpha if by in ("dirichlet", "size") else None,
        "seed": seed,
    }
    with atomic_folder(out) as partial:
        for name, its in shares.items():
            _write(partial / f"{name}.jsonl", (records[i] for i in its))
        if aside:
            _write(partial / f"{HELD_OUT}.jsonl", (records[i] for i in sorted(order[:aside])))
        (partial / "job.toml").write_text(_job(title, list(shares), text, bool(aside), how, model), encoding="utf-8")
        if out.is_dir():
            out.rmdir()  # it is empty
    holdings = tuple(
        Holding(name, len(its), sum(_characters(records[i]) for i in its), dict(Counter(labels[i] for i in its if labels)))
        for name, its in shares.items()
    )
    return Split(out, holdings, aside, empty)


def _read(source: Path, field: str | None, text: str | None) -> tuple[list[dict[str, Any]], list[str]]:
    """Every record, and its value of the field; of plain text the passages, as records with the field ``text``."""
    records: list[dict[str, Any]] = []
    labels: list[str] = []
    try:
        needed = template_fields(text or DEFAULT_TEMPLATE)
    except ValueError as fault:
        raise FedgroveError(f"--text: {fault}") from fault
    for where, record in read_records(source):
        record = {"text": record} if isinstance(record, str) else record
        missing = [name for name in needed if name not in record]
        if missing:
            raise FedgroveError(
                f"{where}: no field '{missing[0]}'",
                f"it has: {', '.join(map(str, record))}. "
                "Say how a record becomes text, such as --text '{question} {answer}'",
            )
        if field is not None and field not in record:
            raise FedgroveError(f"{where}: no field '{field}'", f"it has: {', '.join(map(str, record))}. Mend --field")
        records.append(record)
        if field is not None:
            labels.append(str(record[field]))
    return records, labels


def _by_sizes(order: Sequence[int], shares: Iterable[float]) -> list[list[int]]:
    """Cuts a sequence by these shares of its length, rounded so that nothing is lost."""
    ends = [round(float(end) * len(order)) for end in itertools.accumulate(shares)]
    ends[-1] = len(order)
    return [list(order[start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _by_dirichlet(
    order: Sequence[int], labels: Sequence[str], clients: int, alpha: float, rng: np.random.Generator
) -> list[list[int]]:
    dealt: list[list[int]] = [[] for _ in range(clients)]
    for label in sorted(set(labels)):
        having = [i for i in order if labels[i] == label]
        for its, more in zip(dealt, _by_sizes(having, rng.dirichlet([alpha] * clients)), strict=True):
            its += more
    return dealt


def _by_field(
    order: Sequence[int], labels: Sequence[str], clients: int | None, field: str
) -> tuple[list[list[int]], list[str]]:
    counts = Counter(labels[i] for i in order)
    values = sorted(counts, key=lambda value: (-counts[value], value))
    if clients is None:
        clients = len(values)
    if clients > len(values):
        raise FedgroveError(f"--clients {clients}: the field '{field}' has {len(values)} values", f"give {len(values)} at most")
    given: list[list[str]] = [[] for _ in range(clients)]
    for value in values:
        min(given, key=lambda its: sum(counts[one] for one in its)).append(value)
    names = [f"client-{i + 1}" for i in range(clients)]
    if all(len(its) == 1 for its in given):
        spoken = [_plain(its[0]) for its in given]
        if all(spoken) and len(set(map(str.lower, spoken))) == len(spoken) and HELD_OUT not in spoken:
            names = spoken
    return [[i for i in order if labels[i] in its] for its in given], names


def _plain(value: str) -> str:
    """As a name in a job file may be written; empty where nothing is left."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", value).strip("-._")[:64]


def _write(file: Path, records: Iterable[dict[str, Any]]) -> None:
    with file.open("w", encoding="utf-8") as opened:
        for record in records:
            opened.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")


def _characters(record: dict[str, Any]) -> int:
    return sum(len(value) for value in record.values() if isinstance(value, str))


def _job(title: str, names: Sequence[str], text: str | None, held_out: bool, how: dict[str, Any], model: str) -> str:
    """A job of the clients, to be edited."""
    options = ", ".join(f"{key} {value}" for key, value in how.items() if value is not None)
    template = f"text = {json.dumps(text, ensure_ascii=False)}\n" if text else ""
    path = json.dumps(model, ensure_ascii=False)
    lines = [
        f"# A federation to try: {options}. Every key is explained in what `fedgrove init` writes.\n",
        "# Look before you run:   fedgrove doctor job.toml; fedgrove plan job.toml\n",
        f'\nname = "{title}"\n\n[model]\n',
        f"path = {path:<26} # a Hugging Face directory with safetensors, or the id of a model on the hub\n",
    ]
    lines += [f'\n[[clients]]\nname = "{name}"\ndata = "{name}.jsonl"\n{template}' for name in names]
    lines += [
        '\n[[stages]]\nkind     = "prune"\npruner   = "sparsegpt"             # or wanda, magnitude\n',
        "sparsity = 0.5\nsamples  = 16                      # calibration windows of each client\n",
        "length   = 128                     # tokens of each: clients with little text need short ones\n",
    ]
    if held_out:
        spoken = f", text = {json.dumps(text, ensure_ascii=False)}" if text else ""
        lines.append(f'\n[evaluate]\ndata   = [{{ name = "{HELD_OUT}", path = "{HELD_OUT}.jsonl"{spoken} }}]\nlength = 128\n')
    return "".join(lines)
