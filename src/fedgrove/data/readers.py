"""One reader for each kind of file: a file's records, one after the other, with the place that an error names.

Memory does not grow with the file: it holds a few records, or a passage of a plain text.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from fedgrove.data.tally import Tally
from fedgrove.data.template import owners
from fedgrove.errors import FedgroveError, first_line

Record = dict[str, Any]
Records = Iterator[tuple[str, Record | str]]

PASSAGE = 4096  # characters; a plain text file is cut into passages of about this size, at ends of lines
CHUNK = 2**20  # characters of a JSON array that are read at once
LONGEST_FIELD = 2**31 - 1  # characters of a field of a CSV file: the most that csv accepts on every platform
MANY_LINES = 300  # of one field of a CSV file: more are looked at, because they may be records behind an open quote
SEPARATORS = ",;\t|"
PACKED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def read_text(path: Path, fields: Sequence[str], tally: Tally) -> Records:
    """The passages of a plain text file, which together are the file.

    A passage ends at the first line break after ``PASSAGE`` characters, in a longer line at the last white space before twice
    as many, and in a text without white space there.
    """
    passage = ""
    with _open(path) as file:
        while chunk := file.read(PASSAGE):
            if "\0" in chunk:
                raise FedgroveError(f"{path}: it holds zero bytes, so it is no text", "convert it to UTF-8 text")
            passage += chunk
            while (end := _end_of_passage(passage)) is not None:
                yield str(path), passage[:end]
                passage = passage[end:]
    if passage.strip():
        yield str(path), passage


def _end_of_passage(text: str) -> int | None:
    """Where the first passage of a text ends; None if more of the text has to be read to know."""
    line_break = text.find("\n", PASSAGE - 1, 2 * PASSAGE)
    if line_break >= 0:
        return line_break + 1
    if len(text) < 2 * PASSAGE:
        return None
    space = max((match.start() for match in re.finditer(r"\s", text[1 : 2 * PASSAGE])), default=-1) + 1
    return space or 2 * PASSAGE  # before the white space, as tokenizers join it to the word that follows


def read_json(path: Path, fields: Sequence[str], tally: Tally) -> Records:
    """The objects of a file with one JSON object a line, or of one JSON array."""
    with _open(path) as file:
        begin = file.read(1)
        while begin and begin.isspace():
            begin = file.read(1)
        if begin == "[":
            yield from _read_array(path, file)
            return
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:  # ValueError: Python refuses numbers of 4,300 digits
                if isinstance(error, json.JSONDecodeError) and error.pos >= len(line.rstrip()) and _goes_on(file):
                    raise FedgroveError(
                        f"{where}: the object that begins here goes on in the next line",
                        "write one object a line, or all of them in one array",
                    ) from error
                reason = error.msg if isinstance(error, json.JSONDecodeError) else first_line(error)
                raise FedgroveError(f"{where}: not JSON ({reason})", "one object a line is expected, or one array") from error
            yield where, _object(record, where)


def _goes_on(file: Iterable[str]) -> bool:
    return any(line.strip() for line in itertools.islice(file, 3))


def _object(record: Any, where: str) -> Record:
    if not isinstance(record, dict):
        raise FedgroveError(f"{where}: not a JSON object", "one object a record is expected")
    return record


def _read_array(path: Path, file: TextIO) -> Records:
    """The elements of an array whose opening bracket has been read, one at a time."""
    decoder = json.JSONDecoder()
    where = f"{path}, record 1"

    def skip_space(text: str, position: int) -> tuple[str, int]:
        while not (rest := text[position : position + 1]) or rest.isspace():
            position += 1
            if position >= len(text):
                text, position = file.read(CHUNK), 0
                if not text:
                    raise FedgroveError(f"{where}: the file ends inside its array", "copy it again")
        return text, position

    text, position = skip_space("", 0)
    for number in itertools.count(1):
        if number == 1 and text[position] == "]":
            break
        where = f"{path}, record {number}"
        while True:
            try:
                record, position = decoder.raw_decode(text, position)
                break
            except (ValueError, RecursionError) as error:
                more = file.read(max(CHUNK, len(text) - position)) if isinstance(error, json.JSONDecodeError) else ""
                if not more:
                    reason = error.msg if isinstance(error, json.JSONDecodeError) else first_line(error)
                    raise FedgroveError(f"{where}: not JSON ({reason})", "correct it") from error
                text, position = text[position:] + more, 0
        yield where, _object(record, where)
        text, position = skip_space(text, position)
        if text[position] == "]":
            break
        if text[position] != ",":
            raise FedgroveError(f"{where}: not JSON (no comma after it)", "correct it")
        text, position = skip_space(text, position + 1)
    if (text[position + 1 :] + file.read(CHUNK)).strip():
        raise FedgroveError(f"{path}: text follows the end of its array", "write one array, or one object a line")


def read_csv(path: Path, fields: Sequence[str], tally: Tally) -> Records:
    """The rows of a CSV or TSV file under the names of its first line.

    The separator is a tab in files named as such, or what a first line ``sep=X`` says, as spreadsheets write it; otherwise
    it is guessed from the first rows.
    """
    csv.field_size_limit(LONGEST_FIELD)  # by default a field longer than 131,072 characters is an error, and texts are longer
    with _open(path, newline="") as file:
        head = [*itertools.islice(file, 64)]
        lines = itertools.chain(head, file)
        skipped = 0
        declared = re.fullmatch(r'"?sep=(.)"?\s*', head[0], re.IGNORECASE) if head else None
        if declared:
            separator, skipped = declared[1], len([next(lines)])
        elif kind_suffix(path) in (".tsv", ".tab"):
            separator = "\t"
        else:
            separator = _guess_separator(head)
            name = {"\t": "a tab"}.get(separator, f"'{separator}'")
            tally.guessed.append(f"{path.name}: {name} separates its fields")
        reader = csv.DictReader(_without_zeros(lines, path), delimiter=separator, strict=True)
        begin = 1 + skipped
        try:
            for name, number in Counter(reader.fieldnames or ()).items():
                if name and number > 1:
                    raise FedgroveError(f"{path}, line {begin}: {number} columns are named {name!r}", "rename all but one")
            begin = reader.line_num + skipped + 1
            for record in reader:
                where = f"{path}, line {reader.line_num + skipped}"
                if None in record:
                    raise FedgroveError(
                        f"{where}: more fields than the first line names",
                        f"write text that holds {separator!r} in double quotes",
                    )
                if any(_holds_rows(value, separator, len(record)) for value in record.values()):
                    raise _unclosed(path, begin)
                yield where, record
                begin = reader.line_num + skipped + 1
        except csv.Error as error:
            if "unexpected end" in str(error):
                raise _unclosed(path, begin) from error
            raise FedgroveError(
                f"{path}, line {begin}: not CSV in the record that begins here ({error})",
                "write text that holds a double quote in double quotes, and two for each one that belongs to the text",
            ) from error


def _guess_separator(head: Sequence[str]) -> str:
    """The separator by which most of the first rows have as many fields as the first one, which has as many as possible."""

    def fit(separator: str) -> tuple[bool, float, int]:
        rows: list[list[str]] = []
        with suppress(csv.Error):  # a row goes on beyond the first lines, or is no CSV with this separator
            rows.extend(csv.reader(head, delimiter=separator, strict=True))
        lengths = [len(row) for row in rows if row]
        if not lengths:
            return False, 0.0, 0
        return lengths[0] > 1, sum(length == lengths[0] for length in lengths) / len(lengths), lengths[0]

    return max(SEPARATORS, key=fit)


def _holds_rows(value: str | None, separator: str, columns: int) -> bool:
    """Whether a field is so long, and its lines so alike, that it is a text with rows behind a quote that was left open."""
    if value is None or columns < 2 or value.count("\n") <= MANY_LINES:
        return False
    lines = value.split("\n")[1:-1]
    return sum(line.count(separator) == columns - 1 for line in lines) > 0.9 * len(lines)


def _unclosed(path: Path, line: int) -> FedgroveError:
    return FedgroveError(
        f"{path}, line {line}: the record that begins here opens a double quote and never closes it",
        "close it, or write two for one that belongs to the text",
    )


def _without_zeros(lines: Iterable[str], path: Path) -> Iterator[str]:
    for line in lines:
        if "\0" in line:
            raise FedgroveError(f"{path}: it holds zero bytes, so it is no text", "convert it to UTF-8 text")
        yield line


def read_parquet(path: Path, fields: Sequence[str], tally: Tally) -> Records:
    """The rows of a parquet file; only the columns of ``fields`` are read, so that sound and pictures stay where they are."""
    from pyarrow import parquet  # slow to import, and most jobs read files that need no library

    with parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        for name, number in Counter(names).items():
            if number > 1:
                raise FedgroveError(f"{path}: {number} columns are named {name!r}", "rename all but one")
        rows = itertools.chain.from_iterable(
            batch.to_pylist() for batch in file.iter_batches(batch_size=64, columns=columns(fields, names))
        )
        yield from ((f"{path}, record {number}", row) for number, row in enumerate(rows, 1))


def columns(fields: Sequence[str], names: Sequence[str]) -> list[str] | None:
    """The columns of a table that hold the fields; None, which stands for all, where none are named or one is missing.

    A missing field is reported by whoever looks it up, with the names of all columns.
    """
    held = [owners(field, names) for field in fields]
    return list(dict.fromkeys(itertools.chain.from_iterable(held))) if fields and all(held) else None


def kind_suffix(path: Path) -> str:
    """The ending that says what kind a file is, in lower case: of ``a.JSONL.gz`` it is ``.jsonl``."""
    return Path(path.stem if path.suffix.lower() in PACKED else path.name).suffix.lower()


def _open(path: Path, newline: str | None = None) -> TextIO:
    """A file as text, unpacked if its name says that it is packed."""
    opened = PACKED.get(path.suffix.lower(), io.open)
    file: TextIO = opened(path, "rt", encoding="utf-8-sig", newline=newline)
    return file


READERS: dict[str, Callable[[Path, Sequence[str], Tally], Records]] = {
    **dict.fromkeys((".jsonl", ".json", ".ndjson"), read_json),
    **dict.fromkeys((".csv", ".tsv", ".tab"), read_csv),
    ".parquet": read_parquet,
    **dict.fromkeys((".txt", ".text", ".md"), read_text),
}
