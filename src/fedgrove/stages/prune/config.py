"""``[[stages]]`` of ``kind = "prune"``: the keys of a stage that prunes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from fedgrove.job.stage_config import StageConfig, cut_by
from fedgrove.job.units import (
    MOST,
    MOST_HELD_OUT,
    ComputeDtype,
    Count,
    CountOrZero,
    Delta,
    Epsilon,
    HeldOut,
    Length,
    NonNegative,
    Positive,
    Samples,
    Sparsity,
    Table,
    method_of,
)
from fedgrove.models.masks import Target
from fedgrove.privacy.secagg.session import min_survivors
from fedgrove.stages.prune.aggregation import Aggregation, aggregation_names, aggregation_of
from fedgrove.stages.prune.allocation import allocation_of
from fedgrove.stages.prune.personal import OTHERS_WEIGHTS
from fedgrove.stages.prune.pruners import Pruner, pruner_of

if TYPE_CHECKING:
    from fedgrove.job.tables import Job


MAX_WEIGHT_GROWTH = 8.0  # far more than any pruner does, and far less than a client needs to ruin a matrix
AGGREGATION_KEYS = frozenset(
    {"shrink", "expand", "max_weight_growth", "trim", "mixed", "protect_first_block", "epsilon", "personal"}
)  # keys that only some aggregations use; each aggregation lists its own in READS


class LayerSampling(Table):
    """``layers = { sample = 0.5, cover = 2 }``: each client prunes a fraction of the blocks.

    Attributes:
        sample: the fraction, on average; clients with more ``speed`` and ``uplink`` get more.
        cover: at least this many clients prune each block.
    """

    sample: Annotated[float, Field(gt=0, le=1)]
    cover: Count = 2


class Config(StageConfig):
    """``[[stages]]`` of ``kind = "prune"``: part of every matrix becomes zero.

    Attributes:
        kind: what the stage does.
        pruner: how a matrix is pruned; see the methods.
        aggregation: what clients send, and how the server combines it.
        sparsity: the fraction of every matrix that becomes zero; this or ``pattern``.
        pattern: "2:4" keeps 2 of every 4 inputs; this or ``sparsity``.
        samples: windows of text that each client calibrates on.
        length: tokens in a window.
        layers: which blocks each client prunes: "all", or a table.
        rounds: how often the model is pruned, each time from the previous round's result. With sampled layers, more rounds
            cover more pairs of client and block.
        shrink: multiply each weight by (fraction of clients that kept it) to this power; 0 is the paper's method. Only
            aggregation "fedspallm".
        expand: prune further, by votes, until the sparsity is exact (the paper's mask expansion); false leaves fewer zeros.
        max_weight_growth: refuse a client whose pruned weights are larger than this multiple of the largest weight before;
            default: 8, where clients send weights in the open.
        trim: at every weight, leave out this many of the clients' highest and of their lowest values, so that a few dishonest
            clients have little effect. Only aggregation "fedspallm".
        source: what the calibration text passes through before it reaches a block: "sequential", the pruned blocks before it,
            or "dense", the unpruned model, which takes half the time. Default: "dense" with aggregation "pooled", else
            "sequential".
        compute_dtype: the dtype of the calibration pass: "float32"; "bfloat16", up to twice as fast on CPUs with instructions
            for it; or "auto", which is "bfloat16" on such a CPU (clients may then differ). The weights that are pruned are not
            rounded. Default: "float32" on a CPU, the model's own dtype on a GPU.
        damping: what SparseGPT adds to each input channel's sum of squares to keep the equations solvable: "mean", 1 % of the
            mean over all channels (the paper), or "each", about 3 % of the channel's own sum and 1 % of the median channel's.
            Default: "each" with aggregation "pooled", else "mean".
        mixed: use wanda for linears whose input is wider than the hidden states, so that clients upload a fraction of the
            bytes. Only aggregation "pooled" with a pruner that needs products.
        protect_first_block: prune block 0 by magnitude, so that no client sends sums of its inputs, which reveal much about the
            client's word counts. A matrix that block 0 shares with later blocks is pruned by the sums of those alone. Only
            aggregation "pooled".
        epsilon: ε of differential privacy for one window of text: adds noise to wanda's sums and needs secure aggregation. Only
            aggregation "pooled".
        delta: δ of the same guarantee.
        mend: improve every mask at the server by swaps: "dsnot" does it with three numbers for each input channel, summed over
            the clients' text; these are the inputs in the unpruned model or, with source "sequential", in the pruned one. Where
            clients prune, their votes are mended after the last round, which takes one more pass over the text. The model that
            a client would have alone is not mended.
        personal: windows that each client holds out, as a fraction of its ``samples`` and besides them (at most 64), to choose
            which model it keeps for itself: it prunes with its own sums and with a part of the others', from none to all (on
            its own disk; see :mod:`fedgrove.stages.prune.personal`). 0: none. It chooses by half of them, and reports losses
            on the other half. Only aggregation "pooled" with source "dense".
        allocation: how the sparsity is distributed over the blocks: "even", the same for all, or "owl", less for blocks with
            many outliers. The model that a client would have alone is pruned to the same sparsities.
        owl_m: OWL's M: a weight is an outlier if its score exceeds this multiple of the mean score of its block.
        owl_lambda: OWL's λ: half of the difference in sparsity between the sparsest and the densest block.
    """

    kind: Literal["prune"]
    pruner: Annotated[str, method_of("stages.prune.pruners")] = "sparsegpt"
    aggregation: Annotated[str, method_of("stages.prune.aggregation")] = "fedspallm"
    sparsity: Sparsity | None = None
    pattern: Annotated[str, Field(pattern=r"^\d{1,3}:\d{1,3}$")] | None = None
    samples: Samples = 16
    length: Length = 512
    layers: Literal["all"] | LayerSampling = "all"
    rounds: Count = 1
    shrink: NonNegative = 0.0
    expand: bool = True
    max_weight_growth: Positive | None = None
    trim: CountOrZero = 0
    allocation: Annotated[str, method_of("stages.prune.allocation")] = "even"
    owl_m: Annotated[float, Field(gt=1, le=MOST)] = 5.0
    owl_lambda: Annotated[float, Field(gt=0, lt=0.5)] = 0.08
    source: Literal["dense", "sequential"] | None = None
    compute_dtype: ComputeDtype | None = None
    damping: Literal["mean", "each"] | None = None
    mixed: bool = False
    protect_first_block: bool = False
    epsilon: Epsilon | None = None
    delta: Delta = 1e-6
    mend: Annotated[str, method_of("stages.prune.menders")] | None = None
    personal: HeldOut = 0.0

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
        needs = {"delta": "epsilon"} if self.epsilon is None else {}
        if not self.measures_blocks:
            needs |= {"owl_m": "allocation", "owl_lambda": "allocation"}
        self.refuse_without(needs)
        if self.trim and self.layers != "all":
            raise ValueError('trim needs layers = "all", because trimming gives all clients the same weight')
        if self.damping is not None and self.solver.NEEDS != "gram":
            raise ValueError(f'damping: pruner "{self.pruner}" uses no damping; leave it out, or use sparsegpt or alps')
        if self.measures_blocks and self.pattern:
            raise ValueError(f'allocation: a pattern makes all blocks equally sparse; "{self.allocation}" needs sparsity')
        if self.measures_blocks and self.epsilon is not None:
            raise ValueError('allocation: measuring blocks needs a second sum of each, but epsilon covers only one; use "even"')
        if self.mend is not None:
            self._check_mending(self.mend)
        if self.method.SOLVED_AT == "server":
            self._check_statistics()
        if self.calibration_source == "dense" and self.rounds != 1:
            raise ValueError(
                'source "dense": a second round would use the same inputs as the first; use rounds = 1, or "sequential"'
            )
        return self

    def _check_statistics(self) -> None:
        needs, name = self.solver.NEEDS, f'aggregation "{self.aggregation}"'
        if needs == "nothing" and self.mend is None:
            raise ValueError(f'{name}: pruner "{self.pruner}" needs no sums; use wanda, dsnot, sparsegpt or alps')
        if self.mixed and needs != "gram":
            raise ValueError(f'mixed: pruner "{self.pruner}" needs no products; leave it out, or use sparsegpt or alps')
        if self.epsilon is not None and (needs != "squares" or self.calibration_source != "dense"):
            raise ValueError('epsilon: noise is possible only for pruner "wanda" with source "dense"')
        if self.rounds != 1:
            raise ValueError(f"rounds: {name} is exact after one round; set it to 1")
        if self.layers != "all" and self.calibration_source == "sequential":
            raise ValueError('layers: with source = "sequential" every client runs every block; use "dense" or layers "all"')
        if self.personal:
            self._check_personal()

    def _check_personal(self) -> None:
        if self.calibration_source == "sequential":
            raise ValueError('personal: with source "sequential" text passes through the shared model; use "dense"')
        if self.layers != "all":
            raise ValueError('personal: a client needs the sums of every block to prune for itself; use layers = "all"')
        if self.epsilon is not None:
            raise ValueError("personal: losses on held-out text get no noise, and epsilon covers only the sums; leave it out")
        if self.mend is not None:
            raise ValueError("personal: clients do not mend the masks of their own models; leave mend out")

    def _check_mending(self, mender: str) -> None:
        if mender == self.pruner and self.method.SOLVED_AT == "server":
            raise ValueError(f'mend: pruner "{self.pruner}" has done this already with the same sums; leave it out')
        if self.epsilon is not None:
            raise ValueError("mend: epsilon adds noise to sums of squares alone, and mending needs more sums; leave one out")
        if self.trim:
            raise ValueError("mend: one dishonest client can decide the sums, which trim is to prevent; leave one out")
        if self.layers != "all" and self.method.SOLVED_AT == "client":
            raise ValueError('mend: every client sums the inputs of every block; set layers to "all"')

    @property
    def method(self) -> Aggregation:
        """The aggregation's file."""
        return aggregation_of(self.aggregation)

    @property
    def solver(self) -> Pruner:
        """The pruner's file."""
        return pruner_of(self.pruner)

    @property
    def mends_votes(self) -> bool:
        """Whether the server improves the masks that the clients' results add up to."""
        return self.mend is not None and self.method.SOLVED_AT == "client"

    @property
    def sums_inputs(self) -> bool:
        """Whether clients send sums over the inputs of linears."""
        return self.mends_votes or self.method.SOLVED_AT == "server"

    @property
    def sums_products(self) -> bool:
        """Whether these are sums of products too."""
        return self.method.SOLVED_AT == "server" and self.solver.NEEDS == "gram"

    @property
    def sums_moments(self) -> bool:
        """Whether these are sums for means and variances too."""
        return self.mend is not None or (self.method.SOLVED_AT == "server" and self.solver.NEEDS == "moments")

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
    def growth_limit(self) -> float | None:
        """``max_weight_growth``, or its default; None for aggregations that get no weights."""
        if "max_weight_growth" not in self.method.READS:
            return None
        return self.max_weight_growth or MAX_WEIGHT_GROWTH

    @property
    def sparsity_range(self) -> tuple[float, float]:
        """The least and the largest sparsity that a block can get: an allocation may move 2λ from one to another."""
        sparsity = self.target.sparsity
        if not self.measures_blocks:
            return sparsity, sparsity
        return max(0.0, sparsity - 2 * self.owl_lambda), min(max(0.99, sparsity), sparsity + 2 * self.owl_lambda)

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

    def windows_held_out(self, samples: int) -> int:
        """How many windows a client holds out that calibrates on so many."""
        return min(MOST_HELD_OUT, round(self.personal * samples))

    def calibration_windows(self) -> tuple[int, int] | None:
        return self.samples, self.length

    def number_of_rounds(self) -> int:
        return self.rounds

    def reads_text(self) -> bool:
        return self.solver.NEEDS != "nothing" or self.measures_blocks or self.mend is not None

    def privacy_budget(self) -> tuple[float, float] | None:
        return None if self.epsilon is None else (self.epsilon, self.delta)

    def noise_of_others(self, secure: bool) -> bool:
        return not secure

    def methods(self) -> set[str]:
        mender = {self.mend} if self.mend is not None else set()
        return {self.pruner, self.aggregation, *mender, *({self.allocation} if self.measures_blocks else set())}

    def makes_zeros(self) -> bool:
        return True

    def passes(self) -> int:
        return self.rounds + self.mends_votes

    def hidden_states_kept(self, num_blocks: int) -> int:
        return 3

    def models_kept(self) -> int:
        return len(OTHERS_WEIGHTS) + 1 if self.personal else 0

    def check(self, job: Job, index: int) -> None:
        clients, at = job.clients, f"stages.{index}"
        if cut_by(job.stages[:index]) is not None:
            raise ValueError(
                f"{at}.kind: an earlier stage cuts the model, but clients prune their own uncut copies; use two jobs"
            )
        if job.evaluate.alone and self.layers != "all":
            raise ValueError("evaluate.alone: no client prunes the whole model when layers are sampled; set it to false")
        if self.trim and len(clients) <= 2 * self.trim:
            raise ValueError(
                f"{at}.trim: without the {self.trim} highest and lowest values, nothing is left of {len(clients)} clients; "
                f"set it to {(len(clients) - 1) // 2} at most"
            )
        if isinstance(self.layers, LayerSampling) and self.layers.cover > len(clients):
            raise ValueError(
                f"{at}.layers.cover: {self.layers.cover} clients for each block, but there are {len(clients)}; lower it"
            )
        if self.epsilon is not None and not job.privacy.secure_aggregation:
            raise ValueError(f"{at}.epsilon: the noise protects only the sum; set privacy.secure_aggregation = true as well")
        for client in clients if self.personal else ():
            samples = client.samples or self.samples
            if self.windows_held_out(samples) < 2:
                raise ValueError(
                    f"{at}.personal: client '{client.name}' would hold out fewer than two windows, one to choose by "
                    "and one to report; raise it, or samples"
                )
        own_sparsity = any(client.sparsity is not None for client in clients)
        if self.method.SOLVED_AT == "server":
            if index > 0:
                raise ValueError(
                    f'{at}.aggregation: "{self.aggregation}" needs the model that the clients have; make it the first stage'
                )
            if own_sparsity:
                raise ValueError(
                    f'clients.sparsity: with aggregation "{self.aggregation}" ({at}) the server prunes; leave it out'
                )
        if self.mends_votes and index > 0:
            raise ValueError(f"{at}.mend: it needs the model that the clients have; make it the first stage, or leave it out")
        if self.measures_blocks:
            if own_sparsity:
                raise ValueError(f"clients.sparsity: {at}.allocation sets the sparsity of every block; leave it out")
            if index > 0:
                raise ValueError(
                    f'{at}.allocation: blocks are measured in the model that the clients have; use "even" after the first stage'
                )
        if self.sparsity is not None:
            least = min(self.sparsity if client.sparsity is None else client.sparsity for client in clients)
            if least > self.sparsity:
                raise ValueError(f"{at}.sparsity: {self.sparsity}, but every client prunes to {least} or more; raise it")

    def check_secure(self, job: Job, index: int) -> None:
        at = f"privacy.secure_aggregation: stages.{index}"
        if self.trim:
            raise ValueError(f"{at}.trim: the server does not see single values to leave out; set it to 0")
        if not self.method.SECURE:
            offered = ", ".join(f'"{name}"' for name in aggregation_names() if aggregation_of(name).SECURE)
            raise ValueError(f'{at}.aggregation "{self.aggregation}" cannot be summed securely; use one of {offered}')
        if self.method.SOLVED_AT == "client" and len(job.clients) > 255:
            raise ValueError(f'{at}.aggregation "{self.aggregation}" supports at most 255 clients; use "pooled"')
        if self.layers != "all":
            raise ValueError(f'{at}.layers: every client must be in every sum; set it to "all"')
        if self.personal and max(min_survivors(len(job.clients)), job.privacy.min_group) < 3:
            raise ValueError(
                f"{at}.personal: in a sum of two clients either could tell the other's; set privacy.min_group to 3 or more"
            )

    def centralized(self, job: Job) -> Self:
        """The same stage for one owner of all text.

        An aggregation that is solved at the server gives this owner the same model as the federation, bit for bit, unless
        noise, ``mixed`` or ``protect_first_block`` changed the federation's. Any other aggregation returns the weights of a
        single client unchanged; "fedspallm" is used for all of these.
        """
        changes = {
            "samples": sum(client.samples or self.samples for client in job.clients),
            "aggregation": self.aggregation if self.method.SOLVED_AT == "server" else "fedspallm",
            "rounds": self.rounds if self.layers == "all" else 1,
            "layers": "all",
            "source": self.calibration_source,
            **{key: type(self).model_fields[key].default for key in (*AGGREGATION_KEYS, "delta")},
        }
        return self.model_copy(update=changes)
