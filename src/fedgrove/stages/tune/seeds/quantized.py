"""A model's weights in 8 or 4 bits, written out in float32 block by block: along a direction no bit of them changes.

Only weights are rounded. LLM.int8 also rounds what a linear reads, and differences of losses are smaller than that rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedgrove.stages.tune.frozen import hush, require_bitsandbytes

MOST_INT8 = 127


class Quantized:
    """A matrix in 8 bits, as whole multiples of a 127th of each row's largest entry (LLM.int8), or in 4 (NF4 of bitsandbytes).

    Zero is exact in both, so pruned weights stay zero.

    Args:
        matrix: (out, in).
        bits: 8 or 4.

    Raises:
        FedgroveError: 4 bits, but bitsandbytes is not installed.
    """

    def __init__(self, matrix: Tensor, bits: int):
        self._state: Any = None
        if bits == 8:
            self._scale = matrix.float().abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / MOST_INT8
            self._packed = (matrix.float() / self._scale).round().to(torch.int8)
            return
        require_bitsandbytes(bits)
        hush()
        from bitsandbytes.functional import quantize_4bit

        self._shape = matrix.shape
        # As a vector: on a CPU bitsandbytes writes out a matrix wrongly if its columns are no multiple of 64.
        self._packed, self._state = quantize_4bit(matrix.float().flatten(), quant_type="nf4")

    def matrix(self) -> Tensor:
        """(out, in) float32."""
        if self._state is None:
            return self._packed.float() * self._scale
        from bitsandbytes.functional import dequantize_4bit

        found: Tensor = dequantize_4bit(self._packed, self._state)
        return found.view(self._shape)
