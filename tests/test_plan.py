"""Layer sampling and what a plan promises."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, GptOssConfig

from fedgrove.errors import FedgroveError
from fedgrove.models.blocks import Decoder
from fedgrove.models.stream import Checkpoint
from fedgrove.rounds.capabilities import Capabilities
from fedgrove.stages.prune.plan import draw_blocks, share_blocks


def test_equal_clients_get_equal_shares() -> None:
    counts = share_blocks(dict.fromkeys("abcdefgh", 3.0), 6, 0.5, 2)
    assert counts == dict.fromkeys("abcdefgh", 3)


def test_shares_are_proportional_to_pace_and_bounded() -> None:
    counts = share_blocks({"slow": 1, "middle": 2, "fast": 4, "giant": 1000}, 32, 0.5, 2)
    assert counts["giant"] == 32
    assert counts["slow"] < counts["middle"] < counts["fast"] < 32
    assert counts["fast"] == pytest.approx(4 * counts["slow"], abs=2)
    assert sum(counts.values()) == 64


def test_even_the_slowest_client_gets_one_block() -> None:
    counts = share_blocks({"snail": 1e-6, "b": 1, "c": 1}, 12, 0.5, 1)
    assert counts["snail"] == 1
    assert sum(counts.values()) == 18


@pytest.mark.parametrize("cover", [1, 2, 3])
def test_cover_wins_over_the_share(cover: int) -> None:
    counts = share_blocks(dict.fromkeys("abcd", 1.0), 10, 0.1, cover)
    assert sum(counts.values()) >= 10 * cover


@pytest.mark.parametrize("seed", range(20))
def test_every_block_is_covered_and_evenly(seed: int) -> None:
    counts = {"a": 1, "b": 5, "c": 7, "d": 3}
    drawn = draw_blocks(counts, 7, str(seed))
    assert {name: len(set(blocks)) for name, blocks in drawn.items()} == counts
    held = Counter(block for blocks in drawn.values() for block in blocks)
    assert set(held) == set(range(7))
    assert max(held.values()) - min(held.values()) <= 1


def test_a_block_is_drawn_with_the_probability_that_its_weight_undoes() -> None:
    counts = {"poor": 1, "rich": 6}
    draws = 4000
    held = Counter(block for seed in range(draws) for block in draw_blocks(counts, 8, str(seed))["poor"])
    assert all(abs(held[block] / draws - 1 / 8) < 0.03 for block in range(8))


def test_the_order_of_clients_changes_nothing() -> None:
    assert draw_blocks({"a": 2, "b": 3}, 5, "s") == draw_blocks({"b": 3, "a": 2}, 5, "s")
    assert share_blocks({"a": 1, "b": 2}, 5, 0.5, 1) == share_blocks({"b": 2, "a": 1}, 5, 0.5, 1)


def test_a_model_of_experts_that_nobody_has_tried_is_refused_by_name(tmp_path: Path) -> None:
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = GptOssConfig(**small, num_key_value_heads=2, head_dim=8, vocab_size=64, num_local_experts=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "moe")
    with pytest.raises(FedgroveError, match=r"GptOssForCausalLM .* it prunes mixtral, qwen2_moe"):
        Decoder(Checkpoint(tmp_path / "moe"))


def test_capabilities_with_impossible_numbers_are_refused() -> None:
    for lie in ({"speed": float("inf")}, {"sparsity": float("nan")}, {"memory": -1}, {"samples": 0}, {"secret": 1}):
        with pytest.raises(ValidationError):
            Capabilities(**lie)
