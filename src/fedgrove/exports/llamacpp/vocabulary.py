"""The vocabulary of a byte-level BPE tokenizer in a GGUF file."""

from __future__ import annotations

import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from fedgrove.errors import FedgroveError
from fedgrove.exports.llamacpp.positions import ELSEWHERE
from fedgrove.models.blocks import Decoder
from fedgrove.models.preconditions import check_vocabulary

# The regular expressions by which a tokenizer splits text before BPE -> llama.cpp's name for this pre-tokenizer.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {f"{_CONTRACTIONS}\\p{{N}}{{1,3}}{_REST}": "llama-bpe", f"{_CONTRACTIONS}\\p{{N}}{_REST}": "qwen2"}
SPECIAL = ("bos", "eos", "unk", "sep", "pad", "mask")


def write(writer: Any, decoder: Decoder) -> None:
    """Adds the tokenizer's keys to a ``gguf.GGUFWriter``: tokens, merges, special tokens, chat templates.

    Raises:
        FedgroveError: tokenizer.json is missing, the tokenizer is none that is supported, or the embedding has too few rows.
    """
    import gguf

    checkpoint = decoder.checkpoint
    tokenizer = checkpoint.tokenizer()
    check_vocabulary(tokenizer, decoder)
    file = checkpoint.path / "tokenizer.json"
    if not file.is_file():
        raise FedgroveError(f"--to gguf: {file} is missing", ELSEWHERE)
    config = json.loads(file.read_text(encoding="utf-8"))
    pre_tokenizer = _pre_tokenizer(config)
    if pre_tokenizer is None:
        raise FedgroveError("--to gguf: the pre-tokenizer of this tokenizer is not supported", ELSEWHERE)
    added = tokenizer.added_tokens_decoder
    words = {number: word for word, number in tokenizer.get_vocab().items()}
    kinds = gguf.TokenType
    tokens, types = [], []
    for number in range(checkpoint.config.vocab_size):
        tokens.append(words.get(number, f"[PAD{number}]"))
        if number in added:
            types.append(kinds.CONTROL if added[number].special else kinds.USER_DEFINED)
        else:
            types.append(kinds.NORMAL if number in words else kinds.UNUSED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = config["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    _special(writer, tokenizer)
    templates = tokenizer.chat_template
    if isinstance(templates, dict):
        writer.add_chat_template([{"name": name, "template": template} for name, template in templates.items()])
    elif templates:
        writer.add_chat_template(templates)


def _special(writer: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes the special tokens, and which of them begin and end every text, by what the tokenizer does with one."""
    tokens = {name: getattr(tokenizer, f"{name}_token_id") for name in SPECIAL}
    text, full = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    start = next((i for i in range(len(full)) if full[i : i + len(text)] == text), len(full))
    first, last = full[:start], full[start + len(text) :]
    if len(first) == 1:
        tokens["bos"] = first[0]
    if len(first) > 1 or last not in ([], [tokens["eos"]]):
        added = ", ".join(map(str, tokenizer.convert_ids_to_tokens(first + last)))
        raise FedgroveError(f"--to gguf: the tokenizer adds {added} to every text, which llama.cpp cannot", ELSEWHERE)
    for name, number in tokens.items():
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(bool(first))
    writer.add_add_eos_token(bool(last))


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
