"""The frozen model of a client that tunes: completely in memory, with quantized linears."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Hashable
from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fedgrove.errors import FedgroveError
from fedgrove.models.blocks import Decoder, as_matrix
from fedgrove.models.linears import linears

NF4_BLOCK = 64  # entries of a weight that have one scale

_kept: WeakKeyDictionary[Decoder, tuple[Hashable, nn.Module]] = WeakKeyDictionary()


def load_again(decoder: Decoder, bits: int, attached: Hashable) -> nn.Module:
    """As :func:`load`, but the same model for the same arguments, as long as the decoder exists.

    Reading a model and attaching adapters takes as long as some training steps, in every round.

    Args:
        attached: what will be attached. The model comes back with that, whose values are to be replaced; the weights
            themselves must not be changed.
    """
    key = (bits, attached)
    if decoder not in _kept or _kept[decoder][0] != key:
        _kept[decoder] = key, load(decoder, bits)
    return _kept[decoder][1]


def load(decoder: Decoder, bits: int) -> nn.Module:
    """Loads a decoder's full model, frozen, with weights of ``bits`` bits; the decoder itself stays without weights.

    32 and 16 mean float32 and bfloat16 for all weights. 8 (LLM.int8) and 4 (NF4) are bitsandbytes' formats for the
    linears of the blocks; all other weights are bfloat16, and on a CPU also a linear that should have 4 bits and whose number
    of inputs is no multiple of ``NF4_BLOCK``: there bitsandbytes' product is another matrix's. Both formats represent zero
    exactly, so pruned weights stay zero.

    Args:
        bits: 32, 16, 8 or 4.

    Raises:
        FedgroveError: 8 or 4 bits, but bitsandbytes is not installed.
    """
    _kept.clear()  # there is memory for one model
    decoder = decoder.again()
    dtype = torch.float32 if bits == 32 else torch.bfloat16
    if bits < 16:
        require_bitsandbytes(bits)

    def quantize(block: nn.Module) -> None:
        for name, module in linears(block).items():
            block.set_submodule(name, _quantized(module, bits, dtype, decoder.device))

    model = decoder.load_all(quantize, dtype) if bits < 16 else decoder.load_all(dtype=dtype)
    for flag in ("is_loaded_in_8bit", "is_loaded_in_4bit"):  # peft chooses its adapter classes by these flags
        setattr(model, flag, flag == f"is_loaded_in_{bits}bit")
    return model.requires_grad_(False)


def _quantized(module: nn.Module, bits: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
    hush()
    import bitsandbytes

    weight = as_matrix(module, cast(Tensor, module.weight).data).contiguous()
    num_out, num_in = weight.shape
    if bits == 4 and device.type == "cpu" and num_in % NF4_BLOCK:
        return module
    has_bias = getattr(module, "bias", None) is not None
    if bits == 8:
        small = bitsandbytes.nn.Linear8bitLt(num_in, num_out, has_bias, has_fp16_weights=False, device="meta")
        small.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        small = bitsandbytes.nn.Linear4bit(num_in, num_out, has_bias, dtype, quant_type="nf4", device="meta")
        small.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    if has_bias:
        small.bias = nn.Parameter(cast(Tensor, module.bias).data, requires_grad=False)
    return cast(nn.Module, small.to(device))


def require_bitsandbytes(bits: int) -> None:
    """Checks that bitsandbytes, an optional extra, is installed.

    Raises:
        FedgroveError: it is not.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise FedgroveError(f'bits = {bits} needs bitsandbytes: pip install "fedgrove[quantize]"', "or remove it from bits")


def hush() -> None:
    """Silences bitsandbytes, which logs warnings on import; peft imports it if it is installed."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
