"""Windows of tokens: texts joined by the tokenizer's end-of-text token and cut into ``length`` consecutive tokens.

Packed, never padded, with no other special tokens.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedgrove.data.chat import Chat, as_text
from fedgrove.data.sources import SUFFIXES, files_of, is_saved, read_fields, read_texts
from fedgrove.errors import FedgroveError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHARACTERS = 16  # of text held for each token that is wanted
IGNORED = -100  # the label of a token that is not trained on


def calibration_windows(
    paths: Sequence[Path], template: str | None, tokenizer: PreTrainedTokenizerBase, samples: int, length: int, seed: str
) -> Tensor:
    """Windows to calibrate on, drawn from all files alike.

    Records are drawn by the seed and packed until there is enough: a large file is read through, but neither held in
    memory nor tokenized whole.

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
                f"{path}: {len(ids)} tokens, but {part} windows of {length} need {part * length}",
                "lower samples or length, or add text",
            )
        windows.append(torch.tensor(ids[: part * length], dtype=torch.int64).view(part, length))
    return torch.cat(windows)


def training_windows(
    paths: Sequence[Path], templates: Mapping[str, str], tokenizer: PreTrainedTokenizerBase, length: int
) -> tuple[Tensor, Tensor]:
    """All of a client's text, packed; the tokens that do not fill a window at the end are left out.

    Args:
        templates: ``text``, of which every token is trained on (of messages those of the assistant), or ``prompt`` and
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
                chat_ids, chat_labels = _encode_chat(last, tokenizer)
                ids += chat_ids
                labels += chat_labels
                continue
            if not last.strip():
                continue
            prompt = [token for part in prompts for token in _encode(as_text(part, tokenizer), tokenizer, end=False)]
            answer = _encode(last, tokenizer)
            ids += prompt + answer
            labels += [IGNORED] * len(prompt) + answer
    number = len(ids) // length
    if not number:
        raise FedgroveError(f"{paths[0]}: {len(ids)} tokens, but one window needs {length}", "lower length, or add text")
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
    sources = files_of(path) if path.is_dir() and not is_saved(path) else [path]
    ids: list[int] = []
    for source in sources:
        plain = SUFFIXES.get(source.suffix.lower()) == "text"
        texts = read_texts(source, template, tokenizer)
        if plain:
            texts = iter(["".join(texts)])  # tokenized in one piece: the standard definition
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
    num_tokens = 0
    for number, text in enumerate(texts):
        heapq.heappush(drawn, (-rng.random(), number, text))
        num_tokens += len(text)
        while budget is not None and num_tokens - len(drawn[0][2]) >= budget:
            num_tokens -= len(heapq.heappop(drawn)[2])
    return [text for _, _, text in sorted(drawn, reverse=True)]


def _encode_chat(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids of a conversation and their labels: ``IGNORED`` on what the assistant did not say."""
    text, spans = chat.render(tokenizer), chat.trained_spans(tokenizer)
    if not spans:
        raise FedgroveError(f"{chat.where}: no turn of the assistant that could be learnt", "messages begin with another role")
    if not tokenizer.is_fast:
        raise FedgroveError(
            f"{chat.where}: the model has a slow tokenizer, which gives no offsets", "save it with use_fast=True"
        )
    encoded = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    ids: list[int] = encoded["input_ids"]
    inside = [any(begin <= start < end for begin, end in spans) for start, _ in encoded["offset_mapping"]]
    labels = [token if is_inside else IGNORED for token, is_inside in zip(ids, inside, strict=True)]
    end = tokenizer.eos_token_id
    if end is not None and end != ids[-1]:
        ids, labels = [*ids, end], [*labels, IGNORED]
    return ids, labels


def _encode(text: str, tokenizer: PreTrainedTokenizerBase, end: bool = True) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if end and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return ids
