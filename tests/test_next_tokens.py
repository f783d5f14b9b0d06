"""The loss of the next tokens in pieces: that of plain transformers, with few logits at a time and none for nothing."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from decoders import save_small, windows
from fedgrove import heap
from fedgrove.api import run
from fedgrove.data.windows import IGNORED
from fedgrove.models import cost
from fedgrove.models.blocks import Decoder
from fedgrove.models.cost import ModelCost, tokens_at_once
from fedgrove.models.next_tokens import loss_sum
from fedgrove.models.perplexity import negative_log_likelihood
from fedgrove.models.stream import Checkpoint
from small import Small

# With caps and scales of logits, a norm of their own, learnt positions, several returned values, experts.
KINDS = ("llama", "gemma2", "granite", "cohere", "modernbert-decoder", "gpt2", "opt", "mixtral", "mpt")
AT_ONCE = 5  # tokens


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Only five tokens have logits at a time; the list gets the rows of each call of a head."""
    monkeypatch.setattr(cost, "LOGITS_AT_ONCE", AT_ONCE * 4096 + 9)
    found: list[int] = []
    linear = nn.functional.linear

    def note(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.shape[0] == 4096:
            found.append(x.numel() // x.shape[-1])
        return linear(x, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", note)
    return found


def loaded(kind: str, tmp_path: Path) -> nn.Module:
    """Frozen, but for what is in the blocks."""
    model = AutoModelForCausalLM.from_pretrained(save_small(kind, tmp_path), dtype=torch.float32).eval().requires_grad_(False)
    decoder = Decoder(Checkpoint(save_small(kind, tmp_path)))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(f"{decoder.prefix}."))
    return cast(nn.Module, model)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(named, found, strict=True) if gradient is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_plain_transformers(kind: str, tmp_path: Path, rows: list[int]) -> None:
    model = loaded(kind, tmp_path)
    ids = torch.cat(windows())
    labels = ids.clone()
    labels[0, :6] = IGNORED
    logits = cast(Any, model)(input_ids=ids, use_cache=False).logits
    plain = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    wanted = gradients(model, plain)
    rows.clear()
    loss = loss_sum(model, ids, labels)
    torch.testing.assert_close(loss, plain.detach(), rtol=1e-5, atol=0)
    assert sum(rows) == int((labels[:, 1:] != IGNORED).sum())
    assert max(rows) == AT_ONCE
    got = gradients(model, loss / 3)
    assert wanted
    assert got.keys() == wanted.keys()
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name] * 3, gradient, rtol=1e-3, atol=1e-6 * largest)


def test_without_a_label_nothing_is_computed(tmp_path: Path, rows: list[int]) -> None:
    model = loaded("llama", tmp_path)
    ids = windows()[0]
    loss = loss_sum(model, ids, torch.full_like(ids, IGNORED))
    assert float(loss) == 0
    assert rows == []
    assert not any(gradient.any() for gradient in gradients(model, loss).values())


def test_a_model_is_as_it_was_after_an_error(tmp_path: Path) -> None:
    model = loaded("llama", tmp_path)
    ids = windows()[0]
    before = loss_sum(model, ids, ids)
    with pytest.raises(IndexError):
        loss_sum(model, ids + 4096, ids)
    assert torch.equal(loss_sum(model, ids, ids), before)


@pytest.mark.parametrize(
    ("limit", "available", "released"), [(None, 90, 0), (None, 20, 3), (10**15, 90, 0), (10**15, 20, 3), (10**6, 90, 3)]
)
def test_freed_memory_is_released_before_each_block_if_memory_is_tight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int | None, available: int, released: int
) -> None:
    model, ids = loaded("llama", tmp_path), windows()[0]
    calls: list[None] = []
    monkeypatch.setattr(heap, "release_freed_memory", lambda: calls.append(None))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=100, available=available))
    with heap.limited(limit):
        loss_sum(model, ids, ids)
        with torch.no_grad():
            loss_sum(model, ids, ids)  # keeps no activations
    assert len(calls) == released


def test_a_client_is_held_to_the_memory_that_it_says_it_has(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited, limits = heap.limited, set[int | None]()

    def note(memory: int | None) -> AbstractContextManager[None]:
        limits.add(memory)
        return limited(memory)

    monkeypatch.setattr(heap, "limited", note)
    stage = {"kind": "tune", "rounds": 1, "steps": 1, "length": 24, "batches": [1], "ranks": [2], "bits": [32]}
    run(small.spec(clients__1__memory="1GiB", stages=[stage], evaluate={}), out=tmp_path / "run", quiet=True)
    assert limits == {None, 2**30}


def test_evaluation_has_as_few_logits(tmp_path: Path, rows: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(Checkpoint(save_small("gemma2", tmp_path)))
    few, count = negative_log_likelihood(decoder, windows())
    assert max(rows) == AT_ONCE
    assert sum(rows) == count == 2 * 15
    monkeypatch.undo()
    assert negative_log_likelihood(decoder, windows()) == (pytest.approx(few, rel=1e-6), count)


def test_a_plan_counts_as_many_logits_as_there_are() -> None:
    of = ModelCost({}, others=1, width=8, vocabulary=2**20, num_blocks=1, saved=1, length=24, saved_half=2)
    assert [tokens_at_once(2**20, length) for length in (24, 32, 33)] == [24, 32, 32]
    assert of.logits == 24 * 2**20
    assert tokens_at_once(2**40, 24) == 1


def test_no_more_tokens_than_a_window_has_pass_through_a_head(tmp_path: Path) -> None:
    """GPT-2 has no positions for all tokens of five windows."""
    model = loaded("gpt2", tmp_path)
    ids = torch.randint(2, 4096, (5, 32), generator=torch.Generator().manual_seed(0))
    assert cast(Any, model).config.n_positions < ids.numel()
    logits = cast(Any, model)(input_ids=ids, use_cache=False).logits
    plain = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(loss_sum(model, ids, ids), plain, rtol=1e-5, atol=0)
