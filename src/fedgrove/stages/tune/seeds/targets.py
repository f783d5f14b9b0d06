"""Which linears move along directions: all, or those whose names end as the job says."""

from __future__ import annotations

from collections.abc import Collection

from fedgrove.errors import FedgroveError
from fedgrove.models.blocks import Decoder


def is_target(linear: str, targets: Collection[str]) -> bool:
    """Whether a linear moves: without targets every one does, else those whose name is a target or ends in one, as in PEFT.

    Args:
        linear: its name, in the model or in its block.
        targets: such as ``("v_proj", "mlp.down_proj")``.
    """
    return not targets or any(f".{linear}".endswith(f".{target}") for target in targets)


def unknown_target(targets: Collection[str], linears: Collection[str]) -> str | None:
    """The first target that no linear has; None if there is none."""
    return next((one for one in targets if not any(is_target(name, (one,)) for name in linears)), None)


def check_targets(index: int, targets: Collection[str], decoder: Decoder) -> None:
    """Refuses targets that no linear of a model has.

    Args:
        index: of the stage.

    Raises:
        FedgroveError: names the target, and the ends that there are.
    """
    names = decoder.linear_names()
    unknown = unknown_target(targets, names)
    if unknown is not None:
        ends = sorted({name.rpartition(".")[2] for name in names})
        raise FedgroveError(
            f"stages.{index}.target_modules: no linear of the model is called {unknown}", f"choose from {', '.join(ends)}"
        )
