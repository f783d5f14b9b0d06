"""A client whose model runs elsewhere: a real HTTP server around a small model, and every way in which it can fail."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fedgrove import doctor
from fedgrove.client import completions
from fedgrove.client.local_client import LocalClient
from fedgrove.deploy.flare.exchanges.join import JoinRun
from fedgrove.deploy.flare.files import SITE, SiteFile, read
from fedgrove.deploy.flare.installation import Installation
from fedgrove.engines import error_codes
from fedgrove.errors import FedgroveError
from fedgrove.job.endpoint import Endpoint
from fedgrove.job.load import load_federated
from fedgrove.models.blocks import Decoder
from fedgrove.models.continuations import embed
from fedgrove.models.digest import digests
from fedgrove.models.stream import Checkpoint
from fedgrove.rounds import wire
from fedgrove.stages.prompt.config import Place, Score
from fedgrove.stages.prompt.exchanges.local import SearchAlone, Searched
from fedgrove.stages.prompt.exchanges.score import COUNTS, ScorePrompts
from fedgrove.stages.prompt.methods import Task, categories
from fedgrove.stages.prompt.records import Records, read_records
from fedgrove.stages.prompt.requests import CANDIDATES
from fedgrove.stages.prompt.scorers import CACHE, AtEndpoint, label_in
from fedgrove.stages.prompt.scoring import Prompt, score
from small import CLIENTS, DEMO, TOKENIZER, Small, cli, complaint, measurements, write_once
from test_federation_site import make_site, send, sign

LABELS = (" bird", " fish", " tree")  # the second one has two tokens
ONE_TOKEN = (" bird", " yes", " tree")
CANARY = "zanzibar"  # a word of every record
KEY = "FEDGROVE_TEST_KEY"
WORDY: dict[str, Any] = {
    "kind": "prompt", "method": "categories", "labels": list(ONE_TOKEN), "length": 16, "rounds": 2, "population": 4,
    "records": 50, "tokens": 2, "choices": 3, "start": " It is a",
}  # fmt: skip


class Served(ThreadingHTTPServer):
    """A completions server around a model, as vLLM ("echo" and "vllm"), llama.cpp ("next") or one of text ("none").

    Attributes:
        form: which.
        asked: the bodies of the requests that were answered.
        headers: of the last request.
        instead: called before a request is answered; if it returns something, (status, headers, body) is the answer.
    """

    daemon_threads = True

    def __init__(self, model: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.words = [self.tokenizer.decode([token]) for token in range(len(self.tokenizer))]
        self.form = "echo"
        self.asked: list[dict[str, Any]] = []
        self.seen: Mapping[str, str] = {}
        self.instead: Callable[[dict[str, Any]], Any] = lambda body: None
        self._lock = threading.Lock()
        self._memory: dict[tuple[int, ...], Tensor] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def log_p(self, ids: Sequence[int]) -> Tensor:
        """(tokens, vocabulary) log-probabilities of what follows each token."""
        with self._lock, torch.no_grad():
            if tuple(ids) not in self._memory:
                self._memory[tuple(ids)] = self.model(torch.tensor([list(ids)])).logits[0].log_softmax(-1)
            return self._memory[tuple(ids)]

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt, told = body["prompt"], None
        ids = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        written: list[int] = []
        for _ in range(body["max_tokens"]):
            written.append(int(self.log_p([*ids, *written])[-1].argmax()))
        words = self.words
        if self.form == "echo":
            assert body["echo"]
            log_p, whole = self.log_p([*ids, *written]), [*ids, *written]
            numbers = [None, *(float(log_p[place, token]) for place, token in enumerate(whole[1:]))]
            told = {"tokens": [words[token] for token in whole], "token_logprobs": numbers}
        elif self.form in ("next", "vllm"):
            assert not body.get("echo")
            top = self.log_p(ids)[-1].topk(body["logprobs"])
            pairs = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
            if self.form == "vllm":
                told = {"top_logprobs": [{words[token]: number for token, number in reversed(pairs)}]}
            else:
                entries = [{"id": token, "token": words[token], "bytes": [], "logprob": number} for token, number in pairs]
                told = {"content": [{**entries[0], "top_logprobs": entries}]}
        return {
            "object": "text_completion",
            "choices": [{"index": 0, "text": self.tokenizer.decode(written), "logprobs": told}],
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Served

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen = dict(self.headers)
        found = self.server.instead(body)
        if found is None:
            self.server.asked.append(body)
            found = 200, {}, json.dumps(self.server.answer(body)).encode()
        status, headers, content = found
        if self.path != "/v1/completions":
            status, content = 404, b"{}"
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


def make_talker(folder: Path) -> Path:
    """A model after which one of ``ONE_TOKEN`` always comes: of what it knows one number is a constant, and only they rise with it."""  # noqa: E501

    def write(target: Path) -> None:
        torch.manual_seed(3)
        config = LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=4096, max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
            initializer_range=0.3,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        for name in TOKENIZER:
            (target / name).write_bytes((DEMO / "grove-6m" / name).read_bytes())
        tokens = [AutoTokenizer.from_pretrained(target)(label)["input_ids"][0] for label in ONE_TOKEN]
        with torch.no_grad():
            model.model.embed_tokens.weight[:, 0] = 4
            for block in model.model.layers:
                block.self_attn.o_proj.weight[0] = 0
                block.mlp.down_proj.weight[0] = 0
            usual = model.model(torch.randint(4096, (64, 8))).last_hidden_state.mean((0, 1))
            rows = torch.randn(3, 32)
            rows -= (rows @ usual)[:, None] * usual / usual.square().sum()  # so that none of them is usually the likeliest
            rows[:, 0] += 20
            model.lm_head.weight.zero_()
            model.lm_head.weight[tokens] = rows
        model.save_pretrained(target)

    return write_once("talker", folder, write)


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_talker(tmp_path_factory.mktemp("talker"))


@contextmanager
def serving(model: Path) -> Iterator[Served]:
    with Served(model) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def talks(talker: Path) -> Iterator[Served]:
    with serving(talker) as server:
        yield server


@pytest.fixture(scope="module")
def plain(small: Small) -> Iterator[Served]:
    with serving(small.model) as server:
        yield server


@pytest.fixture(autouse=True)
def afresh(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("talks", "plain"):
        if name in request.fixturenames:
            server = request.getfixturevalue(name)
            server.form, server.asked, server.instead = "echo", [], lambda body: None
    monkeypatch.setattr(completions, "PAUSE", 0.01)


@pytest.fixture(scope="module")
def files(small: Small) -> dict[str, Path]:
    """A file of records for every client."""
    found = {}
    for offset, client in enumerate((*CLIENTS, "test")):
        rows = [{"text": f"{CANARY} {number} {client}", "label": ONE_TOKEN[(number + offset) % 3]} for number in range(3)]
        found[client] = small.folder / f"endpoint-{client}.jsonl"
        found[client].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return found


def job(files: Mapping[str, Path], model: Path, endpoint: Mapping[str, Any] | None = None, **stage: Any) -> dict[str, Any]:
    """Changes of the small job."""
    templates = {"prompt": "{text}", "answer": "{label}"}
    at = {} if endpoint is None else {"endpoint": endpoint}
    return {
        "model": {"path": str(model), **at},
        "clients": [{"name": name, "data": str(files[name]), **templates} for name in CLIENTS],
        "stages": [{key: value for key, value in {**WORDY, **stage}.items() if value is not None}],
        "evaluate": {"data": [{"name": "test", "path": str(files["test"]), "measure": "prompt", **templates}]},
    }  # fmt: skip


# Scores


def records(small: Small, folder: Path, labels: Sequence[str] = LABELS) -> Records:
    file = folder / "records.jsonl"
    rows = [{"text": f"wing {number} {CANARY}", "label": label} for number, label in enumerate(LABELS)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_records([file], "{text}", "{label}", labels, Checkpoint(small.model).tokenizer(), 16)


def client_of(folder: Path, path: Path, url: str, **endpoint: Any) -> LocalClient:
    file = folder / "records.jsonl"
    at = Endpoint(url=url, **endpoint)
    return LocalClient("ash", folder / "ash", path, None, (file,), None, prompt="{text}", answer="{label}", endpoint=at)


def scorer(small: Small, client: LocalClient, place: Place = "end", labels: Sequence[str] = LABELS) -> AtEndpoint:
    return AtEndpoint(client, Checkpoint(small.model).tokenizer(), place, labels, "request")


PROMPTS = torch.tensor([[5, 17, -1], [40, 41, 42], [-1, -1, -1]], dtype=torch.int32)


@pytest.mark.parametrize(("form", "logprobs", "labels", "place", "requests"), [
    ("echo", "echo", LABELS, "end", 3),
    ("echo", "echo", (), "front", 1),
    ("next", "next", LABELS, "front", 2),
    ("vllm", "next", LABELS, "end", 2),
])  # fmt: skip
def test_scores_are_those_of_the_clients_own_model(
    small: Small, plain: Served, tmp_path: Path, form: str, logprobs: Any, labels: Sequence[str], place: Place, requests: int
) -> None:
    """Labels of one token and of several, free answers, prompts of several lengths and none."""
    plain.form, decoder, of = form, Decoder(Checkpoint(small.model)), records(small, tmp_path, labels).take([1])
    candidates = PROMPTS if logprobs == "echo" else PROMPTS[1:]
    prompts = [Prompt(embed(decoder, row[row >= 0].long()), written=True) for row in candidates]
    at = scorer(small, client_of(tmp_path, small.model, plain.url, logprobs=logprobs, top=4096), place, labels)
    found = at(candidates, of)
    for one, expected in zip(found, score(decoder, of, prompts, place), strict=True):
        torch.testing.assert_close(one, expected, rtol=0, atol=1e-5)
    assert at.calls == len(plain.asked) == len(candidates) * requests


def test_a_label_that_is_not_named_counts_as_the_last_and_a_tie_is_wrong(small: Small, plain: Served, tmp_path: Path) -> None:
    plain.form, of = "next", records(small, tmp_path)
    at = scorer(small, client_of(tmp_path, small.model, plain.url, logprobs="next", top=1))
    for record, (row,) in enumerate(at(PROMPTS[2:], of)):
        one_token = [place for place, label in enumerate(of.labels) if len(label) == 1]
        told = plain.log_p([*of.prefix, *of.texts[record]])[-1].max()
        answer = of.answers[record][0]
        assert [float(row[place]) for place in one_token] == pytest.approx([float(told)] * 2)
        assert int(row[one_token].argmax()) != answer or answer not in one_token


def test_an_answer_in_text_is_the_label_that_it_begins_with(small: Small, tmp_path: Path) -> None:
    labels = (" no", " nothing", " Yes", "+")
    for written, expected in (
        (" no", 0), ("\nNo.", 0), ("nothing at all", 1), ("nothings", None), ("YES, it is", 2), ("well, no", None), ("", None),
        ("+1", 3), ("no\nnothing", 0),
    ):  # fmt: skip
        assert label_in(written, labels) == expected


def test_what_is_known_is_not_sent_again(small: Small, plain: Served, tmp_path: Path) -> None:
    """Also after a process died: what it had of a request it still counts, for the answer must be the same."""
    of, client = records(small, tmp_path), client_of(tmp_path, small.model, plain.url, parallel=1)
    left = [4]

    def dies(body: Mapping[str, Any]) -> Any:
        left[0] -= 1
        return (500, {}, b"") if left[0] < 0 else None

    plain.instead = dies
    with pytest.raises(FedgroveError, match="refuses the request"):
        scorer(small, client)(PROMPTS, of)
    plain.instead = lambda body: None
    with (client.folder / CACHE).open("a") as file:
        file.write('["half a li')
    at = scorer(small, client)
    found = at(PROMPTS, of)
    assert at.calls == 3 * 3 * 3
    assert len({json.dumps(body) for body in plain.asked}) == 3 * 3 * 3
    assert len(plain.asked) == 3 * 3 * 3 + 1, "one score was begun and not finished"
    again = AtEndpoint(client, Checkpoint(small.model).tokenizer(), "end", LABELS, "another request")
    for one, other in zip(again(PROMPTS, of), found, strict=True):
        assert torch.equal(one, other)
    assert again.calls == 0
    assert CANARY not in (client.folder / CACHE).read_text()


# A whole run


@pytest.mark.parametrize(("form", "endpoint", "stage"), [
    ("echo", {}, {}),
    ("next", {"logprobs": "next", "top": 8}, {}),
    ("none", {"logprobs": "none"}, {"score": "correct"}),
    ("echo", {}, {"method": "tokens", "choices": 12, "generations": 1, "rounds": 1, "population": 3, "tokens": None,
                  "score": "loss"}),
])  # fmt: skip
def test_a_run_through_an_endpoint_finds_the_same_prompt(
    small: Small, files: Mapping[str, Path], talker: Path, talks: Served, tmp_path: Path, form: str, endpoint: Any, stage: Any
) -> None:
    own = small.undisturbed(**job(files, talker, **stage))
    talks.form = form
    out = tmp_path / "run"
    file = small.job("endpoint", **job(files, talker, {"url": talks.url, **endpoint}, **stage))
    code, said, told = cli("run", file, "--out", out)
    assert code == 0
    for name in ("prompt.txt", "prompt.json"):
        assert (out / "prompt" / name).read_bytes() == (own / "prompt" / name).read_bytes()
    costs, expected = (json.loads((run / "prompt.json").read_text())["finalists"] for run in (out, own))
    assert costs == pytest.approx(expected, abs=1e-5)
    assert len(set(expected)) > 1, "there is something to choose"
    here, there = measurements(out), measurements(own)
    assert here.keys() == there.keys()
    sent = sum(value for (_, _, client, name), value in here.items() if name == "calls" and client is None)
    assert sent == len(talks.asked) == len({json.dumps(body) for body in talks.asked})
    plan = json.loads((out / "plan-0-prompt.json").read_text())
    assert sent <= sum(of["forwards"] for of in plan["clients"].values())
    assert all(of["endpoint"] for of in plan["clients"].values())
    (note,) = (note for note in plan["notes"] if "endpoint" in note)
    assert "ash, birch, cedar" in note
    assert "whoever runs it sees that text" in note
    page, card = ((out / name).read_text(encoding="utf-8") for name in ("report.html", "model/README.md"))
    assert note in page
    assert "whoever runs the endpoint of ash, birch and cedar was sent text of that owner" in card
    assert not any("No text left its owner" in one or "No text and no tokens left" in one for one in (page, card, said, told))
    everything = [file for file in out.rglob("*") if file.is_file()]
    assert not [file for file in everything if CANARY.encode() in file.read_bytes()]
    assert CANARY not in said + told


def test_a_client_that_searches_alone_comes_to_the_same(small: Small, plain: Served, tmp_path: Path) -> None:
    records(small, tmp_path)
    request = SearchAlone(
        stage=0, method="categories", aggregation="local", labels=LABELS, score="loss", place="end", length=16, records=2,
        seed="0/0", population=3, generations=1, learning_rate=0.3, against_overfitting=0.5, tokens=2, words=3,
    )  # fmt: skip
    sent = categories.share(categories.begin(Task("0/0", 3, 2, words=((5,), (40, 41), (17,)))))
    there = client_of(tmp_path, small.model, plain.url)
    found = request.respond(sent, there, "cpu")
    own = request.respond(sent, replace(there, endpoint=None), "cpu")
    for name, tensor in own.tensors.items():
        torch.testing.assert_close(found.tensors[name], tensor, rtol=0, atol=1e-4)
    assert isinstance(found.reply, Searched)
    assert isinstance(own.reply, Searched)
    assert found.reply.cost == pytest.approx(own.reply.cost, abs=1e-4)
    assert found.reply.calls == len(plain.asked) == len({json.dumps(body) for body in plain.asked})


def test_answers_without_a_label_are_wrong_and_the_run_says_so(
    small: Small, files: Mapping[str, Path], talker: Path, talks: Served, tmp_path: Path
) -> None:
    talks.instead = lambda body: (200, {}, json.dumps({"choices": [{"text": "Well, " + ONE_TOKEN[0]}]}).encode())
    stage = {"score": "correct", "rounds": 1, "population": 3}
    changes = job(files, talker, {"url": talks.url, "logprobs": "none"}, **stage)
    del changes["evaluate"]["data"]
    code, _, told = cli("run", small.job("unlabeled", **changes), "--out", tmp_path / "run")
    assert code == 0
    assert json.loads((tmp_path / "run" / "prompt.json").read_text())["finalists"] == [1.0] * 4
    assert "round 0: all candidates score alike; does an answer begin with a label" in told


# Mistakes


def ask(small: Small, folder: Path, url: str, score: Score = "loss", **endpoint: Any) -> list[int]:
    """The counts in a client's response to a request: records' weight, records, skipped ones, calls."""
    records(small, folder)
    request = ScorePrompts(
        stage=0, method="categories", aggregation="pooled", labels=LABELS, score=score, place="end", length=16, records=2,
        seed="0/0", candidates=1,
    )  # fmt: skip
    response = request.respond({CANDIDATES: PROMPTS[:1]}, client_of(folder, small.model, url, **endpoint), "cpu")
    counts: list[int] = response.tensors[COUNTS].tolist()
    return counts


def failure(*arguments: Any, **endpoint: Any) -> completions.EndpointError:
    """The error of :func:`ask`."""
    with pytest.raises(completions.EndpointError) as caught:
        ask(*arguments, **endpoint)
    assert str(caught.value).startswith("client 'ash': its endpoint ")
    assert CANARY not in str(caught.value)
    return caught.value


def says(**choice: Any) -> tuple[int, dict[str, str], bytes]:
    return 200, {}, json.dumps({"choices": [{"text": CANARY, **choice}]}).encode()


UNTOLD = {"tokens": ["\n"] * 99, "token_logprobs": [None] * 99}
BIRD = {"id": 2810, "token": "x", "logprob": -1}
STRANGE = "does not answer as a completions server does; correct endpoint.url"
ANOTHER = "runs another model: its tokens are not those of this client's copy; let it run the job's model"


@pytest.mark.parametrize(("instead", "endpoint", "word", "line"), [
    ((302, {"Location": "/elsewhere"}, b""), {}, "redirect", "sends requests elsewhere (HTTP 302), which is not followed"),
    ((401, {}, CANARY.encode()), {}, "key", "does not accept the key (HTTP 401); correct endpoint.key"),
    ((404, {}, CANARY.encode()), {"model": "x"}, "model", "has no such address or no such model (HTTP 404); correct"),
    ((400, {}, CANARY.encode()), {}, "refused", "refuses the request (HTTP 400); its own log says why (llama.cpp has no"),
    ((503, {"Retry-After": "0"}, b""), {"retries": 2}, "busy", "is busy (HTTP 503, 3 times); raise endpoint.retries"),
    ((200, {}, b"<html>" + CANARY.encode()), {}, "answer", STRANGE),
    ((200, {}, b'{"choices": []}'), {}, "answer", STRANGE),
    ((200, {}, b'{"choices": [7]}'), {}, "answer", STRANGE),
    ((200, {}, b"[" * 10**5), {}, "answer", STRANGE),
    ((200, {}, b" " * (2**24 + 1)), {}, "answer", "answers with more than 16 MiB; lower endpoint.top"),
    (says(), {}, "logprobs", 'returns no log-probabilities of a prompt\'s own tokens; set endpoint.logprobs = "next"'),
    (says(logprobs={"tokens": ["a"], "token_logprobs": [-1.0]}), {}, "logprobs", "of each of a prompt's tokens"),
    (says(logprobs=UNTOLD), {}, "logprobs", "returns no log-probabilities of an answer's tokens"),
    (says(logprobs={**UNTOLD, "token_logprobs": [0.5] * 99}), {}, "answer", STRANGE),
    (says(logprobs={**UNTOLD, "token_logprobs": ["-1"] * 99}), {}, "answer", STRANGE),
    (says(logprobs={"tokens": ["x"] * 99, "token_logprobs": [-1.0] * 99}), {}, "model", ANOTHER),
    (says(logprobs={"tokens": ["token_id:7"] * 99, "token_logprobs": [-1.0] * 99}), {}, "model", ANOTHER),
    (says(), {"logprobs": "next"}, "logprobs", "returns no log-probabilities of the most likely next tokens; set endpoint"),
    (says(logprobs={"content": [{"top_logprobs": []}]}), {"logprobs": "next"}, "logprobs", "of the most likely next tokens"),
    (says(logprobs={"content": [{"top_logprobs": [BIRD]}]}), {"logprobs": "next"}, "model", ANOTHER),
    (says(text=None), {"logprobs": "none"}, "answer", STRANGE),
])  # fmt: skip
def test_an_endpoint_that_fails_is_one_line_that_names_the_client(
    small: Small, plain: Served, tmp_path: Path, instead: Any, endpoint: dict[str, Any], word: str, line: str
) -> None:
    plain.instead = lambda body: instead
    error = failure(small, tmp_path, plain.url, "correct", **endpoint)
    assert line in str(error)
    code = error_codes.encode_exception(error)
    assert code == f"endpoint EndpointError {word}"
    assert error_codes.message(code) == f"its endpoint does not do its part ({word}); its own log/site.log says why"
    assert not plain.asked


def test_an_endpoint_that_is_down_or_slow_is_one_line(small: Small, plain: Served, tmp_path: Path) -> None:
    assert str(failure(small, tmp_path, "http://127.0.0.1:1/v1")) == (
        "client 'ash': its endpoint cannot be reached or breaks off (Connection refused); "
        "start it and continue with --resume, or correct endpoint.url"
    )
    assert failure(small, tmp_path, plain.url.replace("http:", "https:")).word in ("certificate", "down")
    gave_up = threading.Event()

    def waits(body: Mapping[str, Any]) -> None:
        gave_up.wait(60)

    plain.instead = waits
    assert "gave no answer in 0.1 s; raise endpoint.timeout" in str(failure(small, tmp_path, plain.url, timeout=0.1))
    gave_up.set()
    plain.instead = lambda body: (200, {"Content-Length": "100"}, b"[")
    assert "gave no answer in 0.1 s" in str(failure(small, tmp_path, plain.url, timeout=0.1))


@pytest.mark.parametrize(("endpoint", "ok", "says"), [
    ({}, True, "it returns the log-probabilities of a prompt's tokens"),
    ({"logprobs": "next", "top": 7}, True, "it returns 7 of the 7 most likely next tokens"),
    ({"logprobs": "none"}, True, "it returns text"),
    ({"url": "http://127.0.0.1:1/v1"}, False, "127.0.0.1:1: its endpoint cannot be reached"),
])  # fmt: skip
def test_the_doctor_asks_an_endpoint_and_sends_no_text_of_a_client(
    small: Small, plain: Served, files: Mapping[str, Path], tmp_path: Path, endpoint: dict[str, Any], ok: bool, says: str
) -> None:
    score = "correct" if endpoint.get("logprobs") == "none" else "loss"
    file = small.job("asked", **job(files, small.model, {"url": plain.url, **endpoint}, score=score))
    before, plain.form = len(plain.asked), endpoint.get("logprobs", "echo")
    status, out, _ = cli("doctor", file, "--json")
    (check,) = (one for one in json.loads(out) if one["name"] == "endpoint")
    assert check["ok"] is ok
    assert (status == 0) is ok
    assert says in check["text"]
    assert check["remedy"] == ("" if ok else "start it, or correct endpoint.url")
    assert CANARY not in json.dumps(plain.asked[before:])


def test_fewer_tokens_than_asked_for_are_said(small: Small, plain: Served) -> None:
    one = {"id": 5, "token": "x", "logprob": -1.0}
    plain.instead = lambda body: says(logprobs={"content": [{"top_logprobs": [one, {**one, "id": 6}]}]})
    check = doctor.endpoint(Endpoint(url=plain.url, logprobs="next", top=20), Checkpoint(small.model))
    assert check.ok
    assert "2 of the 20" in check.text
    assert "choose labels that are likely" in check.remedy


def test_the_time_limit_is_one_for_the_whole_answer(
    small: Small, plain: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that sends a header now and then keeps every single read within the limit."""
    answer = _Handler.do_POST

    def drips(self: _Handler) -> None:
        self.connection.sendall(b"HTTP/1.1 200 OK\r\n")
        with suppress(OSError):
            for number in range(60):
                self.connection.sendall(b"X-%d: 1\r\n" % number)
                time.sleep(0.02)
            answer(self)

    monkeypatch.setattr(_Handler, "do_POST", drips)
    assert "gave no answer in 0.2 s" in str(failure(small, tmp_path, plain.url, timeout=0.2))


def test_a_busy_endpoint_is_asked_again_after_a_pause(small: Small, plain: Served, tmp_path: Path) -> None:
    busy = iter([(429, {"Retry-After": "0"}, b""), (503, {}, b""), (429, {"Retry-After": "never"}, b"")])
    plain.instead = lambda body: next(busy, None)
    assert ask(small, tmp_path, plain.url) == [6, 2, 0, 6]
    assert len(plain.asked) == 6


def test_a_connection_that_was_closed_while_it_was_idle_is_opened_again(
    small: Small, plain: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = _Handler.end_headers

    def end_headers(self: _Handler) -> None:
        end(self)
        self.close_connection = True  # without saying so

    monkeypatch.setattr(_Handler, "end_headers", end_headers)
    assert ask(small, tmp_path, plain.url, parallel=1) == [6, 2, 0, 6]


def test_a_key_is_sent_and_said_nowhere(small: Small, plain: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY, raising=False)
    assert str(failure(small, tmp_path, plain.url, key=KEY)) == (
        f"client 'ash': its endpoint needs a key; set the environment variable {KEY} (endpoint.key)"
    )
    monkeypatch.setenv(KEY, "sesame\r\nX-Other: 1")
    assert "sesame" not in str(failure(small, tmp_path, plain.url, key=KEY))
    monkeypatch.setenv(KEY, "sesame")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert ask(small, tmp_path, plain.url, key=KEY, model="grove") == [6, 2, 0, 6]
    assert plain.seen["Authorization"] == "Bearer sesame"
    assert plain.asked[-1]["model"] == "grove"
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and b"sesame" in file.read_bytes()]
    plain.instead = lambda body: (403, {}, b"sesame")
    (tmp_path / "ash" / CACHE).unlink()
    line = str(failure(small, tmp_path, plain.url, key=KEY))
    assert line.endswith(f"does not accept the key (HTTP 403); correct the environment variable {KEY}")


@pytest.mark.parametrize(("endpoint", "stage", "line"), [
    ({}, {"method": "evolution", "population": 4, "tokens": None, "choices": None},
     'stages.0: an endpoint takes text, and a soft prompt is none; take method = "categories", or no endpoint'),
    ({"logprobs": "none"}, {}, 'stages.0: an endpoint without log-probabilities tells no loss; set score = "correct"'),
    ({"logprobs": "next"}, {"labels": []}, "stages.0: an endpoint that returns the most likely next tokens alone tells"),
    ({"url": "ftp://x/v1"}, {}, "model.endpoint.url: only http and https are possible"),
    ({"url": "http://me:sesame@x/v1"}, {}, "model.endpoint.url: an address has no name, password or parameters"),
    ({"url": "http://x/v1?key=sesame"}, {}, "model.endpoint.url: an address has no name, password or parameters"),
    ({"url": "http:///v1"}, {}, "model.endpoint.url: it is no address"),
    ({"url": "http://x:99999/v1"}, {}, "model.endpoint.url: it is no address"),
    ({"key": "s-e-s-a-m-e"}, {}, "model.endpoint.key: "),
    ({"colour": 1}, {}, "model.endpoint.colour: no such key"),
])  # fmt: skip
def test_what_does_not_fit_an_endpoint_is_one_line(
    small: Small, files: Mapping[str, Path], talker: Path, tmp_path: Path, endpoint: Any, stage: Any, line: str
) -> None:
    changes = job(files, talker, {"url": "http://127.0.0.1:1/v1", **endpoint}, **stage)
    said = complaint("run", small.job("wrong-endpoint", **changes), "--out", tmp_path / "run")
    assert line in said
    assert "sesame" not in said


# A federation


def test_a_sites_text_goes_where_its_own_file_says(small: Small, tmp_path: Path) -> None:
    """A job that names an endpoint is refused by whoever reads it; of what the site's file says one word is told."""
    federated: dict[str, Any] = {"model": {"path": "m"}, "clients": [{"name": "ash"}], "stages": [WORDY], "evaluate": {}}
    at = {"url": "http://127.0.0.1:7/v1", "logprobs": "next"}
    bad = small.job("redirected", **{**federated, "model": {"path": "m", "endpoint": at}})
    assert load_federated(small.job("federated", **federated), sites=("ash",)).model.endpoint is None
    with pytest.raises(FedgroveError, match=r"model\.endpoint: in a federation each site says where its text goes"):
        load_federated(bad, sites=("ash",))
    client = small.job("client", **{**federated, "clients": [{"name": "ash", "endpoint": at}]})
    with pytest.raises(FedgroveError, match=r"clients\.0\.endpoint: in a federation each site sets this"):
        load_federated(client, sites=("ash",))

    site = sign(make_site(tmp_path / "site", small), WORDY)
    with (site / SITE).open("a") as file:
        file.write('\n[endpoint]\nurl = "http://127.0.0.1:9/v1"\nlogprobs = "next"\n')
    settings = read(site / SITE, SiteFile)
    assert Installation(site, settings, "run", bad).client("m").endpoint == settings.endpoint is not None
    join = JoinRun(digests=digests(Checkpoint(small.model)), clock=time.time())
    answer, error = send(site, join)
    assert answer is not None, error
    assert wire.unpack(answer)[1]["capabilities"]["endpoint"] == "next"
    assert b"127.0.0.1" not in answer
    sign(site, WORDY, model={"path": "m", "endpoint": at})
    assert send(site, join, run="other") == (None, "terms Refusal job")
