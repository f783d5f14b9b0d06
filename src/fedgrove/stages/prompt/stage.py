"""The stage ``prompt``: the server names candidate prompts, the clients score them, and the sums say where to look next."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedgrove.errors import FedgroveError
from fedgrove.evaluation.metrics import mean
from fedgrove.events import Phase
from fedgrove.job.tables import Job, Text
from fedgrove.models.blocks import Decoder
from fedgrove.models.continuations import embed
from fedgrove.models.stream import Checkpoint
from fedgrove.rounds.aggregator.integers import IntegerSums
from fedgrove.rounds.capabilities import Capabilities
from fedgrove.rounds.federation import Federation
from fedgrove.rounds.request import CHANGE, Message
from fedgrove.stages.base import Losses, Result, calibration_seed
from fedgrove.stages.prompt.config import Config
from fedgrove.stages.prompt.exchanges.score import COUNTS, SCORES, ScorePrompts
from fedgrove.stages.prompt.files import write_prompt
from fedgrove.stages.prompt.plan import Plan, make_plan
from fedgrove.stages.prompt.records import read_records
from fedgrove.stages.prompt.requests import CANDIDATES, prompts_of
from fedgrove.stages.prompt.scoring import Prompt, costs, losses, right, score
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
        self.folder = self.run_folder.path / "work" / f"stage-{plan.stage}"
        self.logged = {
            (line["round"], line["client"], line["name"]) for line in self.run_folder.metrics() if line["stage"] == plan.stage
        }

    def run(self) -> Path:
        """Runs the stage; returns the folder of the prompt."""
        for client, why in sorted(self.plan.left_out.items()):
            self.run_folder.message(f"prompt: client '{client}' is left out: {why}")
        state, failed = self.method.begin(self.task), 0
        for round_ in range(self.config.rounds):
            candidates = self.method.propose(state, round_)
            found = self.scored(round_, candidates)
            failed = 0 if found["records"] else failed + 1
            if failed == MOST_FAILED:
                raise FedgroveError(
                    f"stage {self.plan.stage}: in {MOST_FAILED} rounds in a row no record's loss was finite under any prompt",
                    'try model.dtype = "float32", or lower spread',
                )
            if found["records"]:
                state = self.method.tell(state, candidates, found["costs"])
        finalists = self.method.finalists(state)
        last = self.scored(self.config.rounds, finalists)
        if not last["records"]:
            raise FedgroveError(f"stage {self.plan.stage}: no record's loss was finite", 'try model.dtype = "float32"')
        best = min(range(len(finalists)), key=last["costs"].__getitem__)  # of equal ones the first: the start
        prompt = prompts_of(finalists[best : best + 1], self.subspace, self.seed, self.decoder)[0]
        folder = self.run_folder.path / "prompt"
        about = write_prompt(folder, self.config, self.decoder, prompt, finalists[best], self.job)
        texts = {text.name: self.measure(text, prompt) for text in self.job.evaluate.data if text.measure == MEASURE}
        self.run_folder.write_json(
            "prompt.json",
            {
                "stage": self.plan.stage,
                **self.config.model_dump(mode="json", exclude={"words"}),
                **about,
                "finalists": last["costs"],
                "best": best,
                "texts": texts,
            },
        )
        return folder

    def scored(self, round_: int, candidates: Tensor) -> dict[str, Any]:
        """The costs of candidates, pooled over the clients, with what else a round is known by. It is logged once."""
        file = self.folder / f"scores-{round_}.json"
        if not file.is_file():
            self.run_folder.write_json(str(file.relative_to(self.run_folder.path)), self.ask(round_, candidates))
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        counted = {name: found[name] for name in ("records", "skipped", "calls")}
        if found["records"]:
            found["costs"] = costs(torch.tensor(found["scores"]), found["records"], self.config.score)
            counted |= {"best": min(found["costs"]), "mean": sum(found["costs"]) / len(found["costs"])}
        for name, value in counted.items():
            if (round_, None, name) not in self.logged:
                self.run_folder.log(self.plan.stage, round_, None, name, value)
        if found["skipped"]:
            self.run_folder.message(f"round {round_}: no loss of {found['skipped']} records was finite; they were skipped")
        return found

    def ask(self, round_: int, candidates: Tensor) -> dict[str, Any]:
        """The sums of all clients' scores of candidates."""
        config, run = self.config, self.run_folder
        run.phase(Phase("prompt", "scoring prompts", stage=self.plan.stage, round=round_, rounds=config.number_of_rounds()))
        request = ScorePrompts(
            stage=self.plan.stage,
            round=round_,
            **{key: getattr(config, key) for key in ("method", "aggregation", "labels", "score", "place", "length")},
            records=config.records_in(round_),
            seed=self.seed,
            subspace=self.subspace,
            candidates=len(candidates),
        )
        messages = {client: Message(request, {CANDIDATES: candidates}) for client in self.plan.clients}
        sums = IntegerSums(
            lambda total, replies: request.check_sums({CHANGE + name: one for name, one in total.items()}, len(replies))
        )
        clients = sorted(self.federation.aggregator.aggregate(messages, sums, layout=self.decoder))
        total = {name: sums.sums[name.removeprefix(CHANGE)].tolist() for name in (SCORES, COUNTS)}
        records, skipped, calls = total[COUNTS]
        return {"clients": clients, "scores": total[SCORES], "records": records, "skipped": skipped, "calls": calls}

    def measure(self, text: Text, prompt: Prompt) -> dict[str, Any]:
        """Logs how good no prompt, the start and the prompt that was found are on a held-out text, unless they are logged."""
        config, run, stage = self.config, self.run_folder, self.plan.stage
        assert text.prompt is not None
        assert text.answer is not None
        tokenizer, most = self.decoder.checkpoint.tokenizer(), self.job.evaluate.records
        records = read_records([text.path], text.prompt, text.answer, config.labels, tokenizer, config.length, most)
        prompts = {NONE: Prompt(prompt.embeddings[:0], written=True)}
        if self.task.start:
            prompts[START] = Prompt(embed(self.decoder, torch.tensor(self.task.start)), written=True)
        prompts[FOUND] = prompt
        if (None, None, f"{FOUND}/{text.name}") not in self.logged:
            on_progress = run.phase(Phase("evaluate", "the prompt", stage=stage, text=text.name))
            scores = score(self.decoder, records, list(prompts.values()), config.place, on_progress)
            values = (right(scores, records) if config.labels else losses(scores, records)).double()
            for place, name in enumerate(prompts):
                measured = mean(values[:, place].tolist())
                run.keep(stage, None, f"{name}/{text.name}", measured.parts)
                numbers = measured.plain(name)
                for key in sorted(numbers, key=lambda key: key == name):  # the measurement last: it marks all as done
                    if (None, None, f"{key}/{text.name}") not in self.logged:
                        run.log(stage, None, None, f"{key}/{text.name}", numbers[key])
        return {"records": len(records)}
