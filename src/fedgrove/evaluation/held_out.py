"""What a client that keeps a result of its own says of it: losses on text that it held out for itself.

A client holds out windows and divides them into two halves. By the first half it chooses; on the second, which no choice
has seen, it measures what it reports: the lowest of several losses is lower than the loss on new text.
"""

from __future__ import annotations

import math

from fedgrove.job.units import NonNegative
from fedgrove.rounds.request import Reply
from fedgrove.rounds.wire import WireError
from fedgrove.runfolder import RunFolder

Parts = list[tuple[float, int]]  # for each window: −Σ log p in nats, number of predicted tokens


class Losses(Reply):
    """Mean losses per token on the half of the client's held-out windows that it does not choose by.

    Attributes:
        shared, own: of the shared result and of the client's own; None if it has no own one, or holds out no text.
        error: the standard error of own − shared; None for a single window.
        keeps_own: whether it keeps its own one, by the other half.
    """

    shared: NonNegative | None = None
    own: NonNegative | None = None
    error: NonNegative | None = None
    keeps_own: bool = False

    def check(self) -> None:
        """Refuses a reply that no honest client sends.

        Raises:
            WireError: it has one of the losses only, or says something of losses that it does not have.
        """
        if (self.shared is None) != (self.own is None) or (self.own is None and (self.error or self.keeps_own)):
            raise WireError("its losses are of one of the two results only")


def log_once(run: RunFolder, stage: int, client: str, losses: Losses) -> None:
    """Logs what a client says, each number as ``personal/NAME``, and no number again that was logged before a run was killed.

    ``personal/shared`` comes last, so that it marks a client as done; see :func:`clients_done`.

    Args:
        losses: not without both losses.
    """
    known = {line["name"] for line in run.metrics() if (line["stage"], line["client"]) == (stage, client)}
    said = losses.model_dump(exclude_none=True)
    said["keeps"] = float(said.pop("keeps_own"))
    for name in sorted(said, key=lambda name: (name == "shared", name)):
        if f"personal/{name}" not in known:
            run.log(stage, None, client, f"personal/{name}", said[name])


def clients_done(run: RunFolder, stage: int) -> set[str]:
    """The clients of which everything is logged."""
    return {line["client"] for line in run.metrics() if (line["stage"], line["name"]) == (stage, "personal/shared")}


def mean_of(parts: Parts) -> float:
    """Σ loss / Σ tokens."""
    return sum(loss for loss, _ in parts) / sum(count for _, count in parts)


def error_of_difference(one: Parts, other: Parts) -> float | None:
    """The standard error of the difference of two models' :func:`mean_of` on the same windows; None for a single window.

    Of a ratio of sums over independent windows; consecutive windows are not quite independent, so it is rather too small.
    """
    tokens, number = sum(count for _, count in one), len(one)
    if number < 2:
        return None
    mean = mean_of(one) - mean_of(other)
    spread = sum((a - b - mean * count) ** 2 for (a, count), (b, _) in zip(one, other, strict=True))
    return math.sqrt(spread * number / (number - 1)) / tokens
