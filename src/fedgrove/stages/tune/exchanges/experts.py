"""Before the first round, clients whose memory is too small for all experts choose those that matter most to their text."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedgrove.client.expert_walk import sums_of_windows
from fedgrove.client.hidden_states import Calibration, HiddenStates
from fedgrove.client.local_client import LocalClient
from fedgrove.data.windows import spread
from fedgrove.job.stage_config import Agreed, StageConfig
from fedgrove.models.blocks import Decoder
from fedgrove.models.expert_cut import MAX_EXPERTS, KeptExperts, Routing, highest_experts, routing_of
from fedgrove.models.expert_sums import OUTPUTS, TOKENS, blocks_with_experts
from fedgrove.rounds.request import CHANGE, Disclosure, Reply, Response, Tensors, TensorSpecs
from fedgrove.rounds.wire import WireError
from fedgrove.stages.tune.client_model import TuneRequest, keep_held
from fedgrove.stages.tune.config import Config
from fedgrove.stages.tune.personal import hold_out
from fedgrove.stages.tune.routed import shape_of

HELD = f"{CHANGE}held"
WINDOWS = 64  # of the client's text, by which it chooses, at most


class ChooseExperts(TuneRequest):
    """Choose the experts that you hold in memory: of every block, those that matter most to your text.

    The response contains ``change/held``: (blocks with experts, experts) int64, 1 for each expert that the client holds, else
    0; with ``reached``, of these only those that its text reaches. The choice itself stays on the client's disk.

    Attributes:
        number: of experts of every block.
        value: by what an expert matters: "outputs", Σ over its tokens of router weight × norm of its output; "tokens", their
            number.
        reached: the sum over clients is to say how many can train an expert.
    """

    KIND: ClassVar[str] = "tune/experts"
    DISCLOSES: ClassVar[frozenset[Disclosure]] = frozenset({Disclosure.EXPERTS_HELD})
    OWN_FIELDS: ClassVar[frozenset[str] | None] = frozenset({"bits", "number"})

    number: Annotated[int, Field(ge=1, le=MAX_EXPERTS)]
    value: Literal["outputs", "tokens"]
    reached: bool

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        if tensors:
            raise client.error("the server sent tensors with a request that has none; refused")
        decoder, ids, labels = self.model_and_windows(client, device)
        blocks, routing = experts_of(decoder, self.number, client)
        (ids, _), _ = hold_out(ids, labels, self.personal)
        sums = own_sums(decoder, ids, client, self.stage, self.seed)
        held = chosen(sums, blocks, self.value, self.number, routing.groups)
        keep_held(client, self.stage, held, self.base_digest)
        found = torch.zeros(len(blocks), routing.experts, dtype=torch.int64)
        for row, experts in enumerate(held.values()):
            found[row, list(experts)] = 1
        return Response({HELD: found * (sums[TOKENS] > 0) if self.reached else found}, Reply())

    def expected(self, layout: Decoder | None) -> TensorSpecs:
        assert layout is not None
        shape = shape_of(layout)
        return {} if shape is None else {HELD: (shape, torch.int64)}

    def check(self, tensors: Tensors, reply: Reply, layout: Decoder | None) -> None:
        held = tensors.get(HELD)
        if held is None:
            return
        if (held < 0).any() or (held > 1).any():
            raise WireError(f"{HELD} is out of range")
        if (held.sum(1) > self.number).any() or (not self.reached and (held.sum(1) != self.number).any()):
            raise WireError(f"{HELD} is not {self.number} experts of every block")

    @classmethod
    def rounds_in(cls, config: StageConfig) -> range:
        """Before the first round."""
        return range(1)

    def beyond(self, job: Agreed) -> str | None:
        config = job.stages[self.stage]
        assert isinstance(config, Config)
        if config.epsilon is not None:
            return "epsilon"
        if config.hold_experts != "fit" and not self.reached:
            return "hold_experts"
        if self.value != config.expert_value:
            return "expert_value"
        if self.reached != job.secure:
            return "reached"
        return "held" if self.held is not None else super().beyond(job)


def check_held(sums: Tensors, clients: int) -> None:
    """Refuses a sum that so many clients cannot send.

    Raises:
        WireError: a number is out of range.
    """
    for name, held in sums.items():
        if (held < 0).any() or (held > clients).any():
            raise WireError(f"{name} is out of range")


def experts_of(decoder: Decoder, number: int, client: LocalClient) -> tuple[list[int], Routing]:
    """The indexes of the blocks that have experts, and how their routers choose.

    Raises:
        FedgroveError: the client's model has no experts, or cannot work with ``number`` in every block.
    """
    blocks = blocks_with_experts(decoder)
    if not blocks:
        raise client.error("the request is for experts, which its model does not have; refused")
    routing = routing_of(decoder.checkpoint.config)
    if number not in routing.numbers:
        raise client.error(f"the request is for {number} experts, with which its model cannot work; refused")
    return blocks, routing


def own_sums(decoder: Decoder, ids: Tensor, client: LocalClient, stage: int, seed: str) -> dict[str, Tensor]:
    """The sums over a client's windows, at most :data:`WINDOWS` of them, evenly spread over its text.

    Args:
        ids: (windows, length) token ids.
        stage, seed: of the stage; they name the hidden states that lie on the client's disk meanwhile.

    Returns:
        (blocks with experts, experts) float64 by name; see :func:`~fedgrove.models.expert_sums.expert_sums`.
    """
    number = min(WINDOWS, len(ids))
    windows = ids[spread(number, len(ids))]
    calibration = Calibration(stage=stage, samples=number, length=ids.shape[1], seed=f"{seed}/experts"[:64])
    states = HiddenStates(client, calibration, decoder)
    with torch.no_grad():
        rows = [{name: one.sum(0) for name, one in sums.items()} for sums in sums_of_windows(decoder, windows, states)]
    return {name: torch.stack([row[name] for row in rows]) for name in (TOKENS, OUTPUTS)}


def chosen(sums: dict[str, Tensor], blocks: list[int], value: str, number: int, groups: int) -> KeptExperts:
    """Of every block the experts that matter most, as many of each group; of equal ones the later."""
    return {block: highest_experts(sums[value][row], number, groups) for row, block in enumerate(blocks)}
