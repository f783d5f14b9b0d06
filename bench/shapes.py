"""Checkpoints of random parameters in the shapes of known models, written block by block."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from fedgrove.models.files import small_contents
from fedgrove.models.tensor_files import write_safetensors

TOKENIZER = Path(__file__).parent.parent / "src" / "fedgrove" / "demo" / "grove-6m"
SHAPES = {  # width, width of the feed-forward part, blocks, heads, heads of keys and values
    "tiny": (128, 256, 2, 4, 2),
    "160m": (768, 3072, 12, 12, 12),
    "1.1b": (2048, 5632, 22, 32, 4),
    "7b": (4096, 11008, 32, 32, 32),
}


def make(out: Path, shape: str, tokenizer: Path, dtype: torch.dtype, blocks: int | None = None, fast: bool = False) -> Path:
    """A Llama with a vocabulary of 32000 and another model's tokenizer; one tensor is in memory at a time.

    ``fast``: a GPU draws the numbers, which are then others.
    """
    width, feed_forward, depth, heads, key_heads = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=32000,
        max_position_embeddings=2048,
        hidden_size=width,
        intermediate_size=feed_forward,
        num_hidden_layers=blocks or depth,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        dtype=dtype,
    )
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    specs = {name: (parameter.shape, dtype) for name, parameter in model.named_parameters()}
    device = "cuda" if fast else "cpu"
    random = torch.Generator(device).manual_seed(0)

    def tensor(name: str, size: torch.Size) -> Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(size, dtype=dtype)
        return (torch.randn(size, generator=random, device=device) * 0.02).to("cpu", dtype)

    out.mkdir(parents=True)
    for name, content in small_contents(tokenizer).items():
        if name.startswith(("tokenizer", "special")):
            (out / name).write_bytes(content)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(out)
    write_safetensors(out / "model.safetensors", specs, (tensor(name, spec[0]) for name, spec in specs.items()))
    return out
