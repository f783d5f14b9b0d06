"""How much of a client's text trained each expert, or each member of a pool: its weight in the sum of their changes.

A client trains most linears on all of its text, but an expert only on the tokens that the router sent to it. So an expert's
change counts by these tokens: the client's weight, times the fraction of the round's tokens that reached the expert. A client
of whose text nothing reached an expert, or that does not hold it, has weight 0 in its sum. An expert that fewer clients trained
than ``privacy.min_group`` says keeps its weights, so that no single client rewrites it for all.

The members of a pool are weighed in the same way, by the windows that a client dealt to them
(:mod:`fedgrove.stages.tune.exchanges.members`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedgrove.models.blocks import Decoder
from fedgrove.models.expert_cut import routing_of
from fedgrove.models.expert_sums import blocks_with_experts
from fedgrove.models.experts import expert_place, experts_in
from fedgrove.rounds.request import CHANGE, Tensors
from fedgrove.rounds.wire import WireError
from fedgrove.stages.tune import fixed_point
from fedgrove.stages.tune.fixed_point import BITS, LARGEST

TOKENS, WEIGHTS, REACHED = "tokens", "weights", "reached"  # tensors of a response, (blocks with experts, experts) each

Places = Mapping[str, tuple[int, int]]  # of linears of experts: the row of the block among those with experts, and the expert


@dataclass(frozen=True)
class ExpertRules:
    """How the server weighs the changes of experts.

    Attributes:
        places: of the linears of experts, or of members.
        per_token: how many experts compute a token.
        min_group: an expert that fewer clients trained in a round does not change.
    """

    places: Places
    per_token: int
    min_group: int


def shape_of(decoder: Decoder) -> torch.Size | None:
    """(blocks with experts, experts) of the whole model of which a decoder may hold only some experts; None: it has none."""
    blocks = blocks_with_experts(decoder)
    return torch.Size([len(blocks), routing_of(decoder.checkpoint.config).experts]) if blocks else None


def places_of(decoder: Decoder, names: Iterable[str] | None = None) -> Places:
    """Where the linears of experts are in tensors of the shape :func:`shape_of`.

    Args:
        names: of linears; None: those of the decoder.
    """
    rows = {block: row for row, block in enumerate(blocks_with_experts(decoder))}
    places = ((name, expert_place(name)) for name in (decoder.linear_names() if names is None else names))
    return {name: (rows[place[0]], place[1]) for name, place in places if place is not None}


def of_all(decoder: Decoder, counts: list[Tensor]) -> Tensor:
    """Counts of the experts that a decoder has as (blocks, experts) int64 of the whole model; 0 for the others.

    Args:
        counts: of each block that has experts, (experts of the decoder,) int64, in their order.
    """
    shape = shape_of(decoder)
    assert shape is not None
    total = torch.zeros(shape, dtype=torch.int64)
    for row, (block, count) in enumerate(zip(blocks_with_experts(decoder), counts, strict=True)):
        experts = experts_in(decoder.blocks[block])
        assert experts is not None
        total[row, [int(name) for name, _ in experts.named_children()]] = count
    return total


def fractions(tokens: Tensor, per_token: int) -> Tensor:
    """The fraction of a round's tokens that reached each expert, (blocks, experts) float64 in [0, 1].

    Args:
        tokens: that reached each expert, (blocks, experts) int64; of every block, ``per_token`` times the tokens of the round.
    """
    of_round = tokens.sum(1, keepdim=True).double() / per_token
    return torch.where(of_round > 0, tokens / of_round.clamp(min=1), 0.0)


def places_of_members(linears: Iterable[str], members: int) -> Places:
    """Where ``K/<linear>``, the change of a linear by member K, is in tensors (1, members)."""
    return {f"{member}/{name}": (0, member) for name in linears for member in range(members)}


def check_tokens(tokens: Tensor, per_token: int, most: int) -> None:
    """Refuses numbers of tokens that no round of training has.

    Args:
        per_token: how many experts compute a token.
        most: tokens of a round.

    Raises:
        WireError: they do not add up, or are more than there are.
    """
    sums = tokens.sum(1)
    if (tokens < 0).any() or (sums != sums[0]).any() or sums[0] % per_token or (tokens > sums[:, None] // per_token).any():
        raise WireError(f"{TOKENS} does not add up to {per_token} experts for each token")
    if sums[0] > per_token * most:
        raise WireError(f"{TOKENS} is more than the {most} tokens of a round")


@dataclass(frozen=True)
class Counted:
    """The weights of experts in a sum of fixed-point numbers.

    Attributes:
        weights: Σ weight · fraction, (blocks, experts) integer multiples of 2⁻²⁴.
        reached: number of clients, (blocks, experts).
    """

    weights: Tensor
    reached: Tensor

    @classmethod
    def encode(cls, parts: Tensor, weight: float) -> Counted:
        """One client's, int32, rounded down.

        Args:
            parts: fractions of what it trained on, float64 in [0, 1].
            weight: of the client in the sum.
        """
        weights = (parts * weight * 2.0**BITS).trunc().int()
        return cls(weights, (weights > 0).int())

    def of(self, place: tuple[int, int]) -> float:
        """The weight of an expert."""
        return float(self.weights[place]) / 2.0**BITS

    def check(self, weight: float, clients: int) -> None:
        """Refuses what no clients of this total weight can send.

        Raises:
            WireError: says which tensor is wrong.
        """
        if (self.weights < 0).any() or (self.weights > weight * 2.0**BITS).any():
            raise WireError(f"{WEIGHTS} is out of range")
        if (self.reached < 0).any() or (self.reached > clients).any() or ((self.reached == 0) != (self.weights == 0)).any():
            raise WireError(f"{REACHED} does not fit {WEIGHTS}")

    def check_change(self, name: str, value: Tensor, place: tuple[int, int]) -> None:
        """Refuses a change of an expert that is larger than its weight allows.

        Raises:
            WireError: it is.
        """
        if (value.long().abs() > int(self.weights[place]) * LARGEST).any():
            raise WireError(f"{name} is out of range")


def counted_in(tensors: Tensors, prefix: str = CHANGE) -> Counted | None:
    """The weights of experts among the tensors of a response or of a sum."""
    return Counted(tensors[prefix + WEIGHTS], tensors[prefix + REACHED]) if prefix + WEIGHTS in tensors else None


def check_fixed(changes: Tensors, counted: Counted | None, places: Places, weight: float, clients: int) -> None:
    """Refuses fixed-point numbers that clients of this total weight cannot send.

    Args:
        changes: by name, with or without ``change/``.
        counted: the weights of experts; None: of no experts, or with noise.
        places: of the linears of experts.
        clients: how many.

    Raises:
        WireError: names the first tensor that is wrong.
    """
    if counted is not None:
        counted.check(weight, clients)
    for name, tensor in changes.items():
        place = places.get(name.removeprefix(CHANGE).rpartition("/")[0])
        if counted is None or place is None:
            fixed_point.check({name: tensor}, weight)
        else:
            counted.check_change(name, tensor, place)
