"""Labels are scored as plain forward passes over prompt and label would score them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, GPT2Config, LlamaConfig, MistralConfig, OPTConfig

from fedgrove.errors import FedgroveError
from fedgrove.models.labels import accuracy, score_labels
from small import DEMO

SIZES: dict[str, Any] = {"vocab_size": 4096, "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 64}
LLAMA: dict[str, Any] = {**SIZES, "num_hidden_layers": 2, "num_key_value_heads": 2, "intermediate_size": 48}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**LLAMA),
    "mistral": lambda: MistralConfig(**LLAMA, sliding_window=8),
    "gemma2": lambda: Gemma2Config(**LLAMA, head_dim=8, sliding_window=8),
    "gpt2": lambda: GPT2Config(vocab_size=4096, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "opt": lambda: OPTConfig(**SIZES, ffn_dim=48, num_hidden_layers=2, word_embed_proj_dim=32),
}
PROMPTS = ["The engine of the old car would not start.\nTopic:", "A goal in the last minute\nTopic:", "Topic:"]
LABELS = [" cars", " ice hockey", " religion and its history"]


def model(name: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(MODELS[name](), attn_implementation="eager").eval()


def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO / "grove-6m")


def ids(text: str) -> list[int]:
    return tokenizer()(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", MODELS)
def test_a_label_scores_what_whole_forward_passes_say(name: str) -> None:
    net = model(name)
    scores = score_labels(net, tokenizer(), PROMPTS, LABELS, 64)
    for prompt, row in zip(PROMPTS, scores, strict=True):
        for label, score in zip(LABELS, row, strict=True):
            start, end = ids(prompt), ids(label)
            with torch.no_grad():
                logs = net(input_ids=torch.tensor([start + end])).logits[0].float().log_softmax(-1)
            expected = sum(float(logs[len(start) - 1 + i, token]) for i, token in enumerate(end))
            assert float(score) == pytest.approx(expected, abs=1e-4)


def test_of_a_long_prompt_the_end_counts() -> None:
    net, words = model("llama"), " ".join(f"word{i}" for i in range(40))
    longest = max(len(ids(label)) for label in LABELS)
    cut = tokenizer().decode(ids(words)[-(32 - longest) :])
    assert ids(cut) == ids(words)[-(32 - longest) :]
    assert torch.equal(score_labels(net, tokenizer(), [words], LABELS, 32), score_labels(net, tokenizer(), [cut], LABELS, 32))


def test_labels_of_one_token_each_are_one_pass() -> None:
    net = model("llama")
    tokens = [tokenizer().decode([token]) for token in (300, 301, 302)]
    assert all(len(ids(token)) == 1 for token in tokens)
    with torch.no_grad():
        logs = net(input_ids=torch.tensor([ids(PROMPTS[0])])).logits[0, -1].log_softmax(-1)
    assert torch.allclose(score_labels(net, tokenizer(), PROMPTS[:1], tokens)[0], logs[300:303], atol=1e-5)


def test_accuracy_is_the_share_of_prompts_whose_best_label_is_true() -> None:
    scores = torch.tensor([[0.0, -1.0], [-3.0, -2.0], [-1.0, -2.0], [-5.0, -5.0]])
    assert accuracy(scores, [0, 1, 1, 0]) == 0.75


@pytest.mark.parametrize(
    ("labels", "length", "says"),
    [([" car", " car pool"], 64, "begins label"), (["", " x"], 64, "is empty"), (LABELS, 3, "length: 3 tokens")],
)
def test_labels_that_cannot_be_told_apart_are_named(labels: list[str], length: int, says: str) -> None:
    with pytest.raises(FedgroveError, match=says):
        score_labels(model("llama"), tokenizer(), PROMPTS, labels, length)
