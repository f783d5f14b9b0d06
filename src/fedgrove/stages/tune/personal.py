"""Personal adapters: a client keeps what was best on text of its own that it did not train on. Only two losses are sent."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fedgrove.data import IGNORED
from fedgrove.models.stream import save_tensors
from fedgrove.stages.tune.factors import Factors
from fedgrove.stages.tune.lora import loss_sum, pieces

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
    held = torch.zeros(len(ids), dtype=torch.bool)
    held[torch.arange(number) * len(ids) // number] = True
    if not (labels[held][:, 1:] != IGNORED).any():
        return (ids, labels), None
    return (ids[~held], labels[~held]), (ids[held], labels[held])


def mean_loss(model: nn.Module, windows: Windows, micro: int) -> float:
    """The mean loss of a learnt token; ``micro`` windows at once."""
    ids, labels = windows
    model.eval()
    with torch.no_grad():
        total = sum(float(loss_sum(model, part, wanted)) for part, wanted in pieces(ids, labels, micro))
    return total / int((labels[:, 1:] != IGNORED).sum())


def keep_best(folder: Path, loss: float, changes: Mapping[str, Factors], begin: bool) -> None:
    """Keeps a trained adapter where it is better than the one that is kept.

    Args:
        folder: the client's own.
        changes: by linear: everything that the client computed with.
        begin: this is the first round; what an earlier run left there goes.
    """
    if begin:
        shutil.rmtree(folder, ignore_errors=True)
    kept = best(folder)
    if kept is not None and kept[0] <= loss:
        return
    factors = {f"{part}/{name}": getattr(pair, part) for name, pair in changes.items() for part in ("b", "a")}
    save_tensors({name: value.float().contiguous() for name, value in factors.items()}, _file(folder), {"loss": repr(loss)})


def best(folder: Path) -> tuple[float, dict[str, Factors]] | None:
    """The kept adapter and its loss."""
    if not _file(folder).is_file():
        return None
    with safe_open(_file(folder), framework="pt") as opened:
        names = [name.removeprefix("b/") for name in opened.keys() if name.startswith("b/")]  # noqa: SIM118
        changes = {name: Factors(opened.get_tensor(f"b/{name}"), opened.get_tensor(f"a/{name}")) for name in names}
        return float(opened.metadata()["loss"]), changes


def _file(folder: Path) -> Path:
    return folder / "best.safetensors"
