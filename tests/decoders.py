"""Small random models of every type of transformers' ``AutoModelForCausalLM``, saved to disk."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from small import write_once

TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
LENGTH = 16
VOCABULARY = 4096  # of the shipped tokenizer
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads")
_WIDTHS = ("hidden_size", "n_embd", "d_model", "embedding_size", "dim_model", "hidden_dim")
_FF = ("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "dff", "n_inner", "ffn_hidden_size", "dim_ff")
_POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, **dict.fromkeys(_LAYERS, 3), **dict.fromkeys(_HEADS, 4), **dict.fromkeys(_WIDTHS, 32),
    **dict.fromkeys(_FF, 48), **dict.fromkeys(_POSITIONS, 64), **dict.fromkeys(_EXPERTS, 4), "num_key_value_heads": 2,
    "n_kv_heads": 2, "num_kv_heads": 2, "head_dim": 8, "kv_channels": 8, "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24, "num_experts_per_tok": 2, "num_experts_per_token": 2, "n_shared_experts": 1,
    "moe_k": 2, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "sliding_window": 8, "bos_token_id": 0, "eos_token_id": 0,
    "pad_token_id": 1, "attention_head_size": 8, "rotary_dim": 4, "dim_head": 8, "mamba_n_heads": 4, "mamba_d_head": 16,
    "mamba_d_ssm": 64, "ssm_state_size": 8, "mamba_d_state": 8, "mamba_num_heads": 4, "mamba_head_dim": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "time_step_rank": 4,
}  # fmt: skip
_LATENT = {"num_key_value_heads": 4, "head_dim": 8}  # as many heads of keys as of queries
BY_HAND: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "minicpm3", "youtu"),
        _LATENT,
    ),
    "dots3_note_text": _LATENT,
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]], "window_size": 8},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16]},
    "zaya": {"num_experts_per_tok": 1},
}


def small_config(kind: str, **changes: Any) -> PreTrainedConfig:
    """The default configuration of a type with small sizes; raises what transformers raises where these do not fit."""
    cls = CONFIG_MAPPING[kind]
    names = {field.name for field in dataclasses.fields(cls)}
    sizes = {key: value for key, value in SIZES.items() if key in names}
    return cls(**{**sizes, **BY_HAND.get(kind, {}), **changes})


def save_small(kind: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A random model in which no parameter is what the architecture would fill in by itself."""

    def write(target: Path) -> None:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(small_config(kind, **changes))
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        model.to(dtype).save_pretrained(target)

    return write_once((kind, dtype, *sorted(changes.items())), folder, write)


def windows(number: int = 2) -> list[Tensor]:
    """Windows of random tokens, (1, tokens) each."""
    random = torch.Generator().manual_seed(1)
    return [torch.randint(2, VOCABULARY, (1, LENGTH), generator=random) for _ in range(number)]


def plain_perplexity(folder: Path) -> float:
    """The perplexity of :func:`windows` by plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total = count = 0.0
    with torch.no_grad():
        for ids in windows():
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
            count += ids.numel() - 1
    return math.exp(total / count)
