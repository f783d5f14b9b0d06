"""Personal adapters: a client keeps the adapter that is better on its held-out text. Only a few numbers are sent.

A client holds out windows in two halves (:mod:`fedgrove.evaluation.held_out`). On the first half it chooses: in every round
whether its own adapter is better than its best one so far, and at the end whether that one is better than the shared one.
On the second half it measures what it reports.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fedgrove.data.windows import IGNORED, spread, with_labels
from fedgrove.evaluation.held_out import Parts
from fedgrove.job.units import MOST_HELD_OUT
from fedgrove.models.next_tokens import loss_sum
from fedgrove.models.tensor_files import save_tensors
from fedgrove.stages.tune.changes import Change, Start
from fedgrove.stages.tune.parametrizations import Trainable
from fedgrove.stages.tune.training import pieces

Windows = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class HeldOut:
    """The windows that a client does not train on, as (ids, labels).

    Attributes:
        choose: by which an adapter is chosen.
        report: by which the chosen adapter is measured.
    """

    choose: Windows
    report: Windows


def hold_out(ids: Tensor, labels: Tensor, share: float) -> tuple[Windows, HeldOut | None]:
    """Splits a client's windows into those to train on and those held out, spread evenly over its text.

    Args:
        ids, labels: (windows, length).
        share: the fraction of the windows to hold out, at most ``MOST_HELD_OUT`` windows; 0: none.

    Returns:
        The windows to train on, and those held out: every other one is to choose by, the rest is to report. The second is
        None, and the first is all windows, if there are none to train on, or a half has no label that is not ``IGNORED``.
    """
    number = min(MOST_HELD_OUT, round(share * len(ids)))
    if not 0 < number < len(ids):
        return (ids, labels), None
    at = spread(number, len(ids))
    halves = [(ids[half], labels[half]) for half in (at[::2], at[1::2])]
    if not all(len(with_labels(of)) for _, of in halves):
        return (ids, labels), None
    rest = torch.ones(len(ids), dtype=torch.bool).index_fill(0, at, False)
    return (ids[rest], labels[rest]), HeldOut(*halves)


def losses(model: nn.Module, windows: Windows) -> Parts:
    """The loss of each window that has a label that is not ``IGNORED``."""
    model.eval()
    parts: Parts = []
    with torch.no_grad():
        for ids, labels in pieces(*windows, 1):
            count = int((labels[:, 1:] != IGNORED).sum())
            if count:
                parts.append((float(loss_sum(model, ids, labels)), count))
    return parts


def mean_loss(model: nn.Module, windows: Windows, micro: int) -> float:
    """The mean loss per token whose label is not ``IGNORED``, in nats; ``micro`` windows at once."""
    ids, labels = windows
    model.eval()
    with torch.no_grad():
        total = sum(float(loss_sum(model, part, wanted)) for part, wanted in pieces(ids, labels, micro))
    return total / int((labels[:, 1:] != IGNORED).sum())


def pull(
    model: nn.Module,
    method: Trainable,
    starts: Mapping[str, Start[Any]],
    names: Sequence[str],
    shared: Mapping[str, Any],
    strength: float,
) -> Callable[[], Tensor]:
    """Ditto's penalty (Li et al., ICML 2021, its objective h): strength/2 · ‖own − shared‖², over all trained linears.

    From the paper: the term, and that it pulls towards the shared model as it is at the start of the round. Ours: the
    norm is that of the changes of the weights. That of LoRA's factors would depend on how a product is factored.

    Args:
        starts: with which the client's own change was attached to the model.
        names: the linears that are trained.
        shared: the shared change of each linear.
    """
    device = next(model.parameters()).device
    fixed = {name: starts[name].rest.plus(shared[name].scaled(-1.0)).parts() for name in names}
    apart = {
        name: [method.change_of({part: value.to(device) for part, value in parts.items()})] if parts else []
        for name, parts in fixed.items()
    }

    def penalty() -> Tensor:
        differences = [method.live(model, name, starts[name]).plus(*apart[name]) for name in names]
        return torch.stack([difference.squared_norm() for difference in differences]).sum() * (strength / 2)

    return penalty


def keep_best(folder: Path, method: Trainable, loss: float, changes: Mapping[str, Change], begin: bool) -> None:
    """Stores a trained change if its loss is lower than that of the stored one.

    Args:
        folder: on the client's own disk.
        method: the parametrization of the changes.
        loss: on the windows to choose by.
        changes: by linear, the complete change that the client's model had; stored as float32.
        begin: True in the first round: files of an earlier run are deleted.
    """
    if begin:
        _file(folder).unlink(missing_ok=True)
    best_adapter = best(folder, method)
    if best_adapter is not None and best_adapter[0] <= loss:
        return
    _save(_file(folder), {name: change.parts() for name, change in changes.items()}, {"loss": repr(loss)})


def best(folder: Path, method: Trainable) -> tuple[float, dict[str, Any]] | None:
    """The loss of the stored change, and the change of each linear; None if nothing is stored."""
    if not _file(folder).is_file():
        return None
    parts, metadata = _load(_file(folder))
    return float(metadata["loss"]), {name: method.change_of(tensors) for name, tensors in parts.items()}


def keep_own(folder: Path, round_: int, trained: Mapping[str, Change], starts: Mapping[str, Start[Any]]) -> None:
    """Stores the own change after a round, for the next one (``personal_pull``).

    Args:
        folder: on the client's own disk. What an earlier round left there stays until the next one begins, because a round
            may be repeated after a failure.
        trained: by linear, the trained part; starts: all linears, with the part that is not trained.
    """
    parts = {f"own/{name}": change.parts() for name, change in trained.items()}
    parts |= {f"rest/{name}": start.rest.parts() for name, start in starts.items()}
    _save(folder / f"own-{round_:04d}.safetensors", parts, {})


def own_before(folder: Path, round_: int) -> dict[str, dict[str, Tensor]] | None:
    """The own change after the latest round before ``round_``: by ``own/<linear>`` and ``rest/<linear>``, its parts.

    None: there is none, as in the first round. Files of other rounds are deleted.
    """
    files = {int(file.stem.removeprefix("own-")): file for file in folder.glob("own-*.safetensors")}
    latest = max((number for number in files if number < round_), default=None)
    for number, file in files.items():
        if number != latest:
            file.unlink()
    return None if latest is None else _load(files[latest])[0]


def _save(file: Path, parts: Mapping[str, Mapping[str, Tensor]], metadata: dict[str, str]) -> None:
    tensors = {f"{part}/{name}": value for name, of in parts.items() for part, value in of.items()}
    save_tensors({name: value.float().contiguous() for name, value in tensors.items()}, file, metadata)


def _load(file: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    parts: dict[str, dict[str, Tensor]] = {}
    with safe_open(file, framework="pt") as opened:
        for key in opened.keys():  # noqa: SIM118
            part, _, name = key.partition("/")
            parts.setdefault(name, {})[part] = opened.get_tensor(key)
        return parts, opened.metadata() or {}


def _file(folder: Path) -> Path:
    return folder / "best.safetensors"
