"""What a model is worth, besides perplexity: each measure is a file. Every number that is a mean has an interval."""

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

if TYPE_CHECKING:  # a report reads intervals of a run, and shall be there at once
    from transformers import PreTrainedTokenizerBase

RESAMPLED = 1000
LEVEL = 0.95
Parts = Sequence[Sequence[float]]  # for each example the numbers that are summed: what, and how many of them


@dataclass(frozen=True)
class Measured:
    """A number and the interval that holds it with 95 % confidence; None where there is nothing to draw again.

    ``parts``: where the number is a mean, what it is the mean of: (sum, how many) of each example, for :func:`resampled`.
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
    values = [statistic(sums) for sums in (_draws(len(table), np.random.default_rng(seed)) @ table).tolist()]
    return Measured(value, *interval(values))


def resampled(texts: Sequence[Mapping[Any, Parts]], seed: int = 0) -> dict[Any, np.ndarray]:
    """Means of several models on the same examples, for the interval of what lies *between* the models.

    Examples are drawn again as by :func:`bootstrap`, but every draw is the same for all models, so that what makes an example
    hard for all of them cancels in a difference: the paired bootstrap. Every text is drawn from by itself.

    Args:
        texts: for each text the parts (sum, how many) of its examples by model; the same models and examples in all.
        seed: of the draws.

    Returns:
        By model (1000,): the mean over the texts of Σ sum / Σ how many; of −log p that is the logarithm of a perplexity.
    """
    arrays: dict[Any, np.ndarray] = {}
    rng = np.random.default_rng(seed)
    for of_text in texts:
        draws = _draws(len(next(iter(of_text.values()))), rng)
        for model, parts in of_text.items():
            sums = draws @ np.asarray(parts, dtype=np.float64)
            arrays[model] = arrays.get(model, 0.0) + sums[:, 0] / sums[:, 1] / len(texts)
    return arrays


def interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """The percentile interval of a statistic's values over the draws."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _draws(examples: int, rng: np.random.Generator) -> np.ndarray:
    """(1000, examples): how often each example is drawn."""
    return rng.multinomial(examples, np.full(examples, 1 / examples), size=RESAMPLED).astype(np.float64)


def mean(values: Sequence[float], seed: int = 0) -> Measured:
    """The mean of independent values."""
    parts = [(value, 1.0) for value in values]
    return replace(bootstrap(parts, lambda sums: sums[0] / sums[1], seed), parts=parts)


def read_pairs(
    path: Path, prompt: str, answer: str, tokenizer: PreTrainedTokenizerBase, limit: int | None = None
) -> list[tuple[str, str]]:
    """The records of a source as (prompt, answer); at most ``limit``, from its beginning."""
    fields = islice(read_fields(path, {"prompt": prompt, "answer": answer}), limit)
    pairs = [(as_text(ask, tokenizer), as_text(said, tokenizer)) for ask, said in fields]
    if not pairs:
        raise FedgroveError(f"{path}: it holds no record")
    return pairs
