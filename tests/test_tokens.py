"""Texts of any length become the tokens that they have in one piece, by every kind of tokenizer."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fedgrove.data import tokens
from fedgrove.data.tokens import encode, encode_long, prefix_ids
from small import Small

WORDS = [
    "the",
    "old",
    "ash",
    "tree",
    "naïve",
    "café",
    "木",
    "花と森",
    "🌳🌲",
    "grows—slowly,",
    "(and)",
    "well.",
    "12,345.67",
    "ÄÖÜ",
    "ß",
]


def bytes_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def llama_bpe() -> Tokenizer:
    """As of Llama 2: no pre-tokenizer that separates words, spaces as ▁, bytes for unknown characters."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def trained(tokenizer: Tokenizer, text: str) -> PreTrainedTokenizerFast:
    kind = {"BPE": trainers.BpeTrainer, "Unigram": trainers.UnigramTrainer, "WordPiece": trainers.WordPieceTrainer}
    options = {"unk_token": "<unk>"} if isinstance(tokenizer.model, models.Unigram) else {}
    trainer = kind[type(tokenizer.model).__name__](
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False, **options
    )
    tokenizer.train_from_iterator(text.split("\n"), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


@pytest.mark.parametrize("make", [bytes_bpe, llama_bpe, unigram, word_piece])
def test_a_text_in_parts_has_the_tokens_of_the_whole(make: Callable[[], Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "PIECE", 300)
    monkeypatch.setattr(tokens, "OVERLAP", 100)
    rng = random.Random(0)
    breaks = [" ", " ", " ", "  ", "\n", "\n\n", "\t", ""]
    text = "".join(rng.choice(WORDS) + rng.choice(breaks) for _ in range(3000))
    tokenizer = trained(make(), text)
    parts = list(encode_long((text[i : i + 77] for i in range(0, len(text), 77)), tokenizer))
    assert len(parts) > 20
    assert [token for part in parts for token in part] == encode(text, tokenizer)


@pytest.mark.parametrize("text", ["", "a", "a" * 2000, "\n" * 2000, "木" * 2000, "🌳" * 700 + " end"])
def test_a_text_without_places_to_cut_is_whole(text: str, small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "PIECE", 300)
    monkeypatch.setattr(tokens, "OVERLAP", 100)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(small.model)
    assert [token for part in encode_long([text], tokenizer) for token in part] == encode(text, tokenizer)


def test_what_the_tokenizer_puts_before_a_text_is_known(small: Small) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(small.model)
    assert prefix_ids(tokenizer) == []
    tokenizer = trained(bytes_bpe(), "an ash tree")
    begin = tokenizer.convert_tokens_to_ids("<s>")
    for single, prefix in (("<s> $A", [begin]), ("<s> $A </s>", [begin]), ("$A </s>", [])):
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", begin), ("</s>", tokenizer.eos_token_id)]
        )
        assert prefix_ids(tokenizer) == prefix
