"""A running tuning stage: what all kinds of rounds have in common. A kind of round is a file of ``loops``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedgrove.client.server_weights import FEW_ZEROS
from fedgrove.evaluation.rounds import evaluate_round
from fedgrove.events import Phase
from fedgrove.job.stage_config import cut_by
from fedgrove.models.blocks import Decoder
from fedgrove.models.cost import ModelCost, measure_cost
from fedgrove.models.experts import slices
from fedgrove.models.stream import Checkpoint
from fedgrove.privacy.secagg.session import min_survivors
from fedgrove.rounds.clock import Clock, Pace
from fedgrove.rounds.federation import Federation
from fedgrove.rounds.request import Message
from fedgrove.stages.tune.client_model import digest_of_base
from fedgrove.stages.tune.config import Config
from fedgrove.stages.tune.exchanges.alone import EvaluateAlone
from fedgrove.stages.tune.exchanges.base import KeepWeights
from fedgrove.stages.tune.fixed_point import ClientNoise
from fedgrove.stages.tune.plan import Plan
from fedgrove.stages.tune.state import TuningState
from fedgrove.stages.tune.train_settings import WindowNoise


def pruned_linears(decoder: Decoder) -> list[str]:
    """The linears whose zeros must stay zero: pruned by an earlier stage, or before the run."""
    return [name for name in decoder.linear_names() if float((decoder.read_matrix(name) == 0).double().mean()) > FEW_ZEROS]


@dataclass
class Tuning:
    """A running tuning stage.

    Attributes:
        model: the model before the stage.
        decoder: the same model, for shapes and weights.
        state: changes from round to round, and is saved.
        base: the hashes of the requests by which every client was sent the changed base weights.
    """

    model: Checkpoint
    decoder: Decoder
    config: Config
    federation: Federation
    state: TuningState
    base: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.run = self.federation.run
        self.masked = tuple(pruned_linears(self.decoder))

    @property
    def plan(self) -> Plan:
        """The plan in force."""
        return self.state.plan

    @property
    def seed(self) -> str:
        """The stage's seed, for batches and shared factors."""
        return f"{self.federation.job.seed}/{self.plan.stage}"

    def prepare(self, round_: int, again: bool) -> None:
        """Before a round, what it needs to know.

        Args:
            again: whether it is the first round, or the job says that what was measured is to be measured again.
        """

    def train_round(self, round_: int) -> None:
        """One round: the clients train, and the server aggregates what they send."""
        raise NotImplementedError

    def merge(self, folder: Path) -> None:
        """Writes the weights with their changes merged, one file per block, in the checkpoint's dtype and layout."""
        raise NotImplementedError

    def write_adapter(self) -> Path | None:
        """Writes the changes as an adapter, besides the merged model; None if there is none to write."""
        return None

    def hold_experts(self) -> None:
        """Lets clients whose memory is too small for all experts choose those that they hold."""

    def alone_request(self, client: str, texts: Mapping[str, int]) -> EvaluateAlone:
        """The request to one client to train without the others; only for parametrizations that are ``ALONE``.

        Args:
            texts: number of windows of each held-out text.
        """
        raise NotImplementedError

    def finish(self) -> None:
        """After the last round."""

    def write_plan(self) -> None:
        """Writes the plan in force to the run folder."""
        self.run.write_json(f"plan-{self.plan.stage}-tune.json", self.plan.model_dump(mode="json"))

    def send_base(self) -> None:
        """Sends every client the weights that earlier stages changed, block by block."""
        changed = self.model.changed()
        self.base = []
        sent: set[str] = set()  # of weights that blocks share
        clock, cut = self._clock({}), cut_by(self.federation.job.stages[: self.plan.stage])
        for block in range(len(self.decoder)):
            weights = self.decoder.block_names(block).values()
            biases = {name.removesuffix("weight") + "bias" for name in weights}
            names = [name for name in changed if name not in sent and (name in biases or self._is_of(name, weights))]
            if not names:
                continue
            sent.update(names)
            title, blocks = "sending the model", len(self.decoder)
            self.run.phase(Phase("send", title=title, stage=self.plan.stage, block=block, blocks=blocks))
            request = KeepWeights(
                stage=self.plan.stage,
                part=len(self.base),
                cut=cut,
                kept_blocks=self.model.kept_blocks,
                kept_experts=self._kept_experts(),
            )
            message = Message(request, {name: self.model.read(name) for name in names})
            for _ in self.federation.collect(dict.fromkeys(self.plan.clients, message), clock=clock):
                pass
            self.base.append(request.sum_digest(dict(message.tensors)))
        if not self.state.states:
            self.state.clock += clock.slowest(clock.spent)

    def _is_of(self, name: str, weights: Collection[str]) -> bool:
        """Whether a tensor of the checkpoint is one of these weights, or holds some of them: fused experts."""
        return name in weights or bool(slices(name, self.model.spec(name)[0]).keys() & set(weights))

    def _kept_experts(self) -> tuple[tuple[int, tuple[int, ...]], ...] | None:
        kept = self.model.kept_experts
        return None if kept is None else tuple(sorted(kept.items()))

    def cost(self) -> ModelCost:
        """The sizes that determine the cost of training."""
        return measure_cost(self.decoder, self.config.length, bool(self.masked))

    def _common(self, client: str, round_: int) -> dict[str, Any]:
        return {
            "stage": self.plan.stage,
            "round": round_,
            "parts": len(self.base),
            "base_digest": digest_of_base(self.base),
            "cut": cut_by(self.federation.job.stages[: self.plan.stage]),
            "kept_blocks": self.decoder.checkpoint.kept_blocks,
            "kept_experts": self._kept_experts(),
            "held": self._held(client),
            "bits": self.plan.clients[client].bits,
            "length": self.config.length,
            "seed": self.seed,
            "personal": self.config.personal,
        }

    def _held(self, client: str) -> int | None:
        """How many experts of every block a client has in memory; None: all."""
        number = self.plan.clients[client].experts
        return None if number == self.plan.experts else number

    def _clock(self, compute: Mapping[str, float]) -> Clock:
        """The clock of one exchange with the plan's clients, by their capabilities and what they compute.

        Of clients that are simulated with another speed than they report, it is that of the speed that they have.

        Args:
            compute: by client, seconds at the speed that the plan takes it to have.
        """
        known = {client: self.plan.capabilities[client] for client in self.plan.clients}
        true = {one.name: one.speed for one in self.federation.job.clients if one.claimed_speed is not None}
        paces = {}
        for name, one in known.items():
            speed = true.get(name, one.speed)
            assert not isinstance(speed, str)  # the job refuses to measure the speed of a client that claims one
            paces[name] = Pace(compute.get(name, 0.0) * one.speed / speed, one.uplink, one.downlink)
        return Clock(paces)

    def log(self, round_: int) -> None:
        """Logs the round's measurements, after the state is saved; a resumed run skips what is logged already."""
        lines = self.run.metrics()
        known = {
            (line["client"], line["name"]) for line in lines if (line["stage"], line["round"]) == (self.plan.stage, round_)
        }
        for client, name, value in self.state.metrics:
            if (client, name) not in known:
                self.run.log(self.plan.stage, round_, client, name, value)

    def evaluate(self, round_: int) -> None:
        """Measures the held-out perplexity after a round, as often as ``eval_every`` says."""
        if self.config.eval_every and (round_ + 1) % self.config.eval_every == 0:
            folder = self.run.path / "work" / f"stage-{self.plan.stage}" / "measured"
            self.merge(folder)
            evaluate_round(self.model.over(folder), self.plan.stage, round_, self.run, self.federation.device)

    def _client_noise(self) -> ClientNoise | None:
        config = self.config
        if config.epsilon is None or config.trainer_method.PRIVATE:
            return None
        secure = self.federation.job.privacy.secure_aggregation
        return ClientNoise(
            epsilon=config.epsilon,
            delta=config.delta,
            clip=config.dp_clip,
            rounds=config.rounds,
            adders=min_survivors(len(self.plan.clients)) if secure else 0,
        )

    def _window_noise(self, client: str) -> WindowNoise | None:
        config = self.config
        if config.epsilon is None or not config.trainer_method.PRIVATE:
            return None
        noise = self.plan.noise[client]
        return WindowNoise(
            epsilon=config.epsilon,
            delta=config.delta,
            noise=noise,
            rounds=config.rounds,
            clip=config.dp_clip,
            gate=config.noisy_gate,
        )
