"""Training without noise: stochastic gradient descent or AdamW on batches of windows."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from fedgrove.data.windows import IGNORED
from fedgrove.models.next_tokens import loss_sum
from fedgrove.stages.tune.aggregation import Form
from fedgrove.stages.tune.training import (
    GradientMasks,
    NotFinite,
    Settings,
    Work,
    draw,
    make_optimizer,
    pieces,
    trained_parameters,
)

PRIVATE = False
WITHOUT_GRADIENTS = False
FALLBACK: str | None = None
TAKES: frozenset[Form] = frozenset({"factors", "tensors"})


def train(model: nn.Module, work: Work, settings: Settings) -> float:
    """See :class:`fedgrove.stages.tune.trainers.Trainer`; batches are drawn by :func:`fedgrove.stages.tune.training.draw`."""
    batches = draw(work.ids, work.labels, settings.batch, work.seen, work.seed)
    return train_on(model, batches, settings, work.masks, work.devices, work.penalty)


def train_on(
    model: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    settings: Settings,
    masks: GradientMasks = (),
    others: Sequence[torch.device] = (),
    penalty: Callable[[], Tensor] | None = None,
) -> float:
    """Trains the parameters that require a gradient.

    With several devices, each has a copy of the model and computes some of a step's micro-batches. Gradients are summed
    on the first device, which does the step: the result equals that of one device except for the order in which floats
    are added.

    Args:
        model: in training or evaluation mode. It is trained, and left, in evaluation mode: without dropout the same
            batches give the same bits.
        batches: (ids, labels) of each step, (batch, length) each; tokens with label ``IGNORED`` have no loss.
        masks: gradients are set to 0 where the mask is False, so that zeros stay zero.
        others: further devices, besides the one that has the model.
        penalty: see :class:`~fedgrove.stages.tune.training.Work`; it is not part of the loss that is returned.

    Returns:
        The mean loss per token over all steps, each measured before its step; 0 if no token had a loss.

    Raises:
        NotFinite: the loss is not finite.
    """
    parameters = trained_parameters(model)
    anchors = [parameter.detach().clone() for parameter in parameters] if settings.proximal else []
    optimizer = make_optimizer(parameters, settings)
    model.eval()
    copies = [model, *(copy.deepcopy(model).to(device) for device in others)]
    total, count = 0.0, 0
    with torch.enable_grad():
        for _ in range(settings.steps):
            ids, labels = next(batches)
            learnt = int((labels[:, 1:] != IGNORED).sum())
            if not learnt:
                continue
            losses = []  # kept as tensors: float() would wait for the device before the next one gets work
            for (part, wanted), one in zip(pieces(ids, labels, settings.micro), itertools.cycle(copies), strict=False):
                share = loss_sum(one, part, wanted) / learnt
                share.backward()  # type: ignore[no-untyped-call]
                losses.append(share.detach())
            loss = sum(map(float, losses))
            for other in copies[1:]:
                for parameter, copied in zip(parameters, trained_parameters(other), strict=True):
                    if copied.grad is not None:  # None if the step had fewer micro-batches than devices
                        cast(Tensor, parameter.grad).add_(copied.grad.to(parameter.device))
                        copied.grad = None
            if penalty is not None:
                penalty().backward()  # type: ignore[no-untyped-call]
            for weight, mask in masks:
                cast(Tensor, weight.grad).mul_(mask)
            if not math.isfinite(loss):
                raise NotFinite("its loss is not finite", "lower learning_rate, or check its data")
            if settings.proximal:
                for parameter, anchor in zip(parameters, anchors, strict=True):
                    assert parameter.grad is not None
                    parameter.grad.add_(parameter.detach() - anchor, alpha=settings.proximal)
            if settings.max_grad_norm:
                nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            for other in copies[1:]:
                for parameter, copied in zip(parameters, trained_parameters(other), strict=True):
                    copied.data.copy_(parameter.data)
            total, count = total + loss * learnt, count + learnt
    return total / max(1, count)
