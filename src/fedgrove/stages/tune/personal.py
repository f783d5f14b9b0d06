"""Personal adapters: a client keeps what was best on text of its own that it did not train on. Only two losses are sent."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fedgrove.data.windows import IGNORED
from fedgrove.models.stream import save_tensors
from fedgrove.stages.tune.changes import Change
from fedgrove.stages.tune.parametrizations import Parametrization
from fedgrove.stages.tune.training import loss_sum, pieces

MOST = 32  # windows held out, at most: measuring them twice a round must not cost more than training
Windows = tuple[Tensor, Tensor]


def hold_out(ids: Tensor, labels: Tensor, share: float) -> tuple[Windows, Windows | None]:
    """Windows to train on, and windows to choose by, spread evenly over a client's text.

    Args:
        ids, labels: (windows, length).
        share: of all windows; 0 holds out none.

    Returns:
        The two; no second one where nothing is asked for, or where one of them would be empty or hold nothing to be learnt.
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
    """The mean loss of a learnt token; ``micro`` windows at once."""
    ids, labels = windows
    model.eval()
    with torch.no_grad():
        total = sum(float(loss_sum(model, part, wanted)) for part, wanted in pieces(ids, labels, micro))
    return total / int((labels[:, 1:] != IGNORED).sum())


def keep_best(folder: Path, method: Parametrization, loss: float, changes: Mapping[str, Change], begin: bool) -> None:
    """Keeps a trained change where it is better than the one that is kept.

    Args:
        folder: the client's own.
        method: the parametrization of the changes.
        changes: by linear: everything that the client computed with.
        begin: this is the first round; what an earlier run left there goes.
    """
    if begin:
        shutil.rmtree(folder, ignore_errors=True)
    best_adapter = best(folder, method)
    if best_adapter is not None and best_adapter[0] <= loss:
        return
    tensors = {f"{part}/{name}": value for name, change in changes.items() for part, value in change.parts().items()}
    save_tensors({name: value.float().contiguous() for name, value in tensors.items()}, _file(folder), {"loss": repr(loss)})


def best(folder: Path, method: Parametrization) -> tuple[float, dict[str, Any]] | None:
    """The kept change of each linear, and its loss; None where nothing is kept."""
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
