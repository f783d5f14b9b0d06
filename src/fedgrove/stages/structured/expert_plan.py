"""The plan of a stage that cuts experts, or blocks of a mixture of experts: how many stay, and what it costs each client."""

from __future__ import annotations

from collections.abc import Mapping

from fedgrove.errors import FedgroveError
from fedgrove.models.blocks import Decoder
from fedgrove.models.cost import count_parameters
from fedgrove.models.expert_cut import routing_of
from fedgrove.models.expert_sums import blocks_with_experts
from fedgrove.models.experts import expert_of
from fedgrove.models.linears import linears
from fedgrove.rounds.capabilities import Capabilities
from fedgrove.stages import base
from fedgrove.stages.structured.config import Config
from fedgrove.stages.structured.exchanges.blocks import ScoreBlocks
from fedgrove.stages.structured.exchanges.experts import disclosed_by
from fedgrove.stages.structured.expert_scores import expert_score_of
from fedgrove.stages.structured.plan import Cost, ExpertCut, Plan, assign, blocks_left, less_than_one, some_blocks


def make_plan(
    index: int, config: Config, decoder: Decoder, capabilities: Mapping[str, Capabilities], secure: bool = False
) -> Plan:
    """Plans the stage. Every client's text passes through every block, once.

    Args:
        index: the stage's place in the job.
        decoder: the model before the stage.
        capabilities: the clients' capabilities, by name.
        secure: whether responses are masked under secure aggregation; masked responses do not compress.

    Raises:
        FedgroveError: the model has no experts, the fraction amounts to less than one expert or leaves fewer than its router
            needs, or a client has too little memory; names the key or the client.
    """
    cut = _cut(index, config, decoder)
    smaller = Decoder(decoder.checkpoint.over(kept_experts=cut.some_left()))
    memory, work = _cost(decoder, config.length)
    numbers = len(expert_score_of(config.expert_score).SUMS) * len(cut.blocks) * cut.before
    upload = (8 if secure else 4) * numbers + 1300  # 4 bytes of a number that is compressed, and 1300: measured
    kind = decoder.checkpoint.config.model_type
    return Plan(
        stage=index,
        num_blocks=len(decoder),
        blocks_left=len(decoder),
        experts=cut,
        parameters=(count_parameters(decoder), count_parameters(smaller)),
        clients=assign(config, decoder, capabilities, Cost(memory, upload, 2 * work), "the forward pass of a block needs"),
        discloses=base.names_of(disclosed_by(config.expert_score)),
        types=(kind, kind),
    )


def make_depth_plan(
    index: int, config: Config, decoder: Decoder, capabilities: Mapping[str, Capabilities], is_last: bool
) -> Plan:
    """Plans a stage that cuts whole blocks of a mixture of experts. Blocks that have no experts stay.

    Args:
        index: the stage's place in the job.
        decoder: the model before the stage.
        capabilities: the clients' capabilities, by name.
        is_last: whether no stage follows.

    Raises:
        FedgroveError: the fraction is less than one block or more than may go, or a later stage could not be planned because
            the shapes of the blocks that stay are not known before, or a client has too little memory; names key or client.
    """
    sparse = blocks_with_experts(decoder)
    dense = tuple(block for block in range(len(decoder)) if block not in sparse)
    if dense and dense[-1] > sparse[0] and not is_last:
        raise FedgroveError(
            f"stages.{index}.depth: block {dense[-1]} has no experts and comes after some that have, so which shape the blocks "
            "have after the cut is not known before",
            "make it the last stage, and tune in a second job",
        )
    left = blocks_left(index, config, len(decoder), dense)
    smaller = Decoder(decoder.checkpoint.over(kept_blocks=some_blocks(len(decoder), left)))
    memory, work = _cost(decoder, config.length)
    kind = decoder.checkpoint.config.model_type
    return Plan(
        stage=index,
        num_blocks=len(decoder),
        blocks_left=left,
        without_experts=dense,
        parameters=(count_parameters(decoder), count_parameters(smaller)),
        clients=assign(
            config, decoder, capabilities, Cost(memory, 8 * len(decoder) + 1300, 2 * work), "the forward pass of a block needs"
        ),
        discloses=base.names_of(ScoreBlocks.DISCLOSES),
        types=(kind, kind),
    )


def _cut(index: int, config: Config, decoder: Decoder) -> ExpertCut:
    """How many experts stay in which blocks.

    Raises:
        FedgroveError: the model has no experts, or the fraction does not fit its router.
    """
    key, kind = f"stages.{index}.experts", decoder.checkpoint.config.model_type
    blocks = blocks_with_experts(decoder)
    if not blocks:
        raise FedgroveError(
            f"{key}: the model has none in any of its {len(decoder)} blocks (type {kind})", "cut channels, heads or depth"
        )
    routing = routing_of(decoder.checkpoint.config)
    left, in_group = routing.left(config.experts), routing.experts // routing.groups
    if left == routing.experts:
        what = "experts" if routing.groups == 1 else f"experts in each of {routing.groups} groups"
        raise less_than_one(index, "experts", config.experts, in_group, what)
    if left < routing.fewest:
        needs = f"chooses {routing.per_token} for each token"
        if routing.groups > 1:
            needs += f" from {routing.groups_per_token} of {routing.groups} groups"
        if routing.best_of_group > 1:
            needs += f", groups by their best {routing.best_of_group}"
        most = (in_group - routing.fewest // routing.groups) / in_group
        raise FedgroveError(
            f"{key}: {config.experts:g} of {routing.experts} experts leaves {left}, but the router {needs}, which takes "
            f"{routing.fewest}",
            f"give {most:.2g} or less" if most > 0 else "no expert of this model can go",
        )
    return ExpertCut(tuple(blocks), routing.experts, left, routing.groups)


def _cost(decoder: Decoder, length: int) -> tuple[int, float]:
    """What a client needs for one window: bytes of memory, and multiplications for a token if the router is even."""
    config = decoder.checkpoint.config
    routing = routing_of(config)
    reached = routing.per_token / routing.experts
    sizes, widest, work = [], 0, 0.0
    for index, block in enumerate(decoder.blocks):
        sizes.append(sum(parameter.numel() for parameter in block.parameters()))
        for name in linears(block):
            rows, columns = decoder.read_shape(f"{decoder.prefix}.{index}.{name}")
            widest = max(widest, rows, columns)
            work += rows * columns * (reached if expert_of(name) else 1.0)
    ends = count_parameters(decoder) - sum(sizes)
    window = length * (6 * config.hidden_size + 4 * widest)
    return 4 * (max(ends, max(sizes) + window)) + 2**24, work
