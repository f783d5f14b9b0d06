"""Requests: one typed, frozen message to one client. Both halves of an exchange are in one file.

A request type defines what a client is asked (its fields), what the client does (:meth:`Request.respond`), which
responses are valid (:meth:`Request.expected`, :meth:`Request.check_reply`, :meth:`Request.check`) and what a response
discloses about the client's text (:attr:`Request.DISCLOSES`). None of this is repeated elsewhere: the plan, the report,
the model card, the table in docs/security.md and a site's policy read it from the type.

A type's name on the wire is ``folder/file``: ``prune/block`` is the request type in
``fedgrove/stages/prune/exchanges/block.py``. If a file has several types, their names are ``folder/file/part``. The
folder is a kind of stage, ``rounds``, or ``deploy`` for requests to a site itself. There is no other registry: a new
exchange is a new file.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from fedgrove import plugins
from fedgrove.errors import FedgroveError
from fedgrove.escape import MAX_WORD, printable
from fedgrove.job.units import Index
from fedgrove.models.tensor_files import raw_bytes
from fedgrove.rounds.disclosure import Disclosure
from fedgrove.rounds.wire import CHANGE, WEIGHT, WireError

if TYPE_CHECKING:
    from fedgrove.client.local_client import LocalClient
    from fedgrove.job.stage_config import Agreed, StageConfig
    from fedgrove.models.blocks import Decoder

__all__ = [
    "CHANGE", "WEIGHT", "Disclosure", "Message", "Part", "Reply", "Request", "RequestError", "Response", "TensorSpecs",
    "Tensors", "parse", "request_type", "request_types",
]  # fmt: skip

Tensors = dict[str, Tensor]
TensorSpecs = dict[str, tuple[torch.Size, torch.dtype]]
OTHER_ROOMS = {"rounds": "rounds.exchanges", "deploy": "deploy.flare.exchanges"}  # packages of no stage


class RequestError(WireError):
    """A received message is not a valid request.

    Attributes:
        field: the first invalid field; "kind" if there is no such type.
    """

    def __init__(self, message: str, field: str):
        super().__init__(message)
        self.field = field


class Part(BaseModel):
    """Fields of a message. Unknown fields are refused, and so are numbers that are not finite.

    A field that comes from the network has one of the bounded types of :mod:`fedgrove.job.units`: no number, text or list
    without a limit.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Reply(Part):
    """The JSON of a response."""


class Response(NamedTuple):
    """What a client's half of an exchange returns."""

    tensors: Mapping[str, Tensor]
    reply: Reply


class Request(Part):
    """One message to one client; see the top of this file. Fields are plain data; tensors are sent with it.

    Class attributes:
        KIND: the name on the wire.
        DISCLOSES: what responses reveal about a client's text.
        REPLY: the type of the JSON of responses.
        OWN_FIELDS: None: responses are not summed, and so are never masked. Else the fields in which the requests to the
            clients of one sum may differ, such as ``calibration.samples``; all others have to be the same.
        SUM_FIELDS: the fields by which a sum is known in its run.

    Attributes:
        stage: index of the stage in the job, from 0; round: index of the round in the stage, from 0.
    """

    KIND: ClassVar[str]
    DISCLOSES: ClassVar[frozenset[Disclosure]] = frozenset()
    REPLY: ClassVar[type[Reply]] = Reply
    OWN_FIELDS: ClassVar[frozenset[str] | None] = None
    SUM_FIELDS: ClassVar[tuple[str, ...]] = ("stage", "round")

    stage: Index
    round: Index = 0

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        """The client's half of the exchange.

        Args:
            tensors: the tensors that came with the request.
            client: the client's text, model, folder and keys.
            device: the device that it computes on.

        Raises:
            FedgroveError: the client cannot respond.
        """
        raise NotImplementedError

    def expected(self, layout: Decoder | None) -> TensorSpecs:
        """The tensors that a response must contain: shape and dtype by name.

        Args:
            layout: the model at the server; None for requests that do not need it.
        """
        return {}

    def check_reply(self, reply: Reply) -> None:
        """Refuses an invalid reply. It is called for every response, also if its tensors are masked.

        Raises:
            WireError: says what is wrong, in one line.
        """

    def check(self, tensors: Tensors, reply: Reply, layout: Decoder | None) -> None:
        """Refuses a response whose tensors have the expected names, shapes and dtypes but impossible values.

        It is not called if tensors are masked: masked values look random, so the sum is checked instead.

        Raises:
            WireError: says what is wrong, in one line.
        """

    def discloses(self) -> frozenset[Disclosure]:
        """What the response to this request reveals about a client's text: at most ``DISCLOSES``."""
        return self.DISCLOSES

    def release(self) -> str | None:
        """A name for the response if it is noisy, so that it is made only once; None: no noise."""
        return None

    def adders(self) -> int:
        """With how many clients a response must be summed at least, because they add its noise together; 1: no such need."""
        return 1

    @property
    def sum_name(self) -> str:
        """The name of the sum that the response goes into, in its run."""
        return "/".join([self.KIND, *(str(getattr(self, field)) for field in self.SUM_FIELDS)])

    def common_tensors(self, tensors: Tensors) -> Tensors:
        """The tensors sent with the request, in a form that is the same for all clients of one sum."""
        return tensors

    def sum_digest(self, tensors: Tensors) -> str:
        """A hash of what all clients of one sum are asked alike: all fields but ``OWN_FIELDS``, and the tensors."""
        fields = self.model_dump(mode="json")
        for name in self.OWN_FIELDS or ():
            *path, last = name.split(".")
            inner = fields
            for part in path:
                inner = inner.get(part) or {}
            inner.pop(last, None)
        digest = hashlib.sha256(f"{self.KIND} {json.dumps(fields, sort_keys=True)}".encode())
        for name, tensor in sorted(self.common_tensors(tensors).items()):
            digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
            digest.update(raw_bytes(tensor))
        return digest.hexdigest()

    @classmethod
    def rounds_in(cls, config: StageConfig) -> range:
        """The rounds of a stage in which such a request may come."""
        return range(config.number_of_rounds())

    def beyond(self, job: Agreed) -> str | None:
        """The first field that an agreed job does not allow; None: the request is within the job.

        Not to be compared: the stage and the round (see :meth:`rounds_in`), and windows of text, which a site compares in
        every :class:`~fedgrove.client.hidden_states.Calibration`. What only the model decides is compared in
        :meth:`respond`.

        Args:
            job: the job that a site agreed to.
        """
        return None

    @property
    def digest(self) -> str:
        """A hash of this request. The response repeats it, so that a response to another request is detected."""
        fields = json.dumps(self.model_dump(mode="json"), sort_keys=True)  # sorted: the wire changes the order
        return hashlib.sha256(f"{self.KIND} {fields}".encode()).hexdigest()[:32]


class Message(NamedTuple):
    """A request and the tensors that travel with it."""

    request: Request
    tensors: Mapping[str, Tensor] = {}


def request_type(kind: str) -> type[Request]:
    """The type of a kind's requests.

    Raises:
        RequestError: there is no such kind. The name may come from the network, so only exchanges are imported.
    """
    room, _, rest = kind.partition("/")
    try:
        types = _types_in(_package(room), rest.partition("/")[0])
    except (FedgroveError, ModuleNotFoundError):
        types = []
    for one in types:
        if kind == one.KIND:
            return one
    raise RequestError(f"there is no request '{printable(kind, MAX_WORD)}'", "kind")


def request_types() -> list[type[Request]]:
    """All types of requests, sorted by kind. A client responds to no others."""
    packages = [*OTHER_ROOMS.values(), *(f"stages.{kind}.exchanges" for kind in plugins.names("stages", folders=True))]
    there = [package for package in packages if importlib.util.find_spec(f"fedgrove.{package}") is not None]
    types = [one for package in there for name in plugins.names(package) for one in _types_in(package, name)]
    return sorted(types, key=lambda one: one.KIND)


def parse(kind: str, fields: object) -> Request:
    """Validates the fields of a received request.

    Raises:
        RequestError: there is no such kind, or a field is invalid; names the first such field.
    """
    try:
        return request_type(kind).model_validate(fields)
    except ValidationError as error:
        field = ".".join(map(str, error.errors()[0]["loc"]))
        raise RequestError(f"{kind}: {printable(field, MAX_WORD)}: {error.errors()[0]['msg']}", field) from error


def _package(room: str) -> str:
    if room not in OTHER_ROOMS and room not in plugins.names("stages", folders=True):
        raise FedgroveError(f"there are no exchanges of '{printable(room, MAX_WORD)}'")
    return OTHER_ROOMS.get(room, f"stages.{room}.exchanges")


def _types_in(package: str, name: str) -> list[type[Request]]:
    module = plugins.load(package, name)
    return [
        one
        for one in vars(module).values()
        if isinstance(one, type) and issubclass(one, Request) and one.__module__ == module.__name__ and "KIND" in vars(one)
    ]
