"""Linears in 4 bits (NF4 with double quantization, QLoRA, Dettmers et al., NeurIPS 2023) with bitsandbytes; see ``int8``."""

from __future__ import annotations

from pathlib import Path

import torch

from fedgrove.errors import FedgroveError
from fedgrove.exports import Source, require
from fedgrove.exports.int8 import USE, losses, quantize
from fedgrove.models.blocks import Decoder
from fedgrove.models.stream import Checkpoint
from fedgrove.stages.tune.frozen import NF4_BLOCK

__all__ = ["EXACT", "USE", "WHAT", "losses", "write"]

WHAT = "linears in 4 bits (NF4)"
EXACT = False
RELATION = "quantized"


def write(source: Source, out: Path) -> None:
    """Quantizes the linears of the blocks; NF4 has a code for zero, so zeros stay zero.

    Raises:
        FedgroveError: bitsandbytes is missing, or a linear's number of inputs is no multiple of 64, which bitsandbytes computes
            wrongly or not at all on a CPU.
    """
    require("nf4", "quantize", "bitsandbytes")
    decoder = Decoder(Checkpoint(source.model))
    for name in decoder.linear_names():
        num_in = decoder.read_shape(name)[1]
        if num_in % NF4_BLOCK:
            raise FedgroveError(
                f"--to nf4: {name} has {num_in} inputs, and bitsandbytes needs a multiple of {NF4_BLOCK}", "use int8"
            )
    settings = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    }
    quantize("nf4", source, out, settings)
