"""Tied parameters, as transformers ties them when it loads a checkpoint.

Architectures name pairs of parameters that share one value (often the head and the embedding), and config.json switches them
on. Which of them are really tied depends on what is stored: either one of a pair may be, and two that are both stored with
different values are not tied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping


def resolve_ties(
    pairs: Mapping[str, str], stored: Callable[[str], bool], same: Callable[[str, str], bool]
) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Which parameters take their value from which others.

    Args:
        pairs: as the architecture names them: parameter -> the one that it is tied to.
        stored: whether the checkpoint holds a parameter.
        same: whether two stored parameters are equal.

    Returns:
        Parameter -> the stored parameter whose value it has; and the pairs that are stored with different values, so not tied.
    """
    ties: dict[str, str] = {}
    untied: list[tuple[str, str]] = []
    for target, source in pairs.items():
        if stored(source) and stored(target):
            if same(source, target):
                ties[target] = source
            else:
                untied.append((target, source))
        elif stored(source):
            ties[target] = source
        elif source in ties:
            if not stored(target):
                ties[target] = ties[source]
        else:
            siblings = [other for other, theirs in pairs.items() if theirs == source and stored(other)]
            if siblings:
                ties[source] = siblings[0]
                if target != siblings[0]:
                    ties[target] = siblings[0]
    return ties, untied
