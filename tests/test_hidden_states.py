"""A client runs its text through the model once a round: hidden states wait on its disk between requests."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedgrove import run as server
from fedgrove.client.hidden_states import Calibration, HiddenStates
from fedgrove.client.local_client import LocalClient
from fedgrove.client.windows import decoder_of
from fedgrove.job.load import load
from fedgrove.stages.prune import pruners
from fedgrove.stages.prune.exchanges.block import PruneBlock
from fedgrove.stages.prune.fixed_weights import FixedWeights, unit_of
from fedgrove.stages.prune.recipe import Recipe
from small import CLIENTS, LENGTH, Small, cli, make_model

BLOCKS = 3
MATRICES = 7  # of a block
SECURE = {"privacy": {"secure_aggregation": True}, "evaluate": {}}
OPEN: dict[str, Any] = {"evaluate": {}}


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of several blocks, whose weights are of several sizes: so no two have the same units for whole numbers."""
    folder = make_model(tmp_path_factory.mktemp("deep"), num_hidden_layers=BLOCKS)
    file = folder / "model.safetensors"
    weights = load_file(file)
    for name in [name for name in weights if "proj" in name]:
        weights[name] *= 2.0 ** -int(name.split(".")[2])
    save_file(weights, file, {"format": "pt"})
    return folder


@pytest.fixture
def pruned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one with every matrix that is pruned by a pruner of a job."""
    found: list[str] = []
    prune = pruners.prune

    def counted(name: str, *rest: Any) -> tuple[Tensor, Tensor]:
        found.append(name)
        return prune(name, *rest)

    monkeypatch.setattr(pruners, "prune", counted)
    return found


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Grows by one with every pass through a model that a client begins."""
    found: list[Path] = []
    write = HiddenStates.write

    def counted(self: HiddenStates, index: int, windows: Iterable[Tensor], number: int) -> int:
        if index == 0:
            found.append(self.folder)
        return write(self, index, windows, number)

    monkeypatch.setattr(HiddenStates, "write", counted)
    return found


def hashes(run: Path) -> list[str]:
    return [row["sha256"] for row in json.loads((run / "pruning.json").read_text())["tensors"]]


# A whole run


@pytest.mark.parametrize("aggregation", ["fedspallm", "fedprllm"])
@pytest.mark.parametrize(("source", "rounds"), [("sequential", 2), ("dense", 1)])
def test_under_secure_aggregation_every_matrix_is_pruned_once_a_round(
    small: Small, deep: Path, tmp_path: Path, pruned: list[str], begun: list[Path], aggregation: str, source: str, rounds: int
) -> None:
    stage = {"aggregation": aggregation, "source": source, "rounds": rounds}
    changes = {"model__path": str(deep), **{f"stages__0__{key}": value for key, value in stage.items()}}
    found = []
    for name, privacy in (("open", OPEN), ("secure", SECURE)):
        pruned.clear()
        begun.clear()
        assert cli("run", small.job(f"once-{name}", **changes, **privacy), "--out", tmp_path / name, "--quiet")[0] == 0
        assert len(pruned) == rounds * len(CLIENTS) * BLOCKS * MATRICES
        assert len(begun) == rounds * len(CLIENTS)
        found.append(hashes(tmp_path / name))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        ({}, 1),
        ({"stages__0__aggregation": "fedavg"}, 1),
        ({"stages__0__layers": {"sample": 0.5, "cover": 1}, "stages__0__rounds": 2}, 2),
        ({"stages__0__aggregation": "pooled"}, 1),
        ({"stages__0__aggregation": "pooled", "stages__0__source": "sequential"}, 1),
        ({"stages__0__aggregation": "pooled", **SECURE}, 1),
        ({"stages__0__aggregation": "pooled", "stages__0__source": "sequential", **SECURE}, 1),
        ({"stages__0__aggregation": "pooled", "stages__0__epsilon": 9.0, **SECURE}, 1),
        ({"stages__0__allocation": "owl"}, 2),
        ({"stages__0__allocation": "owl", **SECURE}, 2),
        ({"stages__0__aggregation": "pooled", "stages__0__allocation": "owl", **SECURE}, 2),
    ],
    ids=str,
)
def test_a_client_runs_through_the_model_no_more_often_than_it_must(
    small: Small, deep: Path, tmp_path: Path, begun: list[Path], changes: dict[str, Any], passes: int
) -> None:
    job = small.job("passes", **{"model__path": str(deep), **OPEN, **changes})
    assert cli("run", job, "--out", tmp_path / "run", "--quiet")[0] == 0
    assert len(begun) == passes * len(CLIENTS)


def test_what_a_client_has_alone_was_pruned_already(small: Small, deep: Path, tmp_path: Path, pruned: list[str]) -> None:
    job = small.job("alone", model__path=str(deep), evaluate__alone=True)
    assert cli("run", job, "--out", tmp_path / "run", "--quiet")[0] == 0
    assert len(pruned) == len(CLIENTS) * BLOCKS * MATRICES


# What the cache depends on

RECIPE = Recipe(pruner="wanda", damping="mean", sparsities=(0.5, 0.5), pattern=None, blocks=(0, 1))
CALIBRATION = Calibration(stage=0, samples=2, length=LENGTH, seed="0/0", through=RECIPE.through)
FIRST = PruneBlock(stage=0, block=0, calibration=CALIBRATION, recipe=RECIPE, aggregation="fedspallm")
LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
OTHER_REQUESTS: dict[str, Any] = {
    "stage": 1,
    "round": 1,
    "block": 1,
    "recipe": RECIPE.model_copy(update={"pruner": "magnitude"}),
    "aggregation": "fedprllm",
    "max_weight_growth": 9.0,
    "keep": True,
    "fixed_point": FixedWeights(units=dict.fromkeys(LINEARS, 30), clients=3),
}
OTHER_CALIBRATIONS: dict[str, Any] = {
    "stage": 1,
    "round": 1,
    "samples": 1,
    "length": 8,
    "seed": "1/0",
    "through": "dense",
    "windows_per_run": 2,
    "compute_dtype": "bfloat16",
}
OTHER_RECIPES: dict[str, Any] = {
    "pruner": "magnitude",
    "damping": "each",
    "sparsities": (0.5, 0.6),
    "pattern": (2, 4),
    "blocks": (0,),
}


@pytest.fixture
def ash(small: Small, tmp_path: Path) -> LocalClient:
    job = load(small.job("cache", evaluate={}))
    return server.local_clients(job, server.open_model(job.model), tmp_path / "clients")[0]


def states(client: LocalClient) -> dict[str, int]:
    """The files of a client's hidden states, and when each was written."""
    return {str(file.relative_to(client.folder)): file.stat().st_mtime_ns for file in client.folder.glob("states-*/*")}


def test_every_field_is_tried_here() -> None:
    assert OTHER_REQUESTS.keys() == PruneBlock.model_fields.keys() - {"calibration"}
    assert OTHER_CALIBRATIONS.keys() == Calibration.model_fields.keys()
    assert OTHER_RECIPES.keys() == Recipe.model_fields.keys()


@pytest.mark.parametrize("field", OTHER_REQUESTS)
def test_a_request_that_differs_elsewhere_goes_on_with_the_hidden_states(
    ash: LocalClient, pruned: list[str], begun: list[Path], field: str
) -> None:
    value = OTHER_REQUESTS[field]
    if field == "fixed_point":
        decoder = decoder_of(ash, "cpu")
        value = FixedWeights(units={name: unit_of(decoder.read_linear(1, name), 3) for name in LINEARS}, clients=3)
    with torch.no_grad():
        FIRST.respond({}, ash, "cpu")
        before = states(ash)
        assert [Path(file).name for file in sorted(before)] == ["0000.safetensors", "0001.safetensors"]
        assert len(pruned) == MATRICES
        FIRST.model_copy(update={"block": 1, field: value}).respond({}, ash, "cpu")
    assert len(pruned) == 2 * MATRICES, "the first block was pruned again"
    assert len(begun) == 1
    after = states(ash)
    assert before.items() >= after.items(), "hidden states were written again"


@pytest.mark.parametrize("field", OTHER_CALIBRATIONS)
def test_every_field_of_a_calibration_is_in_the_name_of_the_cache(ash: LocalClient, field: str) -> None:
    decoder = decoder_of(ash, "cpu")
    first = HiddenStates(ash, CALIBRATION, decoder).folder
    (first / "0000.safetensors").write_bytes(b"")
    other = HiddenStates(ash, CALIBRATION.model_copy(update={field: OTHER_CALIBRATIONS[field]}), decoder).folder
    assert other != first
    assert list(ash.folder.glob("states-*")) == [other], "what no request can need again is removed"
    assert HiddenStates(ash, CALIBRATION.model_copy(), decoder).folder == first


@pytest.mark.parametrize("field", OTHER_RECIPES)
def test_every_field_of_a_recipe_is_in_what_text_passes_through(field: str) -> None:
    assert RECIPE.model_copy(update={field: OTHER_RECIPES[field]}).through != RECIPE.through


def test_other_text_is_another_cache(ash: LocalClient, tmp_path: Path) -> None:
    decoder = decoder_of(ash, "cpu")
    first = HiddenStates(ash, CALIBRATION, decoder).folder
    file = tmp_path / "ash.txt"
    file.write_text(ash.data[0].read_text() + "one word more")
    for change in ({"data": (file,)}, {"text": "{text} {text}"}):
        assert HiddenStates(LocalClient(**{**vars(ash), **change}), CALIBRATION, decoder).folder != first
