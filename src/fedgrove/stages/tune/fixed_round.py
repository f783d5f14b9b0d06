"""The server's half of a round of tuning in which clients send fixed-point numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedgrove.rounds.aggregator.integers import IntegerSums
from fedgrove.rounds.request import Tensors
from fedgrove.stages.tune import fixed_point
from fedgrove.stages.tune.exchanges.train import Train
from fedgrove.stages.tune.routed import REACHED, WEIGHTS, Counted, ExpertRules, check_fixed, counted_in


class FixedRound(IntegerSums):
    """The server's half if clients send fixed-point numbers: the mean of their differences.

    Args:
        requests: by client.
        experts: how experts are weighed; None: the model has none, or there is noise.
    """

    def __init__(self, requests: Mapping[str, Train], experts: ExpertRules | None):
        places = {} if experts is None else experts.places
        super().__init__(lambda sums, replies: check_fixed(*_split(sums), places, 1.0, len(replies)))
        self._requests, self._places, self._min_group = requests, places, experts.min_group if experts else 1

    def means(self, clients: Sequence[str]) -> dict[str, Tensor]:
        """The weighted mean of the differences, ``<linear>/<part>`` -> float64, and of ``loss`` if it was sent.

        Each column is averaged over the clients that train it, and an expert by its tokens; experts that too few clients
        trained are not there. With noise, the sum is used as it is, with weight 1.

        Args:
            clients: the clients in the sum.
        """
        first = next(iter(self._requests.values()))
        assert first.fixed is not None
        noise, (sums, counted) = first.fixed.noise, _split(self.sums)
        if noise:
            sums = noise.mechanism(1 / len(self._requests)).add_at_server(sums)
        means = {}
        for name, total in sums.items():
            linear = name.rpartition("/")[0]
            place = self._places.get(linear)
            if noise:
                means[name] = fixed_point.mean(total, 1.0)
            elif counted is None or place is None:
                means[name] = fixed_point.mean(total, self._weight(linear, total, clients))
            elif int(counted.reached[place]) >= self._min_group:
                means[name] = fixed_point.mean(total, counted.of(place))
        return means

    def _weight(self, linear: str, total: Tensor, clients: Sequence[str]) -> Tensor | float:
        weights = {client: self._requests[client].weight for client in clients}
        if not linear or not next(iter(self._requests.values())).method.RANKED:
            return sum(weights.values())
        columns = torch.zeros(total.shape[1], dtype=torch.float64)
        for client, weight in weights.items():
            columns[: self._requests[client].ranks.get(linear, 0)] += weight
        return columns


def _split(sums: Tensors) -> tuple[Tensors, Counted | None]:
    """The changes in a sum, and the weights of experts if there are any."""
    return {name: tensor for name, tensor in sums.items() if name not in (WEIGHTS, REACHED)}, counted_in(sums, "")
