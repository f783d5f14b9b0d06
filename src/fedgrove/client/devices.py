"""The accelerators of a client."""

from __future__ import annotations

import torch

from fedgrove.client.local_client import LocalClient
from fedgrove.errors import FedgroveError


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
