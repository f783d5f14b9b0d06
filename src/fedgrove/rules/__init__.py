"""Rules: the two ends of the sum. Both halves of one federated idea live in one file; its name is its name in the job.

A rule for pruning on the clients holds two functions, tensor by tensor:

    weigh(before, after, mask, tokens) -> (change, weight)     on the client: what is put into the sum
    finish(before, sums, target, options) -> (weight, mask)    on the server: what is made of the sum

``before`` is the tensor as the round began, ``after`` and ``mask`` what the pruner made of it (True = kept), ``tokens``
the number of calibration tokens, ``sums`` the :class:`~fedgrove.rounds.fold.Sums` of this tensor. ``change`` is a tensor
or None (nothing but the weight is sent); ``weight`` is a bool mask or one number. Tensors lie as the linear multiplies:
(out, in).

The rule ``statistics`` is of another kind: clients do not prune, they send what the pruner needs to know, so its two halves
are about inputs and not about weights. See :mod:`fedgrove.rules.statistics`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """What a job may say to a rule (see ``[[stages]]`` in the job file)."""

    shrink: float = 0.0
    expand: bool = True
