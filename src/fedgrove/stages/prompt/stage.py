"""The stage ``prompt``: the server names candidate prompts, the clients score them, and the sums say where to look next."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from fedgrove.errors import FedgroveError
from fedgrove.evaluation.labeled import labeled
from fedgrove.evaluation.metrics import mean
from fedgrove.events import Phase
from fedgrove.files import write_atomically
from fedgrove.job.tables import Job
from fedgrove.models.blocks import Decoder
from fedgrove.models.compute import dtype_of
from fedgrove.models.continuations import embed
from fedgrove.models.stream import Checkpoint
from fedgrove.models.tensor_files import save_tensors
from fedgrove.rounds.aggregator.integers import IntegerSums
from fedgrove.rounds.capabilities import Capabilities
from fedgrove.rounds.federation import Federation
from fedgrove.rounds.request import CHANGE, Message, Tensors
from fedgrove.stages.base import Losses, Result, calibration_seed
from fedgrove.stages.prompt.candidates import WORDS, as_words
from fedgrove.stages.prompt.config import Config
from fedgrove.stages.prompt.exchanges.local import SearchAlone
from fedgrove.stages.prompt.exchanges.score import COUNTS, SCORES, ScorePrompts
from fedgrove.stages.prompt.exchanges.votes import CALLS, PLACES, VOTES, VoteForWords
from fedgrove.stages.prompt.files import write_prompt
from fedgrove.stages.prompt.lexicon import embeddings_of
from fedgrove.stages.prompt.methods import Found
from fedgrove.stages.prompt.plan import Plan, make_plan
from fedgrove.stages.prompt.records import Records, read_records
from fedgrove.stages.prompt.requests import AS_IN_THE_JOB, CANDIDATES, prompts_of
from fedgrove.stages.prompt.scoring import MOST_LOSS, Prompt, costs, losses, right, score
from fedgrove.stages.prompt.searching import subspace_of, task_of

MEASURE = "prompt"  # of held-out texts
MOST_FAILED = 3  # rounds in a row in which no loss is finite
NONE, START, FOUND = "no_prompt", "start_prompt", "found_prompt"  # metrics of a held-out text


def plan(index: int, config: Config, decoder: Decoder, capabilities: Mapping[str, Capabilities], job: Job) -> Plan:
    """See :func:`fedgrove.stages.prompt.plan.make_plan`."""
    return make_plan(index, config, decoder, capabilities, calibration_seed(job.seed, index))


def run(model: Checkpoint, plan: Plan, config: Config, federation: Federation) -> Result:
    """Looks for a prompt round by round, and measures it on the held-out texts whose ``measure`` is "prompt".

    The sums of each round are a file in the run folder; an interrupted stage tells them to the method once more.

    Returns:
        The model as it was, and the prompt in ``RUN/prompt``. ``RUN/prompt.json`` says how it was found.
    """
    return Result(model, {"prompt": _Stage(model, plan, config, federation).run()})


def alone(
    model: Checkpoint,
    plan: Plan,
    config: Config,
    clients: Sequence[str],
    windows: Mapping[str, list[Tensor]],
    federation: Federation,
) -> Iterator[tuple[str, Losses]]:
    """Measures nothing: the stage changes no model."""
    return iter(())


def typical_memory(decoder: Decoder, length: int) -> dict[str, float]:
    """With the defaults of a job."""
    config = Config(kind="prompt", length=length)
    try:
        plan = make_plan(0, config, decoder, {"one": Capabilities()}, "0/0")
    except FedgroveError:
        return {}
    return {"score prompts": float(plan.clients["one"].memory)}


class _Stage:
    """A running stage."""

    def __init__(self, model: Checkpoint, plan: Plan, config: Config, federation: Federation):
        self.plan, self.config, self.federation = plan, config, federation
        self.run_folder, self.job = federation.run, federation.job
        self.decoder = Decoder(model, federation.device)
        self.method, self.seed = config.searcher, calibration_seed(self.job.seed, plan.stage)
        self.task = task_of(config, plan.stage, model.tokenizer(), self.seed)
        self.subspace = subspace_of(config, self.task, self.decoder)
        self.embeddings: Tensor | None = None  # of the words that clients vote for
        self.folder = self.run_folder.path / "work" / f"stage-{plan.stage}"
        self.logged = {
            (line["round"], line["client"], line["name"]) for line in self.run_folder.metrics() if line["stage"] == plan.stage
        }

    def run(self) -> Path:
        """Runs the stage; returns the folder of the prompt."""
        for client, why in sorted(self.plan.left_out.items()):
            self.run_folder.message(f"prompt: client '{client}' is left out: {why}")
        held_out = self.held_out()  # before the rounds, to find errors in texts early
        state, failed = self.method.begin(self.task), 0
        for round_ in range(self.config.rounds):
            if self.config.searches_alone:
                state = self.config.local_searcher.merge(state, self.config.aggregation, self.found(round_, state))
                continue
            calls = 0
            if self.config.votes:
                state, calls = self.merged(round_, state)
            candidates = self.method.propose(state, round_)
            scored = self.scored(round_, candidates, calls)
            failed = 0 if scored["records"] else failed + 1
            if failed == MOST_FAILED:
                raise FedgroveError(
                    f"stage {self.plan.stage}: in {MOST_FAILED} rounds in a row no record's loss was finite under any prompt",
                    'try model.dtype = "float32", or lower spread',
                )
            if scored["records"]:
                state = self.method.tell(state, round_, candidates, scored["costs"])
        finalists = self.method.finalists(state)
        last = self.scored(self.config.rounds, finalists)
        if not last["records"]:
            raise FedgroveError(f"stage {self.plan.stage}: no record's loss was finite", 'try model.dtype = "float32"')
        best = min(range(len(finalists)), key=last["costs"].__getitem__)  # of equal ones the first: the start
        prompt = prompts_of(finalists[best : best + 1], self.subspace, self.seed, self.decoder)[0]
        folder = self.run_folder.path / "prompt"
        about = write_prompt(folder, self.config, self.decoder, prompt, finalists[best], self.job)
        if self.config.votes:
            about["words_of_one"] = self.words_of_one(state, best)
        for name, records in held_out.items():
            self.measure(name, records, prompt)
        self.run_folder.write_json(
            "prompt.json",
            {
                "stage": self.plan.stage,
                **self.config.model_dump(mode="json", exclude={"words"}),
                **about,
                "finalists": last["costs"],
                "best": best,
                "texts": {name: {"records": len(records)} for name, records in held_out.items()},
            },
        )
        return folder

    def scored(self, round_: int, candidates: Tensor, calls: int = 0) -> dict[str, Any]:
        """The costs of candidates, pooled over the clients, with what else a round is known by.

        Args:
            calls: scores that clients computed for the round before.
        """
        file = self.folder / f"scores-{round_}.json"
        if not file.is_file():
            write_atomically(file, json.dumps(self.ask(round_, candidates)))
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        counted = {name: found[name] for name in ("records", "skipped", "calls")}
        counted["calls"] += calls
        if found["records"]:
            found["costs"] = costs(torch.tensor(found["scores"]), found["weight"], self.config.score)
            counted |= {"best": min(found["costs"]), "mean": sum(found["costs"]) / len(found["costs"])}
        self.log(round_, None, counted)
        if found["records"] and len(set(found["scores"])) == 1 < len(torch.unique(candidates, dim=0)):
            hint = "; does an answer begin with a label, is one among its likely tokens (endpoint.top)?"
            at_endpoint = any(of.endpoint for of in self.plan.clients.values())
            self.run_folder.message(f"round {round_}: all candidates score alike{hint if at_endpoint else ''}")
        if found["skipped"]:
            self.run_folder.message(f"round {round_}: the loss of {found['skipped']} records was not finite; they were skipped")
        return found

    def ask(self, round_: int, candidates: Tensor) -> dict[str, Any]:
        """The sums of all clients' scores of candidates."""
        self.phase(round_, "scoring prompts")
        request = ScorePrompts(**self._common(round_), candidates=len(candidates))
        messages = {client: Message(request, {CANDIDATES: candidates}) for client in self.plan.clients}
        sums = IntegerSums(
            lambda total, replies: request.check_sums({CHANGE + name: one for name, one in total.items()}, len(replies))
        )
        self.federation.aggregator.aggregate(messages, sums, layout=self.decoder)
        total = {name: sums.sums[name.removeprefix(CHANGE)].tolist() for name in (SCORES, COUNTS)}
        return {"scores": total[SCORES], **dict(zip(("weight", "records", "skipped", "calls"), total[COUNTS], strict=True))}

    def merged(self, round_: int, state: Any) -> tuple[Any, int]:
        """The state with the clients' votes of a round, and how many scores they computed for these."""
        file = self.folder / f"votes-{round_}.safetensors"
        method = self.config.voting_searcher
        shared = method.share(state)
        if not file.is_file():
            save_tensors(self.ask_for_votes(round_, shared), file)
        stored = load_file(file)
        if self.embeddings is None:
            self.embeddings = embeddings_of(as_words(shared[WORDS]), self.decoder)
        return method.merge(state, stored[VOTES], stored[PLACES], self.embeddings), int(stored[CALLS])

    def ask_for_votes(self, round_: int, shared: Tensors) -> Tensors:
        """The sums of all clients' votes."""
        self.phase(round_, "editing")
        keys = ("population", "generations")
        request = VoteForWords(
            **self._common(round_),
            **{key: getattr(self.config, key) for key in keys},
            tokens=self.task.tokens,
            words=len(shared[WORDS]),
        )
        messages = {client: Message(request, shared) for client in self.plan.clients}
        sums = IntegerSums(
            lambda total, replies: request.check_sums({CHANGE + name: one for name, one in total.items()}, len(replies))
        )
        self.federation.aggregator.aggregate(messages, sums, layout=self.decoder)
        return {CHANGE + name: total.long() for name, total in sums.sums.items()}

    def words_of_one(self, state: Any, finalist: int) -> list[str]:
        """The words of a finalist for which never more than one client voted."""
        tokenizer = self.decoder.checkpoint.tokenizer()
        words = [tokenizer.decode(list(word)) for word in self.config.voting_searcher.words_of_one(state, finalist)]
        if words:
            self.run_folder.message(f"prompt: only one client voted for {', '.join(map(repr, words))}")
        return words

    def found(self, round_: int, state: Any) -> list[Found]:
        """What each client came to alone, in the order of their names."""
        file = self.folder / f"found-{round_}.safetensors"
        if not file.is_file():
            tensors, replies = self.ask_alone(round_, state)
            save_tensors(tensors, file, {"replies": json.dumps(replies)})
        with safe_open(file, framework="pt") as opened:
            stored = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            replies = json.loads(opened.metadata()["replies"])
        of_all = {name: sum(reply[name] for reply in replies.values()) for name in ("records", "skipped", "calls")}
        every = [reply["cost"] for reply in replies.values()]
        self.log(round_, None, of_all | {"best": min(every), "mean": sum(every) / len(every)})
        for client, reply in replies.items():
            self.log(round_, client, {"cost": reply["cost"]})
        parts = {
            client: {name.removeprefix(f"{client}/"): one for name, one in stored.items() if name.startswith(f"{client}/")}
            for client in replies
        }
        return [Found(parts[client], reply["weight"], reply["cost"]) for client, reply in sorted(replies.items())]

    def ask_alone(self, round_: int, state: Any) -> tuple[Tensors, dict[str, Any]]:
        """What clients came to, by ``client/name``, and their replies."""
        config = self.config
        self.phase(round_, "searching alone")
        keys = ("population", "generations", "learning_rate", "against_overfitting")
        request = SearchAlone(
            **self._common(round_),
            **{key: getattr(config, key) for key in keys},
            tokens=self.task.tokens,
            words=len(self.task.words),
        )
        shared = config.local_searcher.share(state)
        tensors: Tensors = {}
        replies = {}
        messages = {client: Message(request, shared) for client in self.plan.clients}
        for client, found, reply in self.federation.collect(messages, layout=self.decoder):
            tensors |= {f"{client}/{name.removeprefix(CHANGE)}": one for name, one in found.items()}
            replies[client] = reply.model_dump()
        return tensors, replies

    def phase(self, round_: int, what: str) -> None:
        """Reports that a round begins."""
        rounds = self.config.number_of_rounds()
        self.run_folder.phase(Phase("prompt", what, stage=self.plan.stage, round=round_, rounds=rounds))

    def log(self, round_: int | None, client: str | None, values: Mapping[str, float]) -> None:
        """Logs numbers, in their order, that are not logged yet."""
        for name, value in values.items():
            if (round_, client, name) not in self.logged:
                self.run_folder.log(self.plan.stage, round_, client, name, value)

    def _common(self, round_: int) -> dict[str, Any]:
        return {
            "stage": self.plan.stage, "round": round_, **{key: getattr(self.config, key) for key in AS_IN_THE_JOB},
            "records": self.config.records_in(round_), "seed": self.seed, "subspace": self.subspace,
        }  # fmt: skip

    def held_out(self) -> dict[str, Records]:
        """The records of the held-out texts that prompts are measured on."""
        config, most, tokenizer = self.config, self.job.evaluate.records, self.decoder.checkpoint.tokenizer()
        return {
            text.name: read_records([text.path], prompt, answer, config.labels, tokenizer, config.length, most)
            for text, prompt, answer in labeled(self.job.evaluate, MEASURE)
        }

    @cached_property
    def measured_with(self) -> Decoder:
        """The model in the dtype in which held-out records are measured."""
        dtype = dtype_of(self.job.evaluate.compute_dtype, self.federation.device)
        return Decoder(self.decoder.checkpoint, self.federation.device, dtype) if dtype else self.decoder

    def measure(self, text: str, records: Records, prompt: Prompt) -> None:
        """Logs how good no prompt, the start and the prompt that was found are on a held-out text, unless they are logged."""
        if (None, None, f"{FOUND}/{text}") in self.logged:
            return
        prompts = {NONE: Prompt(prompt.embeddings[:0], written=True)}
        if self.task.start:
            prompts[START] = Prompt(embed(self.decoder, torch.tensor(self.task.start)), written=True)
        prompts[FOUND] = prompt
        on_progress = self.run_folder.phase(Phase("evaluate", "the prompt", stage=self.plan.stage, text=text))
        scores = score(self.measured_with, records, list(prompts.values()), self.config.place, on_progress)
        values = right(scores, records) if self.config.labels else losses(scores, records).nan_to_num(MOST_LOSS, MOST_LOSS)
        for place, name in enumerate(prompts):
            measured = mean(values[:, place].double().tolist())
            self.run_folder.keep(self.plan.stage, None, f"{name}/{text}", measured.parts)
            numbers = measured.plain(name)
            ends_last = sorted(numbers, key=lambda key: key == name)  # the measurement: it marks all as done
            self.log(None, None, {f"{key}/{text}": numbers[key] for key in ends_last})
