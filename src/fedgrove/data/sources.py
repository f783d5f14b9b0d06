"""Sources of private text: what a job's ``data`` may name, read record by record.

A source is a file, a folder of files, a data set that was saved by ``save_to_disk``, or one of the Hugging Face hub:
``hub:OWNER/NAME``, ``hub:OWNER/NAME:SPLIT`` or ``hub:OWNER/NAME:CONFIGURATION:SPLIT``. A record becomes text by a template of
its fields, or, where a field holds a list of messages, by the model's own chat template.
"""

from __future__ import annotations

import csv
import glob
import json
import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedgrove.data.chat import Chat, as_text, is_messages
from fedgrove.errors import FedgroveError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_TEMPLATE = "{text}"
PASSAGE = 4096  # characters; a plain text file is cut into passages of about this size, at ends of lines
LONGEST_FIELD = 2**31 - 1  # characters of a field of a CSV file: the most that csv accepts on every platform
HUB = "hub:"
SUFFIXES = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
    ".md": "text",
}


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


def read_texts(path: Path, template: str | None = None, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[str]:
    """The texts of a source: of each record by the template, or the passages of plain text files, in order.

    Args:
        path: see the module.
        template: how a record becomes text; default ``"{text}"``. A plain text file has no fields and needs none.
        tokenizer: writes messages; where there are none it is not needed.

    Raises:
        FedgroveError: a file is missing or damaged, or a record lacks a field; names file and line.
    """
    for (part,) in read_fields(path, {"text": template or DEFAULT_TEMPLATE}):
        text = as_text(part, tokenizer)
        if text.strip():
            yield text


def read_fields(path: Path, templates: Mapping[str, str]) -> Iterator[tuple[str | Chat, ...]]:
    """Each record of a source by several templates at once; see :func:`read_texts`.

    Args:
        path: likewise.
        templates: the job's key -> the template. A plain text file is read by the key ``text`` alone. A template that is one
            field with a list of messages gives a :class:`Chat`.
    """
    fields = {key: template_fields(template) for key, template in templates.items()}
    for where, record in read_records(path):
        if isinstance(record, str):
            if "text" not in templates:
                raise FedgroveError(f"{where}: a plain text file has no fields", f"leave out {' and '.join(templates)}")
            yield (record,)
            continue
        for key, names in fields.items():
            missing = [name for name in names if name not in record]
            if missing:
                have = ", ".join(map(str, record)) or "no field"
                remedy = f"it has: {have}. Mend the template (key {key})"
                if templates[key] == DEFAULT_TEMPLATE and record:
                    remedy += f': say how a record becomes text, such as {key} = "{{{next(iter(record))}}}"'
                raise FedgroveError(f"{where}: no field '{missing[0]}'", remedy)
        yield tuple(_fill(template, fields[key], record, where) for key, template in templates.items())


def _fill(template: str, names: Sequence[str], record: Mapping[str, Any], where: str) -> str | Chat:
    chats = [name for name in names if is_messages(record[name])]
    if not chats:
        return template.format_map({name: "" if record[name] is None else record[name] for name in names})
    if template != f"{{{chats[0]}}}":
        raise FedgroveError(
            f"{where}: the field '{chats[0]}' holds messages", f'its template is "{{{chats[0]}}}" and nothing else'
        )
    return Chat(tuple(record[chats[0]]), where)


def files_of(path: Path) -> list[Path]:
    """The files that a source is made of, in the order in which they are read; of one on the hub: itself.

    Raises:
        FedgroveError: there is no such file or folder, or nothing in it that can be read.
    """
    if is_hub(path) or path.is_file():
        return [path]
    if not path.is_dir():
        raise FedgroveError(f"{path}: no such file or folder")
    if is_saved(path):
        return sorted(file for file in path.rglob("*") if file.is_file())
    names = (file.relative_to(path) for file in path.rglob("*") if file.is_file() and file.suffix.lower() in SUFFIXES)
    files = sorted(path / name for name in names if not any(part.startswith(".") for part in name.parts))
    if not files:
        raise FedgroveError(f"{path}: this folder holds no {', '.join(sorted(SUFFIXES))} file", "name another")
    return files


def facts_of(path: Path) -> list[list[str | int]]:
    """What changes when a source does: names, sizes and times. Of one on the hub only its name is known."""
    if is_hub(path):
        return [[str(path)]]
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files_of(path)]


def is_hub(path: Path) -> bool:
    """Whether a source is a data set of the Hugging Face hub."""
    return str(path).startswith(HUB)


def is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` wrote a folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Every record of a source with the place that an error names; of a plain text file its passages.

    Raises:
        FedgroveError: a file is missing or damaged; names file and line.
    """
    if is_hub(path):
        yield from _read_dataset(
            path,
            _open_hub,
            "not a data set that the hub gives out to you here",
            "check name and split, or fetch it elsewhere and save_to_disk it",
        )
        return
    if path.is_dir() and is_saved(path):
        yield from _read_dataset(path, _open_saved, "not a data set that can be read", "save it again with save_to_disk")
        return
    for file in files_of(path):
        try:
            match SUFFIXES.get(file.suffix.lower()):
                case "text":
                    yield from ((str(file), passage) for passage in _passages(file))
                case "jsonl":
                    yield from _read_jsonl(file)
                case "csv":
                    yield from _read_csv(file)
                case "parquet":
                    yield from _read_dataset(file, _open_parquet, "not a parquet file that can be read")
                case _:
                    raise FedgroveError(f"{file}: unknown kind of file", f"use {', '.join(sorted(SUFFIXES))}")
        except UnicodeDecodeError as error:
            raise FedgroveError(f"{file}: not UTF-8 text (byte {error.start})", "convert it") from error


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except (
                ValueError,
                RecursionError,
            ) as error:  # not only JSONDecodeError: Python refuses numbers of 4,300 digits too
                reason = error.msg if isinstance(error, json.JSONDecodeError) else error
                raise FedgroveError(f"{where}: not JSON ({reason})", "one object a line is expected") from error
            if not isinstance(record, dict):
                raise FedgroveError(f"{where}: not a JSON object", "one object a line is expected")
            yield where, record


def _read_csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(LONGEST_FIELD)  # by default a field longer than 131,072 characters is an error, and texts are longer
    with path.open(encoding="utf-8-sig", newline="") as file:
        separator = "\t"
        if path.suffix.lower() != ".tsv":
            head = re.sub('"[^"]*"', "", file.readline())
            file.seek(0)
            separator = max(",;\t", key=head.count)  # spreadsheets of half of Europe write semicolons
        lines = _Lines(file)
        reader = csv.DictReader(lines, delimiter=separator)
        begin = 1
        try:
            if reader.fieldnames and lines.ended:
                raise _unclosed(path, begin)
            begin = reader.line_num + 1
            for record in reader:
                where = f"{path}, line {reader.line_num}"
                if lines.ended:  # the reader looked for the end of this record, and there was none
                    raise _unclosed(path, begin)
                if None in record:
                    raise FedgroveError(
                        f"{where}: more fields than the first line names",
                        f"write text that holds {separator!r} in double quotes",
                    )
                yield where, record
                begin = reader.line_num + 1
        except csv.Error as error:
            raise FedgroveError(f"{path}, line {reader.line_num}: not CSV ({error})") from error


def _unclosed(path: Path, line: int) -> FedgroveError:
    return FedgroveError(
        f"{path}, line {line}: the record that begins here opens a double quote and never closes it",
        "close it, or write two for one that belongs to the text",
    )


class _Lines:
    """The lines of a file, and whether somebody wanted one more than there are."""

    def __init__(self, file: Iterable[str]):
        self._lines = iter(file)
        self.ended = False

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            return next(self._lines)
        except StopIteration:
            self.ended = True
            raise


def _read_dataset(
    path: Path, opened: Callable[[Path], Iterable[dict[str, Any]]], what: str, remedy: str | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets  # slow to import, and most jobs read files that need no library
    import huggingface_hub

    datasets.disable_progress_bars()
    for library in (datasets.logging, huggingface_hub.logging):
        library.set_verbosity(library.CRITICAL)  # what is wrong is said below, in one line
    try:
        for number, record in enumerate(opened(path), 1):
            yield f"{path}, record {number}", record
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        reason = f"({type(error).__name__})"
        if remedy is None:
            raise FedgroveError(f"{path}: {what} {reason}") from error
        raise FedgroveError(f"{path}: {what}", f"{remedy} {reason}") from error


def _open_parquet(path: Path) -> Iterable[dict[str, Any]]:
    import datasets  # see _read_dataset

    # Streaming, because datasets would otherwise keep a copy of private text in its cache. Escaped, because it would take a
    # name with brackets for a pattern.
    table: Iterable[dict[str, Any]] = datasets.load_dataset(
        "parquet", data_files=glob.escape(str(path)), split="train", streaming=True
    )
    return table


def _open_saved(path: Path) -> Iterable[dict[str, Any]]:
    import datasets  # see _read_dataset

    saved = datasets.load_from_disk(str(path))  # read where it lies
    if isinstance(saved, datasets.DatasetDict):
        if len(saved) > 1:
            raise FedgroveError(
                f"{path}: it has the splits {', '.join(saved)}", f"name the folder of one: {path / next(iter(saved))}"
            )
        saved = next(iter(saved.values()))
    table: Iterable[dict[str, Any]] = saved
    return table


def _open_hub(path: Path) -> Iterable[dict[str, Any]]:
    import datasets  # see _read_dataset

    name, *rest = str(path).removeprefix(HUB).split(":")
    if len(rest) > 2 or not all([name, *rest]):
        raise FedgroveError(f"{path}: write hub:OWNER/NAME, hub:OWNER/NAME:SPLIT or hub:OWNER/NAME:CONFIGURATION:SPLIT")
    configuration, split = [None, *rest][-2:] if rest else (None, "train")
    table: Iterable[dict[str, Any]] = datasets.load_dataset(name, configuration, split=split, streaming=True)
    return table


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
