"""A pool of adapters: the gate's fit is exact, members add up to one adapter, one member is the run without a pool."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from small import CLIENTS, Moment, Small, cli, complaint, killed, measurements

TUNE = {
    "kind": "tune", "method": "lora", "aggregation": "ffa_lora", "rounds": 3, "steps": 4, "length": 16, "batches": [2],
    "ranks": [2], "bits": [32], "learning_rate": 0.01,
}  # fmt: skip
MIXTURE = {"gate": "mixture", "members": 2, "common": 0.34, "size": 3, "prefix": 8, "starts": 2, "fit_rounds": 4}
GROUPS = {"gate": "groups", "common": 0.34, "groups": {"wood": ["ash", "birch"], "other": ["cedar"]}}


def tune(pool: dict[str, Any] | None, **changes: Any) -> list[dict[str, Any]]:
    return [{**TUNE, **changes, **({} if pool is None else {"pool": pool})}]


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("pool", [{**GROUPS, "groups": {"all": list(CLIENTS)}}, {**MIXTURE, "members": 1},
                                  {"gate": "losses", "members": 1, "common": 0.34, "windows": 2}],
                         ids=lambda pool: pool["gate"])  # fmt: skip
def test_a_pool_of_one_is_the_run_without_a_pool_bit_for_bit(small: Small, pool: dict[str, Any]) -> None:
    alone, pooled = small.undisturbed(stages=tune(None)), small.undisturbed(stages=tune(pool))
    for name, tensor in load_file(alone / "model" / "model.safetensors").items():
        assert torch.equal(tensor, load_file(pooled / "model" / "model.safetensors")[name]), name
    without, with_pool = measurements(alone), measurements(pooled)
    assert {key: value for key, value in without.items() if key[3] != "clock"}.items() <= with_pool.items()
