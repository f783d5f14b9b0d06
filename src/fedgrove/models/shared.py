"""Which parameters of a model share one stored tensor.

In a model such as MobiLlama (arXiv 2402.16840) all blocks compute with one feed-forward part. Its checkpoint holds the tensors
once, or once for each block, all equal. No configuration of transformers says so, so it has to be declared: a map from the name
of a parameter, as it would be stored, to the name of the tensor that is stored. It is in ``[model] shares`` of a job, or in
:data:`SHARES` beside the weights, where results have it. Nothing is guessed: ``fedgrove doctor`` shows the map of tensors that
are equal, and a job that does not repeat it changes each of them by itself.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedgrove.errors import FedgroveError
from fedgrove.models.depth import parts_of, place_of, renumbered
from fedgrove.models.files import read_json

SHARES = "shares.json"
EVERY = "*"  # in a declared name: the number of every block
NAMED = 6  # names that a message shows of a circle

Headers = Mapping[str, Mapping[str, Any]]  # by name, the shape and dtype of a stored tensor


def read_shares(folder: Path) -> dict[str, str]:
    """What the file :data:`SHARES` of a model directory declares; empty without that file.

    Raises:
        FedgroveError: it is no JSON object of names.
    """
    file = folder / SHARES
    if not file.is_file():
        return {}
    declared = read_json(file)
    if not all(isinstance(stored, str) for stored in declared.values()):
        raise FedgroveError(f"model: {file} is not understood: its values must be names of tensors", "copy it again")
    return declared


def resolve_shares(declared: Mapping[str, str], headers: Headers, num_blocks: int, folder: Path) -> dict[str, str]:
    """Parameter -> the stored tensor that it is; tensors that stand for themselves are left out.

    Args:
        declared: parameter -> stored tensor, or another parameter of the map. ``*`` in a parameter's name stands for the number
            of every block.
        headers: of the stored tensors.
        num_blocks: number of blocks.
        folder: of the model, for messages.

    Raises:
        FedgroveError: the map has a circle, ends at a name that is not stored, or names stored tensors of another shape or
            dtype.
    """
    each = {name: stored for pattern, stored in declared.items() for name in _expanded(pattern, num_blocks)}
    each |= {pattern: stored for pattern, stored in declared.items() if EVERY not in pattern}  # a name precedes a pattern
    each = {name: stored for name, stored in each.items() if name != stored}
    shares = {name: _end_of(name, each) for name in each}
    for name, stored in shares.items():
        if stored not in headers:
            raise FedgroveError(
                f"model.shares: {name} shares {stored}, but {folder} has no tensor of that name",
                "name a tensor that is stored" + _instead(name, stored, headers),
            )
        if name in headers and headers[name] != headers[stored]:
            raise FedgroveError(
                f"model.shares: {name} is stored as {_form(headers[name])}, but {stored}, which it is to share, as "
                f"{_form(headers[stored])}",
                "remove it from shares",
            )
    return shares


def shares_of_kept(
    shares: Mapping[str, str], stored: Collection[str], kept: Sequence[int]
) -> tuple[dict[str, str], dict[str, str]]:
    """The map of a model without some blocks, whose tensors have the new numbers.

    A tensor of a block that goes stays if a block that stays shares it. It gets the name of the first such parameter.

    Args:
        shares: parameter -> stored tensor, in the full model.
        stored: the names of all stored tensors.
        kept: the indexes of the blocks that stay.

    Returns:
        The map with the new names; and for shared tensors of blocks that go, the name in the full model -> the new name of the
        tensor that takes its place: that of a block that stays, if it is stored too, or else itself.
    """
    new_name = {old: new for new, old in renumbered([*shares, *shares.values()], kept).items()}
    users: dict[str, list[str]] = {}
    for name, tensor in shares.items():
        users.setdefault(tensor, []).append(name)
    new_shares: dict[str, str] = {}
    replaced: dict[str, str] = {}
    for tensor, names in users.items():
        left = sorted((name for name in names if name in new_name), key=place_of)
        if not left:
            continue
        source = tensor
        if tensor not in new_name:
            source = next((name for name in left if name in stored), left[0])
            replaced[tensor] = new_name[source]
        new_shares |= {new_name[name]: new_name[source] for name in left if name != source}
    return new_shares, replaced


def uses_of(blocks: Iterable[Mapping[str, str]]) -> dict[str, list[tuple[int, str]]]:
    """The weights that several linears share: their names in the checkpoint -> (block, linear) of each use, in order.

    Args:
        blocks: for each block, its linears -> the names of their weights in the checkpoint.
    """
    uses: dict[str, list[tuple[int, str]]] = {}
    for index, names in enumerate(blocks):
        for name, stored in names.items():
            uses.setdefault(stored, []).append((index, name))
    return {stored: places for stored, places in uses.items() if len(places) > 1}


def as_table(shares: Mapping[str, str], num_blocks: int) -> str:
    """The map as a table of a job file; where the parameters of all blocks share one tensor, one line with ``*``."""
    left, lines = dict(shares), []
    for name, stored in shares.items():
        parts = parts_of(name)
        pattern = name if parts is None else f"{parts[0]}{EVERY}{parts[2]}"
        every = [one for one in _expanded(pattern, num_blocks) if one != stored]
        if name in left and len(every) > 1 and all(left.get(one) == stored for one in every):
            lines.append((pattern, stored))
            for one in every:
                del left[one]
    lines += left.items()
    return "\n".join(["[model.shares]", *(f'"{name}" = "{stored}"' for name, stored in lines)])


def _expanded(pattern: str, num_blocks: int) -> list[str]:
    if EVERY not in pattern:
        return []
    return [pattern.replace(EVERY, str(block)) for block in range(num_blocks)]


def _end_of(name: str, declared: Mapping[str, str]) -> str:
    """The tensor at which the map ends that begins with a name."""
    path = [name]
    while path[-1] in declared:
        path.append(declared[path[-1]])
        if path[-1] in path[:-1]:
            shown = path if len(path) <= NAMED else [*path[:NAMED], "…"]
            raise FedgroveError(
                f"model.shares: {' → '.join(shown)} is a circle, so no tensor is the one that they share",
                f"remove {path[-1]} from shares",
            )
    return path[-1]


def _instead(name: str, stored: str, headers: Headers) -> str:
    """A stored tensor that may have been meant, as part of a remedy."""
    leaf = re.sub(r"^.*\.\d+\.", "", name)
    alike = sorted((other for other in headers if other.endswith(f".{leaf}")), key=place_of)
    return f", such as {alike[0]}" if alike else ""


def _form(header: Mapping[str, Any]) -> str:
    return f"{header['dtype']} {list(header['shape'])}"
