"""Every client sums statistics of one block's inputs over its own text; the server adds the sums up.

A kind of stage that uses this exchange derives its own request from :class:`SumInputs`, which says what its job allows.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, ClassVar, Protocol

import torch
from pydantic import Field
from torch import Tensor

from fedgrove.client.hidden_states import Calibration, HiddenStates, Tokens
from fedgrove.client.local_client import LocalClient
from fedgrove.client.server_weights import start_of
from fedgrove.client.windows import calibration_windows, decoder_of
from fedgrove.input_statistics.fixed_point import BITS, LARGEST, MAX_NORM, Statistic, check_sums, expected, ring_bits
from fedgrove.input_statistics.shared_inputs import Unsummed, WindowSum, count_inputs, shared_inputs
from fedgrove.job.units import MAX_BLOCKS, Count, Delta, Epsilon, Index, Linear, Linears, Natural
from fedgrove.models.blocks import Decoder
from fedgrove.privacy.accounting import gaussian_noise_multiplier
from fedgrove.privacy.gaussian import GaussianMechanism
from fedgrove.rounds.aggregator.integers import IntegerSums
from fedgrove.rounds.request import Disclosure, Message, Part, Reply, Request, Response, Tensors, TensorSpecs

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


class InputSum(WindowSum, Protocol):
    """What a client sums of one input."""

    def tensors(self) -> Tensors:
        """The tensors to send."""
        ...


class SumInputs(Request):
    """Sum, over your text, statistics of one block's inputs.

    Tensors sent with the request: ``scale/<input>``: (in,) float32 powers of two; ``start/<linear>``: (out, in), the previous
    block as the server changed it, if hidden states pass through the server's blocks. The response holds
    ``change/<input>/squares`` and, if requested, ``/products``, ``/sums`` and ``/spreads``: see
    :class:`~fedgrove.input_statistics.fixed_point.Statistic`.

    If hidden states pass through the client's own copy of the model and their cache is gone, the pass starts again, so a client
    may miss any request. If they pass through the server's blocks, each request carries only the previous block, so a client
    whose cache is gone cannot continue.

    Attributes:
        block: the block whose inputs are summed.
        calibration: the windows, and what they pass through.
        consumers: for each linear of the block, its input; inputs are named after the first linear that reads them.
        widths: number of channels of each input that is summed.
        products: the inputs whose products are summed, besides their squares.
        moments: whether sums and variances are summed too.
        limit: the largest number that may be sent.
        noise: the noise for differential privacy; None: no noise is added.
    """

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

        sums: dict[str, InputSum] = {}

        def begin(name: str) -> WindowSum:
            if self.consumers.get(name) != name:
                raise client.error(f"its model and the server's disagree on which linears share the input of {name}")
            if name not in self.widths:
                return Unsummed()
            sums[name] = self.begin(name, tensors[SCALE + name].to(decoder.device), client)
            return sums[name]

        with decoder.loaded(self.block) as block, shared_inputs(block, begin):
            outputs = (decoder.run(block, hidden, calls[self.block]) for hidden in states.read(self.block))
            if calibration.through == "dense" and self.block < len(decoder) - 1:
                states.write(self.block + 1, outputs, calibration.samples)
            else:
                for _ in outputs:
                    pass
        states.forget(before=self.block - 1)
        change: Tensors = {}
        for name in sorted(sums):
            change |= sums.pop(name).tensors()
        return Response(change, Tokens(tokens=calibration.tokens))

    def begin(self, name: str, scale: Tensor, client: LocalClient) -> InputSum:
        """The sum of one input, before any window is added.

        Args:
            name: the input.
            scale: (in,), by which it is multiplied.
            client: the client.
        """
        mechanism = self.noise.mechanism(name) if self.noise else None
        return Statistic(name, scale, name in self.products, self.limit, mechanism, self.moments)

    def sums_of(self, name: str) -> tuple[str, ...]:
        """The names of the sums that :meth:`begin` makes of an input: ``change/<name>/squares`` and so on."""
        return (name,)

    def _all_sums(self) -> tuple[dict[str, int], list[str]]:
        """The number of channels of each sum, and the sums that include products."""
        widths = {part: width for name, width in self.widths.items() for part in self.sums_of(name)}
        return widths, [part for name in self.products for part in self.sums_of(name)]

    def _check_model(self, decoder: Decoder, tensors: Tensors, client: LocalClient) -> None:
        """Refuses names and widths that are not those of the client's own model."""
        linears = {name: decoder.blank_linear(self.block, name).shape[1] for name in decoder.block_names(self.block)}
        firsts = set(self.consumers.values())
        if self.consumers.keys() != linears.keys() or not firsts <= linears.keys():
            raise client.error("the request names other linears than its model has; refused")
        summed = self.widths.keys()
        norms = self.noise.norms.keys() if self.noise else summed
        known = summed <= firsts and all(self.widths[name] == linears[name] for name in summed)
        if not known or norms != summed or not set(self.products) <= summed:
            raise client.error("the request names other inputs than its model has; refused")
        for name in summed:
            scale = tensors.get(SCALE + name)
            if scale is None or scale.shape != (linears[name],) or scale.dtype != torch.float32 or bool((scale <= 0).any()):
                raise client.error(f"the factors of the input of {name} are missing, or no positive numbers; refused")

    def expected(self, layout: Decoder | None) -> TensorSpecs:
        return expected(*self._all_sums(), self.moments)

    def check_reply(self, reply: Reply) -> None:
        assert isinstance(reply, Tokens)
        reply.check(self.calibration)

    def check(self, tensors: Tensors, reply: Reply, layout: Decoder | None) -> None:
        self.check_total(tensors, self.calibration.samples, self.limit, noisy=False)

    def check_total(self, total: Tensors, windows: int, limit: int, noisy: bool) -> None:
        """Refuses impossible sums over so many windows; see :func:`~fedgrove.input_statistics.fixed_point.check_sums`."""
        moments = self.calibration.length if self.moments else 0
        check_sums(total, *self._all_sums(), windows, limit, noisy=noisy, moments=moments)


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
        return frozenset({Disclosure.SQUARES, Disclosure.PRODUCTS} | ({Disclosure.MOMENTS} if moments else set()))
    return frozenset({Disclosure.MOMENTS if moments else Disclosure.SQUARES})


class InputSums(IntegerSums):
    """The server's half: the sums over all clients' text.

    Attributes:
        tokens: number of tokens in the sums.
        clients: the names of the clients in the sums.
        requests: by client, what it is asked.
    """

    def __init__(self, messages: Mapping[str, Message]):
        super().__init__()
        self.tokens = 0
        self.clients: list[str] = []
        self.requests = _requests_of(messages)
        every = self.requests.values()
        tokens = sum(request.calibration.tokens for request in every)
        self._ring = ring_bits(tokens)
        self._largest = LARGEST

    def masked(self, messages: Mapping[str, Message]) -> dict[str, Message]:
        """Lowers the clients' limits so that the sum fits in the ring."""
        self._largest = 2 ** (self._ring - 2)
        limit = masked_limit(self._ring, len(messages))
        limited: dict[str, Message] = {}
        for client, message in messages.items():
            request = self.requests[client].model_copy(update={"limit": limit})
            self.requests[client] = request
            limited[client] = Message(request, message.tensors)
        return limited

    def ring_bits(self) -> int:
        """See :meth:`fedgrove.rounds.aggregator.base.Accumulator.ring_bits`."""
        return self._ring

    def add(self, client: str, tensors: Tensors, reply: Reply) -> None:
        super().add(client, tensors, reply)
        self._count({client: reply})

    def add_total(self, total: Tensors, replies: Mapping[str, Reply]) -> None:
        requests = [self.requests[client] for client in replies]
        windows = sum(request.calibration.samples for request in requests)
        requests[0].check_total(total, windows, self._largest, noisy=requests[0].noise is not None)
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
