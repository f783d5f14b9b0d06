"""Keys of a stage that goes along random directions, and what does not go together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedgrove.stages.tune.aggregation import seed_aggregation_of
from fedgrove.stages.tune.seeds.offsets import MOST_DIRECTIONS

if TYPE_CHECKING:
    from fedgrove.stages.tune.config import Config

AUTO = "auto"  # of a key that clients measure


def check_directions(config: Config) -> None:
    """Refuses keys of a stage that goes along random directions and cannot.

    Raises:
        ValueError: begins with the key and gives the remedy.
    """
    takes = seed_aggregation_of(config.aggregation)
    if takes.BOUNDED and not config.seeds:
        some = takes.DEFAULTS["seeds"]
        raise ValueError(f'seeds: aggregation "{config.aggregation}" draws from a number of them; set it, such as {some}')
    if not config.seeds and config.rounds * config.steps > MOST_DIRECTIONS:
        raise ValueError(
            f"seeds: {config.rounds} rounds of {config.steps} steps take more than {MOST_DIRECTIONS} directions, "
            f"whose sums would not be exact; lower rounds or steps, or set seeds = {MOST_DIRECTIONS}"
        )
    if takes.LOCAL_STEPS and config.trainer_method.FALLBACK is not None:
        raise ValueError(
            f'trainer "{config.trainer}" finds all slopes of a round at its start, but with aggregation "{config.aggregation}" '
            'a client moves after each of its steps; set aggregation = "common"'
        )
    if config.sampling not in takes.SAMPLINGS:
        raise ValueError(f'sampling: aggregation "{config.aggregation}" takes {" or ".join(takes.SAMPLINGS)} only')
    for key in ("learning_rate", "perturbation"):
        if config.epsilon is not None and getattr(config, key) == AUTO:
            raise ValueError(f"epsilon: {key} would be measured on text without noise; set a number, measured on public text")
