"""Every client sums, for each expert, how many tokens of its text reach it and how much it adds to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedgrove.client.expert_walk import sums_of_windows
from fedgrove.client.hidden_states import Calibration, HiddenStates, Tokens
from fedgrove.client.local_client import LocalClient
from fedgrove.client.windows import calibration_windows, decoder_of
from fedgrove.job.stage_config import Agreed
from fedgrove.job.units import Name
from fedgrove.models.blocks import Decoder
from fedgrove.models.expert_cut import routing_of
from fedgrove.models.expert_sums import OUTPUTS, TOKENS, blocks_with_experts
from fedgrove.rounds.aggregator.fixed_point import FixedPoint, OutOfRange
from fedgrove.rounds.request import CHANGE, Disclosure, Reply, Request, Response, Tensors, TensorSpecs
from fedgrove.rounds.wire import WireError
from fedgrove.stages.structured.config import Config
from fedgrove.stages.structured.exchanges.scores import LARGEST, is_share
from fedgrove.stages.structured.expert_scores import expert_score_of

CODES = {TOKENS: FixedPoint(fraction_bits=0), OUTPUTS: FixedPoint(fraction_bits=24)}
_DISCLOSES = {TOKENS: Disclosure.EXPERT_TOKENS, OUTPUTS: Disclosure.EXPERT_OUTPUTS}


class ScoreExperts(Request):
    """Sum, over your text, for each expert the number of tokens that reach it, and for some scores how much it adds to them.

    The response holds, with a row for each block that has experts, ``change/tokens``: (blocks, experts) int64, and
    ``change/outputs``: (blocks, experts) int64, multiples of 2⁻²⁴; see :func:`expert_sums`.

    Attributes:
        score: see :mod:`fedgrove.stages.structured.expert_scores`.
        calibration: the windows.
        limit: the largest number that may be sent.
    """

    KIND: ClassVar[str] = "structured/experts"
    DISCLOSES: ClassVar[frozenset[Disclosure]] = frozenset(_DISCLOSES.values())
    REPLY: ClassVar[type[Reply]] = Tokens
    OWN_FIELDS: ClassVar[frozenset[str] | None] = frozenset({"calibration.samples"})
    SUM_FIELDS: ClassVar[tuple[str, ...]] = ("stage",)

    score: Name
    calibration: Calibration
    limit: Annotated[int, Field(ge=1, le=LARGEST)]

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        wanted, calibration = expert_score_of(self.score).SUMS, self.calibration
        decoder = decoder_of(client, device)
        windows = calibration_windows(client, calibration.samples, calibration.length, calibration.seed)
        states = HiddenStates(client, calibration, decoder)
        rows: dict[str, list[Tensor]] = {}
        try:
            for of_windows in sums_of_windows(decoder, windows, states):
                for name in wanted:
                    rows.setdefault(CHANGE + name, []).append(CODES[name].encode_sum(of_windows[name], self.limit))
        except OutOfRange as error:
            message = 'what the experts add to its text is not finite or too large; try model.dtype = "float32"'
            raise client.error(message) from error
        return Response({name: torch.stack(sums) for name, sums in rows.items()}, Tokens(tokens=windows.numel()))

    def expected(self, layout: Decoder | None) -> TensorSpecs:
        assert layout is not None
        blocks = blocks_with_experts(layout)
        if not blocks:
            return {}
        shape = torch.Size([len(blocks), routing_of(layout.checkpoint.config).experts])
        return {CHANGE + name: (shape, torch.int64) for name in expert_score_of(self.score).SUMS}

    def check_reply(self, reply: Reply) -> None:
        assert isinstance(reply, Tokens)
        reply.check(self.calibration)

    def check(self, tensors: Tensors, reply: Reply, layout: Decoder | None) -> None:
        assert layout is not None
        if tensors:
            check_sums(tensors, self.calibration.tokens, routing_of(layout.checkpoint.config).per_token, self.limit)

    def discloses(self) -> frozenset[Disclosure]:
        return disclosed_by(self.score)

    def beyond(self, job: Agreed) -> str | None:
        config, calibration = job.stages[self.stage], self.calibration
        assert isinstance(config, Config)
        if not config.experts:
            return "experts"
        if self.score != config.expert_score:
            return "expert_score"
        if (calibration.through, calibration.windows_per_run, calibration.compute_dtype) != ("dense", 1, None):
            return "source"
        return None if is_share(self.limit, len(job.clients)) else "limit"


def disclosed_by(score: str) -> frozenset[Disclosure]:
    """What the sums of a score disclose."""
    return frozenset(_DISCLOSES[name] for name in expert_score_of(score).SUMS)


def check_sums(sums: Mapping[str, Tensor], tokens: int, per_token: int, limit: int) -> None:
    """Refuses sums that cannot be those of so many tokens.

    Args:
        sums: (blocks, experts) by name, with or without ``change/``.
        tokens: that passed through every block.
        per_token: how many experts compute a token.
        limit: the largest number that is allowed.

    Raises:
        WireError: names the first tensor that cannot be right.
    """
    for name, values in sums.items():
        most = tokens if name.endswith(TOKENS) else limit
        if (values < 0).any() or (values > most).any():
            raise WireError(f"{name} is out of range")
        if name.endswith(TOKENS) and (values.sum(1) != tokens * per_token).any():
            raise WireError(f"{name} does not add up to {per_token} experts for each of {tokens} tokens")
        reached = sums.get(name.removesuffix(OUTPUTS) + TOKENS)
        if name.endswith(OUTPUTS) and reached is not None and values[reached == 0].any():
            raise WireError(f"{name} is not 0 for an expert that got no token")
