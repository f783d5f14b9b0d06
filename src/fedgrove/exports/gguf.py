"""GGUF, a single file for llama.cpp and programs built on it, in the model's dtype. Needs the extra ``gguf``.

Llama, Mistral, Qwen2 and Qwen3 are written here, tensor by tensor, with the writer and the table of names of the gguf package.
Other architectures can be converted from a plain directory by llama.cpp's converter. To quantize, use ``llama-quantize`` of
llama.cpp; its formats have a code for zero, so pruned weights stay zero.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedgrove.errors import FedgroveError
from fedgrove.exports import Source, require
from fedgrove.models.blocks import Decoder
from fedgrove.models.perplexity import nll_of_logits
from fedgrove.models.preconditions import check_parameters
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
ELSEWHERE = "export --to hf, and convert that with llama.cpp's convert_hf_to_gguf.py"

# The regular expressions by which a tokenizer splits text before BPE -> llama.cpp's name for this pre-tokenizer.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {f"{_CONTRACTIONS}\\p{{N}}{{1,3}}{_REST}": "llama-bpe", f"{_CONTRACTIONS}\\p{{N}}{_REST}": "qwen2"}


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
    writer = gguf.GGUFWriter(None, ARCHITECTURES[kind])
    dtype = _dtype(checkpoint)
    _describe(writer, config, dtype, source)
    _tokenizer(writer, checkpoint, config["vocab_size"])
    extra = _rope(writer, config)
    blocks = config["num_hidden_layers"]
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[ARCHITECTURES[kind].upper()], blocks)
    decoder = Decoder(checkpoint)
    check_parameters(decoder)
    named = {}
    for name, _ in decoder.model.named_parameters(remove_duplicate=False):
        known = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if known is None:
            raise FedgroveError(f"--to gguf: {name} is not part of a {ARCHITECTURES[kind]} model in this format", ELSEWHERE)
        if name != HEAD or not {HEAD, EMBEDDING} & decoder.ties.keys():
            named[known] = name, decoder.stored_name(decoder.source(name))
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
        tensor = (_interleaved(name, tensor, config) if ARCHITECTURES[kind] == "llama" else tensor).to(stored).contiguous()
        writer.write_tensor_data((tensor.view(torch.uint16) if stored == torch.bfloat16 else tensor).numpy())
    writer.close()


def losses(source: Source, folder: Path, windows: Sequence[Tensor]) -> tuple[float, int]:
    """Computed by llama.cpp if its Python binding is installed, else by transformers, which also reads GGUF files."""
    if importlib.util.find_spec("llama_cpp") is not None:
        return _losses_llama(folder / FILE, windows)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, trust_remote_code=False).eval()
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
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])


def _rope(writer: Any, config: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """Writes the settings of rotary embeddings; returns the tensor of frequency factors that Llama 3.1 and later need."""
    import gguf

    rope = config.get("rope_parameters") or {}
    base, kind = rope.get("rope_theta", 10000.0), rope.get("rope_type", "default")
    writer.add_rope_freq_base(base)
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "llama3":
        head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        wavelengths = 2 * math.pi * base ** (np.arange(0, head, 2, dtype=np.float64) / head)
        turns = rope["original_max_position_embeddings"] / wavelengths
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        return {"rope_freqs.weight": (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)}
    elif kind != "default":
        raise FedgroveError(f"--to gguf: positions of type {kind!r} are not supported", ELSEWHERE)
    return {}


def _interleaved(name: str, tensor: Tensor, config: dict[str, Any]) -> Tensor:
    """Reorders the rows: llama.cpp rotates adjacent channels of a head together, transformers those half a head apart."""
    part = name.rsplit(".", 2)[-2]
    heads = config["num_attention_heads"]
    if part == "k_proj":
        heads = config.get("num_key_value_heads") or heads
    elif part != "q_proj":
        return tensor
    return tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _tokenizer(writer: Any, checkpoint: Checkpoint, size: int) -> None:
    """Writes a byte-level BPE tokenizer."""
    import gguf

    tokenizer = checkpoint.tokenizer()
    file = checkpoint.path / "tokenizer.json"
    if not file.is_file():
        raise FedgroveError(f"--to gguf: {file} is missing", ELSEWHERE)
    config = json.loads(file.read_text(encoding="utf-8"))
    pre_tokenizer = _pre_tokenizer(config)
    if pre_tokenizer is None:
        raise FedgroveError("--to gguf: the pre-tokenizer of this tokenizer is not supported", ELSEWHERE)
    added = {entry["id"]: entry for entry in config.get("added_tokens", [])}
    words = {number: word for word, number in config["model"]["vocab"].items()}
    words |= {number: entry["content"] for number, entry in added.items()}
    kinds = gguf.TokenType
    tokens, types = [], []
    for number in range(size):
        tokens.append(words.get(number, f"[PAD{number}]"))
        if number in added:
            types.append(kinds.CONTROL if added[number]["special"] else kinds.USER_DEFINED)
        else:
            types.append(kinds.NORMAL if number in words else kinds.UNUSED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = config["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for name in ("bos", "eos", "pad"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    has_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    writer.add_add_bos_token(has_bos)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _pre_tokenizer(config: dict[str, Any]) -> str | None:
    """llama.cpp's name for a tokenizer's pre-tokenizer; None if it is unknown, or the tokenizer is no byte-level BPE."""
    outer = config.get("pre_tokenizer") or {}
    steps = outer.get("pretokenizers", [outer])
    *first, last = steps or [{}]
    if config["model"].get("type") != "BPE" or last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if last.get("use_regex", True):
        if not first:
            return "gpt-2"
        return "smollm" if first == [{"type": "Digits", "individual_digits": True}] else None
    if len(first) == 1 and first[0].get("type") == "Split" and first[0].get("behavior") == "Isolated":
        return PRE_TOKENIZERS.get(first[0]["pattern"].get("Regex", ""))
    return None
