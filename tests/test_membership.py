"""The attack: whether a window was learnt from is told by its loss, unless noise hides it as well as ε promises."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from fedgrove.models.blocks import Decoder
from fedgrove.models.next_tokens import loss_sum
from fedgrove.models.stream import Checkpoint
from fedgrove.privacy.accounting import dp_sgd_noise_multiplier
from fedgrove.privacy.membership import advantage, bound
from fedgrove.stages.tune import frozen, training
from fedgrove.stages.tune.changes import Start
from fedgrove.stages.tune.factors import Factors, fill
from fedgrove.stages.tune.parametrizations import Attachment, lora
from fedgrove.stages.tune.trainers import dp_sgd, sgd
from small import Small

WINDOWS, LENGTH, STEPS, BATCH, DELTA = 60, 12, 24, 12, 1e-3


def test_the_bound_is_that_of_randomized_response() -> None:
    assert bound(0.0, 0.0) == 0.0
    for epsilon in (0.1, 1.0, 5.0):  # who answers truly with probability p = e^ε/(1 + e^ε) keeps to ε, and gains 2p − 1
        assert bound(epsilon, 0.0) == pytest.approx(2 * math.exp(epsilon) / (1 + math.exp(epsilon)) - 1)
    assert bound(1.0, 0.01) > bound(1.0, 0.0)


def test_the_attack_gains_what_there_is_to_gain() -> None:
    torch.manual_seed(0)
    assert advantage(torch.rand(500), torch.rand(500) + 2) == pytest.approx(1.0, abs=0.02)
    assert abs(advantage(torch.rand(4000), torch.rand(4000))) < 0.05
    assert advantage(torch.rand(4000), torch.rand(4000) + 0.5) == pytest.approx(0.5, abs=0.04)


def learnt(small: Small, inside: Tensor, epsilon: float | None) -> torch.nn.Module:
    """The small model with adapters that were trained on these windows."""
    decoder = Decoder(Checkpoint(small.model))
    model = frozen.load(decoder, 32)
    starts = {}
    for name in decoder.linear_names():
        none = Factors(*(factor.float() for factor in vars(Factors.none(*decoder.read_shape(name))).values()))
        starts[name] = Start(fill(none, 8, name, "seed"), none)
    lora.attach(model, starts, Attachment(dict.fromkeys(starts, 2.0), {}))
    settings = training.Settings(STEPS, BATCH, BATCH, 0.02)
    if epsilon is None:
        sgd.train(model, training.Work(inside, inside, 0, "seed"), settings)
    else:
        noise = dp_sgd_noise_multiplier(epsilon, DELTA, BATCH / WINDOWS, STEPS)
        budget = training.Budget(epsilon=epsilon, delta=DELTA, noise=noise, rounds=1, clip=0.5)
        dp_sgd.train(model, training.Work(inside, inside, 0, "seed", budget=budget), settings)
    return model


def test_who_was_learnt_from_is_told_by_its_loss_unless_noise_hides_it(small: Small) -> None:
    words = " ".join(path.read_text() for path in small.texts.values())
    ids = Checkpoint(small.model).tokenizer()(words, add_special_tokens=False)["input_ids"]
    windows = [ids[start : start + LENGTH] for start in range(0, len(ids) - LENGTH, LENGTH)]
    random.Random(0).shuffle(windows)
    inside, outside = torch.tensor(windows[:WINDOWS]), torch.tensor(windows[WINDOWS : 2 * WINDOWS])
    assert len(outside) == WINDOWS

    def attacked(epsilon: float | None) -> float:
        model = learnt(small, inside, epsilon)
        with torch.no_grad():
            losses = [torch.tensor([loss_sum(model, one[None], one[None]) for one in part]) for part in (inside, outside)]
        return advantage(*losses)

    assert attacked(None) > 0.8
    scatter = 3 / math.sqrt(WINDOWS)  # three times the standard error: one run in a thousand may do that by luck
    assert attacked(0.5) <= bound(0.5, DELTA) + scatter
