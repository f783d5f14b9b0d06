"""The plan of structured pruning: how wide the blocks become, and what scoring channels and heads costs each client."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from fedgrove.errors import FedgroveError
from fedgrove.models.blocks import Decoder, linears
from fedgrove.models.cost import count_parameters, measure_cost
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
        disk: bytes of hidden states and gradients on its disk.
    """

    samples: int
    disk: int


class Plan(base.Plan):
    """The plan of a stage that cuts channels and heads.

    Attributes:
        before, after: the widths of every block.
        queries: query heads in a group.
        parameters: number of parameters of the model, before and after.
        types: model_type in config.json, before and after.
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
    """Plans the stage. Every client scores every block, because gradients reach the first block only through all others.

    Args:
        index: the stage's place in the job.
        decoder: the model before the stage.
        capabilities: the clients' capabilities, by name.
        secure: whether responses are masked under secure aggregation; masked responses do not compress.

    Raises:
        FedgroveError: no configuration of this architecture can express the result, a fraction amounts to less than one group,
            or a client has too little memory; names the key or the client.
    """
    before = width_of(decoder.checkpoint.config)
    gone = {"channels": math.floor(config.channels * before.channels), "heads": math.floor(config.heads * before.heads)}
    for key, share in (("channels", config.channels), ("heads", config.heads)):
        if share and not gone[key]:
            groups = getattr(before, key)
            what = "channels" if key == "channels" else "groups of heads"
            raise FedgroveError(
                f"stages.{index}.{key}: {share:g} of {groups} {what} is less than one", f"give {1 / groups:.2g} or more, or 0"
            )
    after = Width(before.channels - gone["channels"], before.heads - gone["heads"])
    narrower = Decoder(decoder.checkpoint.over(width=after))

    cost = measure_cost(decoder, config.length, masked=False)
    block, narrow_block = (
        sum(parameter.numel() for parameter in model.blocks[0].parameters()) for model in (decoder, narrower)
    )
    parameters = count_parameters(decoder)
    in_linears = sum(weight.numel() for module in linears(decoder.blocks[0]).values() for weight in module.parameters())
    logits = config.length * cost.vocabulary
    memory = 4 * (cost.others + max(block + 3 * cost.saved, 5 * logits)) + 2**24
    num_groups = len(decoder) * (before.channels + before.heads)
    upload = (8 if secure else 4) * num_groups + 1300 * len(decoder)  # per number (measured on the shipped model), and names
    assignments = {}
    for name, client in sorted(capabilities.items()):
        if client.memory is not None and memory > client.memory:
            raise FedgroveError(
                f"the forward and backward pass of a block need {mebibytes(memory)} of memory, but the client has "
                f"{mebibytes(client.memory)} (clients.memory)",
                "lower length, or leave the client out",
                client=name,
            )
        tokens = (client.samples or config.samples) * config.length
        work = 2 * 3 * tokens * (len(decoder) * in_linears + cost.vocabulary * cost.width)  # forward, forward again, backward
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
