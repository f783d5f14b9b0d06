"""Train low-rank adapters, or whole linears, on a frozen model: put them in, train, take them out.

The adapters are peft's, one rank for each linear. What peft has not is a mask: on a pruned model an ordinary adapter would
refill the zeros, so there the product of the factors is masked before it is used, and what was trained is what is merged.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from fedgrove.data import IGNORED
from fedgrove.errors import FedgroveError
from fedgrove.models.blocks import Decoder, as_matrix, linears
from fedgrove.stages.tune.aggregation import Start
from fedgrove.stages.tune.factors import Factors

OWN, REST = "own", "rest"  # the adapter that is trained, and the one that is only computed with


@dataclass(frozen=True)
class Settings:
    """How a client trains in one round.

    Attributes:
        steps: optimizer steps.
        batch: windows of each step; micro: windows that a device computes at once (gradients are accumulated).
        optimizer: "adamw" (β 0.9 and 0.999, no weight decay) or "sgd"; its state begins anew in every round.
        learning_rate.
        max_grad_norm: the largest norm of the gradient; 0 for any.
        proximal: FedProx's μ (Li et al., MLSys 2020): μ/2·‖θ − θ₀‖² is added to the loss.
    """

    steps: int
    batch: int
    micro: int
    learning_rate: float
    optimizer: Literal["adamw", "sgd"] = "adamw"
    max_grad_norm: float = 0.0
    proximal: float = 0.0


def load(decoder: Decoder, bits: int) -> nn.Module:
    """A decoder's whole model, frozen, its linears in that many bits.

    32 and 16 are float32 and bfloat16, for all weights. 8 (LLM.int8) and 4 (NF4) are bitsandbytes', for the linears of the
    blocks; the ends and norms are bfloat16. Zero is a code of both, so pruned weights stay zero.

    Raises:
        FedgroveError: 8 or 4 bits without bitsandbytes.
    """
    dtype = torch.float32 if bits == 32 else torch.bfloat16
    if bits < 16 and importlib.util.find_spec("bitsandbytes") is None:
        raise FedgroveError(f'bits = {bits} needs bitsandbytes: pip install "fedgrove[quantize]"; or leave it out of bits')

    def change(part: nn.Module) -> None:
        for parameter in part.parameters():
            if parameter.is_floating_point() and not parameter.is_meta:
                parameter.data = parameter.data.to(dtype)
        if bits < 16 and part is not decoder.model:
            for name, module in linears(part).items():
                owner, _, leaf = name.rpartition(".")
                setattr(part.get_submodule(owner), leaf, _quantized(module, bits, dtype, decoder.device))

    model = decoder.whole(change)
    for flag in ("is_loaded_in_8bit", "is_loaded_in_4bit"):  # how peft knows what it puts its adapters on
        setattr(model, flag, flag == f"is_loaded_in_{bits}bit")
    return model.requires_grad_(False)


def _quantized(module: nn.Module, bits: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
    hush()
    import bitsandbytes

    weight = as_matrix(module, cast(Tensor, module.weight).data).contiguous()
    num_out, num_in = weight.shape
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


def attach(model: nn.Module, starts: Mapping[str, Start], scales: Mapping[str, float], masks: Mapping[str, Tensor]) -> None:
    """Puts adapters into a model.

    Args:
        model: see :func:`load`.
        starts: by linear; an own rank of 0 is not trained.
        scales: by linear: LoRA's α/r.
        masks: by linear, (out, in) bool, True = kept: of the linears whose zeros are to stay.
    """
    hush()
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    for adapter in (OWN, REST):
        factors = {name: getattr(start, adapter) for name, start in starts.items()}
        factors = {name: pair for name, pair in factors.items() if pair.rank}
        if not factors:
            continue
        config = LoraConfig(
            r=1,
            target_modules=list(factors),
            rank_pattern={re.escape(name): pair.rank for name, pair in factors.items()},
            init_lora_weights=False,
            fan_in_fan_out=not isinstance(_base(model.get_submodule(next(iter(factors)))), nn.Linear),
        )
        if masks:
            kinds = {type(_base(model.get_submodule(name))) for name in factors}
            config._register_custom_module(dict.fromkeys(kinds, _masked_layer()))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # two adapters: we know
            inject_adapter_in_model(config, model, adapter)
        for name, pair in factors.items():
            layer = cast(Any, model.get_submodule(name))
            scale = scales[name] if adapter == OWN else 1.0
            layer.scaling[adapter] = scale
            device = next(layer.parameters()).device
            layer.lora_A[adapter].weight = nn.Parameter(pair.a.to(device, torch.float32))
            layer.lora_B[adapter].weight = nn.Parameter((pair.b / scale).to(device, torch.float32))
            if name in masks:
                layer.mask = masks[name].to(device)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_adapter([adapter for adapter in (OWN, REST) if adapter in module.lora_A])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(f".{OWN}." in name)


def hold_a(model: nn.Module) -> None:
    """Freezes every A."""
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            parameter.requires_grad_(False)


def detach(model: nn.Module, names: Sequence[str]) -> dict[str, Factors]:
    """The trained adapters, on the CPU, the scale folded into B."""
    result = {}
    for name in names:
        layer = cast(Any, model.get_submodule(name))
        b, a = layer.lora_B[OWN].weight, layer.lora_A[OWN].weight
        result[name] = Factors((b.detach() * layer.scaling[OWN]).cpu(), a.detach().cpu())
    return result


def open_weights(model: nn.Module, names: Sequence[str]) -> None:
    """Lets whole linears be trained."""
    for name in names:
        cast(nn.Parameter, model.get_submodule(name).weight).requires_grad_()


def train(
    model: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    settings: Settings,
    masks: Mapping[str, Tensor] = MappingProxyType({}),
    others: Sequence[torch.device] = (),
) -> float:
    """Trains what requires a gradient.

    With several devices each holds a copy of the model and computes every so many windows of a step; gradients are summed
    on the first, which steps, so the result is that of one device but for the order in which floats are added.

    Args:
        model: in any state; it is left in that of evaluation, without dropout, so that the same batches give the same bits.
        batches: (ids, labels) of each step, (batch, length) each; labels of ``IGNORED`` are not learnt.
        masks: of whole linears that are trained, by name, (out, in) bool: where False there is no gradient, so zeros stay.
        others: devices besides the model's own.

    Returns:
        The mean loss a token, over all steps, each measured before its step.

    Raises:
        FedgroveError: the loss is not finite.
    """
    parameters = _trained(model)
    kept = []
    for name, mask in masks.items():
        module = model.get_submodule(name)
        weight = cast(nn.Parameter, module.weight)
        kept.append((weight, as_matrix(module, mask).to(weight.device)))
    anchors = [parameter.detach().clone() for parameter in parameters] if settings.proximal else []
    make: Callable[..., torch.optim.Optimizer] = torch.optim.SGD if settings.optimizer == "sgd" else torch.optim.AdamW
    optimizer = make(parameters, lr=settings.learning_rate, weight_decay=0.0)
    model.eval()
    copies = [model, *(copy.deepcopy(model).to(device) for device in others)]
    total, count = 0.0, 0
    with torch.enable_grad():
        for _ in range(settings.steps):
            ids, labels = next(batches)
            learnt = int((labels[:, 1:] != IGNORED).sum())
            if not learnt:
                continue
            shares = []  # not numbers yet: reading one would wait for its device before the next is given work
            for (part, wanted), one in zip(pieces(ids, labels, settings.micro), itertools.cycle(copies), strict=False):
                share = loss_sum(one, part, wanted) / learnt
                share.backward()  # type: ignore[no-untyped-call]
                shares.append(share.detach())
            loss = sum(map(float, shares))
            for other in copies[1:]:
                for parameter, its in zip(parameters, _trained(other), strict=True):
                    if its.grad is not None:  # fewer windows than devices
                        cast(Tensor, parameter.grad).add_(its.grad.to(parameter.device))
                        its.grad = None
            for weight, mask in kept:
                cast(Tensor, weight.grad).mul_(mask)
            if not math.isfinite(loss):
                raise FedgroveError("its loss is not finite; lower learning_rate, or look at its data")
            if settings.proximal:
                for parameter, anchor in zip(parameters, anchors, strict=True):
                    assert parameter.grad is not None
                    parameter.grad.add_(parameter.detach() - anchor, alpha=settings.proximal)
            if settings.max_grad_norm:
                nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            for other in copies[1:]:
                for parameter, its in zip(parameters, _trained(other), strict=True):
                    its.data.copy_(parameter.data)
            total, count = total + loss * learnt, count + learnt
    return total / max(1, count)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def pieces(ids: Tensor, labels: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """A batch, so many windows at a time."""
    for start in range(0, len(ids), size):
        yield ids[start : start + size], labels[start : start + size]


def loss_sum(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """−Σ log p of the labelled tokens, each given those before it in its window; float32."""
    device = next(model.parameters()).device
    logits = model(input_ids=ids.to(device), use_cache=False).logits
    wanted = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)  # the labels are moved, not the much larger logits
    return nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), wanted.flatten().to(device), ignore_index=IGNORED, reduction="sum"
    )


def draw(ids: Tensor, labels: Tensor, batch: int, seen: int, seed: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end: every window once an epoch, in an order that the seed and the epoch give.

    Args:
        ids, labels: all windows of a client.
        seen: how many windows it has been given before; it goes on there.
    """
    import random

    order: list[int] = []
    epoch = -1
    while True:
        picked = []
        for _ in range(batch):
            if epoch != seen // len(ids):
                epoch = seen // len(ids)
                order = list(range(len(ids)))
                random.Random(f"{seed}/{epoch}").shuffle(order)
            picked.append(order[seen % len(ids)])
            seen += 1
        yield ids[picked], labels[picked]


def merge(weight: Tensor, change: Tensor, masked: bool) -> Tensor:
    """weight + change in the weight's own dtype, rounded once; zeros stay zero if ``masked``, and nothing else becomes zero.

    Args:
        weight: (out, in), any float dtype.
        change: (out, in).
    """
    merged = (weight.double() + change.double()).to(weight.dtype)
    if not masked:
        return merged
    return torch.where((weight != 0) & (merged == 0), weight, merged).masked_fill_(weight == 0, 0.0)


class _MaskedProduct(torch.autograd.Function):
    """x·(mask ∘ B·A)ᵀ. The dense product is made anew in the backward pass: only the factors are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, b: Tensor, a: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(x, b, a, mask)
        return x @ ((b @ a) * mask).T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, b, a, mask = ctx.saved_tensors
        (grad,) = grads
        dense = (grad.flatten(0, -2).T @ x.flatten(0, -2)) * mask
        return grad @ ((b @ a) * mask), dense @ a.T, b.T @ dense, None


def _masked_layer() -> type[nn.Module]:
    """The class, made when peft is here: importing fedgrove imports no peft."""
    from peft.tuners import lora

    class MaskedLora(lora.Linear):  # type: ignore[misc]
        """peft's adapters of a linear; where there is a mask, their product is masked before it is used."""

        mask: Tensor | None = None

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            result: Tensor = self.base_layer(x, *args, **kwargs)
            b = torch.cat([self.lora_B[name].weight * self.scaling[name] for name in self.active_adapters], 1)
            a = torch.cat([self.lora_A[name].weight for name in self.active_adapters])
            mask = self.mask.to(b.device) if self.mask is not None else torch.ones((), dtype=torch.bool, device=b.device)
            return result + cast(Tensor, _MaskedProduct.apply(x.to(a.dtype), b, a, mask)).to(result.dtype)  # type: ignore[no-untyped-call]

    return MaskedLora


def _base(module: nn.Module) -> nn.Module:
    get = getattr(module, "get_base_layer", None)
    return cast(nn.Module, get()) if get else module


def hush() -> None:
    """bitsandbytes, which peft imports where it is installed, says on import what it would rather have."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
