"""The plan of a stage that prunes: who does what, decided before the first round. The same input gives the same plan."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Literal

from fedgrove.errors import FedgroveError
from fedgrove.input_statistics.exchange import disclosed_by
from fedgrove.models.blocks import Decoder
from fedgrove.models.masks import Target
from fedgrove.privacy import release
from fedgrove.privacy.secagg.session import min_survivors
from fedgrove.quantities import mebibytes
from fedgrove.rounds.capabilities import Capabilities
from fedgrove.rounds.request import Disclosure
from fedgrove.stages import base
from fedgrove.stages.prune.config import Config, LayerSampling
from fedgrove.stages.prune.cost import (
    Cost,
    LargestBlock,
    MaskedBytes,
    cost_of,
    largest_block,
    masked_bytes,
    mending_cost,
    products_of,
    server_memory,
    target_of,
    upload_by_pruner,
)
from fedgrove.stages.prune.exchanges.alone import EvaluateAlone
from fedgrove.stages.prune.exchanges.outliers import MeasureBlocks
from fedgrove.stages.prune.exchanges.personal import ChooseOwn
from fedgrove.stages.prune.shared import check_shared, upload_of


class Assignment(base.Assignment):
    """One client's part.

    Attributes:
        blocks: for each round, the blocks that the client is assigned.
        weight: its weight in the sum: the inverse of the probability that it is assigned a block.
        samples: windows that it calibrates on.
        sparsity: the sparsity that it prunes to.
        held_out: windows that it holds out besides, to choose a model of its own.
    """

    blocks: list[list[int]]
    weight: float
    samples: int
    sparsity: float
    held_out: int = 0


class Plan(base.Plan):
    """The plan of a stage that prunes.

    Attributes:
        sums: whether clients send sums over their text and the server prunes.
        mends_votes: whether clients also send sums over their text, by which the server mends what they voted for.
        choices: bytes that a client would upload with each pruner if the server prunes; else empty.
    """

    kind: Literal["prune"] = "prune"
    clients: dict[str, Assignment]
    sums: bool
    mends_votes: bool = False
    num_blocks: int
    choices: dict[str, int]

    def contributors(self, round_: int, block: int) -> list[str]:
        """The names of the clients that are assigned a block in a round, sorted."""
        return sorted(name for name, assignment in self.clients.items() if block in assignment.blocks[round_])


def make_plan(
    index: int,
    config: Config,
    decoder: Decoder,
    capabilities: Mapping[str, Capabilities],
    seed: int,
    secure: bool = False,
    alone: bool = False,
) -> Plan:
    """Plans a pruning stage: which blocks each client prunes, and what this costs it.

    With layer sampling, a client's number of blocks is proportional to the number that it can prune and upload per second, so
    that all clients finish at about the same time; every block is assigned to at least ``cover`` clients. Each client's blocks
    are drawn anew for every round. Without layer sampling, every client prunes every block.

    Args:
        index: the stage's place in the job.
        capabilities: the clients' capabilities, by name.
        seed: the job's seed.
        secure: whether responses are masked under secure aggregation; masked responses do not compress.
        alone: whether the model that each client would have without the others is measured too.

    Raises:
        FedgroveError: the pattern does not fit a linear, or a client has too little memory; names the linear or the client.
    """
    check_pattern(decoder, config.target)
    check_shared(index, config, decoder)
    num_blocks = len(decoder)
    masked = masked_bytes(config, capabilities) if secure else None
    largest = largest_block(decoder)
    costs = {name: cost_of(largest, config, client, masked) for name, client in capabilities.items()}
    nothing = Cost(memory=0, upload=0, seconds=0.0)
    mending = {
        name: mending_cost(largest, config, client, masked) if config.mends_votes else nothing
        for name, client in capabilities.items()
    }
    memory = {name: max(costs[name].memory, mending[name].memory) for name in capabilities}
    for name, client in sorted(capabilities.items()):
        if client.memory is not None and memory[name] > client.memory:
            raise FedgroveError(
                f"one block needs {mebibytes(memory[name])} of memory, but the client has "
                f"{mebibytes(client.memory)} (clients.memory)",
                'lower length, use pruner "wanda", or leave the client out',
                client=name,
            )
    if isinstance(config.layers, LayerSampling):
        pace = {name: 1 / costs[name].seconds for name in capabilities}
        counts = share_blocks(pace, num_blocks, config.layers.sample, config.layers.cover)
        rounds = [draw_blocks(counts, num_blocks, f"{seed}/{index}/{round_}/layers") for round_ in range(config.rounds)]
    else:
        counts = dict.fromkeys(capabilities, num_blocks)
        rounds = [{name: list(range(num_blocks)) for name in capabilities} for _ in range(config.rounds)]

    assignments = {}
    first = 1 if config.protect_first_block else 0  # no client gets requests for the blocks before it
    for name in sorted(capabilities):
        blocks = [[block for block in drawn[name] if block >= first] for drawn in rounds]
        asked = sum(len(numbers) for numbers in blocks)
        assignments[name] = Assignment(
            blocks=blocks,
            weight=num_blocks / counts[name],
            samples=capabilities[name].samples or config.samples,
            sparsity=target_of(config, capabilities[name]).sparsity,
            held_out=config.windows_held_out(capabilities[name].samples or config.samples),
            memory=memory[name],
            upload=upload_of(decoder, config, costs[name].upload, blocks) + num_blocks * mending[name].upload,
            seconds=round(asked * costs[name].seconds + num_blocks * mending[name].seconds, 1),
        )
    return Plan(
        stage=index,
        sums=config.method.SOLVED_AT == "server",
        mends_votes=config.mends_votes,
        num_blocks=num_blocks,
        clients=assignments,
        choices=upload_by_pruner(largest, num_blocks, config, masked),
        discloses=base.names_of(_discloses(config, secure, bool(products_of(largest, config)), alone)),
        notes=(*_notes(config, secure, assignments, products_of(largest, config)), *_server_note(config, largest, masked)),
    )


def share_blocks(pace: Mapping[str, float], num_blocks: int, sample: float, cover: int) -> dict[str, int]:
    """The number of blocks that each client is assigned: proportional to its pace, at least one, at most all.

    Together, the clients are assigned the fraction ``sample`` of all client-block pairs, or more if ``cover`` clients per block
    require it.

    Args:
        pace: blocks per second, by client.
        sample: the mean fraction of the blocks that a client is assigned, 0 < sample ≤ 1.
        cover: the smallest number of clients per block; at most the number of clients.
    """
    total = max(math.floor(sample * num_blocks * len(pace) + 0.5), cover * num_blocks, len(pace))
    exact: dict[str, float] = {}
    free = dict(pace)
    while free:  # clients over ``num_blocks`` or under 1 get exactly that; the remainder is divided again among the others
        rest = total - sum(exact.values())
        scaled = {name: rest * speed / sum(free.values()) for name, speed in free.items()}
        over = {name for name, number in scaled.items() if number > num_blocks}
        fixed = over or {name for name, number in scaled.items() if number < 1}
        if not fixed:
            exact |= scaled
            break
        for name in fixed:
            exact[name] = num_blocks if over else 1
            del free[name]
    counts = {name: math.floor(number + 1e-9) for name, number in exact.items()}
    by_remainder = sorted(counts, key=lambda name: (counts[name] - exact[name], name))
    for name in by_remainder:
        if sum(counts.values()) >= total:
            break
        if counts[name] < num_blocks:
            counts[name] += 1
    return counts


def draw_blocks(counts: Mapping[str, int], num_blocks: int, seed: str) -> dict[str, list[int]]:
    """Draws the blocks of each client: clients, in shuffled order, take the next blocks of one shuffled, cyclic list.

    Every client gets ``counts[name]`` different blocks, each block with probability counts/num_blocks, and the numbers of
    clients of any two blocks differ by at most one. (Independent draws, as in an unofficial implementation of the paper, can
    leave blocks without any client.)

    Args:
        counts: number of blocks, by client; at most ``num_blocks``.
        seed: the same seed gives the same assignment.

    Returns:
        The block numbers of each client, ascending.
    """
    rng = random.Random(seed)
    blocks = list(range(num_blocks))
    names = sorted(counts)
    rng.shuffle(blocks)
    rng.shuffle(names)
    dealt, at = {}, 0
    for name in names:
        dealt[name] = sorted(blocks[(at + i) % num_blocks] for i in range(counts[name]))
        at += counts[name]
    return dealt


def check_pattern(decoder: Decoder, target: Target) -> None:
    """Refuses an N:M pattern if M does not divide every linear's number of inputs.

    Raises:
        FedgroveError: names the first linear that does not fit.
    """
    if target.pattern:
        for name in decoder.linear_names():
            num_in = decoder.read_shape(name)[1]
            if num_in % target.pattern[1]:
                raise FedgroveError(
                    f'pattern "{target}": {name} has {num_in} inputs, not a multiple of {target.pattern[1]}',
                    "choose another pattern or a sparsity",
                )


def _discloses(config: Config, secure: bool, products: bool, alone: bool) -> frozenset[Disclosure]:
    """What a client's responses reveal about its text, over the whole stage."""
    if config.method.SOLVED_AT == "server":
        disclosed = disclosed_by(products, config.sums_moments)
    else:
        disclosed = config.method.SENDS
        if config.mends_votes:
            disclosed |= disclosed_by(products=False, moments=True)
        if config.measures_blocks:
            disclosed |= MeasureBlocks.DISCLOSES
    if config.personal and not secure:
        disclosed |= ChooseOwn.DISCLOSES
    return disclosed | (EvaluateAlone.DISCLOSES if alone else frozenset())


def _notes(config: Config, secure: bool, assignments: Mapping[str, Assignment], products: Sequence[int]) -> list[str]:
    of = "the word counts of all clients together" if secure else "a client's word counts"
    first = f"The inputs of block 0 depend mainly on how often each token occurs, so their sums reveal much about {of}."
    if config.method.SOLVED_AT == "client":
        notes = []
        if config.measures_blocks:
            notes.append(
                "Before anything is pruned, every client runs the whole model once and sends one number for each block."
            )
        if config.mends_votes:
            notes.append(
                "After the last round, every client runs the whole model once more and sends sums over the inputs of every "
                f"block, with which the server mends the masks. {first}"
            )
        return notes
    if config.epsilon is not None:
        return [release.statistics_statement(config.epsilon, config.delta, config.length, min_survivors(len(assignments)))]
    widest = max(products, default=0)
    few = sum(assignment.samples * config.length < widest for assignment in assignments.values())
    spans = (
        f"{few} of {len(assignments)} clients send products of inputs with {widest} channels, summed over fewer tokens than "
        "channels. Such products reveal the subspace that the inputs span. Raise samples, set mixed = true, or use secure "
        "aggregation."
    )
    notes = [spans] if few and not secure else []
    if config.personal:
        notes.append(_personal_note(len(assignments), secure))
    if config.protect_first_block:
        return notes
    return [
        *notes,
        f"{first} With protect_first_block = true, block 0 is pruned by magnitude and no client sends its sums.",
    ]


def _server_note(config: Config, largest: LargestBlock, masked: MaskedBytes | None) -> list[str]:
    if config.method.SOLVED_AT == "client":
        return []
    return [f"To prune one block, the server needs about {mebibytes(server_memory(largest, config, masked))} of memory."]


def _personal_note(clients: int, secure: bool) -> str:
    others = "the other's sums" if clients == 2 else "the sum over all others"
    tells = "sends nothing of it" if secure else "sends only losses on text that it held out"
    return (
        f"Every client gets the sums of all clients back, so it can tell {others}. It keeps a model of its own, between "
        f"the one that it would have alone and the shared one, and {tells}."
    )
