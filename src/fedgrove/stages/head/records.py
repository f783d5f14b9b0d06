"""Labeled records: the beginning of each record's text as token ids, and the index of its label."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fedgrove.client.local_client import LocalClient
from fedgrove.client.windows import decoder_of, made_once, templates_of_answers
from fedgrove.data.chat import as_text
from fedgrove.data.sources import DEFAULT_TEMPLATE, read_fields
from fedgrove.data.tokens import encode_prompt
from fedgrove.errors import FedgroveError
from fedgrove.models.features import pooled_states

NO_LABEL = -1  # in place of the index of a label: the record has none


def read_labeled(
    paths: Iterable[Path],
    prompt: str,
    answer: str | None,
    labels: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    most: int | None = None,
) -> tuple[list[Tensor], Tensor]:
    """All records of some sources.

    Args:
        prompt, answer: the templates of a record's text and label; the label is taken without the spaces around it. Without
            ``answer`` no record has one.
        labels: all labels.
        length: tokens of a record, from its beginning.
        most: read only so many records of each source.

    Returns:
        (tokens,) token ids of each record, at least one token; (records,) the index of each label, or ``NO_LABEL``.

    Raises:
        FedgroveError: a source cannot be read or holds no record, or a label is none of ``labels``; names both.
    """
    index = {label: number for number, label in enumerate(labels)}
    templates = {"text": prompt} if answer is None else {"prompt": prompt, "answer": answer}
    windows, classes = [], []
    for path in paths:
        for text, *label in islice(read_fields(path, templates), most):
            said = as_text(label[0], tokenizer).strip() if label else None
            if said is not None and said not in index:
                known = ", ".join(labels[:5]) + (f" and {len(labels) - 5} more" if len(labels) > 5 else "")
                raise FedgroveError(f"{path}: the label {said!r} is none of {known}", "add it to labels, or fix the key answer")
            ids = encode_prompt(as_text(text, tokenizer), tokenizer)[:length] or [tokenizer.eos_token_id or 0]
            windows.append(torch.tensor(ids, dtype=torch.int64))
            classes.append(NO_LABEL if said is None else index[said])
    if not windows:
        raise FedgroveError(f"{', '.join(str(path) for path in paths)}: no records")
    return windows, torch.tensor(classes, dtype=torch.int64)


def states_of(
    client: LocalClient,
    labels: Sequence[str],
    layers: Sequence[int],
    pool: str,
    length: int,
    device: str,
    unlabeled: bool = False,
) -> tuple[Tensor, Tensor]:
    """The pooled hidden states of a client's records, computed once and stored on its disk, and their labels.

    Args:
        unlabeled: whether a client without the key ``answer`` is one whose records have no labels, and not an error.

    Returns:
        (records, hidden states) float32, (records,) int64, ``NO_LABEL`` for a record without one.

    Raises:
        FedgroveError: its records have no labels, or cannot be read; names the client.
    """
    if client.owners:
        owned = [states_of(owner, labels, layers, pool, length, device, unlabeled) for owner in client.owners]
        return torch.cat([states for states, _ in owned]), torch.cat([classes for _, classes in owned])
    prompt: str
    answer: str | None
    if unlabeled and client.answer is None:
        prompt, answer = client.text or DEFAULT_TEMPLATE, None
    else:
        prompt, answer = templates_of_answers(client, "labels")

    def make() -> dict[str, Tensor]:
        decoder = decoder_of(client, device)
        windows, classes = read_labeled(client.data, prompt, answer, labels, decoder.checkpoint.tokenizer(), length)
        return {"states": pooled_states(decoder, windows, layers, pool), "classes": classes}

    stored = made_once(client, "pooled", [prompt, answer, labels, layers, pool, length, device], make)
    return stored["states"], stored["classes"]


def hold_out(classes: Tensor, share: float) -> Tensor:
    """Which of a client's records it holds out: (records,) bool, with the same shares of labels as the rest.

    Every so manieth of the records sorted by label; records of one label stay in the order of the file.
    """
    number = round(share * len(classes))
    held_out = torch.zeros(len(classes), dtype=torch.bool)
    if 0 < number < len(classes):
        order = classes.argsort(stable=True)
        held_out[order[(2 * torch.arange(number) + 1) * len(classes) // (2 * number)]] = True
    return held_out
