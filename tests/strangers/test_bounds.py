"""Numbers and text from another party: hostile ones are refused by name, in bounded time, and never reach a terminal raw."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import tomli_w
import torch
from nvflare.apis.event_type import EventType
from nvflare.apis.shareable import Shareable
from pydantic import ValidationError
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from fedgrove.client import serve
from fedgrove.client.hidden_states import Calibration
from fedgrove.client.windows import training_windows
from fedgrove.deploy.flare import leftovers, node
from fedgrove.deploy.flare.coordinate import Recorder, _offer, open_job, text_name
from fedgrove.deploy.flare.doctor import private_folders
from fedgrove.deploy.flare.exchanges.done import EndRun
from fedgrove.deploy.flare.exchanges.result import DeliverResult
from fedgrove.deploy.flare.executor import FedgroveExecutor
from fedgrove.deploy.flare.files import ServerFile, SiteFile, read
from fedgrove.deploy.flare.installation import Declared, Installation
from fedgrove.deploy.flare.policy import Terms
from fedgrove.deploy.flare.site import respond
from fedgrove.deploy.flare.upkeep import end_run, write_log
from fedgrove.engines import error_codes
from fedgrove.engines.flare import BODY, NONCE, VERSION, bytes_of
from fedgrove.engines.flare import _read as _read_flare
from fedgrove.engines.local import LocalEngine
from fedgrove.errors import FedgroveError
from fedgrove.escape import MAX_WORD, printable
from fedgrove.evaluation.metrics.harness import harness
from fedgrove.events import Message, Phase, from_json
from fedgrove.input_statistics.fixed_point import BITS, Statistic
from fedgrove.job.load import load, load_federated
from fedgrove.job.tables import Job
from fedgrove.models.blocks import Decoder
from fedgrove.models.cost import measure_cost
from fedgrove.models.files import loads_as_it_is, small_contents
from fedgrove.models.pretrained import ATTENTIONS, load_full_model, plain_folder
from fedgrove.models.stream import Checkpoint
from fedgrove.privacy.gaussian import GaussianMechanism
from fedgrove.progress import Bar, Lines
from fedgrove.rounds import strict_json, wire
from fedgrove.rounds.capabilities import Capabilities
from fedgrove.rounds.collect import _read, collect
from fedgrove.rounds.exchanges.capabilities import DescribeYourself, Windows
from fedgrove.rounds.exchanges.secagg import Masking
from fedgrove.rounds.request import Message as RequestMessage
from fedgrove.rounds.request import RequestError, parse, request_types
from fedgrove.rounds.wire import WireError
from fedgrove.run import check_model, local_clients, make_plans
from fedgrove.runfolder import RunFolder
from fedgrove.stages.prune.calibration_pass import windows_at_once
from fedgrove.stages.prune.recipe import Recipe
from fedgrove.stages.tune import training
from fedgrove.stages.tune.exchanges.base import KeepWeights
from fedgrove.stages.tune.exchanges.train import Train
from fedgrove.stages.tune.fixed_point import ClientNoise, FixedPointChanges
from fedgrove.stages.tune.train_settings import Training
from fedgrove.stages.tune.trainers import dp_sgd, sgd
from fedgrove.stages.tune.training import Budget, Settings, Work
from small import LENGTH, Small, cli, complaint


def forge(info: str | bytes) -> bytes:
    """A message without tensors and with a right checksum, whose JSON is this text."""
    info = info.encode() if isinstance(info, str) else info
    pieces = {"header": np.frombuffer(b'{"info":' + info + b',"tensors":[]}', np.uint8)}
    crc = zlib.crc32(pieces["header"].tobytes(), zlib.crc32(b"header"))
    message: bytes = safetensors.numpy.save({"checksum": np.frombuffer(struct.pack("<I", crc), np.uint8), **pieces})
    return message


NUMBERS = {
    "NaN": "NaN",
    "infinity": "Infinity",
    "minus infinity": "-Infinity",
    "a float that is infinite": "1e999",
    "a negative float that is infinite": "-1.5e400",
    "an integer of 65 bits": str(2**64),
    "a negative integer of 65 bits": str(-(2**64)),
    "an integer of 400 digits": "9" * 400,
    "an integer of a million digits": "1" + "0" * 10**6,
    "a fraction of a million digits": "0." + "1" * 10**6,
    "an exponent of a million digits": "1e-" + "1" * 10**6,
}
PLACES = {
    "a value": '{{"a":{}}}',
    "in a list": '{{"a":[1,{}]}}',
    "nested": '{{"a":{{"b":[[{}]]}}}}',
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("number", NUMBERS)
def test_a_number_that_is_not_finite_or_of_absurd_size_is_no_message(number: str, place: str) -> None:
    with pytest.raises(WireError) as error:
        wire.unpack(forge(PLACES[place].format(NUMBERS[number])))
    assert len(str(error.value)) < 200


ODD = {
    "a key twice": '{"a":1,"a":1}',
    "a key twice, nested": '{"x":[{"a":1,"b":2,"a":3}]}',
    "a key twice, escaped": '{"a":1,"\\u0061":2}',
    "33 lists": '{"a":' + "[" * 33 + "]" * 33 + "}",
    "900 lists": '{"a":' + "[" * 900 + "]" * 900 + "}",
    "a million lists": '{"a":' + "[" * 10**6 + "]" * 10**6 + "}",
    "a million objects": '{"a":' * 10**6 + "1" + "}" * 10**6,
    "a lone surrogate": '{"a":"\\ud800"}',
    "a lone surrogate as a key": '{"\\udc00":1}',
    "too long": '{"a":"' + "x" * strict_json.MAX_BYTES + '"}',
}


@pytest.mark.parametrize("what", ODD)
def test_odd_json_is_no_message(what: str) -> None:
    with pytest.raises(WireError):
        wire.unpack(forge(ODD[what]))


def test_ordinary_json_is_a_message() -> None:
    """Else the refusals above might have another reason."""
    info: dict[str, Any] = {
        "zero": -0.0, "tiny": 5e-324, "large": 1.7976931348623157e308, "id": 2**64 - 1, "low": -(2**63), "text": "Füße 💧",
        "deep": [[[[[[[[[[{}]]]]]]]]]], "none": None, "true": True,
    }  # fmt: skip
    again = wire.unpack(forge(json.dumps(info)))[1]
    assert again == info
    assert str(again["zero"]) == "-0.0"
    assert wire.unpack(wire.pack({}, info))[1] == info


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_request_whose_tensors_are_not_finite_is_refused_by_name(value: float, dtype: torch.dtype) -> None:
    tensors = {"start/q": torch.ones(2, 3, dtype=dtype), "start/v": torch.full((1,), value, dtype=dtype)}
    message = wire.pack(tensors, {"request": {"stage": 0, "part": 0}})
    with pytest.raises(RequestError, match="start/v") as error:
        serve.read("tune/base", message)
    assert error.value.field == "start/v"


# Fields


def unbounded(schema: Any, definitions: dict[str, Any], path: str = "") -> list[str]:
    """The places of a JSON schema where a number, a text or a list has no limit."""
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
    if "const" in schema or "enum" in schema:
        return []
    places = [
        place
        for key in ("anyOf", "oneOf", "allOf")
        for one in schema.get(key, ())
        for place in unbounded(one, definitions, path)
    ]
    kind = schema.get("type")
    limits = {
        "integer": ("maximum", "exclusiveMaximum"), "number": ("maximum", "exclusiveMaximum"),
        "array": ("maxItems",), "object": ("maxProperties", "properties"), "string": ("maxLength", "pattern"),
    }  # fmt: skip
    if kind in limits and not schema.keys() & set(limits[kind]):
        places.append(f"{path}: {kind}")
    if kind in ("integer", "number") and not schema.keys() & {"minimum", "exclusiveMinimum"}:
        places.append(f"{path}: {kind} without least value")
    if kind == "string" and "pattern" in schema and re.search(r"[^}]\*|[^\]]\+", schema["pattern"]):
        places.append(f"{path}: string of any length")
    for name, one in schema.get("properties", {}).items():
        places += unbounded(one, definitions, f"{path}.{name}")
    below = [schema[key] for key in ("items", "additionalProperties", "propertyNames") if isinstance(schema.get(key), dict)]
    for one in [*below, *schema.get("prefixItems", ()), *schema.get("patternProperties", {}).values()]:
        places += unbounded(one, definitions, f"{path}[]")
    return places


MESSAGES = {f"{one.KIND} {kind.__name__}": kind for one in request_types() for kind in (one, one.REPLY)} | {"masking": Masking}
METHODS = {  # checked against the names of files
    f".terms.stages[].{key}"
    for key in ("aggregation", "allocation", "parametrization", "planner", "pruner", "score", "trainer")
}
COMPARED = {".tokens: integer", ".tokens: integer without least value"}  # a reply's must be the number that was asked for


@pytest.mark.parametrize("kind", MESSAGES)
def test_every_field_of_every_message_has_bounds(kind: str) -> None:
    schema = MESSAGES[kind].model_json_schema()
    without = set(unbounded(schema, schema.get("$defs", {}))) - COMPARED
    assert not {place for place in without if place.removesuffix(": string") not in METHODS}


HUGE: list[Any] = [0, -1, 2**50 + 1, 10**18, 10**400, 1e300, float("inf"), float("nan"), "x" * 10**6, None, [], {}]
CAPABLE = {
    "memory": 2**40, "speed": 1.0, "uplink": 10**6, "downlink": 10**7, "devices": 1, "bits": [16], "samples": 4,
    "sparsity": 0.5,
}  # fmt: skip
OPTIONAL = {"memory", "uplink", "downlink", "samples", "sparsity"}


@pytest.mark.parametrize("lie", HUGE, ids=lambda lie: repr(lie)[:12])
@pytest.mark.parametrize("field", CAPABLE)
def test_a_capability_without_bounds_is_refused(field: str, lie: Any) -> None:
    fine = (field in OPTIONAL and lie is None) or (field == "sparsity" and lie == 0) or (field == "bits" and lie == [])
    if fine:
        return
    with pytest.raises(ValidationError):
        Capabilities(**{**CAPABLE, field: lie})
    if field in Declared.model_fields:
        with pytest.raises(ValidationError):
            Declared(**{"speed": 1.0, field: lie})


@pytest.mark.parametrize("tokens", [{16: 0}, {16: 15}, {16: 2**50 + 1}, {17: 34}, {16: 32, 32: 32}, {}, {-1: 5}, {16: -32}])
def test_tokens_that_no_text_has_are_refused(tokens: dict[int, int]) -> None:
    request = DescribeYourself(calibrations=(), lengths=(16,))
    with pytest.raises((ValidationError, WireError)):
        request.check_reply(Capabilities(tokens=tokens))
    request.check_reply(Capabilities(tokens={16: 32}))


def test_samples_other_than_the_server_asked_for_are_refused() -> None:
    request = DescribeYourself(calibrations=(Windows(samples=4, length=16, seed="0/0"),), lengths=())
    request.check_reply(Capabilities(samples=4))
    request.check_reply(Capabilities())
    for samples in (1, 3, 5, 2**30):
        with pytest.raises(WireError, match=f"it claims {samples} calibration windows, not 4"):
            request.check_reply(Capabilities(samples=samples))


@pytest.mark.parametrize("samples", [1, 2, 3, 97, 1024, 2**30 - 1, 2**30, 2**400])
@pytest.mark.parametrize("length", [2, 16, 512, 4096])
def test_the_number_of_windows_at_once_is_found_in_bounded_time(samples: int, length: int) -> None:
    for dtype in (None, "bfloat16"):
        together = windows_at_once(samples, length, dtype)
        assert samples % together == 0
        assert together == 1 or together * length <= 1024


EXTREME = {
    "memory": [1, 2**30, 2**50], "speed": [1e-6, 1.0, 1e6], "uplink": [None, 1, 2**50], "downlink": [None, 1, 2**50],
    "devices": [1, 64], "bits": [(), (4,), (32, 16, 8, 4)], "sparsity": [None, 0.0, 0.999999],
}  # fmt: skip
STAGES: dict[str, dict[str, Any]] = {
    "prune": {"kind": "prune", "pruner": "wanda", "sparsity": 0.5, "samples": 2, "length": LENGTH},
    "sampled": {"kind": "prune", "pruner": "wanda", "sparsity": 0.5, "samples": 2, "length": LENGTH, "layers": {"sample": 0.5}},
    "pooled": {"kind": "prune", "pruner": "wanda", "aggregation": "pooled", "sparsity": 0.5, "samples": 2, "length": LENGTH},
    "structured": {"kind": "structured", "heads": 0.5, "repair": False, "samples": 2, "length": LENGTH},
    "fedpipe": {"kind": "tune", "length": LENGTH, "ranks": [2, 4]},
    "uniform": {"kind": "tune", "method": "lora", "length": LENGTH, "ranks": [2]},
    "full": {"kind": "tune", "method": "full", "length": LENGTH},
    "noise": {"kind": "tune", "method": "lora", "length": LENGTH, "ranks": [2], "epsilon": 1.0},
}  # fmt: skip


def capable(name: str) -> Iterator[Capabilities]:
    """Every extreme value of every capability, alone and some together."""
    usual = {"memory": 2**30, "bits": (32, 16, 8, 4)}
    tokens = [{LENGTH: LENGTH}, {LENGTH: 2**50}] if name in ("noise", "fedpipe") else [{LENGTH: 1000 * LENGTH}]
    for held in tokens:
        for key, values in EXTREME.items():
            for value in values:
                yield Capabilities(**{**usual, "tokens": held, key: value})
        for number in (0, -1):
            yield Capabilities(**{"tokens": held, **{key: values[number] for key, values in EXTREME.items()}})


@pytest.mark.parametrize("name", STAGES)
def test_whatever_one_client_is_capable_of_the_others_plan(small: Small, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The plan has the client, or leaves it out by name: no traceback, no infinite number."""
    job = load(small.job(f"plan-{name}", stages=[STAGES[name]], evaluate={}, rounds={"quorum": 2}))
    model = Checkpoint(small.model)
    decoder = Decoder(model)
    notes = check_model(job, decoder)
    monkeypatch.setattr("fedgrove.run.Decoder", lambda model: decoder)  # made and checked once: it is the same for all
    monkeypatch.setattr("fedgrove.run.check_model", lambda job, decoder: notes)
    monkeypatch.setattr("fedgrove.stages.tune.stage.measure_cost", cache(measure_cost))
    honest = {one: Capabilities(tokens={LENGTH: 100 * LENGTH}) for one in ("birch", "cedar")}
    for liar in capable(name):
        plans = make_plans(job, model, Answering(job, {**honest, "ash": liar}))
        assert {"birch", "cedar"} <= set(plans[0].clients)
        json.loads(plans[0].model_dump_json(), parse_constant=pytest.fail)
        assert ("ash" in plans[0].clients) != ("ash" in plans[0].left_out)


def test_without_a_quorum_such_a_client_ends_the_run_by_name(small: Small) -> None:
    job = load(small.job("plan-all", stages=[STAGES["prune"]], evaluate={}))
    everybody = {one: Capabilities(tokens={}) for one in ("birch", "cedar")} | {"ash": Capabilities(memory=1)}
    with pytest.raises(FedgroveError, match=r"^client 'ash': one block needs .* \(clients\.memory\)"):
        make_plans(job, Checkpoint(small.model), Answering(job, everybody))


class Answering:
    """A federation whose clients only report these capabilities."""

    def __init__(self, job: Job, capabilities: dict[str, Capabilities]):
        self.job, self._capabilities, self.said = job, capabilities, list[str]()
        self.run = SimpleNamespace(phase=lambda phase: None, message=self.said.append)

    def clients(self) -> list[str]:
        return sorted(self._capabilities)

    def collect(self, messages: Any) -> Iterator[Any]:
        for client in messages:
            yield client, {}, self._capabilities[client]


def test_an_importance_or_noise_that_only_the_server_could_get_wrong_is_refused_at_the_client() -> None:
    calibration = {"stage": 0, "samples": 4, "length": 16, "seed": "0/0"}
    for change in (
        {"compute_dtype": "float64"}, {"compute_dtype": "load"}, {"windows_per_run": 3}, {"windows_per_run": 0},
        {"samples": 0}, {"samples": -4}, {"through": "../x"}, {"through": "server/../../x"}, {"seed": ""}, {"seed": "a\nb"},
        {"seed": "x" * 10**6}, {"length": 1}, {"length": 2**60}, {"round": -1}, {"stage": True},
    ):  # fmt: skip
        with pytest.raises(ValidationError):
            Calibration(**{**calibration, **change})
    recipe: dict[str, Any] = {"pruner": "wanda", "damping": "mean", "sparsities": (0.5, 0.5), "pattern": None, "blocks": (0, 1)}
    for change in (
        {"blocks": ()}, {"blocks": (2,)}, {"blocks": (-1,)}, {"sparsities": ()}, {"sparsities": (1.0, 0.5)},
        {"sparsities": (float("nan"), 0.5)}, {"sparsities": (-0.1, 0.5)}, {"pattern": (0, 4)}, {"pattern": (4, 4)},
        {"pattern": (-2, 4)}, {"pruner": "../wanda"}, {"pruner": "x" * 10**4}, {"damping": "none"},
        {"sparsities": (0.5,) * 5000},
    ):  # fmt: skip
        with pytest.raises(ValidationError):
            Recipe(**{**recipe, **change})
    with pytest.raises(RequestError):
        parse("prune/block", {"stage": 0, "block": 2, "calibration": calibration, "recipe": recipe, "aggregation": "fedspallm"})
    for part in (-1, 4096, 10**30, "../../x", 0.5):
        with pytest.raises(RequestError):
            parse("tune/base", {"stage": 0, "part": part})


@pytest.mark.parametrize("key", ["clients__0__memory", "clients__0__uplink"])
@pytest.mark.parametrize("value", ["9" * 400, "1" + "0" * 30 + "GiB", 10**18, "2000000TiB"])
def test_a_quantity_of_absurd_size_is_refused_by_its_key(small: Small, key: str, value: object) -> None:
    with pytest.raises(FedgroveError, match=r"clients\.0\.(memory|uplink): "):
        load(small.job("quantity", **{key: value}))


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e300])
@pytest.mark.parametrize(
    "key", ["learning_rate", "alpha", "deadline", "upload_price", "proximal", "server_lr", "max_grad_norm"]
)
def test_a_number_of_a_job_that_is_not_finite_is_refused_by_its_key(small: Small, key: str, value: float) -> None:
    with pytest.raises(FedgroveError, match=rf"stages\.0\.{key}: "):
        load(small.job("infinite", stages=[{"kind": "tune", key: value}]))


# Differential privacy: whether a window is there must not show in an error


ODD_WINDOWS = {
    "infinite": torch.full((8, 5), float("inf")),
    "one infinity": torch.zeros(8, 5).index_fill(0, torch.tensor([3]), float("-inf")),
    "NaN": torch.full((8, 5), float("nan")),
    "one NaN": torch.zeros(8, 5).masked_fill(torch.arange(40).view(8, 5) == 17, float("nan")),
    "overflows when squared": torch.full((8, 5), 1e30),
    "overflows in float64": torch.full((8, 5), 3e38),
}


@pytest.mark.parametrize("what", ODD_WINDOWS)
def test_with_noise_a_window_that_is_not_finite_counts_as_zero(what: str) -> None:
    def sums(*windows: torch.Tensor) -> Statistic:
        statistic = Statistic("q", torch.ones(5), products=False, mechanism=GaussianMechanism(3.0, 0.0, adders=1, bits=BITS))
        for window in windows:
            statistic.add(window[None])
        return statistic

    usual = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    odd = sums(usual, ODD_WINDOWS[what], usual)
    finite = bool(torch.isfinite(ODD_WINDOWS[what].square().sum()))
    same = sums(usual, ODD_WINDOWS[what] if finite else torch.zeros(8, 5), usual)
    assert torch.equal(odd.tensors()["change/q/squares"], same.tensors()["change/q/squares"])
    assert odd.tokens == 24
    with pytest.raises(FedgroveError, match="not finite or far larger"):
        Statistic("q", torch.ones(5), products=False).add(ODD_WINDOWS[what][None])


def test_with_noise_a_sum_that_reaches_its_limit_is_no_error() -> None:
    mechanism = GaussianMechanism(3.0, 0.0, adders=1, bits=BITS)
    statistic = Statistic("q", torch.ones(5), products=False, limit=10_000, mechanism=mechanism)
    for _ in range(50):
        statistic.add(torch.ones(1, 8, 5))
    assert int(statistic.squares.max()) == 10_000


def odd_loss(kind: str) -> Callable[..., torch.Tensor]:
    real = sgd.loss_sum

    def loss(model: torch.nn.Module, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        value = real(model, ids, labels)
        if kind == "gradient":  # the loss is finite, its gradient is not
            return value + sum((0.0 * p).sum().sqrt() for p in model.parameters() if p.requires_grad)
        return value * float(kind)

    return loss


@pytest.mark.parametrize("method", ["lora", "ia3", "full"])
@pytest.mark.parametrize("kind", ["inf", "nan", "gradient"])
def test_with_noise_for_a_client_a_loss_that_is_not_finite_is_a_change_of_zeros(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, method: str
) -> None:
    job = load(small.job("odd-loss", stages=[{"kind": "tune", "length": LENGTH, "ranks": [2]}], evaluate={}))
    ash = local_clients(job, Checkpoint(small.model), tmp_path)[0]
    linear = "model.layers.0.self_attn.q_proj"
    noise = ClientNoise(epsilon=8.0, delta=1e-6, clip=1.0, rounds=2, adders=0)  # the server adds the noise
    tokens = training_windows(ash, LENGTH)[0].numel()
    common: dict[str, Any] = {
        "stage": 0, "parts": 0, "cut": None, "bits": 32, "length": LENGTH, "seed": "s", "personal": 0.0,
        "parametrization": method, "trainer": "sgd", "shared_a": method == "lora", "ranks": {linear: 2},
        "scales": {linear: 1.0}, "masked": (), "tokens": tokens, "seen": 0, "dtype": "float32",
        "training": Training(steps=2, batch=1, micro=1, learning_rate=0.1, optimizer="adamw", max_grad_norm=1.0, proximal=0.0),
    }  # fmt: skip
    monkeypatch.setattr(sgd, "loss_sum", odd_loss(kind))

    def answer(**changes: Any) -> dict[str, torch.Tensor]:
        request = Train(**common, **changes)
        return wire.unpack(serve.serve("tune/train", wire.pack({}, {"request": request.model_dump(mode="json")}), ash, "cpu"))[
            0
        ]

    sent = answer(fixed=FixedPointChanges(everything=2, most=999, widest={linear: 2}, noise=noise))
    assert sent
    assert not any(tensor.any() for tensor in sent.values())
    with pytest.raises(FedgroveError, match="not finite"):  # without noise it is an error
        answer(fixed=FixedPointChanges(everything=2 * tokens, most=999, widest={linear: 2}))


@pytest.mark.parametrize("kind", ["inf", "nan", "gradient"])
def test_with_noise_for_a_window_a_loss_that_is_not_finite_is_a_gradient_of_zeros(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(training, "dp_sgd_keeps", lambda *facts: True)
    monkeypatch.setattr(dp_sgd, "loss_sum", odd_loss(kind))
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), 8)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2))
    before = [parameter.clone() for parameter in model.parameters()]
    ids = torch.zeros(3, 4, dtype=torch.int64)
    budget = Budget(epsilon=8.0, delta=1e-6, noise=0.0, rounds=1, clip=1.0)
    dp_sgd.train(model, Work(ids, ids, 0, "s", budget=budget), Settings(2, 3, 1, 0.1, optimizer="sgd"))
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))


# Text in logs and on terminals


HOSTILE_TEXT = {
    "clears the screen": "ash\x1b[2J\x1b[H",
    "sets the title": "ash\x1b]0;all is well\x07",
    "forges a line": "ash\n2026-01-01 00:00:00 the run has ended",
    "returns": "error\rfine ",
    "separates lines": "a\u2028b\u2029c\x85d\x0be\x0cf",
    "backwards": "ash\u202egnitset",
    "8-bit escape": "ash\x9b2J",
    "null": "a\0b",
    "delete": "ash\x7f\x7f\x7f",
    "invisible": "a\u200bs\u200dh\ufeff",
    "surrogate": "a\ud800b",
    "private": "a\ue000b",
    "language tags": "a\U000e0041b",
}


@pytest.fixture(params=HOSTILE_TEXT)
def hostile(request: pytest.FixtureRequest) -> str:
    return HOSTILE_TEXT[str(request.param)]


def test_hostile_text_is_printable_and_one_line(hostile: str) -> None:
    for text in (hostile, hostile * 1000):
        safe = printable(text, MAX_WORD)
        assert safe.isprintable()
        assert len(safe) <= 10 * MAX_WORD
        safe.encode()
    assert printable("Füße 💧 \\x1b", MAX_WORD) == "Füße 💧 \\x1b"
    assert len(printable("x" * 10**6, MAX_WORD)) == MAX_WORD


def test_hostile_text_in_an_error_is_one_line(hostile: str) -> None:
    for error in (FedgroveError(hostile), FedgroveError("x", hostile), FedgroveError("x", client=hostile)):
        assert str(error).isprintable()


def test_hostile_text_in_progress_is_one_line(hostile: str) -> None:
    events = [Message(hostile), Phase(hostile, hostile, client=hostile, text=hostile), Phase("a", within=(hostile,))]
    file = io.StringIO()
    lines = Lines(file=file)
    for event in events:
        lines.on_event(event)
        lines.tick()
    written = file.getvalue().splitlines()
    assert len(written) == len(events)
    assert all(line.isprintable() for line in written)
    shown = io.StringIO()
    bar = Bar(Console(file=shown, force_terminal=False, width=2000))
    for event in events:
        bar.on_event(event)
    bar._console.print(bar)
    assert all(line.isprintable() for line in shown.getvalue().splitlines())


def test_hostile_text_in_what_a_run_said_is_one_line(hostile: str, tmp_path: Path) -> None:
    recorder = Recorder()
    recorder.file = tmp_path / "said.txt"
    recorder.message(hostile)
    (line,) = recorder.file.read_text(encoding="utf-8").split("\n")[:-1]
    assert line.isprintable()
    assert from_json(recorder.events[0]) == Message(printable(hostile))


def test_no_request_writes_a_line_of_a_sites_log(hostile: str, tmp_path: Path) -> None:
    assert respond(tmp_path, hostile, "prune/block", b"", tmp_path / "job.toml")[0] is None
    assert respond(tmp_path, "run", hostile * 100, b"", tmp_path / "job.toml")[0] is None
    write_log(tmp_path, f"Traceback\n  File x\nValueError: {hostile}")
    text = (tmp_path / "log" / "site.log").read_text(encoding="utf-8")
    lines = text.split("\n")[:-1]
    assert all(line.isprintable() for line in lines)
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (Traceback|run )|    |\d.* [^ ]", line) for line in lines)
    assert sum(not line.startswith("    ") for line in lines) == 5  # two requests with a trace each, and the trace
    assert max(map(len, lines)) < 3000


def test_a_reply_with_hostile_keys_is_refused_in_one_line(hostile: str) -> None:
    if "\ud800" in hostile:
        return  # no message: see above
    for text in (hostile, hostile * 1000):
        request = KeepWeights(stage=0, part=0)
        response = wire.pack({}, {"request": request.digest, text: 1})
        with pytest.raises(WireError) as error:
            _read("ash", response, request, None, masked=False)
        assert str(error.value).isprintable()
        assert len(str(error.value)) < 1000
        with pytest.raises(WireError) as error:
            wire.check({text: torch.zeros(1)}, {})
        assert str(error.value).isprintable()
        with pytest.raises(WireError) as error:
            parse("tune/base", {"stage": 0, "part": 0, text: 1})
        assert str(error.value).isprintable()


# Tasks of lm-evaluation-harness are code


def submitted(small: Small, folder: Path, **evaluate: Any) -> Path:
    folder.mkdir()
    job = {"name": "first", "model": {"path": "m"}, "clients": [{"name": "ash"}], "stages": [STAGES["prune"]]}
    (folder / "job.toml").write_text(tomli_w.dumps({**job, "evaluate": evaluate}))
    (folder / "texts").mkdir()
    return folder


@pytest.mark.parametrize("place", [".", "/etc", "texts", "../texts", "/no/such/folder", "~", "evil.py", ""])
def test_a_federated_job_with_a_folder_of_tasks_is_refused(small: Small, tmp_path: Path, place: str) -> None:
    config = submitted(small, tmp_path / "config", tasks=["evil"], tasks_from=place)
    settings = ServerFile(models={"m": small.model}, tasks=("evil",))
    with pytest.raises(FedgroveError, match=r"evaluate\.tasks_from: a folder of tasks is code"):
        open_job(tmp_path, config, settings)
    with pytest.raises(FedgroveError, match=r"evaluate\.tasks_from: a folder of tasks is code"):
        load_federated(config / "job.toml")


def test_a_federated_job_names_only_tasks_that_the_server_lists(small: Small, tmp_path: Path) -> None:
    config = submitted(small, tmp_path / "config", tasks=["arc_easy", "evil"])
    for allowed, says in (((), "it allows none"), (("arc_easy",), "it allows arc_easy")):
        with pytest.raises(FedgroveError, match=rf"evaluate\.tasks: the server does not allow .*{says}"):
            open_job(tmp_path, config, ServerFile(models={"m": small.model}, tasks=allowed))
    job = open_job(tmp_path, config, ServerFile(models={"m": small.model}, tasks=("evil", "arc_easy")))
    assert job.evaluate.tasks == ("arc_easy", "evil")


EVIL = """
task: evil
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/rows.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: !function evil.text
doc_to_choice: [" ash", " birch"]
doc_to_target: 0
"""


@pytest.mark.parametrize("named", ["evil", "texts/evil.yaml", "../texts/evil.yaml"])
def test_the_real_harness_runs_no_code_of_an_operator(grove: Path, tmp_path: Path, named: str) -> None:
    """It would: a task's file names functions, and they run as soon as the task is loaded from a folder."""
    pytest.importorskip("lm_eval", reason="the extra fedgrove[lm-eval] is not installed")
    config = tmp_path / "config"
    config.mkdir()
    job = {"name": "first", "model": {"path": "m"}, "clients": [{"name": "ash"}], "stages": [STAGES["prune"]]}
    texts, ran = config / "texts", tmp_path / "ran"
    texts.mkdir()
    (texts / "rows.jsonl").write_text('{"q": "a"}\n')
    (texts / "evil.yaml").write_text(EVIL.format(folder=texts))
    (texts / "evil.py").write_text(f"open({str(ran)!r}, 'a').close()\ndef text(doc):\n    return doc['q']\n")
    (config / "job.toml").write_text(tomli_w.dumps({**job, "evaluate": {"tasks": [named]}}))

    with pytest.raises(FedgroveError, match=r"evaluate\.tasks: the server does not allow"):
        open_job(tmp_path, config, ServerFile(models={"m": grove}))
    opened = open_job(tmp_path, config, ServerFile(models={"m": grove}, tasks=(named,)))  # were it the server's own choice
    with pytest.raises(FedgroveError, match="lm-eval has no such task"):
        harness(grove, list(opened.evaluate.tasks), opened.evaluate.tasks_from, dtype="float32")
    assert not ran.exists()
    harness(grove, ["evil"], texts, dtype="float32")  # a user's own folder, on the user's own machine
    assert ran.exists()


# What stays on a site's disk


HERE = {"windows-ab.safetensors", "states-cd/0001.safetensors", "base-1/part-00000.safetensors", "alone/block-0000.safetensors",
        "secure/aa.json", "secure/bb.json.partial", "anything.else", "speed.tmp", "windows-x.safetensors.partial"}  # fmt: skip
STAYS = {"agreed.json", "released.json", "released-ab.safetensors", "best-0/x.safetensors", "speed.json",
         "personal/stage-0/adapter.safetensors", "candidates-0/0/block-0000.safetensors"}  # fmt: skip


def a_kit(folder: Path, small: Small, **settings: Any) -> Path:
    for name in ("startup", "local", "secure"):
        (folder / name).mkdir(parents=True)
    (folder / "startup" / "fed_client.json").write_text("{}")
    content = {"data": [str(small.texts["ash"])], "models": {"m": str(small.model)}, **settings}
    (folder / "site.toml").write_text(tomli_w.dumps(content))
    folder.chmod(0o700)
    return folder


def a_run(work: Path, name: str, days: float = 0.0) -> Path:
    for file in (*HERE, *STAYS):
        (work / name / file).parent.mkdir(parents=True, exist_ok=True)
        (work / name / file).write_text("x")
    written = time.time() - days * 86400
    for path in ((work / name), *(work / name).rglob("*")):
        os.utime(path, (written, written))
    return work / name


def content(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("elsewhere", [False, True])
def test_what_a_run_left_is_cleaned_but_for_what_a_site_must_remember(small: Small, tmp_path: Path, elsewhere: bool) -> None:
    work = tmp_path / "scratch" if elsewhere else tmp_path / "kit" / "work"
    kit = a_kit(tmp_path / "kit", small, **({"work": str(work)} if elsewhere else {}))
    run, other = a_run(work, "first-ab"), a_run(work, "second-cd")
    stranger = work / "not-a-run"
    stranger.mkdir()
    (stranger / "thesis.txt").write_text("x")
    (run / "states-link").symlink_to(stranger)
    end_run(kit, "first-ab")
    assert content(run) == STAYS | {"secure/records/ended.txt"}
    ended = run / "secure" / "records" / "ended.txt"
    assert ended.read_text() == "aa\n", "this session cannot be begun again with other secrets"
    assert not (run / "states-link").is_symlink()
    assert content(other) == HERE | STAYS
    assert cli("federation", "clean", kit)[0] == 0
    assert content(other) == STAYS | {"secure/records/ended.txt"}
    assert content(stranger) == {"thesis.txt"}
    assert cli("federation", "clean", kit)[1] == ""


@pytest.mark.parametrize("run", ["..", ".", "", "../other", "/", "first-ab/..", "no-such"])
def test_the_end_of_a_run_touches_no_other_folder(small: Small, tmp_path: Path, run: str) -> None:
    kit = a_kit(tmp_path / "kit", small)
    mine = a_run(kit / "work", "first-ab")
    other = a_run(tmp_path, "other")
    end_run(kit, run)
    assert content(mine) == content(other) == HERE | STAYS


def test_a_start_cleans_runs_that_died_long_ago(small: Small, tmp_path: Path) -> None:
    kit = a_kit(tmp_path / "kit", small, keep=3)
    old, new = a_run(kit / "work", "old", days=3.5), a_run(kit / "work", "new", days=2.5)
    assert leftovers.clean_old(kit, read(kit / "site.toml", SiteFile)) == [old]
    assert content(old) == STAYS | {"secure/records/ended.txt"}
    assert content(new) == HERE | STAYS


def test_only_a_sites_kit_that_does_not_run_can_be_cleaned(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit = a_kit(tmp_path / "kit", small)
    monkeypatch.setattr(node, "running", lambda kit: object())
    assert "it is running" in complaint("federation", "clean", kit)
    (kit / "startup" / "fed_client.json").rename(kit / "startup" / "fed_server.json")
    assert "only a site has working files" in complaint("federation", "clean", kit)


def test_what_a_client_writes_can_be_read_by_its_owner_only(small: Small, tmp_path: Path) -> None:
    job = load(small.job("modes", evaluate={}))
    before = os.umask(0o022)
    try:
        clients = local_clients(job, Checkpoint(small.model), tmp_path / "clients")
        request = DescribeYourself(calibrations=(Windows(samples=2, length=LENGTH, seed="0/0"),), lengths=(LENGTH,))
        message = wire.pack({}, {"request": request.model_dump(mode="json")})
        for client, response, error in LocalEngine(clients).request(request.KIND, {"ash": message}):
            assert (client, error) == ("ash", None)
            assert response
        assert os.umask(0o022) == 0o022, "the process has its own umask again"
        assert respond(a_kit(tmp_path / "kit", small), "run", "prune/block", b"", tmp_path / "job.toml")[0] is None
    finally:
        os.umask(before)
    written = [*(tmp_path / "clients").rglob("*"), *(tmp_path / "kit" / "log").rglob("*")]
    assert any(path.name.startswith("windows-") for path in written)
    assert [path for path in written if path.stat().st_mode & 0o077] == []


@pytest.mark.parametrize("mode", [0o755, 0o750, 0o701, 0o777])
def test_doctor_sees_folders_that_others_can_read(tmp_path: Path, mode: int) -> None:
    kit, work = tmp_path / "kit", tmp_path / "scratch"
    for folder in (kit, work):
        folder.mkdir(mode=0o700)
    assert private_folders(kit, work).ok
    assert private_folders(kit, None).ok
    for folder, says in ((kit, f"chmod 700 {kit}"), (work, "give work a folder of its own")):
        folder.chmod(mode)
        check = private_folders(kit, work)
        assert not check.ok
        assert str(folder) in check.text
        assert says in check.remedy
        folder.chmod(0o700)


@pytest.mark.parametrize(
    "other", ["first-personal", "first.partial", "first.personal", "personal", "first_", "firs", "partial"]
)
def test_jobs_whose_names_are_alike_do_not_touch_each_others_files(small: Small, tmp_path: Path, other: str) -> None:
    kit = a_kit(tmp_path / "kit", small, result=True)

    def site(job: str) -> Installation:
        site = Installation(kit, read(kit / "site.toml", SiteFile), f"{job}-ab", kit / "job.toml")
        terms = Terms(
            name=job, seed=0, model="m", dtype="auto", digests={}, stages=(), secure=False, alone=False, clients=("ash",)
        )
        (site.folder / "personal").mkdir(parents=True)
        (site.folder / "personal" / "adapter").write_text(job)
        (site.folder / "agreed.json").write_text(terms.model_dump_json())
        return site

    def deliver(job: str, last: bool) -> None:
        content = torch.frombuffer(bytearray(job.encode()), dtype=torch.uint8)
        DeliverResult(file="model" if last else "config", last=last).respond_at({"bytes": content}, sites[job])

    sites = {job: site(job) for job in ("first", other)}
    for last in (False, True):  # both at once
        for job in sites:
            deliver(job, last)
    for job in sites:
        EndRun().respond_at({}, sites[job])
    for job in sites:
        assert {file.name: file.read_text() for file in (kit / "results" / job).iterdir()} == {"config": job, "model": job}
        assert {file.name: file.read_text() for file in (kit / "personal" / job).iterdir()} == {"adapter": job}


def test_a_held_out_text_replaces_no_other_jobs(small: Small, tmp_path: Path) -> None:
    config = submitted(small, tmp_path / "config", data=[{"name": "mine", "path": "0123456789abcdef.txt"}])
    (config / "texts" / "0123456789abcdef.txt").write_text("another text")
    (config / "texts" / "folder").mkdir()
    with pytest.raises(FedgroveError, match=r"evaluate\.data\.0\.path: no such file"):
        open_job(tmp_path, config, ServerFile(models={"m": small.model}))
    assert not (tmp_path / "texts").exists()
    good = text_name(config / "texts" / "0123456789abcdef.txt")
    (config / "texts" / good).write_text("another text")
    (config / "job.toml").write_text((config / "job.toml").read_text().replace("0123456789abcdef.txt", good))
    assert open_job(tmp_path, config, ServerFile(models={"m": small.model})).evaluate.data[0].path.name == good


def test_an_operator_fetches_no_path_of_the_server(small: Small, tmp_path: Path) -> None:
    config = submitted(small, tmp_path / "config")
    kit = tmp_path / "kit"
    kit.mkdir()
    job = open_job(kit, config, ServerFile(models={"m": small.model}))
    assert job.model.path == str(small.model)
    assert job.model.name == "m"
    run = kit / "runs" / "first"
    run.mkdir(parents=True)
    (run / "job.toml").write_text(job.dumps())
    _offer(run, tmp_path / "out", {"state": "ended"}, config / "job.toml")
    offered = (tmp_path / "out" / "job.toml").read_text()
    assert offered == (config / "job.toml").read_text()
    assert str(tmp_path) not in offered


# The size of a response


SPECS = [
    {}, {"a": ((), torch.float64)}, {"a": ((0,), torch.int8)},
    {"change/q": ((64, 96), torch.bfloat16), "weight/q": ((64, 96), torch.bool)},
    {f"change/{i}": ((3, 5), torch.float64) for i in range(300)}, {"x" * 300: ((1000,), torch.int64)},
]  # fmt: skip


@pytest.mark.parametrize("specs", SPECS, ids=len)
def test_no_valid_message_is_larger_than_its_bound(specs: dict[str, Any]) -> None:
    expected = {name: (torch.Size(shape), dtype) for name, (shape, dtype) in specs.items()}
    most = 0
    for density in (0.0, 0.5, 1.0):
        tensors = {}
        for name, (shape, dtype) in expected.items():
            noise = torch.randint(0, 256, (*shape, dtype.itemsize), generator=torch.Generator().manual_seed(len(name)))
            values = noise.to(torch.uint8).view(dtype).reshape(shape) if dtype != torch.bool else torch.rand(shape) < density
            tensors[name] = values if dtype == torch.bool else values * (torch.rand(shape) < density)
        tensors |= {name: tensors[name] * tensors[name.replace("change", "weight")] for name in tensors if name == "change/q"}
        most = max(most, len(wire.pack(tensors, {"request": "a" * 32})))
    bound = wire.largest(expected)
    assert most <= bound - strict_json.MAX_BYTES + 4096
    assert bound <= 2 * most + 1024 * len(specs) + strict_json.MAX_BYTES


class Flooding:
    """An engine of three clients, of which ash sends that many bytes."""

    def __init__(self, honest: bytes, size: int):
        self.honest, self.size, self.largest = honest, size, 0

    def clients(self) -> list[str]:
        return ["ash", "birch", "cedar"]

    def request(self, kind: str, messages: Any, timeout: float | None = None, largest: int | None = None) -> Iterator[Any]:
        assert largest is not None
        self.largest = largest
        for client in messages:
            _ = messages[client]
            yield client, bytes(self.size) if client == "ash" else self.honest, None


@pytest.mark.parametrize("more", [1, 2**20])
def test_a_response_that_is_too_large_is_refused_before_it_is_stored(small: Small, tmp_path: Path, more: int) -> None:
    request = KeepWeights(stage=0, part=0)
    engine = Flooding(wire.pack({}, {"request": request.digest}), wire.largest({}) + more)
    run = RunFolder(tmp_path / "run", load(small.job("flood", evaluate={}, rounds={"quorum": 2})))
    said: list[str] = []
    run.message = said.append  # type: ignore[method-assign]
    answers = list(collect(engine, run, dict.fromkeys(engine.clients(), RequestMessage(request))))
    run.close()
    assert [answer.client for answer in answers] == ["birch", "cedar"]
    assert said == [
        f"ash: its response was refused: it has more than the {wire.largest({}):,} bytes that were expected at most"
    ]
    assert engine.largest == wire.largest({})
    assert not (run.path / "work" / "inbox" / "ash").exists()


def test_a_local_client_sends_no_more_than_is_expected(small: Small, tmp_path: Path) -> None:
    job = load(small.job("local", evaluate={}))
    clients = local_clients(job, Checkpoint(small.model), tmp_path)
    request = DescribeYourself(calibrations=(), lengths=(LENGTH,))
    message = {"ash": wire.pack({}, {"request": request.model_dump(mode="json")})}
    ((_, response, _),) = LocalEngine(clients).request(request.KIND, message)
    assert response is not None
    ((_, fits, error),) = LocalEngine(clients).request(request.KIND, message, largest=len(response))
    assert (fits, error) == (response, None)
    ((_, none, error),) = LocalEngine(clients).request(request.KIND, message, largest=len(response) - 1)
    assert none is None
    assert error is not None
    assert "bytes that were expected at most" in error


@pytest.mark.parametrize("pieces", [[], [0], [10], [4, 6], [0, 0, 10], [11], [4, 7], [10**6] * 100])
def test_a_message_of_flare_is_read_up_to_its_bound(pieces: list[int]) -> None:
    read: list[int] = []

    class Piece:
        def __init__(self, size: int):
            self.size = size

        def materialize(self) -> torch.Tensor:
            read.append(self.size)
            return torch.zeros(self.size, dtype=torch.uint8)

    body = [Piece(size) for size in pieces]
    if sum(pieces) <= 10:
        assert bytes_of(body, 10) == bytes(sum(pieces))
        assert bytes_of(bytes(sum(pieces)), 10) == bytes(sum(pieces))
    else:
        with pytest.raises(OverflowError):
            bytes_of(body, 10)
        assert sum(read[:-1]) <= 10
        with pytest.raises(OverflowError):
            bytes_of(bytes(sum(pieces)), 10)
    result = Shareable()
    result.update({VERSION: error_codes.VERSION, NONCE: "n", BODY: bytes(11)})
    assert _read_flare(result, "n", 10) == (
        None, "its response was refused: it has more than the 10 bytes that were expected at most"
    )  # fmt: skip


# What a model's folder names


def a_model(small: Small, folder: Path, **config: Any) -> Path:
    shutil.copytree(small.model, folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **config}))
    return folder


@pytest.mark.parametrize("target", ["secret.json", "config.json", "license"])
@pytest.mark.parametrize("name", ["notes.json", "LICENSE", "vocab.txt", "chat_template.jinja", "README.md"])
def test_a_link_out_of_a_models_folder_is_refused_by_name(small: Small, tmp_path: Path, name: str, target: str) -> None:
    folder = a_model(small, tmp_path / "model")
    (tmp_path / target).write_text("{}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / target)
    with pytest.raises(FedgroveError, match=rf"{name} is a link to a file outside of the folder; copy the file there"):
        small_contents(folder)
    (folder / name).unlink()
    (folder / name).symlink_to("config.json")  # within the folder
    assert small_contents(folder)[name]


def test_links_of_the_hubs_cache_are_followed(small: Small, tmp_path: Path) -> None:
    cache = tmp_path / "models--a--b"
    snapshot = a_model(small, cache / "snapshots" / "0a1b")
    (cache / "blobs").mkdir()
    (snapshot / "tokenizer.json").rename(cache / "blobs" / "ff00")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/ff00")
    assert small_contents(snapshot)["tokenizer.json"]
    (snapshot / "notes.json").symlink_to(small.model / "config.json")
    with pytest.raises(FedgroveError, match=r"notes\.json is a link"):
        small_contents(snapshot)


KERNELS = [
    {"attn_implementation": "kernels-community/flash-attn"},
    {"_attn_implementation": "kernels-community/flash-attn3:flash_attn_varlen_func"},
    {"_attn_implementation_internal": "someone/evil@main"},
    {"attn_implementation": {"": "someone/evil", "text_config": "someone/evil"}},
    {"experts_implementation": "someone/evil"},
    {"text_config": {"attn_implementation": "someone/evil", "auto_map": {"AutoModel": "evil.Model"}}},
    {"attn_implementation": "paged|someone/evil"},
]


@pytest.mark.parametrize("config", KERNELS, ids=str)
def test_no_kernel_that_config_json_names_is_loaded_or_passed_on(small: Small, tmp_path: Path, config: dict[str, Any]) -> None:
    folder = a_model(small, tmp_path / "model", **config)
    assert b"someone/" not in small_contents(folder)["config.json"]
    assert b"kernels-community" not in small_contents(folder)["config.json"]
    assert not loads_as_it_is(folder)
    with plain_folder(folder) as plain:
        text = (plain / "config.json").read_text()
    assert "someone/" not in text
    assert "evil" not in text
    if "text_config" not in config:
        model = load_full_model(folder)
        assert model.config._attn_implementation in ATTENTIONS
        with suppress(FedgroveError):  # or it is refused in one line, which is as safe
            assert Decoder(Checkpoint(folder)).model.config._attn_implementation in ATTENTIONS


def test_a_sites_process_cleans_when_flare_ends_the_run(small: Small, tmp_path: Path) -> None:
    """However it ends: FLARE sends this event after a success, a failure and a stop."""
    kit = a_kit(tmp_path / "kit", small)
    run = a_run(kit / "work", "first-ab")
    workspace = SimpleNamespace(get_root_dir=lambda: str(kit))
    context = SimpleNamespace(get_engine=lambda: SimpleNamespace(get_workspace=lambda: workspace))
    executor = FedgroveExecutor()
    executor.handle_event(EventType.END_RUN, context)  # of a run that this process got no request of
    assert content(run) == HERE | STAYS
    executor._run = "first-ab"
    executor.handle_event(EventType.END_RUN, context)
    assert content(run) == STAYS | {"secure/records/ended.txt"}
