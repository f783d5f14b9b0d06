"""GGUF, a single file for llama.cpp and programs built on it, in the model's dtype. Needs the extra ``gguf``.

Llama, Mistral, Qwen2 and Qwen3 are written here, tensor by tensor, with the writer and the table of names of the gguf package.
Other architectures can be converted from a plain directory by llama.cpp's converter. To quantize, use ``llama-quantize`` of
llama.cpp; its formats have a code for zero, so pruned weights stay zero.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from fedgrove.errors import FedgroveError
from fedgrove.exports import NOT_KEPT, Source, require
from fedgrove.exports.llamacpp import positions, vocabulary
from fedgrove.exports.llamacpp.positions import ELSEWHERE
from fedgrove.models.blocks import Decoder
from fedgrove.models.perplexity import nll_of_logits
from fedgrove.models.preconditions import check_parameters
from fedgrove.models.pretrained import load_gguf
from fedgrove.models.stream import Checkpoint

WHAT = "GGUF for llama.cpp, in the model's dtype"
EXACT = True
RELATION = "quantized"
USE = """```sh
llama-cli -m FOLDER/model.gguf -p "The"
```

or, with `pip install llama-cpp-python`:

```python
from llama_cpp import Llama

print(Llama("FOLDER/model.gguf")("The", max_tokens=40)["choices"][0]["text"])
```"""
FILE = "model.gguf"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # transformers' name -> gguf's
BIASES = {"llama": ("attn_", "ffn_"), "qwen2": ("attn_q", "attn_k", "attn_v"), "qwen3": ()}  # that llama.cpp reads

# What transformers' GGUF reader makes of a file, and what it drops, by the names of a configuration.
READ = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "rms_norm_eps", "vocab_size", "tie_word_embeddings",
)  # fmt: skip
DROPPED = ("rope_parameters", "head_dim", "attention_bias", "mlp_bias")


def write(source: Source, out: Path) -> None:
    """Writes ``model.gguf``; memory: one tensor.

    Raises:
        FedgroveError: the gguf package is missing, or the architecture, its positions or its tokenizer are not supported.
    """
    require("gguf", "gguf", "gguf")
    import gguf

    checkpoint = Checkpoint(source.model)
    config = checkpoint.config.to_dict()
    kind = config["model_type"]
    if kind not in ARCHITECTURES:
        raise FedgroveError(f"--to gguf: {kind} is not supported (only {', '.join(ARCHITECTURES)})", ELSEWHERE)
    architecture = ARCHITECTURES[kind]
    writer = gguf.GGUFWriter(None, architecture)
    dtype = _dtype(checkpoint)
    _describe(writer, config, dtype, source)
    decoder = Decoder(checkpoint)
    check_parameters(decoder)
    rotary = positions.of_model(decoder, architecture)
    positions.write(writer, rotary)
    vocabulary.write(writer, decoder)
    extra = {} if rotary.divisors is None else {positions.DIVISORS: rotary.divisors}
    named = _names(decoder, architecture)
    for known, array in extra.items():
        writer.add_tensor_info(known, list(array.shape), array.dtype, array.nbytes)
    for known, (_, stored_name) in named.items():
        shape, _ = checkpoint.spec(stored_name)
        stored = torch.float32 if len(shape) == 1 else dtype
        raw = gguf.GGMLQuantizationType.BF16 if stored == torch.bfloat16 else None
        numbers = np.dtype({torch.bfloat16: np.uint16, torch.float16: np.float16, torch.float32: np.float32}[stored])
        writer.add_tensor_info(known, list(shape), numbers, shape.numel() * numbers.itemsize, raw)
    writer.write_header_to_file(path=out / FILE)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for array in extra.values():
        writer.write_tensor_data(array)
    for name, stored_name in named.values():
        tensor = checkpoint.read(stored_name)
        stored = torch.float32 if tensor.dim() == 1 else dtype
        tensor = (_interleaved(name, tensor, config) if architecture == "llama" else tensor).to(stored).contiguous()
        writer.write_tensor_data((tensor.view(torch.uint16) if stored == torch.bfloat16 else tensor).numpy())
    writer.close()


def losses(source: Source, folder: Path, windows: Sequence[Tensor]) -> tuple[float, int]:
    """Computed by llama.cpp if its Python binding is installed, else by transformers, which also reads GGUF files.

    transformers drops what the file says of positions, so that is compared with the model's beforehand, and transformers gets
    the model's own.

    Raises:
        FedgroveError: the positions in the file are not those of the model.
    """
    import gguf

    checkpoint = Checkpoint(source.model)
    if not positions.are_those_of(positions.read(gguf.GGUFReader(folder / FILE)), Decoder(checkpoint)):
        raise FedgroveError(
            f"--to gguf: the positions in {FILE} read back otherwise than those of the model",
            NOT_KEPT,
        )
    if importlib.util.find_spec("llama_cpp") is not None:
        return _losses_llama(folder / FILE, windows)
    own = checkpoint.config

    def complete(read: PretrainedConfig) -> PretrainedConfig:
        settings = {key: getattr(read, key) for key in READ}
        settings |= {key: getattr(own, key) for key in DROPPED if hasattr(own, key)}
        return AutoConfig.for_model(ARCHITECTURES[own.model_type], **settings)

    model = load_gguf(folder / FILE, complete)
    return nll_of_logits(lambda ids: model(ids).logits, windows)


def _losses_llama(file: Path, windows: Sequence[Tensor]) -> tuple[float, int]:
    from llama_cpp import Llama

    longest = max(ids.shape[1] for ids in windows)
    llama = Llama(str(file), n_ctx=longest, n_batch=longest, n_ubatch=longest, logits_all=True, verbose=False)

    def logits(ids: Tensor) -> Tensor:
        llama.reset()
        llama.eval(ids[0].tolist())
        return torch.from_numpy(np.array(llama.scores[: ids.shape[1]]))[None]

    try:
        return nll_of_logits(logits, windows)
    finally:
        llama.close()


def _dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The widest dtype among the matrices."""
    dtypes = {dtype for shape, dtype in map(checkpoint.spec, checkpoint.names()) if len(shape) > 1}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        if dtype in dtypes:
            return dtype
    raise FedgroveError("--to gguf: the model's dtype is not one of float32, float16, bfloat16", ELSEWHERE)


def _names(decoder: Decoder, architecture: str) -> dict[str, tuple[str, str]]:
    """The tensors of the file: their names there -> in the model and in the checkpoint. A tied head is not among them."""
    import gguf

    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], len(decoder))
    named = {}
    for name, _ in decoder.model.named_parameters(remove_duplicate=False):
        known = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if known is None or (known.endswith(".bias") and not known.split(".")[-2].startswith(BIASES[architecture])):
            raise FedgroveError(f"--to gguf: {name} is not part of a {architecture} model in this format", ELSEWHERE)
        if name != HEAD or not {HEAD, EMBEDDING} & decoder.ties.keys():
            named[known] = name, decoder.stored_name(decoder.source(name))
    return named


def _describe(writer: Any, config: dict[str, Any], dtype: torch.dtype, source: Source) -> None:
    import gguf

    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    head = config.get("head_dim") or hidden // heads
    if config.get("hidden_act", "silu") != "silu" or config.get("use_sliding_window"):
        raise FedgroveError("--to gguf: this model's activation or sliding window is not supported", ELSEWHERE)
    writer.add_name((source.run or source.model).resolve().name)
    writer.add_file_type(
        {
            torch.float32: gguf.LlamaFileType.ALL_F32,
            torch.float16: gguf.LlamaFileType.MOSTLY_F16,
            torch.bfloat16: gguf.LlamaFileType.MOSTLY_BF16,
        }[dtype]
    )
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])


def _interleaved(name: str, tensor: Tensor, config: dict[str, Any]) -> Tensor:
    """Reorders the rows: llama.cpp rotates adjacent channels of a head together, transformers those half a head apart."""
    part = name.rsplit(".", 2)[-2]
    heads = config["num_attention_heads"]
    if part == "k_proj":
        heads = config.get("num_key_value_heads") or heads
    elif part != "q_proj":
        return tensor
    return tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
