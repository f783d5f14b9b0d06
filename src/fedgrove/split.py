"""Distributes one text over several clients, to simulate a federation; a seed makes the distribution reproducible.

The distributions are those of the literature on heterogeneous clients; the names of the options are ours.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fedgrove.data.sources import DEFAULT_TEMPLATE, describe_fields, read_records, suggest_template
from fedgrove.data.tally import Tally
from fedgrove.data.template import MISSING, look_up, template_fields
from fedgrove.data.values import as_json, holds_bytes, text_of
from fedgrove.errors import FedgroveError
from fedgrove.files import atomic_folder
from fedgrove.job.units import as_name

Way = Literal["iid", "dirichlet", "field", "size"]
HELD_OUT = "heldout"


@dataclasses.dataclass(frozen=True)
class Holding:
    """One client's part of the records.

    Attributes:
        name: of the client.
        records: number of records.
        characters: number of characters in their text fields.
        labels: number of records by the value of the field, if a field was given.
    """

    name: str
    records: int
    characters: int
    labels: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Split:
    """The result of :func:`split`.

    Attributes:
        folder: contains the clients' files, and ``job.toml``, a job of these clients.
        holdings: of the clients, in order.
        held_out: number of records held out for evaluation, of all clients' kinds of text.
        held_out_each: number of records held out of each client's own part, by name; empty unless requested.
        empty: names of clients that were left out because they would have got no records.
    """

    folder: Path
    holdings: tuple[Holding, ...]
    held_out: int
    empty: tuple[str, ...]
    held_out_each: dict[str, int] = dataclasses.field(default_factory=dict)


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
    held_out_each: float = 0.0,
    seed: int = 0,
    model: str = "path/to/model",
) -> Split:
    """Distributes the records of a source over clients; writes a file per client, the held-out records, and a job file.

    Args:
        source: see :mod:`fedgrove.data.sources`; plain text is split by passages.
        out: a folder that does not exist yet, or is empty.
        by: "iid": at random, as evenly as possible. "dirichlet": each value of ``field`` is distributed over the clients in
            proportions from a Dirichlet distribution (Yurochkin et al. 2019); with a small ``alpha``, each client has few
            values. "size": at random, with the clients' sizes from a Dirichlet distribution. "field": all records with the same
            value of ``field`` go to one client, the most frequent value first, each to the client with the fewest records.
        clients: their number; None, for "field" only: one per value.
        field: the field for "dirichlet" and "field".
        alpha: the parameter of the Dirichlet distribution, above 0; smaller: the clients differ more.
        text: the template that turns a record into text, for the job file.
        held_out: the fraction of the records to hold out, drawn at random before the records are distributed.
        held_out_each: the fraction of each client's own records to hold out, to measure what a client gets on its own kind of
            text. They have the same shares of the values of ``field`` as the rest, as far as whole records allow; a client
            with one record keeps it.
        seed: of the random distribution.
        model: the model directory or hub id for the job file.

    Raises:
        FedgroveError: an argument does not match the others or the source.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FedgroveError(f"--out {out}: it exists already", "name another folder")
    if by in ("dirichlet", "field") and not field:
        raise FedgroveError(f"--by {by}: name a field, such as --field label")
    if clients is None and by != "field":
        raise FedgroveError(f"--by {by}: give the number of clients, such as --clients 8")
    if clients is not None and clients < 1:
        raise FedgroveError("--clients: must be at least 1")
    if not 0 <= held_out < 1:
        raise FedgroveError("--heldout: must be a fraction of the records, such as 0.1")
    if not 0 <= held_out_each < 1:
        raise FedgroveError("--heldout-each: must be a fraction of each client's records, such as 0.2")
    if not (math.isfinite(alpha) and alpha > 0):
        raise FedgroveError("--alpha: must be a number above 0; small numbers make the clients differ more")
    records, labels = _read(source, field, text)
    rng = np.random.default_rng(seed)
    order = [int(i) for i in rng.permutation(len(records))]
    num_held_out = math.ceil(held_out * len(records))
    rest = order[num_held_out:]
    names = [f"client-{i + 1}" for i in range(clients or 0)]
    match by:
        case "iid":
            parts = [rest[i :: len(names)] for i in range(len(names))]
        case "size":
            parts = _by_sizes(rest, rng.dirichlet([alpha] * len(names)))
        case "dirichlet":
            parts = by_dirichlet(rest, labels, len(names), alpha, rng)
        case "field":
            parts, names = _by_field(rest, labels, clients, field or "")
    empty = tuple(name for name, part in zip(names, parts, strict=True) if not part)
    dealt = {name: part for name, part in zip(names, parts, strict=True) if part}
    if not dealt:
        raise FedgroveError(f"{source}: {len(records)} records are too few", "lower --clients or --heldout")
    own = {name: _hold_out(part, labels, held_out_each, rng) for name, part in dealt.items()}
    indices = {name: sorted(set(part) - set(own[name])) for name, part in dealt.items()}
    own = {name: part for name, part in own.items() if part}

    title = as_name(out.name) or "split"
    options = {
        "source": source.name,
        "by": by,
        "field": field,
        "alpha": alpha if by in ("dirichlet", "size") else None,
        "seed": seed,
        "heldout-each": held_out_each or None,
    }
    with atomic_folder(out) as partial:
        for name, part in indices.items():
            _write(partial / f"{name}.jsonl", (records[i] for i in part))
        if num_held_out:
            _write(partial / f"{HELD_OUT}.jsonl", (records[i] for i in sorted(order[:num_held_out])))
        for name, part in own.items():
            (partial / HELD_OUT).mkdir(exist_ok=True)
            _write(partial / HELD_OUT / f"{name}.jsonl", (records[i] for i in part))
        tests = {HELD_OUT: f"{HELD_OUT}.jsonl"} if num_held_out else {}
        tests |= {name: f"{HELD_OUT}/{name}.jsonl" for name in own}
        job = _job(title, list(indices), text, tests, options, model)
        (partial / "job.toml").write_text(job, encoding="utf-8")
        if out.is_dir():
            out.rmdir()  # checked to be empty above
    holdings = tuple(
        Holding(name, len(part), sum(_characters(records[i]) for i in part), dict(Counter(labels[i] for i in part if labels)))
        for name, part in indices.items()
    )
    return Split(out, holdings, num_held_out, empty, {name: len(part) for name, part in own.items()})


def _read(source: Path, field: str | None, text: str | None) -> tuple[list[dict[str, Any]], list[str]]:
    """All records, and their values of the field. The passages of plain text become records with the field ``text``.

    Fields that hold bytes, such as sound and pictures, are left out.
    """
    records: list[dict[str, Any]] = []
    labels: list[str] = []
    try:
        needed = template_fields(text or DEFAULT_TEMPLATE)
    except ValueError as error:
        raise FedgroveError(f"--text: {error}") from error
    tally = Tally()
    for where, record in read_records(source):
        record = {"text": record} if isinstance(record, str) else record
        for option, name in [*(("--text", name) for name in needed), *([("--field", field)] if field is not None else [])]:
            if look_up(record, name) is MISSING:
                example = suggest_template(record) if option == "--text" else None
                remedy = f"{describe_fields(record)}. Fix {option}{f', such as {shlex.quote(example)}' if example else ''}"
                raise FedgroveError(f"{where}: no field {name!r}", remedy)
        if field is not None:
            labels.append(text_of(look_up(record, field), where, field, tally))
        records.append({name: as_json(value) for name, value in record.items() if not holds_bytes(value)})
    return records, labels


def _by_sizes(order: Sequence[int], fractions: Iterable[float]) -> list[list[int]]:
    """Divides a sequence by fractions of its length, rounded so that every element is in one part."""
    ends = [round(float(end) * len(order)) for end in itertools.accumulate(fractions)]
    ends[-1] = len(order)
    return [list(order[start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def by_dirichlet(
    order: Sequence[int], labels: Sequence[str], clients: int, alpha: float, rng: np.random.Generator
) -> list[list[int]]:
    """Indices for each client: those of each label are divided by shares drawn from a Dirichlet distribution.

    Args:
        order: the indices to deal.
        labels: of each index.
        alpha: the smaller, the more unequal; every label is divided anew. A client may get none.
    """
    parts: list[list[int]] = [[] for _ in range(clients)]
    for label in sorted(set(labels)):
        with_label = [i for i in order if labels[i] == label]
        for part, more in zip(parts, _by_sizes(with_label, rng.dirichlet([alpha] * clients)), strict=True):
            part += more
    return parts


def _by_field(
    order: Sequence[int], labels: Sequence[str], clients: int | None, field: str
) -> tuple[list[list[int]], list[str]]:
    counts = Counter(labels[i] for i in order)
    values = sorted(counts, key=lambda value: (-counts[value], value))
    if clients is None:
        clients = len(values)
    if clients > len(values):
        raise FedgroveError(f"--clients {clients}: the field '{field}' has {len(values)} values", f"give {len(values)} at most")
    assigned: list[list[str]] = [[] for _ in range(clients)]
    for value in values:
        min(assigned, key=lambda group: sum(counts[label] for label in group)).append(value)
    names = [f"client-{i + 1}" for i in range(clients)]
    if all(len(group) == 1 for group in assigned):
        plain = [as_name(group[0]) for group in assigned]
        if all(plain) and len(set(map(str.lower, plain))) == len(plain) and HELD_OUT not in plain:
            names = plain
    return [[i for i in order if labels[i] in group] for group in assigned], names


def _hold_out(part: Sequence[int], labels: Sequence[str], fraction: float, rng: np.random.Generator) -> list[int]:
    """Records of one client's part, evenly spread over its labels and drawn at random within each; never all of them.

    Of records in random order, sorted by label, every so manieth is taken: each label gives its share, rounded up or down.
    """
    number = min(round(fraction * len(part)), len(part) - 1)
    if not number:
        return []
    order = [part[i] for i in rng.permutation(len(part))]
    if labels:
        order.sort(key=lambda i: labels[i])  # stable: the order within a label stays random
    first = rng.random()  # without it a label's share would always be rounded the same way
    return sorted(order[math.floor((first + i) * len(part) / number)] for i in range(number))


def _write(file: Path, records: Iterable[dict[str, Any]]) -> None:
    with file.open("w", encoding="utf-8") as stream:
        for record in records:
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")


def _characters(record: dict[str, Any]) -> int:
    return sum(len(value) for value in record.values() if isinstance(value, str))


def _job(title: str, names: Sequence[str], text: str | None, tests: dict[str, str], options: dict[str, Any], model: str) -> str:
    """The text of a job file with the clients, for the user to edit; ``tests``: the held-out files by name."""
    summary = ", ".join(f"{key} {value}" for key, value in options.items() if value is not None)
    template = f"text = {json.dumps(text, ensure_ascii=False)}\n" if text else ""
    path = json.dumps(model, ensure_ascii=False)
    lines = [
        f"# A simulated federation: {summary}. The file that `fedgrove init` writes explains the keys.\n",
        "# Before you run it:   fedgrove doctor job.toml; fedgrove plan job.toml\n",
        f'\nname = "{title}"\n\n[model]\n',
        f"path = {path:<26} # a Hugging Face directory with safetensors, or the id of a model on the hub\n",
    ]
    lines += [f'\n[[clients]]\nname = "{name}"\ndata = "{name}.jsonl"\n{template}' for name in names]
    lines += [
        '\n[[stages]]\nkind     = "prune"\npruner   = "sparsegpt"             # or wanda, magnitude\n',
        "sparsity = 0.5\nsamples  = 16                      # calibration windows of each client\n",
        "length   = 128                     # tokens of each: clients with little text need short ones\n",
    ]
    if tests:
        text_key = f", text = {json.dumps(text, ensure_ascii=False)}" if text else ""
        rows = [f'{{ name = "{name}", path = "{path}"{text_key} }}' for name, path in tests.items()]
        data = f"[{rows[0]}]" if len(rows) == 1 else "".join(["[\n", *(f"  {row},\n" for row in rows), "]"])
        lines.append(f"\n[evaluate]\ndata   = {data}\nlength = 128\n")
    return "".join(lines)
