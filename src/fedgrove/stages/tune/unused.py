"""Keys of a stage that have no effect beside its other keys. A job that sets one is refused: its writer expects an effect."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedgrove.stages.tune.parametrizations import parametrization_of
from fedgrove.stages.tune.planners import planner_of

if TYPE_CHECKING:
    from fedgrove.stages.tune.config import Config

OF_SEEDS = frozenset({"seeds", "sampling", "perturbation", "target_modules"})  # keys of parametrizations without gradients
OF_FEDPIPE = frozenset({"deadline", "upload_price", "replan_off"})  # keys of planners that choose steps
OF_PRIVACY = frozenset({"delta", "dp_unit", "dp_clip"})  # without epsilon no noise is added


def check_unused(config: Config) -> None:
    """Refuses keys that differ from their defaults and have no effect.

    Raises:
        ValueError: begins with the key and gives the remedy.
    """
    what = parametrization_of(config.parametrization)
    unused: dict[str, str] = {}
    if config.epsilon is None:
        unused |= dict.fromkeys(OF_PRIVACY, "without epsilon; set epsilon as well, or leave it out")
    if not planner_of(config.planner).CHOOSES_STEPS:
        unused |= dict.fromkeys(OF_FEDPIPE, f'with planner "{config.planner}"; leave it out')
    unused |= dict.fromkeys(
        what.UNUSED | (OF_SEEDS - what.KEYS), f'with parametrization "{config.parametrization}"; leave it out'
    )
    for key in sorted(unused):
        if getattr(config, key) != what.DEFAULTS.get(key, type(config).model_fields[key].default):
            raise ValueError(f"{key}: it has no effect {unused[key]}")
