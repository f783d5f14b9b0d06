"""Every client sums, for each expert, how many tokens of its text reach it and how much it adds to them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from fedgrove.client.hidden_states import Calibration, HiddenStates, Tokens
from fedgrove.client.local_client import LocalClient
from fedgrove.client.windows import calibration_windows, decoder_of
from fedgrove.job.stage_config import Agreed
from fedgrove.job.units import Name
from fedgrove.models.blocks import Decoder
from fedgrove.models.expert_cut import routing_of
from fedgrove.models.experts import experts_in
from fedgrove.rounds.aggregator.fixed_point import FixedPoint, OutOfRange
from fedgrove.rounds.request import CHANGE, Disclosure, Reply, Request, Response, Tensors, TensorSpecs
from fedgrove.rounds.wire import WireError
from fedgrove.stages.structured.config import Config
from fedgrove.stages.structured.exchanges.scores import LARGEST, is_share
from fedgrove.stages.structured.expert_scores import expert_score_of

TOKENS, OUTPUTS = "tokens", "outputs"
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
        calls = decoder.embed(torch.zeros(1, calibration.length, dtype=torch.int64))[1]
        states.write(0, (decoder.embed(ids[None])[0] for ids in windows), len(windows))
        rows: dict[str, list[Tensor]] = {}
        try:
            for index in range(len(decoder)):
                with decoder.loaded(index) as block, expert_sums(block) as sums:
                    outputs = (decoder.run(block, hidden, calls[index]) for hidden in states.read(index))
                    states.write(index + 1, outputs, len(windows))
                states.forget(before=index + 1)
                for name in wanted if sums else ():
                    of_windows = torch.stack([window[name] for window in sums])
                    rows.setdefault(CHANGE + name, []).append(CODES[name].encode_sum(of_windows, self.limit))
        except OutOfRange as error:
            message = 'what the experts add to its text is not finite or too large; try model.dtype = "float32"'
            raise client.error(message) from error
        finally:
            states.forget(before=len(decoder) + 1)
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


def blocks_with_experts(decoder: Decoder) -> list[int]:
    """The indexes of a model's blocks that have experts."""
    return [index for index, block in enumerate(decoder.blocks) if experts_in(block) is not None]


@contextmanager
def expert_sums(block: nn.Module) -> Iterator[list[dict[str, Tensor]]]:
    """The sums over each window that passes through a block meanwhile, one after the other; none if it has no experts.

    For each expert, (experts,) float64 on the CPU: ``tokens``, the number of tokens that the router sends to it, and
    ``outputs``, Σ g·‖f‖₂ over them, where f is the expert's output and g the weight that the block gives it, with everything
    that the router does to it (normalized over the chosen experts, or scaled, as the architecture says).
    """
    experts, windows = experts_in(block), list[dict[str, Tensor]]()
    if experts is None:
        yield windows
        return
    weights: list[Tensor] = []

    def begin(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        _, chosen, of_chosen = args
        numbers = range(len(list(module.children())))
        weights[:] = [of_chosen[chosen == index].double() for index in numbers]
        windows.append({name: torch.zeros(len(numbers), dtype=torch.float64) for name in (TOKENS, OUTPUTS)})

    def add(index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            windows[-1][TOKENS][index] = len(out)
            windows[-1][OUTPUTS][index] = (weights[index] * out.double().norm(dim=-1)).sum()

        return hook

    hooks = [experts.register_forward_pre_hook(begin)]
    hooks += [expert.register_forward_hook(add(index)) for index, expert in enumerate(experts.children())]
    try:
        yield windows
    finally:
        for hook in hooks:
            hook.remove()


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
