"""Sums over labeled records: for each label their number and Σ x, and over all records Σ x² and Σ xᵢxⱼ, in whole numbers.

Features are rounded once, to multiples of 2⁻¹⁰ of their typical size. All that follows is integer arithmetic, so the sums of
any number of owners are those of the pooled records, bit for bit, in the open and under secure aggregation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedgrove.rounds.aggregator.fixed_point import FixedPoint
from fedgrove.rounds.request import TensorSpecs
from fedgrove.rounds.wire import WireError

BITS = 10
CODE = FixedPoint(BITS)
CLIP = 2.0**6  # features are clipped to ± this, in units of their typical size
MOST_RECORDS = 2**30  # of all clients: the largest sum is 2^(2·(6 + 10)) times as large, below 2^63
TOGETHER = 2**20  # records whose products are summed in float64, which is exact below 2^53


@dataclass(frozen=True)
class Moments:
    """Sums over records; see the top of this file. Class means and covariances are in float64.

    Attributes:
        counts: (classes,) int64, number of records.
        sums: (classes, features) int64, Σ x of each class.
        squares: (features,) int64, Σ x² of all records.
        products: (features·(features − 1)/2,) int64, Σ xᵢxⱼ for i < j, row by row; None: not summed.
    """

    counts: Tensor
    sums: Tensor
    squares: Tensor
    products: Tensor | None

    @classmethod
    def over(cls, features: Tensor, classes: Tensor, number: int, products: bool) -> Moments:
        """The sums over records.

        Args:
            features: (records, features), finite.
            classes: (records,) int64, the index of each record's label.
            number: of classes.
            products: whether to sum products, too.
        """
        whole = CODE.encode(features.double().clamp(-CLIP, CLIP))
        width = whole.shape[1]
        sums = torch.zeros(number, width, dtype=torch.int64).index_add_(0, classes, whole)
        upper = None
        if products:
            upper = torch.zeros(width * (width - 1) // 2, dtype=torch.int64)
            rows, columns = torch.triu_indices(width, width, 1)
            for part in torch.split(whole.double(), TOGETHER):
                upper += (part.T @ part)[rows, columns].long()
        return cls(torch.bincount(classes, minlength=number), sums, whole.square().sum(0), upper)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Moments:
        """From :meth:`tensors`."""
        return cls(tensors["counts"], tensors["sums"], tensors["squares"], tensors.get("products"))

    def plus(self, other: Moments) -> Moments:
        """The sums over the records of both."""
        mine, others = self.tensors(), other.tensors()
        return Moments.of({name: tensor + others[name] for name, tensor in mine.items()})

    def tensors(self) -> dict[str, Tensor]:
        """By name."""
        found = {"counts": self.counts, "sums": self.sums, "squares": self.squares}
        return found if self.products is None else found | {"products": self.products}

    def present(self) -> Moments:
        """The same without the classes that have no record."""
        some = self.counts > 0
        return Moments(self.counts[some], self.sums[some], self.squares, self.products)

    @property
    def records(self) -> int:
        """Number of records."""
        return int(self.counts.sum())

    def frequencies(self) -> Tensor:
        """(classes,): the fraction of the records that each class has."""
        return self.counts.double() / self.records

    def means(self) -> Tensor:
        """(classes, features): the mean of each class; all must have records."""
        return CODE.decode(self.sums) / self.counts.double()[:, None]

    def mean(self) -> Tensor:
        """(features,): the mean of all records."""
        return CODE.decode(self.sums.sum(0)) / self.records

    def variances(self) -> Tensor:
        """(features,): around the mean of all records; positive, as a feature that is the same for all records may be."""
        return (self._second_moments() - self.mean().square()).clamp_min(2.0 ** (-2 * BITS))

    def within_variances(self) -> Tensor:
        """(features,): around the mean of each record's class; not negative."""
        return (self._second_moments() - (self.frequencies()[:, None] * self.means().square()).sum(0)).clamp_min(0.0)

    def covariance(self) -> Tensor:
        """(features, features): around the mean of all records."""
        return self._gram() - torch.outer(self.mean(), self.mean())

    def within(self) -> Tensor:
        """(features, features): around the mean of each record's class."""
        means = self.means()
        return self._gram() - means.T @ (self.frequencies()[:, None] * means)

    def _second_moments(self) -> Tensor:
        return self.squares.double() * 2.0 ** (-2 * BITS) / self.records

    def _gram(self) -> Tensor:
        assert self.products is not None
        width = len(self.squares)
        rows, columns = torch.triu_indices(width, width, 1)
        gram = torch.diag(self.squares.double())
        gram[rows, columns] = gram[columns, rows] = self.products.double()
        return gram * 2.0 ** (-2 * BITS) / self.records


def specs(number: int, width: int, products: bool) -> TensorSpecs:
    """Shape and dtype of each tensor, by name."""
    shapes = {"counts": (number,), "sums": (number, width), "squares": (width,)}
    if products:
        shapes["products"] = (width * (width - 1) // 2,)
    return {name: (torch.Size(shape), torch.int64) for name, shape in shapes.items()}


def check(moments: Moments, most: int) -> None:
    """Refuses sums that no records have.

    Args:
        most: the most records that are allowed.

    Raises:
        WireError: a number of records is negative or too large, a sum is larger than clipped features allow, or a product
            than the squares (Cauchy and Schwarz).
    """
    counts, squares = moments.counts, moments.squares.double()
    if bool((counts < 0).any()) or int(counts.sum()) > most or bool((counts > most).any()):
        raise WireError("its numbers of records are out of range")
    largest = CLIP * 2.0**BITS
    if bool((moments.sums.double().abs() > counts.double()[:, None] * largest).any()):
        raise WireError("its sums of features are larger than its records allow")
    if bool((squares < 0).any()) or bool((squares > moments.records * largest**2).any()):
        raise WireError("its squares of features are larger than its records allow")
    if moments.products is not None:
        rows, columns = torch.triu_indices(len(squares), len(squares), 1)
        roots = squares.sqrt() * (1 + 1e-9)
        if bool((moments.products.double().abs() > roots[rows] * roots[columns] + 1).any()):
            raise WireError("its products of features are larger than its squares allow")
