"""Rounds of steps along random directions: coefficients go to the clients, differences of losses come back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedgrove.errors import FedgroveError
from fedgrove.events import Phase
from fedgrove.models.tensor_files import save_tensors
from fedgrove.rounds.aggregator.integers import IntegerSums
from fedgrove.rounds.request import CHANGE, Message
from fedgrove.stages.tune.aggregation import seed_aggregation_of
from fedgrove.stages.tune.changes import State
from fedgrove.stages.tune.exchanges.seeds import (
    CHANCES,
    COEFFICIENTS,
    CURVES,
    DIFFERENCES,
    MEASURED,
    SIZES,
    Measure,
    Step,
    Took,
    measuring_rounds,
    measuring_share,
    perturbations_of,
    rank_of,
)
from fedgrove.stages.tune.factors import Factors
from fedgrove.stages.tune.parametrizations.seeds import Coefficients, none
from fedgrove.stages.tune.peft_adapter import write_lora
from fedgrove.stages.tune.seeds.keys import AUTO
from fedgrove.stages.tune.seeds.moving import Adapters, Linear, moving_of
from fedgrove.stages.tune.seeds.offsets import LARGEST, Offsets, masked_merge
from fedgrove.stages.tune.seeds.steps import choose_perturbation, coefficient, curvature, slope_limit
from fedgrove.stages.tune.seeds.targets import is_target
from fedgrove.stages.tune.tuning import Tuning

NAME = "all"  # of the one state that all linears share
# Of the rate that is best without noise, 1/trace. Slopes of a sample of windows have noise, which costs the square of the rate:
# at 1/2 the loss of E2E's answers rose, at 1/4 that of newsgroups. 1/8 is within a factor of two of the best on four corpora.
STABLE = 0.125


class Loop(Tuning):
    """See :class:`fedgrove.stages.tune.tuning.Tuning`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.aggregation = seed_aggregation_of(self.config.aggregation)
        offsets = Offsets(self.run.path / "work" / f"stage-{self.plan.stage}" / "offsets", self.seed)
        self._moving = moving_of(offsets, self.seed, rank_of(self.config))

    def prepare(self, round_: int, again: bool) -> None:
        """Measures what the job calls "auto": the perturbation once, the curvature repeatedly: it grows."""
        config = self.config
        if not again or round_ not in measuring_rounds(config):
            return
        what = "measuring the curvature"
        self.run.phase(Phase("tune", what, stage=self.plan.stage, round=round_, rounds=config.rounds))
        perturbations = (self.state.measured["perturbation"],) if round_ else perturbations_of(config)
        requests = {
            client: Measure(**self._along(client, round_), perturbations=perturbations, directions=MEASURED)
            for client in sorted(self.plan.clients)
        }
        tensors = {COEFFICIENTS: self._coefficients(round_).c}
        share = measuring_share(len(perturbations), config.steps)
        seconds = {name: one.compute * share for name, one in self.plan.clients.items()}
        sums, clock = IntegerSums(), self._clock(seconds)
        messages = {client: Message(request, tensors) for client, request in requests.items()}
        heard = self.federation.aggregator.aggregate(messages, sums, layout=self.decoder, clock=clock)
        differences, sizes, curves = (sums.sums[name.removeprefix(CHANGE)] for name in (DIFFERENCES, SIZES, CURVES))
        self._refuse_no_difference(differences, perturbations[0])
        chosen = choose_perturbation(perturbations, differences) if len(perturbations) > 1 else perturbations[0]
        measured = {"perturbation": chosen}
        if config.learning_rate == AUTO:
            windows, row = sum(requests[client].batch for client in heard), perturbations.index(chosen)
            trace = curvature(curves[row], windows, chosen)
            if trace > 0:
                measured["learning_rate"] = STABLE / trace
                measured["max_slope"] = slope_limit(sizes[row], windows, chosen)
            elif "learning_rate" in self.state.measured:  # a sample of windows can miss those that curve
                measured = self.state.measured
                self.run.message("the loss does not curve upwards on these windows; the learning rate stays")
            else:
                raise FedgroveError(
                    f"stage {self.plan.stage}: learning_rate cannot be measured, because the loss does not curve upwards "
                    f"({trace:.3g})",
                    "set learning_rate, such as 1e-4",
                )
        self.state.measured = measured
        self.state.clock += clock.slowest(heard)
        self.state.metrics += [(None, f"measured/{key}", value) for key, value in sorted(measured.items())]

    def train_round(self, round_: int) -> None:
        """One round: the clients take steps, and the server the mean of their steps along each direction."""
        config, state = self.config, self.state
        steps = self._coefficients(round_)
        chances = self.aggregation.chances(steps.c, steps.draws, config.sampling)
        tensors = {COEFFICIENTS: steps.c} | ({} if chances is None else {CHANCES: chances})
        requests = {client: self._step(client, round_) for client in sorted(self.plan.clients)}
        clock = self._clock({client: assignment.compute for client, assignment in self.plan.clients.items()})
        sums = IntegerSums()
        messages = {client: Message(request, tensors) for client, request in requests.items()}
        replies = self.federation.aggregator.aggregate(messages, sums, layout=self.decoder, clock=clock)
        heard = sorted(replies)
        total = sums.sums[DIFFERENCES.removeprefix(CHANGE)].long()
        first = requests[heard[0]]
        if first.noise:
            total = first.noise.mechanism(first.slope_weight).add_at_server(total)
        self._refuse_no_difference(total, first.perturbation)
        state.put(NAME, (len(steps.c), 1), State(self._moved(steps, total, requests, heard, chances), none((0, 1))))
        for client in heard:
            state.seen[client] = state.seen.get(client, 0) + config.steps * self.plan.clients[client].batch
            state.metrics.append((client, "seconds", clock.spent[client]))
        self._log_losses({client: reply for client, reply in replies.items() if isinstance(reply, Took)}, requests)
        state.clock += clock.slowest(heard)
        state.metrics.append((None, "clock", state.clock))

    def _moved(
        self, steps: Coefficients, total: Tensor, requests: Mapping[str, Step], heard: list[str], chances: Tensor | None
    ) -> Coefficients:
        """The coefficients after a round: a step along each direction by the mean slope over all windows."""
        first = requests[heard[0]]
        windows = sum(requests[client].batch for client in heard)
        moves = [coefficient(one, windows, first.perturbation, first.learning_rate) for one in total.tolist()]
        summed = torch.tensor(self.aggregation.summed(first.drawing("", chances)))
        draws = [one for client in heard for one in self.aggregation.draw(requests[client].drawing(client, chances))]
        moved = Coefficients(
            steps.c.index_add(0, summed, torch.tensor(moves)),
            steps.draws.index_add(0, torch.tensor(draws), torch.ones(len(draws), dtype=torch.int64)),
        )
        if bool((moved.c.abs() > LARGEST).any()):
            raise FedgroveError(f"stage {self.plan.stage}: the model moved too far", "lower learning_rate")
        return moved

    def _refuse_no_difference(self, differences: Tensor, perturbation: float) -> None:
        if not differences.any():
            raise FedgroveError(
                f"stage {self.plan.stage}: at perturbation = {perturbation:g} no loss differs between the model's two sides",
                "raise perturbation, or check the clients' data",
            )

    def _log_losses(self, replies: Mapping[str, Took], requests: Mapping[str, Step]) -> None:
        total, windows = 0.0, 0
        for client, reply in sorted(replies.items()):
            if reply.skipped:
                self.run.message(f"{client}: the loss of {reply.skipped} of its steps was not finite; they were skipped")
                self.state.metrics.append((client, "skipped", float(reply.skipped)))
            if reply.loss is not None:
                self.state.metrics.append((client, "loss", reply.loss))
                total, windows = total + requests[client].batch * reply.loss, windows + requests[client].batch
        if windows:
            self.state.metrics.append((None, "loss", total / windows))

    def _coefficients(self, round_: int) -> Coefficients:
        """The steps so far, with room for those of this round."""
        size = self.config.seeds or (round_ + 1) * self.config.steps
        state = self.state.states.get(NAME)
        return none((size, 1)) if state is None else state.live.padded(size)

    def _along(self, client: str, round_: int) -> dict[str, Any]:
        assignment = self.plan.clients[client]
        return self._common(client, round_) | {
            "tokens": assignment.tokens,
            "batch": assignment.batch,
            "clients": len(self.plan.clients),
            "masked": self.masked,
            "target_modules": self.config.target_modules,
            "rank": rank_of(self.config),
        }

    def _step(self, client: str, round_: int) -> Step:
        """The request to one client in a round."""
        config, measured = self.config, self.state.measured
        auto = config.learning_rate == AUTO
        return Step(
            **self._along(client, round_),
            aggregation=config.aggregation,
            trainer=self.plan.clients[client].trainer,
            seeds=config.seeds,
            steps=config.steps,
            seen=self.state.seen.get(client, 0),
            learning_rate=measured["learning_rate"] * config.schedule_in(round_) if auto else config.learning_rate_in(round_),
            perturbation=measured["perturbation"] if isinstance(config.perturbation, str) else config.perturbation,
            max_slope=measured["max_slope"] if auto else 0.0,
            says_loss=config.epsilon is None and not self.federation.job.privacy.secure_aggregation,
            windows=self._window_noise(client),
            noise=self._client_noise(),
        )

    def merge(self, folder: Path) -> None:
        """Replays all steps, one file per block; the sum of the steps so far is kept in the run folder."""
        steps = self.state.states[NAME].live
        for block in range(len(self.decoder)):
            result = {}
            for linear in self._linears(block):
                after = self._moving.weight(linear, steps.c, linear.weight.dtype)
                result[linear.stored] = masked_merge(linear.weight, after) if linear.name in self.masked else after
            save_tensors(result, folder / f"block-{block:04d}.safetensors")

    def write_adapter(self) -> Path | None:
        """Where adapters move, writes them as a LoRA adapter; None if the weights do, or if there was no step."""
        if not isinstance(self._moving, Adapters):
            return None
        steps, job, out = self.state.states[NAME].live, self.federation.job, self.run.path / "adapter"
        changes: dict[str, Factors] = {
            linear.name: self._moving.factors(linear, steps.c)
            for block in range(len(self.decoder))
            for linear in self._linears(block)
        }
        title, pruned, changed = f"{job.name}: adapter", bool(self.masked), self.model.is_changed()
        return out if write_lora(out, self.decoder, changes, job.model.name, title, pruned, changed) else None

    def _linears(self, block: int) -> Iterator[Linear]:
        """The linears of a block that move, as they were before the stage; of those that share a weight, the first."""
        for linear, stored in self.decoder.block_names(block).items():
            name = f"{self.decoder.prefix}.{block}.{linear}"
            if name == self.decoder.linear_name(block, linear) and is_target(name, self.config.target_modules):
                yield Linear(name, stored, self.decoder.model.get_submodule(name), self.model.read(stored))
