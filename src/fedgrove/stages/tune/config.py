"""``[[stages]]`` of ``kind = "tune"``: the keys of a stage that fine-tunes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from fedgrove import plugins
from fedgrove.job.stage_config import StageConfig
from fedgrove.job.units import (
    MOST,
    BitChoices,
    Choices,
    Clip,
    Count,
    CountOrZero,
    Delta,
    Epsilon,
    HeldOut,
    Length,
    NonNegative,
    Positive,
    Sparsity,
    Targets,
    method_of,
)
from fedgrove.stages.tune.aggregation import PACKAGE as AGGREGATIONS
from fedgrove.stages.tune.aggregation import Aggregation, aggregation_of
from fedgrove.stages.tune.parametrizations import Parametrization, parametrization_of
from fedgrove.stages.tune.planners import Planner, planner_of
from fedgrove.stages.tune.pool.config import Pool, check_clients, check_stage
from fedgrove.stages.tune.seeds.keys import AUTO, check_directions
from fedgrove.stages.tune.seeds.offsets import MOST_DIRECTIONS
from fedgrove.stages.tune.trainers import Trainer, trainer_of
from fedgrove.stages.tune.unused import OF_FEDPIPE, OF_PRIVACY, check_unused

if TYPE_CHECKING:
    from fedgrove.job.tables import Job


class Config(StageConfig):
    """``[[stages]]`` of ``kind = "tune"``: the model is fine-tuned.

    Attributes:
        kind: what the stage does.
        planner: who gets what: "fedpipe" gives each client a configuration of its own; "uniform" gives all clients the one that
            the weakest can hold. Default: "fedpipe" for "lora", else "uniform".
        parametrization: what is trained: "lora", low-rank adapters; "ia3", a scale for each output channel; "full", the
            weights; "seeds", the weights along random directions, without a backward pass; "adapter_seeds", low-rank adapters
            along random directions, on a model that may have 8 or 4 bits.
        trainer: how a client trains: "sgd", or "dp_sgd" with noise. Default: "dp_sgd" if ``epsilon`` protects windows,
            else "sgd"; for "seeds", "dp_zeroth_order" and "zeroth_order". For "seeds" there is "directional", too: clients with
            enough memory send exact slopes, by a backward pass, and all others differences of losses.
        aggregation: what the server makes of the clients' changes. Default: "flexlora" for "lora", "common" for "seeds" and
            "adapter_seeds", else "fedavg".
        method: a short form: the name of a planner, or of a parametrization with the planner "uniform".
        rounds: how often the clients train and the server combines their changes.
        steps: optimizer steps of each client in a round. Of "fedpipe": those of the slowest client from which the default
            ``deadline`` follows.
        max_steps: the most steps that "fedpipe" gives a client in a round: faster clients take more, slower ones fewer. 0: all
            take ``steps``. Default: 8 times ``steps`` for "fedpipe".
        length: tokens in a window.
        batches: batch sizes, in windows, that a client may get. "uniform" gives the largest to all.
        ranks: ranks that a linear may get besides 0. "uniform" gives all clients the largest that everyone can hold;
            "adapter_seeds" takes the largest. Default there: 8.
        bits: precisions of the frozen weights that a client may get; 32 and 16 are floats, 8 is int8, 4 is NF4. "adapter_seeds"
            rounds only weights to 8 bits, and computes in float32; default there: 32.
        learning_rate: of the clients' optimizer. Default: 1e-3; with "ffa_lora" 1e-2. "auto", the default of "seeds" and
            "adapter_seeds" and only for these: 1/8 divided by the trace of the curvature plus its standard error, and slopes of
            windows that are far from the others are clipped; both are measured before the first round and after every
            ``replan_every``.
        lr_schedule: "linear" lowers the learning rate to a tenth over the rounds.
        optimizer: the clients'; its state is reset in every round.
        max_grad_norm: clips a client's gradient to this norm; 0: no clipping.
        alpha: LoRA's α: an adapter is scaled by α/r. Default: the scale is 2 at the largest of ``ranks``, and ∝ 1/√r
            below it.
        deadline: seconds that a client may compute and send in a round (modeled); default: what the slowest client needs for
            ``steps`` of the smallest batch at the largest rank. Only "fedpipe" uses it.
        upload_price: the price of sending all linears at the largest rank, as a part of what a round gains. With a higher price
            clients send less. Only "fedpipe" uses it.
        replan_every: measure the importance and plan again every so many rounds; 0: only before the first. With "seeds",
            measure the curvature again, of which ``learning_rate = "auto"`` is made; its default is 5 then.
        replan_off: also measure and plan again after a round that gained twice as much as predicted, half as much, or nothing,
            and plan again where a round shows that a client is not as fast as it says. Only "fedpipe" uses it.
        importance_steps: optimizer steps from which the importance is measured.
        proximal: FedProx's μ.
        partition: average ranks that only some clients have over those clients; false: over all clients, which is exact. Only
            aggregation "flexlora".
        server_optimizer: what the server makes of a round's change: "average" takes it, "momentum" and "adam" smooth it.
        server_lr: multiplies the change, or is the step size of "adam".
        precision: dtype of the changes in messages; "fixed" sends fixed-point numbers to the server, which add up exactly,
            whoever adds them (see :mod:`fedgrove.stages.tune.fixed_point`), and float32 to the clients. Secure aggregation
            needs it.
        epsilon, delta: differential privacy of what tuning learns; see :mod:`fedgrove.privacy.release`.
        dp_unit: what differential privacy protects: a whole "client", or one "window" of its text.
        dp_clip: clips the change of a client, or the gradient of a window, to this norm.
        max_change: scale a client's change of a round down to this multiple of the round's median, if three clients or more
            send floats; fixed-point numbers have a fixed bound instead (see :mod:`fedgrove.stages.tune.fixed_point`).
        seeds: number of directions in the whole stage; 0: new ones in every round. Default: 4096 for aggregation "own", 0 for
            "common". Only "seeds" and "adapter_seeds".
        sampling: how aggregation "own" draws directions: "even", or "pro", those with large slopes more often. Only "seeds" and
            "adapter_seeds".
        perturbation: ε, how far along a direction a client measures the loss, on both sides. "auto": the largest whose slopes
            differ by less than 1 % from those at half of it, which the clients measure. Only "seeds" and "adapter_seeds".
        target_modules: the linears that move, by the ends of their names, as in PEFT, such as ["v_proj", "down_proj"]. Default:
            all of the blocks. Only "seeds" and "adapter_seeds".
        personal: the fraction of its windows that each client holds out, to choose which adapter it keeps for itself: the
            shared one or the best of its own (on its own disk; see :mod:`fedgrove.stages.tune.personal`). 0: none. It chooses
            by half of them, and reports losses on the other half.
        personal_pull: Ditto's λ: each client also trains an adapter of its own, for as many steps again, which is pulled
            towards the shared one. 0: its own adapter is the one that it sends, before the server combines them.
        hold_experts: of a mixture of experts, what a client does whose memory is too small for all: "fit", it holds as many of
            every block as fit, those that matter most to its text; "all", it is left out. The plan shows how many.
        expert_value: by what an expert matters to a text: "outputs", how much it adds to the hidden states of its tokens;
            "tokens", how many tokens reach it.
        personal_experts: the fraction of every block's experts, rounded up, that each client keeps in a smaller model of its
            own, which it writes on its own disk after the last round: those that matter most to its text. 0: none.
        pool: several adapters instead of one, and a gate that gives texts to them (see :mod:`fedgrove.stages.tune.gates`).
            With LoRA, aggregation is then "ffa_lora" by default: a mixture of adapters is one adapter. Default: one adapter
            for all.
        eval_every: measure the held-out perplexity after every so many rounds; 0: only after the last.
    """

    SHORT_FORMS: ClassVar[Mapping[str, tuple[str, ...]]] = {"method": ("stages.tune.planners", "stages.tune.parametrizations")}

    kind: Literal["tune"]
    planner: Annotated[str, method_of("stages.tune.planners")] = "fedpipe"
    parametrization: Annotated[str, method_of("stages.tune.parametrizations")] = "lora"
    trainer: Annotated[str, method_of("stages.tune.trainers")] = "sgd"
    aggregation: Annotated[str, method_of("stages.tune.aggregation")] = "flexlora"
    rounds: Count = 10
    steps: Count = 16
    max_steps: CountOrZero = 0
    length: Length = 512
    batches: Choices = (1, 2, 4, 8, 16)
    ranks: Choices = (2, 4, 8, 16, 32)
    bits: BitChoices = (16, 8, 4)
    learning_rate: Positive | Literal["auto"] = 1e-3
    lr_schedule: Literal["none", "linear"] = "none"
    optimizer: Literal["adamw", "sgd"] = "adamw"
    max_grad_norm: NonNegative = 1.0
    alpha: Positive | None = None
    deadline: Positive | None = None
    upload_price: NonNegative = 0.1
    replan_every: CountOrZero = 0
    replan_off: bool = False
    importance_steps: Count = 4
    proximal: NonNegative = 0.0
    partition: bool = True
    server_optimizer: Literal["average", "momentum", "adam"] = "average"
    server_lr: Positive | None = None
    precision: Literal["float32", "bfloat16", "fixed"] = "bfloat16"
    epsilon: Epsilon | None = None
    delta: Delta = 1e-6
    dp_unit: Literal["client", "window"] = "window"
    dp_clip: Clip = 1.0
    max_change: Annotated[float, Field(ge=1, le=MOST)] = 4.0
    seeds: Annotated[int, Field(ge=0, le=MOST_DIRECTIONS)] = 0
    sampling: Literal["even", "pro"] = "even"
    perturbation: Positive | Literal["auto"] = "auto"
    target_modules: Targets = ()
    personal: HeldOut = 0.0
    personal_pull: NonNegative = 0.0
    hold_experts: Literal["fit", "all"] = "fit"
    expert_value: Literal["outputs", "tokens"] = "outputs"
    personal_experts: Sparsity = 0.0
    pool: Pool | None = None
    eval_every: CountOrZero = 0

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, value: Any) -> Any:
        """Expands ``method`` and fills in the defaults that depend on other keys, so that the saved job is complete."""
        if not isinstance(value, dict):
            return value
        filled = dict(value)
        short = filled.pop("method", None)
        if short is not None:
            planners, parametrizations = plugins.names("stages.tune.planners"), plugins.names("stages.tune.parametrizations")
            if short not in (*planners, *parametrizations):
                raise ValueError(f"method: choose one of {', '.join(sorted({*planners, *parametrizations}))}")
            means = {"planner": short} if short in planners else {"planner": "uniform", "parametrization": short}
            for key, name in means.items():
                if filled.setdefault(key, name) != name:
                    raise ValueError(f'method "{short}" means {key} = "{name}"; leave one of them out')
        parametrization = filled.setdefault("parametrization", "lora")
        if parametrization in plugins.names("stages.tune.parametrizations"):
            method = parametrization_of(parametrization)
            if filled.get("pool") is not None:
                filled = {"planner": "uniform", **({"aggregation": "ffa_lora"} if method.RANKED else {}), **filled}
            filled.setdefault("planner", "fedpipe" if method.RANKED else "uniform")
            if filled["planner"] in plugins.names("stages.tune.planners") and planner_of(filled["planner"]).CHOOSES_STEPS:
                steps = filled.get("steps", cls.model_fields["steps"].default)
                filled.setdefault("max_steps", 8 * steps if isinstance(steps, int) else 0)
            aggregation = filled.setdefault("aggregation", method.AGGREGATION)
            of_aggregation = aggregation_of(aggregation).DEFAULTS if aggregation in plugins.names(AGGREGATIONS) else {}
            for key, value in (*method.DEFAULTS.items(), *of_aggregation.items()):
                filled.setdefault(key, value)
            windows = filled.get("epsilon") is not None and filled.get("dp_unit", "window") == "window"
            filled.setdefault("trainer", method.TRAINERS[windows])
        return filled

    @model_validator(mode="after")
    def _fits(self) -> Self:
        what, takes = parametrization_of(self.parametrization), self.aggregation_method
        planner = planner_of(self.planner)
        if what.FORM not in takes.TAKES:
            fitting = [name for name in plugins.names(AGGREGATIONS) if what.FORM in aggregation_of(name).TAKES]
            raise ValueError(
                f'aggregation "{self.aggregation}" does not take what parametrization "{self.parametrization}" trains; '
                f"use one of {', '.join(fitting)}"
            )
        if what.FORM not in self.trainer_method.TAKES:
            raise ValueError(f'trainer "{self.trainer}" does not train parametrization "{self.parametrization}"; leave it out')
        check_unused(self)
        if self.learning_rate == AUTO and "perturbation" not in what.KEYS:
            raise ValueError(f'learning_rate: parametrization "{self.parametrization}" cannot measure it; set a number')
        if what.FORM == "coefficients":
            check_directions(self)
        if planner.NEEDS_RANKS and not what.RANKED:
            raise ValueError(f'planner "{self.planner}" chooses ranks, and "{self.parametrization}" has none; use "uniform"')
        if self.max_steps and not planner.CHOOSES_STEPS:
            raise ValueError(f'max_steps: planner "{self.planner}" gives all clients the same steps; leave it out')
        if takes.EQUAL_RANKS and not planner.EQUAL_RANKS:
            raise ValueError(
                f'aggregation "{self.aggregation}" needs equal ranks: use method = "lora", or aggregation = "flexlora"'
            )
        if self.personal and not what.PERSONAL:
            raise ValueError(f'parametrization "{self.parametrization}" has no adapters: leave personal out')
        if self.personal_pull and not self.personal:
            raise ValueError("personal_pull: no client keeps an adapter of its own; set personal as well, such as 0.2")
        if not takes.SERVER_OPTIMIZERS and (self.server_optimizer != "average" or self.server_lr is not None):
            key = "server_lr" if self.server_optimizer == "average" else f'server_optimizer "{self.server_optimizer}"'
            raise ValueError(f'{key} needs aggregation = "flexlora" or "fedavg"')
        if self.precision == "fixed" and not (takes.SHARED_A or what.RELATIVE):
            raise ValueError('precision "fixed": LoRA changes add up only if all clients share A; set aggregation = "ffa_lora"')
        if self.pool is not None:
            check_stage(self)
        if self.epsilon is not None:
            self._check_private(what, planner)
        elif self.trainer_method.PRIVATE:
            raise ValueError(f'trainer "{self.trainer}" adds noise: set epsilon as well')
        return self

    def _check_private(self, what: Parametrization, planner: Planner) -> None:
        if planner.NEEDS_IMPORTANCE:
            raise ValueError(f'epsilon: planner "{self.planner}" needs scores, which get no noise; set method = "lora"')
        if not what.PRIVATE:
            raise ValueError(f'epsilon: "{self.parametrization}" cannot be trained with noise; set method = "lora"')
        if self.personal:
            raise ValueError("epsilon: personal adapters are chosen by losses, which get no noise; leave personal out")
        if self.dp_unit == "client" and self.precision != "fixed":
            raise ValueError(f"epsilon: the noise is added to fixed-point numbers; set {self._fixed_keys}")
        if (self.dp_unit == "window") != self.trainer_method.PRIVATE:
            raise ValueError(f'trainer "{self.trainer}" does not protect a {self.dp_unit}; leave trainer out')

    @property
    def aggregation_method(self) -> Aggregation:
        """The module of the aggregation."""
        return aggregation_of(self.aggregation)

    @property
    def trainer_method(self) -> Trainer:
        """The module of the trainer."""
        return trainer_of(self.trainer)

    @property
    def measures_settings(self) -> bool:
        """Whether clients measure a key that is "auto"."""
        return {"perturbation"} <= parametrization_of(self.parametrization).KEYS and AUTO in (
            self.learning_rate, self.perturbation
        )  # fmt: skip

    @property
    def weight_bits(self) -> tuple[int, ...]:
        """The precisions that a client's weights can get: those of the job, or float32 where the weights are trained."""
        return self.bits if parametrization_of(self.parametrization).FROZEN else (32,)

    @property
    def most_tokens(self) -> int:
        """The tokens that a client can train on in the whole stage at the largest batch: its weight counts no more."""
        return min(MOST, self.rounds * self.most_steps * self.batches[-1] * self.length)

    @property
    def most_steps(self) -> int:
        """The most steps that a client can get in a round."""
        return max(self.steps, self.max_steps)

    def scale(self, rank: int) -> float:
        """The scale of an adapter: α/r; without α in the job, 2 at the largest rank and ∝ 1/√r below it.

        With the latter, from rsLoRA (arXiv 2312.03732), an optimizer step changes the weight by about the same amount at
        any rank, so that clients of low rank learn as fast.
        """
        return 2.0 * math.sqrt(self.ranks[-1] / rank) if self.alpha is None else self.alpha / rank

    @property
    def planning_rounds(self) -> range:
        """The rounds before which clients measure what is planned with."""
        return range(0, self.rounds, self.replan_every or self.rounds)

    def learning_rate_in(self, round_: int) -> float:
        """The learning rate of a round; of "auto", what is measured has to be multiplied by :meth:`schedule_in`."""
        return self.rate * self.schedule_in(round_)

    @property
    def rate(self) -> float:
        """The learning rate of the first round; NaN, which no request has, if it is "auto"."""
        return math.nan if isinstance(self.learning_rate, str) else self.learning_rate

    def schedule_in(self, round_: int) -> float:
        """What the learning rate is multiplied by in a round."""
        return 1 - 0.9 * round_ / max(1, self.rounds - 1) if self.lr_schedule == "linear" else 1.0

    @property
    def _fixed_keys(self) -> str:
        """The keys that make clients send fixed-point numbers."""
        adds_up = self.aggregation_method.SHARED_A or parametrization_of(self.parametrization).RELATIVE
        return 'precision = "fixed"' if adds_up else 'aggregation = "ffa_lora" and precision = "fixed"'

    @property
    def dtype(self) -> Literal["float32", "bfloat16"]:
        """The dtype of changes in messages; with precision "fixed", of those that the server sends."""
        return "float32" if self.precision == "fixed" else self.precision

    def training_length(self) -> int | None:
        return self.length

    def number_of_rounds(self) -> int:
        return self.rounds

    def highest_round(self) -> int:
        return max(self.rounds - 1, self.pool.fit_rounds + 1 if self.pool is not None else 0)

    def privacy_budget(self) -> tuple[float, float] | None:
        return None if self.epsilon is None else (self.epsilon, self.delta)

    def noise_of_others(self, secure: bool) -> bool:
        return not secure and not self.trainer_method.PRIVATE

    def methods(self) -> set[str]:
        gate = set() if self.pool is None else {self.pool.gate}
        return {self.planner, self.parametrization, self.trainer, self.aggregation} | gate

    @property
    def loop(self) -> str:
        """The file of :mod:`fedgrove.stages.tune.loops` that runs the stage's rounds."""
        return parametrization_of(self.parametrization).LOOP if self.pool is None else "pool"

    @property
    def deals_in_sums(self) -> bool:
        """Whether it stays with each client which members its windows go to: with fixed-point numbers all members add up."""
        return self.pool is not None and self.pool.deals_in_sums(self.precision)

    @property
    def noisy_gate(self) -> bool:
        """Whether the fit of a pool's gate spends a part of the privacy budget."""
        return self.epsilon is not None and self.pool is not None and self.pool.method.LOOKS == "features"

    def leaves_pool(self) -> bool:
        return self.pool is not None

    def check(self, job: Job, index: int) -> None:
        if self.pool is not None:
            check_clients(self, job, index)

    def check_secure(self, job: Job, index: int) -> None:
        at = f"privacy.secure_aggregation: stages.{index}"
        if self.precision != "fixed":
            raise ValueError(f"{at}: only fixed-point numbers can be summed securely; set {self._fixed_keys}")
        if self.personal:
            raise ValueError(f"{at}.personal: its losses cannot be summed securely; set it to 0")

    def centralized(self, job: Job) -> Self:
        """The same stage with all text in one place: as many windows per round as all clients together, and no noise.

        Planner "uniform" gives it the largest batch at the largest ranks.
        """
        what, clients = parametrization_of(self.parametrization), len(job.clients)
        more = {"batches": (self.batches[-1] * clients,)} if what.BY_WINDOWS else {"steps": self.steps * clients}
        changes = {
            "planner": "uniform", "max_steps": 0, "trainer": what.TRAINERS[0],
            "aggregation": what.AGGREGATION, "sampling": "even", "server_optimizer": "average", "server_lr": None,
            "precision": what.DEFAULTS.get("precision", "float32"), "epsilon": None, "personal": 0.0, "personal_pull": 0.0,
            "proximal": 0.0, "eval_every": 0, "personal_experts": 0.0, "pool": None,
            **{key: type(self).model_fields[key].default for key in OF_FEDPIPE | OF_PRIVACY},
        }  # fmt: skip
        return self.model_copy(update=changes | more)
