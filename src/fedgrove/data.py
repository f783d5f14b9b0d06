"""Private text: files to records to texts to windows of tokens. Nothing here leaves the client that calls it.

A source is a file, a folder of files, a data set that was saved by ``save_to_disk``, or one of the Hugging Face hub:
``hub:OWNER/NAME``, ``hub:OWNER/NAME:SPLIT`` or ``hub:OWNER/NAME:CONFIGURATION:SPLIT``. A record becomes text by a template of
its fields, or, where a field holds a list of messages, by the model's own chat template.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fedgrove.errors import FedgroveError

DEFAULT_TEMPLATE = "{text}"
CHARACTERS = 16  # of text held for each token that is wanted
PASSAGE = 4096  # characters; a plain text file is cut into passages of about this size, at ends of lines
HUB = "hub:"
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


@dataclass(frozen=True)
class Chat:
    """A record's messages, in order: who says (``role``) what (``content``).

    Attributes:
        where: the place that an error names.
    """

    messages: tuple[Mapping[str, Any], ...]
    where: str

    def render(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The whole conversation, by the tokenizer's chat template."""
        return self._by_template(tokenizer, len(self.messages), False)

    def learnt(self, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, int]]:
        """Which characters of :meth:`render` the assistant said: (from, to), its end mark with it.

        A template may write earlier turns in another way than the last one (Qwen 3 drops what was thought); such a turn is
        not what a model would have to say, and is left out.
        """
        whole, spans = self.render(tokenizer), []
        for number, message in enumerate(self.messages):
            if message["role"] == "assistant" and number > 0:
                before = self._by_template(tokenizer, number, True)
                after = self._by_template(tokenizer, number + 1, False)
                if whole.startswith(before) and whole.startswith(after):
                    spans.append((len(before), len(after)))
        return spans

    def _by_template(self, tokenizer: PreTrainedTokenizerBase, number: int, begins_answer: bool) -> str:
        if not getattr(tokenizer, "chat_template", None):
            raise FedgroveError(
                f"{self.where}: the field holds messages, but the model's tokenizer has no chat template; "
                "use a model that was trained to chat, or write a template of text fields"
            )
        try:
            messages = [dict(message) for message in self.messages[:number]]
            return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=begins_answer))
        except jinja2.TemplateError as fault:
            raise FedgroveError(
                f"{self.where}: the model's chat template refuses these messages ({fault}); mend the record"
            ) from fault


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


def as_text(part: str | Chat, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """A part of a record as the model will see it."""
    if isinstance(part, str):
        return part
    if tokenizer is None:
        raise FedgroveError(f"{part.where}: the field holds messages, which only a model can write; name a text field")
    return part.render(tokenizer)


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
                raise FedgroveError(f"{where}: a plain text file has no fields; leave out {' and '.join(templates)}")
            yield (record,)
            continue
        for key, names in fields.items():
            missing = [name for name in names if name not in record]
            if missing:
                have = ", ".join(map(str, record)) or "no field"
                mend = f"Mend the template (key {key})"
                if templates[key] == DEFAULT_TEMPLATE and record:
                    mend += f': say how a record becomes text, such as {key} = "{{{next(iter(record))}}}"'
                raise FedgroveError(f"{where}: no field '{missing[0]}'; it has: {have}. {mend}")
        yield tuple(_fill(template, fields[key], record, where) for key, template in templates.items())


def _fill(template: str, names: Sequence[str], record: Mapping[str, Any], where: str) -> str | Chat:
    chats = [name for name in names if _is_chat(record[name])]
    if not chats:
        return template.format_map({name: "" if record[name] is None else record[name] for name in names})
    if template != f"{{{chats[0]}}}":
        raise FedgroveError(
            f"{where}: the field '{chats[0]}' holds messages; its template is \"{{{chats[0]}}}\" and nothing else"
        )
    return Chat(tuple(record[chats[0]]), where)


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, list) and bool(value) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value)
    )


def files_of(path: Path) -> list[Path]:
    """The files that a source is made of, in the order in which they are read; of one on the hub: itself.

    Raises:
        FedgroveError: there is no such file or folder, or nothing in it that can be read.
    """
    if is_hub(path) or path.is_file():
        return [path]
    if not path.is_dir():
        raise FedgroveError(f"{path}: no such file or folder")
    if _saved(path):
        return sorted(file for file in path.rglob("*") if file.is_file())
    files = (file.relative_to(path) for file in path.rglob("*") if file.is_file() and file.suffix.lower() in SUFFIXES)
    found = sorted(path / file for file in files if not any(part.startswith(".") for part in file.parts))
    if not found:
        raise FedgroveError(f"{path}: this folder holds no {', '.join(sorted(SUFFIXES))} file; name another")
    return found


def facts_of(path: Path) -> list[list[str | int]]:
    """What changes when a source does: names, sizes and times. Of one on the hub only its name is known."""
    if is_hub(path):
        return [[str(path)]]
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files_of(path)]


def is_hub(path: Path) -> bool:
    """Whether a source is a data set of the Hugging Face hub."""
    return str(path).startswith(HUB)


def _saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` wrote a folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Every record of a source with the place that an error names; of a plain text file its passages."""
    if is_hub(path) or (path.is_dir() and _saved(path)):
        yield from _records(path, "hub" if is_hub(path) else "saved")
        return
    for file in files_of(path):
        kind = SUFFIXES.get(file.suffix.lower())
        if kind is None:
            raise FedgroveError(f"{file}: unknown kind of file; use {', '.join(sorted(SUFFIXES))}")
        try:
            if kind == "text":
                yield from ((str(file), passage) for passage in _passages(file))
            else:
                yield from _records(file, kind)
        except UnicodeDecodeError as fault:
            raise FedgroveError(f"{file}: not UTF-8 text (byte {fault.start}); convert it") from fault


def _records(path: Path, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if kind == "jsonl":
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as fault:
                    raise FedgroveError(f"{where}: not JSON ({fault.msg}); one object a line is expected") from fault
                if not isinstance(record, dict):
                    raise FedgroveError(f"{where}: not a JSON object; one object a line is expected")
                yield where, record
    elif kind == "csv":
        with path.open(encoding="utf-8-sig", newline="") as file:
            head = file.readline()
            file.seek(0)
            comma = max(",;\t", key=head.count)  # spreadsheets of half of Europe write semicolons
            reader = csv.DictReader(file, delimiter=comma)
            try:
                for record in reader:
                    where = f"{path}, line {reader.line_num}"
                    if None in record:
                        raise FedgroveError(
                            f"{where}: more fields than the first line names; write text that holds {comma!r} in double quotes"
                        )
                    yield where, record
            except csv.Error as fault:
                raise FedgroveError(f"{path}, line {reader.line_num}: not CSV ({fault})") from fault
    else:
        import datasets
        import huggingface_hub

        datasets.disable_progress_bars()
        for library in (datasets.logging, huggingface_hub.logging):
            library.set_verbosity(library.CRITICAL)  # what is wrong is said below, in one line
        opened = {"parquet": _open_parquet, "saved": _open_saved, "hub": _open_hub}[kind]
        try:
            for number, record in enumerate(opened(path), 1):
                yield f"{path}, record {number}", record
        except (datasets.exceptions.DatasetsError, OSError, ValueError) as fault:
            raise FedgroveError(f"{path}: {_UNREADABLE[kind]} ({type(fault).__name__})") from fault


_UNREADABLE = {
    "parquet": "not a parquet file that can be read",
    "saved": "not a data set that can be read; save it again with save_to_disk",
    "hub": "not a data set that the hub gives out to you here; check name and split, or fetch it elsewhere and save_to_disk it",
}


def _open_parquet(path: Path) -> Iterable[dict[str, Any]]:
    import datasets

    # streaming, because datasets would otherwise keep a copy of private text in its cache
    table: Iterable[dict[str, Any]] = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
    return table


def _open_saved(path: Path) -> Iterable[dict[str, Any]]:
    import datasets

    saved = datasets.load_from_disk(str(path))  # read where it lies
    if isinstance(saved, datasets.DatasetDict):
        if len(saved) > 1:
            raise FedgroveError(
                f"{path}: it has the splits {', '.join(saved)}; name the folder of one: {path / next(iter(saved))}"
            )
        saved = next(iter(saved.values()))
    table: Iterable[dict[str, Any]] = saved
    return table


def _open_hub(path: Path) -> Iterable[dict[str, Any]]:
    import datasets

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
            texts = _draw(read_texts(path, template, tokenizer), random.Random(f"{seed}/{path.name}"), budget)
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
        templates: ``text``, of which every token is learnt (of messages those of the assistant), or ``prompt`` and
            ``answer``, of which the answer is.
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
            *prompts, last = parts
            if isinstance(last, Chat):
                tokens, learnt = _encode_chat(last, tokenizer)
                ids += tokens
                labels += learnt
                continue
            if not last.strip():
                continue
            prompt = [token for part in prompts for token in _encode(as_text(part, tokenizer), tokenizer, end=False)]
            answer = _encode(last, tokenizer)
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
    """A source's text from its beginning, cut into consecutive windows that do not overlap; the last may be shorter.

    Args:
        length: tokens per window.
        limit: at most so many windows.

    Returns:
        Tensors (1, ≤ length) of token ids, each of at least two tokens.

    Raises:
        FedgroveError: the file cannot be read or holds fewer than two tokens.
    """
    sources = files_of(path) if path.is_dir() and not _saved(path) else [path]
    ids: list[int] = []
    for source in sources:
        plain = SUFFIXES.get(source.suffix.lower()) == "text"
        texts = read_texts(source, template, tokenizer)
        if plain:
            texts = iter(["".join(texts)])  # tokenised in one piece: the standard definition
        for text in texts:
            ids += _encode(text, tokenizer, end=not plain or len(sources) > 1)
            if limit is not None and len(ids) >= limit * length:
                break
    if limit is not None:
        ids = ids[: limit * length]
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


def _encode_chat(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids of a conversation and their labels: ``IGNORED`` on what the assistant did not say."""
    text, learnt = chat.render(tokenizer), chat.learnt(tokenizer)
    if not learnt:
        raise FedgroveError(f"{chat.where}: no turn of the assistant that could be learnt; messages begin with another role")
    if not tokenizer.is_fast:
        raise FedgroveError(f"{chat.where}: the model has a slow tokenizer, which tells no places; save it with use_fast=True")
    encoded = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    ids: list[int] = encoded["input_ids"]
    inside = [any(begin <= start < end for begin, end in learnt) for start, _ in encoded["offset_mapping"]]
    labels = [token if inner else IGNORED for token, inner in zip(ids, inside, strict=True)]
    end = tokenizer.eos_token_id
    if end is not None and end != ids[-1]:
        ids, labels = [*ids, end], [*labels, IGNORED]
    return ids, labels


def _encode(text: str, tokenizer: PreTrainedTokenizerBase, end: bool = True) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if end and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return ids
