"""Records that prompts are scored on: the token ids of each record's text, and its possible answers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fedgrove.client.local_client import LocalClient
from fedgrove.client.windows import checkpoint_of, made_once, templates_of_answers
from fedgrove.data.chat import as_text
from fedgrove.data.sources import read_fields
from fedgrove.data.tokens import encode, encode_prompt, prefix_ids
from fedgrove.errors import FedgroveError
from fedgrove.models.labels import label_ids

MOST_WEIGHT = 2**26  # of a client's records together: the largest sum is 2^(20 + 6) times as large, for each client


@dataclass(frozen=True)
class Records:
    """Records as token ids.

    Attributes:
        prefix: what the tokenizer puts before every text.
        labels: of each label; empty: every record has its own answer only.
        texts: of each record's text, without the prefix.
        answers: the index of each record's label, alone in a tuple; or the token ids of its answer.
        weights: how much each record counts in a sum; none: 1 each. See :func:`records_of`.
    """

    prefix: tuple[int, ...]
    labels: tuple[tuple[int, ...], ...]
    texts: Sequence[tuple[int, ...]]
    answers: Sequence[tuple[int, ...]]
    weights: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.texts)

    def options(self, record: int) -> tuple[tuple[int, ...], ...]:
        """What may follow a record and its prompt: the labels, or its own answer."""
        return self.labels or (self.answers[record],)

    def take(self, places: Sequence[int]) -> Records:
        """Some of the records."""
        return replace(self, texts=[*map(self.texts.__getitem__, places)], answers=[*map(self.answers.__getitem__, places)])

    def spoilt(self, share: float, vocabulary: int, seed: str) -> Records:
        """The records with a share of each text's tokens replaced by random ones.

        Args:
            vocabulary: tokens are drawn below this.
        """
        generator, texts = generator_of(f"{seed}/spoilt"), []
        for text in self.texts:
            is_replaced = torch.rand(len(text), generator=generator) < share
            others = torch.randint(vocabulary, (len(text),), generator=generator)
            texts.append(tuple(torch.where(is_replaced, others, torch.tensor(text)).tolist()))
        return replace(self, texts=texts)


def read_records(
    paths: Iterable[Path],
    prompt: str,
    answer: str,
    labels: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    most: int | None = None,
) -> Records:
    """All records of some sources.

    Args:
        prompt, answer: the templates of a record's text and answer.
        labels: all possible answers; empty: any.
        length: tokens of text and answer together. An answer takes half of them at most; of a text, the last ones stay.
        most: read only so many records of each source.

    Raises:
        FedgroveError: a source cannot be read or holds no record, an answer is empty or none of the labels, or labels begin
            alike; names what it is about.
    """
    ids = tuple(map(tuple, label_ids(labels, tokenizer)))
    prefix, room = prefix_ids(tokenizer), max(1, length // 2)
    longest = max(map(len, ids), default=0)
    if longest > room:
        raise FedgroveError(f"length: {length} tokens, but a label has {longest}", f"raise it to {2 * longest} or more")
    texts, answers = [], []
    for path in paths:
        for text, reply in islice(read_fields(path, {"prompt": prompt, "answer": answer}), most):
            said = as_text(reply, tokenizer)
            if labels and said not in labels:
                raise FedgroveError(f"{path}: the answer {said!r} is none of the labels", _remedy(said, labels))
            answered = [labels.index(said)] if labels else encode(said, tokenizer, end=True)[:room]
            if not answered:
                raise FedgroveError(f"{path}: a record has an empty answer", "fix the key answer, or remove the record")
            taken = longest if labels else len(answered)
            whole = encode_prompt(as_text(text, tokenizer), tokenizer, length - taken)
            texts.append(tuple(whole[len(prefix) :] or [tokenizer.eos_token_id or 0]))
            answers.append(tuple(answered))
    if not texts:
        raise FedgroveError(f"{', '.join(str(path) for path in paths)}: no records to score prompts on", "add some")
    return Records(tuple(prefix), ids, tuple(texts), tuple(answers))


def records_of(client: LocalClient, labels: Sequence[str], length: int, number: int, seed: str) -> Records:
    """Records of a client, drawn without replacement: all of them, if it has no more.

    They are tokenized once and stored on the client's disk. For a client with ``owners``, those of each of them.

    Every drawn record has a weight, in proportion to how many of the client's records it stands for. So a sum over clients is,
    in the mean over draws, that over all their records: without it a client of few records would count as much as one of many,
    and with it the labels that it has.

    Args:
        number: how many.
        seed: of the stage and the round; together with the client's name it draws the records.

    Raises:
        FedgroveError: its records have no answers, or cannot be read; names the client.
    """
    if client.owners:
        owned = [records_of(owner, labels, length, number, seed) for owner in client.owners]
        texts, answers, weights = (
            [one for of in owned for one in getattr(of, name)] for name in ("texts", "answers", "weights")
        )
        return replace(owned[0], texts=texts, answers=answers, weights=weights)
    prompt, answer = templates_of_answers(client, "answers")

    def make() -> dict[str, Tensor]:
        return _packed(read_records(client.data, prompt, answer, labels, checkpoint_of(client).tokenizer(), length))

    records = _unpacked(made_once(client, "records", [prompt, answer, list(labels), length], make))
    drawn = records.take(draw(len(records), number, f"{seed}/{client.name}"))
    weight = min(max(len(records), number), MOST_WEIGHT // number)  # n / min(n, number), times number: whole
    return replace(drawn, weights=[weight] * len(drawn))


def draw(total: int, number: int, seed: str) -> list[int]:
    """``number`` of the numbers below ``total`` without repetition, ascending; all of them, if there are no more."""
    if number >= total:
        return list(range(total))
    return sorted(torch.randperm(total, generator=generator_of(f"{seed}/records"))[:number].tolist())


def generator_of(seed: str) -> torch.Generator:
    """A generator of random numbers of its own."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "little") >> 1)


def _remedy(said: str, labels: Sequence[str]) -> str:
    near = next((label for label in labels if label.strip() == said.strip()), None)
    return f"write the label {near!r} exactly so, spaces included" if near else "add it to labels, or fix the key answer"


def _packed(records: Records) -> dict[str, Tensor]:
    packed = {}
    for name in ("prefix", "labels", "texts", "answers"):
        rows = [records.prefix] if name == "prefix" else getattr(records, name)
        packed[name] = torch.tensor([one for row in rows for one in row], dtype=torch.int32)
        packed[f"{name}/lengths"] = torch.tensor([len(row) for row in rows], dtype=torch.int32)
    return packed


def _unpacked(packed: dict[str, Tensor]) -> Records:
    def rows(name: str) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(row.tolist()) for row in torch.split(packed[name], packed[f"{name}/lengths"].tolist()))

    return Records(rows("prefix")[0], rows("labels"), rows("texts"), rows("answers"))
