"""Private text: files to records to texts to windows of tokens. Nothing here leaves the client that calls it.

A window is ``length`` consecutive tokens of texts joined by the tokenizer's end-of-text token: packed, never padded,
with no other special tokens.
"""

from __future__ import annotations

import csv
import heapq
import json
import random
import re
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fedgrove.errors import FedgroveError

DEFAULT_TEMPLATE = "{text}"
CHARACTERS = 16  # of text held for each token that is wanted
PASSAGE = 4096  # characters; a plain text file is cut into passages of about this size, at ends of lines
SUFFIXES = {".jsonl": "jsonl", ".json": "jsonl", ".csv": "csv", ".parquet": "parquet", ".txt": "text", ".md": "text"}


def template_fields(template: str) -> list[str]:
    """The field names of a template such as ``"{question}\\n{answer}"``.

    Raises:
        ValueError: it is no such template; fields are plain names, so that no template can reach into an object.
    """
    fields = []
    for _, field, spec, conversion in string.Formatter().parse(template):
        if field is None:
            continue
        if spec or conversion or not re.fullmatch(r"[^\W\d][\w \-]*", field):
            raise ValueError(f"{{{field}}} is no plain field name")
        fields.append(field)
    if not fields:
        raise ValueError("it names no field; write for instance {text}")
    return fields


def read_texts(path: Path, template: str | None = None) -> Iterator[str]:
    """The texts of a file: of each record by the template, or the passages of a plain text file, in file order.

    Args:
        path: .jsonl, .csv, .parquet, .txt or .md.
        template: how a record becomes text; default ``"{text}"``. A plain text file has no fields and needs none.

    Raises:
        FedgroveError: the file is missing or damaged, or a record lacks a field; names file and line.
    """
    for (text,) in read_fields(path, {"text": template or DEFAULT_TEMPLATE}):
        if text.strip():
            yield text


def read_fields(path: Path, templates: Mapping[str, str]) -> Iterator[tuple[str, ...]]:
    """Each record of a file by several templates at once; see :func:`read_texts`.

    Args:
        path: likewise.
        templates: the job's key -> the template. A plain text file is read by the key ``text`` alone.
    """
    kind = SUFFIXES.get(path.suffix.lower())
    if not path.is_file():
        raise FedgroveError(f"{path}: no such file")
    if kind is None:
        raise FedgroveError(f"{path}: unknown kind of file; use {', '.join(sorted(SUFFIXES))}")
    try:
        if kind == "text":
            if "text" not in templates:
                raise FedgroveError(f"{path}: a plain text file has no fields; leave out {' and '.join(templates)}")
            yield from ((passage,) for passage in _passages(path))
            return
        fields = {key: template_fields(template) for key, template in templates.items()}
        for where, record in _records(path, kind):
            for key, names in fields.items():
                missing = [name for name in names if name not in record]
                if missing:
                    have = ", ".join(map(str, record)) or "no field"
                    raise FedgroveError(
                        f"{path}, {where}: no field '{missing[0]}'; it has: {have}. Mend the template (key {key})"
                    )
            yield tuple(
                template.format_map({name: "" if record[name] is None else record[name] for name in fields[key]})
                for key, template in templates.items()
            )
    except UnicodeDecodeError as fault:
        raise FedgroveError(f"{path}: not UTF-8 text (byte {fault.start}); convert it") from fault


def _records(path: Path, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each record with the place that an error names."""
    if kind == "jsonl":
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as fault:
                    raise FedgroveError(
                        f"{path}, line {number}: not JSON ({fault.msg}); one object a line is expected"
                    ) from fault
                if not isinstance(record, dict):
                    raise FedgroveError(f"{path}, line {number}: not a JSON object; one object a line is expected")
                yield f"line {number}", record
    elif kind == "csv":
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            try:
                for record in reader:
                    yield f"line {reader.line_num}", record
            except csv.Error as fault:
                raise FedgroveError(f"{path}, line {reader.line_num}: not CSV ({fault})") from fault
    else:
        import datasets

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what is wrong is said below, in one line
        try:  # streaming, because datasets would otherwise keep a copy of private text in its cache
            table = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
            for number, record in enumerate(table, 1):
                yield f"record {number}", record
        except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as fault:
            raise FedgroveError(f"{path}: not a parquet file that can be read ({type(fault).__name__})") from fault


def _passages(path: Path) -> Iterator[str]:
    passage: list[str] = []
    size = 0
    with path.open(encoding="utf-8-sig") as file:
        for line in file:
            passage.append(line)
            size += len(line)
            if size >= PASSAGE:
                yield "".join(passage)
                passage, size = [], 0
    if "".join(passage).strip():
        yield "".join(passage)


def calibration_windows(
    paths: Sequence[Path], template: str | None, tokenizer: PreTrainedTokenizerBase, samples: int, length: int, seed: str
) -> Tensor:
    """Windows to calibrate on, drawn from all files alike.

    Records are drawn by the seed and packed until there is enough: a large file is read through, but neither held in
    memory nor tokenised whole.

    Args:
        samples: number of windows.
        length: tokens per window.
        seed: any string; the same one draws the same windows.

    Returns:
        (samples, length) int64 token ids.

    Raises:
        FedgroveError: a file cannot be read, or there are too few tokens.
    """
    parts = [samples * (i + 1) // len(paths) - samples * i // len(paths) for i in range(len(paths))]
    windows = []
    for path, part in zip(paths, parts, strict=True):
        if part == 0:  # there are more files than windows
            continue
        ids: list[int] = []
        for budget in (CHARACTERS * part * length, None):  # a language with longer tokens needs the second, unbounded try
            texts = _draw(read_texts(path, template), random.Random(f"{seed}/{path.name}"), budget)
            ids = []
            for text in texts:
                ids += _encode(text, tokenizer)
                if len(ids) >= part * length:
                    break
            if len(ids) >= part * length:
                break
        else:
            if not ids:
                raise FedgroveError(f"{path}: it holds no text")
            raise FedgroveError(
                f"{path}: {len(ids)} tokens, but {part} windows of {length} need {part * length}; "
                "lower samples or length, or add text"
            )
        windows.append(torch.tensor(ids[: part * length], dtype=torch.int64).view(part, length))
    return torch.cat(windows)


IGNORED = -100  # the label of a token that is not to be learnt


def training_windows(
    paths: Sequence[Path], templates: Mapping[str, str], tokenizer: PreTrainedTokenizerBase, length: int
) -> tuple[Tensor, Tensor]:
    """All of a client's text, packed; the tokens that do not fill a window at the end are left out.

    Args:
        templates: ``text``, of which every token is learnt, or ``prompt`` and ``answer``, of which the answer is.
        length: tokens per window.

    Returns:
        (windows, length) int64 token ids, and labels: the same, but ``IGNORED`` on prompts.

    Raises:
        FedgroveError: a file cannot be read or lacks a field, or there is not one window of text.
    """
    ids: list[int] = []
    labels: list[int] = []
    for path in paths:
        for parts in read_fields(path, templates):
            if not parts[-1].strip():
                continue
            prompt = [token for part in parts[:-1] for token in _encode(part, tokenizer, end=False)]
            answer = _encode(parts[-1], tokenizer)
            ids += prompt + answer
            labels += [IGNORED] * len(prompt) + answer
    number = len(ids) // length
    if not number:
        raise FedgroveError(f"{paths[0]}: {len(ids)} tokens, but one window needs {length}; lower length, or add text")
    return (
        torch.tensor(ids[: number * length], dtype=torch.int64).view(number, length),
        torch.tensor(labels[: number * length], dtype=torch.int64).view(number, length),
    )


def evaluation_windows(
    path: Path, template: str | None, tokenizer: PreTrainedTokenizerBase, length: int, limit: int | None = None
) -> list[Tensor]:
    """A file's text from its beginning, cut into consecutive windows that do not overlap; the last may be shorter.

    Args:
        length: tokens per window.
        limit: at most so many windows.

    Returns:
        Tensors (1, ≤ length) of token ids, each of at least two tokens.

    Raises:
        FedgroveError: the file cannot be read or holds fewer than two tokens.
    """
    plain = SUFFIXES.get(path.suffix.lower()) == "text"
    texts = read_texts(path, template)
    if plain:
        texts = iter(["".join(texts)])  # tokenised in one piece: the standard definition
    ids: list[int] = []
    for text in texts:
        ids += _encode(text, tokenizer, end=not plain)
        if limit is not None and len(ids) >= limit * length:
            ids = ids[: limit * length]
            break
    windows = [torch.tensor([ids[i : i + length]]) for i in range(0, len(ids), length) if len(ids[i : i + length]) > 1]
    if not windows:
        raise FedgroveError(f"{path}: it holds fewer than two tokens of text")
    return windows


def _draw(texts: Iterable[str], rng: random.Random, budget: int | None) -> list[str]:
    """The texts in random order, cut off where they exceed ``budget`` characters; no more than that is ever held."""
    drawn: list[tuple[float, int, str]] = []  # a heap, the last of the order on top
    held = 0
    for number, text in enumerate(texts):
        heapq.heappush(drawn, (-rng.random(), number, text))
        held += len(text)
        while budget is not None and held - len(drawn[0][2]) >= budget:
            held -= len(heapq.heappop(drawn)[2])
    return [text for _, _, text in sorted(drawn, reverse=True)]


def _encode(text: str, tokenizer: PreTrainedTokenizerBase, end: bool = True) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if end and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return ids
