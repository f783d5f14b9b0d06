"""Measures a client's speed: a forward and a backward pass through one block."""

from __future__ import annotations

import json
import time

import torch

from fedgrove.client.local_client import LocalClient
from fedgrove.client.windows import checkpoint_of
from fedgrove.models.blocks import Decoder
from fedgrove.models.linears import linears
from fedgrove.rounds.capabilities import SPEED

TOKENS = 512
TRIES = 3


def block_speed(decoder: Decoder) -> float:
    """The speed of a forward and a backward pass through one frozen block: the best of three tries.

    Returns:
        Operations per second, 4 per token and weight, relative to :data:`fedgrove.rounds.capabilities.SPEED`.
    """
    hidden, calls = decoder.embed(torch.zeros(1, TOKENS, dtype=torch.int64))
    fastest = float("inf")
    with decoder.loaded(0) as block, torch.enable_grad():
        weights = sum(p.numel() for module in linears(block).values() for p in module.parameters() if p.dim() > 1)
        for _ in range(TRIES):
            begun = time.perf_counter()
            entering = hidden.detach().clone().requires_grad_()
            result = block(entering, *calls[0][0], **calls[0][1])
            (result[0] if isinstance(result, tuple) else result).sum().backward()
            if decoder.device.type == "cuda":
                torch.cuda.synchronize(decoder.device)
            fastest = min(fastest, time.perf_counter() - begun)
    return 4 * TOKENS * weights / fastest / SPEED


def measured_speed(client: LocalClient, device: str) -> float:
    """The speed of a client, measured once and stored on its disk, so that a plan can be repeated."""
    file = client.folder / "speed.json"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(block_speed(Decoder(checkpoint_of(client), device))), encoding="utf-8")
    return float(json.loads(file.read_text(encoding="utf-8")))
