"""Secure aggregation against a server that lies, and against clients that do: many members of each kind of lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from fedgrove.privacy.secagg import keys, masking
from fedgrove.privacy.secagg.masking import as_rings
from fedgrove.privacy.secagg.server import Opening
from fedgrove.privacy.secagg.session import SecureError, Session, min_survivors, parameters
from fedgrove.rounds.request import RequestError, parse
from secagg import Federation, inputs_of, same, total

Tensors = dict[str, torch.Tensor]


def opened_part(federation: Federation, group: Sequence[str], masked: Mapping[str, Tensors], revealed: Any) -> Tensors | None:
    """What a server learns of a part of the survivors: its sum without the masks whose secrets it can recover.

    Returns:
        None: a self-mask of the group cannot be recovered.
    """
    session = federation.session
    opening = Opening(session, federation.adverts, federation.sealed)
    for name in group:
        opening.add(name, masked[name])
    try:
        seeds = {name: opening.secret(name, "self", revealed) for name in group}
    except SecureError:
        return None
    rings = as_rings(opening._sum)
    for name, seed in seeds.items():
        masking.add_keystream(rings, keys.self_mask_key(seed, session), -1)
    for other in sorted(set(federation.names) - set(group)):
        try:
            private = keys.session_key(opening.secret(other, "mask", revealed), "mask", session)
        except SecureError:
            continue
        for name in set(group) & set(session.neighbors(other)):
            key = keys.pair_mask_key(private, federation.adverts[name].mask_key, session, other, name)
            masking.add_keystream(rings, key, -masking.pair_sign(name, other))
    masking.reduce(rings, session)
    masking.restore_signs(rings, session)
    return opening._sum


# The parameters of a sum


@pytest.mark.parametrize("number", [*range(2, 60), 64, 65, 99, 100, 127, 128, 129, 200, 333, 500, 1000, 1025])
def test_the_number_of_clients_alone_decides_who_is_protected_from_whom(number: int) -> None:
    degree, threshold, quorum = parameters(number)
    assert 0 < degree < number
    assert degree % 2 == 0 or degree == number - 1
    assert 2 * threshold > degree + 1, "two lists of survivors could both be signed"
    assert threshold <= degree + 1
    assert 3 * quorum >= 2 * number
    assert 2 * quorum > number
    assert quorum == min_survivors(number)
    if degree == number - 1:
        colluding = (number - 1) // 3
        assert 2 * threshold > number + colluding, "colluding clients sign both lists"
        assert 2 * (threshold - 1 - colluding) >= number - colluding - 1 or number < 4, "honest survivors fall into parts"
    else:
        assert threshold >= degree // 2 + 2, "the survivors of a ring of neighbors could fall into parts"
    session = Session("x", tuple(f"c{i:04d}" for i in range(number)))
    assert (session.degree, session.threshold, session.quorum) == (degree, threshold, quorum)
    assert asdict(session).keys() == {"name", "clients", "bits"}


@pytest.mark.parametrize("key", ["degree", "threshold", "quorum", "neighbors", "min_group"])
@pytest.mark.parametrize("number", [2, 3, 6, 9, 50, 101])
@pytest.mark.parametrize("kind", ["keys", "shares", "check", "open"])
def test_a_request_that_names_a_parameter_is_refused(kind: str, number: int, key: str) -> None:
    more = {"keys": {}, "shares": {"adverts": {}}, "check": {"survivors": []}, "open": {"signatures": {}}}[kind]
    session = {"name": "x", "clients": [f"c{i:03d}" for i in range(number)], "bits": 64}
    for value in (*range(1, number), getattr(parameters(number), key, 2)):
        with pytest.raises(RequestError, match=f"session.{key}"):
            parse(f"rounds/secagg/{kind}", {"stage": 0, "session": {**session, key: value}, **more})


@pytest.mark.parametrize("number", [6, 9, 12])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_part_of_the_survivors_is_opened_if_every_third_client_falls_silent(tmp_path: Path, number: int, size: int) -> None:
    federation = Federation(tmp_path, number)
    inputs = inputs_of(federation.names)
    ring = sorted(federation.names)
    survivors, opened = federation.run(inputs, {"masked": ring[0::3]})
    assert same(opened, total(inputs, survivors))
    for at in range(len(survivors)):
        group = [survivors[(at + i) % len(survivors)] for i in range(size)]
        part = opened_part(federation, group, federation.masked, federation.revealed)
        assert part is None or not same({"large": part["large"]}, {"large": total(inputs, group)["large"]})


def test_the_helper_of_these_tests_opens_what_can_be_opened(tmp_path: Path) -> None:
    federation = Federation(tmp_path, 6)
    inputs = inputs_of(federation.names)
    survivors, _ = federation.run(inputs, {"masked": federation.names[:1]})
    part = opened_part(federation, survivors, federation.masked, federation.revealed)
    assert part is not None
    assert same(part, total(inputs, survivors))
