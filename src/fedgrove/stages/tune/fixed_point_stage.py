"""Tuning in whole numbers: a round's sum in the open, under secure aggregation, and with noise."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedgrove.engines.base import Engine
from fedgrove.errors import FedgroveError
from fedgrove.privacy import tuning as dp
from fedgrove.privacy.secure import smallest_sum, sum_securely
from fedgrove.rounds.collect import Message, ask
from fedgrove.rounds.clock import Clock
from fedgrove.rounds.aggregator.weighted_sum import WeightedSum
from fedgrove.rounds.wire import CHANGE, Info, WireError
from fedgrove.rounds.wire import check as check_tensors
from fedgrove.runfolder import RunFolder
from fedgrove.stages.tune import fixed_point as whole
from fedgrove.stages.tune.plan import TunePlan


def whole_facts(run: RunFolder, plan: TunePlan) -> dict[str, Info]:
    """By client, what it is told where answers are whole numbers; nothing where they are not."""
    stage = run.job.tuning(plan.stage)
    if stage.precision != "fixed":
        return {}
    noise = None
    if stage.epsilon is not None and stage.dp_unit == "client":
        noise = {
            "epsilon": stage.epsilon,
            "delta": stage.delta,
            "bound": stage.dp_clip,
            "rounds": stage.rounds,
            "adders": smallest_sum(len(plan.clients)) if run.job.privacy.secure_aggregation else 0,
        }
    weights = plan.weights(alike=noise is not None)
    return {client: whole.facts(weight, plan.widest(), noise) for client, weight in weights.items()}


def private_facts(run: RunFolder, plan: TunePlan, client: str) -> Info | None:
    """What a client is told that trains with DP-SGD."""
    stage = run.job.tuning(plan.stage)
    if stage.epsilon is None or stage.dp_unit == "client":
        return None
    return {
        "epsilon": stage.epsilon,
        "delta": stage.delta,
        "noise": plan.noise[client],
        "rounds": stage.rounds,
        "bound": stage.dp_clip,
    }


def sum_whole(
    engine: Engine,
    run: RunFolder,
    kind: str,
    messages: Mapping[str, Message],
    *,
    plan: TunePlan,
    round_: int,
    shapes: Mapping[str, torch.Size],
    clock: Clock,
) -> tuple[list[str], dict[str, Tensor]]:
    """Asks the clients and adds up; with client-level noise in the open, the server's noise is in the sum.

    Args:
        shapes: by name, of what is summed; ``<linear>/b`` is (out, widest rank).
        clock: see :func:`fedgrove.rounds.collect.ask`.

    Returns:
        Who is in the sum, and the weighted means in float64, each column over those who train it.

    Raises:
        FedgroveError: too few answered, or the sum cannot be one.
    """
    stage = run.job.tuning(plan.stage)
    private = stage.epsilon is not None and stage.dp_unit == "client"
    weights = plan.weights(alike=private)
    expected = {CHANGE + name: (shape, torch.int32) for name, shape in shapes.items()}

    def check(client: str, tensors: dict[str, Tensor], info: Info) -> None:
        check_tensors(tensors, expected)
        if run.job.privacy.secure_aggregation:  # no value can be told from random
            return
        whole.check(tensors, weights[client])
        for name in tensors:
            linear, _, factor = name.removeprefix(CHANGE).rpartition("/")
            if factor == "b" and tensors[name][:, plan.clients[client].ranks.get(linear, 0) :].any():
                raise WireError(f"{name} has columns that this client does not train")

    if run.job.privacy.secure_aggregation:
        infos, sums = sum_securely(engine, run, kind, messages, stage=plan.stage, round_=round_, check=check, clock=clock)
        heard = sorted(infos)
        try:
            whole.check(sums, 1.0)
        except WireError as fault:
            raise FedgroveError(
                f"the clients' sum: {fault}; one of them sent no adapter, and secure aggregation hides which. "
                "Leave clients out until it holds"
            ) from fault
    else:
        totals = {name: WeightedSum() for name in expected}
        heard = []
        for client, tensors, _ in ask(engine, run, kind, messages, stage=plan.stage, round_=round_, check=check, clock=clock):
            heard.append(client)
            for name, total in totals.items():
                total.add(tensors[name], 1.0)
        sums = {name: total.value for name, total in totals.items() if total.value is not None}
        if private:
            assert stage.epsilon is not None
            sigma = dp.client_noise(stage.epsilon, stage.delta, stage.rounds) * stage.dp_clip / len(plan.clients)
            sums = dp.add_whole(sums, sigma * 2.0**whole.BITS)
    means = {}
    for name, shape in shapes.items():
        linear, _, factor = name.rpartition("/")
        if private:
            weight: Tensor | float = 1.0  # fixed: who is missing has added nothing
        elif factor == "b":
            weight = torch.zeros(shape[1], dtype=torch.float64)
            for client in heard:
                weight[: plan.clients[client].ranks.get(linear, 0)] += weights[client]
        else:
            weight = sum(weights[client] for client in heard)
        means[name] = whole.mean(sums[CHANGE + name], weight)
    return heard, means
