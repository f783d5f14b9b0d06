"""Personal adapters: a client keeps the adapter with the lowest loss on its held-out text. Only two losses are sent."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fedgrove.data.windows import IGNORED
from fedgrove.models.tensor_files import save_tensors
from fedgrove.stages.tune.changes import Change
from fedgrove.stages.tune.parametrizations import Parametrization
from fedgrove.stages.tune.training import loss_sum, pieces

MOST = 32  # windows held out, at most: measuring their loss in every round must not cost more than training
Windows = tuple[Tensor, Tensor]


def hold_out(ids: Tensor, labels: Tensor, share: float) -> tuple[Windows, Windows | None]:
    """Splits a client's windows into those to train on and those to choose an adapter by, spread evenly over its text.

    Args:
        ids, labels: (windows, length).
        share: the fraction of the windows to hold out, at most ``MOST`` windows; 0: none.

    Returns:
        Both sets, as (ids, labels). The second is None, and the first is all windows, if either set would be empty or
        the held-out labels are all ``IGNORED``.
    """
    number = min(MOST, round(share * len(ids)))
    if not 0 < number < len(ids):
        return (ids, labels), None
    held_out = torch.zeros(len(ids), dtype=torch.bool)
    held_out[torch.arange(number) * len(ids) // number] = True
    if not (labels[held_out][:, 1:] != IGNORED).any():
        return (ids, labels), None
    return (ids[~held_out], labels[~held_out]), (ids[held_out], labels[held_out])


def mean_loss(model: nn.Module, windows: Windows, micro: int) -> float:
    """The mean loss per token whose label is not ``IGNORED``, in nats; ``micro`` windows at once."""
    ids, labels = windows
    model.eval()
    with torch.no_grad():
        total = sum(float(loss_sum(model, part, wanted)) for part, wanted in pieces(ids, labels, micro))
    return total / int((labels[:, 1:] != IGNORED).sum())


def keep_best(folder: Path, method: Parametrization, loss: float, changes: Mapping[str, Change], begin: bool) -> None:
    """Stores a trained change if its loss is lower than that of the stored one.

    Args:
        folder: on the client's own disk.
        method: the parametrization of the changes.
        loss: on the client's held-out windows.
        changes: by linear, the complete change that the client's model had; stored as float32.
        begin: True in the first round: files of an earlier run are deleted.
    """
    if begin:
        shutil.rmtree(folder, ignore_errors=True)
    best_adapter = best(folder, method)
    if best_adapter is not None and best_adapter[0] <= loss:
        return
    tensors = {f"{part}/{name}": value for name, change in changes.items() for part, value in change.parts().items()}
    save_tensors({name: value.float().contiguous() for name, value in tensors.items()}, _file(folder), {"loss": repr(loss)})


def best(folder: Path, method: Parametrization) -> tuple[float, dict[str, Any]] | None:
    """The loss of the stored change, and the change of each linear; None if nothing is stored."""
    if not _file(folder).is_file():
        return None
    parts: dict[str, dict[str, Tensor]] = {}
    with safe_open(_file(folder), framework="pt") as opened:
        for key in opened.keys():  # noqa: SIM118
            part, _, name = key.partition("/")
            parts.setdefault(name, {})[part] = opened.get_tensor(key)
        loss = float(opened.metadata()["loss"])
    return loss, {name: method.change_of(tensors) for name, tensors in parts.items()}


def _file(folder: Path) -> Path:
    return folder / "best.safetensors"
