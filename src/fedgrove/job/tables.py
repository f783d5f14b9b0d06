"""The job file as one frozen object. Every error names the key."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

import tomli_w
from pydantic import BeforeValidator, Field, PrivateAttr, field_validator, model_validator

from fedgrove import plugins
from fedgrove.job.endpoint import Endpoint
from fedgrove.job.stage_config import STAGES, StageConfig, config_of
from fedgrove.job.units import (
    MAX_CLIENTS,
    BitChoices,
    BitsPerSecond,
    Bytes,
    ComputeDtype,
    Count,
    Devices,
    File,
    Files,
    Length,
    Name,
    Positive,
    Samples,
    Shares,
    Sparsity,
    Speed,
    Table,
    Template,
    as_name,
)

MAX_STAGES = 64
KINDS = tuple(plugins.names(STAGES, folders=True))
if TYPE_CHECKING:
    AnyStage = StageConfig
else:  # built from the folders of fedgrove.stages, so that a new kind needs no change here
    AnyStage = Annotated[Union[tuple(config_of(kind) for kind in KINDS)], Field(discriminator="kind")]  # noqa: UP007


class Model(Table):
    """``[model]``: the model to prune and tune.

    Attributes:
        path: a Hugging Face model directory with safetensors, or the id of a model on the hub.
        revision: a branch, a tag or a commit of a model on the hub.
        dtype: the dtype in which weights are read and written; "auto": the dtype on disk.
        shares: a table of parameters that several blocks share: the name of each -> the name of the tensor that is stored; "*"
            in a name stands for the number of every block. `fedgrove doctor` shows it. A result has it in its ``shares.json``.
        endpoint: a completions server that runs the model for the clients in stages of kind "prompt", which then sees their
            text. Simulation only: in a federation each site says in its own file where its text goes.
    """

    path: str
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    shares: Shares = Field(default_factory=dict)
    endpoint: Endpoint | None = None
    _name: str | None = PrivateAttr(default=None)

    @property
    def name(self) -> str:
        """What a result says that it was made from: ``path``, or the name under which a server keeps its copy."""
        return self._name or self.path

    def at(self, folder: Path) -> Model:
        """The same model, named by its path so far, and read from a folder."""
        copy = self.model_copy(update={"path": str(folder)})
        copy._name = self.path
        return copy


def whole_pair(part: Any) -> Any:
    """Checks that prompt and answer are both given, or neither.

    Raises:
        ValueError: only one of them is given.
    """
    if (part.prompt is None) != (part.answer is None):
        raise ValueError("give both prompt and answer, or neither")
    return part


class Client(Table):
    """``[[clients]]``: an owner of text. In a federation only ``name`` is allowed; each site sets the rest itself.

    Attributes:
        name: up to 64 letters, digits, dots, dashes and underscores; shown in the report and the model card.
        data: the source of its text, or a list of sources.
        text: how a record becomes text, such as "{question} {answer}"; default: "{text}".
        prompt: for tuning, together with ``answer``: how a record becomes a prompt. Only the answer is learnt.
        answer: see ``prompt``.
        memory: the most memory that the planner may use; a block that needs more is refused before the run starts;
            default: unlimited.
        speed: computing speed relative to the others; "measure" measures it once.
        claimed_speed: for simulations, the speed that it reports, if that is not the one that it has; default: ``speed``.
        uplink: its upload speed; with sampled layers a slow client gets fewer blocks.
        downlink: its download speed.
        bits: the precisions, in bits, in which it can hold frozen weights during tuning.
        devices: the number of accelerators that share its work.
        samples: its number of calibration windows; default: the stage's.
        sparsity: its own sparsity; the result has the stage's.
    """

    name: Name
    data: Files
    text: Template = None
    prompt: Template = None
    answer: Template = None
    memory: Bytes | None = None
    speed: Speed | Literal["measure"] = 1.0
    claimed_speed: Speed | None = None
    uplink: BitsPerSecond | None = None
    downlink: BitsPerSecond | None = None
    bits: BitChoices = (32, 16, 8, 4)
    devices: Devices = 1
    samples: Samples | None = None
    sparsity: Sparsity | None = None

    _whole_pair = model_validator(mode="after")(whole_pair)

    @model_validator(mode="after")
    def _has_a_speed(self) -> Client:
        if self.claimed_speed is not None and self.speed == "measure":
            raise ValueError("claimed_speed: speed is measured; give speed a number, or leave claimed_speed out")
        return self


class Text(Table):
    """``[[evaluate.data]]``: a held-out text and what is measured on it. A file name alone is allowed, too.

    Attributes:
        name: its name in tables; a text with the name of a client is treated as that client's own kind of text.
        path: its source: a file, a folder or a data set, as for a client.
        text: how a record becomes text.
        measure: "perplexity" of the text; "accuracy": how often the most likely label is the answer to the prompt;
            "generation": ROUGE and BLEU of what the model generates after the prompt, with the answer as reference; "head": how
            often the head of a stage "head" finds the answer; "prompt": how often the answer is the most likely label with the
            prompt of a stage "prompt", or its loss if the stage has no labels.
        prompt: how a record becomes a prompt, for accuracy and generation.
        answer: how a record becomes the correct answer.
        labels: all possible answers, written exactly as the answers; default: all answers that occur.
    """

    name: Name
    path: File
    text: Template = None
    measure: Literal["perplexity", "accuracy", "generation", "head", "prompt"] = "perplexity"
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
        return {"name": as_name(Path(value).stem) or "text", "path": value}
    return value


class Evaluate(Table):
    """``[evaluate]``: what is measured before the first stage and after each.

    Attributes:
        data: held-out texts. The server reads them, so they must not be private.
        length: tokens of a window, or of a prompt with its label; windows do not overlap.
        windows: at most this many of each text; default: all.
        prompts: the model continues each of these, before and after the run, and the report shows both side by side.
            This loads the full model into memory. Prompts must not be private.
        compute_dtype: the dtype in which models are measured: "float32"; "bfloat16", up to twice as fast on CPUs with
            instructions for it; "auto": bfloat16 on such CPUs and the default elsewhere. Default: float32 on a CPU, the
            checkpoint's on a GPU.
        records: at most this many of each text whose answers are measured, and of each task; default: all.
        tokens: the maximum number of tokens that "generation" generates for one record.
        alone: also measure the model that each client would have without the others; the server then learns the loss of
            each window.
        centralized: also run the job with one client that has everybody's text, into ``RUN/centralized``, and report it
            next to the federation. Simulation only, because it puts the clients' text in one place. It takes about as
            long as the run itself.
        speed: also measure tokens per second, memory and bytes of the model before and after, with plain transformers.
        tasks: tasks of lm-evaluation-harness, by name, before and after. In a federation only those that the server's
            server.toml allows.
        new: names of clients that are kept out of the run: it then shows what each would get from the pool, as by `fedgrove
            adopt`. Or whole tables of them, as in ``clients``. Simulation only, because the server reads their text.
        tasks_from: a folder with YAML files of more tasks. Such a folder is code: its files can name Python functions, which
            lm-evaluation-harness runs. Refused in a federation.
    """

    data: tuple[Annotated[Text, BeforeValidator(_as_text)], ...] = ()
    length: Length = 512
    windows: Samples | None = None
    compute_dtype: ComputeDtype | None = None
    prompts: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    records: Samples | None = None
    tokens: Count = 64
    alone: bool = False
    centralized: bool = False
    speed: bool = False
    tasks: tuple[str, ...] = ()
    new: tuple[Client, ...] = ()
    tasks_from: File | None = None

    @field_validator("data")
    @classmethod
    def _names_differ(cls, data: tuple[Text, ...]) -> tuple[Text, ...]:
        _unique([text.name for text in data])
        return data

    @property
    def measures_alone(self) -> bool:
        """Whether each client's model without the others is measured: if requested, and if there is held-out text."""
        return self.alone and bool(self.data)


class Rounds(Table):
    """``[rounds]``: what happens when clients do not respond. These keys may change when a run is continued.

    Attributes:
        quorum: continue when this many clients respond; default: all.
        timeout: seconds to wait for a response; default: no limit.
        retries: how often the request is sent again to a client that failed.
    """

    quorum: Count | None = None
    timeout: Positive | None = None
    retries: Annotated[int, Field(ge=0, le=1000)] = 0


class Privacy(Table):
    """``[privacy]``: what the server may learn.

    Attributes:
        secure_aggregation: the server learns only sums, and nothing about any one client; see the page on security.
        min_group: the smallest number of clients in a sum; clients refuse smaller sums.
    """

    secure_aggregation: bool = False
    min_group: Annotated[int, Field(ge=2, le=2**20)] = 3


class Job(Table):
    """The job file.

    Attributes:
        name: of the job; the run folder is ``runs/NAME`` unless ``--out`` names another.
        seed: the same job with the same seed on the same machine gives the same model, bit for bit.
        model: the model to prune and tune.
        clients: the owners of text.
        stages: the stages, run in this order.
        evaluate: what is measured, and on what.
        rounds: what happens when clients do not respond.
        privacy: what the server may learn.
    """

    name: Name
    seed: Annotated[int, Field(gt=-(2**63), lt=2**63)] = 0
    model: Model
    clients: Annotated[tuple[Client, ...], Field(min_length=1, max_length=MAX_CLIENTS)]
    stages: Annotated[tuple[AnyStage, ...], Field(min_length=1, max_length=MAX_STAGES)]
    evaluate: Evaluate = Evaluate()
    rounds: Rounds = Rounds()
    privacy: Privacy = Privacy()

    @model_validator(mode="before")
    @classmethod
    def _keep_out(cls, value: Any) -> Any:
        """Moves the clients that ``evaluate.new`` names from ``clients`` to it, so that nothing else has to know of them."""
        evaluate = value.get("evaluate") if isinstance(value, dict) else None
        new = evaluate.get("new") if isinstance(evaluate, dict) else None
        if evaluate is None or not isinstance(new, list | tuple) or not isinstance(value.get("clients"), list | tuple):
            return value
        named = [owner for owner in new if isinstance(owner, str)]
        tables = {client.get("name"): client for client in value["clients"] if isinstance(client, dict)}
        for name in named:
            if name not in tables:
                raise ValueError(f"evaluate.new: '{name}' is no client of the job; name one of {', '.join(map(str, tables))}")
        moved = [tables[owner] if isinstance(owner, str) else owner for owner in new]
        rest = [client for client in value["clients"] if not (isinstance(client, dict) and client.get("name") in named)]
        return {**value, "clients": rest, "evaluate": {**evaluate, "new": moved}}

    @field_validator("clients")
    @classmethod
    def _in_order(cls, clients: tuple[Client, ...]) -> tuple[Client, ...]:
        _unique([client.name for client in clients])
        return tuple(sorted(clients, key=lambda client: client.name))  # the file's order must not matter

    @model_validator(mode="after")
    def _fits_together(self) -> Job:
        for i, stage in enumerate(self.stages):
            if stage.privacy_budget() is not None and self.evaluate.alone:
                raise ValueError(f"evaluate.alone: the clients' own models have no noise (stages.{i}.epsilon); set it to false")
            stage.check_clients(self, i)
            stage.check(self.of_stage(i), i)
        made = {"perplexity", "accuracy", "generation"}.union(*(stage.measures() for stage in self.stages))
        for number, text in enumerate(self.evaluate.data):
            if text.measure not in made:
                raise ValueError(
                    f'evaluate.data.{number}.measure: no stage makes a "{text.measure}"; add one, or measure another'
                )
        if self.evaluate.new:
            self._check_new()
        if self.privacy.secure_aggregation:
            self._check_secure()
        if self.rounds.quorum is not None and self.rounds.quorum > len(self.clients):
            raise ValueError(f"rounds.quorum: {self.rounds.quorum}, but there are {len(self.clients)} clients")
        return self

    def _check_new(self) -> None:
        if not any(stage.leaves_pool() for stage in self.stages):
            raise ValueError(
                "evaluate.new: no stage has a pool from which to give them an adapter; give a stage tune the key pool"
            )
        _unique([client.name for client in (*self.clients, *self.evaluate.new)])

    def _check_secure(self) -> None:
        if self.evaluate.alone:
            raise ValueError("evaluate.alone: under secure aggregation no client reports its own losses; set it to false")
        for i, stage in enumerate(self.stages):
            number = len(self.of_stage(i).clients)
            if number < self.privacy.min_group:
                where = f" in stages.{i}.clients" if stage.clients else ""
                raise ValueError(
                    f"privacy.min_group: {self.privacy.min_group} clients in a sum, but there are {number}{where}; lower it"
                )
            stage.check_secure(self.of_stage(i), i)

    def of_stage(self, index: int) -> Job:
        """The job with the clients of one stage alone."""
        takes_part = self.stages[index].takes_part
        return self.model_copy(update={"clients": tuple(client for client in self.clients if takes_part(client.name))})

    def together(self, clients: int) -> int:
        """How many of ``clients`` must contribute to a number, so that after dropouts ``privacy.min_group`` remain."""
        least = max(min(self.rounds.quorum or clients, clients), clients - clients // 3)
        return self.privacy.min_group + clients - least

    def dumps(self) -> str:
        """The job as TOML with defaults filled in and absolute paths, so that it can be read from any folder."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


def _unique(names: list[str]) -> None:
    for name in names:  # folders bear these names, and on some systems "A" and "a" are one folder
        if [other.lower() for other in names].count(name.lower()) > 1:
            raise ValueError(f"the name {name!r} is given twice, in whatever case; rename one")
