"""Scores of prompts on records: a record passes through the model once, and all prompts continue it.

With the prompt at the end, the record's keys and values serve every candidate; with the prompt in front, a record passes once
for each of them. Either way answers continue what is before them, and logits are computed only where an answer's token comes
next. Every record passes by itself, so that its scores have the same bits whoever has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedgrove.events import OnProgress
from fedgrove.models.blocks import Decoder
from fedgrove.models.continuations import Node, embed, last_states, log_probabilities
from fedgrove.models.walk import CHUNK
from fedgrove.rounds.aggregator.fixed_point import FixedPoint
from fedgrove.stages.prompt.config import Place, Score
from fedgrove.stages.prompt.records import Records

BITS = 20
CODE = FixedPoint(BITS)
MOST_LOSS = 64.0  # of a record: the largest loss that is summed, and the loss of a prompt under which a record's is not finite
TOGETHER = 4096  # tokens, with those before them, whose keys and values in one block are in memory at once


class Prompt(NamedTuple):
    """A prompt.

    Attributes:
        embeddings: (tokens, width); none is a prompt, too.
        written: whether it is text: then the tokenizer's prefix comes before it, if it stands in front.
    """

    embeddings: Tensor
    written: bool


def score(
    decoder: Decoder,
    records: Records,
    prompts: Sequence[Prompt],
    place: Place,
    on_progress: OnProgress = lambda done, total: None,
) -> list[Tensor]:
    """log p of each possible answer of each record after each prompt.

    Returns:
        For each record (prompts, options) float64: the sum over an answer's tokens.
    """
    scores = [torch.empty(len(prompts), len(records.options(i)), dtype=torch.float64) for i in range(len(records))]
    for part in _parts(records, prompts):
        trees = [_Tree(decoder, records, i, prompts, place) for i in part]
        states_of = last_states(decoder, [tree.nodes for tree in trees])
        for i, tree, states in zip(part, trees, states_of, strict=True):
            for places, found in tree.log_probabilities(decoder, states):
                scores[i][places] = found
        on_progress(part[-1] + 1, len(records))
    return scores


def losses(scores: Sequence[Tensor], records: Records) -> Tensor:
    """Each record's loss under each prompt, (records, prompts) float64; not finite where a score is not.

    With labels the cross entropy among them, in nats; else the mean over the answer's tokens of −log p.
    """
    found = []
    for i, of in enumerate(scores):
        if records.labels:
            found.append(-of.log_softmax(1)[:, records.answers[i][0]])
        else:
            found.append(-of[:, 0] / len(records.answers[i]))
    return torch.stack(found)


def right(scores: Sequence[Tensor], records: Records) -> Tensor:
    """Whether each record's label is the most likely one under each prompt, (records, prompts) bool."""
    return torch.stack([of.argmax(1) == records.answers[i][0] for i, of in enumerate(scores)])


def ratios(of_records: Tensor, of_spoilt: Tensor) -> Tensor:
    """FedBPT's score against overfitting (Eq. 7): each record's loss, relative to that of the same record with other tokens.

    The released code divides the mean losses instead; here, as in the paper, it is a mean of ratios. Ours: a loss that is not
    finite counts as the largest one, and a loss below 2⁻²⁰ as that.

    Args:
        of_records, of_spoilt: (records, prompts) losses.
    """
    one, other = (
        loss.nan_to_num(MOST_LOSS, MOST_LOSS, MOST_LOSS).clamp(2.0**-BITS, MOST_LOSS) for loss in (of_records, of_spoilt)
    )
    return one / other


class Sums(NamedTuple):
    """Sums over records, in whole numbers.

    Attributes:
        scores: (prompts,) int64: losses in multiples of 2^−BITS, or the records that are right; each times its weight.
        weight: of the records that were counted, together.
        records: how many these are.
        skipped: records whose loss was not finite under any prompt.
    """

    scores: Tensor
    weight: int
    records: int
    skipped: int


def sums(scores: Sequence[Tensor], records: Records, kind: Score) -> Sums:
    """The sums of losses, or of right labels.

    Where only some prompts make a record's loss infinite, that is their fault: it counts as the largest loss, or as wrong.
    """
    of_records = losses(scores, records)
    finite = torch.isfinite(of_records)
    usable = finite.any(1)
    if kind == "correct":
        whole = (right(scores, records) & finite).long()
    else:
        whole = CODE.encode(of_records.nan_to_num(MOST_LOSS, MOST_LOSS, MOST_LOSS).clamp(0.0, MOST_LOSS))
    weights = torch.tensor(records.weights or [1] * len(records))
    return Sums(
        scores=(whole * weights[:, None])[usable].sum(0),
        weight=int(weights[usable].sum()),
        records=int(usable.sum()),
        skipped=int((~usable).sum()),
    )


def costs(scores: Tensor, weight: int, kind: Score) -> list[float]:
    """The mean loss of each prompt in nats, or the fraction of records that it gets wrong. ``weight`` is not 0."""
    if kind == "correct":
        return [1 - count / weight for count in scores.tolist()]
    return [total / (weight << BITS) for total in scores.tolist()]


def _parts(records: Records, prompts: Sequence[Prompt]) -> Iterator[list[int]]:
    """Records in parts whose hidden states are in memory together."""
    part: list[int] = []
    tokens = 0
    for i, text in enumerate(records.texts):
        options = records.options(i)
        size = sum(len(text) + len(prompt.embeddings) + sum(map(len, options)) for prompt in prompts)
        if part and tokens + size > CHUNK:
            yield part
            part, tokens = [], 0
        part.append(i)
        tokens += size
    if part:
        yield part


class _Tree:
    """What passes through the model for one record, as the nodes of a tree; see :class:`~fedgrove.models.continuations.Node`.

    Prompts of one length pass together, as many as ``TOGETHER`` allows.
    """

    def __init__(self, decoder: Decoder, records: Records, record: int, prompts: Sequence[Prompt], place: Place):
        self.nodes: list[Node] = []
        self._answers = records.options(record)
        longest = max(map(len, self._answers))
        self._ids = torch.tensor([[*one, *[0] * (longest - len(one))] for one in self._answers])
        self._pieces: list[tuple[list[int], int, int | None]] = []  # places of prompts, the nodes before and of their answers
        prefix = list(records.prefix)
        whole = embed(decoder, torch.tensor(prefix + list(records.texts[record])))
        tails = embed(decoder, self._ids[:, :-1]) if longest > 1 else None
        root = None
        if place == "end" or not all(len(prompt.embeddings) for prompt in prompts):
            root = self._add(None, whole[None])
        for places in _groups(prompts, len(whole) + longest, len(self._answers)):
            before = root
            if len(prompts[places[0]].embeddings):
                rows = torch.stack([prompts[i].embeddings for i in places]).to(whole)
                split = len(prefix) if prompts[places[0]].written else 0
                before = self._add(root, rows) if place == "end" else self._in_front(rows, whole, split)
            assert before is not None
            after = None if tails is None else self._add(before, tails.repeat(len(places), 1, 1))
            self._pieces.append((places, before, after))

    def _in_front(self, rows: Tensor, whole: Tensor, split: int) -> int:
        """The first ``split`` tokens of a record, the prompts, and its other tokens, for each prompt."""
        every = whole.expand(len(rows), -1, -1)
        return self._add(self._add(None, torch.cat([every[:, :split], rows], 1)), every[:, split:])

    def _add(self, parent: int | None, embeddings: Tensor) -> int:
        self.nodes.append(Node(parent, embeddings))
        return len(self.nodes) - 1

    def log_probabilities(self, decoder: Decoder, states: Sequence[Tensor]) -> Iterator[tuple[list[int], Tensor]]:
        """Yields (places of prompts, their (prompts, options) log p)."""
        number, longest = self._ids.shape
        counted = torch.arange(longest) < torch.tensor([len(one) for one in self._answers])[:, None]
        for places, before, after in self._pieces:
            last = states[before][:, -1]
            each = log_probabilities(decoder, last, self._ids[:, 0].expand(len(last), -1))
            of_tokens = each.expand(len(places), -1)[:, :, None]
            if after is not None:
                rows = states[after].flatten(0, 1)
                next_ids = self._ids[:, 1:].repeat(len(places), 1).reshape(-1, 1)
                rest = log_probabilities(decoder, rows, next_ids).view(len(places), number, longest - 1)
                of_tokens = torch.cat([of_tokens, rest], 2)
            yield places, of_tokens.double().masked_fill(~counted, 0.0).sum(2)


def _groups(prompts: Sequence[Prompt], others: int, options: int) -> Iterator[list[int]]:
    """Places of prompts of one length and kind, as many as pass together.

    Args:
        others: tokens in a row besides the prompt's.
        options: rows for each prompt.
    """
    alike: dict[tuple[int, bool], list[int]] = {}
    for i, prompt in enumerate(prompts):
        alike.setdefault((len(prompt.embeddings), prompt.written), []).append(i)
    for (length, _), places in sorted(alike.items()):
        most = max(1, TOGETHER // ((length + others) * options))
        yield from (places[start : start + most] for start in range(0, len(places), most))
