"""Windows of tokens: texts joined by the tokenizer's end-of-text token and cut into ``length`` consecutive tokens.

Packed, never padded. Where the tokenizer begins a text with a token by itself (``<bos>`` of Gemma and Llama), every window
begins with it: a model that was trained with such a token computes nonsense without. A window that begins with a chat whose
template has written the token gets no second one.
"""

from __future__ import annotations

import heapq
import random
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedgrove.data.chat import Chat, as_text
from fedgrove.data.readers import PASSAGE
from fedgrove.data.sources import files_of, is_plain_text, is_saved, read_fields, read_texts
from fedgrove.data.tokens import encode, encode_long, encode_with_offsets, prefix_ids
from fedgrove.errors import FedgroveError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHARACTERS = 16  # of text held for each token that is wanted, at first: more than a token has in any common language
USUAL_CHARACTERS = 4  # of a token
IGNORED = -100  # the label of a token that is not trained on


def calibration_windows(
    paths: Sequence[Path],
    template: str | None,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    length: int,
    seed: str,
    more: int = 0,
) -> Tensor:
    """Windows to calibrate on, drawn from all records of all files alike.

    Records are drawn by the seed and packed until there is enough: a large file is read through, but neither held in
    memory nor tokenized whole. A long record, longer than all windows together, is begun at a drawn place.

    Args:
        samples: number of windows.
        length: tokens per window.
        seed: any string; the same one draws the same windows.
        more: windows that may follow them, as far as the records that were drawn go. What is drawn does not depend on it, so
            the first windows are the same with and without.

    Returns:
        (samples, length) int64 token ids, or up to ``more`` rows more.

    Raises:
        FedgroveError: a file cannot be read, or there are too few tokens.
    """
    prefix = prefix_ids(tokenizer)
    wanted = samples * length
    budget = CHARACTERS * wanted
    while True:
        texts = (text for path in paths for text in read_texts(path, template, tokenizer))  # as one source
        drawn, is_all = _draw(texts, random.Random(f"{seed}/{paths[0].name}"), budget)
        ids: list[int] = []
        for text in drawn:
            ids += encode(text, tokenizer, end=True)
            if len(ids) >= wanted + more * length:
                break
        spans = [span for span in _spans(ids, length, prefix) if span[1] + len(prefix) * span[2] == length][: samples + more]
        if len(spans) >= samples:
            windows = [prefix * is_added + ids[start : start + count] for start, count, is_added in spans]
            return torch.tensor(windows, dtype=torch.int64)
        if is_all:
            break
        budget *= CHARACTERS  # a language with long tokens, or much white space
    names = f"{paths[0]}{f' and {len(paths) - 1} more' if len(paths) > 1 else ''}"
    if not ids:
        raise FedgroveError(f"{names}: it holds no text")
    raise FedgroveError(
        f"{names}: {len(ids)} tokens, but {samples} windows of {length} need {samples * (length - len(prefix))}",
        "lower samples or length, or add text",
    )


def held_out_windows(
    paths: Sequence[Path],
    template: str | None,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    length: int,
    seed: str,
    number: int,
) -> Tensor:
    """The windows that follow those of :func:`calibration_windows` in the same draw of records, so none is among them.

    Args:
        paths, template, tokenizer, samples, length, seed: of :func:`calibration_windows`.
        number: how many.

    Returns:
        (number, length) int64 token ids.

    Raises:
        FedgroveError: a file cannot be read, or there are too few tokens.
    """
    drawn = calibration_windows(paths, template, tokenizer, samples, length, seed, number)[samples:]
    if len(drawn) < number:
        raise FedgroveError(
            f"{paths[0]}: beside the {samples} windows of {length} tokens to calibrate on there are {len(drawn)} to hold out, "
            f"but personal needs {number}",
            "lower personal or samples, or add text",
        )
    return drawn


def training_windows(
    paths: Sequence[Path], templates: Mapping[str, str], tokenizer: PreTrainedTokenizerBase, length: int
) -> tuple[Tensor, Tensor]:
    """All of a client's text, packed; the tokens that do not fill a window at the end are left out.

    Conversations in which no turn can be trained on are passed over.

    Args:
        templates: ``text``, of which every token is trained on (of messages those of the assistant), or ``prompt`` and
            ``answer``, of which the answer is.
        length: tokens per window.

    Returns:
        (windows, length) int64 token ids, and labels: the same, but ``IGNORED`` on prompts and on tokens that the tokenizer
        puts before a text by itself.

    Raises:
        FedgroveError: a file cannot be read or lacks a field, there is not one window of text, or no conversation has a turn
            that can be trained on.
    """
    ids, labels = array("i"), array("i")
    passed_over = 0
    where = str(paths[0])
    for path in paths:
        for parts in read_fields(path, templates):
            *prompts, last = parts
            if isinstance(last, Chat):
                chat_ids, chat_labels = _encode_chat(last, tokenizer)
                if not chat_ids:
                    where, passed_over = last.where, passed_over + 1
                ids.extend(chat_ids)
                labels.extend(chat_labels)
                continue
            if not last.strip():
                continue
            prompt = [token for part in prompts for token in encode(as_text(part, tokenizer), tokenizer)]
            answer = encode(last, tokenizer, end=True)
            ids.extend(prompt + answer)
            labels.extend([IGNORED] * len(prompt) + answer)
    if passed_over and not ids:
        raise FedgroveError(
            f"{where}: no turn of the assistant that can be trained on, nor in any other of {passed_over} conversations",
            "a message with the role 'assistant' must follow another one, and the chat template must write it as it stands",
        )
    prefix = prefix_ids(tokenizer)
    windows, window_labels = array("i"), array("i")
    for start, count, is_added in _spans(ids, length, prefix):
        if count + len(prefix) * is_added == length:
            windows.extend(prefix * is_added)
            windows.extend(ids[start : start + count])
            window_labels.extend([IGNORED] * len(prefix) * is_added)
            window_labels.extend(labels[start : start + count])
    if not windows:
        raise FedgroveError(f"{paths[0]}: {len(ids)} tokens, but one window needs {length}", "lower length, or add text")
    return (
        torch.tensor(windows, dtype=torch.int64).view(-1, length),
        torch.tensor(window_labels, dtype=torch.int64).view(-1, length),
    )


def evaluation_windows(
    path: Path, template: str | None, tokenizer: PreTrainedTokenizerBase, length: int, limit: int | None = None
) -> list[Tensor]:
    """A source's text from its beginning, cut into consecutive windows that do not overlap; the last may be shorter.

    A plain text is tokenized as one text, and no further than the windows go.

    Args:
        length: tokens per window, the tokenizer's own first token included.
        limit: at most so many windows.

    Returns:
        Tensors (1, ≤ length) of token ids, each of at least two tokens.

    Raises:
        FedgroveError: the file cannot be read or holds fewer than two tokens.
    """
    sources = files_of(path) if path.is_dir() and not is_saved(path) else [path]
    ids = array("i")
    for part in _parts(sources, template, tokenizer):
        ids.extend(part)
        if limit is not None and len(ids) >= limit * length:
            break
    spans = _spans(ids, length, prefix := prefix_ids(tokenizer))
    windows = [torch.tensor([[*prefix * is_added, *ids[start : start + count]]]) for start, count, is_added in spans][:limit]
    windows = [window for window in windows if window.shape[1] > 1]
    if not windows:
        raise FedgroveError(f"{path}: it holds fewer than two tokens of text")
    return windows


def spread(number: int, count: int) -> Tensor:
    """The places of ``number`` of ``count`` windows, spread evenly from the first on: (number,) int64."""
    return torch.arange(number) * count // max(1, number)


def with_labels(labels: Tensor) -> Tensor:
    """The places of the windows (windows, length) in which a token that follows another has a label: (some,) int64."""
    return (labels[:, 1:] != IGNORED).any(1).nonzero().squeeze(1)


def _parts(sources: Sequence[Path], template: str | None, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """The token ids of all texts, part by part. The end-of-text token follows each text, but not a single plain text."""
    for source in sources:
        texts = read_texts(source, template, tokenizer)
        if is_plain_text(source):
            yield from encode_long(texts, tokenizer)
            if len(sources) > 1:
                yield encode("", tokenizer, end=True)
        else:
            for text in texts:
                yield from encode_long([text], tokenizer)
                yield encode("", tokenizer, end=True)


def _spans(ids: Sequence[int], length: int, prefix: list[int]) -> Iterator[tuple[int, int, bool]]:
    """Of each window: where it begins in ``ids``, how many it takes, and whether the prefix is added. The last may be short."""
    start = 0
    while start < len(ids):
        is_added = bool(prefix) and list(ids[start : start + len(prefix)]) != prefix
        count = length - len(prefix) * is_added
        yield start, min(count, len(ids) - start), is_added
        start += count


def _draw(texts: Iterable[str], rng: random.Random, budget: int) -> tuple[list[str], bool]:
    """Texts in random order, cut off where they exceed ``budget`` characters; no more than twice that is ever held.

    Returns:
        The texts, and whether these are all.
    """
    drawn: list[tuple[float, int, str]] = []  # a heap, the last of the order on top
    size, is_all = 0, True
    for number, text in enumerate(texts):
        order = -rng.random()
        shortest = budget * USUAL_CHARACTERS // CHARACTERS
        if len(text) > max(2 * PASSAGE, shortest):
            start = rng.randrange(len(text) - shortest)
            start = text.find(" ", start, start + shortest) + 1 or start
            text, is_all = text[start : start + budget], False
        heapq.heappush(drawn, (order, number, text))
        size += len(text)
        while size - len(drawn[0][2]) >= budget:
            size -= len(heapq.heappop(drawn)[2])
            is_all = False
    return [text for _, _, text in sorted(drawn, reverse=True)], is_all


def _encode_chat(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids of a conversation and their labels: ``IGNORED`` on what the assistant did not say.

    Returns:
        Two empty lists if no turn can be trained on.
    """
    text, spans = chat.render(tokenizer), chat.trained_spans(tokenizer)
    if not spans:
        return [], []
    if not tokenizer.is_fast:
        raise FedgroveError(
            f"{chat.where}: the model has a slow tokenizer, which gives no offsets", "save it with use_fast=True"
        )
    ids, offsets = encode_with_offsets(text, tokenizer)
    inside = [any(begin <= start < end for begin, end in spans) for start, _ in offsets]
    labels = [token if is_inside else IGNORED for token, is_inside in zip(ids, inside, strict=True)]
    end = tokenizer.eos_token_id
    if end is not None and end != ids[-1]:
        ids, labels = [*ids, end], [*labels, IGNORED]
    return ids, labels
