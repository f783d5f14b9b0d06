"""What a run needs of a model, checked before anything runs: parameters, positions, vocabulary, finite weights."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fedgrove.errors import FedgroveError
from fedgrove.models.blocks import Decoder
from fedgrove.models.cost import count_parameters
from fedgrove.models.depth import parts_of, place_of
from fedgrove.models.experts import FUSED
from fedgrove.models.positions import positions
from fedgrove.models.pretrained import shares_of
from fedgrove.models.shared import SHARES
from fedgrove.models.stream import Checkpoint
from fedgrove.models.tensor_files import raw_bytes

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
        used |= {stored, decoder.stored_name(name), decoder.own_name(name)}
        if stored not in checkpoint:
            raise FedgroveError(f"model: {checkpoint.path} lacks the tensor {stored}", _remedy(checkpoint, stored))
        shape, dtype = checkpoint.spec(stored)
        own = decoder.own_name(name)
        if shape != parameter.shape and own in checkpoint.shares:
            raise FedgroveError(
                f"model.shares: {own} has shape {list(parameter.shape)}, but {stored}, which it is to share, has {list(shape)}",
                "remove it from shares",
            )
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
    _check_shares(decoder, used)
    used |= {decoder.stored_name(name) for name, _ in decoder.model.named_buffers()}
    return [*_notes_on_shares(decoder), *_notes_on_ties(decoder), *_notes_on_extras(checkpoint, used)]


def _remedy(checkpoint: Checkpoint, missing: str) -> str:
    """What to do about a tensor that is missing."""
    parts = parts_of(missing)
    twins = [name for name in checkpoint.names() if parts is not None and (parts_of(name) or ())[::2] == parts[::2]]
    if not twins:
        return "copy the model again; if the copy is complete, fedgrove does not know how this type is stored"
    return f'copy the model again; if its blocks share one tensor, say so in the job: [model.shares] "{missing}" = "{twins[0]}"'


def _check_shares(decoder: Decoder, used: Collection[str]) -> None:
    """Whether parameters can share tensors as it is declared.

    Args:
        used: the names, as they would be stored, of all parameters.

    Raises:
        FedgroveError: a name is no parameter; or a linear of a block shares its weight with something else, or not its bias.
    """
    checkpoint = decoder.checkpoint
    for name, stored in checkpoint.shares.items():
        if name not in used:
            raise FedgroveError(f"model.shares: {name} is no parameter of the model", "remove it from shares, or correct it")
        if checkpoint.copy_differs(name):
            raise FedgroveError(
                f"model.shares: {name} and {stored} are both stored, and differ, so they are not one tensor",
                "remove it from shares, or copy the model again",
            )
    outside = {
        decoder.stored_name(name) for name, _ in decoder.model.named_parameters() if not name.startswith(f"{decoder.prefix}.")
    }
    for stored, uses in decoder.shared_linears.items():
        biases = {decoder.stored_name(f"{decoder.prefix}.{block}.{name}.bias") for block, name in uses}
        modules = [decoder.blocks[block].get_submodule(name) for block, name in uses]
        if stored in outside or (any(getattr(one, "bias", None) is not None for one in modules) and len(biases) > 1):
            other = "a tensor outside the blocks" if stored in outside else "its weight, but not its bias,"
            raise FedgroveError(
                f"model.shares: {decoder.linear_name(*uses[-1])} shares {other} and a linear is pruned and tuned as a whole",
                "share all of it, among linears of blocks",
            )


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
    for _ in _finite(checkpoint, checkpoint.names()):
        pass


def find_equal(checkpoint: Checkpoint) -> dict[str, str]:
    """Matrices of blocks that are equal, bit for bit, and are not declared as shared: name -> the first of the same bits.

    A matrix whose entries are all equal, such as one of zeros, counts as equal to none. Reads all weights once, as
    :func:`check_finite` does.

    Raises:
        FedgroveError: as :func:`check_finite`.
    """
    first: dict[tuple[str, ...], str] = {}
    equal = {}
    for name, tensor in _finite(checkpoint, sorted(checkpoint.names(), key=place_of)):
        if parts_of(name) is None or tensor.dim() < 2 or checkpoint.shared_name(name) != name:
            continue
        if bool((tensor == tensor.flatten()[0]).all()):
            continue
        key = (hashlib.sha256(raw_bytes(tensor)).hexdigest(), str(tensor.shape), str(tensor.dtype))
        if key in first:
            equal[name] = first[key]
        first.setdefault(key, name)
    return equal


def _finite(checkpoint: Checkpoint, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    for name in names:
        tensor = checkpoint.read(name)
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            file = checkpoint.file_of(name)
            if torch.isfinite(checkpoint.as_stored().read(name)).all():
                dtype = str(checkpoint.dtype).removeprefix("torch.")
                raise FedgroveError(f"model.dtype: {name} in {file} is too large for {dtype}", 'set it to "auto"')
            raise FedgroveError(f"model: {file}: {name} holds NaN or infinity", "copy the model again")
        yield name, tensor


def check_for_others(checkpoint: Checkpoint) -> None:
    """Whether plain transformers gets all tensors of a model, which it does not learn of a job.

    Raises:
        FedgroveError: some are stored under another name, and only the job says so.
    """
    known = shares_of(checkpoint.path)
    missing = next((name for name in checkpoint.shares if not checkpoint.has_copy(name) and name not in known), None)
    if missing is not None:
        raise FedgroveError(
            f"evaluate: speed, tasks and prompts take the whole model, but only the job says what {missing} is",
            f"write the table model.shares to {checkpoint.path / SHARES}, as a JSON object",
        )


def _notes_on_shares(decoder: Decoder) -> list[str]:
    if not decoder.checkpoint.shares:
        return []
    each, unique = sum(parameter.numel() for parameter in decoder.model.parameters()), count_parameters(decoder)
    tensors = len(set(decoder.checkpoint.shares.values()))
    return [
        f"{len(decoder.checkpoint.shares) + tensors} parameters share {tensors} tensors: the model has {unique:,} numbers, and "
        f"would have {each:,} if it shared none; a shared tensor is pruned once and tuned once"
    ]


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
