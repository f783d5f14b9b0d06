"""Fits a gate that looks at features, with all clients. Each exchange leaves a file, from which a killed run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from fedgrove.errors import FedgroveError
from fedgrove.events import Phase
from fedgrove.models.features import typical
from fedgrove.models.tensor_files import save_tensors
from fedgrove.rounds.aggregator.integers import IntegerSums
from fedgrove.rounds.aggregator.moments import Moments
from fedgrove.rounds.request import Message
from fedgrove.stages.tune.exchanges.gate import NOVELTY, NUMBER, OWN, FitGate, SendDirection, SumFeatures
from fedgrove.stages.tune.gates import feature_gate_of
from fedgrove.stages.tune.pool.card import GATE
from fedgrove.stages.tune.pool.config import AUTO, Pool
from fedgrove.stages.tune.pool.features import ALONG, CENTER, DIRECTION, MEAN, SCALE, STATE, layers_of
from fedgrove.stages.tune.pool.scale import OWNERS, PROJECTED, at_random, between_owners, directions, that_tell_apart
from fedgrove.stages.tune.tuning import Tuning

ENOUGH = 1e-4  # nats of a window: a fit that gains less has ended


Exchange = SumFeatures | SendDirection | FitGate


class Fit:
    """A gate that is fitted.

    Args:
        common: the fields that every request of the stage has, for a client and a round.
    """

    def __init__(self, tuning: Tuning, pool: Pool, common: Callable[[str, int], dict[str, Any]]):
        self._tuning, self._pool, self._common = tuning, pool, common
        self._gate = feature_gate_of(pool.gate)
        self._folder = tuning.run.path / "work" / f"stage-{tuning.plan.stage}"

    def run(self, enough: Callable[[dict[str, Tensor]], Tensor] | None = None) -> dict[str, Tensor]:
        """Tensors of the fitted gate: those of :func:`fields_of`'s requests, and without noise ``novelty``, a histogram.

        Args:
            enough: given the tensors of a gate, which members stay, (members,) bool; asked again until all do.
        """
        final = self._folder / GATE
        if final.is_file():
            return _read(final)[0]
        files = sorted(self._folder.glob("gate-*.safetensors"))
        if not files:
            self._begin()
        while True:
            tensors, facts = _read(sorted(self._folder.glob("gate-*.safetensors"))[-1])
            if facts["done"]:
                break
            self._step(tensors, facts["likelihoods"])
        while enough is not None and not bool((stays := enough(tensors)).all()):
            kept = self._gate.kept(_state(tensors), stays)
            tensors = tensors | {STATE + name: value for name, value in kept.items()}
        if not self._tuning.config.noisy_gate:
            round_ = len(facts["likelihoods"]) + 1
            novelty = self._sum(lambda common: FitGate(**common, **fields_of(tensors), last=True), tensors, round_)
            tensors[NOVELTY] = novelty[NOVELTY]
        save_tensors(tensors, final, {"facts": json.dumps(facts)})
        return tensors

    def _begin(self) -> None:
        """What features are scaled by, from their sums, and the state of the first exchange."""
        tuning, pool = self._tuning, self._pool
        tuning.run.phase(Phase("tune", "what features of windows are like", stage=tuning.plan.stage))
        layers = layers_of(pool.blocks, len(tuning.decoder))
        center, scale = typical(tuning.decoder, layers, min(pool.prefix, tuning.config.length), tuning.seed)
        tensors = {CENTER: center, SCALE: scale}
        if self._gate.OF_CLIENTS:
            mean, along = self._of_owners(tensors)
        else:
            mean, along, pool = self._of_windows(tensors)
        state = self._gate.begin(pool, along.shape[1], tuning.seed)
        self._write(0, tensors | {MEAN: mean, ALONG: along.contiguous()}, state, [], False)

    def _of_windows(self, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor, Pool]:
        """``mean`` and ``along`` of a gate that looks at windows, and the pool with its number of members."""
        pool, owners = self._pool, len(self._tuning.plan.clients)
        sums = self._sum(lambda common: SumFeatures(**common, between=pool.directions == "owners"), tensors, 0)
        found = Moments.of(sums)
        if isinstance(pool.members, int) and found.records < pool.members:
            raise FedgroveError(
                f"stages.{self._tuning.plan.stage}.pool.members: {pool.members}, but {found.records} windows are fitted",
                "lower members or length",
            )
        if OWN not in sums:
            return *directions(found, pool.size), pool
        if pool.members == AUTO:  # between as many kinds there is one direction fewer
            between = between_owners(found, sums[OWN], pool.size, owners)[1].shape[1]
            pool = pool.model_copy(update={"members": min(pool.most, between + 1, found.records)})
        return *that_tell_apart(found, sums[OWN], pool.size, owners, pool.most), pool

    def _of_owners(self, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The same of a gate of owners: the mean of their directions, and the projection."""
        pool, tuning = self._pool, self._tuning
        budget, halves = tuning.config.privacy_budget(), pool.members == AUTO
        sums = self._sum(lambda common: SendDirection(**common, size=pool.size, halves=halves, budget=budget), tensors, 0)
        numbers = min(PROJECTED, len(tensors[CENTER]))
        return OWNERS.decode(sums[DIRECTION]) / sums[NUMBER], at_random(numbers, pool.size, tuning.seed)

    def _step(self, tensors: dict[str, Tensor], likelihoods: list[float]) -> None:
        tuning, pool, round_ = self._tuning, self._pool, len(likelihoods) + 1
        tuning.run.phase(Phase("tune", "fitting the gate", stage=tuning.plan.stage, round=round_ - 1, rounds=pool.fit_rounds))
        sums = self._sum(lambda common: FitGate(**common, **fields_of(tensors)), tensors, round_)
        state, likelihood = self._gate.settle(_state(tensors), sums)
        done = round_ == pool.fit_rounds or (bool(likelihoods) and likelihood - likelihoods[-1] < ENOUGH)
        if done:
            state = self._gate.finish(state, sums, tuning.plan.min_group)
        self._write(round_, tensors, state, [*likelihoods, likelihood], done)

    def _sum(self, request: Callable[[dict[str, Any]], Exchange], tensors: dict[str, Tensor], round_: int) -> dict[str, Tensor]:
        tuning, pool = self._tuning, self._pool
        gate = {"gate": pool.gate, "blocks": pool.blocks, "prefix": pool.prefix}
        messages = {
            client: Message(request({**self._common(client, round_), **gate}), tensors) for client in tuning.plan.clients
        }
        any_one = request({**self._common(min(messages), round_), **gate})
        sums = IntegerSums(lambda total, replies: any_one.check_sums(total))
        tuning.federation.aggregator.aggregate(messages, sums, layout=tuning.decoder)
        return sums.sums

    def _write(
        self, round_: int, tensors: dict[str, Tensor], state: dict[str, Tensor], likelihoods: list[float], done: bool
    ) -> None:
        kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(STATE)}
        kept |= {STATE + name: value.contiguous() for name, value in state.items()}
        facts = {"likelihoods": likelihoods, "done": done}
        save_tensors(kept, self._folder / f"gate-{round_:04d}.safetensors", {"facts": json.dumps(facts)})


def fields_of(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The sizes of a gate's state, as requests have them."""
    starts, members = next(value.shape[:2] for name, value in sorted(tensors.items()) if name.startswith(STATE))
    return {"members": members, "starts": starts, "size": tensors[ALONG].shape[1]}


def likelihoods_of(folder: Path) -> list[float]:
    """The mean log-likelihood of a window in each exchange of a fit that has ended."""
    found: list[float] = _read(folder / GATE)[1]["likelihoods"]
    return found


def _state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(STATE): value for name, value in tensors.items() if name.startswith(STATE)}


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(file, framework="pt") as opened:
        facts: dict[str, Any] = json.loads(opened.metadata()["facts"])
        return {name: opened.get_tensor(name) for name in opened.keys()}, facts  # noqa: SIM118
