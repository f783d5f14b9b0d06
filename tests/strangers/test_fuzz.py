"""Hostile messages by the thousand: what comes out is a refusal or an error of our own, in bounded time and memory.

In the suite a few hundred of each kind, always the same; ``make fuzz-minute`` tries as many as take about a minute for each
kind, also always the same; ``make fuzz`` tries many more, and others every time.
"""

from __future__ import annotations

import copy
import json
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedgrove.client.local_client import LocalClient
from fedgrove.client.serve import read, serve
from fedgrove.deploy.flare.exchanges.join import Joined, JoinRun
from fedgrove.deploy.flare.policy import Terms, terms_of
from fedgrove.errors import FedgroveError
from fedgrove.job.load import load_federated
from fedgrove.privacy.secagg.keys import make_credentials
from fedgrove.rounds import wire
from fedgrove.rounds.capabilities import Capabilities
from fedgrove.rounds.request import Request, parse
from fedgrove.rounds.wire import WireError
from small import CLIENTS, Small
from test_wire import forge, sample, take_apart

SIZE = os.environ.get("HYPOTHESIS", "suite")
BUDGET = settings(
    max_examples={"suite": 150, "minute": 12_000, "long": 100_000}[SIZE],
    derandomize=SIZE != "long",
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
SECONDS = 2.0  # for one message, on a machine with other work
MEMORY = 2**30  # bytes that the peak of this process may grow by, over all messages of a test

KEY = "00" * 32
ADVERT = {"mask_key": KEY, "channel_key": KEY, "commitment": KEY, "signature": 2 * KEY}
SESSION = {"name": "s", "clients": list(CLIENTS), "bits": 64, "request": ""}
MESSAGES: dict[str, dict[str, Any]] = {
    "rounds/secagg/keys": {},
    "rounds/secagg/shares": {"adverts": {"birch": ADVERT, "cedar": ADVERT}, "hashes": dict.fromkeys(CLIENTS, KEY)},
    "rounds/secagg/received": {"sealed_shares": {"birch": "00" * 50, "cedar": "11" * 50}},
    "rounds/secagg/check": {"survivors": list(CLIENTS)},
    "rounds/secagg/open": {"signatures": dict.fromkeys(CLIENTS, 2 * KEY)},
}
CAPABLE = {
    "memory": 2**40, "speed": 1.0, "uplink": 10**6, "downlink": 10**7, "devices": 1, "bits": [16], "samples": 4,
    "sparsity": 0.5, "tokens": {"16": 352},
}  # fmt: skip

numbers = st.one_of(
    st.integers(),
    st.sampled_from([0, -1, 2**31, 2**53, 2**63, 2**64, 10**40, -(2**63)]),
    st.floats(allow_nan=True, allow_infinity=True),
)
words = st.one_of(st.text(max_size=8), st.sampled_from(["", "../x", "ash", "zed", "\n", "\x1b[2J", "a" * 300, "0" * 64, "é"]))
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, words),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(words, inner, max_size=4)),
    max_leaves=8,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in some JSON."""
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


@st.composite
def spoiled(draw: st.DrawFn, honest: Any) -> Any:
    """JSON that is honest but for one to three places, where there is something else, nothing, or something twice."""
    value = copy.deepcopy(honest)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(sorted(places(value), key=repr)))
        if not path:
            if draw(st.integers(0, 9)) == 0:
                return draw(values)
            continue
        place = value
        for key in path[:-1]:
            place = place[key]
        how = draw(st.sampled_from(["other", "nothing", "more"]))
        if how == "other":
            place[path[-1]] = draw(values)
        elif how == "nothing":
            del place[path[-1]]
        elif isinstance(place, dict):
            place[draw(words)] = draw(st.one_of(values, st.just(place[path[-1]])))
        else:
            place.append(draw(st.one_of(values, st.just(place[path[-1]]))))
    return value


@contextmanager
def bounded() -> Iterator[None]:
    since = time.monotonic()
    yield
    assert time.monotonic() - since < SECONDS


@pytest.fixture(autouse=True)
def _memory() -> Iterator[None]:
    def peak() -> int:
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    before = peak()
    yield
    assert peak() - before < MEMORY


def one_line(error: Exception) -> None:
    assert "\n" not in str(error)
    assert len(str(error)) < 2000


@BUDGET
@given(data=st.data())
def test_bytes_are_a_message_or_damaged(data: st.DataObject) -> None:
    header, pieces = take_apart(sample())
    how = data.draw(st.sampled_from(["bytes", "header", "pieces", "flip", "cut"]))
    if how == "bytes":
        message = data.draw(st.binary(max_size=300))
    elif how == "header":
        message = forge(encoded(data.draw(spoiled(header))), pieces)
    elif how == "pieces":
        name = data.draw(st.sampled_from(sorted(pieces)))
        message = forge(header, {**pieces, name: data.draw(st.binary(max_size=300))})
    elif how == "flip":
        array = bytearray(sample())
        array[data.draw(st.integers(0, len(array) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        message = bytes(array)
    else:
        message = sample()[: data.draw(st.integers(0, 4000))]
    with bounded():
        try:
            tensors, info = wire.unpack(message)
        except WireError as error:
            one_line(error)
            return
    assert isinstance(info, dict)
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) <= 512 * len(message)


def encoded(value: Any) -> bytes:
    """JSON with NaN and infinity, as Python writes it."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


@BUDGET
@given(fields=spoiled(CAPABLE))
def test_capabilities_are_bounded_or_refused(fields: Any) -> None:
    with bounded():
        try:
            capable = Capabilities.model_validate(fields)
        except ValidationError:
            return
        assert capable.memory is None or 0 < capable.memory <= 2**50
        assert 1e-6 <= capable.speed <= 1e6
        assert all(16 <= tokens <= 2**50 or tokens > 0 for tokens in capable.tokens.values())


@BUDGET
@given(fields=spoiled({"result": True, "capabilities": {"speed": 1.0, "memory": 2**30, "bits": [16]}}))
def test_what_a_site_says_when_it_joins_is_bounded_or_refused(fields: Any) -> None:
    with bounded():
        try:
            Joined.model_validate(fields)
        except ValidationError:
            return


@BUDGET
@given(fields=spoiled({"stage": 0, "round": 0, "digests": {"ends": KEY, "block-0000": KEY}, "clock": 1e9}))
def test_a_request_to_join_is_one_or_refused(fields: Any) -> None:
    assert isinstance(_parsed("deploy/join", fields), JoinRun | None)


STAGES = [
    {"kind": "prune", "pruner": "wanda", "aggregation": "pooled", "sparsity": 0.5, "samples": 3, "length": 16, "epsilon": 4.0},
    {"kind": "tune", "method": "lora", "length": 16, "ranks": [2], "rounds": 2},
    {"kind": "structured", "samples": 3, "length": 16},
]


@BUDGET
@given(data=st.data())
def test_the_terms_of_a_signed_job_are_terms_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    job = {
        "name": "job", "model": {"path": "m"}, "clients": [{"name": name} for name in CLIENTS], "seed": 0,
        "stages": [data.draw(st.sampled_from(STAGES))], "privacy": {"secure_aggregation": True}, "rounds": {"quorum": 3},
    }  # fmt: skip
    try:
        text = tomli_w.dumps(data.draw(spoiled(job)))
    except (TypeError, ValueError, AttributeError):  # TOML has no null and no such thing at the top
        return
    file = tmp_path / "job.toml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    with bounded():
        try:
            terms = terms_of(load_federated(file, elsewhere=True), {})
        except (FedgroveError, ValidationError) as error:
            if isinstance(error, FedgroveError):
                one_line(error)
            return
    assert Terms.model_validate_json(terms.model_dump_json()) == terms


def _parsed(kind: str, fields: Any) -> Request | None:
    with bounded():
        try:
            return parse(kind, fields)
        except (WireError, FedgroveError) as error:
            one_line(error)
            return None


@pytest.fixture
def ash(small: Small, tmp_path: Path) -> Callable[[], LocalClient]:
    credentials = make_credentials(CLIENTS)["ash"]
    return lambda: LocalClient("ash", tmp_path, small.model, None, (), None, {}, credentials)


@pytest.mark.parametrize("kind", MESSAGES)
@BUDGET
@given(data=st.data())
def test_messages_of_a_secure_sum_are_answered_or_refused(
    ash: Callable[[], LocalClient], kind: str, data: st.DataObject
) -> None:
    honest = {"stage": 0, "session": SESSION, **MESSAGES[kind]}
    fields = data.draw(spoiled(honest))
    message = forge(encoded({"info": {"request": fields}, "tensors": []}))
    with bounded():
        try:
            serve(kind, message, ash(), "cpu")
        except (WireError, FedgroveError) as error:
            one_line(error)


@BUDGET
@given(fields=spoiled({"session": SESSION, "peers": ["birch", "cedar"]}))
def test_what_masks_a_response_is_a_masking_or_refused(fields: Any) -> None:
    message = forge(encoded({"info": {"request": {"stage": 0, "part": 0}, "masking": fields}, "tensors": []}))
    with bounded():
        try:
            read("tune/base", message)
        except (WireError, FedgroveError) as error:
            one_line(error)
