"""The plan of a prompt stage: how many scores each client computes, and what they cost it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from fedgrove.errors import FedgroveError
from fedgrove.models.blocks import Decoder
from fedgrove.models.continuations import ROWS
from fedgrove.models.cost import count_parameters
from fedgrove.models.labels import label_ids
from fedgrove.models.positions import positions
from fedgrove.models.walk import CHUNK
from fedgrove.quantities import mebibytes
from fedgrove.rounds.capabilities import SPEED, Capabilities
from fedgrove.rounds.disclosure import Disclosure
from fedgrove.stages import base
from fedgrove.stages.prompt.config import FINALISTS, Config, unfit
from fedgrove.stages.prompt.exchanges.local import SearchAlone
from fedgrove.stages.prompt.exchanges.score import ScorePrompts
from fedgrove.stages.prompt.exchanges.votes import VoteForWords
from fedgrove.stages.prompt.methods import Task
from fedgrove.stages.prompt.scorers import requests_of
from fedgrove.stages.prompt.scoring import TOGETHER
from fedgrove.stages.prompt.searching import task_of

_AT_ENDPOINT = 2**24  # bytes of a client whose model an endpoint runs, about
ENVELOPE = 900  # bytes of a response besides its numbers, about


class Assignment(base.Assignment):
    """One client's part.

    Attributes:
        forwards: how many times it scores a prompt on a record, in all rounds; with an endpoint, how many requests it sends to
            it at most.
        download: bytes received in all rounds.
        endpoint: whether a completions server runs its model, and so sees its text.
    """

    forwards: int
    download: int
    endpoint: bool = False


class Plan(base.Plan):
    """The plan of a stage that looks for a prompt.

    Attributes:
        method, aggregation: names.
        prompt_tokens: of the prompt.
        rounds, population, records: as in the job.
        passed: tokens that pass through the model for a record in a round.
    """

    kind: Literal["prompt"] = "prompt"
    clients: dict[str, Assignment]
    method: str
    aggregation: str
    prompt_tokens: int
    rounds: int
    population: int
    records: int
    passed: int


def make_plan(index: int, config: Config, decoder: Decoder, capabilities: Mapping[str, Capabilities], seed: str) -> Plan:
    """Plans the stage, for clients that have as many records as the job draws.

    Args:
        index: the stage's place in the job.
        decoder: the model.
        capabilities: the clients' capabilities, by name.
        seed: of the stage.

    Raises:
        FedgroveError: the prompt does not fit, labels begin alike, a library is missing, or a client has too little memory;
            names the key or the client.
    """
    tokenizer = decoder.checkpoint.tokenizer()
    task = task_of(config, index, tokenizer, seed)
    tokens = task.tokens * max(map(len, task.words), default=1)
    limit, _ = positions(decoder.model, decoder.checkpoint.config)
    if limit is not None and config.length + tokens > limit:
        raise FedgroveError(
            f"stages.{index}.tokens: a prompt of {tokens} tokens and records of {config.length} (length) are more than the "
            f"{limit} that the model was made for",
            "lower one of them",
        )
    try:
        labels = label_ids(config.labels, tokenizer)
    except FedgroveError as error:
        raise FedgroveError(f"stages.{index}.labels: {error.what}", error.remedy) from error
    answers = len(labels) * (max(map(len, labels)) - 1) if labels else config.length // 4
    each = tokens + answers + (config.length if config.place == "front" else 0)
    twice = 2 if config.against_overfitting else 1
    scores = twice * config.scores_in_a_round()
    times = twice * (config.generations + 1) if config.searches_alone else 1  # that a text passes before its prompts
    times += config.generations + 1 if config.votes else 0
    passed = scores * each + (times * config.length if config.place == "end" else 0)
    scored = config.rounds * scores * config.records + FINALISTS * config.records_in(config.rounds)
    parameters = count_parameters(decoder)
    memory = _memory(config, decoder, parameters, min(max(CHUNK, passed), config.records * passed))
    operations = 2 * (config.rounds + 1) * config.records * passed * parameters
    upload, download = _traffic(config, task)
    assignments = {}
    for name, client in sorted(capabilities.items()):
        sending = 8 * upload / client.uplink if client.uplink else 0.0
        if client.endpoint is not None:
            fault = unfit(client.endpoint, config.searcher.SOFT, config.score, config.labels)
            if fault:
                raise FedgroveError(*fault, client=name)
            assignments[name] = Assignment(
                memory=_AT_ENDPOINT,
                upload=upload,
                seconds=round(sending, 1),
                forwards=scored * requests_of(client.endpoint, labels),
                download=download,
                endpoint=True,
            )
            continue
        if client.memory is not None and memory > client.memory:
            raise FedgroveError(
                f"scoring prompts needs {mebibytes(memory)} of memory, but the client has {mebibytes(client.memory)} "
                "(clients.memory)",
                "lower population or length, or leave the client out",
                client=name,
            )
        seconds = round(operations / (SPEED * client.speed) + sending, 1)
        assignments[name] = Assignment(memory=memory, upload=upload, seconds=seconds, forwards=scored, download=download)
    return Plan(
        stage=index,
        clients=assignments,
        method=config.method,
        aggregation=config.aggregation,
        prompt_tokens=task.tokens,
        rounds=config.rounds,
        population=config.population,
        records=config.records,
        passed=passed,
        notes=_notes(assignments),
        discloses=base.names_of(_discloses(config)),
    )


def _notes(assignments: Mapping[str, Assignment]) -> tuple[str, ...]:
    elsewhere = [name for name, of in assignments.items() if of.endpoint]
    if not elsewhere:
        return ()
    return (
        f"An endpoint runs the model of {', '.join(elsewhere)} and is sent the text of the records that are drawn: whoever "
        "runs it sees that text. Its time is not in the plan.",
    )


def _discloses(config: Config) -> frozenset[Disclosure]:
    """What all requests of a stage disclose."""
    found = ScorePrompts.DISCLOSES
    if config.searches_alone:
        found |= SearchAlone.DISCLOSES
    if config.votes:
        found |= VoteForWords.DISCLOSES
    return found


def _memory(stage: Config, decoder: Decoder, parameters: int, tokens: int) -> int:
    """Bytes: the ends and a block, the hidden states of tokens before and after it, a group's activations, and logits."""
    config = decoder.checkpoint.config.get_text_config()
    of_block = sum(parameter.numel() for parameter in decoder.blocks[0].parameters())
    ends = parameters - of_block * len(decoder)
    widest = max(decoder.read_shape(decoder.linear_name(0, name))[0] for name in decoder.block_names(0))
    activations = 2 * tokens * config.hidden_size + 4 * TOGETHER * widest + 3 * ROWS * config.vocab_size
    width = 2 if stage.compute_dtype == "bfloat16" else 4
    return int(width * (ends + of_block + activations) + 2**24)


def _traffic(config: Config, task: Task) -> tuple[int, int]:
    """Bytes that a client sends and receives in all rounds."""
    state = config.searcher.begin(task)
    candidates = config.searcher.propose(state, 0)
    up, down = 8 * (len(candidates) + 3), candidates.numel() * candidates.element_size()
    if config.searches_alone:
        specs = config.local_searcher.specs(task, config.generations).values()
        up = sum(shape.numel() * dtype.itemsize for shape, dtype in specs)
        down = sum(tensor.numel() * tensor.element_size() for tensor in config.local_searcher.share(state).values())
    if config.votes:
        shared = config.voting_searcher.share(state).values()
        up = ENVELOPE + 8 * (task.tokens + 2 + 3) + 8 * len(task.words) + 8
        down += ENVELOPE + (task.tokens + 1) * down + sum(tensor.numel() * tensor.element_size() for tensor in shared)
    return config.number_of_rounds() * (ENVELOPE + up), config.number_of_rounds() * (ENVELOPE + down)
