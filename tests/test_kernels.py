"""The GPU's kernel against the torch loop: on a GPU where there is one, else under Triton's interpreter, which needs none."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch

from fedgrove.input_statistics.statistics import InputStatistics
from fedgrove.models.masks import Target
from fedgrove.stages.prune.pruners import sparsegpt

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
TRITON = importlib.util.find_spec("triton") is not None
here = pytest.mark.skipif(
    not TRITON or not (INTERPRETED or torch.cuda.is_available()), reason="no Triton, or neither a GPU nor the interpreter"
)
TARGETS = [Target(0.6), Target.of(None, (2, 4)), Target.of(None, (5, 20))]


@pytest.mark.skipif(INTERPRETED or not TRITON, reason="this is what it runs, and Triton is what it needs")
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
def test_a_kernel_that_computes_something_else_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedgrove.stages.prune import kernels

    kernels.check(DEVICE, sparsegpt.columns)
    monkeypatch.setattr(kernels, "columns", lambda *_: None)
    with pytest.raises(RuntimeError, match="its results differ from those of torch"):
        kernels.check(DEVICE, sparsegpt.columns)


KERNELS = "fedgrove.stages.prune.kernels"
GPU = torch.device("cuda:0")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Exception | None], ModuleType]]:
    """Puts other kernels in the place of ours, which pass their check or fail it in this way."""

    def put(failure: Exception | None) -> ModuleType:
        def check(device: torch.device, reference: object) -> None:
            if failure is not None:
                raise failure

        module = ModuleType(KERNELS)
        module.check, module.columns = check, lambda *_: None  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, KERNELS, module)
        monkeypatch.setattr("fedgrove.stages.prune.kernels", module, raising=False)
        return module

    sparsegpt.gpu_kernel.cache_clear()
    yield put
    sparsegpt.gpu_kernel.cache_clear()


def test_a_kernel_that_works_is_taken_without_a_word(
    kernels: Callable[[Exception | None], ModuleType], capfd: pytest.CaptureFixture[str]
) -> None:
    module = kernels(None)
    assert sparsegpt.gpu_kernel(GPU) is module.columns
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "failure",
    [
        RuntimeError("Failed to find C compiler.\nPlease specify it"),
        ImportError("libtriton.so: cannot open shared object file"),
        ModuleNotFoundError("No module named 'triton.language'", name="triton.language"),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_a_kernel_that_does_not_work_says_why_in_one_line_and_once(
    kernels: Callable[[Exception | None], ModuleType], capfd: pytest.CaptureFixture[str], failure: Exception
) -> None:
    kernels(failure)
    assert sparsegpt.gpu_kernel(GPU) is None
    assert sparsegpt.gpu_kernel(GPU) is None
    out, err = capfd.readouterr()
    assert out == ""
    why = " ".join(str(failure).split())
    assert err == (
        f"fedgrove: cuda:0: SparseGPT's GPU kernel does not work ({type(failure).__name__}: {why}); using torch, slower\n"
    )


def test_where_triton_is_not_installed_nothing_is_said(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)  # as Python has it of a package that is not there
    monkeypatch.delitem(sys.modules, KERNELS, raising=False)
    monkeypatch.delattr("fedgrove.stages.prune.kernels", raising=False)
    sparsegpt.gpu_kernel.cache_clear()
    assert sparsegpt.gpu_kernel(GPU) is None
    assert capfd.readouterr() == ("", "")
    sparsegpt.gpu_kernel.cache_clear()
