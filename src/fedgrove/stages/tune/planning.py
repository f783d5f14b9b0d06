"""Planning while clients train: what they measure, what rounds gained, and when the plan is made anew."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from fedgrove.evaluation.rounds import loss_after
from fedgrove.events import Phase
from fedgrove.job.federated import FederatedJob
from fedgrove.models.cost import ModelCost
from fedgrove.rounds.clock import Clock
from fedgrove.rounds.request import Message
from fedgrove.stages.tune.exchanges.importance import ImportanceSum, ScoreLinears
from fedgrove.stages.tune.fixed_point import FixedPointChanges
from fedgrove.stages.tune.holding import NOTHING_CHOSEN, costs_of
from fedgrove.stages.tune.objective import GAINED, PREDICTED, Gradients, is_off
from fedgrove.stages.tune.plan import Plan, importance_seconds, make_plan, progress
from fedgrove.stages.tune.planners import planner_of
from fedgrove.stages.tune.speeds import CORRECTED, MEASURED, corrected
from fedgrove.stages.tune.tuning import Tuning

HYSTERESIS = 1.05  # a new plan replaces the old one only if it is worth this factor more
KEPT_SCORE = 0.5  # weight of the old importance in the new one


class Planning(Tuning):
    """See :class:`fedgrove.stages.tune.tuning.Tuning`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.chosen = NOTHING_CHOSEN

    def prepare(self, round_: int, again: bool) -> None:
        """Where the planner needs the importance, measures it and plans with it; predicts what the round will gain."""
        if not planner_of(self.config.planner).NEEDS_IMPORTANCE:
            return
        off = self.learn(round_)
        if self.config.replan_off:
            self.correct_speeds(round_)
        if again or (off and self.config.replan_off):
            self.plan_anew(round_)
        worth = progress(self.plan, self.config, self.plan.importance, self.plan.gradients)
        self.state.progress.begin(worth, self.config.schedule_in(round_))
        if self.state.progress.predicted is not None:
            self.state.metrics.append((None, PREDICTED, self.state.progress.predicted))

    def learn(self, round_: int) -> bool:
        """Compares what the round before this one gained with what was predicted, and logs it; returns whether it was off."""
        known, before = self.state.progress, round_ - 1
        loss = self._loss_after(before) if known.coming is not None else None
        if loss is None:
            return False
        predicted = known.predicted
        gained = known.add(loss)
        if gained is None:
            return False
        lines = self.run.metrics()
        if not any((line["stage"], line["round"], line["name"]) == (self.plan.stage, before, GAINED) for line in lines):
            self.run.log(self.plan.stage, before, None, GAINED, gained)
        return predicted is not None and is_off(predicted, gained)

    def keep_time(self, heard: Collection[str], clock: Clock) -> None:
        """Remembers how long the round took each client, by the server's clock or, in a simulation, by the modelled one."""
        if not (self.config.replan_off and planner_of(self.config.planner).NEEDS_IMPORTANCE):
            return  # measured times are never the same twice
        seconds = clock.elapsed if isinstance(self.federation.job, FederatedJob) else clock.spent
        self.state.metrics += [(client, MEASURED, seconds[client]) for client in sorted(heard)]

    def correct_speeds(self, round_: int) -> None:
        """Plans again, with what is known of the linears, if the last round took a client another time than promised."""
        plan, before = self.plan, (self.plan.stage, round_ - 1, MEASURED)
        lines = [line for line in self.run.metrics() if (line["stage"], line["round"], line["name"]) == before]
        speeds = corrected(plan, {line["client"]: line["value"] for line in lines if line["client"] in plan.clients})
        if not speeds:
            return
        known = {
            client: one.model_copy(update={"speed": speeds[client]}) if client in speeds else one
            for client, one in plan.capabilities.items()
        }
        for client, speed in speeds.items():
            said = plan.capabilities[client].speed
            self.run.message(f"{client}: its rounds show a speed of {speed:g}, not {said:g}; the plan takes that from now on")
            self.state.metrics.append((client, CORRECTED, speed))
        self.state.plan = plan.model_copy(update={"capabilities": known})
        self.state.plan = self._planned(self.cost(), plan.importance, plan.gradients, round_)
        self.write_plan()

    def _loss_after(self, round_: int) -> float | None:
        """The mean held-out loss after a round, in nats a token; where not every round is measured, the clients' own."""
        if self.config.eval_every == 1:
            return loss_after(self.run, self.plan.stage, round_)
        lines = [line for line in self.run.metrics() if (line["stage"], line["round"]) == (self.plan.stage, round_)]
        return next((line["value"] for line in lines if line["client"] is None and line["name"] == "loss"), None)

    def plan_anew(self, round_: int) -> None:
        """Lets the clients score the linears, and plans again with the new importance."""
        config, plan = self.config, self.plan
        what = "measuring which weights are worth tuning"
        self.run.phase(Phase("tune", what, stage=plan.stage, round=round_, rounds=config.rounds))
        names = list(self.decoder.linear_names())
        requests = {
            client: ScoreLinears(
                **self._common(client, round_),
                tokens=assignment.tokens,
                steps=config.importance_steps,
                micro=assignment.micro,
                learning_rate=config.rate,
                ranks=config.ranks,
                fixed=self.fixed_settings({}),
            )
            for client, assignment in plan.clients.items()
        }
        messages = {client: Message(request) for client, request in requests.items()}
        cost = self.cost()
        held = {client: one.experts for client, one in plan.clients.items() if one.experts is not None}
        costs = costs_of(cost, held, self.chosen) if held else dict.fromkeys(plan.clients, cost)
        clock = self._clock(importance_seconds(plan.clients, config, costs, plan.capabilities))
        total = ImportanceSum(names, requests, config.most_tokens, self.chosen.linears)
        self.federation.aggregator.aggregate(messages, total, layout=self.decoder, clock=clock)
        importance, gradients = total.importance(), total.gradients()
        if round_ > 0:
            importance = {name: KEPT_SCORE * plan.importance[name] + (1 - KEPT_SCORE) * importance[name] for name in names}
        new = self._planned(cost, importance, gradients, round_)
        old, better = (progress(one, config, importance, gradients) for one in (plan, new))
        if round_ == 0 or better > HYSTERESIS * old:
            self.state.plan = new
        else:
            measured = {"importance": importance, "coherence": gradients.coherence, "kept": dict(gradients.kept)}
            self.state.plan = plan.model_copy(update=measured)
        self.state.clock += clock.slowest(clock.spent)
        self.state.metrics += [(None, f"importance/{name}", importance[name]) for name in names]
        self.state.metrics.append((None, "noise scale", gradients.noise))
        self.write_plan()

    def _planned(self, cost: ModelCost, importance: Mapping[str, float], gradients: Gradients, round_: int) -> Plan:
        """The plan from a round on, with what is known of the clients' experts."""
        plan, job = self.plan, self.federation.job
        capabilities = {client: plan.capabilities[client] for client in plan.capabilities if client not in plan.left_out}
        new = make_plan(
            plan.stage,
            self.config,
            cost,
            capabilities,
            importance,
            round_,
            job.together,
            job.privacy.secure_aggregation,
            min_group=job.privacy.min_group,
            chosen=self.chosen,
            gradients=gradients,
        )
        left_out = {**plan.left_out, **new.left_out}
        return new.model_copy(update={"notes": plan.notes, "discloses": plan.discloses, "left_out": left_out})

    def fixed_settings(self, widest: dict[str, int]) -> FixedPointChanges | None:
        """The settings of fixed-point numbers; None if responses are floats."""
        if self.config.precision != "fixed":
            return None
        noise = self._client_noise()
        clients = self.plan.clients.values()
        everything = len(clients) if noise is not None else sum(min(one.tokens, self.config.most_tokens) for one in clients)
        return FixedPointChanges(everything=everything, most=self.config.most_tokens, widest=widest, noise=noise)
