"""A server that lies in any field of any request: a site that allows the job answers the job, and nothing else.

The server's own code runs small jobs with real sites. Before each kind of request is answered, a copy of one site is sent
the same request with one field moved, for every field there is, found in the request itself: so a new field that nobody
compares makes these tests fail. ``FREE`` lists the fields that a server may choose, and why.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from pydantic import BaseModel

from fedgrove import run as server
from fedgrove.client import serve
from fedgrove.deploy.flare.exchanges.done import EndRun
from fedgrove.deploy.flare.exchanges.join import JoinRun
from fedgrove.deploy.flare.exchanges.result import CONTENT, DeliverResult
from fedgrove.deploy.flare.files import Federation
from fedgrove.deploy.flare.kits import _sign_roster
from fedgrove.deploy.flare.site import respond
from fedgrove.errors import FedgroveError
from fedgrove.job.load import load
from fedgrove.models.digest import digests
from fedgrove.models.stream import Checkpoint
from fedgrove.privacy.secagg import client as protocol
from fedgrove.rounds import wire
from fedgrove.rounds.request import OTHER_ROOMS, Part, Request, Tensors, parse, request_types
from fedgrove.runfolder import RunFolder
from fedgrove.stages.tune.exchanges.base import KeepWeights
from small import CLIENTS, LENGTH, SAMPLES, Small
from test_expert_cut import mixture
from test_wire import forge, take_apart

RUN, VICTIM = "run", "ash"
PRUNE = {"kind": "prune", "pruner": "wanda", "sparsity": 0.5, "samples": SAMPLES, "length": LENGTH}
POOLED = {**PRUNE, "aggregation": "pooled"}
STRUCTURED = {
    "kind": "structured",
    "samples": SAMPLES,
    "length": LENGTH,
    "channels": 0.5,
    "heads": 0.5,
    "depth": 0.5,
    "protect_ends": False,
}
EXPERTS = {"kind": "structured", "samples": SAMPLES, "length": LENGTH, "experts": 0.5}
TUNE = {"kind": "tune", "length": LENGTH, "ranks": [2, 4], "batches": [1, 2], "bits": [32], "steps": 2, "rounds": 1}
SEEDS = {"kind": "tune", "method": "seeds", "length": LENGTH, "batches": [2], "steps": 2, "rounds": 2, "learning_rate": 1e-3}
HEAD = {"kind": "head", "labels": ["bird", "fish"], "length": LENGTH, "size": 16, "personal": 0.3}
PROMPT = {
    "kind": "prompt",
    "labels": ["bird", "fish"],
    "length": LENGTH,
    "rounds": 2,
    "population": 4,
    "records": 4,
    "dimension": 3,
    "tokens": 2,
    "aggregation": "local",
    "generations": 1,
}
VOTING = {
    "kind": "prompt",
    "method": "tokens",
    "labels": ["bird", "fish"],
    "length": LENGTH,
    "rounds": 1,
    "population": 4,
    "generations": 1,
    "records": 4,
    "tokens": 2,
    "choices": 20,
}
FIXED = {**TUNE, "method": "lora", "aggregation": "ffa_lora", "precision": "fixed"}
POOL = {"gate": "mixture", "members": 2, "common": 0.0, "size": 2, "prefix": 8, "starts": 2, "fit_rounds": 2}
POOLED_TUNE = {**TUNE, "method": "lora", "rounds": 2, "pool": POOL}
IN_SUMS = {**FIXED, "rounds": 2, "pool": {**POOL, "gate": "keys"}}
BY_LOSS = {**TUNE, "method": "lora", "rounds": 2, "pool": {"gate": "losses", "members": 2, "common": 0.0, "windows": 2}}
NOISE = {"epsilon": 8.0, "delta": 1e-3}
OPEN = {"stages": ["head", "prompt", "prune", "structured", "tune"], "group": 3, "alone": True, "samples": SAMPLES}
SECURE = {**OPEN, "secure": True, "alone": False}
NOISY = {"epsilon": 8.0, "delta": 1e-3, "budget": 100.0}

JOBS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {  # what a site allows, and the stages
    "votes": (OPEN, [{**PRUNE, "rounds": 2, "mend": "dsnot"}]),
    "owl": (OPEN, [{**PRUNE, "allocation": "owl"}]),
    "sums": (OPEN, [{**POOLED, "pruner": "sparsegpt", "source": "sequential"}]),
    "own models": ({**OPEN, "alone": False}, [{**POOLED, "pruner": "sparsegpt", "personal": 0.5}]),
    "secure votes": (SECURE, [PRUNE]),
    "noisy sums": ({**SECURE, **NOISY}, [{**POOLED, **NOISE}]),
    "experts": (OPEN, [EXPERTS, {**TUNE, "method": "lora", "personal_experts": 0.5}]),
    "few experts": ({**OPEN, "alone": False}, [{**TUNE, "method": "lora"}]),
    "structured": (OPEN, [STRUCTURED, {**TUNE, "method": "fedpipe", "rounds": 2, "personal": 0.3}]),
    "secure adapters": (SECURE, [{**FIXED, "method": "fedpipe", "upload_price": 1.0}]),  # so that ranks are below the largest
    "noisy clients": ({**SECURE, **NOISY}, [{**FIXED, **NOISE, "dp_unit": "client"}]),
    "noisy windows": ({**OPEN, **NOISY, "alone": False}, [{**TUNE, **NOISE, "method": "lora", "batches": [64]}]),
    "full": (OPEN, [PRUNE, {**TUNE, "method": "full"}]),
    "head": (OPEN, [HEAD]),
    "guessed labels": ({**OPEN, "alone": False}, [{**HEAD, "personal": 0.0, "guesses": 1}]),
    "alone": (OPEN, [{**TUNE, "method": "lora", "personal": 0.3, "personal_pull": 0.1}]),
    "seeds": (OPEN, [SEEDS]),
    "pool": ({**OPEN, "alone": False}, [POOLED_TUNE]),
    "pool in sums": (SECURE, [IN_SUMS]),
    "pool of owners": ({**OPEN, "alone": False}, [{**POOLED_TUNE, "pool": {**POOL, "gate": "similar", "members": "auto"}}]),
    "noisy pool": ({**OPEN, **NOISY, "alone": False}, [{**POOLED_TUNE, **NOISE, "pool": {**POOL, "gate": "similar"}}]),
    "pool by losses": ({**OPEN, "alone": False}, [BY_LOSS]),
    "prompts": ({**OPEN, "alone": False}, [PROMPT]),
    "votes for words": (SECURE, [VOTING]),
}

ANY = "secagg"  # the five phases around a secure sum
FREE: dict[tuple[str, str], tuple[str, Any]] = {  # kind and field: why a server may choose it, and a value beyond its bound
    ("deploy/join", "clock"): ("its clock, which the site compares with its own", -1.0),
    ("deploy/result", "folder"): ("a name in the folder of the job's result", "../x"),
    ("deploy/result", "file"): ("a name in the folder of the job's result", "../x"),
    ("deploy/result", "last"): ("whether the result is complete", None),
    ("head/guesses", "classes"): ("the labels that have records", ["x"]),
    ("head/personal", "base"): ("text of the card of the site's own head", "line\nline"),
    ("head/personal", "classes"): ("the labels that have records", ["x"]),
    ("head/personal", "title"): ("text of the card of the site's own head", "line\nline"),
    ("prompt/local", "round"): ("every round of the stage is asked for", -1),
    ("prompt/local", "subspace.base"): ("tokens that the search begins with", []),
    ("prompt/local", "subspace.base[]"): ("tokens that the search begins with", -1),
    ("prompt/local", "subspace.scale"): ("how far candidates are from them", -1.0),
    ("prompt/score", "subspace.base"): ("tokens that the search begins with", []),
    ("prompt/score", "subspace.base[]"): ("tokens that the search begins with", -1),
    ("prompt/score", "subspace.scale"): ("how far candidates are from them", -1.0),
    ("prune/block", "block"): ("every block of the model is asked for", 2),
    ("prune/personal/block", "statistics.products"): ("the same products in another order, or one twice, are the same", ["x"]),
    ("prune/statistics", "block"): ("every block of the model is asked for", 2),
    ("prune/statistics", "calibration.through"): ("the name of the run", "own/0123456789abcdef"),
    ("prune/statistics", "widths"): ("sums of fewer inputs tell less", {"x": 2}),
    ("prune/statistics", "products"): ("fewer products than the pruner needs tell less", ["x"]),
    ("prune/statistics", "noise.clients"): ("fewer clients that share the noise add more", 3),
    ("prune/statistics", "noise.norms[]"): ("windows are clipped to it, and the noise follows from it", -1.0),
    ("structured/inputs", "block"): ("every block that stays is asked for", 2),
    ("tune/seeds/measure", "batch"): ("up to the job's largest batch of each client", 7),
    ("tune/seeds/measure", "clients"): ("fewer clients may each send more", 4),
    ("tune/seeds/step", "batch"): ("up to the job's largest batch of each client", 7),
    ("tune/seeds/step", "clients"): ("fewer clients may each send more", 4),
    ("tune/alone", "train.training.micro"): ("at most the batch", 3),
    ("tune/base", "kept_blocks[]"): ("which blocks stay follows from the sums of all clients", 4096),
    ("tune/base", "part"): ("the weights that earlier stages changed come in parts", 4096),
    ("tune/experts", "number"): ("as many as a client has memory for", 2**16 + 1),
    ("tune/importance", "fixed.everything"): ("the weights of all clients follow from it alike", 1),
    ("tune/importance", "micro"): ("up to the job's largest batch", 3),
    ("tune/importance", "kept_blocks[]"): ("which blocks stay follows from the sums of all clients", 4096),
    ("tune/personal", "kept_blocks[]"): ("which blocks stay follows from the sums of all clients", 4096),
    ("tune/personal", "base"): ("text of the card of the site's own adapter", "line\nline"),
    ("tune/personal", "micro"): ("up to the job's largest batch", 3),
    ("tune/personal", "title"): ("text of the card of the site's own adapter", "line\nline"),
    ("tune/reduced", "base"): ("text of the card of the site's own model", "line\nline"),
    ("tune/reduced", "number"): ("nothing of it leaves the site", 2**16 + 1),
    ("tune/reduced", "title"): ("text of the card of the site's own model", "line\nline"),
    ("tune/deal/features", "round"): ("asked again before the round in which a killed run goes on", 2),
    ("tune/deal/losses", "round"): ("every round in which members are trained is asked for", 2),
    ("tune/deal/losses", "micro"): ("up to the job's largest batch", 3),
    ("tune/deal/sums", "round"): ("asked again before the round in which a killed run goes on", 2),
    ("tune/gate/fit", "round"): ("every exchange of the fit is asked for", 4),
    ("tune/members", "round"): ("every round in which members are trained is asked for", 2),
    ("tune/members", "fixed.everything"): ("the weights of all clients follow from it alike", 1),
    ("tune/members", "training.micro"): ("at most the batch", 3),
    ("tune/train", "member"): ("every member of the pool is trained", 64),
    ("tune/train", "held"): ("all experts, or as many as the site chose before", 2**16 + 1),
    ("tune/train", "kept_blocks[]"): ("which blocks stay follows from the sums of all clients", 4096),
    ("tune/train", "round"): ("every round of the stage is asked for", 2),
    ("tune/train", "ranks"): ("a plan may leave linears out", {"x": 2}),
    ("tune/train", "masked"): ("which zeros stay", ["x"]),
    ("tune/train", "training.batch"): ("one of the job's batches", 3),
    ("tune/train", "training.steps"): (
        "up to the job's max_steps, or a part of its steps where windows are dealt to members",
        17,
    ),
    ("tune/train", "training.micro"): ("at most the batch", 3),
    ("tune/train", "fixed.everything"): ("the weights of all clients follow from it alike", 1),
    ("tune/train", "fixed.widest[]"): ("columns of zeros", 3),
    ("tune/train", "fixed.noise.adders"): ("fewer clients that share the noise add more", 3),
    ("tune/train", "windows.noise"): ("more noise than the job promises", 1e-3),
    (ANY, "session.name"): ("all clients sign it", ""),
    (ANY, "session.bits"): ("all clients sign it", 7),
    (ANY, "session.request"): ("compared when the response is masked", "x"),
    (ANY, "sealed_shares"): ("a third of the clients may be silent", "x"),
    (ANY, "sealed_shares[]"): ("what cannot be read is reported", "x"),
    (ANY, "signatures"): ("a third of the clients may be silent", "x"),
}

OTHER = {  # of fields with a list of allowed values
    "adamw": "sgd", "mean": "each", "each": "mean", "lora": "ia3", "full": "ia3", "sgd": "dp_sgd", "dp_sgd": "sgd",
    "float32": "bfloat16", "bfloat16": "float32", "wanda": "magnitude", "sparsegpt": "wanda", "fedspallm": "fedprllm",
    "ridge": "prototypes", "last": "mean", "fisher": "taylor", "owl": "even", "dense": "gradients", "gradients": "dense",
    "reap": "frequency", "evolution": "categories", "local": "mean", "loss": "correct", "end": "front",
    "outputs": "tokens", "tokens": "categories", "votes": "pooled", "correct": "loss",
}  # fmt: skip
EXAMPLES: dict[str, Any] = {  # of fields that are None in an honest request
    "cut": {"channels": 0.25, "heads": 0.0, "depth": 0.0, "experts": 0.0},
    "kept_blocks": [0],
    "kept_experts": [[0, [0, 1, 2, 3]]],
    "held": 4,
    "pattern": [2, 4],
    "subspace": {"dimension": 2, "scale": 0.1, "base": [1, 2]},
    "compute_dtype": "bfloat16",
    "max_weight_growth": 2.0,
    "fixed_point": {"units": {}, "clients": 3},
    "noise": {},
    "fixed": {"everything": 10**6, "widest": {}, "noise": None},
    "member": 0,
    "budget": [8.0, 1e-5],
    "windows": {"epsilon": 1.0, "delta": 1e-3, "noise": 1.0, "rounds": 2, "clip": 1.0},
}
NOISES: dict[str, Any] = {
    "prune/statistics": {"norms": {}, "inputs": 8, "skips_first": False, "clients": 2, "epsilon": 1.0, "delta": 1e-3},
    "tune": {"epsilon": 1.0, "delta": 1e-3, "clip": 1.0, "rounds": 2, "adders": 2},
}


Path_ = tuple[str | int, ...]


def moves(value: Any, plain: Any, kind: str, name: str = "", path: Path_ = ()) -> Iterator[tuple[str, Path_, Any]]:
    """Every field of a request, at any depth, with other values.

    Args:
        value: the request, or a part of it; plain: the same as JSON.

    Yields:
        The field's name (``[]`` for what is in a list or a table), its place, another value.
    """
    if isinstance(value, BaseModel) or is_dataclass(value):
        names = type(value).model_fields if isinstance(value, BaseModel) else [field.name for field in fields(value)]
        for field in names:
            at = f"{name}.{field}" if name else field
            yield from moves(getattr(value, field), plain[field], kind, at, (*path, field))
    elif isinstance(value, Mapping):
        for key in list(value)[:1]:
            yield from moves(value[key], plain[str(key)], kind, f"{name}[]", (*path, str(key)))
            yield name, path, {other: inner for other, inner in plain.items() if other != str(key)}
            yield name, path, {f"{other}x" if other == str(key) else other: inner for other, inner in plain.items()}
            yield name, path, {**plain, f"{key}x": plain[str(key)]}
        yield name, path, {}
    elif isinstance(value, list | tuple):
        for number in range(min(1, len(value))):
            yield from moves(value[number], plain[number], kind, f"{name}[]", (*path, number))
        yield from ((name, path, other) for other in (plain[:-1], plain[1:], [*plain, *plain[-1:]], plain[::-1], ["x"]))
    elif isinstance(value, bool):
        yield name, path, not value
    elif isinstance(value, int):
        yield from ((name, path, other) for other in (value + 1, value - 1, value * 2, value * 64, value // 2))
    elif isinstance(value, float):
        others = (value + 1, value * 1.001, value * 0.999, value * 64, value / 64, 1e-30, 0.999)
        yield from ((name, path, other) for other in others)
    elif isinstance(value, str):
        yield name, path, OTHER.get(value, value[:-1] + ("1" if value.endswith("0") else "0"))
        yield name, path, f"{value}0"
    else:
        assert value is None, f"{kind}: say how {name} can be moved"
        last = name.rpartition(".")[2]
        assert last in EXAMPLES, f"{kind}: give an example of {name}"
        yield name, path, EXAMPLES[last] or NOISES.get(kind) or NOISES["tune"]
    if value is not None and path:
        yield name, path, None


def put(plain: Any, path: Path_, value: Any) -> Any:
    """JSON with another value at a place."""
    if not path:
        return value
    key, *rest = path
    if isinstance(plain, list):
        return [put(inner, tuple(rest), value) if number == key else inner for number, inner in enumerate(plain)]
    return {**plain, key: put(plain[key], tuple(rest), value)}


def listed(kind: str, name: str) -> tuple[str, str]:
    """The key of ``FREE`` for a field."""
    return ANY if kind.startswith("rounds/secagg/") else kind, name


def make_kits(
    small: Small, folder: Path, allow: Mapping[str, Any], labeled: Collection[str] = (), memory: str | None = None
) -> dict[str, Path]:
    """Sites with everything that ``fedgrove federation kits`` puts there and the owner writes, but certificates."""
    kits = {}
    for name in CLIENTS:
        kits[name] = kit = folder / name
        (kit / "startup").mkdir(parents=True)
        (kit / "startup" / "fed_client.json").write_text(json.dumps({"client": {"fqsn": name}}))
        settings = {"data": str(small.texts[name]), "threads": 1, "result": True, "models": {"m": str(small.model)}}
        if name in labeled:
            rows = [{"text": f"{word} {i} of {name}", "label": word} for i in range(6) for word in HEAD["labels"]]
            (kit / "labeled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            settings |= {"data": str(kit / "labeled.jsonl"), "prompt": "{text}", "answer": "{label}"}
        settings["allow"] = dict(allow)
        if memory is not None:
            settings["memory"] = memory
        (kit / "site.toml").write_text(tomli_w.dumps(settings), encoding="utf-8")
    people = {"sites": [{"name": name} for name in CLIENTS], "operators": [{"name": "a@b.org"}]}
    (folder / "authority").mkdir()
    _sign_roster(Federation.model_validate({"name": "wards", **people}), folder / "authority", kits)
    return kits


class Hostile:
    """An engine of real sites. Before a site answers the first request of a kind, a copy of it is sent all moved ones.

    Attributes:
        accepted: kind and field of what was answered although it was moved, with the value.
        escaped: what was refused by an error that is none of ours.
        kinds, bounds: the kinds, and the fields beyond their bounds, that were tried.
        known: kinds that other jobs tried; those where no stage matters are not tried again.
        free: fields of ``FREE`` that were answered in other jobs; that takes the time of an honest answer, so once is enough.
    """

    def __init__(self, kits: Mapping[str, Path], job: Path, known: set[str], free: set[tuple[str, str]]):
        self.kits, self.job, self.known, self.free = kits, job, known, free
        self.accepted: dict[tuple[str, str], Any] = {}
        self.bounds: set[tuple[str, str]] = set()
        self.escaped: list[str] = []
        self.kinds: set[str] = set()
        self.number = 0

    def clients(self) -> list[str]:
        return sorted(self.kits)

    def request(
        self, kind: str, messages: Mapping[str, bytes], timeout: float | None = None, largest: int | None = None
    ) -> Iterator[tuple[str, bytes | None, str | None]]:
        for client in sorted(messages):
            message = messages[client]
            if client == VICTIM:
                self.attack(kind, message)
            response, error = respond(self.kits[client], RUN, kind, message, self.job)
            assert response is not None, f"an honest {kind} was refused: {error}"
            yield client, response, error

    def attack(self, kind: str, message: bytes) -> None:
        """Sends a copy of the site every moved request, unless a request of this kind was tried in this job."""
        if kind in self.kinds or (kind in self.known and kind.partition("/")[0] in OTHER_ROOMS):
            return
        self.kinds.add(kind)
        shutil.rmtree(self.kits[VICTIM].with_name("copy"), ignore_errors=True)
        request, tensors, _ = serve.read(kind, message)
        header, pieces = take_apart(message)  # to pack the tensors again takes longer than a refusal
        plain = header["info"]["request"]

        def send(name: str, moved: Any) -> bool:
            return self._send(kind, name, moved, tensors, header, pieces)

        for name, path, value in moves(request, plain, kind):
            key = listed(kind, name)
            beyond = FREE[key][1] if key in FREE else None
            if beyond is not None and (kind, name) not in self.bounds:
                self.bounds.add((kind, name))
                send(f"{name} = {beyond}", put(plain, path, beyond))
            tried = key in self.accepted or key in self.free
            if not tried and send(name, put(plain, path, value)):
                self.accepted.setdefault(key, value)

    def _send(
        self, kind: str, name: str, plain: Any, tensors: Tensors, header: Mapping[str, Any], pieces: dict[str, bytes]
    ) -> bool:
        """Whether a copy of the site, which has answered no other moved request, answers this one."""
        info = header["info"]
        try:
            request = parse(kind, plain)
        except (wire.WireError, FedgroveError):
            return False
        if request.model_dump(mode="json") == info["request"]:
            return False  # left out, it has its default
        masking = info.get("masking")
        if masking is not None:
            with suppress(FedgroveError):  # of a method that does not exist
                # the server has all clients agree on what it asks
                masking = {**masking, "session": {**masking["session"], "request": request.sum_digest(tensors)}}
        self.number += 1
        copy = self.kits[VICTIM].with_name("copy")
        if not copy.is_dir():
            shutil.copytree(self.kits[VICTIM], copy)
        message = forge({**header, "info": {"request": plain, "masking": masking}}, pieces)
        response, error = respond(copy, RUN, kind, message, self.job)
        if response is not None:
            shutil.rmtree(copy)
            return True
        if not error or error.split()[1] not in ("Refusal", "FedgroveError", "SecureError"):
            self.escaped.append(f"{kind} {name}: {error}")
        return False


@pytest.fixture(scope="module")
def attacked(small: Small, grove: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Hostile]:
    """By job, what a site answered of all that the server moved."""
    folder = tmp_path_factory.mktemp("mixed")
    mixed = Small(folder, mixture("qwen3_moe", folder / "mixture", grove, moe_intermediate_size=96))
    found: dict[str, Hostile] = {}
    known: set[str] = set()
    free: set[tuple[str, str]] = set()
    for name, (allow, stages) in JOBS.items():
        folder = tmp_path_factory.mktemp("hostile")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(protocol, "mask", _mask(protocol.mask))
            federation = mixed if "experts" in name else small
            found[name] = hostile_run(federation, folder, name.replace(" ", "-"), allow, stages, known, free)
            known |= found[name].kinds
            free |= found[name].accepted.keys() & FREE.keys()
    return found


def _mask(honest: Any) -> Any:
    """Masks nothing at the copy of the site: it is asked out of turn, and only whether it computes counts."""

    def mask(session: Any, client: str, store: Any, peers: Any, tensors: Tensors, sum_name: str) -> Any:
        if "copy" in store.folder.parts:
            return tensors
        return honest(session, client, store, peers, tensors, sum_name)

    return mask


def hostile_run(
    small: Small,
    folder: Path,
    name: str,
    allow: Mapping[str, Any],
    stages: list[dict[str, Any]],
    known: set[str],
    free: set[tuple[str, str]],
    engine_type: type[Hostile] = Hostile,
) -> Hostile:
    """Runs a job with real sites, which are attacked at every kind of request; not again where no stage matters."""
    secure = bool(allow.get("secure"))
    memory = "3.1 MB" if name == "few-experts" else None  # for half of the mixture's
    labeled = set(CLIENTS) if "labels" in stages[0] else set()
    if stages[0].get("guesses"):
        labeled -= {VICTIM}
    kits = make_kits(small, folder, allow, labeled, memory)
    privacy = {"secure_aggregation": secure, "min_group": 3}
    alone = bool(allow["alone"]) and len(stages) == 1
    evaluate = {"data": [str(small.texts["held-0"])], "length": 32, "windows": 2, "alone": alone} if alone else {"alone": False}
    spec = small.spec(stages=stages, privacy=privacy, evaluate=evaluate)
    answers = {"prompt": "{text}", "answer": "{label}"}
    spec["clients"] = [client | (answers if client["name"] in labeled else {}) for client in spec["clients"]]
    local = folder / "local.toml"
    local.write_text(tomli_w.dumps({**spec, "name": name}), encoding="utf-8")
    signed = folder / "job.toml"
    clients = [{"name": client} for client in CLIENTS]
    shown = {**spec, "name": name, "model": {"path": "m"}, "clients": clients, "evaluate": evaluate}
    if alone:
        shown["evaluate"] = {"data": ["held-0.txt"], "length": 32, "windows": 2, "alone": True}
    shown["roster"] = int(secure)
    signed.write_text(tomli_w.dumps(shown), encoding="utf-8")
    engine = engine_type(kits, signed, known, free)
    join = JoinRun(digests=digests(Checkpoint(small.model)), clock=time.time())
    for _ in engine.request(join.KIND, dict.fromkeys(kits, packed(join))):
        pass
    job = load(local)
    run = RunFolder(folder / "run", job)
    server.run_job(job, engine, run)
    run.close()
    for request, tensors in (
        (DeliverResult(folder="head", file="x.bin", last=True), {CONTENT: torch.zeros(3, dtype=torch.uint8)}),
        (EndRun(), {}),
    ):
        for _ in engine.request(request.KIND, {VICTIM: packed(request, tensors)}):
            pass
    return engine


def packed(request: Request, tensors: Tensors | None = None) -> bytes:
    return wire.pack(tensors or {}, {"request": request.model_dump(mode="json")})


def test_every_kind_of_request_is_moved(attacked: dict[str, Hostile]) -> None:
    assert set().union(*(one.kinds for one in attacked.values())) == {one.KIND for one in request_types()}
    assert sum(one.number for one in attacked.values()) > 500


def test_a_site_answers_no_request_that_the_job_does_not_say(attacked: dict[str, Hostile]) -> None:
    answered = {field: (name, value) for name, one in attacked.items() for field, value in one.accepted.items()}
    others = {field: how for field, how in answered.items() if field not in FREE}
    assert not others, f"nobody compares these fields with the job: {sorted(others)}"
    assert not [" ".join(field) for field in FREE.keys() - answered.keys()], "these are compared by now"


def test_a_moved_request_is_refused_in_words_of_our_own(attacked: dict[str, Hostile]) -> None:
    assert not [line for one in attacked.values() for line in one.escaped]


def test_a_new_field_is_moved_wherever_it_is() -> None:
    class Deep(Part):
        old: str = "x"
        new: int = 0

    class Request(KeepWeights):
        deep: dict[str, tuple[Deep, ...]] = {"a": (Deep(),)}  # noqa: RUF012
        odd: Any = None

    request = Request(stage=1, part=0)
    with pytest.raises(AssertionError, match="give an example of odd"):
        list(moves(request, request.model_dump(mode="json"), "tune/base"))
    request = request.model_copy(update={"odd": 1.0})
    plain = request.model_dump(mode="json")
    found = {name: (path, value) for name, path, value in moves(request, plain, "tune/base") if value is not None}
    deep = {"deep", "deep[]", "deep[][].old", "deep[][].new"}
    assert found.keys() == {"stage", "round", "part", "cut", "kept_blocks", "kept_experts", "odd"} | deep
    path, value = found["deep[][].new"]
    assert put(plain, path, value)["deep"] == {"a": [{"old": "x", "new": value}]}
