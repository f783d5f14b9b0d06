"""The site decides, the job asks; of an error nothing leaves but a code. Hardly any of this needs FLARE."""

from __future__ import annotations

import errno
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import BaseModel, ValidationError

from fedgrove.client.hidden_states import Calibration
from fedgrove.client.local_client import LocalClient
from fedgrove.client.serve import HARMLESS
from fedgrove.deploy.flare import files, ledger
from fedgrove.deploy.flare.doctor import clock, made, roster
from fedgrove.deploy.flare.exchanges.done import EndRun
from fedgrove.deploy.flare.exchanges.join import Joined, JoinRun
from fedgrove.deploy.flare.exchanges.result import CONTENT, DeliverResult
from fedgrove.deploy.flare.files import Allow, Federation, SiteFile
from fedgrove.deploy.flare.installation import SiteRequest
from fedgrove.deploy.flare.kits import _sign_roster
from fedgrove.deploy.flare.policy import Terms, check, refused_key
from fedgrove.deploy.flare.site import respond
from fedgrove.engines import error_codes
from fedgrove.engines.error_codes import Refusal
from fedgrove.errors import FedgroveError
from fedgrove.input_statistics.exchange import Noise, largest_per_client
from fedgrove.job.load import load_federated
from fedgrove.job.stage_config import Cut
from fedgrove.job.tables import KINDS
from fedgrove.job.units import Table
from fedgrove.models.digest import digests, first_difference
from fedgrove.models.stream import Checkpoint
from fedgrove.privacy.secagg.session import new_session
from fedgrove.rounds import wire
from fedgrove.rounds.capabilities import Capabilities
from fedgrove.rounds.exchanges.capabilities import DescribeYourself, Windows
from fedgrove.rounds.exchanges.secagg import Keys
from fedgrove.rounds.request import Request, Tensors, request_types
from fedgrove.stages.head.exchanges.guesses import SumGuesses
from fedgrove.stages.prune.calibration_pass import windows_at_once
from fedgrove.stages.prune.exchanges.alone import EvaluateAlone
from fedgrove.stages.prune.exchanges.block import PruneBlock
from fedgrove.stages.prune.exchanges.outliers import MeasureBlocks
from fedgrove.stages.prune.exchanges.statistics import SumInputs
from fedgrove.stages.prune.recipe import Recipe
from fedgrove.stages.structured.exchanges.blocks import ScoreBlocks
from fedgrove.stages.structured.exchanges.experts import ScoreExperts
from fedgrove.stages.structured.exchanges.inputs import SumInputs as RepairInputs
from fedgrove.stages.structured.exchanges.scores import ScoreGroups
from fedgrove.stages.tune.exchanges.base import KeepWeights
from fedgrove.stages.tune.exchanges.importance import ScoreLinears
from fedgrove.stages.tune.exchanges.personal import ComparePersonal
from fedgrove.stages.tune.exchanges.seeds import PERTURBATIONS, Measure, Step
from fedgrove.stages.tune.exchanges.train import Train
from fedgrove.stages.tune.fixed_point import ClientNoise, FixedPointChanges
from fedgrove.stages.tune.train_settings import Training, WindowNoise
from small import CLIENTS, Small, complaint, make_model

PRUNE = {"kind": "prune", "pruner": "wanda", "aggregation": "fedspallm", "sparsity": 0.5, "samples": 16, "length": 512}
SUMS = {**PRUNE, "aggregation": "pooled"}
PRIVATE = {**SUMS, "epsilon": 4.0}
TUNE = {"kind": "tune", "method": "fedpipe", "aggregation": "flexlora", "length": 512, "steps": 4}
STRUCTURED = {"kind": "structured", "samples": 16, "length": 512}
ADAPTERS = {"kind": "tune", "method": "lora", "rounds": 2, "steps": 4, "length": 512, "epsilon": 4.0}
SEEDS = {"kind": "tune", "method": "seeds", "rounds": 2, "steps": 4, "batches": [4], "length": 512}
BY_HAND = {**SEEDS, "learning_rate": 1e-3, "perturbation": 2**-9}
WHOLE = {**ADAPTERS, "aggregation": "ffa_lora", "precision": "fixed", "dp_unit": "client", "learning_rate": 1e-3}


def terms(*stages: dict[str, Any], **changes: Any) -> Terms:
    fields = {"name": "job", "seed": 0, "model": "m", "dtype": "auto", "digests": {}, "secure": False, "alone": False}
    return Terms.model_validate({**fields, "clients": ["ash", "birch", "cedar"], "stages": list(stages), **changes})


@pytest.mark.parametrize(
    ("allow", "wanted", "key"),
    [
        ({}, terms(PRUNE, TUNE), None),
        ({"stages": ("prune",)}, terms(PRUNE, TUNE), "allow.stages"),
        ({"methods": ("wanda", "fedspallm")}, terms(PRUNE), None),
        ({"methods": ("wanda", "fedspallm")}, terms(PRIVATE), "allow.methods"),
        ({"methods": ("wanda", "fedspallm")}, terms({**PRUNE, "allocation": "owl"}), "allow.methods"),
        ({"methods": ("diagonal_fisher",)}, terms(STRUCTURED), None),
        ({"methods": ("taylor",)}, terms(STRUCTURED), "allow.methods"),
        ({"methods": ("fedpipe", "lora", "sgd", "flexlora")}, terms(TUNE), None),
        ({"methods": ("uniform", "lora", "sgd", "flexlora")}, terms(TUNE), "allow.methods"),
        ({"group": 4}, terms(PRUNE), "allow.group"),
        ({"group": 3}, terms(PRUNE, clients=["ash", "ash", "ash"]), "allow.group"),
        ({"group": 3}, terms(PRUNE, {**TUNE, "clients": ["ash", "birch", "cedar"]}), None),
        ({"group": 3}, terms(PRUNE, {**TUNE, "clients": ["ash", "birch"]}), "allow.group"),
        ({"group": 3}, terms(PRUNE, {**TUNE, "clients": ["birch"]}), None),
        ({"secure": True}, terms(PRUNE), "allow.secure"),
        ({"secure": True}, terms(PRUNE, secure=True), None),
        ({"epsilon": 4.0}, terms(PRIVATE, secure=True), None),
        ({"epsilon": 4.0}, terms(PRIVATE), "allow.epsilon"),
        ({"epsilon": 2.0}, terms(PRIVATE, secure=True), "allow.epsilon"),
        ({"epsilon": 4.0}, terms(PRIVATE, PRIVATE, secure=True), "allow.epsilon"),
        ({"epsilon": 8.0}, terms(PRIVATE, PRIVATE, secure=True), None),
        ({"epsilon": 4.0, "delta": 1e-7}, terms(PRIVATE, secure=True), "allow.delta"),
        ({"epsilon": 4.0}, terms({**PRIVATE, "delta": 0.09}, secure=True), "allow.delta"),
        ({"epsilon": 4.0}, terms(ADAPTERS), None),
        ({"epsilon": 4.0}, terms(WHOLE), "allow.epsilon"),
        ({"epsilon": 4.0}, terms(WHOLE, secure=True), None),
        ({"epsilon": 2.0}, terms(PRUNE), "allow.epsilon"),
        ({"epsilon": 4.0}, terms({**PRUNE, "allocation": "owl"}), "allow.epsilon"),
        ({"epsilon": 4.0}, terms(PRIVATE, alone=True, secure=True), "allow.epsilon"),
        ({"alone": False}, terms(PRUNE, alone=True), "allow.alone"),
        ({"samples": 15}, terms(PRUNE), "allow.samples"),
        ({"samples": 15}, terms(STRUCTURED), "allow.samples"),
        ({"samples": 16}, terms(PRUNE, TUNE), None),
    ],
)
def test_a_job_beyond_what_a_site_allows_is_refused_by_the_key(allow: dict[str, Any], wanted: Terms, key: str | None) -> None:
    assert refused_key(Allow(**allow), wanted, "ash") == key


def test_a_stage_that_does_not_hold_together_is_no_terms() -> None:
    with pytest.raises(ValidationError, match="allocation: measuring blocks needs a second sum of each"):
        terms({**PRIVATE, "allocation": "owl"})
    with pytest.raises(ValidationError, match="no-such-kind"):
        terms({"kind": "no-such-kind"})


RECIPE = Recipe(pruner="wanda", damping="mean", sparsities=(0.5, 0.5), pattern=None, blocks=(0, 1))
AT_ONCE = windows_at_once(16, 512)
CALIBRATION = Calibration(stage=0, samples=16, length=512, seed="0/0", through=RECIPE.through, windows_per_run=AT_ONCE)
DENSE = Calibration(stage=2, samples=16, length=512, seed="0/2")
BLOCK = PruneBlock(stage=0, block=1, calibration=CALIBRATION, recipe=RECIPE, aggregation="fedspallm", max_weight_growth=8.0)
NOISE = Noise(norms={"x": 1.0}, inputs=4, skips_first=False, clients=2, epsilon=4.0, delta=1e-6)
SUM = SumInputs(
    stage=2,
    block=0,
    calibration=DENSE,
    consumers={"x": "x"},
    widths={"x": 8},
    products=(),
    mixed=False,
    moments=False,
    limit=largest_per_client(3),
)
GRADIENTS = Calibration(stage=0, samples=16, length=512, seed="0/0", through="gradients")
SCORES = ScoreGroups(stage=0, score="diagonal_fisher", limit=2**62 // 3, calibration=GRADIENTS)
INFLUENCE = ScoreBlocks(stage=0, span=1, calibration=GRADIENTS.model_copy(update={"through": "dense"}))
EXPERTS = ScoreExperts(stage=0, score="reap", limit=2**62 // 3, calibration=INFLUENCE.calibration)
REPAIR = RepairInputs(
    stage=0, block=0, calibration=INFLUENCE.calibration, consumers={"x": "x"}, widths={"x": 8}, products=("x",), moments=False,
    limit=largest_per_client(3),
)  # fmt: skip
OUTLIERS = MeasureBlocks(stage=2, allocation="owl", owl_m=5.0, owl_lambda=0.08, calibration=DENSE)
ALONE = EvaluateAlone(stage=0, texts={"held-0": 2}, prune=BLOCK.model_copy(update={"block": 0, "keep": True}))
TUNED = {"stage": 1, "parts": 0, "cut": None, "bits": 16, "length": 512, "seed": "0/1", "personal": 0.0}
TRAINING = Training(steps=4, batch=1, micro=1, learning_rate=1e-3, optimizer="adamw", max_grad_norm=1.0, proximal=0.0)
TRAIN = Train(
    **TUNED, parametrization="lora", trainer="sgd", shared_a=False, ranks={"x": 2}, scales={"x": 8.0}, masked=(),
    tokens=9, seen=0, dtype="bfloat16", training=TRAINING,
)  # fmt: skip
IMPORTANCE = ScoreLinears(**TUNED, tokens=9, steps=4, micro=1, learning_rate=1e-3, ranks=(2, 4, 8, 16, 32))
PERSONAL = ComparePersonal(**TUNED, parametrization="lora", masked=(), micro=1, base="m", title="t")
ALONG = {**TUNED, "stage": 0, "seed": "0/0", "bits": 32, "tokens": 9, "batch": 4, "clients": 3, "masked": ()}
STEP = Step(
    **ALONG,
    aggregation="common",
    trainer="zeroth_order",
    seeds=0,
    steps=4,
    seen=0,
    learning_rate=1e-3,
    perturbation=2**-9,
    says_loss=True,
)
MEASURE = Measure(**ALONG, perturbations=PERTURBATIONS, directions=8)
WINDOWS = WindowNoise(epsilon=4.0, delta=1e-6, noise=1.0, rounds=2, clip=1.0)
NUMBERS = FixedPointChanges(
    everything=3,
    most=2 * 4 * 16 * 512,
    widest={"x": 2},
    noise=ClientNoise(epsilon=4.0, delta=1e-6, clip=1.0, rounds=2, adders=2),
)


def changed(request: Any, **changes: Any) -> Any:
    """A request with other fields; ``calibration__length=1`` changes a field of a field."""
    fields = request.model_dump()
    for key, value in changes.items():
        *path, last = key.split("__")
        place = fields
        for step in path:
            place = place[step]
        place[last] = value.model_dump() if isinstance(value, BaseModel) else value
    return type(request).model_validate(fields)


def by_recipe(recipe: Recipe) -> PruneBlock:
    """The request to prune by this recipe."""
    block: PruneBlock = changed(BLOCK, recipe=recipe, calibration__through=recipe.through)
    return block


def dp_sgd(request: Train, **changes: Any) -> Any:
    return changed(request, stage=0, seed="0/0", trainer="dp_sgd", **changes)


def moved(request: Any, stage: int, **changes: Any) -> Any:
    return changed(request, stage=stage, calibration__stage=stage, calibration__seed=f"0/{stage}", **changes)


JOB = (PRUNE, TUNE, PRIVATE, SUMS)


@pytest.mark.parametrize(
    ("request_", "word"),
    [
        (BLOCK, None),
        (changed(BLOCK, block=0), None),
        (changed(BLOCK, keep=True), "keep"),
        (by_recipe(changed(RECIPE, sparsities=(0.5, 0.9))), "sparsities"),
        (changed(BLOCK, calibration__samples=15, calibration__windows_per_run=1), "samples"),
        (changed(BLOCK, calibration__samples=1, calibration__windows_per_run=1), "samples"),
        (changed(BLOCK, calibration__seed="1/0"), "seed"),
        (changed(BLOCK, recipe__pruner="sparsegpt"), "pruner"),
        (changed(BLOCK, aggregation="fedavg"), "aggregation"),
        (changed(BLOCK, aggregation="fedit"), "aggregation"),
        (changed(BLOCK, recipe__damping="each"), "damping"),
        (changed(BLOCK, recipe__pattern=(2, 4)), "pattern"),
        (changed(BLOCK, calibration__through="dense"), "source"),
        (changed(BLOCK, calibration__compute_dtype="bfloat16"), "compute_dtype"),
        (changed(BLOCK, max_weight_growth=9.0), "max_weight_growth"),
        (changed(BLOCK, round=1, calibration__round=1), "rounds"),
        (changed(BLOCK, calibration__length=1024), "length"),
        (changed(BLOCK, calibration__samples=17, calibration__windows_per_run=1), "samples"),
        (changed(BLOCK, calibration__stage=1), "stage"),
        (moved(BLOCK, 1), "kind"),
        (moved(BLOCK, 2), "kind"),
        (moved(BLOCK, 4), "stage"),
        (moved(SUM, 0), "kind"),
        (moved(SUM, 1), "kind"),
        (changed(SUM, noise=NOISE), None),
        (changed(SUM, noise=changed(NOISE, clients=4)), "noise"),
        (changed(SUM, noise=changed(NOISE, clients=10**6)), "noise"),
        (changed(SUM, noise=changed(NOISE, skips_first=True)), "epsilon"),
        (SUM, "epsilon"),
        (changed(SUM, noise=changed(NOISE, epsilon=4.1)), "epsilon"),
        (changed(SUM, noise=changed(NOISE, delta=1e-5)), "delta"),
        (changed(SUM, noise=NOISE, products=("x",)), "products"),
        (changed(SUM, noise=NOISE, moments=True), "moments"),
        (changed(SUM, noise=NOISE, calibration__length=1024), "length"),
        (changed(SUM, noise=NOISE, calibration__samples=17), "samples"),
        (changed(SUM, noise=NOISE, calibration__through="server/r"), "source"),
        (changed(SUM, noise=NOISE, calibration__compute_dtype="bfloat16"), "compute_dtype"),
        (moved(SUM, 3), None),
        (moved(SUM, 3, noise=NOISE), "epsilon"),
        (moved(OUTLIERS, 0), "allocation"),
        (moved(OUTLIERS, 2), "kind"),
        (SCORES, "kind"),
        (ALONE, "evaluate.alone"),
        (TRAIN, None),
        (changed(TRAIN, training__steps=32), None),  # max_steps is 8 times steps
        (changed(TRAIN, training__steps=33), "steps"),
        (changed(TRAIN, round=1000), "rounds"),
        (changed(TRAIN, parametrization="full"), "parametrization"),
        (changed(TRAIN, trainer="dp_sgd"), "trainer"),
        (changed(TRAIN, shared_a=True), "shared_a"),
        (changed(TRAIN, length=1024), "length"),
        (changed(TRAIN, personal=0.5), "personal"),
        (changed(TRAIN, stage=0), "kind"),
        (changed(TRAIN, stage=4), "stage"),
        (IMPORTANCE, None),
        (changed(IMPORTANCE, stage=0), "kind"),
        (changed(IMPORTANCE, length=1024), "length"),
        (PERSONAL, "rounds"),
        (changed(PERSONAL, round=10), "personal"),
        (changed(IMPORTANCE, round=1), "rounds"),
        (changed(IMPORTANCE, round=1000), "rounds"),
        (changed(IMPORTANCE, steps=5), "steps"),
        (KeepWeights(stage=1, part=0), None),
        (KeepWeights(stage=0, part=0), "kind"),
    ],
)
def test_a_request_that_the_job_does_not_hold_is_refused(request_: Request, word: str | None) -> None:
    assert refusal(Allow(), terms(*JOB), request_) == (None if word is None else ("terms", word))


@pytest.mark.parametrize(
    ("stage", "request_", "word"),
    [
        ({**PRUNE, "pattern": "2:4", "sparsity": None}, BLOCK, "pattern"),
        ({**PRUNE, "pattern": "2:4", "sparsity": None}, by_recipe(changed(RECIPE, pattern=(2, 4))), None),
        ({**PRUNE, "source": "dense"}, changed(BLOCK, calibration__through="dense"), None),
        ({**PRUNE, "rounds": 2}, changed(BLOCK, round=1, calibration__round=1), None),
        ({**PRUNE, "rounds": 2}, changed(BLOCK, round=1), "round"),
        ({**PRUNE, "mend": "dsnot"}, moved(SUM, 0, moments=True), None),
        ({**PRUNE, "mend": "dsnot"}, moved(SUM, 0), "moments"),
        ({**PRUNE, "mend": "dsnot"}, moved(SUM, 0, moments=True, products=("x",)), "products"),
        (PRUNE, moved(SUM, 0, moments=True), "kind"),
        ({**PRUNE, "allocation": "owl"}, moved(OUTLIERS, 0), None),
        ({**PRUNE, "allocation": "owl"}, moved(OUTLIERS, 0, owl_m=3.0), "owl_m"),
        ({**PRUNE, "allocation": "owl"}, moved(OUTLIERS, 0, allocation="even"), "allocation"),
        ({**PRUNE, "allocation": "owl"}, moved(OUTLIERS, 0, calibration__length=8), "length"),
        ({**SUMS, "pruner": "sparsegpt"}, moved(SUM, 0, products=("x",)), None),
        ({**SUMS, "pruner": "sparsegpt", "source": "sequential"}, moved(SUM, 0, calibration__through="server/r"), None),
        ({**SUMS, "pruner": "sparsegpt", "mixed": True}, moved(SUM, 0, mixed=True), None),
        ({**SUMS, "pruner": "sparsegpt", "mixed": True}, moved(SUM, 0), "mixed"),
        ({**SUMS, "pruner": "dsnot"}, moved(SUM, 0, moments=True), None),
        ({**SUMS, "protect_first_block": True}, moved(SUM, 0), "protect_first_block"),
        ({**SUMS, "protect_first_block": True}, moved(SUM, 0, block=1), None),
        (STRUCTURED, SCORES, None),
        (STRUCTURED, changed(SCORES, score="taylor"), "score"),
        (STRUCTURED, changed(SCORES, calibration__samples=17), "samples"),
        (STRUCTURED, moved(OUTLIERS, 0), "kind"),
        (STRUCTURED, REPAIR, None),
        ({**STRUCTURED, "repair": False}, REPAIR, "repair"),
        ({**STRUCTURED, "depth": 0.5}, REPAIR, "repair"),
        (STRUCTURED, changed(REPAIR, products=()), "products"),
        (STRUCTURED, changed(REPAIR, limit=7), "limit"),
        (STRUCTURED, changed(REPAIR, noise=NOISE), "epsilon"),
        (STRUCTURED, changed(REPAIR, calibration__through="server/r"), "source"),
        (STRUCTURED, INFLUENCE, "depth"),
        ({**STRUCTURED, "depth": 0.5}, INFLUENCE, None),
        ({**STRUCTURED, "depth": 0.5}, SCORES, "score"),
        ({**STRUCTURED, "depth": 0.5}, changed(INFLUENCE, span=2), "span"),
        ({**STRUCTURED, "depth": 0.5, "contiguous": True}, changed(INFLUENCE, span=2), None),
        ({**STRUCTURED, "depth": 0.5}, changed(INFLUENCE, calibration__through="gradients"), "source"),
        (STRUCTURED, EXPERTS, "experts"),
        ({**STRUCTURED, "experts": 0.5}, EXPERTS, None),
        ({**STRUCTURED, "experts": 0.5}, SCORES, "score"),
        ({**STRUCTURED, "experts": 0.5}, changed(EXPERTS, score="frequency"), "expert_score"),
        ({**STRUCTURED, "experts": 0.5}, changed(EXPERTS, limit=7), "limit"),
        ({**STRUCTURED, "experts": 0.5}, changed(EXPERTS, calibration__through="gradients"), "source"),
        (ADAPTERS, dp_sgd(TRAIN, windows=WINDOWS), None),
        (ADAPTERS, dp_sgd(TRAIN), "epsilon"),
        (ADAPTERS, dp_sgd(TRAIN, windows=changed(WINDOWS, epsilon=4.1)), "epsilon"),
        (ADAPTERS, dp_sgd(TRAIN, windows=changed(WINDOWS, delta=1e-5)), "epsilon"),
        (ADAPTERS, dp_sgd(TRAIN, windows=changed(WINDOWS, rounds=1)), "epsilon"),
        (ADAPTERS, dp_sgd(TRAIN, windows=changed(WINDOWS, clip=2.0)), "epsilon"),
        (ADAPTERS, changed(IMPORTANCE, stage=0), "epsilon"),
        (SEEDS, STEP, None),
        (SEEDS, changed(STEP, learning_rate=0.5, perturbation=2**-6), None),
        (SEEDS, changed(STEP, perturbation=0.1), "perturbation"),
        (SEEDS, changed(STEP, batch=13), "batches"),
        (SEEDS, changed(STEP, trainer="directional"), "trainer"),
        ({**SEEDS, "trainer": "directional"}, changed(STEP, trainer="directional", perturbation=2**-9), None),
        ({**SEEDS, "trainer": "directional"}, STEP, None),
        ({**SEEDS, "trainer": "directional"}, changed(STEP, trainer="dp_zeroth_order"), "trainer"),
        (SEEDS, changed(STEP, rank=8), "ranks"),
        ({**SEEDS, "method": "adapter_seeds"}, changed(STEP, perturbation=2**-5), "ranks"),
        ({**SEEDS, "method": "adapter_seeds"}, changed(STEP, rank=8, perturbation=2**-5), None),
        ({**SEEDS, "method": "adapter_seeds"}, changed(STEP, rank=8, bits=4, perturbation=2**-5), "bits"),
        ({**SEEDS, "method": "adapter_seeds", "bits": [4]}, changed(STEP, rank=8, bits=4, perturbation=2**-5), None),
        (SEEDS, changed(STEP, clients=4), "clients"),
        (SEEDS, changed(STEP, seen=1), "seen"),
        (SEEDS, changed(STEP, says_loss=False), "says_loss"),
        (SEEDS, changed(STEP, steps=5), "steps"),
        (SEEDS, changed(STEP, bits=16), "bits"),
        (SEEDS, changed(STEP, windows=WINDOWS), "epsilon"),
        (SEEDS, changed(STEP, fixed=NUMBERS), "fixed"),
        (SEEDS, changed(TRAIN, stage=0, seed="0/0"), "parametrization"),
        (SEEDS, MEASURE, None),
        (SEEDS, changed(MEASURE, round=1), "rounds"),
        (SEEDS, changed(MEASURE, directions=64), "directions"),
        (SEEDS, changed(MEASURE, perturbations=(0.5,)), "perturbations"),
        ({**SEEDS, "rounds": 6}, changed(MEASURE, round=5, perturbations=(2**-7,)), None),
        ({**SEEDS, "rounds": 6}, changed(MEASURE, round=5, perturbations=(0.5,)), "perturbations"),
        ({**SEEDS, "rounds": 6}, changed(MEASURE, round=5), "perturbations"),
        (BY_HAND, STEP, None),
        (BY_HAND, changed(STEP, learning_rate=2e-3), "learning_rate"),
        (BY_HAND, changed(STEP, perturbation=2e-3), "perturbation"),
        (BY_HAND, MEASURE, "learning_rate"),
        ({**BY_HAND, "epsilon": 4.0}, changed(STEP, trainer="dp_zeroth_order", says_loss=False, windows=WINDOWS), None),
        ({**BY_HAND, "epsilon": 4.0}, changed(STEP, trainer="dp_zeroth_order", says_loss=False), "epsilon"),
        ({**BY_HAND, "epsilon": 4.0}, MEASURE, "epsilon"),
    ],
)
def test_what_a_stage_may_ask_for_depends_on_its_table(stage: dict[str, Any], request_: Request, word: str | None) -> None:
    table = {key: value for key, value in stage.items() if value is not None}
    assert refusal(Allow(), terms(table), request_) == (None if word is None else ("terms", word))


@pytest.mark.parametrize(
    ("stage", "changes", "word"),
    [
        ({}, {"cut": Cut(0.25, 0.25, 0.0)}, None),
        ({}, {}, "cut"),
        ({}, {"cut": Cut(0.5, 0.25, 0.0)}, "cut"),
        ({}, {"cut": Cut(0.25, 0.25, 0.0), "kept_blocks": (0,)}, "kept_blocks"),
        ({"depth": 0.5}, {"cut": Cut(0.0, 0.0, 0.5), "kept_blocks": (0,)}, None),
        ({"depth": 0.5}, {"cut": Cut(0.0, 0.0, 0.5)}, "kept_blocks"),
        ({"depth": 0.5}, {"cut": Cut(0.0, 0.0, 0.75), "kept_blocks": (0,)}, "cut"),
    ],
)
def test_a_model_that_the_job_does_not_cut_so_is_not_tuned(stage: dict[str, Any], changes: Any, word: str | None) -> None:
    job = terms({**STRUCTURED, **stage}, TUNE)
    assert refusal(Allow(), job, changed(TRAIN, **changes)) == (None if word is None else ("terms", word))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"fixed": NUMBERS}, None),
        ({"fixed": changed(NUMBERS, noise__adders=4)}, "noise"),
        ({"fixed": changed(NUMBERS, noise__adders=0)}, "noise"),
        ({"fixed": changed(NUMBERS, noise=None, everything=27)}, "epsilon"),
        ({"fixed": changed(NUMBERS, everything=4)}, "noise"),
        ({"fixed": NUMBERS, "windows": WINDOWS}, "epsilon"),
        ({"fixed": None}, "fixed"),
    ],
)
def test_noise_of_clients_under_secure_aggregation_is_that_of_the_job(changes: dict[str, Any], word: str | None) -> None:
    request = changed(TRAIN, stage=0, seed="0/0", shared_a=True, dtype="float32", **changes)
    assert refusal(Allow(), terms(WHOLE, secure=True), request, summed=3) == (None if word is None else ("terms", word))


HEAD = {"kind": "head", "labels": ["bird", "fish"], "length": 8, "guesses": 2}
OF_HEADS: dict[str, Any] = {
    "stage": 0, "head": "ridge", "labels": ("bird", "fish"), "layers": (-1,), "pool": "mean", "length": 8, "size": None,
    "seed": "0/0", "personal": 0.0, "guesses": 2, "limit": 2**30,
}  # fmt: skip
GUESS = SumGuesses(**OF_HEADS, exchange=2, classes=("bird", "fish"))


@pytest.mark.parametrize(
    ("request_", "word"),
    [
        (GUESS, None),
        (changed(GUESS, exchange=3), "guesses"),
        (changed(GUESS, guesses=0), "guesses"),
        (changed(GUESS, classes=("bird", "stone")), "labels"),
        (changed(GUESS, classes=("bird", "bird")), "labels"),
        (changed(GUESS, length=9), "length"),
        (changed(GUESS, limit=5), "limit"),
    ],
)
def test_labels_are_guessed_as_the_job_says(request_: Request, word: str | None) -> None:
    assert refusal(Allow(), terms(HEAD), request_) == (None if word is None else ("terms", word))
    assert refusal(Allow(), terms({**HEAD, "guesses": 0}), request_) == ("terms", "guesses")


def test_what_a_client_has_alone_is_told_only_where_the_job_says_so() -> None:
    assert refusal(Allow(), terms(PRUNE, alone=True), ALONE) is None
    assert refusal(Allow(), terms(PRUNE, alone=True), changed(ALONE, prune__recipe__pruner="magnitude")) == ("terms", "pruner")
    assert refusal(Allow(), terms(PRUNE, alone=True), changed(ALONE, prune__calibration__length=8)) == ("terms", "length")
    assert refusal(Allow(), terms(PRUNE, PRUNE, alone=True), changed(ALONE, prune__stage=1)) == ("terms", "stage")
    assert refusal(Allow(alone=False), terms(PRUNE, alone=True), ALONE) == ("refused", "allow.alone")
    recipe = changed(RECIPE, damping="each")
    pooled = changed(ALONE.prune, aggregation="pooled", recipe=recipe, calibration__through="dense", max_weight_growth=None)
    assert refusal(Allow(), terms(SUMS, alone=True), changed(ALONE, prune=pooled)) is None


def test_a_site_that_became_stricter_refuses_what_it_agreed_to() -> None:
    assert refusal(Allow(samples=15), terms(PRUNE), BLOCK) == ("refused", "allow.samples")
    assert refusal(Allow(stages=("tune",)), terms(PRUNE), BLOCK) == ("refused", "allow.stages")
    assert refusal(Allow(secure=True), terms(PRUNE), BLOCK) == ("refused", "allow.secure")


def test_a_site_works_in_the_stages_that_it_is_named_for() -> None:
    assert refusal(Allow(), terms({**PRUNE, "clients": ["ash", "birch"]}), BLOCK) is None
    assert refusal(Allow(), terms({**PRUNE, "clients": ["birch"]}), BLOCK) == ("terms", "clients")
    others = terms(TUNE, {**TUNE, "length": 16, "clients": ["birch"]})
    assert refusal(Allow(), others, DescribeYourself(calibrations=(), lengths=(512,))) is None
    assert refusal(Allow(), others, DescribeYourself(calibrations=(), lengths=(512, 16))) == ("terms", "lengths")
    two = {**HEAD, "clients": ["ash", "birch"]}
    assert refusal(Allow(), terms(two), changed(GUESS, limit=2**30 // 2)) is None
    assert refusal(Allow(), terms(two), changed(GUESS, limit=2**30 // 3)) == ("terms", "limit")


def test_what_holds_no_text_is_answered_in_every_job() -> None:
    assert refusal(Allow(), terms(TUNE), DescribeYourself(calibrations=(), lengths=(512,))) is None
    assert refusal(Allow(), terms(TUNE), DescribeYourself(calibrations=(), lengths=(16,))) == ("terms", "lengths")
    session = new_session(["ash", "birch", "cedar"], 64)
    assert refusal(Allow(), terms(TUNE, secure=True), Keys(stage=0, session=session)) is None
    assert refusal(Allow(), terms(TUNE, secure=True), Keys(stage=9, session=session)) == ("terms", "stage")
    assert refusal(Allow(), terms(TUNE), Keys(stage=0, session=session)) == ("terms", "session")
    others = new_session(["ash", "birch", "zed"], 64)
    assert refusal(Allow(), terms(TUNE, secure=True), Keys(stage=0, session=others)) == ("terms", "session")


def test_under_secure_aggregation_no_client_leaves_its_noise_to_the_server(tmp_path: Path) -> None:
    secret: Any = object()
    client = LocalClient("ash", tmp_path, tmp_path, None, (), None, credentials=secret)
    numbers = changed(NUMBERS, noise=changed(NUMBERS.noise, adders=0))
    with pytest.raises(FedgroveError, match="clients add the noise"):
        changed(TRAIN, fixed=numbers).respond({}, client, "cpu")


def refusal(allow: Allow, agreed: Terms, request: Request, summed: int | None = None) -> tuple[str, str] | None:
    try:
        check(allow, agreed, request, "ash", summed)
    except Refusal as error:
        return error.code, error.word
    return None


def test_every_request_belongs_to_a_stage_or_holds_no_text() -> None:
    for kind in request_types():
        if kind.KIND.partition("/")[0] in KINDS:
            assert kind.beyond is not Request.beyond or not kind.DISCLOSES, f"{kind.KIND}: say what a job allows"
        else:
            assert issubclass(kind, SiteRequest) or kind.DISCLOSES <= HARMLESS, f"{kind.KIND}: a site would refuse it"


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RuntimeError("secret"), "RuntimeError in its handler; the trace is in its own log/site.log"),
        (FedgroveError("/secret/notes.txt: too short"), "FedgroveError in its handler"),
        (OSError(errno.ENOSPC, "full", "/secret"), "its disk is full"),
        (RuntimeError("secret: can't allocate memory"), "out of memory"),
        (MemoryError("secret"), "out of memory"),
        (Refusal("model", "block-0007"), "its model differs from the job's at block-0007"),
        (type("Sec ret\n", (Exception,), {})(), "Secret in its handler"),
    ],
)
def test_the_text_of_an_exception_stays_at_the_site(error: Exception, says: str) -> None:
    code = error_codes.encode_exception(error)
    assert "secret" not in code
    assert says in error_codes.message(code)


@pytest.mark.parametrize("sent", [None, "", "error", "error a b c", "unknown Error", "error Err{word}", "error E\nx"])
def test_what_is_no_code_of_ours_is_not_shown(sent: str | None) -> None:
    assert error_codes.message(sent) == "it sent an error that is not one of fedgrove's"


class Context:
    """What FLARE hands an executor, as far as it is looked at."""

    def __init__(self, kit: Path):
        self._kit = kit

    def get_engine(self) -> Context:
        return self

    get_workspace = get_engine

    def get_root_dir(self) -> str:
        return str(self._kit)


def test_an_exception_of_the_executor_is_in_the_sites_log_and_a_code_is_the_response(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("nvflare")
    from nvflare.apis.event_type import EventType
    from nvflare.apis.shareable import Shareable

    from fedgrove.deploy.flare import executor

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("cannot start /secret")

    monkeypatch.setattr(executor, "Worker", fail)
    one, context, log = executor.FedgroveExecutor(), Context(tmp_path), tmp_path / "log" / "site.log"
    one.handle_event(EventType.ABOUT_TO_START_RUN, context)
    assert "RuntimeError: cannot start /secret" in log.read_text(encoding="utf-8")
    log.unlink()

    request = Shareable()
    request.update({"nonce": "n", "version": error_codes.VERSION, "kind": "deploy/done", "run": "r", "seconds": 1, "body": b""})
    reply = one.execute("fedgrove", request, context, None)
    assert (reply["nonce"], reply["error"]) == ("n", "error RuntimeError")
    assert "body" not in reply
    assert "secret" not in str(dict(reply))
    trace = log.read_text(encoding="utf-8")
    assert "Traceback" in trace
    assert "RuntimeError: cannot start /secret" in trace

    (tmp_path / "log").rename(tmp_path / "elsewhere")
    (tmp_path / "log").write_text("a file where the folder was")
    assert one.execute("fedgrove", request, context, None)["error"] == "error RuntimeError", "a log that fails changes nothing"


def test_the_first_block_in_which_two_models_differ_is_named(small: Small, tmp_path: Path) -> None:
    mine = digests(Checkpoint(small.model), tmp_path / "digests.json")
    assert digests(Checkpoint(small.model), tmp_path / "digests.json") == mine
    assert sorted(mine) == ["block-0000", "block-0001", "ends", "tokenizer"]
    assert first_difference(mine, mine) is None
    other = digests(Checkpoint(make_model(tmp_path / "other", seed=1)))
    assert first_difference(mine, other) == "block-0000"
    assert first_difference(mine, {**mine, "tokenizer": "0"}) == "tokenizer"


def message(request: Request, tensors: Tensors | None = None) -> bytes:
    return wire.pack(tensors or {}, {"request": request.model_dump(mode="json")})


def send(kit: Path, request: Request, tensors: Tensors | None = None, run: str = "run") -> tuple[bytes | None, str | None]:
    return respond(kit, run, request.KIND, message(request, tensors), kit / "job.toml")


def sign(kit: Path, *stages: dict[str, Any], **changes: Any) -> Path:
    """The job that FLARE brings to a site after it has checked the operator's signature."""
    tables = {"name": "job", "model": {"path": "m"}, "clients": [{"name": name} for name in CLIENTS], "stages": list(stages)}
    (kit / "job.toml").write_text(tomli_w.dumps({**tables, **changes}), encoding="utf-8")
    return kit


def make_site(kit: Path, small: Small, **settings: str) -> Path:
    (kit / "startup").mkdir(parents=True)
    (kit / "startup" / "fed_client.json").write_text(json.dumps({"client": {"fqsn": "ash"}}))
    lines = [f'data = "{small.texts["ash"]}"', *(f"{key} = {value}" for key, value in settings.items())]
    (kit / "site.toml").write_text("\n".join([*lines, "[models]", f'm = "{small.model}"', ""]))
    return kit


def test_a_site_that_did_not_agree_answers_nothing(small: Small, tmp_path: Path) -> None:
    request = DescribeYourself(calibrations=(), lengths=())
    assert send(tmp_path, request) == (None, "site-file Refusal")
    make_site(tmp_path, small)
    assert send(tmp_path, request) == (None, "joined Refusal")
    assert send(tmp_path, request, run="../run") == (None, "terms Refusal run")
    assert send(tmp_path, EndRun()) == (None, "joined Refusal")
    assert send(tmp_path, DeliverResult(file="x", last=True), {CONTENT: torch.zeros(1, dtype=torch.uint8)}) == (
        None,
        "joined Refusal",
    )


def test_a_site_joins_answers_takes_the_result_and_clears_its_files(small: Small, tmp_path: Path) -> None:
    site = make_site(tmp_path, small, result="true", speed='"measure"')
    sign(site, {**PRUNE, "samples": 3, "length": 16})
    join = JoinRun(digests=digests(Checkpoint(small.model)), clock=time.time())
    response, error = send(site, join)
    assert response, error
    reply = wire.unpack(response)[1]
    assert reply.pop("request") == join.digest
    joined = Joined.model_validate(reply)
    assert (joined.result, joined.capabilities.speed) == (True, "measure")

    windows = Windows(samples=3, length=16, seed="0/0")
    response, error = send(site, DescribeYourself(calibrations=(windows,), lengths=()))
    assert response, error
    reply = wire.unpack(response)[1]
    reply.pop("request")
    assert Capabilities.model_validate(reply).tokens == {}

    calibration = changed(CALIBRATION, samples=3, length=16, windows_per_run=3)
    block = changed(BLOCK, block=0, calibration=calibration)
    response, error = send(site, block)
    assert response, error
    assert wire.unpack(response)[1]["request"] == block.digest
    assert send(site, changed(block, aggregation="fedavg")) == (None, "terms Refusal aggregation")
    assert send(site, moved(block, 1)) == (None, "terms Refusal stage")

    for name in ("a.bin", "b.bin"):
        request = DeliverResult(file=name, last=name == "b.bin")
        assert send(site, request, {CONTENT: torch.tensor([1, 2], dtype=torch.uint8)})[1] is None
    assert sorted(file.name for file in (site / "results" / "job").iterdir()) == ["a.bin", "b.bin"]
    assert send(site, DeliverResult(file="c.bin", last=False)) == (None, "terms Refusal bytes")
    assert (site / "work" / "run").is_dir()
    assert send(site, EndRun())[1] is None
    assert not (site / "work" / "run").exists()


def test_a_site_believes_the_signed_job_and_not_what_the_server_says(small: Small, tmp_path: Path) -> None:
    site = make_site(tmp_path, small)
    join = JoinRun(digests=digests(Checkpoint(small.model)), clock=time.time())
    assert send(site, join) == (None, "terms Refusal job"), "no job came with the run"
    (site / "job.toml").write_text('name = "job"\nstages = []\n')
    assert send(site, join) == (None, "terms Refusal job"), "every check of a job file holds here, too"
    sign(site, PRUNE)
    assert send(site, join)[1] is None
    assert send(site, join)[1] is None, "a run that goes on joins again"
    others = (([SUMS], {}), ([{**PRUNE, "samples": 99}], {}), ([PRUNE], {"seed": 1}), ([PRUNE, TUNE], {}))
    for number, (stages, changes) in enumerate(others):
        sign(site, *stages, **changes)
        assert send(site, join) == (None, "terms Refusal job"), "a run cannot be joined again with another job"
        assert send(site, join, run=f"run-{number}")[1] is None
    sign(site, PRUNE)
    assert send(site, changed(join, digests={}), run="other") == (None, "model Refusal block-0000")


def test_a_site_counts_what_it_spends_over_all_runs(small: Small, tmp_path: Path) -> None:
    site = make_site(tmp_path, small)
    with (site / "site.toml").open("a") as file:
        file.write("[allow]\nbudget = 9.0\n")
    join = JoinRun(digests=digests(Checkpoint(small.model)), clock=time.time())

    def joined(run: str, *stages: dict[str, Any], **changes: Any) -> str | None:
        return send(sign(site, *stages, **changes), join, run=run)[1]

    assert joined("one", ADAPTERS, evaluate={"alone": False}) is None
    assert joined("two", ADAPTERS, evaluate={"alone": False}) is None, "the same job costs nothing more"
    assert joined("three", ADAPTERS, evaluate={"alone": False}, name="again") is None
    assert joined("four", ADAPTERS, evaluate={"alone": False}, name="third") == "refused Refusal allow.budget"
    assert joined("five", PRUNE) == "refused Refusal allow.budget", "a job without noise has no end of epsilon"
    assert sum(ledger.spent(site).values()) == 8.0


NAMES = ("ash", "birch", "cedar")


def sign_roster(folder: Path, *names: str) -> dict[str, Any]:
    """What the operator does when sites come and go; the roster as it is now."""
    kits = {name: folder / name for name in (*names, "a@b.org")}
    people = {"sites": [{"name": name} for name in names], "operators": [{"name": "a@b.org"}]}
    for kit in (folder / "authority", *kits.values()):
        kit.mkdir(parents=True, exist_ok=True)
    _sign_roster(Federation.model_validate({"name": "wards", **people}), folder / "authority", kits)
    texts = {kit / "roster.json" if "@" in name else kit / "secure" / "roster.json" for name, kit in kits.items()}
    (text,) = {file.read_text() for file in texts}
    roster: dict[str, Any] = json.loads(text)
    return roster


def test_rosters_have_numbers_and_dates(tmp_path: Path) -> None:
    first = sign_roster(tmp_path, *NAMES, "dogwood")
    assert (first["number"], first["date"]) == (1, f"{datetime.now(UTC):%Y-%m-%d}")
    assert sign_roster(tmp_path, *NAMES, "dogwood") == first, "the same roster is not numbered anew"
    second = sign_roster(tmp_path, *NAMES)
    assert second["number"] == 2
    assert set(second["clients"]) == set(NAMES)
    assert sign_roster(tmp_path, *NAMES, "dogwood")["number"] == 3


def test_the_roster_of_a_removed_site_is_refused(small: Small, tmp_path: Path) -> None:
    """The job that the operator signed names the roster; a site takes part with that one only, and never goes back."""
    site = make_site(tmp_path / "ash", small)
    join = JoinRun(digests=digests(Checkpoint(small.model)), clock=time.time())
    secure = {"privacy": {"secure_aggregation": True, "min_group": 2}, "evaluate": {"alone": False}}

    def joined(run: str, roster: int) -> str | None:
        return send(sign(site, PRUNE, roster=roster, **secure), join, run=run)[1]

    sign_roster(tmp_path, *NAMES, "dogwood")
    old = {name: (site / "secure" / name).read_bytes() for name in ("roster.json", "roster.sig")}
    assert joined("one", 1) is None
    assert joined("two", 0) == "roster Refusal 1", "the job names no roster"
    sign_roster(tmp_path, *NAMES)
    assert joined("three", 1) == "roster Refusal 2", "an older job, whose roster has the removed site"
    assert joined("four", 2) is None
    for name, content in old.items():
        (site / "secure" / name).write_bytes(content)
    assert joined("five", 2) == "roster Refusal 1", "this site was not given the newest roster"
    assert joined("six", 1) == "roster Refusal 1", "nor does it go back, for an older job either"
    assert "its roster is number 1, not the job's" in error_codes.message("roster Refusal 1")


def test_doctor_names_a_kit_and_a_roster_of_an_earlier_version(small: Small, tmp_path: Path) -> None:
    site = make_site(tmp_path / "ash", small)
    assert "it was made by an earlier version" in made(site).text
    (site / "kit.json").write_text('{"form": 1, "fedgrove": "0.0.9"}')
    assert "made by fedgrove 0.0.9, whose kits are of another form" in made(site).text
    (site / "kit.json").write_text('{"form": 2, "fedgrove": "0.1.0"}')
    assert made(site).ok
    sign_roster(tmp_path, *NAMES)
    check = roster(site)
    assert (check.ok, check.text.startswith("number 1 of 20")) == (True, True), check
    signing = Ed25519PrivateKey.from_private_bytes(bytes.fromhex((tmp_path / "authority" / "operator.key").read_text()))
    facts = json.loads((site / "secure" / "roster.json").read_text())
    del facts["number"]
    (site / "secure" / "roster.json").write_text(json.dumps(facts))
    (site / "secure" / "roster.sig").write_text(signing.sign(json.dumps(facts).encode()).hex())
    assert "it has no number" in roster(site).text


@pytest.mark.parametrize(
    ("kind", "fields", "code"),
    [
        ("prune/block", {}, "terms Refusal stage"),
        ("prune/block", {**BLOCK.model_dump(mode="json"), "stage": True}, "terms Refusal stage"),
        ("prune/block", {**BLOCK.model_dump(mode="json"), "stage": -1}, "terms Refusal stage"),
        ("prune/block", {**BLOCK.model_dump(mode="json"), "command": "rm"}, "terms Refusal command"),
        ("prune/block", None, "terms Refusal"),
        ("prune/nothing", {}, "terms Refusal kind"),
        ("../secret", {}, "terms Refusal kind"),
        ("deploy/result", {"file": "../x", "last": True}, "terms Refusal file"),
        ("deploy/join", {"digests": {"ends": 7}, "clock": 0}, "terms Refusal digests.ends"),
        ("deploy/join", {"digests": {}, "clock": 0, "terms": {"secure": False}}, "terms Refusal terms"),
    ],
)
def test_what_is_no_request_is_refused_by_the_field(kind: str, fields: object, code: str, small: Small, tmp_path: Path) -> None:
    site = make_site(tmp_path, small)
    assert respond(site, "run", kind, wire.pack({}, {"request": fields}), site / "job.toml") == (None, code)
    assert respond(site, "run", kind, b"noise", site / "job.toml") == (None, "error WireError")


@pytest.mark.parametrize(
    ("behind", "ok", "says"),
    [
        (0, True, "agreed with the server's when a job"),
        (7200, False, "120 minutes behind the"),
        (-7200, False, "120 minutes ahead of the"),
    ],
)
def test_a_clock_that_is_wrong_is_seen_when_a_job_is_asked_for(
    behind: int, ok: bool, says: str, small: Small, tmp_path: Path
) -> None:
    assert "not known before the first job" in clock(tmp_path, datetime.now(UTC)).text
    (tmp_path / "site.toml").write_text(f'data = "{small.texts["ash"]}"\n[models]\n')
    send(tmp_path, JoinRun(digests={}, clock=time.time() + behind))
    check = clock(tmp_path, datetime.now(UTC))
    assert (check.ok, check.text.startswith(says)) == (ok, True), check


@pytest.mark.parametrize(
    ("text", "kind", "says"),
    [
        ('name = "f"\nsites = []\noperators = []', Federation, "sites: "),
        (
            'name = "f"\n[[sites]]\nname = "a"\n[[sites]]\nname = "A"\n[[operators]]\nname = "a@b.org"',
            Federation,
            "is given twice",
        ),
        ('name = "f"\n[[sites]]\nname = "a/b"\n[[operators]]\nname = "a@b.org"', Federation, "sites.0.name"),
        ("data = []\n[models]", SiteFile, "data: write where this site's text is"),
        ('data = "nowhere.txt"\n[models]', SiteFile, "data.0: no such file"),
        ("data = []\n[models]\n[allow]\nsecret = 1", SiteFile, "write where this site"),
        ('stages = ["prun"]', Allow, "stages.0: choose one of head, prompt, prune, structured, tune"),
    ],
)
def test_a_mistake_in_a_file_is_named_by_its_key(text: str, kind: type[Table], says: str, tmp_path: Path) -> None:
    (tmp_path / "file.toml").write_text(text)
    with pytest.raises(FedgroveError, match=says):
        files.read(tmp_path / "file.toml", kind)


def test_a_job_for_a_federation_names_sites_and_nothing_of_theirs(small: Small) -> None:
    job = load_federated(small.job(clients=None, model__path="any-name"), sites=["ash", "birch"])
    assert [client.name for client in job.clients] == ["ash", "birch"]
    assert job.model.path == "any-name"
    with pytest.raises(FedgroveError, match=r"clients\.0\.data: in a federation each site sets this in its own file"):
        load_federated(small.job(), sites=["ash", "birch"])
    with pytest.raises(FedgroveError, match="'dogwood' is no site of this federation; the sites are ash, birch"):
        load_federated(small.job(clients=[{"name": "dogwood"}]), sites=["ash", "birch"])


def test_a_folder_that_is_no_kit_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("nvflare")
    assert "this is not a kit" in complaint("federation", "start", tmp_path)
    assert "this is not a kit" in complaint("federation", "doctor", tmp_path)
    assert "federation.toml: no such file" in complaint("federation", "kits", tmp_path / "federation.toml")
