"""How wide the blocks become, and what it costs each client to say which channels and heads go."""

from __future__ import annotations

import math
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict

from fedgrove.errors import FedgroveError
from fedgrove.job import StructuredStage
from fedgrove.models.blocks import Decoder, linears
from fedgrove.models.width import Width, width_of
from fedgrove.stages.prune.plan import SPEED, Capabilities
from fedgrove.quantities import mebibytes
from fedgrove.stages.tune.plan import measure


class NarrowShare(BaseModel):
    """One client's part in a stage that narrows."""

    model_config = ConfigDict(frozen=True)

    samples: int
    memory: int  # bytes needed at the peak, besides the program itself
    disk: int  # bytes of hidden states
    upload: int  # bytes
    seconds: float  # computing and uploading


class StructuredPlan(BaseModel):
    """A stage that narrows and what it takes. The widths are of every block."""

    model_config = ConfigDict(frozen=True)

    stage: int
    kind: str = "structured"
    num_blocks: int
    before: Width
    after: Width
    queries: int  # heads in a group
    parameters: tuple[int, int]  # of the model, before and after
    clients: dict[str, NarrowShare]
    types: tuple[str, str]  # model_type before and after


def make_structured_plan(
    index: int, stage: StructuredStage, decoder: Decoder, cards: Mapping[str, Capabilities], secure: bool = False
) -> StructuredPlan:
    """Decides a stage that narrows. Every client measures every block: gradients reach the first only through all others.

    Args:
        index: the stage's place in the job.
        decoder: the model before.
        cards: what the clients said, by name.
        secure: answers are masked, so they do not compress.

    Raises:
        FedgroveError: no configuration of this architecture can say the result, a share is less than one group, or a client has
            too little memory; names key or client.
    """
    config = decoder.checkpoint.config
    before = width_of(config)
    gone = {"channels": math.floor(stage.channels * before.channels), "heads": math.floor(stage.heads * before.heads)}
    for key, share in (("channels", stage.channels), ("heads", stage.heads)):
        if share and not gone[key]:
            groups = getattr(before, key)
            what = "channels" if key == "channels" else "groups of heads"
            raise FedgroveError(
                f"stages.{index}.{key}: {share:g} of {groups} {what} is none; give {1 / groups:.2g} or more, or 0"
            )
    after = Width(before.channels - gone["channels"], before.heads - gone["heads"])
    narrower = Decoder(decoder.checkpoint.over(width=after))

    sizes = measure(decoder, stage.length, masked=False)
    block, narrow_block = (
        sum(parameter.numel() for parameter in model.blocks[0].parameters()) for model in (decoder, narrower)
    )
    parameters = sum(parameter.numel() for parameter in decoder.model.parameters())
    in_linears = sum(weight.numel() for module in linears(decoder.blocks[0]).values() for weight in module.parameters())
    logits = stage.length * sizes.vocabulary
    memory = 4 * (sizes.others + max(block + 3 * sizes.saved, 5 * logits)) + 2**24
    num_groups = len(decoder) * (before.channels + before.heads)
    upload = (8 if secure else 4) * num_groups + 1300 * len(decoder)  # numbers (measured on the shipped model), and names
    shares = {}
    for name, card in sorted(cards.items()):
        if card.memory is not None and memory > card.memory:
            raise FedgroveError(
                f"client '{name}': a block and its way back need {mebibytes(memory)} of memory, but it has "
                f"{mebibytes(card.memory)} (clients.memory); lower length, or leave it out"
            )
        tokens = (card.samples or stage.samples) * stage.length
        work = 2 * 3 * tokens * (len(decoder) * in_linears + sizes.vocabulary * sizes.width)  # there, again, and back
        seconds = work / (SPEED * card.speed) + (8 * upload / card.uplink if card.uplink else 0.0)
        shares[name] = NarrowShare(
            samples=card.samples or stage.samples,
            memory=memory,
            disk=4 * (len(decoder) + 2) * tokens * sizes.width,
            upload=upload,
            seconds=round(seconds, 1),
        )
    return StructuredPlan(
        stage=index,
        num_blocks=len(decoder),
        before=before,
        after=after,
        queries=config.num_attention_heads // before.heads,
        parameters=(parameters, parameters - len(decoder) * (block - narrow_block)),
        clients=shares,
        types=(config.model_type, narrower.checkpoint.config.model_type),
    )
