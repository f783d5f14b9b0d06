"""What requests after the last round have in common: they bring the change that all clients share."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from fedgrove.client.local_client import LocalClient
from fedgrove.job.stage_config import Agreed, StageConfig
from fedgrove.job.units import Line, Linears, Name
from fedgrove.rounds.request import Tensors
from fedgrove.stages.tune.client_model import TuneRequest
from fedgrove.stages.tune.config import Config
from fedgrove.stages.tune.parametrizations import Trainable, trainable_of
from fedgrove.stages.tune.received import REST, by_linear, check_linears, check_parts


class AfterRounds(TuneRequest):
    """A request after the last round. Tensors sent with it: ``rest/<linear>/<part>``, the shared change.

    Attributes:
        parametrization: of the changes.
        masked: the linears whose zeros stay zero.
        base, title: for the card of what the client writes for itself.
    """

    parametrization: Name
    masked: Linears
    base: Line
    title: Line

    @property
    def method(self) -> Trainable:
        """The module of the parametrization."""
        return trainable_of(self.parametrization)

    def shared_change(
        self, tensors: Tensors, shapes: Mapping[str, tuple[int, int]], dtypes: Collection[torch.dtype], client: LocalClient
    ) -> dict[str, Tensors]:
        """The parts of the shared change, by linear, sorted.

        Args:
            shapes: (out, in) of every linear of the client's model.
            dtypes: that the parts may have.

        Raises:
            FedgroveError: a linear is unknown, or a tensor is no part of a change of it.
        """
        check_linears(self.masked, shapes, client)
        largest = {REST: {name: 2 * min(shape) for name, shape in shapes.items()}}
        check_parts(tensors, self.method, shapes, largest, dtypes, False, client)
        return dict(sorted(by_linear(tensors, REST).items()))

    @classmethod
    def rounds_in(cls, config: StageConfig) -> range:
        """After the last round."""
        return range(config.number_of_rounds(), config.number_of_rounds() + 1)

    def beyond(self, job: Agreed) -> str | None:
        config = job.stages[self.stage]
        assert isinstance(config, Config)
        return "parametrization" if self.parametrization != config.parametrization else super().beyond(job)
