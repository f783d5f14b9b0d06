"""What a client accepts of the server: weights that a stage could have made, and noise for all sums that it releases."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedgrove.client.local_client import LocalClient
from fedgrove.errors import FedgroveError
from fedgrove.models.blocks import Decoder
from fedgrove.models.stream import Checkpoint
from fedgrove.stages.prune.calibration_pass import count_inputs
from fedgrove.stages.tune.exchanges.base import KeepWeights
from small import Small

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
