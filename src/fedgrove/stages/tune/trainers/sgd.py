"""Plain training: stochastic gradient descent or AdamW on batches of windows."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from fedgrove.data.windows import IGNORED
from fedgrove.errors import FedgroveError
from fedgrove.stages.tune.training import (
    GradientMasks,
    Settings,
    Work,
    draw,
    loss_sum,
    make_optimizer,
    pieces,
    trained_parameters,
)

PRIVATE = False


def train(model: nn.Module, work: Work, settings: Settings) -> float:
    """See :class:`fedgrove.stages.tune.trainers.Trainer`; batches are drawn by :func:`fedgrove.stages.tune.training.draw`."""
    batches = draw(work.ids, work.labels, settings.batch, work.seen, work.seed)
    return train_on(model, batches, settings, work.masks, work.devices)


def train_on(
    model: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    settings: Settings,
    masks: GradientMasks = (),
    others: Sequence[torch.device] = (),
) -> float:
    """Trains what requires a gradient.

    With several devices each holds a copy of the model and computes every so many windows of a step; gradients are summed
    on the first, which steps, so the result is that of one device but for the order in which floats are added.

    Args:
        model: in any state; it is left in that of evaluation, without dropout, so that the same batches give the same bits.
        batches: (ids, labels) of each step, (batch, length) each; labels of ``IGNORED`` are not learnt.
        masks: where False there is no gradient, so zeros stay.
        others: devices besides the model's own.

    Returns:
        The mean loss a token, over all steps, each measured before its step.

    Raises:
        FedgroveError: the loss is not finite.
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
            losses = []  # not numbers yet: reading one would wait for its device before the next is given work
            for (part, wanted), one in zip(pieces(ids, labels, settings.micro), itertools.cycle(copies), strict=False):
                share = loss_sum(one, part, wanted) / learnt
                share.backward()  # type: ignore[no-untyped-call]
                losses.append(share.detach())
            loss = sum(map(float, losses))
            for other in copies[1:]:
                for parameter, copied in zip(parameters, trained_parameters(other), strict=True):
                    if copied.grad is not None:  # fewer windows than devices
                        cast(Tensor, parameter.grad).add_(copied.grad.to(parameter.device))
                        copied.grad = None
            for weight, mask in masks:
                cast(Tensor, weight.grad).mul_(mask)
            if not math.isfinite(loss):
                raise FedgroveError("its loss is not finite", "lower learning_rate, or look at its data")
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
