"""The job file: what somebody wants, as one frozen object. Every complaint names the key."""

from __future__ import annotations

import copy
import re
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tomli_w
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from fedgrove import plugins
from fedgrove.errors import FedgroveError
from fedgrove.masks import Target

_SIZES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def _quantity(unit: str, example: str) -> Any:
    def parse(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        match = re.fullmatch(rf"\s*([\d.]+)\s*([KMGT]i?)?(?:{unit})?\s*", value)
        if not match or match[1].count(".") > 1:
            raise ValueError(f"write a quantity such as {example}")
        return round(float(match[1]) * _SIZES[match[2] or ""])

    return BeforeValidator(parse)


def _existing(path: Path, info: ValidationInfo) -> Path:
    if str(path).startswith("hub:"):
        return path
    path = (info.context or {}).get("folder", Path()) / path.expanduser()
    if not path.exists():
        raise ValueError(f"no such file or folder: {path}")
    return path.resolve()


def _listed(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


def _ascending(values: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(set(values)))


def _one_of(package: str) -> Any:
    def check(name: str) -> str:
        if name not in plugins.names(package):
            raise ValueError(f"choose one of {', '.join(plugins.names(package))}")
        return name

    return AfterValidator(check)


def _template(value: str | None) -> str | None:
    from fedgrove.data import template_fields

    if value is not None:
        template_fields(value)
    return value


Bytes = Annotated[int, Field(gt=0), _quantity("B", '"8GiB"')]
BitsPerSecond = Annotated[int, Field(gt=0), _quantity("bit(?:/s)?", '"20Mbit"')]
File = Annotated[Path, AfterValidator(_existing)]
Files = Annotated[tuple[File, ...], BeforeValidator(_listed), Field(min_length=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Template = Annotated[str | None, AfterValidator(_template)]
Sparsity = Annotated[float, Field(ge=0, lt=1)]
Bits = Literal[32, 16, 8, 4]
Grid = Annotated[tuple[Annotated[int, Field(gt=0)], ...], Field(min_length=1), AfterValidator(_ascending)]


class Part(BaseModel):
    """A table of the job file: frozen, and no key that is not known."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Model(Part):
    """``[model]``: what is made smaller and better.

    Attributes:
        path: a Hugging Face model directory with safetensors, or the id of a model on the hub.
        revision: of a model on the hub: a branch, a tag or a commit.
        dtype: in which the weights are read and written; "auto": as they are on disk.
    """

    path: str
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


def whole_pair(part: Any) -> Any:
    """Refuses a prompt without an answer, and the reverse."""
    if (part.prompt is None) != (part.answer is None):
        raise ValueError("give both prompt and answer, or neither")
    return part


class Client(Part):
    """``[[clients]]``: an owner of text; only for simulation, in a deployment every client brings its own.

    Attributes:
        name: up to 64 letters, digits, dots, dashes and underscores; it stands in the report and in the model card.
        data: where its text is: one source or a list.
        text: how a record becomes text, such as "{question} {answer}"; default: "{text}".
        prompt: with ``answer``: how a record becomes a question, where a stage tunes. Of these only the answer is learnt.
        answer: see ``prompt``.
        memory: what the planner may use; a block that needs more is refused before anything runs; default: any.
        speed: compute, relative to the others; "measure": it is measured once.
        uplink: what it can send; with sampled layers a slow client is given fewer blocks.
        downlink: what it can receive.
        bits: in which it can hold frozen weights while it tunes.
        devices: accelerators that share its work.
        samples: another number of calibration windows than the stage's.
        sparsity: prunes harder than the stage asks; the result has the stage's sparsity.
    """

    name: Name
    data: Files
    text: Template = None
    prompt: Template = None
    answer: Template = None
    memory: Bytes | None = None
    speed: Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["measure"] = 1.0
    uplink: BitsPerSecond | None = None
    downlink: BitsPerSecond | None = None
    bits: Annotated[tuple[Bits, ...], Field(min_length=1)] = (32, 16, 8, 4)
    devices: Annotated[int, Field(ge=1, le=64)] = 1
    samples: Annotated[int, Field(gt=0)] | None = None
    sparsity: Sparsity | None = None

    _whole_pair = model_validator(mode="after")(whole_pair)


class LayerSampling(Part):
    """``layers = { sample = 0.5, cover = 2 }``: each client prunes a share of the blocks.

    Attributes:
        sample: the share, on average; clients that say more of ``speed`` and ``uplink`` are given more.
        cover: clients that prune each block, at least.
    """

    sample: Annotated[float, Field(gt=0, le=1)]
    cover: Annotated[int, Field(ge=1)] = 2


class PruneStage(Part):
    """``[[stages]]`` of ``kind = "prune"``.

    Attributes:
        kind: what the stage does.
        pruner: how a matrix is pruned; see the methods.
        rule: what clients send and what the server makes of it.
        sparsity: the share of every matrix that becomes zero; this or ``pattern``.
        pattern: "2:4" keeps 2 of every 4 inputs; this or ``sparsity``.
        samples: windows of text that each client calibrates on.
        length: tokens in each.
        layers: "all", or a table: which blocks each client prunes.
        rounds: how often the model is pruned, each time from the round before. With sampled layers more rounds reach more
            client-block pairs.
        shrink: weights that few clients kept are multiplied by (share that kept them) to this power; 0 is the paper. Rule
            "votes" only.
        expand: prune on by votes until the target holds exactly (the paper's mask expansion); false leaves fewer zeros.
        bound: refuse a client whose pruned weights exceed the largest one before so many times.
        trim: rule "votes": leave out so many of the highest and of the lowest values of every weight, against liars.
        source: what text passes through on its way to a block: "sequential", the pruned blocks before it, or "dense", the
            model as it came, which takes half the time. Default: "dense" with rule "statistics", else "sequential".
        compute: what the blocks compute in while text passes through them: "float32", or "bfloat16", twice as fast on CPUs that
            know it. The weights that are pruned are not rounded. Default: "float32" on a CPU, on a GPU the model's own dtype.
        damping: what SparseGPT adds to the sums of squares, so that they can be solved: "mean", 1 % of their mean (the paper),
            or "each", 1 % of each channel's own. Default: "each" with rule "statistics", else "mean".
        mixed: of rule "statistics" with a pruner that needs products: wide inputs by wanda, for a fraction of the bytes.
        protect_first_block: prune block 0 by magnitude, so that nobody sends sums of it: they tell much of the word counts.
        epsilon: differential privacy of one window: noise on wanda's sums; needs secure aggregation.
        delta: see ``epsilon``.
        allocation: "even": every block loses the same; "owl": blocks with many outliers lose less. What a client has alone is
            pruned to the same sparsities.
        outlier, spread: OWL's M (an outlier is so many times the mean) and λ (half of what lies between the sparsest block
            and the densest).
    """

    kind: Literal["prune"]
    pruner: Annotated[str, _one_of("pruners")] = "sparsegpt"
    rule: Annotated[str, _one_of("rules")] = "votes"
    sparsity: Sparsity | None = None
    pattern: Annotated[str, Field(pattern=r"^\d{1,3}:\d{1,3}$")] | None = None
    samples: Annotated[int, Field(gt=0)] = 16
    length: Annotated[int, Field(gt=1)] = 512
    layers: Literal["all"] | LayerSampling = "all"
    rounds: Annotated[int, Field(ge=1)] = 1
    shrink: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    expand: bool = True
    bound: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    trim: Annotated[int, Field(ge=0)] = 0
    allocation: Annotated[str, _one_of("allocations")] = "even"
    outlier: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 5.0
    spread: Annotated[float, Field(gt=0, lt=0.5)] = 0.08
    source: Literal["dense", "sequential"] | None = None
    compute: Literal["float32", "bfloat16"] | None = None
    damping: Literal["mean", "each"] | None = None
    mixed: bool = False
    protect_first_block: bool = False
    epsilon: Annotated[float, Field(gt=0, le=50)] | None = None
    delta: Annotated[float, Field(gt=0, lt=0.1)] = 1e-6

    @model_validator(mode="after")
    def _one_target(self) -> PruneStage:
        if (self.sparsity is None) == (self.pattern is None):
            raise ValueError('give one of sparsity (such as 0.5) and pattern (such as "2:4")')
        if self.pattern and not 0 < self.kept_of[0] < self.kept_of[1]:
            raise ValueError(f'pattern "{self.pattern}": N of every M inputs are kept, so 0 < N < M')
        if self.shrink and self.rule != "votes":
            raise ValueError('shrink belongs to rule = "votes"')
        if self.bound is not None and self.rule not in ("votes", "mean"):
            raise ValueError('bound belongs to rule = "votes" and "mean"')
        if self.trim and (self.rule != "votes" or self.layers != "all"):
            raise ValueError('trim belongs to rule = "votes", with layers = "all": every client counts alike')
        if self.damping is not None and plugins.load("pruners", self.pruner).NEEDS != "gram":
            raise ValueError(f'damping: pruner "{self.pruner}" solves nothing; leave it out, or use sparsegpt')
        if self.allocation != "even":
            self._check_allocation()
        if self.rule == "statistics":
            self._check_statistics()
        elif self.mixed or self.protect_first_block or self.epsilon is not None:
            raise ValueError('mixed, protect_first_block and epsilon belong to rule = "statistics"')
        if self.walk == "dense" and self.rounds != 1:
            raise ValueError('source "dense": a second round would prune by the same inputs; use rounds = 1, or "sequential"')
        return self

    def _check_allocation(self) -> None:
        if self.pattern:
            raise ValueError(f'allocation: a pattern leaves every block alike; "{self.allocation}" needs sparsity')
        if self.epsilon is not None:
            raise ValueError('allocation: the budget of epsilon is spent on one sum of each block; use "even"')

    def _check_statistics(self) -> None:
        needs = plugins.load("pruners", self.pruner).NEEDS
        if needs == "nothing":
            raise ValueError(
                f'rule "statistics": pruner "{self.pruner}" needs nothing to be summed; use wanda, dsnot or sparsegpt'
            )
        if self.mixed and needs != "gram":
            raise ValueError(f'mixed: pruner "{self.pruner}" needs no products; leave it out, or use sparsegpt')
        if self.epsilon is not None and (needs != "squares" or self.walk != "dense"):
            raise ValueError('epsilon: there is noise for pruner "wanda" with source "dense" only')
        if self.rounds != 1:
            raise ValueError('rounds: rule "statistics" is exact in one; set it to 1')
        if self.layers != "all" and self.walk == "sequential":
            raise ValueError('layers: every client walks through every block with source = "sequential"; use "dense", or "all"')

    @property
    def walk(self) -> Literal["dense", "sequential"]:
        """``source``, or its default."""
        return self.source or ("dense" if self.rule == "statistics" else "sequential")

    @property
    def damps(self) -> Literal["mean", "each"]:
        """``damping``, or its default."""
        return self.damping or ("each" if self.rule == "statistics" else "mean")

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


class NarrowStage(Part):
    """``[[stages]]`` of ``kind = "narrow"``.

    Attributes:
        kind: what the stage does.
        channels: the share of every block's MLP channels that goes, rounded down to whole ones.
        heads: likewise of its groups of heads: a key-value head with the query heads that share it.
        score: which of them matter: "fisher" (squares of what the loss would change), or "taylor" (LLM-Pruner's).
        samples: windows of text that each client calibrates on; length: tokens in each.
    """

    kind: Literal["narrow"]
    channels: Sparsity = 0.25
    heads: Sparsity = 0.25
    score: Annotated[str, _one_of("rules.groups")] = "fisher"
    samples: Annotated[int, Field(gt=0)] = 16
    length: Annotated[int, Field(gt=1)] = 512

    @model_validator(mode="after")
    def _cuts_something(self) -> NarrowStage:
        if self.channels == self.heads == 0:
            raise ValueError("channels and heads are both 0, so nothing is cut; raise one")
        return self


class TuneStage(Part):
    """``[[stages]]`` of ``kind = "tune"``.

    Attributes:
        kind: what the stage does.
        method: "fedpipe" gives each client a configuration of its own; "lora" gives all the one that the weakest can hold;
            "full" trains the whole linears.
        rule: what the server makes of the adapters.
        rounds: how often the clients train and the server makes one adapter of theirs.
        steps: optimiser steps of each client in a round, the same for all.
        length: tokens per window.
        batches: windows per step that a client may be given. "lora" and "full" give the largest to all.
        ranks: ranks that a linear may be given besides 0. "lora" gives all the largest that everyone can hold.
        bits: of each frozen weight; 32 and 16 are floats, 8 is int8, 4 is NF4.
        learning_rate: of the clients' optimiser.
        decay: "linear" lowers the learning rate to a tenth over the rounds.
        optimizer: the clients'; its state begins anew in every round.
        clip: the largest norm of a client's gradient; 0: any.
        alpha: LoRA's α, so that an adapter is scaled by α/r; default: 2 at the largest of ``ranks``, and ∝ 1/√r below it.
        deadline: seconds that a client may compute and send in a round (modelled); default: what the slowest client needs
            for the smallest batch at the smallest ranks. Only "fedpipe" looks at it.
        price: what it costs to send all linears at the largest rank, where that rank everywhere is worth 1 and so is the
            largest batch: higher, and clients send less. Only "fedpipe" looks at it.
        refresh: measure the importance and plan again every so many rounds; 0: only before the first.
        warmup: optimiser steps from which the importance is measured.
        proximal: FedProx's μ.
        partition: of rule "ranks": ranks that only some clients have are the mean over those; false: over everybody, exactly.
        server: what is made of a round's change: "average" takes it, "momentum" and "adam" smooth it.
        server_rate: multiplies the change, or is the step of "adam".
        precision: dtype of the adapters on the wire; "fixed" sends up whole numbers, which add up exactly, whoever adds them
            (see :mod:`fedgrove.tuning.whole`), and float32 down. Secure aggregation needs it.
        epsilon, delta: differential privacy of what tuning learns; see :mod:`fedgrove.privacy.tuning`.
        protects: what may be there or not without anybody noticing: a whole "client", or one "window" of its text.
        bound: the largest norm of what it contributes: of a client's change, or of a window's gradient.
        personal: the share of its windows that each client does not train on, but chooses by which adapter it keeps for
            itself: the shared one or the best of its own (on its own disk; see :mod:`fedgrove.tuning.personal`). 0: none.
        measure: the held-out perplexity is measured after every so many rounds; 0: only after the last.
    """

    kind: Literal["tune"]
    method: Literal["fedpipe", "lora", "full"] = "fedpipe"
    rule: Annotated[str, _one_of("rules.adapters")] = "ranks"
    rounds: Annotated[int, Field(ge=1)] = 10
    steps: Annotated[int, Field(ge=1)] = 16
    length: Annotated[int, Field(gt=1)] = 512
    batches: Grid = (1, 2, 4, 8, 16)
    ranks: Grid = (2, 4, 8, 16, 32)
    bits: Annotated[tuple[Bits, ...], Field(min_length=1)] = (16, 8, 4)
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    decay: Literal["none", "linear"] = "none"
    optimizer: Literal["adamw", "sgd"] = "adamw"
    clip: Annotated[float, Field(ge=0)] = 1.0
    alpha: Annotated[float, Field(gt=0)] | None = None
    deadline: Annotated[float, Field(gt=0)] | None = None
    price: Annotated[float, Field(ge=0)] = 0.4
    refresh: Annotated[int, Field(ge=0)] = 0
    warmup: Annotated[int, Field(ge=1)] = 4
    proximal: Annotated[float, Field(ge=0)] = 0.0
    partition: bool = True
    server: Literal["average", "momentum", "adam"] = "average"
    server_rate: Annotated[float, Field(gt=0)] | None = None
    precision: Literal["float32", "bfloat16", "fixed"] = "bfloat16"
    epsilon: Annotated[float, Field(gt=0, le=50)] | None = None
    delta: Annotated[float, Field(gt=0, lt=0.1)] = 1e-6
    protects: Literal["client", "window"] = "window"
    bound: Annotated[float, Field(gt=0, le=16)] = 1.0
    personal: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    measure: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _fits_method(self) -> TuneStage:
        if self.method == "fedpipe" and self.rule == "residual":
            raise ValueError('rule "residual" needs equal ranks: use method = "lora", or rule = "ranks"')
        if self.method == "full" and self.rule != "ranks":
            raise ValueError('method "full" has no adapters: leave rule out')
        if self.method == "full" and self.personal:
            raise ValueError('method "full" has no adapters: leave personal out')
        if self.server != "average" and (self.method == "full" or self.rule != "ranks"):
            raise ValueError(f'server "{self.server}" works on adapters with rule = "ranks"')
        if self.precision == "fixed" and (self.method == "full" or self.rule != "frozen_a"):
            raise ValueError('precision "fixed": whole numbers add up where all share one factor; set rule = "frozen_a"')
        if self.epsilon is not None and self.method != "lora":
            what = (
                'the scores by which "fedpipe" plans have no noise'
                if self.method == "fedpipe"
                else "there is noise for adapters"
            )
            raise ValueError(f'epsilon: {what}; set method = "lora"')
        if self.epsilon is not None and self.personal:
            raise ValueError("epsilon: the losses by which adapters are chosen have no noise; leave personal out")
        if self.epsilon is not None and self.protects == "client" and self.precision != "fixed":
            raise ValueError(
                'epsilon: the noise is on a sum of changes; set rule = "frozen_a" and precision = "fixed" beside it'
            )
        return self

    @property
    def dtype(self) -> str:
        """Of the adapters on the wire; with "fixed", on their way down."""
        return "float32" if self.precision == "fixed" else self.precision


class Text(Part):
    """``[[evaluate.data]]``: a held-out text, and what is measured on it; or its file name alone.

    Attributes:
        name: what it is called in tables; one that is named as a client counts as that client's own kind of text.
        path: where it is: a file, a folder or a data set, as of a client.
        text: how a record becomes text.
        measure: "perplexity" of the text; "accuracy": how often the most likely of the labels is the answer to the prompt;
            "generation": ROUGE and BLEU of what the model writes after the prompt, against the answer.
        prompt: what is asked, where answers are measured.
        answer: what is right.
        labels: all that may be answered, written as answers are; default: all answers that occur.
    """

    name: Name
    path: File
    text: Template = None
    measure: Literal["perplexity", "accuracy", "generation"] = "perplexity"
    prompt: Template = None
    answer: Template = None
    labels: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _fits_measure(self) -> Text:
        answered = self.measure != "perplexity"
        if answered and (self.prompt is None or self.answer is None):
            raise ValueError(f'measure "{self.measure}": give prompt and answer')
        if answered and self.text is not None:
            raise ValueError(f'measure "{self.measure}" has no text: give prompt and answer')
        if not answered and (self.prompt is not None or self.answer is not None):
            raise ValueError('prompt and answer belong to measure = "accuracy" and "generation"')
        if self.labels and self.measure != "accuracy":
            raise ValueError('labels belong to measure = "accuracy"')
        return self


def _as_text(value: Any) -> Any:
    if isinstance(value, str | Path):
        return {"name": re.sub(r"[^A-Za-z0-9._-]", "-", Path(value).stem), "path": value}
    return value


class Evaluate(Part):
    """``[evaluate]``: measured before the first stage and after each.

    Attributes:
        data: held-out texts, which the server sees: nobody's private text.
        length: tokens per window, or of a prompt with its label; windows do not overlap.
        windows: at most so many of each text; default: all.
        prompts: the model writes on from each of these, before and after, and the report shows both side by side. It is
            loaded whole for that. Nobody's private text belongs here.
        records: at most so many of each text where answers are measured, and of each task; default: all.
        tokens: written at most, by "generation".
        alone: also measure what each client would have had without the others; it tells the server the loss of each window.
        centralised: run the job once more as one owner of everybody's text, into ``RUN/centralised``, and report it beside the
            federation. Simulation only: it puts the clients' text in one place. It takes about as long again.
        speed: also tokens a second, memory and bytes of the model before and after, by plain transformers.
        tasks: of lm-evaluation-harness, by name, before and after.
        tasks_from: a folder with YAML files of more tasks.
    """

    data: tuple[Annotated[Text, BeforeValidator(_as_text)], ...] = ()
    length: Annotated[int, Field(gt=1)] = 512
    windows: Annotated[int, Field(ge=1)] | None = None
    prompts: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    records: Annotated[int, Field(ge=1)] | None = None
    tokens: Annotated[int, Field(ge=1)] = 64
    alone: bool = False
    centralised: bool = False
    speed: bool = False
    tasks: tuple[str, ...] = ()
    tasks_from: File | None = None

    @field_validator("data")
    @classmethod
    def _names_differ(cls, data: tuple[Text, ...]) -> tuple[Text, ...]:
        _unique([text.name for text in data])
        return data


class Rounds(Part):
    """``[rounds]``: what happens when clients do not answer. These keys may change when a run is continued.

    Attributes:
        quorum: go on while so many clients answer; default: all.
        timeout: seconds to wait for an answer; default: for ever.
        retries: how often a client that failed is asked again.
    """

    quorum: Annotated[int, Field(ge=1)] | None = None
    timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    retries: Annotated[int, Field(ge=0)] = 0


class Privacy(Part):
    """``[privacy]``: what the server may learn.

    Attributes:
        secure_aggregation: the server learns sums only, nothing of any one client; see the page on security.
        smallest: no client takes part in a sum of fewer clients.
    """

    secure_aggregation: bool = False
    smallest: Annotated[int, Field(ge=2)] = 3


class Job(Part):
    """The whole job file.

    Attributes:
        name: of the job; the run folder is ``runs/NAME`` unless ``--out`` says otherwise.
        seed: same job, same seed, same machine: the same model, bit for bit.
        model: what is made smaller and better.
        clients: the owners of text.
        stages: what is done, one after the other.
        evaluate: what is measured, and on what.
        rounds: what happens when clients do not answer.
        privacy: what the server may learn.
    """

    name: Name
    seed: int = 0
    model: Model
    clients: Annotated[tuple[Client, ...], Field(min_length=1)]
    stages: Annotated[
        tuple[Annotated[NarrowStage | PruneStage | TuneStage, Field(discriminator="kind")], ...], Field(min_length=1)
    ]
    evaluate: Evaluate = Evaluate()
    rounds: Rounds = Rounds()
    privacy: Privacy = Privacy()

    @field_validator("clients")
    @classmethod
    def _in_order(cls, clients: tuple[Client, ...]) -> tuple[Client, ...]:
        _unique([client.name for client in clients])
        return tuple(sorted(clients, key=lambda client: client.name))  # so that their order in the file changes nothing

    @model_validator(mode="after")
    def _fits_together(self) -> Job:
        for i, stage in enumerate(self.stages):
            if isinstance(stage, NarrowStage) and i > 0:
                raise ValueError(f'stages.{i}.kind: "narrow" cuts the model that the clients have; make it the first stage')
            if getattr(stage, "epsilon", None) is not None and self.evaluate.alone:
                raise ValueError(f"evaluate.alone: what a client has alone has no noise (stages.{i}.epsilon); set it to false")
            if not isinstance(stage, PruneStage):
                continue
            if isinstance(self.stages[0], NarrowStage):
                raise ValueError(f"stages.{i}.kind: clients prune the model that they have; narrow and prune in two jobs")
            if self.evaluate.alone and stage.layers != "all":
                raise ValueError("evaluate.alone: no client prunes the whole model when layers are sampled; set it to false")
            if stage.trim and len(self.clients) <= 2 * stage.trim:
                raise ValueError(
                    f"stages.{i}.trim: {stage.trim} values from above and below are all that {len(self.clients)} clients have; "
                    f"set it to {(len(self.clients) - 1) // 2} at most"
                )
            if isinstance(stage.layers, LayerSampling) and stage.layers.cover > len(self.clients):
                raise ValueError(
                    f"stages.{i}.layers.cover: {stage.layers.cover} clients for each block, but there are {len(self.clients)}"
                )
            if stage.epsilon is not None and not self.privacy.secure_aggregation:
                raise ValueError(
                    f"stages.{i}.epsilon: noise protects the sum alone; set privacy.secure_aggregation = true beside it"
                )
            if stage.rule == "statistics" and i > 0:
                raise ValueError(
                    f'stages.{i}.rule: "statistics" are of the model that the clients have; make it the first stage'
                )
            if stage.rule == "statistics" and any(client.sparsity is not None for client in self.clients):
                raise ValueError(f'clients.sparsity: with rule "statistics" (stages.{i}) the server prunes; leave it out')
            if stage.allocation != "even":
                if any(client.sparsity is not None for client in self.clients):
                    raise ValueError(f"clients.sparsity: stages.{i}.allocation gives every block its own; leave it out")
                if i > 0:
                    raise ValueError(f'stages.{i}.allocation: it is measured in the model that the clients have; use "even"')
            if stage.sparsity is not None:
                least = min(stage.sparsity if client.sparsity is None else client.sparsity for client in self.clients)
                if least > stage.sparsity:
                    raise ValueError(
                        f"stages.{i}.sparsity: {stage.sparsity}, but every client prunes to {least} or more; raise it"
                    )
        if self.privacy.secure_aggregation:
            self._check_secure()
        if self.rounds.quorum is not None and self.rounds.quorum > len(self.clients):
            raise ValueError(f"rounds.quorum: {self.rounds.quorum}, but there are {len(self.clients)} clients")
        return self

    def _check_secure(self) -> None:
        if self.evaluate.alone:
            raise ValueError("evaluate.alone: under secure aggregation no client tells what it has alone; set it to false")
        if len(self.clients) < self.privacy.smallest:
            raise ValueError(
                f"privacy.smallest: {self.privacy.smallest} clients in a sum, but there are {len(self.clients)}; lower it"
            )
        for i, stage in enumerate(self.stages):
            if isinstance(stage, TuneStage):
                if stage.precision != "fixed":
                    raise ValueError(
                        f"privacy.secure_aggregation: stages.{i}: only whole numbers can be summed unseen; "
                        'set rule = "frozen_a" and precision = "fixed"'
                    )
                if stage.personal:
                    raise ValueError(f"privacy.secure_aggregation: stages.{i}.personal: its losses are not summed; set it to 0")
                continue
            if isinstance(stage, NarrowStage):
                continue
            if stage.trim:
                raise ValueError(
                    f"privacy.secure_aggregation: stages.{i}.trim: nobody sees which values to leave out; set it to 0"
                )
            if stage.rule == "mean":
                raise ValueError(f'privacy.secure_aggregation: stages.{i}.rule "mean": use "statistics", "votes" or "masks"')
            if stage.rule != "statistics" and len(self.clients) > 255:
                raise ValueError(f'privacy.secure_aggregation: stages.{i}.rule "{stage.rule}" counts to 255; use "statistics"')
            if stage.layers != "all":
                raise ValueError(
                    f'privacy.secure_aggregation: stages.{i}.layers: every client is in every sum; set it to "all"'
                )

    def pruning(self, stage: int) -> PruneStage:
        """A stage that prunes."""
        found = self.stages[stage]
        assert isinstance(found, PruneStage)
        return found

    def narrowing(self, stage: int) -> NarrowStage:
        """A stage that narrows."""
        found = self.stages[stage]
        assert isinstance(found, NarrowStage)
        return found

    def tuning(self, stage: int) -> TuneStage:
        """A stage that tunes."""
        found = self.stages[stage]
        assert isinstance(found, TuneStage)
        return found

    def together(self, clients: int) -> int:
        """How many of so many clients must add to a number, so that those who may drop leave ``privacy.smallest`` in it."""
        least = max(min(self.rounds.quorum or clients, clients), clients - clients // 3)
        return self.privacy.smallest + clients - least

    def dumps(self) -> str:
        """The job as TOML, defaults filled in, paths absolute: it can be read again from anywhere."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


class Owner(Client):
    """``[[clients]]`` in a federation: a name and nothing else; everything about itself a site says itself."""

    data: tuple[File, ...] = ()


class FederatedJob(Job):
    """A job for the sites of a federation.

    Attributes:
        result: "server": the model stays there, and operators fetch it; "sites": it also goes to the sites that want it.
    """

    clients: Annotated[tuple[Owner, ...], Field(min_length=1)]
    result: Literal["server", "sites"] = "server"

    @model_validator(mode="after")
    def _keeps_text_apart(self) -> FederatedJob:
        if self.evaluate.centralised:
            raise ValueError("evaluate.centralised: in a federation no text may be put in one place; set it to false")
        return self


def load(path: Path, changes: Sequence[str] = ()) -> Job:
    """Reads a job file; paths in it are relative to its folder.

    Args:
        path: the TOML file.
        changes: such as ``stages.0.sparsity=0.6``, applied before anything is checked.

    Raises:
        FedgroveError: names the file and the key, and says what would do.
    """
    return _load(path, changes, Job, path.parent)


def load_federated(
    path: Path, changes: Sequence[str] = (), sites: Sequence[str] = (), texts: Path | None = None
) -> FederatedJob:
    """Reads a job file for a federation. ``model.path`` is a name there: every member says where its own copy is.

    Args:
        path: the TOML file; where it has no ``[[clients]]`` all sites take part.
        changes: as for :func:`load`.
        sites: the names of the federation's sites.
        texts: where held-out texts lie; default: beside the file.

    Raises:
        FedgroveError: likewise.
    """
    return _load(path, changes, FederatedJob, texts or path.parent, sites)


Kind = TypeVar("Kind", bound=Job)


def parse(said: Mapping[str, Any], folder: Path, where: str = "job") -> Job:
    """A job from what a job file says.

    Args:
        said: as TOML gives it.
        folder: what paths in it are relative to.
        where: named in complaints.

    Raises:
        FedgroveError: names the key, and says what would do.
    """
    raw = copy.deepcopy(dict(said))
    _find_model(raw, folder)
    return _validate(raw, Job, folder, where)


def _load(path: Path, changes: Sequence[str], kind: type[Kind], folder: Path, sites: Sequence[str] | None = None) -> Kind:
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as fault:
        raise FedgroveError(f"{path}: no such job file; `fedgrove init` writes one") from fault
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as fault:
        raise FedgroveError(f"{path}: not TOML: {fault}") from fault
    for change in changes:
        _apply(raw, change)
    if sites is None:
        _find_model(raw, path.parent)
    else:
        _name_owners(raw, path, sites)
    return _validate(raw, kind, folder, str(path))


def _validate(raw: Mapping[str, Any], kind: type[Kind], folder: Path, where: str) -> Kind:
    try:
        return kind.model_validate(raw, context={"folder": folder.resolve()})
    except ValidationError as fault:
        raise FedgroveError(f"{where}: {complaint(fault)}") from fault


def _find_model(raw: dict[str, Any], folder: Path) -> None:
    model = raw.get("model")
    if isinstance(model, dict) and isinstance(model.get("path"), str):
        beside = folder / Path(model["path"]).expanduser()
        if beside.is_dir():
            model["path"] = str(beside.resolve())


def _name_owners(raw: dict[str, Any], path: Path, sites: Sequence[str]) -> None:
    clients = raw.setdefault("clients", [{"name": site} for site in sites])
    for i, client in enumerate(clients if isinstance(clients, list) else []):
        for key in client if isinstance(client, dict) else ():
            if key != "name":
                raise FedgroveError(f"{path}: clients.{i}.{key}: in a federation the site's own file says that; leave it out")
        if sites and isinstance(client, dict) and client.get("name") not in sites:
            raise FedgroveError(f"{path}: clients.{i}.name: {client.get('name')!r} is no site; there are {', '.join(sites)}")


# pydantic names the member of a union that it tried
_ALTERNATIVES = ("literal['all']", "LayerSampling", "narrow", "prune", "tune")


def complaint(fault: ValidationError) -> str:
    """The first fault of a file as one line: the key, and what would do."""
    first = fault.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part not in _ALTERNATIVES)
    what = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        what = "no such key"
    elif first["type"].startswith("union_tag"):  # a stage of no kind, or of one that there is not
        where, what = f"{where}.kind", "choose one of narrow, prune, tune"
    elif first["type"] == "missing":
        what = "this key is required"
    elif first["type"] not in ("value_error", "string_pattern_mismatch") and isinstance(first["input"], str | int | float):
        what += f", not {first['input']!r}"
    elif first["type"] == "string_pattern_mismatch":
        what = f"{first['input']!r} is not of the form {first['ctx']['pattern']}"
    return f"{where}: {what}" if where else what


def _apply(raw: dict[str, Any], change: str) -> None:
    key, equals, value = change.partition("=")
    if not equals or not key.strip():
        raise FedgroveError(f"--set {change}: write KEY=VALUE, for instance stages.0.sparsity=0.6")
    parsed: Any = value  # a bare word is a string
    with suppress(tomllib.TOMLDecodeError):
        table = tomllib.loads(f"value = {value}")
        parsed = table["value"] if len(table) == 1 else value
    place: Any = raw
    *path, last = key.strip().split(".")
    for step in path:
        if isinstance(place, list) and step.isdigit() and int(step) < len(place):
            place = place[int(step)]
        elif isinstance(place, dict) and (step in place or step in Job.model_fields):
            place = place.setdefault(step, {})
        else:
            raise FedgroveError(f"--set {key}: the job has no {step!r} there")
    if isinstance(place, list) and last.isdigit() and int(last) < len(place):
        place[int(last)] = parsed
    elif isinstance(place, dict):
        place[last] = parsed
    else:
        raise FedgroveError(f"--set {key}: the job has no {last!r} there")


def _unique(names: list[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"the name {name!r} is given twice")
