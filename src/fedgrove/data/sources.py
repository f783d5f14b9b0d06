"""Sources of private text: what a job's ``data`` may name, read record by record.

A source is a file, a folder of files, a data set that was saved by ``save_to_disk``, or one of the Hugging Face hub:
``hub:OWNER/NAME``, ``hub:OWNER/NAME:SPLIT`` or ``hub:OWNER/NAME:CONFIGURATION:SPLIT``. A record becomes text by a template of
its fields, or, where a field holds a list of messages, by the model's own chat template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedgrove.data.chat import Chat, as_text, is_messages, read_messages
from fedgrove.data.readers import PACKED, READERS, Record, Records, columns, kind_suffix, read_text
from fedgrove.data.tally import Tally
from fedgrove.data.template import MISSING, look_up, parse_template, template_fields, template_of
from fedgrove.data.values import text_of
from fedgrove.errors import FedgroveError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_TEMPLATE = "{text}"
HUB = "hub:"
SHOWN_FIELDS = 12  # names of fields in an error: a table can have thousands
# Files beside data that hold none: of a clone of a data set, of a folder that `save_pretrained` or a program wrote.
_NOT_DATA = re.compile(
    r"(readme|license|licence|changelog|citation|contributing|requirements)([._-][a-z]{2})?\.(md|txt|text)"
    r"|(dataset_infos?|dataset_dict|state|croissant|package|config|metadata|tokenizer_config|special_tokens_map)\.json",
    re.IGNORECASE,
)


def read_texts(
    path: Path,
    template: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Iterator[str]:
    """The texts of a source: of each record by the template, or the passages of plain text files, in order.

    Args:
        path: see the module.
        template: how a record becomes text; default ``"{text}"``. A plain text file has no fields and needs none.
        tokenizer: writes messages; where there are none it is not needed.

    Raises:
        FedgroveError: a file is missing or damaged, a record lacks a field or holds no text there; names file and line.
    """
    for (part,) in read_fields(path, {"text": template or DEFAULT_TEMPLATE}):
        text = as_text(part, tokenizer)
        if text.strip():
            yield text


def read_fields(path: Path, templates: Mapping[str, str], tally: Tally | None = None) -> Iterator[tuple[str | Chat, ...]]:
    """Each record of a source by several templates at once; see :func:`read_texts`.

    Args:
        path: likewise.
        templates: the job's key -> the template. A plain text file is read by the key ``text`` alone. A template that is one
            field with a list of messages gives a :class:`Chat`.
        tally: counts what was read, passed over and replaced.

    Raises:
        FedgroveError: as :func:`read_texts`; or a template is none, and the error names its key.
    """
    tally = tally or Tally()
    fields = {}
    for key, template in templates.items():
        try:
            fields[key] = template_fields(template)
        except ValueError as error:
            raise FedgroveError(f"{key} {template!r}: {error}") from error
    wanted = list(dict.fromkeys(name for names in fields.values() for name in names))
    for where, record in read_records(path, wanted, tally):
        if isinstance(record, str):
            if "text" not in templates:
                raise FedgroveError(f"{where}: a plain text file has no fields", f"leave out {' and '.join(templates)}")
            yield (record,)
            continue
        for key, names in fields.items():
            for name in names:
                if look_up(record, name) is MISSING:
                    remedy = f"{describe_fields(record)}. Fix the template (key {key})"
                    if templates[key] == DEFAULT_TEMPLATE and (example := suggest_template(record)):
                        remedy += f": say how a record becomes text, such as {key} = {json.dumps(example, ensure_ascii=False)}"
                    raise FedgroveError(f"{where}: no field {name!r}", remedy)
        yield tuple(_fill(template, fields[key], record, where, tally) for key, template in templates.items())


def _fill(template: str, names: Sequence[str], record: Record, where: str, tally: Tally) -> str | Chat:
    values = {name: look_up(record, name) for name in names}
    for name, value in values.items():
        if is_messages(value):
            if parse_template(template) != (("", name),):
                raise FedgroveError(
                    f"{where}: the field {name!r} holds messages", f'its template is "{template_of(name)}" and nothing else'
                )
            return Chat(read_messages(value, where, name, tally), where)
    if values and parse_template(template) == (("", names[0]),) and values[names[0]] == []:
        return ""  # a conversation in which nobody said anything
    texts = {name: text_of(value, where, name, tally) for name, value in values.items()}
    return "".join(literal + texts.get(field or "", "") for literal, field in parse_template(template))


def describe_fields(record: Record) -> str:
    """The names of a record's fields, for an error."""
    names = [str(name) for name in record if name is not None]
    more = f" and {len(names) - SHOWN_FIELDS} more" if len(names) > SHOWN_FIELDS else ""
    return f"it has: {', '.join(names[:SHOWN_FIELDS]) or 'no field'}{more}"


def suggest_template(record: Record) -> str | None:
    """A template for the field of a record that is most likely its text: messages, or the longest text; None if it has none."""
    best: tuple[int, str] | None = None
    for name, value in record.items():
        nested = value if isinstance(value, Mapping) else {}
        for path, entry in [(str(name), value), *((f"{name}.{key}", inner) for key, inner in nested.items())]:
            size = len(entry) if isinstance(entry, str) else 10**9 if is_messages(entry) else 0
            template = template_of(path)
            if size and template and look_up(record, path) is entry and (best is None or size > best[0]):
                best = size, template
    return best[1] if best else None


def files_of(path: Path, tally: Tally | None = None) -> list[Path]:
    """The files that a source is made of, in the order in which they are read; of one on the hub: itself.

    Of a folder, hidden files are left out, and files that describe the data instead of holding them.

    Raises:
        FedgroveError: there is no such file or folder, or nothing in it that can be read.
    """
    if is_hub(path) or path.is_file():
        return [path]
    if not path.is_dir():
        raise FedgroveError(f"{path}: no such file or folder")
    if is_saved(path):
        return sorted(file for file in path.rglob("*") if file.is_file())
    names = (file.relative_to(path) for file in path.rglob("*") if file.is_file())
    visible = sorted(name for name in names if not any(part.startswith(".") for part in name.parts))
    read = [name for name in visible if kind_suffix(name) in READERS and not _NOT_DATA.fullmatch(name.name)]
    if not read:
        raise FedgroveError(f"{path}: this folder holds no {', '.join(sorted(READERS))} file with data", "name another")
    if tally is not None:
        tally.passed_over += [str(name) for name in visible if name not in read]
    return [path / name for name in read]


def facts_of(path: Path) -> list[list[str | int]]:
    """What changes when a source does: names, sizes and times. Of one on the hub only its name is known."""
    if is_hub(path):
        return [[str(path)]]
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files_of(path)]


def is_plain_text(path: Path) -> bool:
    """Whether a file is read as one text without records."""
    return not is_hub(path) and READERS.get(kind_suffix(path)) is read_text


def is_hub(path: Path) -> bool:
    """Whether a source is a data set of the Hugging Face hub."""
    return str(path).startswith(HUB)


def is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` wrote a folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def read_records(path: Path, fields: Sequence[str] = (), tally: Tally | None = None) -> Records:
    """Every record of a source with the place that an error names; of a plain text file its passages.

    Args:
        path: see the module.
        fields: those that will be looked up; of a table with columns no other column is read. None named: all.
        tally: counts files that were read and passed over.

    Raises:
        FedgroveError: a file is missing or damaged; names file and line.
    """
    tally = tally if tally is not None else Tally()
    if is_hub(path):
        remedy = "check name and split, or fetch it elsewhere and save_to_disk it"
        yield from _guarded(path, _open_hub, fields, "not a data set that the hub gives out to you here", remedy)
        return
    if path.is_dir() and is_saved(path):
        remedy = "save it again with save_to_disk"
        yield from _guarded(path, _open_saved, fields, "not a data set that can be read", remedy)
        return
    for file in files_of(path, tally):
        reader = READERS.get(kind_suffix(file))
        if reader is None or (file.suffix.lower() in PACKED and kind_suffix(file) == ".parquet"):
            raise FedgroveError(
                f"{file}: unknown kind of file",
                f"use {', '.join(sorted(READERS))}; text files may be packed ({', '.join(PACKED)})",
            )
        tally.files += 1
        try:
            yield from reader(file, fields, tally)
        except FedgroveError:
            raise
        except UnicodeDecodeError as error:
            raise FedgroveError(f"{file}: not UTF-8 text (byte {error.start})", "convert it") from error
        except Exception as error:  # what a library raises of a stranger's file changes with its releases
            what = f"not a {kind_suffix(file)[1:]} file that can be read"
            raise FedgroveError(f"{file}: {what} ({type(error).__name__}: {first_line(error)})", "write it again") from error


def _guarded(
    path: Path, opened: Callable[[Path, Sequence[str]], Iterable[Record]], fields: Sequence[str], what: str, remedy: str
) -> Records:
    """The records of a data set; whatever the library raises is one line."""
    import datasets  # slow to import, and most jobs read files that need no library
    import huggingface_hub

    datasets.disable_progress_bars()
    for library in (datasets.logging, huggingface_hub.logging):
        library.set_verbosity(library.CRITICAL)  # what is wrong is said below, in one line
    try:
        for number, record in enumerate(opened(path, fields), 1):
            yield f"{path}, record {number}", record
    except FedgroveError:
        raise
    except Exception as error:  # as for files
        raise FedgroveError(f"{path}: {what}", f"{remedy} ({type(error).__name__})") from error


def _open_saved(path: Path, fields: Sequence[str]) -> Iterable[Record]:
    import datasets  # see _guarded

    saved = datasets.load_from_disk(str(path))  # read where it lies
    if isinstance(saved, datasets.DatasetDict):
        if len(saved) > 1:
            raise FedgroveError(
                f"{path}: it has the splits {', '.join(saved)}", f"name the folder of one: {path / next(iter(saved))}"
            )
        saved = next(iter(saved.values()))
    return _select(saved, fields)


def _open_hub(path: Path, fields: Sequence[str]) -> Iterable[Record]:
    import datasets  # see _guarded

    name, *rest = str(path).removeprefix(HUB).split(":")
    if len(rest) > 2 or not all([name, *rest]):
        raise FedgroveError(f"{path}: write hub:OWNER/NAME, hub:OWNER/NAME:SPLIT or hub:OWNER/NAME:CONFIGURATION:SPLIT")
    configuration, split = [None, *rest][-2:] if rest else (None, "train")
    return _select(datasets.load_dataset(name, configuration, split=split, streaming=True), fields)


def _select(table: Any, fields: Sequence[str]) -> Iterable[Record]:
    """Only the columns of ``fields``, so that neither sound nor pictures are decoded."""
    selected = columns(fields, table.column_names or ())
    rows: Iterable[Record] = table if selected is None else table.select_columns(selected)
    return rows
