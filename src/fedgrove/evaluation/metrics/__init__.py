"""Metrics besides perplexity, one file for each. Every number that is a mean has a confidence interval."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedgrove.data.chat import as_text
from fedgrove.data.sources import read_fields
from fedgrove.errors import FedgroveError

if TYPE_CHECKING:  # importing transformers takes seconds, and reports only need the intervals
    from transformers import PreTrainedTokenizerBase

RESAMPLES = 1000
LEVEL = 0.95
Parts = Sequence[Sequence[float]]  # per example, the numbers that are summed, such as (sum, count)


@dataclass(frozen=True)
class Measured:
    """A number with its 95 % confidence interval.

    Attributes:
        low, high: the interval; None if there is nothing to resample.
        parts: if the number is a mean, (sum, count) of each example, for :func:`resampled`.
    """

    value: float
    low: float | None = None
    high: float | None = None
    parts: Parts = field(default=(), repr=False, compare=False, kw_only=True)

    def plain(self, name: str) -> dict[str, float]:
        """As named numbers: ``name``, ``name.low``, ``name.high``."""
        named = {name: self.value}
        if self.low is not None and self.high is not None:
            named |= {f"{name}.low": self.low, f"{name}.high": self.high}
        return named


def bootstrap(parts: Parts, statistic: Callable[[Sequence[float]], float], seed: int = 0) -> Measured:
    """A statistic of a sum over examples, with its percentile bootstrap interval (Efron 1979).

    Examples are resampled with replacement, as many as there are. They must be independent. Consecutive windows of
    one long text are not fully independent, so the interval of its perplexity is too narrow. An interval does not apply
    to other kinds of text.

    Args:
        parts: for each example the numbers that are summed.
        statistic: computes the statistic from the sums.
        seed: of the resampling; the same seed gives the same interval.
    """
    table = np.asarray(parts, dtype=np.float64)
    value = float(statistic([sum(column) for column in zip(*parts, strict=True)]))
    if len(table) < 2:
        return Measured(value)
    values = [statistic(sums) for sums in (draws(len(table), np.random.default_rng(seed)) @ table).tolist()]
    return Measured(value, *interval(values))


def resampled(texts: Sequence[Mapping[Any, Parts]], seed: int = 0) -> dict[Any, np.ndarray]:
    """Resampled means of several models on the same examples, for the interval of the *difference* between models.

    Examples are resampled as in :func:`bootstrap`, but with the same resamples for all models, so that the difficulty of an
    example cancels in the difference: the paired bootstrap. Each text is resampled separately.

    Args:
        texts: for each text, (sum, count) of each example by model; models and examples are the same throughout.
        seed: of the resampling.

    Returns:
        By model (1000,): the mean over the texts of Σ sum / Σ count; for −log p this is the logarithm of a perplexity.
    """
    means: dict[Any, np.ndarray] = {}
    rng = np.random.default_rng(seed)
    for parts_by_model in texts:
        drawn = draws(len(next(iter(parts_by_model.values()))), rng)
        for model, parts in parts_by_model.items():
            sums = drawn @ np.asarray(parts, dtype=np.float64)
            means[model] = means.get(model, 0.0) + sums[:, 0] / sums[:, 1] / len(texts)
    return means


def interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """The percentile interval of a statistic's values over the resamples."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def draws(examples: int, rng: np.random.Generator) -> np.ndarray:
    """How often each example is in each resample, (1000, examples)."""
    return rng.multinomial(examples, np.full(examples, 1 / examples), size=RESAMPLES).astype(np.float64)


def mean(values: Sequence[float], seed: int = 0) -> Measured:
    """The mean of independent values, with its interval."""
    parts = [(value, 1.0) for value in values]
    return replace(bootstrap(parts, lambda sums: sums[0] / sums[1], seed), parts=parts)


def read_pairs(
    path: Path, prompt: str, answer: str, tokenizer: PreTrainedTokenizerBase, limit: int | None = None
) -> list[tuple[str, str]]:
    """The first ``limit`` records of a source, or all of them, as (prompt, answer).

    Raises:
        FedgroveError: the source cannot be read, or has no records.
    """
    fields = islice(read_fields(path, {"prompt": prompt, "answer": answer}), limit)
    pairs = [(as_text(question, tokenizer), as_text(reply, tokenizer)) for question, reply in fields]
    if not pairs:
        raise FedgroveError(f"{path}: it has no records")
    return pairs
