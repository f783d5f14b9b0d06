"""Channels and heads of linears that several blocks share: a cut holds in all of these blocks."""

from __future__ import annotations

from fedgrove.errors import FedgroveError
from fedgrove.models.blocks import Decoder
from fedgrove.models.width import CoupledLinears, family_of
from fedgrove.stages.structured.config import Config
from fedgrove.stages.structured.scores import score_of


def first_uses(decoder: Decoder) -> dict[str, tuple[int, ...]]:
    """For every block, the first block whose groups of a kind are the same, because it has the same linears; by kind.

    A group that several blocks share is cut in all of them, so what a window's loss changes by is the sum over these blocks.
    """
    firsts = {}
    for kind, part in _parts(decoder).items():
        first: dict[tuple[str, ...], int] = {}
        firsts[kind] = tuple(first.setdefault(_weights(decoder, block, part), block) for block in range(len(decoder)))
    return firsts


def check_shared(index: int, config: Config, decoder: Decoder) -> None:
    """Refuses what shared weights make impossible.

    Args:
        index: the stage's place in the job.

    Raises:
        FedgroveError: names the key.
    """
    for kind, part in _parts(decoder).items():
        if not getattr(config, kind):
            continue
        users: dict[str, tuple[int, tuple[str, ...]]] = {}  # of each weight: its first block, and the weights of that block
        for block in range(len(decoder)):
            weights = _weights(decoder, block, part)
            for weight in weights:
                first, others = users.setdefault(weight, (block, weights))
                if others != weights:
                    raise FedgroveError(
                        f"stages.{index}.{kind}: blocks {first} and {block} share {weight}, but not all linears of {kind}",
                        f"set {kind} to 0",
                    )
                if first != block and score_of(config.score).PER_WEIGHT:
                    raise FedgroveError(
                        f"stages.{index}.score: blocks {first} and {block} share {weight}, but {config.score} squares what "
                        "each block does to a weight",
                        'set score = "fisher"',
                    )
                if first != block and config.repair:
                    raise FedgroveError(
                        f"stages.{index}.repair: blocks {first} and {block} share {weight}, but a linear is repaired by the "
                        "inputs of one block",
                        "set repair = false",
                    )


def own_and_all(decoder: Decoder) -> tuple[int, int]:
    """Number of weights in the linears of an average block: those that no other block has, and all."""
    own = total = 0
    for block in range(len(decoder)):
        for name, stored in decoder.block_names(block).items():
            numel = decoder.blank_linear(block, name).numel()
            total += numel
            own += 0 if stored in decoder.shared_linears else numel
    return own // len(decoder), total // len(decoder)


def _parts(decoder: Decoder) -> dict[str, CoupledLinears]:
    family = family_of(decoder.checkpoint.config)
    return {"channels": family.channels, **({} if family.heads is None else {"heads": family.heads})}


def _weights(decoder: Decoder, block: int, part: CoupledLinears) -> tuple[str, ...]:
    """The names in the checkpoint of the weights that a kind of group of a block consists of."""
    names = decoder.block_names(block)
    return tuple(names[linear] for linear in (*part.producers, part.consumer))
