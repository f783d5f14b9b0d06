"""The plan of a head stage: what computing the features of its records and sending their sums costs each client."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from fedgrove.errors import FedgroveError
from fedgrove.models.blocks import Decoder
from fedgrove.models.cost import measure_cost
from fedgrove.models.features import width
from fedgrove.models.preconditions import check_length
from fedgrove.models.walk import CHUNK
from fedgrove.quantities import mebibytes
from fedgrove.rounds.capabilities import SPEED, Capabilities
from fedgrove.rounds.request import Disclosure
from fedgrove.stages import base
from fedgrove.stages.head.config import Config
from fedgrove.stages.head.exchanges.moments import SumMoments
from fedgrove.stages.head.exchanges.personal import CompareHeads
from fedgrove.stages.head.heads import head_of

THOUSAND = 1000  # records that the time of a plan is for


class Plan(base.Plan):
    """The plan of a stage that makes a head; ``seconds`` of a client are for 1,000 records and sending their sums.

    Attributes:
        head: its name.
        states: hidden states of a record.
        features: of a record; fewer than hidden states if they are projected.
        blocks: how many blocks a record passes through.
        num_blocks: of the model.
        unlabeled: the clients that guess labels.
    """

    kind: Literal["head"] = "head"
    clients: dict[str, base.Assignment]
    head: str
    states: int
    features: int
    blocks: int
    num_blocks: int
    unlabeled: tuple[str, ...]


def make_plan(index: int, config: Config, decoder: Decoder, capabilities: Mapping[str, Capabilities]) -> Plan:
    """Plans the stage. How many records a client has is not known to the server, so its time is for 1,000 of them.

    Args:
        index: the stage's place in the job.
        decoder: the model.
        capabilities: the clients' capabilities, by name.

    Raises:
        FedgroveError: labels are to be guessed, but every client has labels or none has; the model has no such layer or too few
            positions; or a client has too little memory. It names the key or the client.
    """
    unlabeled = [name for name, client in sorted(capabilities.items()) if client.labels != "all"]
    if config.guesses and (not unlabeled or all(client.labels == "none" for client in capabilities.values())):
        every, remedy = ("no", "give one of them prompt and answer") if unlabeled else ("every", "set it to 0")
        raise FedgroveError(f"stages.{index}.guesses: {every} client has labels (answer), so none are guessed", remedy)
    num_blocks = len(decoder)
    beyond = [layer for layer in config.layers if not -num_blocks - 1 <= layer <= num_blocks]
    if beyond:
        raise FedgroveError(
            f"stages.{index}.layers: {beyond[0]}, but the model has {num_blocks} blocks",
            f"give 0 (the embeddings) to {num_blocks}, or −1 to {-num_blocks - 1} from the end",
        )
    places = [layer % (num_blocks + 1) for layer in config.layers]
    if len(set(places)) < len(places):
        raise FedgroveError(f"stages.{index}.layers: two of them are the same layer of this model", "remove one")
    note = check_length(decoder, config.length, f"stages.{index}.length")
    states, blocks = width(decoder, config.layers), max(places)
    features = states if config.size is None else min(states, config.size)
    cost = measure_cost(decoder, config.length, masked=False)
    products = head_of(config.head).PRODUCTS
    numbers = len(config.labels) * (features + 1) + features + products * features * (features - 1) // 2
    of_block = sum(parameter.numel() for parameter in decoder.blocks[0].parameters())
    gram = 8 * 3 * features**2 if products else 0
    memory = 4 * (cost.others + of_block + CHUNK * cost.width + config.length * cost.vocabulary) + gram + 2**24
    operations = 2 * THOUSAND * config.length * (cost.parameters // num_blocks * blocks + cost.width)
    assignments = {}
    for name, client in sorted(capabilities.items()):
        if client.memory is not None and memory > client.memory:
            raise FedgroveError(
                f"the features of its records need {mebibytes(memory)} of memory, but the client has "
                f"{mebibytes(client.memory)} (clients.memory)",
                "lower size, or leave the client out",
                client=name,
            )
        exchanges = 1 + config.guesses if name in unlabeled else 1
        upload = 8 * numbers * exchanges
        sending = 8 * upload / client.uplink if client.uplink else 0.0
        seconds = round(operations / (SPEED * client.speed) + sending, 1)
        assignments[name] = base.Assignment(memory=memory, upload=upload, seconds=seconds)
    disclosed = SumMoments.DISCLOSES if products else SumMoments.DISCLOSES - {Disclosure.FEATURE_PRODUCTS}
    if config.personal:
        disclosed |= CompareHeads.DISCLOSES
    return Plan(
        stage=index,
        clients=assignments,
        head=config.head,
        states=states,
        features=features,
        blocks=blocks,
        num_blocks=num_blocks,
        unlabeled=tuple(unlabeled) if config.guesses else (),
        discloses=base.names_of(disclosed),
        notes=() if note is None else (note,),
    )
