"""Tells quantised checkpoints, whose linears are integers with scales and cannot be pruned or tuned."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedgrove.errors import FedgroveError

_KEYS = ("quantization_config", "compression_config")  # of config.json
_NAMES = (
    re.compile(  # what GPTQ, AWQ, bitsandbytes, compressed-tensors, FP8, MXFP4, HQQ and MLX store beside or instead of weights
        r"(.*\.)?(qweight|qzeros|g_idx|SCB|weight_format|weight_packed|weight_shape|weight_zero_point|weight_scale(_inv|_2)?"
        r"|(weight\.)?(nested_)?(absmax|quant_map)|weight\.quant_state\..*|.*_blocks|.*_scales|scales|W_q|codebooks|codes)"
    )
)
_EIGHTS = re.compile(r"F[468]_.*|F[468]")  # safetensors' names of floats with at most eight bits


def refuse_quantized(folder: Path, config: Mapping[str, Any], tensors: Iterable[tuple[str, str]]) -> None:
    """Refuses a quantised checkpoint.

    Args:
        folder: for the message.
        config: what config.json holds.
        tensors: name and safetensors' dtype of every tensor.

    Raises:
        FedgroveError: it is quantised; says by what that can be told.
    """
    for part in (config, config.get("text_config")):
        for key in _KEYS:
            if isinstance(part, Mapping) and part.get(key):
                raise _quantized(folder, f"config.json holds {key}")
    for name, dtype in tensors:
        if _NAMES.fullmatch(name):
            raise _quantized(folder, f"it holds the tensor {name}")
        if _EIGHTS.fullmatch(dtype) or (name.endswith(".weight") and dtype[0] in "IU"):
            raise _quantized(folder, f"{name} has dtype {dtype}")


def _quantized(folder: Path, why: str) -> FedgroveError:
    return FedgroveError(f"model: {folder} is quantised ({why})", "take the unquantised model")
