"""``[[stages]]`` of ``kind = "prune"``: the keys of a stage that prunes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from fedgrove.job.stage_config import StageConfig
from fedgrove.job.units import Delta, Epsilon, Sparsity, Table, method_of
from fedgrove.models.masks import Target
from fedgrove.stages.prune.aggregation import Aggregation, aggregation_names, aggregation_of
from fedgrove.stages.prune.allocation import allocation_of
from fedgrove.stages.prune.pruners import Pruner, pruner_of

if TYPE_CHECKING:
    from fedgrove.job.tables import Job


AGGREGATION_KEYS = frozenset(
    {"shrink", "expand", "max_weight_growth", "trim", "mixed", "protect_first_block", "epsilon"}
)  # what only some aggregations read: each says which


class LayerSampling(Table):
    """``layers = { sample = 0.5, cover = 2 }``: each client prunes a fraction of the blocks.

    Attributes:
        sample: the fraction, on average; clients with more ``speed`` and ``uplink`` get more.
        cover: at least this many clients prune each block.
    """

    sample: Annotated[float, Field(gt=0, le=1)]
    cover: Annotated[int, Field(ge=1)] = 2


class Config(StageConfig):
    """``[[stages]]`` of ``kind = "prune"``: part of every matrix becomes zero.

    Attributes:
        kind: what the stage does.
        pruner: how a matrix is pruned; see the methods.
        aggregation: what clients send, and what the server makes of it.
        sparsity: the fraction of every matrix that becomes zero; this or ``pattern``.
        pattern: "2:4" keeps 2 of every 4 inputs; this or ``sparsity``.
        samples: windows of text that each client calibrates on.
        length: tokens in a window.
        layers: which blocks each client prunes: "all", or a table.
        rounds: how often the model is pruned, each time from the previous round's result. With sampled layers, more rounds
            cover more pairs of client and block.
        shrink: a weight is multiplied by (fraction of clients that kept it) to this power; 0 is the paper. Only aggregation
            "fedspallm".
        expand: prune further, by votes, until the sparsity is exact (the paper's mask expansion); false leaves fewer zeros.
        max_weight_growth: refuse a client whose pruned weights are larger than this multiple of the largest weight before.
        trim: leave out this many of the highest and of the lowest values of every weight, against clients that lie. Only
            aggregation "fedspallm".
        source: what text passes through on its way to a block: "sequential", the pruned blocks before it, or "dense", the
            unpruned model, which takes half the time. Default: "dense" with aggregation "pooled", else "sequential".
        compute_dtype: what the blocks compute in while text passes through them: "float32", or "bfloat16", twice as fast on
            CPUs with instructions for it. The weights that are pruned are not rounded. Default: "float32" on a CPU, the model's
            own dtype on a GPU.
        damping: what SparseGPT adds to the sums of squares so that it can solve for the weights: "mean", 1 % of their mean (the
            paper), or "each", 1 % of each channel's own. Default: "each" with aggregation "pooled", else "mean".
        mixed: prune wide inputs by wanda, for a fraction of the bytes. Only aggregation "pooled" with a pruner that needs
            products.
        protect_first_block: prune block 0 by magnitude, so that no client sends sums of it, which say much about word counts.
        epsilon: differential privacy of one window: noise on wanda's sums; needs secure aggregation.
        delta: see ``epsilon``.
        allocation: how sparse each block becomes: "even", all the same; "owl", blocks with many outliers less. What a client
            has alone is pruned to the same sparsities.
        owl_m: OWL's M: a weight is an outlier if its score exceeds this multiple of the mean.
        owl_lambda: OWL's λ: half of the difference between the sparsest block and the densest.
    """

    kind: Literal["prune"]
    pruner: Annotated[str, method_of("stages.prune.pruners")] = "sparsegpt"
    aggregation: Annotated[str, method_of("stages.prune.aggregation")] = "fedspallm"
    sparsity: Sparsity | None = None
    pattern: Annotated[str, Field(pattern=r"^\d{1,3}:\d{1,3}$")] | None = None
    samples: Annotated[int, Field(gt=0)] = 16
    length: Annotated[int, Field(gt=1)] = 512
    layers: Literal["all"] | LayerSampling = "all"
    rounds: Annotated[int, Field(ge=1)] = 1
    shrink: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    expand: bool = True
    max_weight_growth: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    trim: Annotated[int, Field(ge=0)] = 0
    allocation: Annotated[str, method_of("stages.prune.allocation")] = "even"
    owl_m: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 5.0
    owl_lambda: Annotated[float, Field(gt=0, lt=0.5)] = 0.08
    source: Literal["dense", "sequential"] | None = None
    compute_dtype: Literal["float32", "bfloat16"] | None = None
    damping: Literal["mean", "each"] | None = None
    mixed: bool = False
    protect_first_block: bool = False
    epsilon: Epsilon | None = None
    delta: Delta = 1e-6

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.sparsity is None) == (self.pattern is None):
            raise ValueError('give one of sparsity (such as 0.5) and pattern (such as "2:4")')
        if self.pattern and not 0 < self.kept_of[0] < self.kept_of[1]:
            raise ValueError(f'pattern "{self.pattern}": N of every M inputs are kept, so 0 < N < M')
        for key in sorted(AGGREGATION_KEYS - self.method.READS):
            if getattr(self, key) != type(self).model_fields[key].default:
                owners = [f'"{name}"' for name in aggregation_names() if key in aggregation_of(name).READS]
                raise ValueError(f"{key} belongs to aggregation = {' or '.join(owners)}; leave it out")
        if self.trim and self.layers != "all":
            raise ValueError('trim needs layers = "all": every client counts alike')
        if self.damping is not None and self.solver.NEEDS != "gram":
            raise ValueError(f'damping: pruner "{self.pruner}" solves nothing; leave it out, or use sparsegpt')
        if self.measures_blocks and self.pattern:
            raise ValueError(f'allocation: a pattern leaves every block alike; "{self.allocation}" needs sparsity')
        if self.measures_blocks and self.epsilon is not None:
            raise ValueError('allocation: the budget of epsilon is spent on one sum of each block; use "even"')
        if self.method.SOLVED_AT == "server":
            self._check_statistics()
        if self.calibration_source == "dense" and self.rounds != 1:
            raise ValueError('source "dense": a second round would prune by the same inputs; use rounds = 1, or "sequential"')
        return self

    def _check_statistics(self) -> None:
        needs, name = self.solver.NEEDS, f'aggregation "{self.aggregation}"'
        if needs == "nothing":
            raise ValueError(f'{name}: pruner "{self.pruner}" needs nothing to be summed; use wanda, dsnot or sparsegpt')
        if self.mixed and needs != "gram":
            raise ValueError(f'mixed: pruner "{self.pruner}" needs no products; leave it out, or use sparsegpt')
        if self.epsilon is not None and (needs != "squares" or self.calibration_source != "dense"):
            raise ValueError('epsilon: there is noise for pruner "wanda" with source "dense" only')
        if self.rounds != 1:
            raise ValueError(f"rounds: {name} is exact in one; set it to 1")
        if self.layers != "all" and self.calibration_source == "sequential":
            raise ValueError('layers: with source = "sequential" every client runs every block; use "dense", or "all"')

    @property
    def method(self) -> Aggregation:
        """The aggregation's file."""
        return aggregation_of(self.aggregation)

    @property
    def solver(self) -> Pruner:
        """The pruner's file."""
        return pruner_of(self.pruner)

    @property
    def measures_blocks(self) -> bool:
        """Whether clients measure every block before anything is pruned."""
        return allocation_of(self.allocation).NEEDS != "nothing"

    @property
    def calibration_source(self) -> Literal["dense", "sequential"]:
        """``source``, or its default."""
        return self.source or self.method.SOURCE

    @property
    def damping_mode(self) -> Literal["mean", "each"]:
        """``damping``, or its default."""
        return self.damping or self.method.DAMPING

    @property
    def kept_of(self) -> tuple[int, int]:
        """(n, m) of the pattern."""
        assert self.pattern
        n, m = self.pattern.split(":")
        return int(n), int(m)

    @property
    def target(self) -> Target:
        """How sparse the model becomes."""
        return Target.of(self.sparsity, self.kept_of if self.pattern else None)

    def target_of_block(self, sparsity: float) -> Target:
        """The target of a block that is pruned to this sparsity, or to the stage's pattern."""
        return Target(sparsity, self.kept_of if self.pattern else None)

    def calibration_windows(self) -> tuple[int, int] | None:
        return self.samples, self.length

    def reads_text(self) -> bool:
        return self.solver.NEEDS != "nothing" or self.measures_blocks

    def privacy_budget(self) -> float | None:
        return self.epsilon

    def methods(self) -> set[str]:
        return {self.pruner, self.aggregation, *({self.allocation} if self.measures_blocks else set())}

    def makes_zeros(self) -> bool:
        return True

    def passes(self) -> int:
        return self.rounds

    def hidden_states_kept(self, num_blocks: int) -> int:
        return 3

    def check(self, job: Job, index: int) -> None:
        clients, at = job.clients, f"stages.{index}"
        if any(stage.changes_structure() for stage in job.stages[:index]):
            raise ValueError(f"{at}.kind: clients prune the model that they have; cut and prune in two jobs")
        if job.evaluate.alone and self.layers != "all":
            raise ValueError("evaluate.alone: no client prunes the whole model when layers are sampled; set it to false")
        if self.trim and len(clients) <= 2 * self.trim:
            raise ValueError(
                f"{at}.trim: {self.trim} values from above and below are all that {len(clients)} clients have; "
                f"set it to {(len(clients) - 1) // 2} at most"
            )
        if isinstance(self.layers, LayerSampling) and self.layers.cover > len(clients):
            raise ValueError(f"{at}.layers.cover: {self.layers.cover} clients for each block, but there are {len(clients)}")
        if self.epsilon is not None and not job.privacy.secure_aggregation:
            raise ValueError(f"{at}.epsilon: noise protects the sum alone; set privacy.secure_aggregation = true beside it")
        own_sparsity = any(client.sparsity is not None for client in clients)
        if self.method.SOLVED_AT == "server":
            if index > 0:
                raise ValueError(
                    f'{at}.aggregation: "{self.aggregation}" sums over the model that the clients have; make it the first stage'
                )
            if own_sparsity:
                raise ValueError(
                    f'clients.sparsity: with aggregation "{self.aggregation}" ({at}) the server prunes; leave it out'
                )
        if self.measures_blocks:
            if own_sparsity:
                raise ValueError(f"clients.sparsity: {at}.allocation gives every block its own; leave it out")
            if index > 0:
                raise ValueError(f'{at}.allocation: it is measured in the model that the clients have; use "even"')
        if self.sparsity is not None:
            least = min(self.sparsity if client.sparsity is None else client.sparsity for client in clients)
            if least > self.sparsity:
                raise ValueError(f"{at}.sparsity: {self.sparsity}, but every client prunes to {least} or more; raise it")

    def check_secure(self, job: Job, index: int) -> None:
        at = f"privacy.secure_aggregation: stages.{index}"
        if self.trim:
            raise ValueError(f"{at}.trim: nobody sees which values to leave out; set it to 0")
        if not self.method.SECURE:
            offered = ", ".join(f'"{name}"' for name in aggregation_names() if aggregation_of(name).SECURE)
            raise ValueError(f'{at}.aggregation "{self.aggregation}": use one of {offered}')
        if self.method.SOLVED_AT == "client" and len(job.clients) > 255:
            raise ValueError(f'{at}.aggregation "{self.aggregation}" counts to 255; use "pooled"')
        if self.layers != "all":
            raise ValueError(f'{at}.layers: every client is in every sum; set it to "all"')

    def centralized(self, job: Job) -> Self:
        """What one owner of all text would do.

        An aggregation that is solved at the server gives that owner the federation's model, bit for bit, unless noise,
        ``mixed`` or ``protect_first_block`` changed it; every other leaves a single client's weights as they are, so
        FedSpaLLM's does.
        """
        changes = {
            "samples": sum(client.samples or self.samples for client in job.clients),
            "aggregation": self.aggregation if self.method.SOLVED_AT == "server" else "fedspallm",
            "rounds": self.rounds if self.layers == "all" else 1,
            "layers": "all",
            "source": self.calibration_source,
            **{key: type(self).model_fields[key].default for key in AGGREGATION_KEYS},
        }
        return self.model_copy(update=changes)
