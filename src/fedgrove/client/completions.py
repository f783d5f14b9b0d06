"""Requests to a completions server that runs the model in a client's place (OpenAI's ``/v1/completions``).

What is sent is a client's text, so it goes to the address of the client's own settings and nowhere else: redirects are not
followed, and proxies of the environment are not used. What comes back is not trusted: it is bounded in size and time, and no
message quotes it, for it may repeat the text.
"""

from __future__ import annotations

import http.client
import io
import json
import math
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from fedgrove.errors import FedgroveError
from fedgrove.job.endpoint import Endpoint
from fedgrove.rounds import strict_json

MOST_BYTES = 2**24  # of an answer
BUSY = (429, 503)
PAUSE = 1.0  # seconds before the first repetition; doubles with each
LONGEST_PAUSE = 60.0  # whatever the endpoint asks for

T = TypeVar("T")


class EndpointError(FedgroveError):
    """An endpoint does not do its part.

    Attributes:
        word: why, in a word that says nothing of the text.
    """

    def __init__(self, word: str, what: str, remedy: str, *, client: str | None = None):
        super().__init__(f"its endpoint {what}", remedy, client=client)
        self.word = word


class TopToken(NamedTuple):
    """One of the most likely next tokens.

    Attributes:
        id: of the token; None: the endpoint tells its text only.
    """

    id: int | None
    text: str
    logprob: float


class Completions:
    """A client's endpoint.

    Args:
        endpoint: where it is.
        client: the client's name, for errors.
        start: what to do where the endpoint is down; in a run also how to go on with that.

    Raises:
        EndpointError: the environment variable of its key is not set.
    """

    def __init__(self, endpoint: Endpoint, client: str, start: str = "start it"):
        self._endpoint, self._client, self._start = endpoint, client, start
        self._parts = urlsplit(endpoint.url)
        self._context = ssl.create_default_context() if self._parts.scheme == "https" else None
        self._headers = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
        if endpoint.key is not None:
            key = os.environ.get(endpoint.key, "")
            if not key:
                raise self.error("key", "needs a key", f"set the environment variable {endpoint.key} (endpoint.key)")
            if not (key.isascii() and key.isprintable()):
                raise self.error("key", "cannot take the key", f"the environment variable {endpoint.key} has other characters")
            self._headers["Authorization"] = f"Bearer {key}"
        self._idle: list[http.client.HTTPConnection] = []
        self._stopped = threading.Event()

    def error(self, word: str, what: str, remedy: str) -> EndpointError:
        """An error of this client's endpoint."""
        return EndpointError(word, what, remedy, client=self._client)

    def each(self, tasks: list[partial[T]]) -> Iterator[tuple[int, T]]:
        """Calls functions that send requests, several at once; yields (place, result) as they finish.

        Raises:
            EndpointError: the first that fails; what others had finished by then is yielded before.
        """
        self._stopped.clear()
        finished: set[Future[T]] = set()
        with ThreadPoolExecutor(self._endpoint.parallel) as pool:
            places = {pool.submit(task): place for place, task in enumerate(tasks)}
            try:
                for future in as_completed(places):
                    if future.exception() is not None:
                        break
                    finished.add(future)
                    yield places[future], future.result()
            finally:
                self._stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
        while self._idle:
            self._idle.pop().close()
        rest = [future for future in places if future not in finished and not future.cancelled()]
        yield from ((places[future], future.result()) for future in rest if future.exception() is None)
        for error in filter(None, (future.exception() for future in rest)):
            raise error

    def of_prompt(self, ids: list[int]) -> list[tuple[str, float | None]]:
        """The tokens of a prompt, as text, with their log-probabilities; None for the first.

        Raises:
            EndpointError: it fails, or returns none.
        """
        choice = self._choice({"prompt": ids, "max_tokens": 1, "echo": True, "logprobs": 1})
        told = choice.get("logprobs")
        tokens, numbers = (told.get(name) if isinstance(told, dict) else None for name in ("tokens", "token_logprobs"))
        if not isinstance(tokens, list) or not isinstance(numbers, list):
            raise self._no_logprobs("of a prompt's own tokens", 'set endpoint.logprobs = "next" or "none"')
        if not len(ids) <= len(tokens) == len(numbers) or not all(isinstance(token, str) for token in tokens):
            raise self._no_logprobs("of each of a prompt's tokens", 'set endpoint.logprobs = "next" or "none"')
        return [(token, self._number(number)) for token, number in zip(tokens, numbers, strict=True)][: len(ids)]

    def of_next(self, ids: list[int]) -> list[TopToken]:
        """The most likely tokens after a prompt.

        Raises:
            EndpointError: it fails, or returns none.
        """
        choice = self._choice({"prompt": ids, "max_tokens": 1, "logprobs": self._endpoint.top})
        told, found = choice.get("logprobs"), []
        if isinstance(told, dict) and isinstance(told.get("content"), list):  # as llama.cpp says it
            first = next(iter(told["content"]), None)
            entries = first.get("top_logprobs") if isinstance(first, dict) else None
            for entry in entries if isinstance(entries, list) else ():
                if isinstance(entry, dict) and isinstance(entry.get("token"), str):
                    token = entry.get("id")
                    found.append((token if type(token) is int else None, entry["token"], entry.get("logprob")))
        elif isinstance(told, dict) and isinstance(told.get("top_logprobs"), list):  # as OpenAI and vLLM do
            first = next(iter(told["top_logprobs"]), None)
            found = [(None, token, number) for token, number in first.items()] if isinstance(first, dict) else []
        tops = [(token, text, self._number(number)) for token, text, number in found]
        known = [TopToken(token, text, number) for token, text, number in tops if number is not None]
        if not known:
            raise self._no_logprobs("of the most likely next tokens", 'set endpoint.logprobs = "echo" or "none"')
        return known

    def text_after(self, text: str, tokens: int) -> str:
        """What the model writes after a text, the most likely token each time.

        Raises:
            EndpointError: it fails.
        """
        written = self._choice({"prompt": text, "max_tokens": tokens}).get("text")
        if not isinstance(written, str):
            raise self._not_understood()
        return written

    def _number(self, value: object) -> float | None:
        """A log-probability; None: not given."""
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value > 1e-3:
            raise self._not_understood()
        return min(float(value), 0.0)

    def _choice(self, asked: dict[str, Any]) -> dict[str, Any]:
        named = {} if self._endpoint.model is None else {"model": self._endpoint.model}
        body = json.dumps({**named, **asked, "temperature": 0, "n": 1, "stream": False}).encode()
        for attempt in range(self._endpoint.retries + 1):
            status, answer, wanted = self._exchange(body)
            if status not in BUSY or self._stopped.is_set():
                break
            if attempt < self._endpoint.retries:
                self._stopped.wait(min(wanted if wanted is not None else PAUSE * 2**attempt, LONGEST_PAUSE))
        if status != 200:
            raise self._refused(status)
        try:
            choice = strict_json.loads(answer)["choices"][0]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise self._not_understood() from error
        if not isinstance(choice, dict):
            raise self._not_understood()
        return choice

    def _exchange(self, body: bytes) -> tuple[int, bytes, float | None]:
        """One request: status, answer, and the pause in seconds that the endpoint asks for."""
        ends = time.monotonic() + self._endpoint.timeout
        try:
            try:
                connection = self._idle.pop()
            except IndexError:
                return self._sent(self._connection(), body, ends)
            try:
                return self._sent(connection, body, ends)
            except (http.client.RemoteDisconnected, ConnectionError):  # it was closed while it was idle
                return self._sent(self._connection(), body, ends)
        except TimeoutError as error:
            raise self.error(
                "slow", f"gave no answer in {self._endpoint.timeout:g} s",
                "raise endpoint.timeout, or lower endpoint.parallel",
            ) from error  # fmt: skip
        except ssl.SSLError as error:
            raise self.error(
                "certificate", f"has no certificate that is trusted here ({type(error).__name__})",
                "correct endpoint.url, or name its authority's file in the environment variable SSL_CERT_FILE",
            ) from error  # fmt: skip
        except (OSError, http.client.HTTPException) as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
            raise self.error(
                "down",
                f"cannot be reached or breaks off ({why})",
                f"{self._start}, or correct endpoint.url",
            ) from error

    def _connection(self) -> http.client.HTTPConnection:
        host, port, seconds = self._parts.hostname or "", self._parts.port, self._endpoint.timeout
        if self._context is None:
            return http.client.HTTPConnection(host, port, timeout=seconds)
        return http.client.HTTPSConnection(host, port, timeout=seconds, context=self._context)

    def _sent(self, connection: http.client.HTTPConnection, body: bytes, ends: float) -> tuple[int, bytes, float | None]:
        connection.response_class = partial(_Response, ends=ends)  # type: ignore[assignment]
        if connection.sock is not None:  # its last answer left it with the rest of that one's time
            connection.sock.settimeout(self._endpoint.timeout)
        try:
            connection.request("POST", f"{self._parts.path}/completions", body, self._headers)
            response = connection.getresponse()
            answer = response.read(MOST_BYTES + 1)
            if len(answer) > MOST_BYTES:
                raise self.error("answer", f"answers with more than {MOST_BYTES >> 20} MiB", "lower endpoint.top or length")
            wanted = None
            with suppress(ValueError):
                wanted = max(0.0, float(response.headers.get("Retry-After", "")))
            if response.will_close:
                connection.close()
            else:
                self._idle.append(connection)
            return response.status, answer, wanted if wanted is None or math.isfinite(wanted) else None
        except BaseException:
            connection.close()
            raise

    def _refused(self, status: int) -> EndpointError:
        """The error of a status. What the endpoint says with it is not shown, for it may quote the text."""
        if 300 <= status < 400:
            return self.error(
                "redirect", f"sends requests elsewhere (HTTP {status}), which is not followed", "write the final endpoint.url"
            )
        if status in (401, 403):
            where = f"the environment variable {self._endpoint.key}" if self._endpoint.key else "endpoint.key"
            return self.error("key", f"does not accept the key (HTTP {status})", f"correct {where}")
        if status in BUSY:
            return self.error(
                "busy", f"is busy (HTTP {status}, {self._endpoint.retries + 1} times)",
                "raise endpoint.retries, or lower endpoint.parallel",
            )  # fmt: skip
        if status == 404:
            return self.error(
                "model", "has no such address or no such model (HTTP 404)", "correct endpoint.url and endpoint.model"
            )
        hint = ' (llama.cpp has no "echo": set endpoint.logprobs = "next")' if self._endpoint.logprobs == "echo" else ""
        return self.error("refused", f"refuses the request (HTTP {status})", f"its own log says why{hint}")

    def _no_logprobs(self, of: str, remedy: str) -> EndpointError:
        return self.error("logprobs", f"returns no log-probabilities {of}", remedy)

    def _not_understood(self) -> EndpointError:
        return self.error("answer", "does not answer as a completions server does", "correct endpoint.url")


class _Response(http.client.HTTPResponse):
    """A response that must be complete at a time: the limit of a socket is one for each piece that arrives."""

    def __init__(self, sock: socket.socket, *arguments: Any, ends: float, **options: Any):
        super().__init__(sock, *arguments, **options)
        self.fp = io.BufferedReader(_Timed(sock, self.fp, ends))


class _Timed(io.RawIOBase):
    """What a socket receives until a time. ``opened`` is a file of the socket, which stays open as long as that is."""

    def __init__(self, sock: socket.socket, opened: io.BufferedIOBase, ends: float):
        self._sock, self._opened, self._ends = sock, opened, ends

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._ends - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._sock.settimeout(left)
        return self._sock.recv_into(buffer)

    def close(self) -> None:
        self._opened.close()
        super().close()
