"""How wide the blocks become, and what it costs each client to say which channels and heads go."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from fedgrove.errors import FedgroveError
from fedgrove.models.blocks import Decoder, linears
from fedgrove.models.cost import measure_cost
from fedgrove.models.width import Width, width_of
from fedgrove.quantities import mebibytes
from fedgrove.rounds.capabilities import SPEED, Capabilities
from fedgrove.stages import base
from fedgrove.stages.structured.config import Config
from fedgrove.stages.structured.exchanges.scores import ScoreGroups


class Assignment(base.Assignment):
    """One client's part.

    Attributes:
        samples: windows that it calibrates on.
        disk: bytes of hidden states.
    """

    samples: int
    disk: int


class Plan(base.Plan):
    """A stage that cuts channels and heads, and what it takes. The widths are of every block.

    Attributes:
        queries: heads in a group.
        parameters: of the model, before and after.
        types: model_type before and after.
    """

    kind: Literal["structured"] = "structured"
    clients: dict[str, Assignment]
    num_blocks: int
    before: Width
    after: Width
    queries: int
    parameters: tuple[int, int]
    types: tuple[str, str]

    def width_after(self) -> Width:
        return self.after


def make_plan(
    index: int, config: Config, decoder: Decoder, capabilities: Mapping[str, Capabilities], secure: bool = False
) -> Plan:
    """Decides the stage. Every client measures every block: gradients reach the first only through all others.

    Args:
        index: the stage's place in the job.
        decoder: the model before.
        capabilities: what the clients said, by name.
        secure: responses are masked, so they do not compress.

    Raises:
        FedgroveError: no configuration of this architecture can say the result, a share is less than one group, or a client has
            too little memory; names key or client.
    """
    before = width_of(decoder.checkpoint.config)
    gone = {"channels": math.floor(config.channels * before.channels), "heads": math.floor(config.heads * before.heads)}
    for key, share in (("channels", config.channels), ("heads", config.heads)):
        if share and not gone[key]:
            groups = getattr(before, key)
            what = "channels" if key == "channels" else "groups of heads"
            raise FedgroveError(
                f"stages.{index}.{key}: {share:g} of {groups} {what} is none", f"give {1 / groups:.2g} or more, or 0"
            )
    after = Width(before.channels - gone["channels"], before.heads - gone["heads"])
    narrower = Decoder(decoder.checkpoint.over(width=after))

    cost = measure_cost(decoder, config.length, masked=False)
    block, narrow_block = (
        sum(parameter.numel() for parameter in model.blocks[0].parameters()) for model in (decoder, narrower)
    )
    parameters = sum(parameter.numel() for parameter in decoder.model.parameters())
    in_linears = sum(weight.numel() for module in linears(decoder.blocks[0]).values() for weight in module.parameters())
    logits = config.length * cost.vocabulary
    memory = 4 * (cost.others + max(block + 3 * cost.saved, 5 * logits)) + 2**24
    num_groups = len(decoder) * (before.channels + before.heads)
    upload = (8 if secure else 4) * num_groups + 1300 * len(decoder)  # numbers (measured on the shipped model), and names
    assignments = {}
    for name, client in sorted(capabilities.items()):
        if client.memory is not None and memory > client.memory:
            raise FedgroveError(
                f"a block and its way back need {mebibytes(memory)} of memory, but it has "
                f"{mebibytes(client.memory)} (clients.memory)",
                "lower length, or leave it out",
                client=name,
            )
        tokens = (client.samples or config.samples) * config.length
        work = 2 * 3 * tokens * (len(decoder) * in_linears + cost.vocabulary * cost.width)  # there, again, and back
        seconds = work / (SPEED * client.speed) + (8 * upload / client.uplink if client.uplink else 0.0)
        assignments[name] = Assignment(
            samples=client.samples or config.samples,
            memory=memory,
            disk=4 * (len(decoder) + 2) * tokens * cost.width,
            upload=upload,
            seconds=round(seconds, 1),
        )
    return Plan(
        stage=index,
        num_blocks=len(decoder),
        before=before,
        after=after,
        queries=decoder.checkpoint.config.num_attention_heads // before.heads,
        parameters=(parameters, parameters - len(decoder) * (block - narrow_block)),
        clients=assignments,
        discloses=base.names_of(ScoreGroups.DISCLOSES),
        types=(decoder.checkpoint.config.model_type, narrower.checkpoint.config.model_type),
    )
