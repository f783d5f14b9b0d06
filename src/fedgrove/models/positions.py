"""How many tokens a model has positions for."""

from __future__ import annotations

import re

from torch import Tensor, nn
from transformers import PretrainedConfig

_NAMES = re.compile(r"pos|wpe", re.IGNORECASE)
_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length", "n_ctx")
_BUILT = ("mpt",)  # builds its biases for as many tokens as config.json says


def positions(model: nn.Module, config: PretrainedConfig) -> tuple[int | None, bool]:
    """How many tokens a window may have.

    Args:
        model: its modules and buffers; weights are not needed.
        config: of the model.

    Returns:
        The number; None: any. And whether it is hard: positions come from a table, so that a longer window fails. Otherwise
        the model was trained with so many tokens, and computes beyond that too.
    """
    tables = [
        _rows(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and _NAMES.search(name.rpartition(".")[2])
    ]
    tables += [len(buffer) for name, buffer in model.named_buffers() if _is_table(name.rpartition(".")[2], buffer)]
    if tables:
        return min(tables), True
    text_config = config.get_text_config()
    limits = [value for key in _LIMITS if isinstance(value := getattr(text_config, key, None), int) and value > 0]
    return (limits[0], config.model_type in _BUILT) if limits else (None, False)


def _rows(table: nn.Embedding) -> int:
    """The rows of a table that stand for positions; OPT's begins with two others, RoBERTa's with those up to the padding."""
    offset = getattr(table, "offset", None)
    if offset is None and table.padding_idx is not None:
        offset = table.padding_idx + 1
    return table.num_embeddings - int(offset or 0)


def _is_table(name: str, buffer: Tensor) -> bool:
    """Whether a buffer holds one row per position, as in GPT-J."""
    return buffer.dim() == 2 and _NAMES.search(name) is not None and "position_ids" not in name
