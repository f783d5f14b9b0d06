"""What a pool adds to a stage's plan: what it discloses besides, and what it sends."""

from __future__ import annotations

from fedgrove.errors import FedgroveError
from fedgrove.job.tables import Job
from fedgrove.models.blocks import Decoder
from fedgrove.rounds.request import Disclosure
from fedgrove.stages.base import names_of
from fedgrove.stages.tune.config import Config
from fedgrove.stages.tune.exchanges.deal import DealByFeatures
from fedgrove.stages.tune.exchanges.gate import FitGate, SendDirection, SumFeatures
from fedgrove.stages.tune.gates import feature_gate_of, job_gate_of
from fedgrove.stages.tune.parametrizations import mixable_of
from fedgrove.stages.tune.plan import Plan
from fedgrove.stages.tune.pool.config import AUTO, Pool
from fedgrove.stages.tune.pool.features import numbers_in
from fedgrove.stages.tune.pool.newcomers import check_new

FEW_ROUNDS = 3  # two show who is like whom, and then one can begin from that


def with_pool(plan: Plan, pool: Pool, decoder: Decoder, job: Job) -> Plan:
    """The plan of a stage that trains a pool.

    Raises:
        FedgroveError: the model has experts, there are fewer windows than members, or an owner of ``evaluate.new`` has too
            little text; names the key or the file.
    """
    at = f"stages.{plan.stage}.pool"
    config = job.stages[plan.stage]
    assert isinstance(config, Config)
    if plan.experts is not None:
        raise FedgroveError(f"{at}: plain peft has no adapters for single experts", "leave pool out")
    if not mixable_of(config.parametrization).fits_peft(decoder):
        raise FedgroveError(f"{at}: the model's linears have biases, which plain peft would scale too", 'set method = "lora"')
    length = job.stages[plan.stage].training_length() or 1
    check_new(job, length, decoder.checkpoint)
    disclosed = {Disclosure[name] for name in plan.discloses}
    if pool.method.LOOKS == "job":
        notes = _alone(plan, pool, job)
    elif pool.method.LOOKS == "changes":
        notes = ["Every client gets a member of its own, and whoever gets the pool gets what each client's text has taught."]
        if config.rounds < FEW_ROUNDS:
            notes.append(
                f"rounds = {config.rounds}: two show who is like whom, and until then all clients get about the same; raise it."
            )
    else:
        disclosed |= DealByFeatures.DISCLOSES
        notes = [f"Every client gets all {pool.most} members before every round, to measure them on {pool.windows} windows."]
    if pool.method.LOOKS == "features":
        windows = sum(one.tokens for one in plan.clients.values()) // length
        if isinstance(pool.members, int) and windows < pool.members:
            raise FedgroveError(
                f"{at}.members: {pool.members}, but all clients have {windows} windows", "lower members or length"
            )
        disclosed |= SendDirection.DISCLOSES if pool.method.OF_CLIENTS else SumFeatures.DISCLOSES
        disclosed |= {Disclosure.COMPONENT_SUMS} if config.noisy_gate else FitGate.DISCLOSES
        number = numbers_in(decoder, pool.blocks)
        rows = 3 if pool.members == AUTO else 1
        once = rows * min(pool.size, number) + 1 if pool.method.OF_CLIENTS else (number + 1) * (number + 2) // 2
        if not pool.method.OF_CLIENTS and pool.directions == "owners":
            once += number * (number + 1) // 2
        sums = feature_gate_of(pool.gate).sums(pool.most, pool.side_by_side, min(pool.size, number))
        each = 8 * sum(shape.numel() for shape, _ in sums.values())
        notes = [
            f"To fit the gate, every client sends {once * 8:,} bytes once and {each:,} bytes up to {pool.fit_rounds} times, "
            "before any training."
        ]
    known = names_of(frozenset(disclosed))
    plan = plan.model_copy(update={"discloses": known, "notes": (*plan.notes, *notes)})
    return _of_all_members(plan, pool, config.rounds, job.privacy.min_group) if config.deals_in_sums else plan


def _of_all_members(plan: Plan, pool: Pool, rounds: int, fewest: int) -> Plan:
    """The plan if every client gets and sends all members: of a round that trains them, the longest kind.

    Args:
        fewest: clients that a member has.
    """
    most, clients = pool.most, {}
    if pool.method.OF_CLIENTS:  # each has one member only
        most = min(most, len(plan.clients) // fewest)
    if most <= 1:
        return plan
    for client, one in plan.clients.items():
        links, more = plan.capabilities[client], most - 1
        sending = sum(
            8 * more * number / speed for number, speed in ((one.upload, links.uplink), (one.download, links.downlink)) if speed
        )
        clients[client] = one.model_copy(
            update={
                "upload": most * one.upload,
                "download": most * one.download,
                "seconds": round(one.seconds + sending, 3),
            }
        )
    slower = max(one.seconds for one in clients.values()) - max(one.seconds for one in plan.clients.values())
    first = pool.common_rounds(rounds)
    some = f"all of at most {most}" if pool.members == AUTO or most < pool.most else f"all {most}"
    note = f"From round {first} on every client gets and sends {some} members: which it trains stays with it."
    total = round(plan.total + (rounds - first) * slower, 3)
    return plan.model_copy(update={"clients": clients, "total": total, "notes": (*plan.notes, note)})


def _alone(plan: Plan, pool: Pool, job: Job) -> list[str]:
    """A note on members that a single client trains."""
    dealt = job_gate_of(pool.gate).deal(pool, [client.name for client in job.clients], str(job.seed))
    members = [dealt[client] for client in plan.clients]
    alone = [client for client in sorted(plan.clients) if members.count(dealt[client]) == 1]
    return [f"Client '{client}' trains a member alone: whoever gets the pool gets its own adapter." for client in alone]
