"""The stage ``head``: clients sum moments of their labeled records, and the server solves a classification head."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
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
from fedgrove.job.tables import Job
from fedgrove.models.blocks import Decoder
from fedgrove.models.features import Features, pooled_states, projection, typical
from fedgrove.models.stream import Checkpoint
from fedgrove.models.tensor_files import save_tensors
from fedgrove.rounds.aggregator.integers import IntegerSums
from fedgrove.rounds.aggregator.moments import MOST_RECORDS, Moments, check
from fedgrove.rounds.capabilities import Capabilities
from fedgrove.rounds.federation import Federation
from fedgrove.rounds.request import Message, Reply, Tensors
from fedgrove.stages.base import Losses, Result
from fedgrove.stages.head.config import Config
from fedgrove.stages.head.exchanges.guesses import SumGuesses
from fedgrove.stages.head.exchanges.moments import SumMoments
from fedgrove.stages.head.exchanges.personal import FREQUENCIES, Compared, CompareHeads
from fedgrove.stages.head.files import write_head
from fedgrove.stages.head.heads import Linear
from fedgrove.stages.head.plan import Plan, make_plan
from fedgrove.stages.head.records import read_labeled
from fedgrove.stages.head.requests import BIAS, CENTER, OF_JOB, SCALE, WEIGHT
from fedgrove.stages.head.solving import TooFew, solve

MEASURE = "head"  # of held-out texts, and of their metrics: head/<text>
LABELED = "labeled"  # of the same for the head without guesses: labeled/<text>
Answers = dict[str, tuple[Tensor, Tensor]]  # by text, hidden states (records, hidden states) and labels (records,)


def plan(index: int, config: Config, decoder: Decoder, capabilities: Mapping[str, Capabilities], job: Job) -> Plan:
    """See :func:`fedgrove.stages.head.plan.make_plan`."""
    return make_plan(index, config, decoder, capabilities)


def run(model: Checkpoint, plan: Plan, config: Config, federation: Federation) -> Result:
    """Makes a head from one request to each client, and measures it on the held-out texts whose ``measure`` is "head".

    The sums are a file in the run folder, so an interrupted stage continues from it.

    Returns:
        The model as it was, and the head in ``RUN/head``. ``RUN/head.json`` says what it was made from.
    """
    return Result(model, {"head": _Stage(model, plan, config, federation).run()})


def alone(
    model: Checkpoint,
    plan: Plan,
    config: Config,
    clients: Sequence[str],
    windows: Mapping[str, list[Tensor]],
    federation: Federation,
) -> Iterator[tuple[str, Losses]]:
    """Measures nothing: the stage changes no model. The heads that clients would have alone are measured with the head."""
    return iter(())


def typical_memory(decoder: Decoder, length: int) -> dict[str, float]:
    """With ridge regression on the last layer."""
    config = Config(kind="head", labels=("a", "b"), length=length)
    try:
        return {"make a head": float(make_plan(0, config, decoder, {"one": Capabilities()}).clients["one"].memory)}
    except FedgroveError:
        return {}


class _Stage:
    """A running stage."""

    def __init__(self, model: Checkpoint, plan: Plan, config: Config, federation: Federation):
        self.plan, self.config, self.federation = plan, config, federation
        self.run_folder, self.job = federation.run, federation.job
        self.decoder = Decoder(model, federation.device)
        self.seed = f"{self.job.seed}/{plan.stage}"
        self.file = self.run_folder.path / "work" / f"stage-{plan.stage}" / "moments.safetensors"

    def run(self) -> Path:
        """Runs the stage; returns the folder of the head."""
        for client, why in sorted(self.plan.left_out.items()):
            self.run_folder.message(f"head: client '{client}' is left out: {why}")
        held_out = self.held_out()  # before the sums, to find errors in texts early
        if not self.file.is_file():
            self.collect()
        with safe_open(self.file, framework="pt") as opened:
            stored = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            clients = json.loads(opened.metadata()["clients"])
        config, folder = self.config, self.run_folder.path / "head"
        matrix = projection(self.plan.states, config.size, self.seed)
        features = Features(config.layers, config.pool, stored[CENTER], stored[SCALE], matrix)
        unlabeled = [client for client in self.plan.unlabeled if client in clients]
        labeled = _moments(stored, "sums/")
        known = self.guess(stored, labeled, unlabeled, features) if unlabeled else labeled
        shared, classes = self.solve(known, features)
        frequencies = known.frequencies()[classes]
        write_head(folder, config, shared, self._labels(classes), frequencies, self.job.model.name, f"{self.job.name}: head")
        answers = self.answers(held_out)
        for name in answers:
            self.measure(name, answers, None, shared, classes)
        if unlabeled:
            without = self.solve(labeled, features)
            for name in answers:
                self.measure(name, answers, None, *without, LABELED)
        for client in clients if self.job.evaluate.alone else ():
            own = _moments(stored, f"of/{client}/")
            if not own.records:
                continue
            linear, own_classes = self.solve_alone(own, features)
            for name in answers:
                self.measure(name, answers, client, linear, own_classes)
        if config.personal:
            self.compare([one for one in clients if one not in unlabeled], stored, shared, classes, frequencies)
        counts = {label: int(count) for label, count in zip(config.labels, labeled.counts, strict=True)}
        guessed = (known.counts - labeled.counts).tolist()
        self.run_folder.write_json(
            "head.json",
            {
                "stage": self.plan.stage,
                **config.model_dump(mode="json"),
                "clients": clients,
                "unlabeled": unlabeled,
                "records": labeled.records,
                "counts": counts,
                "guessed": dict(zip(config.labels, guessed, strict=True)),
                "features": self.plan.features,
                "texts": {name: len(truth) for name, (_, truth) in answers.items()},
            },
        )
        return folder

    def collect(self) -> None:
        """Asks every client for its sums, and stores them with what they are of. Too few records are an error before that."""
        config, run = self.config, self.run_folder
        run.phase(Phase("head", "what features of records are like", stage=self.plan.stage))
        center, scale = typical(self.decoder, config.layers, config.length, self.seed)
        tensors = {CENTER: center, SCALE: scale}
        run.phase(Phase("head", "summing over labeled records", stage=self.plan.stage))
        messages = {client: Message(SumMoments(**self._common()), tensors) for client in self.plan.clients}
        sums = IntegerSums(_check, keep_parts=self.job.evaluate.alone)
        replies = self.federation.aggregator.aggregate(messages, sums, layout=self.decoder)
        solve(Moments.of(sums.sums), config.head, config.ridge, config.labels)
        stored = tensors | {f"sums/{name}": value for name, value in sums.sums.items()}
        for client, parts in sums.parts.items():
            stored |= {f"of/{client}/{name}": value for name, value in parts.items()}
        save_tensors(stored, self.file, {"clients": json.dumps(sorted(replies))})

    def guess(self, stored: Tensors, labeled: Moments, unlabeled: Sequence[str], features: Features) -> Moments:
        """The sums of labels and of the last exchange's guesses. Each exchange is a file, like the sums of labels."""
        known, stage = labeled, self.plan.stage
        for exchange in range(1, self.config.guesses + 1):
            file = self.file.with_name(f"guesses-{exchange}.safetensors")
            if not file.is_file():
                self.run_folder.phase(
                    Phase("head", "guessing labels", stage=stage, round=exchange - 1, rounds=self.config.guesses)
                )
                head, classes = self.solve(known, features)
                tensors = {CENTER: stored[CENTER], SCALE: stored[SCALE]}
                tensors |= {WEIGHT: head.weight.float(), BIAS: head.bias.float()}
                request = SumGuesses(**self._common(), exchange=exchange, classes=self._labels(classes))
                sums = IntegerSums(_check)
                messages = {client: Message(request, tensors) for client in unlabeled}
                self.federation.aggregator.aggregate(messages, sums, layout=self.decoder)
                save_tensors(sums.sums, file)
            known = labeled.plus(Moments.of(load_file(file)))
        return known

    def _labels(self, classes: Tensor) -> tuple[str, ...]:
        return tuple(self.config.labels[i] for i in classes.tolist())

    def solve(self, moments: Moments, features: Features) -> tuple[Linear, Tensor]:
        """The head of hidden states, rounded to float32, and its classes."""
        linear, classes = solve(moments, self.config.head, self.config.ridge, self.config.labels)
        weight, bias = features.unfold(linear.weight, linear.bias)
        return Linear(weight.double(), bias.double()), classes

    def solve_alone(self, moments: Moments, features: Features) -> tuple[Linear, Tensor]:
        """The same for one client; with too few records for a head, it always says the most frequent label."""
        try:
            return self.solve(moments, features)
        except TooFew:
            return Linear(torch.zeros(1, self.plan.states).double(), torch.zeros(1).double()), moments.counts.argmax()[None]

    def held_out(self) -> dict[str, tuple[list[Tensor], Tensor]]:
        """The windows and labels of the held-out texts that the head is measured on."""
        config, most, tokenizer = self.config, self.job.evaluate.records, self.decoder.checkpoint.tokenizer()
        return {
            text.name: read_labeled([text.path], prompt, answer, config.labels, tokenizer, config.length, most)
            for text, prompt, answer in labeled(self.job.evaluate, MEASURE)
        }

    def answers(self, held_out: Mapping[str, tuple[list[Tensor], Tensor]]) -> Answers:
        """The hidden states and labels of the held-out texts."""
        found = {}
        for name, (windows, truth) in held_out.items():
            on_progress = self.run_folder.phase(Phase("evaluate", "the head", stage=self.plan.stage, text=name))
            found[name] = pooled_states(self.decoder, windows, self.config.layers, self.config.pool, on_progress), truth
        return found

    def measure(
        self, text: str, answers: Answers, client: str | None, linear: Linear, classes: Tensor, named: str = MEASURE
    ) -> None:
        """Logs a head's accuracy on a text, unless it is logged already."""
        run, stage, name = self.run_folder, self.plan.stage, f"{named}/{text}"
        if any((line["stage"], line["client"], line["name"]) == (stage, client, name) for line in run.metrics()):
            return
        states, truth = answers[text]
        found = classes[(states.double() @ linear.weight.T + linear.bias).argmax(1)]
        measured = mean((found == truth).double().tolist())
        run.keep(stage, client, name, measured.parts)
        numbers = measured.plain(named)
        for key in sorted(numbers, key=lambda key: key == named):  # the measurement last: it marks all as done
            if client is None or key == named:
                run.log(stage, None, client, f"{key}/{text}", numbers[key])

    def compare(self, clients: Sequence[str], stored: Tensors, shared: Linear, classes: Tensor, frequencies: Tensor) -> None:
        """Lets every client compare three heads on records that it held out, and logs how often each is right."""
        run, stage = self.run_folder, self.plan.stage
        done = {line["client"] for line in run.metrics() if (line["stage"], line["name"]) == (stage, "personal/shared")}
        tensors = {CENTER: stored[CENTER], SCALE: stored[SCALE], WEIGHT: shared.weight.float(), BIAS: shared.bias.float()}
        tensors[FREQUENCIES] = frequencies
        labels = self._labels(classes)
        messages = {}
        for client in clients:
            if client not in done:
                request = CompareHeads(
                    **self._common(),
                    classes=labels,
                    ridge=self.config.ridge,
                    base=self.job.model.name,
                    title=f"{self.job.name}: {client}'s own head",
                )
                messages[client] = Message(request, tensors)
        if not messages:
            return
        run.phase(Phase("head", "comparing heads on the clients' own records", stage=stage))
        for client, _, reply in self.federation.collect(messages):
            assert isinstance(reply, Compared)
            if not reply.records:
                run.message(f"head: client '{client}' has too few records to hold any out")
                continue
            run.log(stage, None, client, "personal/records", reply.records)
            if reply.own is not None:
                run.log(stage, None, client, "personal/own", reply.own / reply.records)
            run.log(stage, None, client, "personal/personal", reply.personal / reply.records)
            run.log(stage, None, client, "personal/shared", reply.shared / reply.records)  # last: it marks the client as done

    def _common(self) -> dict[str, Any]:
        config = self.config
        fields = {key: getattr(config, key) for key in OF_JOB}
        return {"stage": self.plan.stage, **fields, "seed": self.seed, "limit": MOST_RECORDS // len(self.plan.clients)}


def _moments(stored: Mapping[str, Tensor], prefix: str) -> Moments:
    return Moments.of({name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)})


def _check(sums: Tensors, replies: Mapping[str, Reply]) -> None:
    check(Moments.of(sums), MOST_RECORDS)
