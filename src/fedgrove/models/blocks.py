"""A language model's decoder blocks and their linears, accessed in the same way for all architectures.

A :class:`Decoder` is a model of the transformers library without weights. Its ends (embeddings, last norm, head) and its
blocks are loaded from a checkpoint when they are needed, and unloaded afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from fedgrove.errors import FedgroveError
from fedgrove.models.experts import legacy_name, unfuse
from fedgrove.models.linears import find_blocks, linears
from fedgrove.models.positions import positions
from fedgrove.models.pretrained import hollow_model, without_weights
from fedgrove.models.replaced_blocks import BlocksReached, Call, Head, hidden_of, replaced_blocks, wrapping_of
from fedgrove.models.shared import uses_of
from fedgrove.models.stream import Checkpoint
from fedgrove.models.ties import resolve_ties


class Decoder:
    """A causal language model that runs one block at a time.

    Hidden states are (windows, tokens, width).

    Args:
        checkpoint: holds the weights.
        device: where to compute.
        dtype: the dtype of computation; None: float32 on a CPU, the checkpoint's dtype on a GPU.

    Raises:
        FedgroveError: the architecture is unknown, or no decoder blocks are found in it.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device | str = "cpu", dtype: torch.dtype | None = None):
        self.checkpoint = checkpoint
        self.device = torch.device(device)
        self.dtype = dtype or (torch.float32 if self.device.type == "cpu" else None)
        stored = checkpoint.dtype or getattr(checkpoint.config, "dtype", None)
        with without_weights():
            self.model: nn.Module = hollow_model(self._config(), checkpoint.path, self.dtype or stored)
        self.model.eval()
        unfuse(self.model, checkpoint.config.model_type)
        self.prefix, self.blocks = find_blocks(self.model)
        self.ties, self.untied = resolve_ties(
            cast(Any, self.model).all_tied_weights_keys,
            lambda name: self.stored_name(name) in checkpoint,
            lambda one, other: checkpoint.same(self.stored_name(one), self.stored_name(other)),
        )
        self._ends = [name for name, _ in self.model.named_modules() if not f"{name}.".startswith(f"{self.prefix}.")]
        self._positions = positions(self.model, checkpoint.config)
        self._unloaded_ends: dict[str, nn.Parameter] = {}  # the meta parameters that the loaded ends replaced
        self._names: dict[int, dict[str, str]] = {}
        self._calls: tuple[tuple[int, int], list[Call]] | None = None
        self._wrap: Callable[[Tensor], Any] | None = None  # hidden states -> what a block returns; None: not known yet

    def _config(self) -> PretrainedConfig:
        """The configuration by which the model is made."""
        return self.checkpoint.config

    def again(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Decoder:
        """Another decoder of the same model, without weights; by default on the same device and in the same dtype."""
        return Decoder(self.checkpoint, device or self.device, dtype or (self.dtype if device is None else None))

    def __len__(self) -> int:
        return len(self.blocks)

    def block_names(self, index: int) -> dict[str, str]:
        """The linears of a block: their names in the block -> the names of their weights in the checkpoint."""
        if index not in self._names:  # cached: slow with hundreds of experts
            names = linears(self.blocks[index])
            self._names[index] = {name: self.stored_name(f"{self.prefix}.{index}.{name}.weight") for name in names}
        return self._names[index]

    def read_linear(self, index: int, name: str) -> Tensor:
        """The weight of a linear as (out, in), in the checkpoint's dtype."""
        return as_matrix(self.blocks[index].get_submodule(name), self.checkpoint.read(self.block_names(index)[name]))

    def blank_linear(self, index: int, name: str) -> Tensor:
        """The weight of a linear as a meta tensor (out, in): its shape and dtype, without reading it."""
        size, dtype = self.checkpoint.spec(self.block_names(index)[name])
        return as_matrix(self.blocks[index].get_submodule(name), torch.empty(size, dtype=dtype, device="meta"))

    def linear_names(self) -> dict[str, str]:
        """All linears of all blocks: their names in the model -> the names of their weights in the checkpoint.

        Linears that share a weight are there once, under the name of the first.
        """
        return {self.linear_name(i, name): stored for i in range(len(self)) for name, stored in self.block_names(i).items()}

    def linear_name(self, index: int, name: str) -> str:
        """The name in the model of a linear of a block; if blocks share its weight, that of the first linear that has it."""
        uses = self.shared_linears.get(self.block_names(index)[name])
        first, leaf = (index, name) if uses is None else uses[0]
        return f"{self.prefix}.{first}.{leaf}"

    @cached_property
    def shared_linears(self) -> dict[str, list[tuple[int, str]]]:
        """The weights that several linears share: their names in the checkpoint -> (block, linear) of each use, in order."""
        return uses_of(map(self.block_names, range(len(self)))) if self.checkpoint.shares else {}

    def read_matrix(self, linear: str) -> Tensor:
        """The weight of a linear, given its name in the model, as (out, in), in the checkpoint's dtype."""
        index, _, name = linear.removeprefix(f"{self.prefix}.").partition(".")
        return self.read_linear(int(index), name)

    def read_shape(self, linear: str) -> tuple[int, int]:
        """(out, in) of a linear, given its name in the model."""
        module = self.model.get_submodule(linear)
        num_out, num_in = as_matrix(module, cast(Tensor, module.weight)).shape
        return num_out, num_in

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every linear, by its name in the model."""
        return {name: self.read_shape(name) for name in self.linear_names()}

    def shapes_of_all(self) -> dict[str, tuple[int, int]]:
        """:meth:`linear_shapes` of the whole model, of which a decoder may have only some experts."""
        return self.linear_shapes()

    def load_all(self, change: Callable[[nn.Module], None] = lambda block: None, dtype: torch.dtype | None = None) -> nn.Module:
        """The full model with all its weights, which are frozen. Linears that share a weight become one module.

        Args:
            change: called with each block when it is loaded, for example to quantize it before the next one is loaded.
            dtype: of the parameters; None: the decoder's. Buffers keep the decoder's.
        """
        self._fill_ends(head=True, dtype=dtype)
        for index, block in enumerate(self.blocks):
            self._fill(block, f"{self.prefix}.{index}.", dtype=dtype)
            change(block)
            for name in self.block_names(index) if self.shared_linears else ():
                block.set_submodule(name, self.model.get_submodule(self.linear_name(index, name)))
        return self.model

    @contextmanager
    def loaded(self, index: int, weights: Mapping[str, Tensor] = MappingProxyType({})) -> Iterator[nn.Module]:
        """A block with its weights, which are freed on exit.

        Args:
            weights: by linear, (out, in): used instead of the checkpoint's.
        """
        with self._unloaded_afterwards(index) as block:
            self._fill(block, f"{self.prefix}.{index}.")
            for name, weight in weights.items():
                module = block.get_submodule(name)
                like = cast(nn.Parameter, module.weight)
                module.weight = nn.Parameter(as_matrix(module, weight).to(like.device, like.dtype), requires_grad=False)
            yield block

    @contextmanager
    def zeroed(self, index: int, dtype: torch.dtype = torch.float32) -> Iterator[nn.Module]:
        """A block with zeros as weights, to measure its memory without reading, or having, the weights."""
        with self._unloaded_afterwards(index) as block:
            for name, parameter in list(block.named_parameters()):
                zeros = torch.zeros(parameter.shape, device=self.device, dtype=dtype)
                self._put(block, name, nn.Parameter(zeros, requires_grad=False))
            yield block

    @contextmanager
    def _unloaded_afterwards(self, index: int) -> Iterator[nn.Module]:
        block = self.blocks[index]
        unloaded = list(block.named_parameters())
        try:
            yield block
        finally:
            for name, parameter in unloaded:
                self._put(block, name, parameter)

    def embed(self, ids: Tensor) -> tuple[Tensor, list[Call]]:
        """The input of the first block, (windows, tokens, width), and the other arguments of every block.

        Args:
            ids: (windows, tokens) token ids.

        Raises:
            FedgroveError: the model has no positions for so many tokens, or no row of the embedding for a token.
        """
        self._check_ids(ids)
        hidden, calls = self.begin(input_ids=ids.to(self.device), use_cache=False)
        if hidden.shape[:2] != ids.shape:  # ProphetNet has several for each, CPM-Ant some of a prompt besides
            raise self._other_type("does not have one vector of hidden states for each token")
        self._calls = (ids.shape[0], ids.shape[1]), calls
        return hidden, calls

    def begin(self, **inputs: Any) -> tuple[Tensor, list[Call]]:
        """:meth:`embed` for any arguments of the model, such as ``inputs_embeds`` and ``past_key_values``.

        Arguments are recorded per block, because masks and positions differ between blocks in some models (sliding windows).
        """
        calls: list[Call] = []
        first: list[Tensor] = []

        def record(index: int, hidden: Tensor, call: Call) -> Tensor:
            if index != len(calls):
                raise self._other_type(f"does not run its {len(self.blocks)} blocks one after the other, as fedgrove does")
            if index == 0:
                first.append(hidden)
            calls.append(call)
            if index == len(self.blocks) - 1:
                raise BlocksReached
            return hidden

        self._fill_ends(head=False)
        wrap = self._wrapping()
        with replaced_blocks(self.blocks, lambda *block: wrap(record(*block))), torch.no_grad(), suppress(BlocksReached):
            self.model(**inputs)
        return first[0], calls

    def _other_type(self, does: str) -> FedgroveError:
        return FedgroveError(f"model: type {self.checkpoint.config.model_type} {does}", "take a model of another type")

    def _check_ids(self, ids: Tensor) -> None:
        limit, is_hard = self._positions
        if is_hard and limit is not None and ids.shape[1] > limit:
            raise FedgroveError(
                f"length: a window has {ids.shape[1]} tokens, but the model has positions for {limit}",
                f"set it to at most {limit}",
            )
        rows = cast(Any, self.model).get_input_embeddings().weight.shape[0]
        largest = int(ids.max())
        if largest >= rows:
            raise FedgroveError(
                f"model: {self.checkpoint.path}: the tokenizer gives the id {largest}, but the embedding has only {rows} rows",
                "copy the tokenizer of this model",
            )

    def calls(self, windows: int, tokens: int) -> list[Call]:
        """The arguments of every block besides the hidden states, for a batch of (windows, tokens)."""
        if self._calls is None or self._calls[0] != (windows, tokens):
            return self.embed(torch.zeros(windows, tokens, dtype=torch.int64))[1]
        return self._calls[1]

    def forget_ends(self) -> None:
        """Frees the weights outside the blocks; they are read again when they are needed."""
        for name, unloaded in self._unloaded_ends.items():
            self._put(self.model, name, unloaded)
        self._unloaded_ends.clear()
        self._tie()

    def run(self, block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
        """The output of a loaded block; differentiable under ``torch.enable_grad``."""
        return hidden_of(block(hidden, *call[0], **call[1]))

    @property
    def head(self) -> Head:
        """What comes after the last block, loaded; differentiable as in :meth:`run`."""
        self._fill_ends(head=True)
        return Head(self.model, self.blocks, self._wrapping())

    def _wrapping(self) -> Callable[[Tensor], Any]:
        """Makes of hidden states what a block returns: the tensor, or a tuple that begins with it.

        Found out once, by running the first block with zeros as weights on two tokens. The ends must be loaded.
        """
        if self._wrap is not None:
            return self._wrap
        found: list[Any] = []

        def run(index: int, hidden: Tensor, call: Call) -> Tensor:
            with self.zeroed(0, hidden.dtype) as block:
                result = type(block).forward(block, hidden, *call[0], **call[1])
            found.append(result)
            first: Any = hidden_of(result)
            if not isinstance(first, Tensor) or first.shape != hidden.shape:
                raise self._other_type("has blocks that do not turn one tensor of hidden states into another")
            raise BlocksReached

        with replaced_blocks(self.blocks, run), torch.no_grad(), suppress(BlocksReached):
            self.model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=self.device), use_cache=False)
        self._wrap = wrapping_of(found[0])
        return self._wrap

    def _fill_ends(self, head: bool, dtype: torch.dtype | None = None) -> None:
        """Loads the modules outside the blocks that are not loaded yet; the head only if ``head``."""
        output = cast(Any, self.model).get_output_embeddings()
        for name in self._ends:
            module = self.model.get_submodule(name)
            parameters = dict(module.named_parameters(recurse=False))
            unloaded = not parameters or any(parameter.is_meta for parameter in parameters.values())
            if (head or module is not output) and unloaded:
                prefix = f"{name}." if name else ""
                self._unloaded_ends |= {prefix + leaf: value for leaf, value in parameters.items()}
                self._fill(module, prefix, recurse=False, dtype=dtype)
        self._tie()

    def _tie(self) -> None:
        """Lets tied parameters of the ends that are loaded share one tensor."""
        for pair in self.ties.items():
            values = {name: self.model.get_parameter(name) for name in pair}
            loaded = [value for value in values.values() if not value.is_meta]
            if loaded and not any(name.startswith(self.prefix + ".") for name in pair):
                for name, value in values.items():
                    if value.is_meta:
                        self._unloaded_ends.setdefault(name, value)
                    self._put(self.model, name, loaded[0])

    def _fill(self, module: nn.Module, prefix: str, recurse: bool = True, dtype: torch.dtype | None = None) -> None:
        for name, parameter in list(module.named_parameters(recurse=recurse)):
            stored = self.stored_name(self.source(prefix + name))
            if stored not in self.checkpoint:
                raise FedgroveError(f"model: {self.checkpoint.path} lacks the tensor {stored}; the copy is incomplete")
            value = self._read(stored, parameter.shape)
            value = value.to(dtype if value.is_floating_point() else None)
            self._put(module, name, nn.Parameter(value, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=recurse)):
            stored = self.stored_name(prefix + name)
            # Old checkpoints also hold causal masks, which models no longer save, in dtypes that no longer fit.
            read = stored in self.checkpoint and name in module.state_dict()
            self._put(module, name, self._read(stored, buffer.shape) if read else buffer.to(self.device))

    def _read(self, name: str, shape: torch.Size) -> Tensor:
        found = self.checkpoint.spec(name)[0]
        if found != shape:
            raise FedgroveError(f"model: {name} has shape {list(found)}, but config.json specifies {list(shape)}")
        value = self.checkpoint.read(name)
        return value.to(self.device, self.dtype if value.dtype.is_floating_point else None)

    @staticmethod
    def _put(module: nn.Module, name: str, value: Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, value)

    def stored_name(self, name: str) -> str:
        """The name in the checkpoint of a parameter's value, which may be a tensor that parameters share."""
        return self.checkpoint.shared_name(self.own_name(name))

    def own_name(self, name: str) -> str:
        """A parameter's own name in the checkpoint.

        The names in a model that was saved without its head lack a prefix; the head of GPT-NeoX and the experts of Mixtral have
        older names.
        """
        short = name.removeprefix(f"{self.model.base_model_prefix}.")
        names = (name, short, name.replace("lm_head.", "embed_out.", 1), legacy_name(name), legacy_name(short))
        return next((stored for stored in names if stored in self.checkpoint), name)

    def source(self, name: str) -> str:
        """The parameter whose stored value a parameter has: itself, or the one that it is tied to."""
        return self.ties.get(name, name)


def as_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """The weight as (out, in); GPT-2's Conv1D stores (in, out). The function is its own inverse."""
    return weight.T if isinstance(module, Conv1D) else weight
