"""Who tunes what: a configuration for each client, by what it has. Plain data, the same whenever it is made again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import cast

import torch
from pydantic import BaseModel, ConfigDict

from fedgrove.errors import FedgroveError
from fedgrove.job import TuneStage
from fedgrove.models.blocks import Decoder, linears
from fedgrove.stages.prune.plan import SPEED, Capabilities
from fedgrove.privacy import accounting, release
from fedgrove.privacy.secagg.session import min_survivors
from fedgrove.quantities import mebibytes
from fedgrove.rounds import wire
from fedgrove.stages.tune import cost as budget, fixed_point as whole
from fedgrove.stages.tune.cost import Budget, ClientConfig, SearchSpace, Infeasible, ModelCost
from fedgrove.stages.tune.importance import RANK


class TuneAssignment(BaseModel):
    """One client's part in each round of a tuning stage."""

    model_config = ConfigDict(frozen=True)

    bits: int  # of each frozen weight
    batch: int  # windows of an optimizer step
    micro: int  # windows computed at once, on each device
    ranks: dict[str, int]  # by linear; empty: whole linears are trained
    tokens: int  # of its text: its weight in the sum
    memory: int  # bytes at the peak, besides the program itself
    upload: int  # bytes
    download: int  # bytes
    compute: float  # seconds
    seconds: float  # computing and sending, both ways
    devices: int = 1  # that share the windows of a step


class TunePlan(BaseModel):
    """A tuning stage and who does what in it, from round ``since`` on."""

    model_config = ConfigDict(frozen=True)

    stage: int
    kind: str = "tune"
    method: str
    since: int = 0
    rank: int  # the largest of any client and linear; 0: whole linears are trained
    deadline: float | None
    total: float  # modelled seconds of all rounds and of measuring the importance, as if this plan stayed in force
    clients: dict[str, TuneAssignment]
    left_out: dict[str, str]  # client -> which budget is too small, and what would do
    importance: dict[str, float]  # of each linear, together 1
    cards: dict[str, Capabilities]  # what the clients said, by name: why each was given what it was given
    noise: dict[str, float] = {}  # where windows are protected: of each client, in units of the bound
    notes: list[str] = []  # what a person should know before it runs

    def widest(self) -> dict[str, int]:
        """The largest rank that any client has of each linear that is tuned."""
        return {name: max(s.ranks.get(name, 0) for s in self.clients.values()) for name in self.tuned()}

    def weights(self, alike: bool) -> dict[str, float]:
        """Public weights that add up to one: by the tokens that the cards say, or ``alike`` for all."""
        if alike:
            return dict.fromkeys(self.clients, 1 / len(self.clients))
        everything = sum(share.tokens for share in self.clients.values())
        return {name: share.tokens / everything for name, share in self.clients.items()}

    def tuned(self) -> list[str]:
        """The linears that some client tunes, in order."""
        return [name for name in self.importance if not self.rank or any(name in s.ranks for s in self.clients.values())]


def even(sizes: ModelCost) -> dict[str, float]:
    """The importance before anything was measured: the same for all linears."""
    return dict.fromkeys(sizes.linears, 1 / len(sizes.linears))


def make_tune_plan(
    index: int,
    stage: TuneStage,
    sizes: ModelCost,
    cards: Mapping[str, Capabilities],
    importance: Mapping[str, float],
    since: int = 0,
    together: Callable[[int], int] = lambda clients: 1,
    secure: bool = False,
) -> TunePlan:
    """Gives each client a configuration.

    "fedpipe" solves :func:`fedgrove.stages.tune.cost.best` for each client (once for equal ones). "lora" gives everybody the
    largest rank and the most bits that every client can hold, which is the baseline of the paper. "full" trains all linears.

    Args:
        index: the stage's place in the job.
        cards: what the clients said, by name.
        importance: of each linear, together 1.
        together: of so many clients, how many must train a column of an adapter: its sum shall not be one client's.
        secure: sums are taken unseen.

    Raises:
        FedgroveError: nobody can take part; names one client and the smallest budget that would do.
    """
    for name, shape in sizes.linears.items():
        if stage.method != "full" and stage.ranks[-1] > min(shape):
            raise FedgroveError(
                f"stages.{index}.ranks: {stage.ranks[-1]} is more than {name} has ({shape[0]}×{shape[1]}); "
                f"give {min(min(shape) for shape in sizes.linears.values())} at most"
            )
    left_out: dict[str, str] = {}
    number = wire.estimate(1000, 0.0, getattr(torch, stage.dtype)) / 1000
    budgets = {name: _budget(card) for name, card in sorted(cards.items())}
    choices: dict[str, ClientConfig] = {}
    deadline = None
    if stage.method == "fedpipe":
        grid = SearchSpace(stage.bits, stage.batches, stage.ranks, stage.steps, stage.ranks[-1], number, stage.upload_price)
        deadline = stage.deadline or _default_deadline(sizes, grid, budgets)
        solved: dict[tuple[Budget, SearchSpace], ClientConfig | Infeasible] = {}
        for name, given in budgets.items():
            given = replace(given, seconds=deadline)
            bits = tuple(b for b in sorted(stage.bits, reverse=True) if b in cards[name].bits)
            own = replace(grid, bits=bits)
            if (given, own) not in solved:
                try:
                    if not bits:
                        raise Infeasible(
                            f"it can hold none of bits = {list(stage.bits)} (clients.bits; 8 and 4 need bitsandbytes there)"
                        )
                    solved[given, own] = budget.best(sizes, own, given, importance)
                except Infeasible as fault:
                    solved[given, own] = fault
            answer = solved[given, own]
            if isinstance(answer, ClientConfig):
                choices[name] = answer
            else:
                left_out[name] = str(answer)
    elif stage.method == "lora":
        choices, left_out = _uniform(stage, sizes, budgets, cards, number)
    else:
        for name, given in budgets.items():
            most = budget.each_device(stage.batches[-1], given)
            fits = [m for m in budget.micros(stage.batches) if m <= most and budget.full_memory(sizes, m) <= given.memory]
            if fits:
                choices[name] = ClientConfig(32, stage.batches[-1], max(fits), {})
            else:
                left_out[name] = (
                    f"training whole linears needs {mebibytes(budget.full_memory(sizes, 1), enough=True)} "
                    f"of memory, but it has {mebibytes(given.memory)} (clients.memory)"
                )
    if not choices:
        name, why = min(left_out.items())
        raise FedgroveError(f"client '{name}': {why} (and nobody else can take part either)")
    if secure and stage.method != "full":
        choices = _together(choices, together(len(choices)))
    rank = max((rank for choice in choices.values() for rank in choice.ranks.values()), default=0)
    kept = {name: max(choice.ranks.get(name, 0) for choice in choices.values()) for name in sizes.linears}
    grid = SearchSpace(stage.bits, stage.batches, stage.ranks, stage.steps, rank if stage.method == "fedpipe" else 0, number)
    down = number * (sum(kept[name] * sum(shape) for name, shape in sizes.linears.items()) if rank else sizes.parameters)
    shares = {}
    for name, choice in choices.items():
        if rank:
            compute = budget.compute_seconds(sizes, grid, budgets[name], choice)
            need, up = budget.memory(sizes, grid, choice), budget.upload(sizes, grid, choice)
        else:
            compute = budget.full_compute_seconds(sizes, grid, budgets[name], choice.batch)
            need, up = budget.full_memory(sizes, choice.micro), number * sizes.parameters
        if stage.precision == "fixed":
            up = 4 * sum(kept[linear] * sizes.linears[linear][0] for linear in kept)
        card = cards[name]
        sending = (8 * up / card.uplink if card.uplink else 0.0) + (8 * down / card.downlink if card.downlink else 0.0)
        shares[name] = TuneAssignment(
            bits=choice.bits,
            batch=choice.batch,
            micro=choice.micro,
            ranks={linear: choice.ranks[linear] for linear in sizes.linears if linear in choice.ranks},
            tokens=cards[name].tokens,
            memory=math.ceil(need),
            upload=math.ceil(up),
            download=math.ceil(down),
            compute=round(compute, 6),
            seconds=round(compute + sending, 3),
            devices=card.devices,
        )
    measured = 0.0
    if stage.method == "fedpipe":
        times = math.ceil(stage.rounds / stage.replan_every) if stage.replan_every else 1
        measured = times * max(importance_seconds(shares, stage, sizes, cards).values())
    return TunePlan(
        stage=index,
        method=stage.method,
        since=since,
        rank=rank,
        deadline=deadline,
        total=round(stage.rounds * max(share.seconds for share in shares.values()) + measured, 3),
        clients=shares,
        left_out=left_out,
        importance=dict(importance),
        cards=dict(sorted(cards.items())),
        noise=_noise(stage, shares),
        notes=_notes(stage, len(shares), secure),
    )


def _together(choices: Mapping[str, ClientConfig], enough: int) -> dict[str, ClientConfig]:
    """Lowers ranks until every column is trained by enough clients: what one alone adds to would not be hidden by the sum."""
    most: dict[str, int] = {}
    for name in {name for choice in choices.values() for name in choice.ranks}:
        ranks = sorted((choice.ranks.get(name, 0) for choice in choices.values()), reverse=True)
        most[name] = ranks[enough - 1] if len(ranks) >= enough else 0
    if not any(most.values()):
        raise FedgroveError(
            f"privacy.secure_aggregation: {len(choices)} clients can tune, and no linear is given to {enough} of them, which "
            'it takes to hide one (privacy.min_group); set method = "lora", or lower privacy.min_group'
        )
    return {
        client: replace(
            choice, ranks={name: min(rank, most[name]) for name, rank in choice.ranks.items() if min(rank, most[name])}
        )
        for client, choice in choices.items()
    }


def _noise(stage: TuneStage, shares: Mapping[str, TuneAssignment]) -> dict[str, float]:
    if stage.epsilon is None or stage.dp_unit == "client":
        return {}
    steps = stage.rounds * stage.steps
    return {
        name: accounting.dp_sgd_noise_multiplier(
            stage.epsilon, stage.delta, min(1.0, share.batch * stage.length / share.tokens), steps
        )
        for name, share in shares.items()
    }


def _notes(stage: TuneStage, clients: int, secure: bool) -> list[str]:
    if stage.epsilon is None:
        return []
    if stage.dp_unit == "window":
        steps = stage.rounds * stage.steps
        return [release.window_statement(stage.epsilon, stage.delta, stage.length, steps, stage.dp_clip)]
    sigma = accounting.gaussian_noise_multiplier(stage.epsilon, stage.delta, stage.rounds) * stage.dp_clip / clients
    if sigma > whole.LARGEST / 16:
        raise FedgroveError(
            f"epsilon: every number would get noise of {sigma:.3g}, which is more than the sum can hold; raise epsilon, or "
            "lower bound or rounds"
        )
    adders = min_survivors(clients)
    return [release.client_statement(stage.epsilon, stage.delta, stage.rounds, stage.dp_clip, secure, adders)]


def worth(plan: TunePlan, stage: TuneStage, importance: Mapping[str, float]) -> float:
    """What a plan's ranks would be worth under another importance; see :func:`fedgrove.stages.tune.cost.gain`."""
    return sum(
        importance[name] * budget.gain(rank, stage.ranks[-1])
        for share in plan.clients.values()
        for name, rank in share.ranks.items()
    )


def importance_seconds(
    shares: Mapping[str, TuneAssignment], stage: TuneStage, sizes: ModelCost, cards: Mapping[str, Capabilities]
) -> dict[str, float]:
    """Seconds of computing until each client has measured the importance."""
    grid = SearchSpace(stage.bits, stage.batches, stage.ranks, stage.importance_steps)
    ranks = dict.fromkeys(sizes.linears, RANK)
    return {
        name: budget.compute_seconds(sizes, grid, Budget(speed=SPEED * cards[name].speed), ClientConfig(32, share.micro, 1, ranks))
        for name, share in shares.items()
    }


def _budget(card: Capabilities) -> Budget:
    return Budget(
        memory=card.memory or math.inf,
        speed=SPEED * card.speed,
        uplink=card.uplink / 8 if card.uplink else math.inf,
        devices=card.devices,
    )


def _default_deadline(sizes: ModelCost, grid: SearchSpace, budgets: Mapping[str, Budget]) -> float:
    """What the slowest client needs for the smallest batch at the smallest ranks: small steps teach more in the same time."""
    choice = ClientConfig(grid.bits[0], grid.batches[0], 1, dict.fromkeys(sizes.linears, grid.ranks[0]))
    return max(budget.seconds(sizes, grid, given, choice) for given in budgets.values())


def _uniform(
    stage: TuneStage, sizes: ModelCost, budgets: Mapping[str, Budget], cards: Mapping[str, Capabilities], number: float
) -> tuple[dict[str, ClientConfig], dict[str, str]]:
    """The same for all: the most bits, then the largest rank, that the weakest client can hold."""
    left_out: dict[str, str] = {}
    grid = SearchSpace(stage.bits, stage.batches, stage.ranks, stage.steps, 0, number)
    batch = stage.batches[-1]

    def fits(name: str, bits: int, rank: int) -> bool:
        choice = ClientConfig(bits, batch, 1, dict.fromkeys(sizes.linears, rank))
        return bits in cards[name].bits and budget.memory(sizes, grid, choice) <= budgets[name].memory

    for name in budgets:
        if not any(fits(name, bits, stage.ranks[0]) for bits in stage.bits):
            bits = min(stage.bits)
            need = budget.memory(sizes, grid, ClientConfig(bits, batch, 1, dict.fromkeys(sizes.linears, stage.ranks[0])))
            left_out[name] = (
                f"rank {stage.ranks[0]} in every linear needs {mebibytes(need, enough=True)} of memory, but it has "
                f"{mebibytes(budgets[name].memory)} (clients.memory); lower length, or allow fewer bits"
            )
    able = [name for name in budgets if name not in left_out]
    for bits in sorted(stage.bits, reverse=True):
        for rank in reversed(stage.ranks):
            if able and all(fits(name, bits, rank) for name in able):
                choice = ClientConfig(bits, batch, 1, dict.fromkeys(sizes.linears, rank))
                return {name: budget.widest(sizes, grid, budgets[name], choice) for name in able}, left_out
    if able:
        raise FedgroveError('method "lora": the clients have no bits in common that all can hold; allow more values in bits')
    return {}, left_out
