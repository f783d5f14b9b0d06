"""ALPS (Meng et al., NeurIPS 2024): chooses mask and weights together by ADMM, then solves for the weights that stay.

SparseGPT goes through the columns once and never returns to one; ALPS moves the mask as long as the linear's outputs gain by
it. It needs the same Gram matrix and takes several times as long.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedgrove.input_statistics.statistics import InputStatistics, StatisticsKind
from fedgrove.models.masks import Target, keep, lowest
from fedgrove.stages.prune.pruners import Effort

NEEDS: StatisticsKind = "gram"
DAMPING = 0.01  # times the mean of the Gram matrix's diagonal, as in SparseGPT
PENALTY = 0.3  # ADMM's first ρ; ours, with the growth below: half of the iterations that the paper's schedule takes
GROWTH = ((0.1, 1.7), (0.005, 1.5), (0.0, 1.25))  # more than this fraction of the kept weights moved: ρ grows by so much
PENALTIES = 3  # how many ρ there are; each costs an inverse
EVERY = 5  # iterations with one ρ; the paper has 3
STEPS = 2  # of conjugate gradients on the final mask
NEAR = 0.1  # the threshold of the next iteration is sought within this fraction of the last one

EFFORT = Effort(squares=3, matrices=8, products=PENALTIES * EVERY + STEPS + 2, factors=PENALTIES)


def prune(weight: Tensor, inputs: InputStatistics, target: Target) -> tuple[Tensor, Tensor]:
    """Minimizes ‖(W − X) H^½‖² over matrices X with the target's number of zeros, approximately.

    From the paper: the channels are levelled to Ĥ = S⁻¹ H S⁻¹ with a unit diagonal, Ŵ = W S; ADMM alternates

        X ← (Ŵ Ĥ + ρ D − V) (Ĥ + ρ I)⁻¹,    D ← the largest |X + V/ρ|, else 0,    V ← V + ρ (X − D),

    ρ grows every few iterations, faster while the mask still moves, and the loop ends when the mask stands still; then
    conjugate gradients, preconditioned by the diagonal, solve for the weights on that mask, all rows at once.

    Ours: the start is the largest |Ŵ| (on real text no worse than SparseGPT's result). Ĥ + ρ I is inverted once for five
    iterations, so that an iteration is one product; the published code has one decomposition, and two products an iteration.
    With Y = X + V/ρ, V becomes ρ (Y − D), so only Y and the mask are kept. ρ begins larger and grows faster. Counts are exact.

    Do not use it with much fewer tokens than inputs: what is fitted then is the damping.

    Args:
        weight: (out, in) float32; overwritten.
        inputs: the Gram matrix of the inputs, (in, in).
        target: how many weights are pruned; with a pattern (n, m), ``in`` must be a multiple of m.

    Returns:
        The pruned weight and its mask (True = kept), both (out, in). Weights of an input that is always zero go first; those of
        them that stay keep their value.

    Raises:
        ValueError: the statistics hold NaN or infinity.
    """
    if not target.num_pruned(weight.numel()):
        return weight, torch.ones_like(weight, dtype=torch.bool)
    gram = inputs.cached(levelled)
    size = _sizes(inputs).to(weight.dtype)
    silent = inputs.squares == 0
    goal = (weight * size).masked_fill_(silent, 0.0)
    wanted = goal @ gram
    mask, threshold = _select(goal, target, None)
    kept = goal.mul_(mask)  # so that V is zero at first
    penalty = last = PENALTY
    for _ in range(PENALTIES):
        before, inverse = mask, _inverse(gram, penalty)
        for _ in range(EVERY):
            pull = torch.where(mask, penalty, -last).mul_(kept).add_(wanted)  # ρ D − V + Ŵ Ĥ
            kept = (pull @ inverse).add_(torch.where(mask, 0.0, kept), alpha=last / penalty)  # X + V/ρ
            mask, threshold = _select(kept, target, threshold)
            last = penalty
        del inverse  # before there is another: for wide inputs it is most of the memory
        moved = int((mask & ~before).count_nonzero())
        if not moved:
            break
        penalty *= next(growth for least, growth in GROWTH if moved > least * int(mask.count_nonzero()))
    solved = resolve(kept.mul_(mask), wanted, gram, mask).div_(size)
    return weight.copy_(torch.where(silent, weight, solved)).masked_fill_(~mask, 0.0), mask


def levelled(inputs: InputStatistics) -> Tensor:
    """Ĥ: the damped Gram matrix, its channels scaled so that the diagonal is 1; (in, in) float32.

    Raises:
        ValueError: the statistics hold NaN or infinity.
    """
    sizes = _sizes(inputs)
    if not torch.isfinite(sizes).all():
        raise ValueError("the statistics of the inputs are not finite")
    gram = torch.empty(len(sizes), len(sizes), device=sizes.device)
    for start, strip in inputs.strips():
        end = start + len(strip)
        gram[start:end, start:] = strip / sizes[start:end, None] / sizes[start:]
        gram[start:, start:end] = gram[start:end, start:].T.clone()
    gram.fill_diagonal_(1.0)
    return gram


def _sizes(inputs: InputStatistics) -> Tensor:
    """S: the square roots of the damped diagonal, (in,) float64, none of them zero."""
    squares = inputs.squares
    damped = squares + DAMPING * squares.mean()
    return torch.where(damped == 0, 1.0, damped).sqrt()


def _inverse(gram: Tensor, penalty: float) -> Tensor:
    """(Ĥ + ρ I)⁻¹; Ĥ is positive semidefinite, so with ρ no factorization fails."""
    factor = gram.clone()
    factor.diagonal().add_(penalty)
    torch.linalg.cholesky(factor, out=factor)
    return torch.cholesky_inverse(factor)


def _select(values: Tensor, target: Target, near: float | None) -> tuple[Tensor, float | None]:
    """The mask of the largest |values|, as :func:`fedgrove.models.masks.keep` has it, and the threshold.

    Args:
        near: the threshold of similar values: the largest are then sought near it, which is several times faster.
    """
    size = values.abs()
    count = target.num_pruned(size.numel())
    if target.pattern or not 0 < count < size.numel():
        return keep([size], target), None
    flat = size.view(-1)
    if near is not None:
        small = flat < near * (1 - NEAR)
        between = ((flat <= near * (1 + NEAR)) & ~small).nonzero().squeeze(1)
        missing = count - int(small.count_nonzero())
        if 0 < missing <= len(between):
            candidates = flat[between]
            goes = lowest([candidates], missing)
            small[between[goes]] = True
            return ~small.view(size.shape), float(candidates[goes].max())
    goes = lowest([flat], count)
    return ~goes.view(size.shape), float(flat[goes].max())


def resolve(start: Tensor, wanted: Tensor, gram: Tensor, mask: Tensor, steps: int = STEPS) -> Tensor:
    """The best weights on a mask, by conjugate gradients for all rows at once: minimizes tr((W − X) H (W − X)ᵀ).

    Args:
        start: (out, in), zero where the mask is False; overwritten.
        wanted: W H, (out, in).
        gram: H, (in, in), with a unit diagonal, which makes the preconditioner the identity.
        mask: (out, in) bool, True = kept; every other entry stays zero.
        steps: each costs one product of (out, in) and (in, in).
    """
    solution = start
    residual = (wanted - solution @ gram).mul_(mask)
    direction = residual.clone()
    energy = residual.square().sum(1, keepdim=True)
    for _ in range(steps):
        step = (direction @ gram).mul_(mask)
        curvature = (direction * step).sum(1, keepdim=True)
        length = torch.where(curvature > 0, energy / curvature, 0.0)
        solution.addcmul_(length, direction)
        residual.addcmul_(length, step, value=-1)
        after = residual.square().sum(1, keepdim=True)
        direction.mul_(torch.where(energy > 0, after / energy, 0.0)).add_(residual)
        energy = after
    return solution
