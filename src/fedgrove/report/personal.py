"""What adapters or models of one's own are worth to the owners of a stage with ``personal``: from the metrics."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from fedgrove.report.owners import over_owners
from fedgrove.report.sheet import Column, Table
from fedgrove.report.summary import Stage, Summary
from fedgrove.report.words import listed, plural

Z = 1.96  # standard errors on each side of a 95 % interval


def without_comparison(stage: Stage, compared: Collection[str]) -> list[str]:
    """A line on the clients that the stage's key ``personal`` did nothing for; no line if there are none.

    Args:
        compared: the clients that compared results on text that they held out.
    """
    rest = [client for client in stage.clients if client not in compared]
    share = stage.config.get("personal", 0.0)
    if not share or not rest:
        return []
    return [f"No comparison by {listed(rest)}: too little text to hold out {share:g} of it (key personal), or no response."]


@dataclass(frozen=True)
class Words:
    """What a stage calls the result that a client may keep for itself.

    Attributes:
        thing, one: such as "adapter" and "an adapter".
        own: which of the client's own ones is compared: "own best".
        alone: how the one is made that a client would have without the others, as the beginning of a sentence.
    """

    thing: str
    one: str
    own: str
    alone: str


@dataclass(frozen=True)
class Personal:
    """What results of one's own are worth, on windows that no choice has seen.

    Attributes:
        stage: its number.
        words: what the result is called.
        losses: by client, the loss with the shared result, with its own one and, if it was measured, with the one that it
            would have alone.
        errors: by client, the standard error of own − shared; None: unknown.
        keeps_own: the clients that keep their own result.
        tokens: by client, of its text.
    """

    stage: int
    words: Words
    losses: Mapping[str, tuple[float, float, float | None]]
    errors: Mapping[str, float | None]
    keeps_own: frozenset[str]
    tokens: Mapping[str, int]

    @classmethod
    def of(cls, summary: Summary, stage: Stage, words: Words, tokens: Mapping[str, int]) -> Personal | None:
        """From the metrics; None if no client compared two results.

        Args:
            words: what the result is called.
            tokens: by client, of its text.
        """

        def measured(client: str, name: str) -> float | None:
            return summary.rounds_measured.get((stage.number, None, client, name))

        losses = {}
        for client in stage.clients:
            shared, own = measured(client, "personal/shared"), measured(client, "personal/own")
            if shared is not None and own is not None:
                losses[client] = (shared, own, measured(client, "personal/alone"))
        if not losses:
            return None
        errors = {client: measured(client, "personal/error") for client in losses}
        keeps_own = frozenset(client for client in losses if measured(client, "personal/keeps"))
        return cls(stage.number, words, losses, errors, keeps_own, {client: tokens[client] for client in losses})

    def lines(self) -> list[str]:
        """Which clients keep their own result; both averages and the worst owner; the mean gain."""
        number, every = len(self.keeps_own), len(self.losses)
        keep = listed(sorted(self.keeps_own)) if self.keeps_own else "None"
        says = [f"{keep} of {plural(every, 'owner')} keep{'' if number > 1 else 's'} {self.words.one} of its own."]
        if number > 1:
            says = [f"{number} of {every} owners keep {self.words.thing}s of their own: {keep}."]
        kept = {client: self._kept(client) for client in self.losses}
        values = {"shared": {client: of[0] for client, of in self.losses.items()}, "kept": kept}
        alone = {client: of[2] for client, of in self.losses.items() if of[2] is not None}
        show = "{:.3f}".format
        says.append(
            f"Loss on text that no choice has seen, with the {self.words.thing} that each keeps: "
            f"{over_owners(values['kept'], self.tokens).says(show)}."
        )
        says.append(f"With the shared {self.words.thing}: {over_owners(values['shared'], self.tokens).says(show)}.")
        if len(alone) == every:
            says.append(f"{self.words.alone}: {over_owners(alone, self.tokens).says(show)}.")
        gains = {client: self.losses[client][0] - kept[client] for client in kept}
        mean, error = sum(gains.values()) / every, self._mean_error()
        around = f" ({mean - Z * error:+.3f} to {mean + Z * error:+.3f})" if error is not None else ""
        says.append(f"Mean gain over owners: {mean:+.3f}{around} nats a token.".replace("-", "−"))
        return says

    def table(self) -> Table:
        """Each client's losses, which result it keeps, and what that gains."""
        rows: list[list[Any]] = []
        for client, (shared, own, alone) in self.losses.items():
            gain, error = shared - self._kept(client), self.errors[client]
            error = error if client in self.keeps_own else 0.0
            rows.append([client, shared, own, alone, "its own" if client in self.keeps_own else "the shared one", gain])
            rows[-1].append(None if error is None else Z * error)
        number = "{:.3f}".format
        columns = [Column("client"), Column("loss, shared", number), Column(f"loss, {self.words.own}", number)]
        columns += [Column("loss, alone", number), Column("keeps"), Column("gain", "{:+.3f}".format), Column("±", number)]
        compared = f"The shared {self.words.thing} and each client's {self.words.own} one"
        caption = f"{compared}, on held-out text that no choice has seen"
        return Table(f"stage-{self.stage}-personal", caption, columns, rows)

    def _kept(self, client: str) -> float:
        shared, own, _ = self.losses[client]
        return own if client in self.keeps_own else shared

    def _mean_error(self) -> float | None:
        """The standard error of the mean gain; those who keep the shared one gain exactly nothing."""
        errors = [self.errors[client] for client in self.keeps_own]
        known = [error for error in errors if error is not None]
        return math.sqrt(sum(error**2 for error in known)) / len(self.losses) if len(known) == len(errors) else None
