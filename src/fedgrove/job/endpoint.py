"""A server of completions that runs a model in a client's place: where it is, and what it tells."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from fedgrove.job.units import Line, Table

LogProbs = Literal["echo", "next", "none"]


def _address(url: str) -> str:
    """Checks an address. No message repeats it: what does not belong there may be a password."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ValueError("it is no address; write one such as http://127.0.0.1:8080/v1") from error
    if parts.scheme not in ("http", "https"):
        raise ValueError("only http and https are possible; write an address such as http://127.0.0.1:8080/v1")
    if not parts.hostname or port == 0 or not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError("it is no address; write one such as http://127.0.0.1:8080/v1")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise ValueError("an address has no name, password or parameters; a key goes into an environment variable (key)")
    return url.rstrip("/")


class Endpoint(Table):
    """``[model.endpoint]``: a completions server that runs the model for stages of kind "prompt"; ``[endpoint]`` in a site's ``site.toml``.

    The records' text is sent to it, so whoever runs it sees the text. In a federation a job cannot name it: each site says in its
    own file where its text goes.

    Attributes:
        url: its address as of OpenAI's clients, such as "http://127.0.0.1:8080/v1"; requests go to ``/completions`` below it.
        model: the name by which it knows the model; servers of one model need none.
        logprobs: the log-probabilities that it returns. "echo": of a prompt's own tokens (vLLM); "next": of the most likely next
            tokens (llama.cpp, vLLM); "none": text only, and the stage needs ``score = "correct"``.
        top: with "next", how many of the most likely tokens are asked for. A label that is not among them counts as the last of
            them.
        key: the name of an environment variable with the key that it wants.
        timeout: seconds in which it must answer a request.
        retries: how often a request is sent again when the endpoint says that it is busy (429, 503), after a pause.
        parallel: how many requests are sent at once.
    """  # noqa: E501

    url: Annotated[str, Field(max_length=1000), AfterValidator(_address)]
    model: Annotated[Line, Field(min_length=1)] | None = None
    logprobs: LogProbs = "echo"
    top: Annotated[int, Field(ge=1, le=10_000)] = 20
    key: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,199}$")] | None = None
    timeout: Annotated[float, Field(gt=0, le=3600)] = 60.0
    retries: Annotated[int, Field(ge=0, le=20)] = 5
    parallel: Annotated[int, Field(ge=1, le=64)] = 4
