"""Rounds in which clients train the changes of linears, and the server aggregates them linear by linear."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedgrove.errors import FedgroveError
from fedgrove.evaluation.held_out import Losses, clients_done, log_once
from fedgrove.events import Phase
from fedgrove.models.expert_cut import routing_of
from fedgrove.rounds.aggregator.integers import IntegerSums
from fedgrove.rounds.clock import Clock
from fedgrove.rounds.request import CHANGE, Message
from fedgrove.stages.tune.aggregation import Options, change_aggregation_of
from fedgrove.stages.tune.changes import State
from fedgrove.stages.tune.exchanges.alone import EvaluateAlone
from fedgrove.stages.tune.exchanges.experts import HELD, ChooseExperts, check_held
from fedgrove.stages.tune.exchanges.personal import ComparePersonal
from fedgrove.stages.tune.exchanges.reduced import KeepExperts
from fedgrove.stages.tune.exchanges.train import Train, start_tensors
from fedgrove.stages.tune.fixed_point import LOSS
from fedgrove.stages.tune.fixed_round import FixedRound
from fedgrove.stages.tune.float_round import Bounds, FloatRound
from fedgrove.stages.tune.holding import Chosen, kept_of_own
from fedgrove.stages.tune.merging import write_merged
from fedgrove.stages.tune.parametrizations import trainable_of
from fedgrove.stages.tune.planning import Planning
from fedgrove.stages.tune.received import by_linear
from fedgrove.stages.tune.routed import ExpertRules, places_of
from fedgrove.stages.tune.server_optimizers import ServerOptimizerState, step
from fedgrove.stages.tune.train_settings import Training


class Loop(Planning):
    """See :class:`fedgrove.stages.tune.tuning.Tuning`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.method = trainable_of(self.config.parametrization)
        self.aggregation = change_aggregation_of(self.config.aggregation)
        self.dtype = getattr(torch, self.config.dtype)

    def finish(self) -> None:
        """Lets the clients choose their personal adapters."""
        self.learn(self.config.rounds)
        if self.config.personal:
            self.keep_personal()
        if self.config.personal_experts:
            self.keep_experts()

    def hold_experts(self) -> None:
        """Lets clients choose the experts that they hold, and plans with what the server may know of that.

        In the open it learns which experts each client holds; under secure aggregation, how many clients can train an expert.
        Experts that too few can train are trained by nobody: they would not change, or their sum would be that of one client.
        """
        job, plan, whole = self.federation.job, self.plan, self.plan.experts
        secure = job.privacy.secure_aggregation
        some = [client for client, one in plan.clients.items() if one.experts != whole]
        if whole is None or self.config.epsilon is not None or not (some or secure):
            return
        self.run.phase(Phase("tune", "choosing the experts that each client holds", stage=plan.stage))
        messages = {}
        for client in plan.clients if secure else some:
            common = {**self._common(client, 0), "held": None}
            number = plan.clients[client].experts
            assert number is not None
            request = ChooseExperts(**common, number=number, value=self.config.expert_value, reached=secure)
            messages[client] = Message(request)
        sums, clock = IntegerSums(lambda held, _: check_held(held, len(messages)), keep_parts=not secure), self._clock({})
        self.federation.aggregator.aggregate(messages, sums, layout=self.decoder, clock=clock)
        places = places_of(self.decoder)
        if secure:
            counts, enough = sums.sums[HELD.removeprefix(CHANGE)], job.together(len(plan.clients))
            self.chosen = Chosen(few=frozenset(name for name, place in places.items() if counts[place] < enough))
        else:
            held = {client: parts[HELD.removeprefix(CHANGE)] for client, parts in sums.parts.items()}
            others = [name for name in self.decoder.linear_names() if name not in places]
            linears = {
                client: frozenset([*others, *(name for name, place in places.items() if of_client[place])])
                for client, of_client in held.items()
            }
            counts = sum(held.values(), torch.zeros_like(next(iter(held.values())))) + len(plan.clients) - len(some)
            few = frozenset(name for name, place in places.items() if counts[place] < plan.min_group)
            self.chosen = Chosen(linears, few)
            for client in sorted(set(some) - set(held)):
                self.plan.left_out[client] = "it did not say which experts it holds"
        if not self.state.states:
            self.state.plan = self._planned(self.cost(), plan.importance, plan.gradients, 0)
            self.state.clock += clock.slowest(clock.spent)
            self.write_plan()

    def _rules(self) -> ExpertRules | None:
        """How experts are weighed; None: the model has none, or noise hides how many tokens reach them."""
        if self.plan.experts is None or self.config.epsilon is not None:
            return None
        per_token = routing_of(self.decoder.checkpoint.config).per_token
        return ExpertRules(places_of(self.decoder), per_token, self.plan.min_group)

    def train_round(self, round_: int) -> None:
        """One round: the clients train, and the server aggregates their changes."""
        plan, state = self.plan, self.state
        requests = {client: self._request(client, round_) for client in sorted(plan.clients)}
        messages = {client: Message(request, self._start(client)) for client, request in requests.items()}
        clock = self._clock({client: assignment.compute for client, assignment in plan.clients.items()})
        sums = self._sums(requests)
        heard = sorted(self.federation.aggregator.aggregate(messages, sums, layout=self.decoder, clock=clock))
        self._settle(requests, sums, heard, clock)
        state.clock += clock.slowest(heard)
        state.metrics.append((None, "clock", state.clock))
        self.keep_time(heard, clock)

    def _sums(self, requests: Mapping[str, Train]) -> FloatRound | FixedRound:
        """What the responses to these requests are added up in."""
        if self.config.precision == "fixed":
            return FixedRound(requests, self._rules())
        shapes = {name: self.decoder.read_shape(name) for name in self.plan.tuned()}
        clients = {client: self.plan.clients[client].ranks for client in requests}
        return FloatRound(
            self.method,
            self.aggregation,
            {name: self.state.state_of(name, shape) for name, shape in shapes.items()},
            shapes,
            {name: [ranks[name] for ranks in clients.values() if name in ranks] for name in shapes},
            clients,
            self.seed,
            Bounds(self.config.max_change, self.config.most_tokens),
            self.run.path / "work" / "changes",
            self._rules(),
        )

    def _settle(self, requests: Mapping[str, Train], sums: FloatRound | FixedRound, heard: Sequence[str], clock: Clock) -> None:
        """Brings the state to the end of a round, from what was added up of these clients."""
        seen = self.state.seen
        for client in heard:
            seen[client] = seen.get(client, 0) + requests[client].training.steps * self.plan.clients[client].batch
        if isinstance(sums, FixedRound):
            self._settle_fixed(sums, heard, clock)
        else:
            self._settle_floats(sums, heard, clock)

    def _settle_floats(self, sums: FloatRound, heard: Sequence[str], clock: Clock) -> None:
        state = self.state
        for client in heard:
            if client in sums.losses:
                state.metrics.append((client, "loss", sums.losses[client]))
            state.metrics.append((client, "seconds", clock.spent[client]))
        for client in sums.finish():
            self._say_scaled(client)
        for name, old in sums.states.items():
            if name in sums.unchanged:
                continue
            rank = max(sums.ranks[name])
            if self.method.RANKED:
                rank = max(rank, old.live.rank)
            try:
                new = self.aggregation.finish(old, sums.sums[name], Options(rank, self.config.partition))
            except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # of NaN or infinity; torch exports it in docs
                raise self._diverged(name) from error
            self._step(name, sums.shapes[name], old, new, rank)
        loss = sums.loss()
        if loss is not None:
            state.metrics.append((None, "loss", loss))

    def _say_scaled(self, client: str) -> None:
        most = f"{self.config.max_change:g} times the median"
        self.run.message(f"{client}: its change is more than {most}; it was scaled down")

    def _settle_fixed(self, sums: FixedRound, heard: Sequence[str], clock: Clock) -> None:
        """Adds the mean of the clients' differences to the state that they started from."""
        state, means = self.state, sums.means(heard)
        self._take(means)
        state.metrics += [(client, "seconds", clock.spent[client]) for client in heard]
        if LOSS in means:
            state.metrics.append((None, "loss", float(means[LOSS])))

    def _take(self, means: Mapping[str, Tensor]) -> None:
        """Adds the means of the clients' differences, ``<linear>/<part>``, to the state."""
        state, of_linears = self.state, by_linear(means)
        for name, rank in self.plan.widest().items():
            shape = self.decoder.read_shape(name)
            old = state.state_of(name, shape)
            parts = of_linears.get(name)
            if parts is None:
                continue  # an expert that too few clients trained
            live = self.method.after_round(old, parts, rank, self.dtype, name, self.seed)
            self._step(name, shape, old, State(live, old.frozen), rank)

    def _step(self, name: str, shape: tuple[int, int], old: State[Any], new: State[Any], rank: int) -> None:
        """Applies the server optimizer to a linear: a step from the old state towards the aggregation's result."""
        kind, state = self.config.server_optimizer, self.state
        remembered = state.optimizer.get(name, ServerOptimizerState(self.method.none(shape)))
        live, remembered = step(kind, old.live, new.live, remembered, self.config.server_lr, rank)
        if not all(bool(torch.isfinite(part).all()) for part in live.parts().values()):
            raise self._diverged(name)
        state.put(name, shape, State(live, new.frozen))
        if kind != "average":
            state.optimizer[name] = remembered

    def _diverged(self, name: str) -> FedgroveError:
        return FedgroveError(
            f"stage {self.plan.stage}: the clients' changes of {name} have no finite mean",
            "lower learning_rate, or leave out the client whose loss stands out",
        )

    def alone_request(self, client: str, texts: Mapping[str, int]) -> EvaluateAlone:
        """The request to one client to train without the others, by the plan in force; all that it sends are losses."""
        config, first = self.config, self._request(client, 0)
        train = first.model_copy(update={"seen": 0})
        rates = tuple(config.learning_rate_in(round_) for round_ in range(config.rounds))
        return EvaluateAlone(
            stage=self.plan.stage,
            texts=dict(texts),
            compute_dtype=self.federation.job.evaluate.compute_dtype,
            train=train,
            learning_rates=rates,
        )

    def _request(self, client: str, round_: int) -> Train:
        """The request to one client in a round."""
        config, assignment = self.config, self.plan.clients[client]
        return Train(
            **self._common(client, round_),
            parametrization=config.parametrization,
            trainer=config.trainer,
            shared_a=self.aggregation.SHARED_A,
            ranks=assignment.ranks,
            scales={name: config.scale(rank) for name, rank in assignment.ranks.items()} if self.method.RANKED else {},
            masked=self.masked,
            tokens=assignment.tokens,
            seen=self.state.seen.get(client, 0),
            dtype=config.dtype,
            pull=config.personal_pull,
            training=Training(
                steps=assignment.steps,
                batch=assignment.batch,
                micro=assignment.micro,
                learning_rate=config.learning_rate_in(round_),
                optimizer=config.optimizer,
                max_grad_norm=config.max_grad_norm,
                proximal=config.proximal,
            ),
            fixed=self.fixed_settings(self.plan.widest()),
            windows=self._window_noise(client),
        )

    def _start(self, client: str) -> dict[str, Tensor]:
        """The tensors of a client's request: for every linear the part that it trains, and the rest."""
        ranks, has = self.plan.clients[client].ranks, self.chosen.linears.get(client)
        starts = {
            name: self.aggregation.begin(state, ranks.get(name, 0))
            for name, state in self.state.states.items()
            if has is None or name in has
        }
        return start_tensors(starts, self.dtype, self.aggregation.SHARED_A)

    def keep_personal(self) -> None:
        """Lets every client compare the result with its own best change on its held-out text, and logs both losses."""
        stage, run, job = self.plan.stage, self.run, self.federation.job
        done = clients_done(run, stage)
        left = {client: assignment for client, assignment in self.plan.clients.items() if client not in done}
        if not left:
            return
        self.send_base()
        tensors: dict[str, Tensor] = {}
        for name, state in self.state.states.items():
            for part, value in state.total().compress().parts().items():
                tensors[f"rest/{name}/{part}"] = value.float().contiguous()
        messages = {}
        for client, assignment in left.items():
            request = ComparePersonal(
                **self._common(client, self.config.rounds),
                parametrization=self.config.parametrization,
                masked=self.masked,
                micro=assignment.micro,
                base=job.model.name,
                title=f"{job.name}: {client}'s own adapter",
            )
            messages[client] = Message(request, tensors)
        for client, _, reply in self.federation.collect(messages):
            assert isinstance(reply, Losses)
            if reply.shared is None or reply.own is None:
                run.message(f"tune: client '{client}' holds out no text or took part in no round: no personal adapter")
                continue
            log_once(run, stage, client, reply)

    def keep_experts(self) -> None:
        """Lets every client write the model of the experts that matter most to its text; nothing comes back.

        The changes are those that :meth:`merge` merges, not rounded, so that what clients write has the bits of the result.
        """
        stage, run, job, config = self.plan.stage, self.run, self.federation.job, self.config
        number = kept_of_own(stage, config, self.cost())
        self.send_base()
        run.phase(Phase("tune", "writing each client's own experts", stage=stage))
        tensors = {
            f"rest/{name}/{part}": value.contiguous()
            for name, state in self.state.states.items()
            for part, value in state.total().parts().items()
        }
        messages = {}
        for client in self.plan.clients:
            request = KeepExperts(
                **{**self._common(client, config.rounds), "held": None},
                parametrization=config.parametrization,
                masked=self.masked,
                number=number,
                value=config.expert_value,
                base=job.model.name,
                title=f"{job.name}: {client}'s own experts",
            )
            messages[client] = Message(request, tensors)
        for _ in self.federation.collect(messages):
            pass

    def merge(self, folder: Path) -> None:
        """Writes the weights with their changes merged, one file per block, in the checkpoint's dtype."""
        totals = {name: state.total() for name, state in self.state.states.items()}
        write_merged(self.decoder, self.method, totals, self.masked, folder)

    def write_adapter(self) -> Path | None:
        """Writes the changes as an adapter, besides the merged model; None if there is none to write."""
        job, out = self.federation.job, self.run.path / "adapter"
        totals = {name: state.total() for name, state in self.state.states.items()}
        title, pruned, changed = f"{job.name}: adapter", bool(self.masked), self.model.is_changed()
        written = self.method.write_adapter(out, self.decoder, totals, job.model.name, title, pruned, changed)
        return out if written else None
