"""The features of a client's windows, and what requests about a gate have in common."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fedgrove.client.local_client import LocalClient
from fedgrove.client.windows import made_once
from fedgrove.job.stage_config import Agreed
from fedgrove.job.units import Length, Name
from fedgrove.models.blocks import Decoder
from fedgrove.models.features import Features, pooled_states, projection, width
from fedgrove.models.tensor_files import save_tensors
from fedgrove.rounds.request import Tensors
from fedgrove.stages.tune.client_model import TuneRequest
from fedgrove.stages.tune.config import Config
from fedgrove.stages.tune.gates import FeatureGate, feature_gate_of
from fedgrove.stages.tune.pool.config import Blocks, Members, Size, Starts
from fedgrove.stages.tune.pool.scale import PROJECTED, scaled, unit

CENTER, SCALE = "center", "scale"  # tensors of a request, see Features
MEAN, ALONG = "mean", "along"  # see pool.scale
DIRECTION = "direction"  # of an owner
STATE = "state/"  # prefix of the tensors of a gate's state
HELD_OUT = 5  # every fifth window is not fitted: by these a new text is judged


def layers_of(blocks: Sequence[float], number: int) -> tuple[int, ...]:
    """The layers of a model of so many blocks, as :class:`~fedgrove.models.features.Features` counts them, ascending."""
    return tuple(sorted({round(depth * number) for depth in blocks}))


def first_tokens(ids: Tensor, prefix: int) -> list[Tensor]:
    """What a gate sees of windows (windows, length)."""
    return list(ids[:, :prefix])


def is_held_out(number: int) -> Tensor:
    """Which of so many windows are not fitted: (number,) bool."""
    return torch.arange(number) % HELD_OUT == HELD_OUT - 1


def numbers_of(states: Tensor, tensors: Tensors, layers: tuple[int, ...], seed: str) -> Tensor:
    """Pooled hidden states (windows, states) -> (windows, at most ``PROJECTED``) float64."""
    matrix = projection(states.shape[1], PROJECTED, seed)
    return Features(layers, "mean", tensors[CENTER], tensors[SCALE], matrix).of(states)


def features_of(numbers: Tensor, tensors: Tensors, of_clients: bool) -> Tensor:
    """What a gate looks at of windows: (windows, numbers) -> (windows, size) float64.

    Args:
        tensors: ``mean`` and ``along``.
        of_clients: whether it is a gate of owners.
    """
    if of_clients:
        return unit(numbers, tensors[ALONG]) - tensors[MEAN][:1]
    return scaled(numbers, tensors[MEAN], tensors[ALONG])


def keep_directions(client: LocalClient, stage: int, directions: Tensor) -> None:
    """Stores an owner's direction, (1 or 3, size), on its own disk: with noise it is never computed again."""
    save_tensors({DIRECTION: directions}, _directions_file(client, stage))


def kept_directions(client: LocalClient, stage: int, shape: tuple[int, int]) -> Tensor:
    """What :func:`keep_directions` stored.

    Raises:
        FedgroveError: the client has stored none, or of another shape.
    """
    file = _directions_file(client, stage)
    stored: Tensor | None = load_file(file)[DIRECTION] if file.is_file() else None
    if stored is None or stored.shape != shape:
        raise client.error("its working files are gone; continue the run with --resume")
    return stored


def _directions_file(client: LocalClient, stage: int) -> Path:
    return client.folder / f"direction-{stage}.safetensors"


def numbers_in(decoder: Decoder, blocks: Sequence[float]) -> int:
    """How many numbers there are of a window before a gate takes directions of them."""
    return min(PROJECTED, width(decoder, layers_of(blocks, len(decoder))))


class GateRequest(TuneRequest):
    """A request about the features of a client's windows.

    Tensors of the request: ``center`` and ``scale``, (hidden states,) float32.

    Attributes:
        gate: its name.
        blocks, prefix: as in the job.
    """

    gate: Name
    blocks: Blocks
    prefix: Length

    @property
    def method(self) -> FeatureGate:
        """The module of the gate."""
        return feature_gate_of(self.gate)

    def numbers(self, tensors: Tensors, client: LocalClient, device: str) -> Tensor:
        """Features of the client's windows before they are scaled, (windows, at most ``PROJECTED``) float64.

        Raises:
            FedgroveError: the request's tensors do not fit the client's model, or hidden states are not finite.
        """
        decoder, ids, _ = self.model_and_windows(client, device)
        layers = layers_of(self.blocks, len(decoder))
        number = width(decoder, layers)
        for name in (CENTER, SCALE):
            _need(tensors, name, torch.Size([number]), torch.float32, client)
        if bool((tensors[SCALE] <= 0).any()):
            raise client.error("the scale of its features is not positive; refused")
        settings: list[Any] = [client.text, client.prompt, client.answer, self.length, self.prefix, layers, device]
        settings += [self.stage, self.base_digest, self.kept_blocks, self.kept_experts]
        stored = made_once(
            client, "gate", settings, lambda: {"states": pooled_states(decoder, first_tokens(ids, self.prefix), layers, "mean")}
        )
        if not bool(torch.isfinite(stored["states"]).all()):
            raise client.error("the hidden states of its windows are not finite", 'try model.dtype = "float32"')
        return numbers_of(stored["states"], tensors, layers, self.seed)

    def beyond(self, job: Agreed) -> str | None:
        config = job.stages[self.stage]
        assert isinstance(config, Config)
        if config.pool is None:
            return "pool"
        for key in ("gate", "blocks", "prefix"):
            if getattr(self, key) != getattr(config.pool, key):
                return f"pool.{key}"
        return super().beyond(job)


class FittedRequest(GateRequest):
    """A request that brings a gate's state: ``state/NAME``, and the ``mean`` and ``along`` (numbers, size).

    ``mean`` is that of all windows (numbers,), or of a gate of owners that of all owners (1 or 3, size): of their text, and of
    both halves of it.

    Attributes:
        members, starts, size: of the state.
    """

    members: Members
    starts: Starts
    size: Size

    def features(self, tensors: Tensors, client: LocalClient, device: str) -> Tensor:
        """What the gate looks at of the client's windows, (windows, size).

        Raises:
            FedgroveError: the request's tensors do not fit.
        """
        numbers = self.numbers(tensors, client, device)
        of_clients = self.method.OF_CLIENTS
        if of_clients:
            self._check_mean(tensors, client)
        else:
            _need(tensors, MEAN, torch.Size([numbers.shape[1]]), torch.float64, client)
        _need(tensors, ALONG, torch.Size([numbers.shape[1], self.size]), torch.float64, client)
        return features_of(numbers, tensors, of_clients)

    def fitted(self, tensors: Tensors, client: LocalClient, device: str) -> Tensor:
        """What the gate is fitted to and deals by: as :meth:`features`, or of a gate of owners its own rows, (1 or 3, size).

        Raises:
            FedgroveError: the request's tensors do not fit, or the owner has no direction.
        """
        if not self.method.OF_CLIENTS:
            return self.features(tensors, client, device)
        self.model_and_windows(client, device)  # refuses a request that does not fit them
        rows = self._check_mean(tensors, client)
        return kept_directions(client, self.stage, (rows, self.size)) - tensors[MEAN]

    def _check_mean(self, tensors: Tensors, client: LocalClient) -> int:
        """How many rows the mean of a gate of owners has."""
        rows = 3 if len(tensors.get(MEAN, ())) == 3 else 1
        _need(tensors, MEAN, torch.Size([rows, self.size]), torch.float64, client)
        return rows

    def state(self, tensors: Tensors, client: LocalClient) -> Tensors:
        """The gate's state.

        Raises:
            FedgroveError: it does not fit.
        """
        specs = self.method.specs(self.members, self.starts, self.size)
        for name, (shape, dtype) in specs.items():
            _need(tensors, STATE + name, shape, dtype, client)
        state = {name: tensors[STATE + name] for name in specs}
        if not self.method.is_valid(state):
            raise client.error("the state of a gate that came is none that a fit has; refused")
        return state

    def beyond(self, job: Agreed) -> str | None:
        config = job.stages[self.stage]
        assert isinstance(config, Config)
        pool = config.pool
        if pool is None:
            return "pool"
        if self.members > pool.most:
            return "pool.members"
        return "pool.size" if self.size > pool.size else super().beyond(job)


def _need(tensors: Tensors, name: str, shape: torch.Size, dtype: torch.dtype, client: LocalClient) -> None:
    """Refuses a tensor that is missing or has another shape or dtype."""
    tensor = tensors.get(name)
    if tensor is None or tensor.shape != shape or tensor.dtype != dtype:
        raise client.error(f"{name} of a gate that came is missing, or has another shape or dtype; refused")
