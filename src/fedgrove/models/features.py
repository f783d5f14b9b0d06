"""Features of a record: the pooled hidden states of some layers of the frozen model, in units of their typical size.

Records pass through the model one by one and unpadded, so that a record's features do not depend on whose records it is
computed with. Their typical size is measured by the server on random tokens, not on anybody's text: one exchange is enough,
and whoever drops out leaves the sums of the others as they are.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedgrove.events import OnProgress
from fedgrove.models.blocks import Decoder
from fedgrove.models.walk import walk

PROBES = 8  # windows of random tokens


@dataclass(frozen=True)
class Features:
    """How hidden states become features: fixed by the job, and the same at every client.

    Attributes:
        layers: as transformers counts ``hidden_states``: 0 are the embeddings, −1 what the model's own head reads.
        pool: "mean" or "last".
        center, scale: (hidden states,) float32, side by side for each layer: what is subtracted from them, and powers of two
            that they are then multiplied by.
        projection: (hidden states, features) float64; None: they are the features.
    """

    layers: tuple[int, ...]
    pool: str
    center: Tensor
    scale: Tensor
    projection: Tensor | None

    def of(self, states: Tensor) -> Tensor:
        """(records, hidden states) float32 -> (records, features) float64."""
        scaled = (states.double() - self.center.double()) * self.scale.double()
        return scaled if self.projection is None else scaled @ self.projection

    def unfold(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and biases for features as those for hidden states: (classes, hidden states) and (classes,), float32."""
        raw = weight if self.projection is None else weight @ self.projection.T
        raw = raw * self.scale.double()
        return raw.float(), (bias - raw @ self.center.double()).float()


def width(decoder: Decoder, layers: Sequence[int]) -> int:
    """The number of hidden states of a record: side by side for each layer."""
    return len(layers) * int(decoder.checkpoint.config.get_text_config().hidden_size)


def projection(num_states: int, size: int | None, seed: str) -> Tensor | None:
    """A Gaussian matrix (hidden states, size) from the seed; it keeps distances in the mean (Johnson & Lindenstrauss 1984).

    Returns:
        float64; None: there are no more hidden states than ``size``.
    """
    if size is None or size >= num_states:
        return None
    digest = hashlib.sha256(f"{seed}/projection".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    matrix = torch.randn(num_states, size, generator=generator, dtype=torch.float64)
    return matrix / math.sqrt(num_states)


def typical(decoder: Decoder, layers: Sequence[int], length: int, seed: str) -> tuple[Tensor, Tensor]:
    """``center`` and ``scale`` of :class:`Features`, from windows of random tokens: the mean, and 1 / standard deviation.

    The deviation is that of single tokens. Pooled states of real text differ by a few of these at most.
    """
    digest = hashlib.sha256(f"{seed}/probe".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    rows = cast(Any, decoder.model).get_input_embeddings().weight.shape[0]
    windows = torch.randint(rows, (PROBES, length), generator=generator)
    states: list[list[Tensor]] = [[] for _ in layers]
    for at, _, state in _states(decoder, list(windows), layers):
        states[at].append(state.double().cpu())
    each = [torch.cat(of) for of in states]
    center = torch.cat([of.mean(0) for of in each])
    deviation = torch.cat([of.std(0).clamp_min(1e-6 * float(of.abs().max()) + 1e-30) for of in each])
    return center.float(), torch.exp2(-deviation.log2().round()).float()


def pooled_states(
    decoder: Decoder,
    windows: Sequence[Tensor],
    layers: Sequence[int],
    pool: str,
    on_progress: OnProgress = lambda done, total: None,
) -> Tensor:
    """The pooled hidden states of records.

    Args:
        windows: (tokens,) token ids of each record.

    Returns:
        (records, hidden states) float32 on the CPU.
    """
    each = width(decoder, layers) // len(layers)
    pooled = torch.empty(len(windows), len(layers), each)
    for at, record, state in _states(decoder, windows, layers, on_progress):
        pooled[record, at] = (state.double().mean(0) if pool == "mean" else state[-1]).float().cpu()
    return pooled.flatten(1)


def _states(
    decoder: Decoder,
    windows: Sequence[Tensor],
    layers: Sequence[int],
    on_progress: OnProgress = lambda done, total: None,
) -> Iterator[tuple[int, int, Tensor]]:
    """Yields (place in ``layers``, record, hidden states (tokens, width)) for each layer and record, block by block."""
    wanted = [layer % (len(decoder) + 1) for layer in layers]
    texts = [ids[None] for ids in windows]
    for passed, record, hidden in walk(decoder, texts, max(wanted), on_progress):
        if passed in wanted:
            states = hidden if passed < len(decoder) else _last(decoder, hidden)
            yield wanted.index(passed), record, states[0]


class _Reached(Exception):
    """Not an error: ends a forward pass when the model's own head is called."""


def _last(decoder: Decoder, hidden: Tensor) -> Tensor:
    """What the model's own head reads, from the last block's output: transformers' ``last_hidden_state``."""
    found: list[Tensor] = []

    def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(args[0])
        raise _Reached

    hook = cast(Any, decoder.model).get_output_embeddings().register_forward_pre_hook(record)
    try:
        with suppress(_Reached):
            decoder.head(hidden[0])
    finally:
        hook.remove()
    return found[0]
