"""The GPU's kernel against the torch loop: on a GPU where there is one, else under Triton's interpreter, which needs none."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fedgrove.models.masks import Target
from fedgrove.stages.prune.input_statistics import InputStatistics
from fedgrove.stages.prune.pruners import sparsegpt

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
here = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no GPU, and not under the interpreter")
TARGETS = [Target(0.6), Target.of(None, (2, 4)), Target.of(None, (5, 20))]


@pytest.mark.skipif(INTERPRETED, reason="this is what it runs")
def test_what_follows_holds_under_the_interpreter() -> None:
    """In a process of its own: Triton decides when it is imported whether it interprets."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert done.stdout.startswith("s" + "." * (len(TARGETS) + 1)), done.stdout[-3000:]


def made_up(num_out: int, num_in: int) -> tuple[torch.Tensor, InputStatistics]:
    random = torch.Generator().manual_seed(num_in)
    inputs = InputStatistics("gram")
    size = torch.rand(num_in, generator=random) + 0.01
    blend = torch.randn(num_in // 4 + 1, num_in, generator=random)
    for _ in range(2):
        inputs.add((torch.randn(num_in, num_in // 4 + 1, generator=random) @ blend + torch.randn(num_in, num_in)) * size)
    return torch.randn(num_out, num_in, generator=random), inputs


@here
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_the_kernel_does_what_the_loop_does(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedgrove.stages.prune import kernels

    weight, inputs = made_up(9, 280)
    expected, expected_mask = sparsegpt.prune(weight.clone(), inputs, target)
    monkeypatch.setattr(sparsegpt, "_solver", lambda weight: kernels.columns)
    there = InputStatistics("gram", inputs.tokens, inputs.gram.to(DEVICE))
    got, mask = (tensor.cpu() for tensor in sparsegpt.prune(weight.to(DEVICE, copy=True), there, target))
    assert int((~mask).sum()) == target.num_pruned(mask.numel())
    assert not got[~mask].any()
    alike = (mask == expected_mask).all(1)  # another order of sums may tip a near-tie, and the rest of its row follows
    assert alike.double().mean() > 0.9
    assert (got - expected)[alike].abs().max() <= 1e-4 * expected.abs().max()


@here
def test_a_kernel_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedgrove.stages.prune import kernels

    assert kernels.usable(DEVICE)

    def broken(*_: object) -> None:
        raise RuntimeError("no compiler")

    for other in (broken, lambda *_: None):
        kernels.usable.cache_clear()
        monkeypatch.setattr(kernels, "columns", other)
        assert not kernels.usable(DEVICE)
    kernels.usable.cache_clear()
