"""What a run needs of a model, checked before anything runs: parameters, positions, vocabulary, finite weights."""

from __future__ import annotations

import re
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from fedgrove.errors import FedgroveError
from fedgrove.models.blocks import Decoder
from fedgrove.models.experts import FUSED
from fedgrove.models.positions import positions
from fedgrove.models.stream import Checkpoint

NAMED = 3  # extra tensors that a note names
_OLD_BUFFERS = re.compile(r"(.*\.)?(inv_freq|masked_bias|attn\.bias|attention\.bias|position_ids|rotary_emb\..*)")


def check_parameters(decoder: Decoder) -> list[str]:
    """Compares every parameter of a model with the headers of its checkpoint, by name, shape and dtype; reads no weights.

    Returns:
        Notes, for example about tensors that the model does not use.

    Raises:
        FedgroveError: a tensor is missing, or has another shape or no floating-point dtype.
    """
    checkpoint, used = decoder.checkpoint, set()
    for name, parameter in decoder.model.named_parameters(remove_duplicate=False):
        stored = decoder.stored_name(decoder.source(name))
        used |= {stored, decoder.stored_name(name)}
        if stored not in checkpoint:
            raise FedgroveError(
                f"model: {checkpoint.path} lacks the tensor {stored}",
                "copy the model again; if the copy is complete, fedgrove does not know how this type is stored",
            )
        shape, dtype = checkpoint.spec(stored)
        if shape != parameter.shape:
            raise FedgroveError(
                f"model: {checkpoint.file_of(stored)}: {stored} has shape {list(shape)}, but config.json specifies "
                f"{list(parameter.shape)}",
                "copy config.json and weights of the same model",
            )
        if not dtype.is_floating_point:
            raise FedgroveError(
                f"model: {checkpoint.file_of(stored)}: {stored} has dtype {str(dtype).removeprefix('torch.')}; weights must be "
                "floating-point numbers",
                "take the unquantised model",
            )
    used |= {decoder.stored_name(name) for name, _ in decoder.model.named_buffers()}
    return [*_notes_on_ties(decoder), *_notes_on_extras(checkpoint, used)]


def check_length(decoder: Decoder, length: int, key: str) -> str | None:
    """Compares the tokens of a window with the model's positions.

    Args:
        length: tokens of a window.
        key: of the job, such as ``stages.0.length``.

    Returns:
        A note, if the model was trained with fewer tokens; None if there is nothing to say.

    Raises:
        FedgroveError: the model has no positions for so many tokens.
    """
    limit, is_hard = positions(decoder.model, decoder.checkpoint.config)
    if limit is None or length <= limit:
        return None
    if is_hard:
        raise FedgroveError(f"{key} = {length}, but the model has positions for {limit} tokens", f"set it to at most {limit}")
    return f"{key} = {length} is more than the {limit} tokens that the model was made for (max_position_embeddings)"


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, decoder: Decoder) -> None:
    """Compares the largest id that a tokenizer gives to text with the rows of the embedding.

    A padding token does not count: many tokenizers got one without a row, and windows are never padded.

    Raises:
        FedgroveError: the embedding has too few rows; names the token.
    """
    rows = cast(Any, decoder.model).get_input_embeddings().weight.shape[0]
    ids = tokenizer.get_vocab()
    if tokenizer.pad_token != tokenizer.eos_token:
        ids.pop(tokenizer.pad_token, None)
    token, largest = max(ids.items(), key=lambda item: item[1], default=("", -1))
    if largest >= rows:
        raise FedgroveError(
            f"model: {decoder.checkpoint.path}: the tokenizer gives {token!r} the id {largest}, but the embedding has only "
            f"{rows} rows",
            "copy the tokenizer of this model, or resize the embedding (resize_token_embeddings) and save it",
        )


def check_finite(checkpoint: Checkpoint) -> None:
    """Reads all weights once, tensor by tensor, and looks for NaN and infinity.

    Raises:
        FedgroveError: names the tensor and its file.
    """
    for name in checkpoint.names():
        tensor = checkpoint.read(name)
        if not tensor.is_floating_point() or torch.isfinite(tensor).all():
            continue
        file = checkpoint.file_of(name)
        as_stored = Checkpoint(
            checkpoint.path,
            None,
            checkpoint.overlays,
            kept_blocks=checkpoint.kept_blocks,
            kept_experts=checkpoint.kept_experts,
        ).read(name)
        if torch.isfinite(as_stored).all():
            dtype = str(checkpoint.dtype).removeprefix("torch.")
            raise FedgroveError(f"model.dtype: {name} in {file} is too large for {dtype}", 'set it to "auto"')
        raise FedgroveError(f"model: {file}: {name} holds NaN or infinity", "copy the model again")


def _notes_on_ties(decoder: Decoder) -> list[str]:
    return [
        f"config.json ties {target} to {source}, but both are stored and differ; they stay untied, as transformers loads them"
        for target, source in decoder.untied
    ]


def _notes_on_extras(checkpoint: Checkpoint, used: set[str]) -> list[str]:
    extras = [name for name in checkpoint.names() if name not in used and not _OLD_BUFFERS.fullmatch(name)]
    extras = [name for name in extras if name.rpartition(".")[2] not in FUSED or len(checkpoint.spec(name)[0]) != 3]
    if not extras:
        return []
    more = f" and {len(extras) - NAMED} more" if len(extras) > NAMED else ""
    return [f"the model does not use {', '.join(extras[:NAMED])}{more}; the result holds them unchanged"]
