"""The keys of a tuning stage: short forms, defaults, and what does not go together."""

from __future__ import annotations

from typing import Any

import pytest

from fedgrove.centralized import centralized_job
from fedgrove.job.load import load
from fedgrove.stages.tune.config import Config
from small import CLIENTS, Small, complaint
from test_tune_stage import TUNE

AXES = ("planner", "parametrization", "trainer", "aggregation")


@pytest.mark.parametrize(("given", "expected"), [
    ({}, ("fedpipe", "lora", "sgd", "flexlora")),
    ({"method": "fedpipe"}, ("fedpipe", "lora", "sgd", "flexlora")),
    ({"method": "lora"}, ("uniform", "lora", "sgd", "flexlora")),
    ({"method": "uniform"}, ("uniform", "lora", "sgd", "flexlora")),
    ({"method": "full"}, ("uniform", "full", "sgd", "fedavg")),
    ({"method": "ia3"}, ("uniform", "ia3", "sgd", "fedavg")),
    ({"planner": "uniform"}, ("uniform", "lora", "sgd", "flexlora")),
    ({"parametrization": "ia3"}, ("uniform", "ia3", "sgd", "fedavg")),
    ({"method": "lora", "aggregation": "fedit"}, ("uniform", "lora", "sgd", "fedit")),
    ({"method": "full", "parametrization": "full"}, ("uniform", "full", "sgd", "fedavg")),
    ({"method": "lora", "epsilon": 1.0}, ("uniform", "lora", "dp_sgd", "flexlora")),
    ({"method": "ia3", "epsilon": 1.0}, ("uniform", "ia3", "dp_sgd", "fedavg")),
    (
        {"method": "lora", "epsilon": 1.0, "dp_unit": "client", "aggregation": "ffa_lora", "precision": "fixed"},
        ("uniform", "lora", "sgd", "ffa_lora"),
    ),
])  # fmt: skip
def test_a_short_form_stands_for_four_choices(given: dict[str, Any], expected: tuple[str, ...]) -> None:
    config = Config(kind="tune", **given)
    assert tuple(getattr(config, axis) for axis in AXES) == expected
    assert "method" not in config.model_dump()
    assert Config(**config.model_dump()) == config, "what is written down is read as the same"


@pytest.mark.parametrize(("given", "says"), [
    ({"method": "ia3", "aggregation": "flexlora"}, 'aggregation "flexlora" does not take what parametrization "ia3" trains; use'
     " one of fedavg"),
    ({"method": "full", "aggregation": "ffa_lora"}, 'aggregation "ffa_lora" does not take what parametrization "full" trains'),
    ({"method": "lora", "aggregation": "fedavg"}, 'aggregation "fedavg" does not take what parametrization "lora" trains; use'
     " one of fedex_lora, fedit, ffa_lora, flexlora, flora"),
    ({"planner": "fedpipe", "parametrization": "ia3"}, 'planner "fedpipe" chooses ranks, and "ia3" has none; use "uniform"'),
    ({"planner": "fedpipe", "parametrization": "full"}, 'planner "fedpipe" chooses ranks, and "full" has none; use "uniform"'),
    ({"planner": "fedpipe", "aggregation": "fedex_lora"}, 'aggregation "fedex_lora" needs equal ranks: use method = "lora"'),
    ({"method": "fedpipe", "planner": "uniform"}, 'method "fedpipe" means planner = "fedpipe"; leave one of them out'),
    ({"method": "ia3", "parametrization": "lora"}, 'method "ia3" means parametrization = "ia3"; leave one of them out'),
    ({"method": "full", "planner": "fedpipe"}, 'method "full" means planner = "uniform"; leave one of them out'),
    ({"method": "lore"}, "method: choose one of adapter_seeds, fedpipe, full, ia3, lora, seeds, uniform"),
    ({"planner": "best"}, "planner: choose one of fedpipe, uniform"),
    ({"parametrization": "lore"}, "parametrization: choose one of adapter_seeds, full, ia3, lora"),
    ({"trainer": "adam"}, "trainer: choose one of directional, dp_sgd, dp_zeroth_order, sgd, zeroth_order"),
    ({"aggregation": "mean"}, "aggregation: choose one of common, fedavg, fedex_lora"),
    ({"method": "ia3", "personal": 0.2}, 'parametrization "ia3" has no adapters: leave personal out'),
    ({"method": "lora", "personal_pull": 0.1}, "personal_pull: no client keeps an adapter of its own; set personal"),
    ({"method": "full", "personal": 0.2}, 'parametrization "full" has no adapters: leave personal out'),
    ({"method": "lora", "aggregation": "fedit", "server_optimizer": "adam"}, 'server_optimizer "adam" needs aggregation ='),
    ({"method": "lora", "aggregation": "ffa_lora", "server_lr": 0.5}, "server_lr needs aggregation ="),
    ({"method": "lora", "precision": "fixed"}, 'precision "fixed": LoRA changes add up only if all clients share A; set'
     ' aggregation = "ffa_lora"'),
    ({"trainer": "dp_sgd"}, 'trainer "dp_sgd" adds noise: set epsilon as well'),
    ({"method": "lora", "epsilon": 1.0, "trainer": "sgd"}, 'trainer "sgd" does not protect a window; leave trainer out'),
    (
        {"method": "ia3", "epsilon": 1.0, "dp_unit": "client", "precision": "fixed", "trainer": "dp_sgd"},
        'trainer "dp_sgd" does not protect a client; leave trainer out',
    ),
    ({"method": "full", "epsilon": 1.0}, 'epsilon: "full" cannot be trained with noise; set method = "lora"'),
    ({"epsilon": 1.0}, 'epsilon: planner "fedpipe" needs scores, which get no noise; set method = "lora"'),
    ({"method": "lora", "epsilon": 1.0, "personal": 0.2}, "epsilon: personal adapters are chosen by losses, which"),
    ({"method": "lora", "epsilon": 1.0, "dp_unit": "client"}, "epsilon: the noise is added to fixed-point numbers; set"
     ' aggregation = "ffa_lora" and precision = "fixed"'),
    ({"method": "ia3", "epsilon": 1.0, "dp_unit": "client"}, 'added to fixed-point numbers; set precision = "fixed"'),
    ({"ranks": []}, "ranks: "),
    ({"batches": [0]}, "batches"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused_in_a_line_that_names_the_key(
    small: Small, given: dict[str, Any], says: str
) -> None:
    stage = {key: value for key, value in TUNE.items() if key != "method"}
    line = complaint("plan", small.job("refused", stages=[{**stage, **given}], evaluate={}))
    assert "stages.0" in line
    assert says in line


@pytest.mark.parametrize(("method", "says"), [
    ("lora", 'stages.0: only fixed-point numbers can be summed securely; set aggregation = "ffa_lora" and precision = "fixed"'),
    ("ia3", 'stages.0: only fixed-point numbers can be summed securely; set precision = "fixed"'),
    ("full", 'stages.0: only fixed-point numbers can be summed securely; set precision = "fixed"'),
])  # fmt: skip
def test_what_is_not_summed_unseen_is_told_what_would_be(small: Small, method: str, says: str) -> None:
    job = small.job("unseen", stages=[{**TUNE, "method": method}], evaluate={}, privacy={"secure_aggregation": True})
    assert says in complaint("plan", job)


def test_one_owner_of_all_text_takes_its_own_steps_whole(small: Small) -> None:
    """What smooths or shortens the steps of a federation has no meaning for one client."""
    stage = {**TUNE, "server_optimizer": "adam", "server_lr": 1e-3, "proximal": 0.1, "personal": 0.2}
    (config,) = centralized_job(load(small.job("owner", stages=[stage]))).stages
    assert isinstance(config, Config)
    assert (config.server_optimizer, config.server_lr, config.proximal, config.personal) == ("average", None, 0.0, 0.0)
    assert config.steps == TUNE["steps"] * len(CLIENTS)
    assert Config(**config.model_dump()) == config, "it is a job that could be written down"
