"""What a client accepts of the server: weights that a stage could have made, and noise for all sums that it releases."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedgrove.client.hidden_states import Calibration
from fedgrove.client.local_client import LocalClient
from fedgrove.client.serve import serve
from fedgrove.client.windows import training_windows
from fedgrove.errors import FedgroveError
from fedgrove.input_statistics.shared_inputs import count_inputs
from fedgrove.job.stage_config import Cut
from fedgrove.models.blocks import Decoder
from fedgrove.models.stream import Checkpoint
from fedgrove.rounds import wire
from fedgrove.rounds.request import Tensors
from fedgrove.rounds.wire import WireError
from fedgrove.stages.prune.exchanges.block import PruneBlock
from fedgrove.stages.prune.recipe import Recipe
from fedgrove.stages.tune.exchanges.base import KeepWeights
from fedgrove.stages.tune.exchanges.importance import ScoreLinears
from fedgrove.stages.tune.exchanges.train import Train
from fedgrove.stages.tune.factors import Factors
from fedgrove.stages.tune.train_settings import Training
from small import LENGTH, Small

UP = "model.layers.1.mlp.up_proj.weight"


def keep(small: Small, folder: Path, name: str, tensor: Tensor) -> None:
    client = LocalClient("ash", folder, small.model, None, (), None)
    KeepWeights(stage=1, part=0).respond({name: tensor}, client, "cpu")


@pytest.mark.parametrize(
    "change",
    [lambda own: own, lambda own: own * (torch.arange(own.shape[1]) % 2), lambda own: own[:40], lambda own: own[:, :32] * 1.9],
    ids=["unchanged", "pruned", "cut", "cut and repaired"],
)
def test_weights_that_a_stage_makes_are_kept(small: Small, tmp_path: Path, change: Callable[[Tensor], Tensor]) -> None:
    new = change(Checkpoint(small.model).read(UP)).contiguous()
    keep(small, tmp_path, UP, new)
    (file,) = tmp_path.rglob("part-00000.safetensors")
    assert torch.equal(load_file(file)[UP], new)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("model.embed_tokens.weight", lambda own: own, "which no stage changes"),
        ("model.norm.weight", lambda own: own, "which no stage changes"),
        ("model.layers.0.input_layernorm.weight", lambda own: own, "which no stage changes"),
        (UP, lambda own: own * 3, "grew more than 2 times"),
        (UP, lambda own: own * torch.nan, "grew more than 2 times"),
        (UP, lambda own: own.index_fill(0, torch.tensor([0]), torch.inf), "grew more than 2 times"),
        (UP, lambda own: torch.cat([own, own * 0]), "another shape"),
        (UP, lambda own: own[0], "another shape"),
    ],
)
def test_other_weights_are_refused(
    small: Small, tmp_path: Path, name: str, change: Callable[[Tensor], Tensor], says: str
) -> None:
    with pytest.raises(FedgroveError, match=f"client 'ash': the server sent .*{says}.*refused"):
        keep(small, tmp_path, name, change(Checkpoint(small.model).read(name)))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_zeros_of_a_pruned_copy_stay(small: Small, tmp_path: Path) -> None:
    checkpoint = Checkpoint(small.model)
    overlay = checkpoint.read(UP)
    overlay[:, ::2] = 0
    pruned = tmp_path / "pruned"
    checkpoint.write(pruned)
    file = pruned / "model.safetensors"
    save_file({**load_file(file), UP: overlay}, file, metadata={"format": "pt"})
    client = LocalClient("ash", tmp_path, pruned, None, (), None)
    with pytest.raises(FedgroveError, match="where its own are zero"):
        KeepWeights(stage=1, part=0).respond({UP: checkpoint.read(UP)}, client, "cpu")


def test_the_inputs_of_all_blocks_are_counted_without_weights(small: Small) -> None:
    assert count_inputs(Decoder(Checkpoint(small.model))) == [4, 4], "of q, k and v; of o; of gate and up; of down"


# Changes that a later round of tuning starts from

LINEAR = "model.layers.1.mlp.up_proj"
TRAIN: dict[str, Any] = {
    "stage": 0, "round": 1, "parts": 0, "cut": None, "bits": 32, "length": LENGTH, "seed": "0/0", "personal": 0.0,
    "trainer": "sgd", "shared_a": False, "ranks": {LINEAR: 2}, "masked": (), "seen": 0, "dtype": "float32",
    "training": Training(steps=1, batch=1, micro=1, learning_rate=0.1, optimizer="sgd", max_grad_norm=1.0, proximal=0.0),
}  # fmt: skip
STARTS: dict[str, dict[str, tuple[int, ...]]] = {
    "lora": {"b": (96, 2), "a": (2, 64)},
    "full": {"weight": (96, 64)},
    "ia3": {"s": (96,)},
}


def start_of(method: str, scale: float = 0.01, kind: str = "own") -> Tensors:
    """A start as the server sends it, of numbers of this size."""
    torch.manual_seed(0)
    return {f"{kind}/{LINEAR}/{part}": scale * torch.randn(shape) for part, shape in STARTS[method].items()}


def train(small: Small, folder: Path, method: str, tensors: Tensors, **changes: Any) -> None:
    client = LocalClient("ash", folder, small.model, None, (small.texts["ash"],), None)
    tokens = training_windows(client, LENGTH)[0].numel()
    scales = dict.fromkeys(TRAIN["ranks"], 1.0) if method == "lora" else {}
    request = Train(**{**TRAIN, "parametrization": method, "scales": scales, "tokens": tokens, **changes})
    serve(request.KIND, wire.pack(tensors, {"request": request.model_dump(mode="json")}), client, "cpu")


@pytest.mark.parametrize("method", STARTS)
def test_a_start_that_a_round_makes_is_trained_on(small: Small, tmp_path: Path, method: str) -> None:
    train(small, tmp_path, method, start_of(method))
    if method == "lora":
        train(small, tmp_path, method, {**start_of(method), **start_of(method, kind="rest")})


def first(method: str) -> str:
    return next(iter(start_of(method)))


@pytest.mark.parametrize("method", STARTS)
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda start, name: {key: 1000 * value for key, value in start.items()}, "grew more than 2 times"),
        (lambda start, name: {**start, name: start[name] * torch.inf}, "holds NaN or infinity"),
        (lambda start, name: {**start, name: start[name].double()}, "another shape or dtype"),
        (lambda start, name: {**start, name: start[name].bfloat16()}, "another shape or dtype"),
        (lambda start, name: {**start, name: start[name][:-1].contiguous()}, "another shape or dtype"),
        (lambda start, name: {**start, name: start[name][None]}, "another shape or dtype"),
        (lambda start, name: {**start, f"{name}x": start[name]}, "another shape or dtype"),
        (lambda start, name: {**start, name.replace("layers.1", "layers.7"): start[name]}, "no part of a change"),
        (lambda start, name: {**start, name.replace("own/", "other/"): start[name]}, "no part of a change"),
        (lambda start, name: {**start, "model.embed_tokens.weight": start[name]}, "no part of a change"),
    ],
    ids=["grown", "infinite", "double", "bfloat16", "cut", "deeper", "another part", "no linear", "no kind", "embedding"],
)
def test_a_start_that_no_round_makes_is_refused(
    small: Small, tmp_path: Path, method: str, change: Callable[[Tensors, str], Tensors], says: str
) -> None:
    start = start_of(method)
    with pytest.raises((FedgroveError, WireError), match=says):
        train(small, tmp_path, method, change(start, first(method)))


def test_factors_that_cancel_do_not_hide_that_a_weight_grows(small: Small, tmp_path: Path) -> None:
    """The Gram matrices of such factors give a norm of 0."""
    b = torch.tensor([[1e9, -1e9]]).repeat(96, 1)
    b[0, 1] += 64
    factors = Factors(b, torch.ones(2, 64))
    assert factors.norm() == 0 < factors.double().product().norm()
    with pytest.raises(FedgroveError, match="grew more than 2 times"):
        train(small, tmp_path, "lora", {f"own/{LINEAR}/b": factors.b, f"own/{LINEAR}/a": factors.a})


def test_a_start_of_a_higher_rank_than_the_client_trains_is_refused(small: Small, tmp_path: Path) -> None:
    with pytest.raises(FedgroveError, match="another shape or dtype"):
        train(small, tmp_path, "lora", start_of("lora"), ranks={LINEAR: 1}, scales={LINEAR: 1.0})
    wide = {f"rest/{LINEAR}/b": torch.zeros(96, 70), f"rest/{LINEAR}/a": torch.zeros(70, 64)}
    with pytest.raises(FedgroveError, match="another shape or dtype"):
        train(small, tmp_path, "lora", wide)


@pytest.mark.parametrize(
    ("cut", "kept", "says"),
    [
        (Cut(0.25, 0.0, 0.0), None, "another width than the one that it was sent"),
        (Cut(0.0, 0.0, 0.5), (0, 1), "another number of blocks than the job leaves"),
        (Cut(0.0, 0.0, 0.75), (0, 1), "another number of blocks than the job leaves"),
    ],
)
def test_a_model_is_cut_by_the_jobs_fractions_or_not_tuned(
    small: Small, tmp_path: Path, cut: Cut, kept: tuple[int, ...] | None, says: str
) -> None:
    with pytest.raises(FedgroveError, match=says):
        train(small, tmp_path, "lora", start_of("lora"), cut=cut, kept_blocks=kept)


@pytest.mark.parametrize("depth", [0.0, 0.75])
def test_base_weights_of_another_number_of_blocks_than_the_job_leaves_are_refused(
    small: Small, tmp_path: Path, depth: float
) -> None:
    client = LocalClient("ash", tmp_path, small.model, None, (small.texts["ash"],), None)
    request = KeepWeights(stage=1, part=0, cut=Cut(0.0, 0.0, depth), kept_blocks=(1,) if depth == 0 else (0, 1))
    with pytest.raises(FedgroveError, match="another number of blocks than the job leaves"):
        request.respond({UP: Checkpoint(small.model).read(UP)}, client, "cpu")


def test_a_request_without_tensors_takes_none(small: Small, tmp_path: Path) -> None:
    client = LocalClient("ash", tmp_path, small.model, None, (small.texts["ash"],), None)
    tokens = training_windows(client, LENGTH)[0].numel()
    common = {key: TRAIN[key] for key in ("stage", "parts", "cut", "bits", "length", "seed", "personal")}
    request = ScoreLinears(**common, tokens=tokens, steps=1, micro=1, learning_rate=0.1, ranks=(2,))
    with pytest.raises(FedgroveError, match="sent tensors with a request that has none"):
        serve(request.KIND, wire.pack(start_of("lora"), {"request": request.model_dump(mode="json")}), client, "cpu")


# Weights that a later round of pruning starts from


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda start: start, None),
        (lambda start: {name: weight * 3 for name, weight in start.items()}, "grew more than 2 times"),
        (lambda start: {name: weight.float() for name, weight in start.items()}, "another shape or dtype"),
        (lambda start: {name: weight[:-1].contiguous() for name, weight in start.items()}, "another shape or dtype"),
        (lambda start: dict(list(start.items())[1:]), "other weights than those of block 0"),
        (lambda start: {**start, "start/x": next(iter(start.values()))}, "other weights than those of block 0"),
    ],
    ids=["as they are", "grown", "float32", "cut", "one less", "one more"],
)
def test_weights_that_a_later_round_of_pruning_starts_from_are_bounded(
    small: Small, tmp_path: Path, change: Callable[[Tensors], Tensors], says: str | None
) -> None:
    client = LocalClient("ash", tmp_path, small.model, None, (small.texts["ash"],), None)
    recipe = Recipe(pruner="wanda", damping="mean", sparsities=(0.5, 0.5), pattern=None, blocks=(0, 1))
    calibration = Calibration(stage=0, round=1, samples=2, length=LENGTH, seed="0/0", through=recipe.through)
    decoder = Decoder(Checkpoint(small.model))
    start = {f"start/{name}": decoder.read_linear(0, name).contiguous() for name in decoder.block_names(0)}
    request = PruneBlock(stage=0, round=1, block=0, calibration=calibration, recipe=recipe, aggregation="fedspallm")

    def ask(request: PruneBlock) -> None:
        serve(request.KIND, wire.pack(change(start), {"request": request.model_dump(mode="json")}), client, "cpu")

    if says is None:
        ask(request)
        with pytest.raises(FedgroveError, match="before any stage could have changed them"):
            ask(request.model_copy(update={"round": 0}))
        return
    with pytest.raises(FedgroveError, match=says):
        ask(request)
