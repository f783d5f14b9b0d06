"""What a model is worth, besides perplexity: each measure is a file. Every number that is a mean has an interval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from fedgrove.data import as_text, read_fields
from fedgrove.errors import FedgroveError

RESAMPLED = 1000
LEVEL = 0.95


@dataclass(frozen=True)
class Measured:
    """A number and the interval that holds it with 95 % confidence; None where there is nothing to draw again."""

    value: float
    low: float | None = None
    high: float | None = None

    def plain(self, name: str) -> dict[str, float]:
        """As named numbers: ``name``, ``name.low``, ``name.high``."""
        named = {name: self.value}
        if self.low is not None and self.high is not None:
            named |= {f"{name}.low": self.low, f"{name}.high": self.high}
        return named


def bootstrap(parts: Sequence[Sequence[float]], statistic: Callable[[Sequence[float]], float], seed: int = 0) -> Measured:
    """A statistic of a sum over examples, with its percentile bootstrap interval (Efron 1979).

    Examples are drawn again, as many as there are, with replacement. They must be independent: consecutive windows of one
    long text are not quite, so that the interval of its perplexity is too narrow; and an interval says nothing of texts
    of another kind.

    Args:
        parts: for each example the numbers that are summed.
        statistic: is given the sums.
        seed: of the draw; the same one gives the same interval.
    """
    table = np.asarray(parts, dtype=np.float64)
    value = float(statistic([sum(column) for column in zip(*parts, strict=True)]))
    if len(table) < 2:
        return Measured(value)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(table), np.full(len(table), 1 / len(table)), size=RESAMPLED).astype(np.float64) @ table
    values = [statistic(sums) for sums in drawn.tolist()]
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Measured(value, float(low), float(high))


def mean(values: Sequence[float], seed: int = 0) -> Measured:
    """The mean of independent values."""
    return bootstrap([(value, 1.0) for value in values], lambda sums: sums[0] / sums[1], seed)


def read_pairs(
    path: Path, prompt: str, answer: str, tokenizer: PreTrainedTokenizerBase, limit: int | None = None
) -> list[tuple[str, str]]:
    """The records of a source as (prompt, answer); at most ``limit``, from its beginning."""
    fields = islice(read_fields(path, {"prompt": prompt, "answer": answer}), limit)
    pairs = [(as_text(ask, tokenizer), as_text(said, tokenizer)) for ask, said in fields]
    if not pairs:
        raise FedgroveError(f"{path}: it holds no record")
    return pairs
