"""Clients that are not as fast as they say: their speeds as rounds show them, beside the other clients'.

A plan promises how long a round takes each client, from the speed that it reports. What a round really took is the server's
own measurement: over FLARE by its clock, from the request to the response; in a simulation by the clock that models clients'
machines (key ``clients.claimed_speed``). The model of time is off for all clients alike on most hardware, so a client's
slowdown counts only relative to the median of all. Ours.

Not to be trusted where the time of a round is not that of computing: a few short steps over a slow link, or a machine that does
something else. A deadline in the job stays as it is, and if all clients are slower than they say, none is corrected.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the report takes names from here, and is to work without torch
    from fedgrove.stages.tune.plan import Plan

BOUND = 2.0  # a factor: speeds that are off by less are left alone
MEASURED, CORRECTED = "seconds/measured", "speed/corrected"  # metrics of a client
SLOWEST, FASTEST = 1e-6, 1e6  # the bounds of a speed in a job


def corrected(plan: Plan, measured: Mapping[str, float]) -> dict[str, float]:
    """The speeds of the clients that took more than ``BOUND`` times as long as promised, or less than a part of it.

    Args:
        plan: that was in force in the round.
        measured: seconds of the round, by client, for those that responded.

    Returns:
        By client, its speed in the plan divided by its slowdown relative to the median client's (of two, the smaller one's).
    """
    slowdown = {}
    for client, seconds in sorted(measured.items()):
        promised = plan.clients[client]
        if promised.compute > 0:
            sending = max(0.0, promised.seconds - promised.compute)
            slowdown[client] = max(seconds - sending, 1e-3 * promised.compute) / promised.compute
    usual = statistics.median_low(slowdown.values()) if slowdown else 1.0
    return {
        client: float(f"{min(FASTEST, max(SLOWEST, plan.capabilities[client].speed * usual / slower)):.3g}")
        for client, slower in slowdown.items()
        if not 1 / BOUND <= slower / usual <= BOUND
    }
