"""A model of which each block has only some of its experts in memory, and the plain model of these experts on disk.

What is computed is what the whole model would compute if its routers could choose no other expert. Experts keep the numbers
that they have in the whole model, so names of linears mean the same in both; only on disk are they numbered anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from fedgrove.files import atomic_folder
from fedgrove.models.blocks import Decoder
from fedgrove.models.depth import parts_of
from fedgrove.models.expert_cut import KeptExperts, Source, fewer_experts_config, has_row_per_expert, kept_tensors, routing_of
from fedgrove.models.experts import expert_place, experts_in
from fedgrove.models.plain import write_plain
from fedgrove.models.stream import Checkpoint


class HeldDecoder(Decoder):
    """A decoder without some of its experts.

    Args:
        checkpoint: of the whole model.
        held: of each block that has experts, the numbers of those that the decoder has, ascending; as many of each block.
        device, dtype: see :class:`~fedgrove.models.blocks.Decoder`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        held: KeptExperts,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ):
        self.held = held
        self._experts = routing_of(checkpoint.config).experts
        super().__init__(checkpoint, device, dtype)
        for index, numbers in held.items():
            experts = experts_in(self.blocks[index])
            assert experts is not None, "only blocks with experts hold some"
            children = list(experts.children())
            for name, _ in list(experts.named_children()):
                delattr(experts, name)
            for number, expert in zip(numbers, children, strict=True):
                experts.add_module(str(number), expert)

    def _config(self) -> PretrainedConfig:
        config = self.checkpoint.config
        number = len(next(iter(self.held.values())))
        return AutoConfig.for_model(**fewer_experts_config(config.to_dict(), config, number))

    def again(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> HeldDecoder:
        return HeldDecoder(self.checkpoint, self.held, device or self.device, dtype or (self.dtype if device is None else None))

    def _read(self, name: str, shape: torch.Size) -> Tensor:
        parts = parts_of(name)
        if parts is None or parts[1] not in self.held or not has_row_per_expert(name):
            return super()._read(name, shape)
        return super()._read(name, torch.Size([self._experts, *shape[1:]]))[list(self.held[parts[1]])]

    def shapes_of_all(self) -> dict[str, tuple[int, int]]:
        """In the whole model's order. Experts of a block are all of the same shape."""
        shapes: dict[str, tuple[int, int]] = {}
        names = list(self.linear_names())
        for name in names:
            place = expert_place(name)
            if place is None:
                shapes[name] = self.read_shape(name)
            elif place[1] == self.held[place[0]][0] and name not in shapes:  # once for all experts of a block
                before = name.partition(f".experts.{place[1]}.")[0]
                first = f"{before}.experts.{place[1]}."
                leaves = {one.removeprefix(first): self.read_shape(one) for one in names if one.startswith(first)}
                for number in range(self._experts):
                    shapes |= {f"{before}.experts.{number}.{leaf}": shape for leaf, shape in leaves.items()}
        return shapes


def write_reduced(checkpoint: Checkpoint, kept: KeptExperts, out: Path, texts: Mapping[str, str] | None = None) -> None:
    """Writes the plain model of some experts of a checkpoint, atomically, in its shards; an existing folder is replaced.

    Unlike ``checkpoint.over(kept_experts=…)``, the checkpoint may have overlays. Memory: one tensor.

    Args:
        kept: of each block that has experts, the numbers of those that stay, ascending; as many of each block.
        texts: text files to add, name -> content.
    """
    blocks = checkpoint.config.num_hidden_layers
    smaller = fewer_experts_config(checkpoint.plain_config(), checkpoint.config, len(next(iter(kept.values()))))
    shards = {shard: kept_tensors(names, kept, blocks) for shard, names in checkpoint.shards.items()}
    specs = {shard: {name: _spec(checkpoint, one) for name, one in sources.items()} for shard, sources in shards.items()}
    every = {name: source for sources in shards.values() for name, source in sources.items()}
    with atomic_folder(out, replace=True) as partial:
        write_plain(partial, checkpoint.path, specs, lambda name: _read(checkpoint, every[name]), smaller, texts or {})


def _spec(checkpoint: Checkpoint, source: Source) -> tuple[torch.Size, torch.dtype]:
    shape, dtype = checkpoint.spec(source.name)
    return (shape if source.rows is None else torch.Size([len(source.rows), *shape[1:]])), dtype


def _read(checkpoint: Checkpoint, source: Source) -> Tensor:
    tensor = checkpoint.read(source.name)
    return tensor if source.rows is None else tensor[list(source.rows)]
