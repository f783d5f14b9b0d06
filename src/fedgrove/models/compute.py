"""The dtype in which text passes through a model."""

from __future__ import annotations

import torch

from fedgrove.job.units import ComputeDtype


def dtype_of(compute_dtype: ComputeDtype | None, device: str) -> torch.dtype | None:
    """The dtype of a forward pass on this machine; None: the decoder's default.

    "auto" is bfloat16 on a CPU that multiplies it natively, and else the default.
    """
    if compute_dtype == "auto":
        capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch do not say
        native = any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))
        return torch.bfloat16 if native and torch.device(device).type == "cpu" else None
    return getattr(torch, compute_dtype) if compute_dtype else None
