"""Weights that several blocks share: their statistics are summed over the blocks, and each is pruned once.

The inputs of every use count, as if all of them were inputs of one linear. A weight is pruned with the last block that has it,
when the sums are complete; until then they are a file, which holds the sums over all blocks before one, in the order of the
blocks. That takes inputs that pruning does not change: those of the dense model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import safe_open

from fedgrove.errors import FedgroveError
from fedgrove.input_statistics.statistics import InputStatistics
from fedgrove.models.blocks import Decoder
from fedgrove.models.tensor_files import save_tensors
from fedgrove.stages.prune.config import Config

Sums = dict[str, InputStatistics]  # by the name of a shared weight in the checkpoint


def complete_names(decoder: Decoder, block: int) -> dict[str, str]:
    """The linears that are pruned with a block: their names in it -> the names of their weights in the checkpoint.

    These are all of its linears but those whose weight a later linear has too.
    """
    last = {stored: uses[-1] for stored, uses in decoder.shared_linears.items()}
    names = decoder.block_names(block)
    return {name: stored for name, stored in names.items() if last.get(stored, (block, name)) == (block, name)}


def check_shared(index: int, config: Config, decoder: Decoder) -> None:
    """Refuses what shared weights make impossible.

    Args:
        index: the stage's place in the job.

    Raises:
        FedgroveError: names the key.
    """
    if not decoder.shared_linears:
        return
    at = f"stages.{index}"
    stored, uses = next(iter(decoder.shared_linears.items()))
    who = f"blocks {uses[0][0]} and {uses[1][0]} share {stored}"
    if config.calibration_source == "sequential":
        raise FedgroveError(
            f"{at}.source: {who}, and pruning it at its first use would change the inputs of the later ones",
            'set source = "dense"',
        )
    if config.layers != "all":
        raise FedgroveError(f"{at}.layers: {who}, so a client has to go through all blocks", 'set layers = "all"')
    if config.mend is not None:
        raise FedgroveError(f"{at}.mend: {who}, but masks are mended by the inputs of one block", "leave mend out")
    if config.personal:
        raise FedgroveError(f"{at}.personal: {who}, but clients prune block by block for themselves", "leave personal out")
    if config.measures_blocks:
        raise FedgroveError(
            f'{at}.allocation: {who}, which cannot be as sparse as "{config.allocation}" makes each of them',
            'set allocation = "even"',
        )


def num_outside_blocks(decoder: Decoder) -> int:
    """Number of stored parameters outside all blocks."""
    checkpoint = decoder.checkpoint
    stored = [name for name in checkpoint.names() if checkpoint.shared_name(name) == name]
    in_blocks = [
        (decoder.stored_name(f"{decoder.prefix}.{block}.{name}") if checkpoint.shares else (block, name), parameter.numel())
        for block, module in enumerate(decoder.blocks)
        for name, parameter in module.named_parameters()
    ]
    return sum(checkpoint.spec(name)[0].numel() for name in stored) - sum(dict(in_blocks).values())


def upload_of(decoder: Decoder, config: Config, upload: int, rounds: Iterable[Iterable[int]]) -> int:
    """Bytes that a client sends in all rounds. Where clients prune, a weight that blocks share is sent once in a round.

    Args:
        upload: bytes for a block with all its linears.
        rounds: the blocks of each round.
    """
    blocks = [block for one in rounds for block in one]
    if config.method.SOLVED_AT == "server" or not decoder.shared_linears:
        return len(blocks) * upload

    def numel(block: int, names: Iterable[str]) -> int:
        return sum(decoder.blank_linear(block, name).numel() for name in names)

    parts = (numel(block, complete_names(decoder, block)) / numel(block, decoder.block_names(block)) for block in blocks)
    return math.ceil(upload * sum(parts))


def add_uses(decoder: Decoder, block: int, inputs: Mapping[str, InputStatistics], before: Sums) -> Sums:
    """The sums over all blocks up to one, for every shared weight.

    Args:
        inputs: the statistics of the block's inputs, by linear.
        before: the sums over the blocks before it; changed.
    """
    for name, stored in decoder.block_names(block).items():
        if stored in decoder.shared_linears and name in inputs:
            before[stored] = before[stored].plus(inputs[name]) if stored in before else inputs[name].copy()
    return before


def sums_file(folder: Path, block: int) -> Path:
    """Where the sums over all blocks before one are kept. It is not called .safetensors: the folders hold such files."""
    return folder / f"{block:04d}.sums"


def write_sums(folder: Path, block: int, sums: Sums) -> None:
    """Stores the sums over all blocks before ``block`` atomically."""
    totals = {stored: one.total for stored, one in sums.items() if one.total is not None}
    tokens = {stored: (one.kind, one.tokens) for stored, one in sums.items()}
    save_tensors({name: total.cpu() for name, total in totals.items()}, sums_file(folder, block), {"sums": json.dumps(tokens)})


def read_sums(folder: Path, block: int, decoder: Decoder) -> Sums:
    """The sums over all blocks before ``block``; none if there is no such file, as before the first use."""
    if not sums_file(folder, block).is_file():
        return {}
    with safe_open(sums_file(folder, block), framework="pt") as file:
        tokens = json.loads(file.metadata()["sums"])
        stored = set(file.keys())
        return {
            name: InputStatistics(kind, number, file.get_tensor(name).to(decoder.device) if name in stored else None)
            for name, (kind, number) in tokens.items()
        }


def forget_sums(folder: Path, before: int) -> None:
    """Deletes the sums over the blocks before each block before ``before``."""
    for file in folder.glob("*.sums"):
        if int(file.stem) < before:
            file.unlink()
