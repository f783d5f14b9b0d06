"""Who scores candidate prompts at a client: its own copy of the model, or a completions server in its place.

An endpoint is sent token ids where it returns log-probabilities, so that it reads exactly what the client's own model would; a
score is then the same but for the rounding of another machine. One that returns text is sent text, and its answer counts as the
label that it begins with. Every score is kept on the client's disk, so that no record is sent twice with the same prompt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fedgrove.client.completions import Completions, TopToken
from fedgrove.client.local_client import LocalClient
from fedgrove.data.tokens import encode
from fedgrove.job.endpoint import Endpoint, LogProbs
from fedgrove.models.blocks import Decoder
from fedgrove.stages.prompt.candidates import as_words
from fedgrove.stages.prompt.config import Place
from fedgrove.stages.prompt.records import Records
from fedgrove.stages.prompt.scoring import Prompt, score

CACHE = "endpoint-scores.jsonl"  # in the client's folder
MORE = 4  # tokens that an endpoint may write beyond the longest label, such as a line break before it
BEHIND = 1e-9  # by how much a right label that an endpoint does not name is behind the last one that it names


class Scorer(Protocol):
    """Scores of prompts.

    Attributes:
        calls: how many scores it has computed; at an endpoint, how many requests that took.
    """

    @property
    def calls(self) -> int: ...

    def __call__(self, candidates: Tensor, records: Records) -> list[Tensor]:
        """As :func:`~fedgrove.stages.prompt.scoring.score`.

        Args:
            candidates: checked ones.
        """
        ...


class OwnModel:
    """The client's own model.

    Args:
        prompts: makes prompts of candidates.
    """

    def __init__(self, decoder: Decoder, place: Place, prompts: Callable[[Tensor], list[Prompt]]):
        self._decoder, self._place, self._prompts = decoder, place, prompts
        self.calls = 0

    def __call__(self, candidates: Tensor, records: Records) -> list[Tensor]:
        self.calls += len(candidates) * len(records)
        return score(self._decoder, records, self._prompts(candidates), self._place)


class AtEndpoint:
    """A completions server.

    Its scores are (prompts, labels + 1) where it returns text only: 0 for the label that it writes and −1 for others; the last
    column is that of no label.

    Args:
        client: has an endpoint.
        tokenizer: of the client's copy of the model.
        labels: all possible answers; empty: each record has its own.
        request: a name of the request that is responded to. If it comes again, ``calls`` is what it was.
    """

    def __init__(
        self, client: LocalClient, tokenizer: PreTrainedTokenizerBase, place: Place, labels: Sequence[str], request: str
    ):
        assert client.endpoint is not None
        self._endpoint: Endpoint = client.endpoint
        self._server = Completions(client.endpoint, client.name, "start it and continue with --resume")
        self._tokenizer, self._place, self._labels, self._request = tokenizer, place, labels, request
        self._file = client.folder / CACHE
        self._used: set[str] = set()
        self._pieces: dict[int, str] = {}

    @property
    def calls(self) -> int:
        """How many requests were sent for this request."""
        return sum(number for _, number, asked_by in map(self._known.__getitem__, self._used) if asked_by == self._request)

    def __call__(self, candidates: Tensor, records: Records) -> list[Tensor]:
        prompts = as_words(candidates)
        keys = [[self._key(records, i, prompt) for prompt in prompts] for i in range(len(records))]
        tasks = {
            key: partial(self._scores, records, i, prompt)
            for i, of_record in enumerate(keys)
            for key, prompt in zip(of_record, prompts, strict=True)
            if key not in self._known
        }
        new = list(tasks)
        if tasks:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as file:
                for place, (scores, calls) in self._server.each(list(tasks.values())):
                    self._known[new[place]] = (scores, calls, self._request)
                    file.write(json.dumps([new[place], scores, calls, self._request]) + "\n")
                    file.flush()
        self._used.update(key for of_record in keys for key in of_record)
        return [torch.tensor([self._known[key][0] for key in of_record], dtype=torch.float64) for of_record in keys]

    @cached_property
    def _known(self) -> dict[str, tuple[list[float], int, str]]:
        """By key: scores, how many requests they took, and for which request."""
        return {key: (scores, calls, asked_by) for key, scores, calls, asked_by in _whole_lines(self._file)}

    def _key(self, records: Records, record: int, prompt: tuple[int, ...]) -> str:
        at = self._endpoint
        settings = [at.url, at.model, at.logprobs, at.top, list(self._labels)]
        asked = [settings, self._before(records, record, prompt), records.options(record), records.answers[record]]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()

    def _before(self, records: Records, record: int, prompt: tuple[int, ...]) -> list[int]:
        """What comes before the answer."""
        text = records.texts[record]
        return [*records.prefix, *((*text, *prompt) if self._place == "end" else (*prompt, *text))]

    def _scores(self, records: Records, record: int, prompt: tuple[int, ...]) -> tuple[list[float], int]:
        """The scores of one record's options under a prompt, and how many requests they took."""
        before, options = self._before(records, record, prompt), records.options(record)
        if self._endpoint.logprobs == "echo":
            return [self._of_prompt(before, option) for option in options], len(options)
        if self._endpoint.logprobs == "next":
            return self._of_next(before, options, records.answers[record][0])
        text = self._tokenizer.decode(before[len(records.prefix) :])  # a server puts the prefix there by itself
        written = self._server.text_after(text, max(map(len, options)) + MORE)
        found = label_in(written, self._labels)
        return [0.0 if place == found else -1.0 for place in range(len(options))] + [0.0 if found is None else -1.0], 1

    def _of_prompt(self, before: list[int], option: tuple[int, ...]) -> float:
        told = self._server.of_prompt([*before, *option])[len(before) :]
        total = 0.0
        for token, (text, number) in zip(option, told, strict=True):
            self._check(token, text)
            if number is None:
                raise self._server.error(
                    "logprobs", "returns no log-probabilities of an answer's tokens", 'set endpoint.logprobs = "next" or "none"'
                )
            total += number
        return total

    def _of_next(self, before: list[int], options: tuple[tuple[int, ...], ...], answer: int) -> tuple[list[float], int]:
        beginnings = sorted({option[:end] for option in options for end in range(len(option))})
        after = {beginning: self._server.of_next([*before, *beginning]) for beginning in beginnings}
        totals = []
        for place, option in enumerate(options):
            total = 0.0
            for end, token in enumerate(option):
                number = self._find(token, after[option[:end]])
                last = min(top.logprob for top in after[option[:end]])
                total += number if number is not None else last - (BEHIND if place == answer else 0.0)
            totals.append(total)
        return totals, len(beginnings)

    def _find(self, token: int, among: Sequence[TopToken]) -> float | None:
        """The log-probability of a token; None: it is not there."""
        found = next((top for top in among if top.id == token or (top.id is None and top.text == self._piece(token))), None)
        for top in (among[0], found):
            if top is not None and top.id is not None:
                self._check(top.id, top.text)
        return None if found is None else found.logprob

    def _check(self, token: int, told: str) -> None:
        """Refuses an endpoint for which an id is another token. Tokens that are no word are not compared: servers differ."""
        name, _, number = told.partition("token_id:")
        plain = number if number and not name else told.replace("▁", " ").replace("Ġ", " ").strip()
        ours = str(token) if number and not name else self._piece(token).strip()
        if plain.isascii() and plain.isalnum() and plain != ours:
            raise self._server.error(
                "model", "runs another model: its tokens are not those of this client's copy",
                'let it run the job\'s model, or set endpoint.logprobs = "none"',
            )  # fmt: skip

    def _piece(self, token: int) -> str:
        """A token's text within a text: decoded alone, some tokenizers take the space before it away."""
        if token not in self._pieces:
            first = encode("a", self._tokenizer)
            known = token < len(self._tokenizer)
            whole = self._tokenizer.decode([*first, token]) if known else ""
            self._pieces[token] = whole[len(self._tokenizer.decode(first)) :]
        return self._pieces[token]


def requests_of(logprobs: LogProbs, labels: Sequence[Sequence[int]]) -> int:
    """How many requests to an endpoint one score takes.

    Args:
        labels: token ids of each; none: every record has its own answer.
    """
    if logprobs == "next":
        return len({tuple(label[:end]) for label in labels for end in range(len(label))})
    return max(1, len(labels)) if logprobs == "echo" else 1


def label_in(written: str, labels: Sequence[str]) -> int | None:
    """The index of the label that a text begins with; of several the longest; None: it begins with none.

    Upper and lower case count as the same, and white space around a label is ignored. A label ends where its word does.
    """
    begun = written.strip().casefold()
    found = None
    for place, label in enumerate(labels):
        word = label.strip().casefold()
        after = begun[len(word) : len(word) + 1]
        if word and begun.startswith(word) and not (word[-1].isalnum() and after.isalnum()):
            found = place if found is None or len(word) > len(labels[found].strip().casefold()) else found
    return found


def _whole_lines(file: Path) -> list[Any]:
    """The lines of a file of this module. A last one that is incomplete, of a process that was killed, is removed."""
    if not file.is_file():
        return []
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        with file.open("rb+") as opened:
            opened.truncate(len(whole))
    return [json.loads(line) for line in whole.splitlines()]
