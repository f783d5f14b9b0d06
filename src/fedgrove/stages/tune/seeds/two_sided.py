"""Losses of a model at several distances along a random direction, in about the memory of inference.

Blocks pass one after the other, as in :mod:`fedgrove.models.perplexity`: a block's weight is made once from the stored
weight and the steps so far, then W + side·z for each side, and let go. MeZO (arXiv 2305.17333) changes the weights in
place three times a step instead; in half precision they do not come back to what they were. Here stored weights are never
changed, and every W + side·z is rounded once to the dtype of computation, float32. A model in 8 or 4 bits is kept in memory,
and a block of it at a time is written out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import cast

import torch
from torch import Tensor, nn

from fedgrove import heap
from fedgrove.data.windows import IGNORED
from fedgrove.models.blocks import Decoder, as_matrix
from fedgrove.models.next_tokens import head_loss, loss_sum
from fedgrove.models.replaced_blocks import Call
from fedgrove.stages.tune.seeds.moving import Linear, Moving
from fedgrove.stages.tune.seeds.quantized import Quantized
from fedgrove.stages.tune.seeds.targets import is_target

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
        moving: what moves.
        coefficients: (directions,) int64, where the model starts.
        masked: names of the linears whose zeros stay zero.
        check: called once for every linear, when it is first made; may raise.
        whole: keep the full model in memory.
        bits: of the weights that stay as they are; with 8 and 4 the full model is in memory.
        targets: the linears that move, by the ends of their names; empty: all.

    Attributes:
        coefficients: where the model is now; see :meth:`move`.
    """

    def __init__(
        self,
        decoder: Decoder,
        moving: Moving,
        coefficients: Tensor,
        masked: Sequence[str] = (),
        check: CheckWeight | None = None,
        whole: bool = False,
        bits: int = 32,
        targets: Collection[str] = (),
    ):
        self.coefficients = coefficients.clone()
        self._decoder, self._moving = decoder, moving
        self._masked, self._check, self._targets = frozenset(masked), check, targets
        self._stored: dict[str, Tensor | Quantized] = {}  # by name in the checkpoint, if the full model is in memory
        if whole or bits < 16:
            self._load(bits)

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
                found[side, i] = self._loss(labels[i : i + 1], state)
        return found

    def slopes(self, ids: Tensor, labels: Tensor, directions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The exact derivative of the loss along each direction, by one backward pass of each window.

        All weights and their gradients are in memory, in float32.

        Args:
            ids, labels: as in :meth:`losses`.

        Returns:
            (directions,) float64, the sum over windows; and each window's mean loss per token, (windows,) float64. A window
            whose loss is not finite adds nothing.
        """
        model = self._decoder.load_all() if not self._stored else self._decoder.model
        every = (one for index, block in enumerate(self._decoder.blocks) for one in self._linears(index, block))
        linears = list({one.stored: one for one in every}.values())  # those that share a weight are one module
        for linear in linears:
            weight = nn.Parameter(self._with_steps(linear), requires_grad=is_target(linear.name, self._targets))
            cast(nn.Linear, linear.module).weight = weight
        self._check = None
        found = torch.zeros(len(ids), dtype=torch.float64)
        with torch.enable_grad():
            for i in range(len(ids)):
                loss = loss_sum(model, ids[i : i + 1], labels[i : i + 1]) / _learnt(labels[i])
                found[i] = loss.detach()
                if bool(torch.isfinite(loss)) and loss.requires_grad:
                    torch.autograd.backward(loss)
        total = torch.zeros(len(directions), dtype=torch.float64)
        for linear in linears:
            gradient = cast(nn.Linear, linear.module).weight.grad
            if gradient is not None:
                if linear.name in self._masked:
                    gradient.masked_fill_(linear.weight == 0, 0)
                total += self._moving.slopes(linear, gradient, directions)
            _put(linear.module, linear.weight.to("meta") if self._stored else linear.weight)
        return total, found

    def flush(self) -> None:
        """Writes the offsets to disk, where the next request finds them."""
        self._moving.offsets.flush()

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
            for module, weight, z in weights:
                _put(module, weight if z is None else torch.add(weight, z, alpha=side))
            for i, state in enumerate(states):
                states[i] = self._decoder.run(block, state, calls[index])
        if self._stored:
            for module, weight, _ in weights:
                _put(module, weight.to("meta"))  # else the whole model would be there a second time

    def _weights(self, index: int, block: nn.Module, direction: int) -> list[tuple[nn.Module, Tensor, Tensor | None]]:
        """For every linear of a block: its module, its weight with all steps, float32, and z; None if it does not move."""
        weights: list[tuple[nn.Module, Tensor, Tensor | None]] = []
        for linear in self._linears(index, block):
            weight, z = self._with_steps(linear), None
            if is_target(linear.name, self._targets):
                z = self._moving.along(linear, direction)
                if self._stored:
                    z = z.float()  # adds faster than int8, but takes four times the memory
                if linear.name in self._masked:
                    z.masked_fill_(linear.weight == 0, 0)
            _put(linear.module, weight)  # frees the stored weight, unless the full model is in memory
            weights.append((linear.module, weight, z))
        return weights

    def _with_steps(self, linear: Linear) -> Tensor:
        """A weight with all steps, if it moves, float32, in the checkpoint's layout."""
        if not is_target(linear.name, self._targets):
            return linear.weight.float()
        weight = self._moving.weight(linear, self.coefficients, torch.float32)
        if linear.name in self._masked:
            weight.masked_fill_(linear.weight == 0, 0)
        if self._check is not None:
            self._check(linear.name, linear.weight, weight)
        return weight

    def _linears(self, index: int, block: nn.Module) -> Iterator[Linear]:
        """The linears of a block, as they were before the stage; of one that is kept in few bits, in float32."""
        for name, stored in self._decoder.block_names(index).items():
            module = cast(nn.Linear, block.get_submodule(name))
            before = self._stored.get(stored, module.weight.detach())
            if isinstance(before, Quantized):
                before = as_matrix(module, before.matrix()).to(self._decoder.device)
            yield Linear(self._decoder.linear_name(index, name), stored, module, before)

    def _load(self, bits: int) -> None:
        """Keeps the full model in memory, its linears' weights apart from the modules."""
        places = count()

        def keep(block: nn.Module) -> None:
            for name, stored in self._decoder.block_names(next(places)).items():
                module = cast(nn.Linear, block.get_submodule(name))
                if stored not in self._stored:
                    weight = module.weight.detach()
                    self._stored[stored] = weight if bits >= 16 else Quantized(as_matrix(module, weight), bits)
                _put(module, module.weight.detach().to("meta"))

        self._decoder.load_all(keep)

    def _loss(self, labels: Tensor, hidden: Tensor) -> float:
        """The mean over the tokens of a window that have a label; 0 if none has."""
        total = head_loss(self._decoder.head, hidden, labels)
        return float(total / _learnt(labels[0]))


def _learnt(labels: Tensor) -> int:
    """How many tokens of a window have a loss, but at least 1."""
    return max(1, int((labels[1:] != IGNORED).sum()))


def _put(module: nn.Module, weight: Tensor) -> None:
    module.weight = nn.Parameter(weight, requires_grad=False)
