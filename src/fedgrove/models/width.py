"""How wide the blocks of a model are, which weights belong to one channel or head, and the config.json of narrower ones.

A group is what can only be cut as a whole: an MLP channel, with its row in the linears that make it and its column in the
linear that reads it; or a key-value head, with the query heads that share it and their columns of the output projection
(the coupled structures of LLM-Pruner; Ma et al., NeurIPS 2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import transformers
from torch import Tensor
from transformers import PretrainedConfig

from fedgrove.errors import FedgroveError


@dataclass(frozen=True)
class Width:
    """What every block of a model has: MLP channels, and groups of heads (key-value heads with their query heads)."""

    channels: int
    heads: int


@dataclass(frozen=True)
class Part:
    """The linears of one kind of group, by their names in a block.

    Attributes:
        makers: lose rows (and entries of their biases), group after group.
        reader: loses columns.
    """

    makers: tuple[str, ...]
    reader: str


@dataclass(frozen=True)
class Family:
    """An architecture.

    Attributes:
        channels: the linears of an MLP channel.
        key: of config.json: the number of channels.
        heads: the linears of a group of heads; None where config.json cannot say that heads × head size is not the width.
    """

    channels: Part
    key: str = "intermediate_size"
    heads: Part | None = None


_GATED = Part(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")
_LLAMA = Family(_GATED, heads=Part(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.o_proj"))
FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _LLAMA,
    "phi": Family(
        Part(("mlp.fc1",), "mlp.fc2"),
        heads=Part(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.dense"),
    ),
    "opt": Family(Part(("fc1",), "fc2"), "ffn_dim"),
    "gpt2": Family(Part(("mlp.c_fc",), "mlp.c_proj"), "n_inner"),
    "gpt_neox": Family(Part(("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h")),
}
_DIVISIBLE = ("llama", "gemma2")  # whose configuration is refused where the width is no multiple of the number of heads


def family_of(config: PretrainedConfig) -> Family:
    """The architecture of a model.

    Raises:
        FedgroveError: it is not known which of its weights belong together.
    """
    if config.model_type not in FAMILIES:
        raise FedgroveError(
            f"model: blocks of type {config.model_type} cannot be narrowed, those of {', '.join(FAMILIES)} can", "prune instead"
        )
    return FAMILIES[config.model_type]


def width_of(config: PretrainedConfig) -> Width:
    """How wide the blocks of a model are."""
    channels = getattr(config, family_of(config).key)
    return Width(channels or 4 * config.hidden_size, _kv_heads(config))  # GPT-2 writes null for four times its width


def narrowed(raw: Mapping[str, Any], config: PretrainedConfig, width: Width) -> dict[str, Any]:
    """The config.json of a model whose blocks are narrower.

    Llama's configuration wants the number of heads to divide the width of the model. Where it does not, the model is
    described as a Mistral without a sliding window: the same computation, tensor for tensor, without that wish.

    Args:
        raw: config.json as it is.
        config: the same as transformers understands it, defaults filled in.
        width: of the new blocks.

    Raises:
        FedgroveError: no configuration of this architecture says so.
    """
    family, kind = family_of(config), config.model_type
    new = {**raw, family.key: width.channels}
    if width.heads == _kv_heads(config):
        return new
    if family.heads is None or getattr(config, "qk_layernorm", False):
        raise FedgroveError(
            f"heads: a configuration of type {kind} has no heads to spare", "set it to 0 and cut channels alone"
        )
    queries = config.num_attention_heads // _kv_heads(config)
    heads = queries * width.heads
    new |= {
        "num_attention_heads": heads,
        "num_key_value_heads": width.heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    }
    if kind in _DIVISIBLE and config.hidden_size % heads:
        if kind != "llama" or config.attention_bias or config.mlp_bias:
            fits = [n for n in range(1, _kv_heads(config)) if config.hidden_size % (queries * n) == 0]
            raise FedgroveError(
                f"heads: a configuration of type {kind} cannot say {heads} heads at a width of {config.hidden_size}, which is "
                "no multiple of it",
                f"of {_kv_heads(config)} groups of heads {_any_of(fits)} may stay, or set it to 0",
            )
        given = {key: value for key, value in config.to_dict().items() if key in _MISTRAL_DEFAULTS and key not in raw}
        mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
        # transformers takes the tokenizer of a Mistral that was written before version 5 for one with a known fault
        new |= given | mistral | {"transformers_version": transformers.__version__}
        if not raw.keys() & {"rope_theta", "rope_parameters"}:
            new["rope_parameters"] = config.rope_parameters
    return new


_MISTRAL_DEFAULTS = ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings", "rms_norm_eps", "hidden_act")


def group_sums(product: Tensor, number: int) -> Tensor:
    """What belongs to each group of a reader's inputs, added up: (..., in) -> (..., number)."""
    return product.reshape(*product.shape[:-1], number, -1).sum(-1)


def cut_rows(tensor: Tensor, number: int, kept: Tensor) -> Tensor:
    """A maker's weight (out, in) or bias (out,) with the kept of its ``number`` groups of rows."""
    return tensor.reshape(number, -1, *tensor.shape[1:])[kept].flatten(0, 1)


def cut_columns(weight: Tensor, number: int, kept: Tensor) -> Tensor:
    """A reader's weight (out, in) with the kept of its ``number`` groups of columns."""
    return weight.reshape(len(weight), number, -1)[:, kept].flatten(1, 2)


def _kv_heads(config: PretrainedConfig) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _any_of(numbers: list[int]) -> str:
    return " or ".join(map(str, numbers)) if numbers else "none"
