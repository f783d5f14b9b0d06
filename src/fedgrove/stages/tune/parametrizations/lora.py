"""LoRA (Hu et al., ICLR 2022): the change of a weight as the product of two small factors, on a frozen model.

The adapters are peft's, with one rank per linear. peft has no masks: on a pruned model an ordinary adapter would refill
the zeros. There the product of the factors is masked in the forward pass as well as in the merge, so that the merged
model computes what was trained.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from fedgrove.models.blocks import Decoder, as_matrix
from fedgrove.models.cost import ModelCost
from fedgrove.models.depth import parts_of
from fedgrove.models.experts import expert_of
from fedgrove.quantities import mebibytes
from fedgrove.rounds.request import Disclosure, TensorSpecs
from fedgrove.stages.tune import cost as costs
from fedgrove.stages.tune import peft_adapter
from fedgrove.stages.tune.aggregation import Form
from fedgrove.stages.tune.changes import Start, State
from fedgrove.stages.tune.cost import Budget, ClientConfig, SearchSpace
from fedgrove.stages.tune.factors import Factors, fill, initial_a
from fedgrove.stages.tune.frozen import hush
from fedgrove.stages.tune.parametrizations import Attachment
from fedgrove.stages.tune.training import GradientMasks

if TYPE_CHECKING:  # the stage's table names its parametrization, so it imports this package
    from fedgrove.stages.tune.config import Config

FORM: Form = "factors"
LOOP = "changes"
DISCLOSES = Disclosure.FACTORS
AGGREGATION = "flexlora"
TRAINERS = ("sgd", "dp_sgd")
DEFAULTS: Mapping[str, Any] = {}
KEYS: frozenset[str] = frozenset()
UNUSED: frozenset[str] = frozenset()
RANKED = True
RELATIVE = False
PRIVATE = True
PERSONAL = True
FROZEN = True
BY_WINDOWS = False
ALONE = True
SUMS_LOSS = True
CLIPPED = ("change", "gradient")
IN_COMMON = ("a",)

OWN, REST = "own", "rest"  # the adapter that is trained, and the frozen one that is only added


def none(shape: tuple[int, int]) -> Factors:
    """A change of rank 0."""
    return Factors.none(*shape)


def change_of(parts: Mapping[str, Tensor]) -> Factors:
    """From its tensors."""
    return Factors.of(parts)


def start(
    own: Mapping[str, Tensor], rest: Mapping[str, Tensor], shape: tuple[int, int], rank: int, name: str, seed: str
) -> Start[Factors]:
    """The received factors, in float32, with new terms up to ``rank``; B of a new term is 0, so it changes nothing yet.

    If all clients share one A, it is not sent but generated from the seed: its first rows belong to the trained
    factors, the next ones to the rest.
    """

    def given(parts: Mapping[str, Tensor], first: int) -> Factors:
        b = parts.get("b", torch.zeros(shape[0], 0)).float()
        a = parts.get("a")
        return Factors(b, initial_a(name, first + b.shape[1], shape[1], seed)[first:] if a is None else a.float())

    trained = given(own, 0)
    return Start(fill(trained, rank, name, seed), given(rest, trained.rank))


def attach(model: nn.Module, starts: Mapping[str, Start[Factors]], how: Attachment) -> GradientMasks:
    """Attaches peft's adapters, up to two per linear: the trained one and the frozen rest. Rank 0 is left out.

    On a pruned model the product of the factors is masked in the forward pass, so no gradient needs a mask.
    """
    scales, masks = how.scales, how.masks
    hush()
    from peft.tuners.lora import LoraLayer

    for adapter in (OWN, REST):
        factors = {name: getattr(start, adapter) for name, start in starts.items()}
        factors = {name: pair for name, pair in factors.items() if pair.rank}
        if not factors:
            continue
        if any(adapter not in getattr(model.get_submodule(name), "lora_A", ()) for name in factors):
            _inject(model, adapter, {name: pair.rank for name, pair in factors.items()}, masked=bool(masks))
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
    if how.shared_a:
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                parameter.requires_grad_(False)
    return ()


def _inject(model: nn.Module, adapter: str, ranks: Mapping[str, int], masked: bool) -> None:
    """Adds peft's adapters to linears, with values yet to be set.

    A linear that several blocks share gets one pair, whose gradient is the sum over its uses. peft replaces it in the first of
    these blocks only. It gets the list of blocks: of a whole model it reads the type, and takes the experts' linears of some
    types for names of fused tensors, which these models do not have here.
    """
    hush()
    from peft import LoraConfig, inject_adapter_in_model

    parts = parts_of(next(iter(ranks)))
    assert parts is not None, "every linear is of a block"
    blocks = cast(Any, model.get_submodule(parts[0].rstrip(".")))
    for flag in ("is_loaded_in_8bit", "is_loaded_in_4bit"):
        setattr(blocks, flag, getattr(model, flag, False))
    of_blocks = {name.removeprefix(parts[0]): rank for name, rank in ranks.items()}
    common = Counter(ranks.values()).most_common(1)[0][0]  # peft compares every linear with every pattern
    config = LoraConfig(
        r=common,
        target_modules=list(of_blocks),
        rank_pattern={re.escape(name): rank for name, rank in of_blocks.items() if rank != common},
        init_lora_weights=False,
        fan_in_fan_out=not isinstance(_base_layer(model.get_submodule(next(iter(ranks)))), nn.Linear),
    )
    if masked:
        kinds = {type(_base_layer(model.get_submodule(name))) for name in ranks}
        config._register_custom_module(dict.fromkeys(kinds, _masked_layer()))
    linears = {name: model.get_submodule(name) for name in ranks}
    places = [(name, module) for name, module in model.named_modules(remove_duplicate=False) if name not in linears]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # two adapters are intended
        inject_adapter_in_model(config, blocks, adapter)
    first = {id(module): name for name, module in linears.items()}
    for name, module in places:
        if id(module) in first:
            model.set_submodule(name, model.get_submodule(first[id(module)]))


def detach(model: nn.Module, names: Sequence[str], starts: Mapping[str, Start[Factors]]) -> dict[str, Factors]:
    """The trained adapters, on the CPU, with the scale α/r multiplied into B."""
    pairs = {name: _pair(model, name) for name in names}
    return {name: Factors(pair.b.detach().cpu(), pair.a.detach().cpu()) for name, pair in pairs.items()}


def live(model: nn.Module, name: str, start: Start[Factors]) -> Factors:
    """The adapter as it is now, with the scale α/r multiplied into B."""
    return _pair(model, name)


def _pair(model: nn.Module, name: str) -> Factors:
    layer = cast(Any, model.get_submodule(name))
    return Factors(layer.lora_B[OWN].weight * layer.scaling[OWN], layer.lora_A[OWN].weight)


def received(parts: Mapping[str, Tensor], own: Factors, rank: int, name: str, seed: str) -> Factors:
    """B and A as received; if all clients share A, that of the client's start."""
    return Factors(parts["b"], parts["a"] if "a" in parts else fill(own, rank, name, seed).a)


def applied(change: Factors, shape: tuple[int, int]) -> Start[Factors]:
    """The factors as the part that is not trained."""
    return Start(none(shape), change)


def mixture(changes: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """(Σ weight·B)·A: a change of the same rank."""
    first, *others = changes
    if not all(torch.equal(other.a, first.a) for other in others):
        raise ValueError("the changes have not one A")
    b = first.b * weights[0]
    for other, weight in zip(others, weights[1:], strict=True):
        b = b + other.b * weight
    return Factors(b, first.a)


def total(trained: Factors, start: Start[Factors]) -> Factors:
    """The trained factors plus the rest."""
    return trained.plus(start.rest)


def round_change(trained: Factors, start: Start[Factors], shared_a: bool) -> dict[str, Tensor]:
    """The difference in B, (out, rank). With one A for all clients, the mean adapter is mean(B)·A."""
    assert shared_a, "B alone represents the change only if all clients share A"
    return {"b": trained.b - start.own.b}


def after_round(
    state: State[Factors], change: Mapping[str, Tensor], rank: int, dtype: torch.dtype, name: str, seed: str
) -> Factors:
    """The B that the clients started from plus the mean difference; terms that no client trained keep their value."""
    own = fill(state.live.part(0, rank), rank, name, seed)
    began = own.b.to(dtype).double()  # rounded as in the request, so that it is what the clients started from
    live = Factors(began + change["b"], own.a.double())
    return live.plus(state.live.part(rank, state.live.rank))


def expected(shape: tuple[int, int], rank: int, dtype: torch.dtype, shared_a: bool) -> TensorSpecs:
    """B (out, rank), and A (rank, in) if it is trained."""
    specs: TensorSpecs = {"b": (torch.Size([shape[0], rank]), dtype)}
    return specs if shared_a else {**specs, "a": (torch.Size([rank, shape[1]]), dtype)}


def merge(weight: Tensor, change: Factors, masked: bool) -> Tensor:
    """weight + B·A, rounded once to the weight's dtype; see :func:`merge_dense`."""
    return merge_dense(weight, change.product(), masked)


def merge_dense(weight: Tensor, change: Tensor, masked: bool) -> Tensor:
    """weight + change, rounded once to the weight's dtype; if ``masked``, zeros stay zero and nothing else becomes zero.

    Args:
        weight: (out, in), any float dtype.
        change: (out, in).
    """
    merged = (weight.double() + change.double()).to(weight.dtype)
    if not masked:
        return merged
    return torch.where((weight != 0) & (merged == 0), weight, merged).masked_fill_(weight == 0, 0.0)


def configurations(space: SearchSpace, cost: ModelCost, batch: int) -> list[ClientConfig]:
    """The same rank for all linears; ordered by bits, then by rank, both descending."""
    return [
        ClientConfig(bits, batch, 1, dict.fromkeys(cost.linears, rank))
        for bits in sorted(space.bits, reverse=True)
        for rank in reversed(space.ranks)
    ]


memory = costs.memory
compute_seconds = costs.compute_seconds


def numbers(cost: ModelCost, ranks: Mapping[str, int], config: Config, sent: bool) -> int:
    """Σ rank·(out + in) over the linears; Σ rank·out if all clients share A, which does not travel."""
    shared_a = config.aggregation_method.SHARED_A
    return sum(rank * (cost.linears[name][0] if shared_a else sum(cost.linears[name])) for name, rank in ranks.items())


def shortage(cost: ModelCost, space: SearchSpace, budget: Budget) -> str:
    """Even the smallest rank in the bits that take least needs too much memory."""
    ranks = dict.fromkeys(cost.linears, space.ranks[0])
    need = min(memory(cost, space, ClientConfig(bits, space.batches[-1], 1, ranks)) for bits in space.bits)
    return (
        f"rank {space.ranks[0]} in every linear needs {mebibytes(need, enough=True)} of memory, but it "
        f"has {mebibytes(budget.memory)} (clients.memory); lower length, or allow fewer bits"
    )


def fits_peft(decoder: Decoder) -> bool:
    """Plain peft has no adapters for single experts."""
    return not any(map(expert_of, decoder.linear_names()))


def write_adapter(
    out: Path, decoder: Decoder, changes: Mapping[str, Factors], base: str, title: str, pruned: bool, changed: bool
) -> bool:
    """See :func:`fedgrove.stages.tune.peft_adapter.write_lora`."""
    if not fits_peft(decoder):
        return False
    return peft_adapter.write_lora(out, decoder, changes, base, title, pruned, changed)


class _MaskedLinear(torch.autograd.Function):
    """x·(W + mask ∘ B·A)ᵀ in the dtype of x; W is frozen, or None for 0.

    The sum is rounded before the product, as a merged model would be: one product where the change beside the weight takes
    two. The backward pass computes the sum again, so that only x and the factors are saved.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, b: Tensor, a: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, b, a, mask)
        return x @ _merged(weight, b, a, mask, x.dtype).T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor, Tensor, None]:
        x, weight, b, a, mask = ctx.saved_tensors
        (grad,) = grads
        dense = (grad.flatten(0, -2).T @ x.flatten(0, -2)).to(a.dtype).mul_(mask)
        return grad @ _merged(weight, b, a, mask, x.dtype), None, dense @ a.T, b.T @ dense, None


def _merged(weight: Tensor | None, b: Tensor, a: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    change = (b @ a).mul_(mask)
    return (change if weight is None else change.add_(weight)).to(dtype)


def _masked_layer() -> type[nn.Module]:
    """Defines the class on demand, because importing fedgrove must not import peft."""
    from peft.tuners import lora

    class MaskedLora(lora.Linear):  # type: ignore[misc]
        """peft's adapters of a linear; if the linear has a mask, the product of the factors is masked."""

        mask: Tensor | None = None

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            b = torch.cat([self.lora_B[name].weight * self.scaling[name] for name in self.active_adapters], 1)
            a = torch.cat([self.lora_A[name].weight for name in self.active_adapters])
            mask = self.mask.to(b.device) if self.mask is not None else torch.ones((), dtype=torch.bool, device=b.device)
            base = self.base_layer
            if not base.weight.is_floating_point():  # quantized
                product = cast(Tensor, _MaskedLinear.apply(x, None, b, a, mask))  # type: ignore[no-untyped-call]
                return cast(Tensor, base(x, *args, **kwargs)) + product
            result = cast(Tensor, _MaskedLinear.apply(x, as_matrix(base, base.weight), b, a, mask))  # type: ignore[no-untyped-call]
            return result if base.bias is None else result + base.bias

    return MaskedLora


def _base_layer(module: nn.Module) -> nn.Module:
    get = getattr(module, "get_base_layer", None)
    return cast(nn.Module, get()) if get else module
