"""Every client sums the statistics of one block's inputs that a pruner needs, over its own text; the server adds the sums up.

With source "dense", hidden states pass through the client's own copy of the model. If the hidden-state cache is gone, the pass
starts again, so a client may miss any request. With "sequential", hidden states pass through the blocks that the server pruned.
Each request carries only the previous block, so a client whose cache is gone cannot continue.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from fedgrove.client.hidden_states import Calibration, HiddenStates
from fedgrove.client.local_client import LocalClient
from fedgrove.client.windows import calibration_windows, decoder_of
from fedgrove.job.stage_config import Agreed
from fedgrove.job.units import MAX_BLOCKS, Count, Delta, Epsilon, Index, Linear, Linears, Natural
from fedgrove.models.blocks import Decoder
from fedgrove.privacy.accounting import gaussian_noise_multiplier
from fedgrove.privacy.gaussian import GaussianMechanism
from fedgrove.rounds.aggregator.integers import IntegerSums
from fedgrove.rounds.request import Disclosure, Message, Part, Reply, Request, Response, Tensors, TensorSpecs
from fedgrove.rounds.wire import WireError
from fedgrove.stages.prune.aggregation.pooled import BITS, LARGEST, MAX_NORM, Statistic, check_sums, expected, ring_bits
from fedgrove.stages.prune.calibration_pass import count_inputs, shared_inputs
from fedgrove.stages.prune.config import Config
from fedgrove.stages.prune.exchanges.block import start_of

Norm = Annotated[float, Field(ge=0, le=MAX_NORM)]  # of a window's sums of squares
SCALE = "scale/"  # tensors of a request: the factors by which an input's channels are multiplied before they are summed


class Noise(Part):
    """The noise that gives differential privacy to one window of text; see :mod:`fedgrove.privacy.gaussian`.

    Attributes:
        norms: by input, the L2 norm to which a window's scaled Σ x² is clipped.
        inputs: the number of inputs, in all blocks, whose sums are released.
        skips_first: whether no sums of the first block are released.
        clients: the smallest number of clients in a sum that is opened; each of them adds a share of the noise.
        epsilon, delta: the privacy budget of all the sums together.
    """

    norms: Annotated[dict[Linear, Norm], Field(max_length=2**16)]
    inputs: Count
    skips_first: bool
    clients: Count
    epsilon: Epsilon
    delta: Delta

    def mechanism(self, name: str) -> GaussianMechanism:
        """Clips a window's Σ x² of one input and adds noise to its sum; the noise is set for all inputs together."""
        noise_multiplier = gaussian_noise_multiplier(self.epsilon, self.delta, self.inputs)
        return GaussianMechanism(self.norms[name], noise_multiplier, self.clients, bits=BITS, rounding=0.5)


class Tokens(Reply):
    """The number of tokens in the sums."""

    tokens: int


class SumInputs(Request):
    """Sum, over your text, the statistics of one block's inputs that the pruner needs.

    Tensors sent with the request: ``scale/<input>``: (in,) float32 powers of two; ``start/<linear>``: (out, in), the pruned
    previous block, for source "sequential". The response holds ``change/<input>/squares`` and, if requested, ``/products``,
    ``/sums`` and ``/spreads``: see :class:`~fedgrove.stages.prune.aggregation.pooled.Statistic`.

    Attributes:
        block: the block whose inputs are summed.
        calibration: the windows, and what they pass through.
        consumers: for each linear of the block, its input; inputs are named after the first linear that reads them.
        widths: number of channels of each input.
        products: the inputs whose products are summed, besides their squares.
        moments: whether sums and variances are summed too.
        limit: the largest number that may be sent.
        noise: the noise for differential privacy; None: no noise is added.
    """

    KIND: ClassVar[str] = "prune/statistics"
    DISCLOSES: ClassVar[frozenset[Disclosure]] = frozenset({Disclosure.SQUARES, Disclosure.PRODUCTS, Disclosure.MOMENTS})
    REPLY: ClassVar[type[Reply]] = Tokens
    OWN_FIELDS: ClassVar[frozenset[str] | None] = frozenset({"calibration.samples"})
    SUM_FIELDS: ClassVar[tuple[str, ...]] = ("stage", "block")

    block: Annotated[Index, Field(lt=MAX_BLOCKS)]
    calibration: Calibration
    consumers: Annotated[dict[Linear, Linear], Field(max_length=2**16)]
    widths: Annotated[dict[Linear, Natural], Field(max_length=2**16)]
    products: Linears
    moments: bool
    limit: Annotated[int, Field(ge=1, le=LARGEST)]
    noise: Noise | None = None

    def discloses(self) -> frozenset[Disclosure]:
        return disclosed_by(bool(self.products), self.moments)

    def adders(self) -> int:
        return self.noise.clients if self.noise else 1

    def release(self) -> str | None:
        return f"{self.stage}/{self.block}" if self.noise else None

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        calibration, noise = self.calibration, self.noise
        if noise and (self.products or self.moments):
            raise client.error("noise protects only sums of squares, so it sends no products or moments with epsilon")
        decoder = decoder_of(client, device, calibration.compute_dtype)
        if self.block >= len(decoder):
            raise client.error(f"its model has {len(decoder)} blocks, but the request is for block {self.block}")
        if noise and noise.inputs != sum(count_inputs(decoder)[noise.skips_first :]):
            raise client.error("the noise is for another number of sums than the model has; refused")
        self._check_model(decoder, tensors, client)
        states = HiddenStates(client, calibration, decoder)
        calls = decoder.embed(torch.zeros(1, calibration.length, dtype=torch.int64))[1]
        start = start_of(tensors, decoder, self.block - 1, client)
        at = states.latest(self.block - 1 if start else self.block)
        if at is None and (self.block <= 1 or not start):
            windows = calibration_windows(client, calibration.samples, calibration.length, calibration.seed)
            at = states.write(0, (decoder.embed(ids[None])[0] for ids in windows), calibration.samples)
        if at is None or (start and at != self.block - 1):
            raise client.error('its working files are gone; it can take part again with source = "dense"')
        for passed in range(at, self.block):
            with decoder.loaded(passed, start) as block:
                outputs = (decoder.run(block, hidden, calls[passed]) for hidden in states.read(passed))
                states.write(passed + 1, outputs, calibration.samples)

        def begin(name: str) -> Statistic:
            if self.consumers.get(name) != name:
                raise client.error(f"its model and the server's disagree on which linears share the input of {name}")
            scale = tensors[SCALE + name].to(decoder.device)
            mechanism = noise.mechanism(name) if noise else None
            return Statistic(name, scale, name in self.products, self.limit, mechanism, self.moments)

        with decoder.loaded(self.block) as block, shared_inputs(block, begin) as inputs:
            outputs = (decoder.run(block, hidden, calls[self.block]) for hidden in states.read(self.block))
            if calibration.through == "dense" and self.block < len(decoder) - 1:
                states.write(self.block + 1, outputs, calibration.samples)
            else:
                for _ in outputs:
                    pass
        states.forget(before=self.block - 1)
        sums: Tensors = {}
        for first in sorted(set(self.consumers.values())):
            sums |= inputs[first].tensors()
        return Response(sums, Tokens(tokens=calibration.samples * calibration.length))

    def _check_model(self, decoder: Decoder, tensors: Tensors, client: LocalClient) -> None:
        """Refuses names and widths that are not those of the client's own model."""
        linears = {name: decoder.blank_linear(self.block, name).shape[1] for name in decoder.block_names(self.block)}
        firsts = set(self.consumers.values())
        if self.consumers.keys() != linears.keys() or not firsts <= linears.keys():
            raise client.error("the request names other linears than its model has; refused")
        norms = self.noise.norms.keys() if self.noise else firsts
        if self.widths != {name: linears[name] for name in firsts} or norms != firsts or not set(self.products) <= firsts:
            raise client.error("the request names other inputs than its model has; refused")
        for name in firsts:
            scale = tensors.get(SCALE + name)
            if scale is None or scale.shape != (linears[name],) or scale.dtype != torch.float32 or bool((scale <= 0).any()):
                raise client.error(f"the factors of the input of {name} are missing, or no positive numbers; refused")

    def expected(self, layout: Decoder | None) -> TensorSpecs:
        return expected(self.widths, self.products, self.moments)

    def check_reply(self, reply: Reply) -> None:
        assert isinstance(reply, Tokens)
        tokens = self.calibration.samples * self.calibration.length
        if reply.tokens != tokens:
            raise WireError(f"it claims {reply.tokens} tokens, not {tokens}")

    def check(self, tensors: Tensors, reply: Reply, layout: Decoder | None) -> None:
        moments = self.calibration.length if self.moments else 0
        check_sums(tensors, self.widths, self.products, self.calibration.samples, self.limit, moments=moments)

    def beyond(self, job: Agreed) -> str | None:
        config, calibration, noise = job.stages[self.stage], self.calibration, self.noise
        assert isinstance(config, Config)
        if config.method.SOLVED_AT != "server":
            return "kind"
        if self.block == 0 and config.protect_first_block:
            return "protect_first_block"
        if calibration.through != "dense" and (
            config.calibration_source == "dense" or not calibration.through.startswith("server/")
        ):
            return "source"
        if calibration.compute_dtype != config.compute_dtype:
            return "compute_dtype"
        if calibration.windows_per_run != 1:
            return "windows_per_run"
        if self.products and config.solver.NEEDS != "gram":
            return "products"
        if self.moments != (config.solver.NEEDS == "moments"):
            return "moments"
        if self.limit not in limits(calibration.samples * calibration.length, len(job.clients), job.secure):
            return "limit"
        if (config.epsilon is None) != (noise is None):
            return "epsilon"
        if noise and (noise.epsilon != config.epsilon or noise.skips_first != config.protect_first_block):
            return "epsilon"
        return "delta" if noise and noise.delta != config.delta else None


@lru_cache(maxsize=64)
def limits(tokens: int, clients: int, secure: bool) -> frozenset[int]:
    """The numbers to which a server that follows the job can limit a client's sums.

    A client that has more than it may send fails, and the server sees that. So a limit that the server chooses would be a
    question about the client's own sums, also under secure aggregation.

    Args:
        tokens: of each client.
        clients: how many may take part.
        secure: whether sums are computed under secure aggregation.
    """
    if not secure:
        return frozenset(largest_per_client(number) for number in range(1, clients + 1))
    return frozenset(masked_limit(ring_bits(number * tokens), number) for number in range(1, clients + 1))


def disclosed_by(products: bool, moments: bool) -> frozenset[Disclosure]:
    """What a client's sums reveal about its text."""
    if products:
        return frozenset({Disclosure.SQUARES, Disclosure.PRODUCTS})
    return frozenset({Disclosure.MOMENTS if moments else Disclosure.SQUARES})


class InputSums(IntegerSums):
    """The server's half: the sums over all clients' text.

    Attributes:
        tokens: number of tokens in the sums.
        clients: the names of the clients in the sums.
    """

    def __init__(self, messages: Mapping[str, Message]):
        super().__init__()
        self.tokens = 0
        self.clients: list[str] = []
        self._requests = _requests_of(messages)
        every = self._requests.values()
        tokens = sum(request.calibration.samples * request.calibration.length for request in every)
        self._ring = ring_bits(tokens)
        self._largest = LARGEST

    def masked(self, messages: Mapping[str, Message]) -> dict[str, Message]:
        """Lowers the clients' limits so that the sum fits in the ring."""
        self._largest = 2 ** (self._ring - 2)
        limit = masked_limit(self._ring, len(messages))
        limited: dict[str, Message] = {}
        for client, message in messages.items():
            request = self._requests[client].model_copy(update={"limit": limit})
            self._requests[client] = request
            limited[client] = Message(request, message.tensors)
        return limited

    def ring_bits(self) -> int:
        """See :meth:`fedgrove.rounds.aggregator.base.Accumulator.ring_bits`."""
        return self._ring

    def add(self, client: str, tensors: Tensors, reply: Reply) -> None:
        super().add(client, tensors, reply)
        self._count({client: reply})

    def add_total(self, total: Tensors, replies: Mapping[str, Reply]) -> None:
        requests = [self._requests[client] for client in replies]
        first = requests[0]
        windows = sum(request.calibration.samples for request in requests)
        moments = first.calibration.length if first.moments else 0
        noisy = first.noise is not None
        check_sums(total, first.widths, first.products, windows, self._largest, noisy=noisy, moments=moments)
        super().add_total(total, replies)
        self._count(replies)

    def _count(self, replies: Mapping[str, Reply]) -> None:
        for client, reply in replies.items():
            assert isinstance(reply, Tokens)
            self.tokens += reply.tokens
            self.clients.append(client)


def _requests_of(messages: Mapping[str, Message]) -> dict[str, SumInputs]:
    requests = {}
    for client, message in messages.items():
        assert isinstance(message.request, SumInputs)
        requests[client] = message.request
    return requests


def largest_per_client(clients: int) -> int:
    """The largest number that each of so many clients may send without secure aggregation."""
    return LARGEST // clients


def masked_limit(bits: int, clients: int) -> int:
    """The largest number that each of so many clients may send in a ring of so many bits."""
    return int(2 ** (bits - 2)) // clients
