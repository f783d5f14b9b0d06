"""The accelerators of a client, and the dtype in which it computes."""

from __future__ import annotations

import torch

from fedgrove.client.local_client import LocalClient
from fedgrove.errors import FedgroveError
from fedgrove.job.units import ComputeDtype


def other_devices(client: LocalClient, first: torch.device) -> list[torch.device]:
    """The client's devices after ``first``, as many as its capability ``devices`` says in all.

    An empty list on a CPU, where one copy of the model uses all cores.

    Raises:
        FedgroveError: the machine has fewer devices.
    """
    number = int(client.capabilities.get("devices", 1))
    if first.type == "cpu":
        return []
    start, present = first.index or 0, torch.get_device_module(first).device_count()
    if start + number > present:
        raise FedgroveError(f"devices = {number}, but from {first} on there are {present - start}", "fix clients.devices")
    return [torch.device(first.type, start + i) for i in range(1, number)]


def dtype_of(compute_dtype: ComputeDtype | None, device: str) -> torch.dtype | None:
    """The dtype of a calibration pass on this machine; None: the decoder's default.

    "auto" is bfloat16 on a CPU that multiplies it natively, and else the default.
    """
    if compute_dtype == "auto":
        capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch do not say
        native = any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))
        return torch.bfloat16 if native and torch.device(device).type == "cpu" else None
    return getattr(torch, compute_dtype) if compute_dtype else None
