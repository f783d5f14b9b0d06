"""What is made of a client's text once and stored on its disk, such as windows as int32; and its copy of the model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fedgrove.client.local_client import LocalClient
from fedgrove.data import windows as packed
from fedgrove.data.sources import DEFAULT_TEMPLATE, facts_of
from fedgrove.errors import FedgroveError
from fedgrove.job.units import ComputeDtype
from fedgrove.models.blocks import Decoder
from fedgrove.models.compute import dtype_of
from fedgrove.models.expert_cut import KeptExperts
from fedgrove.models.held import HeldDecoder
from fedgrove.models.stream import Checkpoint
from fedgrove.models.tensor_files import save_tensors

WINDOWS = "windows"  # the beginning of the names of files with windows


def calibration_windows(client: LocalClient, samples: int, length: int, seed: str) -> Tensor:
    """Windows that a client calibrates on; for a client with ``owners``, their windows one after the other.

    Args:
        samples: number of windows; length: tokens per window.
        seed: draws the windows, together with the client's name, so they do not depend on the order of clients.

    Returns:
        (samples, length) int64 token ids.

    Raises:
        FedgroveError: a file cannot be read, or there are too few tokens; names the client.
    """
    if client.owners:
        wanted = [owner.capabilities.get("samples") for owner in client.owners]
        each = (samples - sum(filter(None, wanted))) // max(1, wanted.count(None))
        return torch.cat(
            [calibration_windows(owner, own or each, length, seed) for owner, own in zip(client.owners, wanted, strict=True)]
        )
    seed = f"{seed}/{client.name}"

    def cut() -> dict[str, Tensor]:
        windows = packed.calibration_windows(client.data, client.text, _tokenizer(client.model), samples, length, seed)
        return {"ids": windows.int()}

    return made_once(client, WINDOWS, [client.text, samples, length, seed], cut)["ids"].long()


def held_out_windows(client: LocalClient, samples: int, length: int, seed: str, number: int) -> Tensor:
    """Windows that :func:`calibration_windows` of the same samples, length and seed does not use.

    Args:
        number: how many.

    Returns:
        (number, length) int64 token ids.

    Raises:
        FedgroveError: a file cannot be read, or there are too few tokens; names the client.
    """
    seed = f"{seed}/{client.name}"

    def cut() -> dict[str, Tensor]:
        windows = packed.held_out_windows(client.data, client.text, _tokenizer(client.model), samples, length, seed, number)
        return {"ids": windows.int()}

    return made_once(client, WINDOWS, [client.text, samples, length, seed, number], cut)["ids"].long()


def training_windows(client: LocalClient, length: int) -> tuple[Tensor, Tensor]:
    """All windows of a client's text: token ids and labels, (windows, length) int64 each."""
    if client.owners:
        owned = [training_windows(owner, length) for owner in client.owners]
        return torch.cat([ids for ids, _ in owned]), torch.cat([labels for _, labels in owned])
    templates = {"text": client.text or DEFAULT_TEMPLATE}
    if client.prompt and client.answer:
        templates = {"prompt": client.prompt, "answer": client.answer}

    def cut() -> dict[str, Tensor]:
        ids, labels = packed.training_windows(client.data, templates, _tokenizer(client.model), length)
        return {"ids": ids.int(), "labels": labels.int()}

    windows = made_once(client, WINDOWS, [templates, length], cut)
    return windows["ids"].long(), windows["labels"].long()


def made_once(client: LocalClient, name: str, settings: list[Any], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors that are made of a client's text and its model once, and stored on its disk.

    Args:
        name: the beginning of the file's name.
        settings: what else they depend on, as JSON can hold it.
        make: makes them.

    Raises:
        FedgroveError: its text or its model cannot be read, or ``make`` raises one; names the client.
    """
    try:
        files = [facts_of(path) for path in client.data]
        facts = json.dumps([files, settings, checkpoint_of(client).fingerprint()], sort_keys=True)
        file = client.folder / f"{name}-{hashlib.sha256(facts.encode()).hexdigest()[:16]}.safetensors"
        if not file.is_file():
            save_tensors(make(), file)
    except FedgroveError as error:
        raise client.error(error.what, error.remedy) from error
    stored: dict[str, Tensor] = load_file(file)
    return stored


def templates_of_answers(client: LocalClient, what: str) -> tuple[str, str]:
    """The templates of a client's records and of what should follow them.

    Args:
        what: what follows, such as "labels", for the error.

    Raises:
        FedgroveError: the client has none.
    """
    if client.prompt is None or client.answer is None:
        raise client.error(f"its records have no {what}", "give prompt and answer in its part of the job, or in site.toml")
    return client.prompt, client.answer


def checkpoint_of(client: LocalClient) -> Checkpoint:
    """The client's own copy of the model."""
    return _checkpoint(client.model, client.dtype, tuple(sorted(client.shares.items())))


def decoder_of(
    client: LocalClient,
    device: str,
    compute_dtype: ComputeDtype | None = None,
    kept_blocks: tuple[int, ...] | None = None,
    kept_experts: KeptExperts | None = None,
) -> Decoder:
    """The client's copy of the model, run block by block; see :func:`latest_decoder`.

    Args:
        compute_dtype: see :class:`~fedgrove.models.blocks.Decoder`.
        kept_blocks, kept_experts: see :class:`~fedgrove.models.stream.Checkpoint`.
    """
    checkpoint = checkpoint_of(client)
    if kept_blocks is not None or kept_experts is not None:
        checkpoint = checkpoint.over(kept_blocks=kept_blocks, kept_experts=kept_experts)
    return latest_decoder(checkpoint, device, dtype_of(compute_dtype, device))


def latest_decoder(
    checkpoint: Checkpoint,
    device: str,
    dtype: torch.dtype | None = None,
    same: Hashable = None,
    held: KeptExperts | None = None,
) -> Decoder:
    """A decoder that stays in memory between requests, until one of another model, device or dtype is needed.

    So a process holds one decoder, together with what was loaded for it.

    Args:
        checkpoint: the model.
        device, dtype: as for :class:`~fedgrove.models.blocks.Decoder`.
        same: identifies what the overlays hold; None: the folders in which they are.
        held: the experts that it has; None: all.
    """
    experts = None if held is None else tuple(sorted(held.items()))
    key = (checkpoint.facts(), checkpoint.overlays if same is None else same, device, dtype, experts)
    latest = _latest.get(key)
    if latest is None or not all(overlay.is_dir() for overlay in latest.checkpoint.overlays):  # of a client that is gone
        _latest.clear()  # before another one takes memory
        latest = Decoder(checkpoint, device, dtype) if held is None else HeldDecoder(checkpoint, held, device, dtype)
        _latest[key] = latest
    return latest


_latest: dict[Hashable, Decoder] = {}


@lru_cache(maxsize=1)
def _checkpoint(model: Path, dtype: torch.dtype | None, shares: tuple[tuple[str, str], ...]) -> Checkpoint:
    return Checkpoint(model, dtype, shares=dict(shares))


@lru_cache(maxsize=1)
def _tokenizer(model: Path) -> PreTrainedTokenizerBase:
    return Checkpoint(model).tokenizer()
