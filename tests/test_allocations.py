"""How much of each block goes: OWL beside the published computation, and what it makes of a whole stage."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from fedgrove.data.windows import calibration_windows
from fedgrove.input_statistics.statistics import InputStatistics
from fedgrove.job.load import load
from fedgrove.stages.prune.allocation import Options, even, owl
from small import CLIENTS, LENGTH, SAMPLES, Moment, Small, cli, complaint, killed
from test_architectures import plain
from test_statistics import owners  # noqa: F401 (a fixture)

OWL = {"stages__0__allocation": "owl", "stages__0__owl_m": 2.0, "stages__0__owl_lambda": 0.1}


def published(scores: list[list[Tensor]], sparsity: float, m: float, spread: float) -> tuple[list[float], list[float]]:
    """OWL as its authors wrote it down: percent of outliers by block, and the sparsity of each block."""
    ratios = []
    for block in scores:
        flat = torch.cat([score.flatten() for score in block])
        ratios.append(float((flat > flat.mean() * m).sum()) / flat.numel() * 100)
    found = torch.tensor(ratios, dtype=torch.float64)
    kept = (found - found.min()) * (1 / (found.max() - found.min()) * spread * 2)
    kept = kept - kept.mean() + (1 - sparsity)
    return ratios, (1 - kept).tolist()


def blocks_of(seed: int, number: int = 4) -> list[dict[str, tuple[Tensor, InputStatistics]]]:
    """Linears of heavy tails and what entered them."""
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for index in range(number):
        block = {}
        for name, shape in (("q", (24, 16)), ("down", (16, 40))):
            inputs = InputStatistics("squares")
            size = 1 + 5 * (torch.rand(shape[1], generator=generator) < 0.1 * index)
            inputs.add(torch.randn(3, 9, shape[1], generator=generator) * size)
            block[name] = (torch.randn(shape, generator=generator), inputs)
        blocks.append(block)
    return blocks


def test_owl_is_the_published_one() -> None:
    blocks = blocks_of(0)
    options = Options(owl_m=3.0, owl_lambda=0.08)
    scores = [[weight.abs() * inputs.squares.sqrt().float() for weight, inputs in block.values()] for block in blocks]
    ratios, expected = published(scores, 0.7, 3.0, 0.08)
    assert len(set(ratios)) == len(ratios)
    measured = []
    for block in blocks:
        weights = {name: weight for name, (weight, _) in block.items()}
        measured.append(owl.measure(weights, {name: inputs for name, (_, inputs) in block.items()}, options))
    assert measured == pytest.approx([ratio / 100 for ratio in ratios])
    assert owl.allocate(measured, [1024] * 4, 0.7, options) == pytest.approx(expected)


@pytest.mark.parametrize("sparsity", [0.0, 0.05, 0.5, 0.7, 0.95, 0.995])
def test_the_whole_model_loses_what_was_asked_for(sparsity: float) -> None:
    sizes, measured = [100, 300, 50, 1000], [0.01, 0.0, 0.03, 0.02]
    shares = owl.allocate(measured, sizes, sparsity, Options())
    assert sum(size * share for size, share in zip(sizes, shares, strict=True)) / sum(sizes) == pytest.approx(sparsity)
    assert all(0 <= share <= max(owl.MAX_SPARSITY, sparsity) for share in shares)
    assert shares[1] >= shares[0] >= shares[3] >= shares[2], "more outliers, fewer zeros"


def test_blocks_that_are_alike_lose_the_same() -> None:
    assert owl.allocate([0.02, 0.02], [10, 30], 0.6, Options()) == pytest.approx([0.6, 0.6])
    assert even.allocate([0.0, 0.0], [10, 30], 0.6, Options()) == [0.6, 0.6]
    zeros = InputStatistics("squares", 1, torch.zeros(4, dtype=torch.float64))
    assert owl.measure({"q": torch.ones(3, 4)}, {"q": zeros}, Options()) == 0.0


def told(run: Path) -> dict[int, float]:
    """The sparsity of each block, which all its matrices have; the whole has what was asked for."""
    tensors = json.loads((run / "pruning.json").read_text())["tensors"]
    found: dict[int, set[float]] = {}
    for row in tensors:
        found.setdefault(row["block"], set()).add(row["target"])
        assert abs(row["pruned"] - row["target"] * row["numel"]) <= 0.5
    pruned, numel = sum(row["pruned"] for row in tensors), sum(row["numel"] for row in tensors)
    assert abs(pruned - 0.5 * numel) <= len(tensors) / 2
    assert all(len(targets) == 1 for targets in found.values())
    return {block: targets.pop() for block, targets in found.items()}


def scores_of(small: Small, clients: tuple[str, ...]) -> list[list[Tensor]]:
    """|W|·‖x‖ of every linear of every block of the dense model over the text of clients, from plain transformers."""
    tokenizer = AutoTokenizer.from_pretrained(small.model)
    model = plain(small.model)
    squares: dict[str, Tensor] = {}
    linears = {name: module for name, module in model.named_modules() if name.endswith("_proj")}

    def note(name: str) -> Any:
        def hook(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
            squares[name] = squares.get(name, 0) + args[0].double().square().sum((0, 1))

        return hook

    for name, module in linears.items():
        module.register_forward_pre_hook(note(name))
    for client in clients:
        ids = calibration_windows([small.texts[client]], None, tokenizer, SAMPLES, LENGTH, f"0/0/{client}")
        with torch.no_grad():
            for window in ids:
                model(window[None])
    blocks: dict[str, list[Tensor]] = {}
    for name, module in linears.items():
        blocks.setdefault(name.split(".")[2], []).append(module.weight.detach().abs() * squares[name].sqrt().float())
    return list(blocks.values())


def test_from_sums_it_is_that_of_the_pooled_text(small: Small) -> None:
    run = small.undisturbed(**OWL, stages__0__aggregation="pooled")
    _, expected = published(scores_of(small, CLIENTS), 0.5, 2.0, 0.1)
    assert list(told(run).values()) == pytest.approx(expected, abs=2e-3)
    assert expected[0] != pytest.approx(expected[1], abs=0.02)


def test_elsewhere_it_is_of_the_mean_of_what_clients_measure(small: Small) -> None:
    run = small.undisturbed(**OWL)
    ratios = [published(scores_of(small, (client,)), 0.5, 2.0, 0.1)[0] for client in CLIENTS]
    mean = [sum(values) / len(values) / 100 for values in zip(*ratios, strict=True)]
    assert list(told(run).values()) == pytest.approx(owl.allocate(mean, [1, 1], 0.5, Options(2.0, 0.1)), abs=2e-3)


@pytest.mark.parametrize(
    "changes", [{"pruner": "sparsegpt"}, {"pruner": "magnitude"}, {"aggregation": "fedprllm"}, {"rounds": 2}]
)
def test_every_pruner_and_rule_prunes_unevenly(small: Small, changes: dict[str, Any]) -> None:
    run = small.undisturbed(**OWL, **{f"stages__0__{key}": value for key, value in changes.items()})
    assert told(run) == told(small.undisturbed(**OWL))
    weights = load_file(run / "model" / "model.safetensors")
    for row in json.loads((run / "pruning.json").read_text())["tensors"]:
        assert int((weights[row["name"]] == 0).sum()) >= row["pruned"], "a kept weight may be zero by itself"


@pytest.mark.parametrize("aggregation", ["fedspallm", "pooled"])
def test_secure_aggregation_finds_the_same_sparsities(small: Small, tmp_path: Path, aggregation: str) -> None:
    job = small.job("secure", **OWL, stages__0__aggregation=aggregation, privacy={"secure_aggregation": True})
    assert cli("run", job, "--out", tmp_path / "run")[0] == 0
    assert told(tmp_path / "run") == told(
        small.undisturbed(**OWL, **({} if aggregation == "fedspallm" else {"stages__0__aggregation": aggregation}))
    )


def test_a_killed_run_does_not_ask_again(small: Small, tmp_path: Path) -> None:
    job = small.job("killed", **OWL)
    killed(
        "run", job, "--out", tmp_path / "run", "--quiet", moment=Moment("os.rename", "*/round-0/block-0001.safetensors", "cut")
    )
    assert cli("run", job, "--out", tmp_path / "run", "--resume")[0] == 0
    one, other = (load_file(run / "model" / "model.safetensors") for run in (tmp_path / "run", small.undisturbed(**OWL)))
    assert all(torch.equal(one[name], other[name]) for name in other)
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    assert kinds.count("prune/outliers") == 2 * len(CLIENTS)


def test_owners_get_the_model_that_pooled_text_gives(
    small: Small,
    tmp_path: Path,
    owners: Mapping[str, list[str]],  # noqa: F811
) -> None:
    runs = small.apart_and_pooled(tmp_path, owners, **OWL, stages__0__aggregation="pooled")
    found = [load_file(run / "model" / "model.safetensors") for run in runs]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stages__0__sparsity": None, "stages__0__pattern": "2:4"}, "needs sparsity"),
        ({"stages__0__allocation": "best"}, "choose one of even, owl"),
        ({"clients__0__sparsity": 0.7}, "clients.sparsity"),
        ({"stages__0__owl_m": 0.5}, "stages.0.owl_m"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(small: Small, changes: dict[str, Any], said: str) -> None:
    assert said in complaint("plan", small.job("refused", **{**OWL, **changes}))


def test_the_keys_are_owls(small: Small) -> None:
    stage = load(small.job("keys")).stages[0]
    assert (stage.allocation, stage.owl_m, stage.owl_lambda) == ("even", 5.0, 0.08)
