"""Every client measures how much each block changes the hidden states of its text; the server adds the sums up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from fedgrove.client.hidden_states import Calibration, HiddenStates, Tokens
from fedgrove.client.local_client import LocalClient
from fedgrove.client.windows import calibration_windows, decoder_of
from fedgrove.job.stage_config import Agreed
from fedgrove.job.units import MAX_BLOCKS
from fedgrove.models.blocks import Decoder
from fedgrove.rounds.aggregator.fixed_point import OutOfRange
from fedgrove.rounds.request import CHANGE, Disclosure, Reply, Request, Response, Tensors, TensorSpecs
from fedgrove.rounds.wire import WireError
from fedgrove.stages.structured.config import Config
from fedgrove.stages.structured.exchanges.scores import CODE

INFLUENCE = "influence"
FARTHEST = 2  # 1 − cos of a token's hidden states is at most this


class ScoreBlocks(Request):
    """Sum, over your text, how much each block, or each run of blocks, changes the hidden states of a token.

    The response holds ``change/influence``: (blocks − span + 1,) int64, multiples of 2⁻²⁴; see :func:`influence`.

    Attributes:
        span: how many blocks follow each other in a run; 1: single blocks.
        calibration: the windows.
    """

    KIND: ClassVar[str] = "structured/blocks"
    DISCLOSES: ClassVar[frozenset[Disclosure]] = frozenset({Disclosure.INFLUENCE})
    REPLY: ClassVar[type[Reply]] = Tokens
    OWN_FIELDS: ClassVar[frozenset[str] | None] = frozenset({"calibration.samples"})
    SUM_FIELDS: ClassVar[tuple[str, ...]] = ("stage",)

    span: Annotated[int, Field(ge=1, lt=MAX_BLOCKS)]
    calibration: Calibration

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        decoder = decoder_of(client, device)
        if self.span > len(decoder):
            raise client.error(f"its model has {len(decoder)} blocks, but the request is for runs of {self.span}; refused")
        calibration = self.calibration
        windows = calibration_windows(client, calibration.samples, calibration.length, calibration.seed)
        states = HiddenStates(client, calibration, decoder)
        calls = decoder.embed(torch.zeros(1, calibration.length, dtype=torch.int64))[1]
        states.write(0, (decoder.embed(ids[None])[0] for ids in windows), len(windows))
        totals = []
        try:
            for index in range(len(decoder)):
                with decoder.loaded(index) as block:
                    states.write(index + 1, (decoder.run(block, h, calls[index]) for h in states.read(index)), len(windows))
                first = index + 1 - self.span
                if first >= 0:
                    pairs = zip(states.read(first), states.read(index + 1), strict=True)
                    changes = torch.stack([influence(before, after).sum() for before, after in pairs])
                    totals.append(CODE.encode_sum(changes[:, None], largest(windows.numel(), len(windows)) + 1))
                    states.forget(before=first + 1)
        except OutOfRange as error:
            raise client.error('the hidden states of its text are not finite; try model.dtype = "float32"') from error
        finally:
            states.forget(before=len(decoder) + 1)
        return Response({CHANGE + INFLUENCE: torch.cat(totals).cpu()}, Tokens(tokens=windows.numel()))

    def expected(self, layout: Decoder | None) -> TensorSpecs:
        assert layout is not None
        return {CHANGE + INFLUENCE: (torch.Size([len(layout) - self.span + 1]), torch.int64)}

    def check_reply(self, reply: Reply) -> None:
        assert isinstance(reply, Tokens)
        reply.check(self.calibration)

    def check(self, tensors: Tensors, reply: Reply, layout: Decoder | None) -> None:
        samples = self.calibration.samples
        check_influence({INFLUENCE: tensors[CHANGE + INFLUENCE]}, self.calibration.tokens, samples)

    def beyond(self, job: Agreed) -> str | None:
        config, calibration = job.stages[self.stage], self.calibration
        assert isinstance(config, Config)
        if not config.depth:
            return "depth"
        if self.span > 1 and not config.contiguous:
            return "span"
        agreed = ("dense", 1, None)
        return None if (calibration.through, calibration.windows_per_run, calibration.compute_dtype) == agreed else "source"


def influence(before: Tensor, after: Tensor) -> Tensor:
    """1 − cos of the angle between the hidden states of each token before and after some blocks.

    This is the block influence of Men et al., "ShortGPT" (arXiv 2403.03853, equation 1), summed over tokens and not averaged:
    so the sums of several clients add up to that of their pooled text. For a run of blocks, the paper's distance is applied to
    the run's two ends (ours; Gromov et al., arXiv 2403.17887, take the angle itself, of the last token only).

    Do not trust it to foresee what a task needs: it looks at hidden states, not at the loss, and a block that moves them
    little can still be the only one that does something.

    Args:
        before, after: (…, width), any float dtype.

    Returns:
        (…,) float64, from 0 to 2; NaN if a hidden state is not finite.
    """
    return (1 - nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)).clamp(0, FARTHEST)


def largest(tokens: int, windows: int) -> int:
    """The largest sum of so many tokens; each window is rounded once."""
    return FARTHEST * tokens * (1 << CODE.fraction_bits) + windows


def check_influence(sums: Mapping[str, Tensor], tokens: int, windows: int) -> None:
    """Refuses sums that cannot be those of so many tokens and windows.

    Raises:
        WireError: a sum is negative or too large.
    """
    if (sums[INFLUENCE] < 0).any() or (sums[INFLUENCE] > largest(tokens, windows)).any():
        raise WireError(f"{CHANGE}{INFLUENCE} is out of range")
