"""The plan of structured pruning: how many blocks are left and how wide they are, and what it costs each client."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from fedgrove.errors import FedgroveError
from fedgrove.input_statistics.exchange import disclosed_by
from fedgrove.input_statistics.fixed_point import ring_bits
from fedgrove.job.stage_config import Cut
from fedgrove.models.blocks import Decoder
from fedgrove.models.cost import count_parameters, measure_cost
from fedgrove.models.expert_cut import KeptExperts
from fedgrove.models.linears import linears
from fedgrove.models.stream import Checkpoint
from fedgrove.models.width import Width, width_of
from fedgrove.quantities import mebibytes
from fedgrove.rounds.capabilities import SPEED, Capabilities
from fedgrove.rounds.disclosure import Disclosure
from fedgrove.stages import base
from fedgrove.stages.structured.config import Config
from fedgrove.stages.structured.cut import cut_parts, has_bias
from fedgrove.stages.structured.exchanges.blocks import ScoreBlocks
from fedgrove.stages.structured.exchanges.scores import ScoreGroups
from fedgrove.stages.structured.scores import score_of
from fedgrove.stages.structured.shared import check_shared, first_uses, own_and_all

BYTES = 4.0  # that an int64 of a sum compresses to (measured on the shipped model)


class Assignment(base.Assignment):
    """One client's part.

    Attributes:
        samples: windows that it calibrates on.
        disk: bytes of hidden states and gradients on its disk.
    """

    samples: int
    disk: int


@dataclass(frozen=True)
class Cost:
    """What the stage costs every client.

    Attributes:
        memory, upload: bytes.
        work: operations for each token of its text.
    """

    memory: int
    upload: int
    work: float


@dataclass(frozen=True)
class ExpertCut:
    """How many experts stay.

    Attributes:
        blocks: the indexes of the blocks that have experts.
        before, after: the number of experts of each.
        groups: into how many groups of consecutive experts they are divided, of which each loses the same number.
    """

    blocks: tuple[int, ...]
    before: int
    after: int
    groups: int

    def some_left(self) -> KeptExperts:
        """As many experts as stay, while it is not known which."""
        in_group, left = self.before // self.groups, self.after // self.groups
        kept = tuple(group * in_group + place for group in range(self.groups) for place in range(left))
        return dict.fromkeys(self.blocks, kept)


class Plan(base.Plan):
    """The plan of a stage that cuts channels, heads and blocks, or experts.

    Attributes:
        num_blocks: number of blocks before the stage.
        blocks_left: number of blocks after it.
        before, after: the widths of every block; None: of a mixture of experts, of which only experts or blocks are cut.
        queries: query heads in a group.
        experts: how many experts stay; None: all.
        without_experts: the indexes of the blocks of a mixture of experts that have none, and therefore stay.
        first_uses: by kind of group, for every block the first block that has the same groups; see
            :func:`fedgrove.stages.structured.shared.first_uses`.
        parameters: number of parameters of the model, before and after.
        types: model_type in config.json, before and after.
    """

    kind: Literal["structured"] = "structured"
    clients: dict[str, Assignment]
    num_blocks: int
    blocks_left: int
    before: Width | None = None
    after: Width | None = None
    queries: int = 1
    experts: ExpertCut | None = None
    without_experts: tuple[int, ...] = ()
    first_uses: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    parameters: tuple[int, int]
    types: tuple[str, str]

    def reshaped(self, model: Checkpoint) -> Checkpoint:
        if self.experts is not None:
            return model.over(kept_experts=self.experts.some_left())
        if self.after is None:
            return model.over(kept_blocks=some_blocks(self.num_blocks, self.blocks_left))
        return _reshaped(model, self.num_blocks, self.blocks_left, self.after)


def make_plan(
    index: int, config: Config, decoder: Decoder, capabilities: Mapping[str, Capabilities], secure: bool = False
) -> Plan:
    """Plans the stage. Every client scores every block, because gradients reach the first block only through all others.

    Args:
        index: the stage's place in the job.
        decoder: the model before the stage.
        capabilities: the clients' capabilities, by name.
        secure: whether responses are masked under secure aggregation; masked responses do not compress.

    Raises:
        FedgroveError: no configuration of this architecture can express the result, a fraction amounts to less than one group
            or block or leaves too few blocks, or a client has too little memory; names the key or the client.
    """
    before = width_of(decoder.checkpoint.config)
    after = before.without(config.cuts())
    for key, share in (("channels", config.channels), ("heads", config.heads)):
        groups = getattr(before, key)
        if share and getattr(after, key) == groups:
            what = "channels" if key == "channels" else "groups of heads"
            raise less_than_one(index, key, share, groups, what)
    check_shared(index, config, decoder)
    firsts = first_uses(decoder)
    left = blocks_left(index, config, len(decoder))
    smaller = Decoder(_reshaped(decoder.checkpoint, len(decoder), left, after))

    readers = [part.consumer for part in cut_parts(decoder.checkpoint.config, after).values()] if config.repairs else []
    read = [decoder.read_shape(f"{decoder.prefix}.0.{reader}")[1] for reader in readers]  # numbers of inputs
    number_of_tokens = {name: (client.samples or config.samples) * config.length for name, client in capabilities.items()}
    _check_tokens(index, config, read, sum(number_of_tokens.values()), len(capabilities))
    cost = measure_cost(decoder, config.length, masked=False)
    block = sum(parameter.numel() for parameter in decoder.blocks[0].parameters())
    in_linears = sum(weight.numel() for module in linears(decoder.blocks[0]).values() for weight in module.parameters())
    memory = 4 * (cost.others + block + cost.saved) + 2**24
    forward = len(decoder) * in_linears  # multiplications for a token
    upload = work = 0
    if config.depth:
        upload += 8 * len(decoder) + 1300
        work += 2 * forward
    if config.narrows:
        gradients = 2 * in_linears if score_of(config.score).PER_WEIGHT else 0  # of a block's weights, and products with them
        memory = max(memory, 4 * (cost.others + max(block + gradients + 3 * cost.saved, 5 * cost.logits)) + 2**24)
        num_groups = sum(len(set(blocks)) * getattr(before, kind) for kind, blocks in firsts.items())
        of_names = 1300 * len(decoder)  # measured on the shipped model, as are the bytes of a number
        upload += (8 if secure else 4) * num_groups + of_names
        work += 2 * 3 * (forward + cost.vocabulary * cost.width)  # forward, forward again, backward
        work += 2 * forward if gradients else 0
    if read:
        numbers = sum(width * (width + 1) // 2 for width in read)
        of_block = math.ceil(2 * numbers * (ring_bits(sum(number_of_tokens.values())) / 8 if secure else BYTES)) + 1000 * len(
            read
        )
        upload += left * of_block
        work += 2 * forward + 2 * len(decoder) * numbers
        memory = max(
            memory, 4 * (cost.others + block + cost.saved) + 2 * 12 * sum(width**2 for width in read) + of_block + 2**24
        )
    what = f"the forward{' and backward' if config.narrows else ''} pass of a block need{'' if config.narrows else 's'}"
    assignments = assign(config, decoder, capabilities, Cost(memory, upload, work), what)
    discloses: frozenset[Disclosure] = ScoreBlocks.DISCLOSES if config.depth else frozenset()
    if config.narrows:
        discloses |= ScoreGroups.DISCLOSES
    if read:
        discloses |= disclosed_by(products=True, moments=any(has_bias(decoder, 0, reader) for reader in readers))
    return Plan(
        stage=index,
        num_blocks=len(decoder),
        blocks_left=left,
        before=before,
        after=after,
        queries=decoder.checkpoint.config.num_attention_heads // before.heads,
        first_uses=firsts,
        parameters=(count_parameters(decoder), count_parameters(smaller)),
        clients=assignments,
        discloses=base.names_of(discloses),
        notes=(*_notes_on_depth(config, decoder), *_notes(read, number_of_tokens, secure)),
        types=(decoder.checkpoint.config.model_type, smaller.checkpoint.config.model_type),
    )


def assign(
    config: Config, decoder: Decoder, capabilities: Mapping[str, Capabilities], cost: Cost, what: str
) -> dict[str, Assignment]:
    """What each client computes and sends.

    Args:
        what: needs the memory; the beginning of a message.

    Raises:
        FedgroveError: a client has too little memory; names the client.
    """
    width = decoder.checkpoint.config.get_text_config().hidden_size
    assignments = {}
    for name, client in sorted(capabilities.items()):
        if client.memory is not None and cost.memory > client.memory:
            raise FedgroveError(
                f"{what} {mebibytes(cost.memory)} of memory, but the client has {mebibytes(client.memory)} (clients.memory)",
                "lower length, or leave the client out",
                client=name,
            )
        samples = client.samples or config.samples
        tokens = samples * config.length
        sending = 8 * cost.upload / client.uplink if client.uplink else 0.0
        assignments[name] = Assignment(
            samples=samples,
            memory=cost.memory,
            disk=4 * config.hidden_states_kept(len(decoder)) * tokens * width,
            upload=cost.upload,
            seconds=round(tokens * cost.work / (SPEED * client.speed) + sending, 1),
        )
    return assignments


def _check_tokens(index: int, config: Config, read: list[int], tokens: int, clients: int) -> None:
    """Refuses a repair by fewer tokens than a linear has inputs: any number of weights would then fit the sums."""
    widest = max(read, default=0)
    if tokens < widest:
        windows, needed = tokens // config.length, math.ceil(widest / config.length)
        raise FedgroveError(
            f"stages.{index}.repair: all clients together have {windows} windows of {config.length} tokens, but to repair a "
            f"linear of {widest} inputs takes {needed} or more",
            f"set samples to {math.ceil(needed / clients)} or more, or repair = false",
        )


def _notes_on_depth(config: Config, decoder: Decoder) -> tuple[str, ...]:
    """What a block takes with it that shares weights with others."""
    if not config.depth or not decoder.shared_linears:
        return ()
    own, total = own_and_all(decoder)
    return (f"Blocks share weights: one that is cut takes {own:,} of the {total:,} weights in its linears with it.",)


def _notes(read: list[int], tokens: Mapping[str, int], secure: bool) -> tuple[str, ...]:
    """What a user should know of the clients' sums of products, of which each is over about half of a client's tokens."""
    widest = max(read, default=0)
    few = sum(number < 2 * widest for number in tokens.values())
    if secure or not few:
        return ()
    return (
        f"{few} of {len(tokens)} clients send products of inputs with {widest} channels, summed over fewer tokens than "
        "channels in each half of their windows. Such products reveal the subspace that the inputs span. Raise samples, set "
        "repair = false, or use secure aggregation.",
    )


def less_than_one(index: int, key: str, share: float, number: int, what: str) -> FedgroveError:
    """The error of a fraction of which nothing is left when it is rounded down."""
    return FedgroveError(
        f"stages.{index}.{key}: {share:g} of {number} {what} is less than one", f"give {1 / number:.2g} or more, or 0"
    )


def blocks_left(index: int, config: Config, number: int, without_experts: Collection[int] = ()) -> int:
    """The number of blocks that stay.

    Args:
        number: of blocks before the stage.
        without_experts: the indexes of blocks that stay because they have no experts.

    Raises:
        FedgroveError: the fraction is less than one block, or more than may go.
    """
    gone = Cut.whole(config.depth, number)
    if config.depth and not gone:
        raise less_than_one(index, "depth", config.depth, number, "blocks")
    stay = {*without_experts, *((0, number - 1) if config.protect_ends else ())}
    runs = "".join(" " if block in stay else "x" for block in range(number)).split()
    most = max(map(len, runs), default=0) if config.contiguous else sum(map(len, runs))
    if gone > min(most, number - 1):
        says = "the first and the last block stay (protect_ends)" if config.protect_ends else "one block has to stay"
        if without_experts:
            says = (
                f"those that have no experts stay{', and the first and the last (protect_ends)' if config.protect_ends else ''}"
            )
        remedy = f"give {min(most, number - 1) / number:.2g} or less" if most > 0 else "set it to 0"
        if config.protect_ends and not without_experts and gone <= number - 1:
            remedy += ", or protect_ends = false"
        raise FedgroveError(f"stages.{index}.depth: {config.depth:g} of {number} blocks are {gone}, but {says}", remedy)
    return number - gone


def _reshaped(model: Checkpoint, number: int, left: int, width: Width) -> Checkpoint:
    """The model in its new shapes. Which blocks stay is not known yet, and they are all of the same shape."""
    return model.over(width=width, kept_blocks=None if left == number else some_blocks(number, left))


def some_blocks(number: int, left: int) -> tuple[int, ...]:
    """The indexes of as many blocks as stay, while it is not known which."""
    return (*range(left - 1), number - 1)
