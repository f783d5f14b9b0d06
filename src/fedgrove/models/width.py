"""The widths of a model's blocks, the weights that belong to a channel or head, and the config.json after structured pruning.

A group is a set of weights that must be removed together: an MLP channel, which has a row in each linear that produces it and a
column in the linear that consumes it; or a key-value head with the query heads that share it and their columns of the output
projection (the coupled structures of LLM-Pruner; Ma et al., NeurIPS 2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import transformers
from torch import Tensor
from transformers import PretrainedConfig

from fedgrove.errors import FedgroveError
from fedgrove.job.stage_config import Cut


@dataclass(frozen=True)
class Width:
    """The widths of every block of a model.

    Attributes:
        channels: number of MLP channels.
        heads: number of groups of heads (a key-value head with its query heads).
    """

    channels: int
    heads: int

    def without(self, cut: Cut) -> Width:
        """The widths after structured pruning."""
        return Width(self.channels - Cut.whole(cut.channels, self.channels), self.heads - Cut.whole(cut.heads, self.heads))


@dataclass(frozen=True)
class CoupledLinears:
    """The linears of one kind of group, by their names in a block.

    Attributes:
        producers: their rows and biases belong to the groups, in the order of the groups.
        consumer: its columns belong to the groups.
    """

    producers: tuple[str, ...]
    consumer: str


@dataclass(frozen=True)
class Family:
    """An architecture.

    Attributes:
        channels: the linears of an MLP channel.
        key: the key of config.json with the number of channels.
        heads: the linears of a group of heads; None if config.json implies that heads × head size is the width.
    """

    channels: CoupledLinears
    key: str = "intermediate_size"
    heads: CoupledLinears | None = None


_GATED = CoupledLinears(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_LLAMA = Family(_GATED, heads=CoupledLinears(_QKV, "self_attn.o_proj"))
FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _LLAMA,
    "phi": Family(CoupledLinears(("mlp.fc1",), "mlp.fc2"), heads=CoupledLinears(_QKV, "self_attn.dense")),
    "opt": Family(CoupledLinears(("fc1",), "fc2"), "ffn_dim"),
    "gpt2": Family(CoupledLinears(("mlp.c_fc",), "mlp.c_proj"), "n_inner"),
    "gpt_neox": Family(CoupledLinears(("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h")),
}
_DIVISIBLE = ("llama", "gemma2")  # their configuration requires that the number of heads divides the width


def family_of(config: PretrainedConfig) -> Family:
    """The architecture of a model.

    Raises:
        FedgroveError: it is unknown which of its weights form groups.
    """
    if config.model_type not in FAMILIES:
        raise FedgroveError(
            f"model: structured pruning of channels or heads is not possible for type {config.model_type}, only for "
            f"{', '.join(FAMILIES)}",
            "prune instead, or cut experts or blocks if it is a mixture of experts",
        )
    return FAMILIES[config.model_type]


def width_of(config: PretrainedConfig) -> Width:
    """The widths of a model's blocks."""
    channels = getattr(config, family_of(config).key)
    return Width(channels or 4 * config.hidden_size, _kv_heads(config))  # GPT-2: null stands for four times the width


def narrower_config(raw: Mapping[str, Any], config: PretrainedConfig, width: Width) -> dict[str, Any]:
    """The config.json of a model after structured pruning.

    Llama's configuration requires that the number of heads divides the width of the model. If it does not, the model is
    described as a Mistral without a sliding window: the same computation with the same tensors, without this requirement.

    Args:
        raw: the current config.json.
        config: the same as parsed by transformers, with defaults filled in.
        width: of the new blocks.

    Raises:
        FedgroveError: a configuration of this architecture cannot express the width.
    """
    family, kind = family_of(config), config.model_type
    new = {**raw, family.key: width.channels}
    if width.heads == _kv_heads(config):
        return new
    if family.heads is None or getattr(config, "qk_layernorm", False):
        raise FedgroveError(
            f"heads: a configuration of type {kind} does not allow fewer heads", "set it to 0 and prune only channels"
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
            keep = f"keep {' or '.join(map(str, fits))} of the {_kv_heads(config)} groups of heads, or " if fits else ""
            raise FedgroveError(
                f"heads: a configuration of type {kind} does not allow {heads} heads, because they do not divide the width of "
                f"{config.hidden_size}",
                f"{keep}set it to 0",
            )
        defaults = {key: value for key, value in config.to_dict().items() if key in _MISTRAL_DEFAULTS and key not in raw}
        mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
        # without the version, transformers assumes a known bug of tokenizers of Mistral models from before version 5
        new |= defaults | mistral | {"transformers_version": transformers.__version__}
        if not raw.keys() & {"rope_theta", "rope_parameters"}:
            new["rope_parameters"] = config.rope_parameters
    return new


_MISTRAL_DEFAULTS = ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings", "rms_norm_eps", "hidden_act")


def group_sums(product: Tensor, number: int) -> Tensor:
    """Sums over each group of a consumer's inputs: (..., in) -> (..., number)."""
    return product.reshape(*product.shape[:-1], number, -1).sum(-1)


def rows_by_group(weight: Tensor, number: int) -> Tensor:
    """A producer's weight (out, in) by group: (number, rows of a group · in)."""
    return weight.reshape(number, -1)


def columns_by_group(weight: Tensor, number: int) -> Tensor:
    """A consumer's weight (out, in) by group: (number, out · columns of a group)."""
    return weight.reshape(len(weight), number, -1).transpose(0, 1).flatten(1)


def cut_rows(tensor: Tensor, number: int, keep: Tensor) -> Tensor:
    """The rows of a producer's weight (out, in) or bias (out,) that belong to the groups ``keep`` (indices) of ``number``."""
    return tensor.reshape(number, -1, *tensor.shape[1:])[keep].flatten(0, 1)


def cut_columns(weight: Tensor, number: int, keep: Tensor) -> Tensor:
    """The columns of a consumer's weight (out, in) that belong to the groups ``keep`` (indices) of ``number``."""
    return weight.reshape(len(weight), number, -1)[:, keep].flatten(1, 2)


def _kv_heads(config: PretrainedConfig) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
