"""What a configuration of a client is worth in a round: the expected decrease of the loss, and what was learnt from the last.

In a round a client takes s steps of b windows, at a rank for every linear m. The loss falls in proportion to

    pace(s, b) · Σ_m importance_m · kept_m(rank_m),    pace(s, b) = s/(1 + s/DRIFT) · 1/(1 + noise/b).

- 1/(1 + noise/b): the gain of the best step along a gradient of b windows, as a part of that along the exact one; noise is
  tr Σ/|G|², in windows (McCandlish et al., *An Empirical Model of Large-Batch Training*, arXiv 1812.06162, Eq. 2.7). Theirs is
  for SGD with the best step size; that AdamW with a fixed one behaves alike is our assumption.
- s/(1 + s/DRIFT): each further step before the next exchange moves more to what only the client's own text has. Ours.
- kept_m(r): the fraction of the linear's squared gradient that rank r can hold (:mod:`fedgrove.stages.tune.importance`). Ours.

Do not read the number as a loss: only its ratio between configurations means something. What it is worth in nats is learnt
from the rounds (:class:`Progress`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

DRIFT = 512.0  # steps in one round after which a further one is worth a quarter
SETTLING = 0.5  # the power of the learning rate to which a round gains: at a lower rate the weights also scatter less
RECENT = 3  # rounds from which the next one's gain is predicted
OFF = 2.0  # a factor: the plan is made anew after a round that gained so many times more or less than predicted
NOISE = 16.0  # windows, before it is measured
MOST_NOISE = 4096.0  # windows: what a few windows cannot tell from no gradient at all
PREDICTED, GAINED = "gain/predicted", "gain/measured"  # metrics of a round, in nats a token


@dataclass(frozen=True)
class Gradients:
    """What the clients' gradients say, as the weighted mean over clients.

    Attributes:
        coherence: |G|²/(|G|² + tr Σ) of single windows; None: not measured.
        kept: by linear, the fraction of its squared gradient that each of the job's ranks holds; empty: not measured.
    """

    coherence: float | None = None
    kept: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def noise(self) -> float:
        """tr Σ/|G|², the noise scale in windows."""
        if self.coherence is None:
            return NOISE
        return min(MOST_NOISE, 1 / self.coherence - 1) if self.coherence > 0 else MOST_NOISE

    def worth(self, importance: Mapping[str, float], ranks: Sequence[int]) -> dict[str, tuple[float, ...]]:
        """By linear, importance · kept at each of these ranks; concave in the rank. All at the largest rank are worth 1.

        Args:
            importance: of each linear, non-negative, adding up to 1.
            ranks: those of ``kept``, ascending.
        """
        guess = tuple(gain(rank, ranks[-1]) for rank in ranks)
        return {name: tuple(value * kept for kept in self.kept.get(name, guess)) for name, value in importance.items()}


def gain(rank: float, largest: int) -> float:
    """The value of a rank before it is measured, from 0 to 1; concave, because each additional rank contributes less."""
    return math.log2(1 + rank) / math.log2(1 + largest)


def pace(steps: float, batch: float, noise: float) -> float:
    """What so many steps of so many windows gain, in steps along the exact gradient; see the module."""
    return steps / (1 + steps / DRIFT) / (1 + noise / batch)


@dataclass
class Progress:
    """What rounds gained, in nats a token, and so what the next one should.

    The loss falls with the logarithm of the progress so far: a round from c to c + p gains A·ln((c + p)/c), and A is what the
    last ``RECENT`` rounds gained. At a lower learning rate a round's progress is smaller, by the rate to the power of
    ``SETTLING``. Ours: the simplest curve that is steep first and flat then, and a power that was chosen on validation text.
    Nothing is predicted of the first two rounds, since the loss before the first is not known.

    Attributes:
        done: the sum of all rounds' progress.
        rounds: of the latest rounds, progress before, after, and the decrease of the loss.
        loss: after the last round; None before the first.
        coming: the progress of the round that is under way; None: none is.
        predicted: what it should gain; None before two rounds have been measured.
    """

    done: float = 0.0
    rounds: list[tuple[float, float, float]] = field(default_factory=list)
    loss: float | None = None
    coming: float | None = None
    predicted: float | None = None

    def begin(self, progress: float, rate: float = 1.0) -> None:
        """Predicts what a round will gain.

        Args:
            progress: at the first learning rate.
            rate: the learning rate of the round, as a part of the first.
        """
        progress *= rate**SETTLING
        self.coming, self.predicted = progress, self.predict(progress)

    def predict(self, progress: float) -> float | None:
        """By how much a round of this progress should lower the loss; None before two rounds have been measured."""
        logs = sum(math.log(after / before) for before, after, _ in self.rounds)
        if not logs:
            return None
        return sum(gained for _, _, gained in self.rounds) / logs * math.log((self.done + progress) / self.done)

    def add(self, loss: float) -> float | None:
        """Ends the round: the loss is now this. Returns what the round gained, None for the first."""
        assert self.coming is not None
        gained, after = None if self.loss is None else self.loss - loss, self.done + self.coming
        if gained is not None:
            self.rounds = [*self.rounds, (self.done, after, gained)][-RECENT:]
        self.done, self.loss, self.coming, self.predicted = after, loss, None, None
        return gained


def is_off(predicted: float, gained: float) -> bool:
    """Whether a prediction was off by more than the factor ``OFF``, or a round gained nothing."""
    return gained <= 0 or not predicted / OFF <= gained <= predicted * OFF
