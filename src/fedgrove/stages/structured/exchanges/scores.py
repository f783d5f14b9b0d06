"""Every client scores all channels and heads by sums over its windows of text; the server adds the sums up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from fedgrove.client.hidden_states import Calibration, HiddenStates, Tokens
from fedgrove.client.local_client import LocalClient
from fedgrove.client.windows import calibration_windows, decoder_of
from fedgrove.errors import FedgroveError
from fedgrove.job.stage_config import Agreed
from fedgrove.job.units import Name
from fedgrove.models.blocks import Decoder
from fedgrove.models.width import width_of
from fedgrove.rounds.aggregator.fixed_point import FixedPoint, OutOfRange
from fedgrove.rounds.request import CHANGE, Disclosure, Reply, Request, Response, Tensors, TensorSpecs
from fedgrove.rounds.wire import WireError
from fedgrove.stages.structured.config import Config
from fedgrove.stages.structured.gradients import group_products
from fedgrove.stages.structured.scores import score_of
from fedgrove.stages.structured.shared import first_uses

CODE = FixedPoint(fraction_bits=24)  # encodes what each window adds to a sum
LARGEST = 2**62  # the largest sum over all clients


class ScoreGroups(Request):
    """Sum, over your text, a score of how the loss changes if a channel or group of heads is cut, for all of them at once.

    The response holds ``change/<block>/channels`` and ``change/<block>/heads``: (groups,) int64, multiples of 2⁻²⁴. For groups
    that several blocks share, a window's changes are added over these blocks before they are scored; the first is named.

    Attributes:
        score: see :mod:`fedgrove.stages.structured.scores`.
        calibration: the windows.
        limit: the largest number that may be sent.
    """

    KIND: ClassVar[str] = "structured/scores"
    DISCLOSES: ClassVar[frozenset[Disclosure]] = frozenset({Disclosure.SCORES})
    REPLY: ClassVar[type[Reply]] = Tokens
    OWN_FIELDS: ClassVar[frozenset[str] | None] = frozenset({"calibration.samples"})
    SUM_FIELDS: ClassVar[tuple[str, ...]] = ("stage",)

    score: Name
    calibration: Calibration
    limit: Annotated[int, Field(ge=1, le=LARGEST)]

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        score = score_of(self.score)
        decoder = decoder_of(client, device)
        windows = calibration_windows(client, self.calibration.samples, self.calibration.length, self.calibration.seed)
        states = HiddenStates(client, self.calibration, decoder)
        firsts, later = first_uses(decoder), dict[tuple[int, str], torch.Tensor]()
        sums: Tensors = {}
        try:
            of_weights = score.weigh if score.PER_WEIGHT else None
            for block, block_products in group_products(decoder, windows, states, of_weights):
                for kind, products in block_products.items():
                    first = firsts[kind][block]
                    products = products + later.pop((first, kind), 0)
                    if block == first:
                        weighed = products if score.PER_WEIGHT else score.weigh(products)
                        sums[f"{CHANGE}{block}/{kind}"] = CODE.encode_sum(weighed, self.limit)
                    else:  # blocks come from the last to the first
                        later[first, kind] = products
        except OutOfRange as error:
            raise client.error('the gradients of its text are not finite or too large; try model.dtype = "float32"') from error
        except FedgroveError as error:
            raise client.error(str(error)) from error
        finally:
            states.forget(before=len(decoder) + 1)  # some have been replaced by gradients, so no later pass may start from them
        return Response(sums, Tokens(tokens=windows.numel()))

    def expected(self, layout: Decoder | None) -> TensorSpecs:
        assert layout is not None
        width = width_of(layout.checkpoint.config)
        return {
            f"{CHANGE}{block}/{kind}": (torch.Size([getattr(width, kind)]), torch.int64)
            for kind, firsts in first_uses(layout).items()
            for block in sorted(set(firsts))
        }

    def check_reply(self, reply: Reply) -> None:
        assert isinstance(reply, Tokens)
        reply.check(self.calibration)

    def check(self, tensors: Tensors, reply: Reply, layout: Decoder | None) -> None:
        check_values(tensors, score_of(self.score).SIGNED, self.limit)

    def beyond(self, job: Agreed) -> str | None:
        config, calibration = job.stages[self.stage], self.calibration
        assert isinstance(config, Config)
        if not config.narrows or self.score != config.score:
            return "score"
        if (calibration.through, calibration.windows_per_run, calibration.compute_dtype) != ("gradients", 1, None):
            return "source"
        return None if is_share(self.limit, len(job.clients)) else "limit"


def is_share(limit: int, clients: int) -> bool:
    """Whether a limit is what some of the clients may each send, so that their sum is at most :data:`LARGEST`.

    A client that has more than it may send fails, and the server sees that: a limit that it chose would be a question.
    """
    return limit in {LARGEST // number for number in range(1, clients + 1)}


def check_values(tensors: Mapping[str, torch.Tensor], signed: bool, limit: int) -> None:
    """Refuses sums that are too large, or negative although the score never is.

    Args:
        signed: whether the score can be negative.
        limit: the largest absolute value that is allowed.

    Raises:
        WireError: names the first tensor that is out of range.
    """
    for name, tensor in tensors.items():
        if (tensor > limit).any() or (tensor < (-limit if signed else 0)).any():
            raise WireError(f"{name} is out of range")
