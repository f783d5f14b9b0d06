"""Losses of a model at several distances along a random direction, in about the memory of inference.

Blocks pass one after the other, as in :mod:`fedgrove.models.perplexity`: a block's weight is made once from the stored
weight and the steps so far, then W + side·z for each side, and let go. MeZO (arXiv 2305.17333) changes the weights in
place three times a step instead; in half precision they do not come back to what they were. Here stored weights are never
changed, and every W + side·z is rounded once to the dtype of computation, float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from fedgrove import heap
from fedgrove.data.windows import IGNORED
from fedgrove.models.blocks import Call, Decoder
from fedgrove.models.signs import direction_like, key_of
from fedgrove.stages.tune.seeds.offsets import Offsets, moved

IN_MEMORY = 2**28  # bytes of weights and offsets up to which a model is kept in memory, because it is then twice as fast
PER_WEIGHT = 12  # bytes of a linear's entry that is kept in memory: float32, and the int64 of its offset

CheckWeight = Callable[[str, Tensor, Tensor], None]  # name of a linear, the stored weight, the weight with all steps


def in_memory(parameters: int) -> bool:
    """Whether a model with so many entries in its linears is kept in memory. The bits are the same either way."""
    return parameters * PER_WEIGHT <= IN_MEMORY


class TwoSided:
    """A model that moves along random directions; only its coefficients are state.

    Args:
        decoder: the model before the stage, computing in float32.
        offsets: the sum of the steps, tensor by tensor.
        coefficients: (directions,) int64, where the model starts.
        masked: names of the linears whose zeros stay zero.
        check: called once for every linear, when it is first made; may raise.
        whole: keep the full model in memory.

    Attributes:
        coefficients: where the model is now; see :meth:`move`.
    """

    def __init__(
        self,
        decoder: Decoder,
        offsets: Offsets,
        coefficients: Tensor,
        seed: str,
        masked: Sequence[str] = (),
        check: CheckWeight | None = None,
        whole: bool = False,
    ):
        self.coefficients = coefficients.clone()
        self._decoder, self._offsets, self._seed = decoder, offsets, seed
        self._masked, self._check = frozenset(masked), check
        self._stored: dict[str, Tensor] = {}  # by name in the checkpoint, if the full model is in memory
        if whole:
            decoder.load_all()
            for index in range(len(decoder)):
                for name, stored in decoder.block_names(index).items():
                    self._stored[stored] = cast(Tensor, decoder.blocks[index].get_submodule(name).weight).detach()

    def move(self, direction: int, coefficient: int) -> None:
        """Adds to the coefficient of a direction; the weights follow when they are next used."""
        self.coefficients[direction] += coefficient

    def losses(self, ids: Tensor, labels: Tensor, direction: int, sides: Sequence[float]) -> Tensor:
        """The mean loss per token of each window, of each W + side·z.

        Every window passes by itself, so that its loss has the same bits whatever else is in the batch.

        Args:
            ids, labels: (windows, length); tokens with label ``IGNORED`` have no loss.
            direction: of z.
            sides: multiples of z.

        Returns:
            (sides, windows) float64; 0 for a window without labels.
        """
        found = torch.zeros(len(sides), len(ids), dtype=torch.float64)
        if not len(ids):
            return found
        windows = [ids[i : i + 1] for i in range(len(ids))]
        calls: list[Call] = []
        embedded = []
        for window in windows:
            state, calls = self._decoder.embed(window)
            embedded.append(state)
        hidden = [list(embedded) for _ in sides]
        for index in range(len(self._decoder)):
            with self._block(index) as block:
                self._pass(index, block, direction, list(zip(sides, hidden, strict=True)), calls)
        if not self._stored:
            heap.release_freed_memory()  # of the blocks, before the logits take theirs
        self._check = None
        for side, states in enumerate(hidden):
            for i, state in enumerate(states):
                found[side, i] = self._loss(windows[i], labels[i], state)
        return found

    def flush(self) -> None:
        """Writes the offsets to disk, where the next request finds them."""
        self._offsets.flush()

    @contextmanager
    def _block(self, index: int) -> Iterator[nn.Module]:
        if self._stored:
            yield self._decoder.blocks[index]
        else:
            with self._decoder.loaded(index) as block:
                yield block

    def _pass(
        self, index: int, block: nn.Module, direction: int, sides: list[tuple[float, list[Tensor]]], calls: list[Call]
    ) -> None:
        """Replaces the hidden states of every side by those after a block."""
        weights = self._weights(index, block, direction)
        for side, states in sides:
            for module, weight, signs in weights:
                _put(module, torch.add(weight, signs, alpha=side))
            for i, state in enumerate(states):
                states[i] = self._decoder.run(block, state, calls[index])

    def _weights(self, index: int, block: nn.Module, direction: int) -> list[tuple[nn.Linear, Tensor, Tensor]]:
        """For every linear of a block: its module, its weight with all steps, float32, and z."""
        weights = []
        for name, stored in self._decoder.block_names(index).items():
            linear = self._decoder.linear_name(index, name)
            module = cast(nn.Linear, block.get_submodule(name))
            before = self._stored.get(stored, module.weight.detach())
            weight = moved(before, self._offsets.at(stored, before.shape, self.coefficients), torch.float32)
            signs = direction_like(key_of(self._seed, stored), direction, before).to(before.device)
            if self._stored:
                signs = signs.float()  # adds faster than int8, but takes four times the memory
            if linear in self._masked:
                weight.masked_fill_(before == 0, 0)
                signs.masked_fill_(before == 0, 0)
            if self._check is not None:
                self._check(linear, before, weight)
            _put(module, weight)  # frees the stored weight, unless the full model is in memory
            weights.append((module, weight, signs))
        return weights

    def _loss(self, ids: Tensor, labels: Tensor, hidden: Tensor) -> float:
        wanted = labels[1:]
        learnt = int((wanted != IGNORED).sum())
        if not learnt:
            return 0.0
        logits = self._decoder.logits(ids, hidden)[0, :-1].float()
        total = nn.functional.cross_entropy(logits, wanted.to(logits.device), ignore_index=IGNORED, reduction="sum")
        return float(total) / learnt


def _put(module: nn.Linear, weight: Tensor) -> None:
    module.weight = nn.Parameter(weight, requires_grad=False)
