"""DP-SGD: no window moves a step by more than its bound, and nothing is trained with too little noise."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedgrove.data.windows import IGNORED
from fedgrove.errors import FedgroveError
from fedgrove.privacy.accounting import dp_sgd_noise_multiplier
from fedgrove.stages.tune import training
from fedgrove.stages.tune.trainers import dp_sgd


class Line(torch.nn.Module):
    """A model of one matrix: logits of each token are a row of it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.zeros(6, 6))
        self.head, block = (torch.nn.Linear(6, 6, bias=False).requires_grad_(False) for _ in range(2))
        self.blocks = torch.nn.ModuleList([block])
        for linear in (self.head, block):
            torch.nn.init.eye_(linear.weight)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head

    def forward(self, input_ids: torch.Tensor, **_: bool) -> Any:
        return SimpleNamespace(logits=self.head(self.blocks[0](self.table[input_ids])))


def test_no_window_moves_a_step_by_more_than_the_bound_and_the_noise_is_that_of_the_promise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ids = torch.randint(6, (5, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[4] = IGNORED
    steps: list[torch.Tensor] = []

    def learnt(ids: torch.Tensor, labels: torch.Tensor, noise: float, clip: float) -> torch.Tensor:
        model = Line()
        settings = training.Settings(1, len(ids), 1, 1.0, optimizer="sgd")  # a step of 1: the weight is minus the gradient
        budget = training.Budget(epsilon=50.0, delta=0.05, noise=noise, rounds=1, clip=clip)
        dp_sgd.train(model, training.Work(ids, labels, 0, "0", budget=budget), settings)
        return -model.table.detach() * len(ids)

    monkeypatch.setattr(training, "dp_sgd_keeps", lambda *facts: True)
    alone = [learnt(ids[i : i + 1], labels[i : i + 1], 0.0, 0.2) for i in range(5)]
    assert [round(float(gradient.norm()), 4) for gradient in alone] == [0.2, 0.2, 0.2, 0.2, 0.0]
    torch.testing.assert_close(learnt(ids, labels, 0.0, 0.2), torch.stack(alone).sum(0), atol=1e-6, rtol=1e-4)
    steps = [learnt(ids[4:], labels[4:], 3.0, 0.2) for _ in range(200)]  # nothing but noise
    assert float(torch.stack(steps).std()) == pytest.approx(0.6, rel=0.05)


def test_a_client_trains_nothing_with_less_noise_than_was_promised() -> None:
    ids = torch.zeros(20, 8, dtype=torch.int64)
    enough = dp_sgd_noise_multiplier(1.0, 1e-5, 0.1, 10)
    for noise, rounds in ((0.9 * enough, 10), (enough, 20)):
        budget = training.Budget(epsilon=1.0, delta=1e-5, noise=noise, rounds=rounds, clip=1.0)
        work = training.Work(ids, ids, 0, "0", budget=budget)
        with pytest.raises(FedgroveError, match=f"noise of {noise:g} is too little for epsilon = 1; training refused"):
            dp_sgd.train(Line(), work, training.Settings(1, 2, 1, 0.1))
