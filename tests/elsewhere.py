"""A second device on any machine: its tensors lie in the CPU's memory, but meet those of the CPU as little as a GPU's do.

torch calls the device ``lazy:0``; no build of torch computes on it by itself. What a GPU refuses is refused here too: an
operation on tensors of both, ``numpy()``, an ``out=`` elsewhere. Numbers are the CPU's, so a job gives the same bits on both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = "lazy:0"
COPIES = ("aten::copy_", "aten::_to_copy")
BY_INDEX = ("aten::index", "aten::_index_put", "aten::_unsafe_index")  # a GPU's tensor may be indexed by the CPU's


class Elsewhere(Tensor):
    """A tensor of the second device."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # else every function of torch passes through Python first

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        made: Elsewhere = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype, device=DEVICE,
            requires_grad=inner.requires_grad,
        )  # fmt: skip
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(function, args, kwargs or {})


class _Machine(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(function, args, kwargs or {})


def _made_there(function: Any) -> Any:
    """``torch.tensor`` and its like, which make their tensor where no mode of dispatch sees it."""

    def made(*args: Any, device: Any = None, **kwargs: Any) -> Any:
        tensor = function(*args, **kwargs)
        return tensor if device is None else tensor.to(device)

    return made


@contextmanager
def second_device() -> Iterator[str]:
    """Gives the name of the device; it exists in this thread until the end of the block."""
    with pytest.MonkeyPatch.context() as patch, _Machine():
        for name in ("tensor", "as_tensor", "asarray"):
            patch.setattr(torch, name, _made_there(getattr(torch, name)))
        patch.setattr(torch, "lazy", SimpleNamespace(device_count=lambda: 1), raising=False)
        patch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # some builds of torch know no autocast of this device
        yield DEVICE


def _call(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in _leaves([*args, *kwargs.values()]) if isinstance(leaf, Tensor)]
    there = {id(tensor.inner): tensor for tensor in tensors if isinstance(tensor, Elsewhere)}
    device = kwargs.get("device")
    if not there and device is None:
        return function(*args, **kwargs)
    here = [tensor for tensor in tensors if not isinstance(tensor, Elsewhere) and tensor.dim() and not tensor.is_meta]
    name: str = function.name()
    goes_there = bool(there)
    if there and here and name not in COPIES and not name.startswith(BY_INDEX):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {DEVICE} and cpu in {name}")
    if name == "aten::copy_":
        goes_there = isinstance(args[0], Elsewhere)
    if device is not None:
        goes_there = torch.device(device) == torch.device(DEVICE)
        kwargs = {**kwargs, "device": torch.device("cpu")} if goes_there else kwargs

    def unwrapped(value: Any) -> Any:
        return value.inner if isinstance(value, Elsewhere) else value

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor) or not goes_there or value.is_meta:
            return value
        return there.get(id(value)) if id(value) in there else Elsewhere(value)

    inner = {key: _each(unwrapped, value) for key, value in kwargs.items()}
    return _each(wrapped, function(*_each(unwrapped, list(args)), **inner))


def _leaves(values: Any) -> Iterator[Any]:
    """What is in lists and tuples: the arguments of torch's operations hold nothing else that holds tensors."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from _leaves(value)
        else:
            yield value


def _each(function: Callable[[Any], Any], value: Any) -> Any:
    """Applies a function to what is in lists and tuples."""
    if isinstance(value, list | tuple):
        return type(value)([_each(function, one) for one in value])
    return function(value)
