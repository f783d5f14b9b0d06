"""Text to token ids: the one place where a tokenizer is called on private text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from fedgrove.errors import FedgroveError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIECE = 2**16  # characters that are tokenized at once: a tokenizer needs over a hundred bytes for each
OVERLAP = 2**10  # characters that two pieces share; the pieces must agree somewhere in them
AGREEING = 4  # tokens in a row that are the same in both


def encode(text: str, tokenizer: PreTrainedTokenizerBase, end: bool = False) -> list[int]:
    """Token ids of a text, without special tokens; with ``end``, followed by the end-of-text token if there is one.

    Raises:
        FedgroveError: the tokenizer refuses the text.
    """
    ids: list[int] = _call(tokenizer, text)["input_ids"]
    if end and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return ids


def encode_with_offsets(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[tuple[int, int]]]:
    """:func:`encode`, and which characters (from, to) each token stands for. The tokenizer must be fast."""
    encoded = _call(tokenizer, text, return_offsets_mapping=True)
    return encoded["input_ids"], encoded["offset_mapping"]


def encode_long(pieces: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Token ids of a text of any length that comes in pieces: the same as of the text in one piece, part by part.

    Memory does not grow with the text. Parts of ``PIECE`` characters overlap, and one ends and the next begins at a place in
    the overlap where both have the same tokens: a token depends on the characters around it, not on those far away. A slow
    tokenizer does not say where its tokens begin; with it the text is tokenized in one piece.

    Args:
        pieces: their concatenation is the text.
        tokenizer: any.
    """
    if not tokenizer.is_fast:
        yield encode("".join(pieces), tokenizer)
        return
    source = _Characters(pieces)
    text = source.take(PIECE)
    ids, offsets = encode_with_offsets(text, tokenizer)
    first = 0  # of the ids that are not given out yet
    while more := source.take(PIECE):
        shared = min(OVERLAP, len(text))
        next_text = text[-shared:] + more
        next_ids, next_offsets = encode_with_offsets(next_text, tokenizer)
        seam = _seam(ids, offsets, len(text) - shared, next_ids, next_offsets, shared)
        if seam is None or seam[0] < first:  # a word without an end, for instance: the two parts become one
            text += more
            ids, offsets = encode_with_offsets(text, tokenizer)
            continue
        yield ids[first : seam[0]]
        text, ids, offsets, first = next_text, next_ids, next_offsets, seam[1]
    yield ids[first:]


class _Characters:
    """Takes any number of characters from pieces of text."""

    def __init__(self, pieces: Iterable[str]):
        self._pieces = iter(pieces)
        self._rest = ""

    def take(self, number: int) -> str:
        """The next characters: ``number`` of them, fewer at the end."""
        parts = [self._rest]
        size = len(self._rest)
        while size < number and (piece := next(self._pieces, None)) is not None:
            parts.append(piece)
            size += len(piece)
        text = "".join(parts)
        self._rest = text[number:]
        return text[:number]


def _seam(
    ids: list[int],
    offsets: list[tuple[int, int]],
    begin: int,
    next_ids: list[int],
    next_offsets: list[tuple[int, int]],
    shared: int,
) -> tuple[int, int] | None:
    """Where two parts can be joined: an index of each, so that ``ids[:i] + next_ids[j:]`` are the tokens of the whole.

    Args:
        begin: the character of the first part at which the second one begins.
        shared: the number of characters that both have.

    Returns:
        None if the parts agree nowhere in the characters that they share.
    """
    starts = {next_offsets[j][0]: j for j in range(len(next_ids) - 1, -1, -1) if next_offsets[j][0] < shared}
    best: tuple[int, int, int] | None = None
    for i in range(len(ids) - 1, 0, -1):
        place = offsets[i][0] - begin
        if place <= 0:
            break
        j = starts.get(place, 0)
        agree = j > 0 and ids[i : i + AGREEING] == next_ids[j : j + AGREEING] and len(ids) - i >= AGREEING
        if agree and offsets[i - 1][1] <= offsets[i][0] and next_offsets[j - 1][1] <= place:
            distance = abs(2 * place - shared)
            if best is None or distance < best[0]:
                best = distance, i, j
    return None if best is None else best[1:]


def prefix_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the tokenizer puts before every text by itself, such as ``<bos>`` of Gemma and Llama; often none."""
    bare = encode("a", tokenizer)
    ids: list[int] = tokenizer("a", verbose=False)["input_ids"]
    return next((ids[:i] for i in range(len(ids)) if bare and ids[i : i + len(bare)] == bare), [])


def encode_prompt(text: str, tokenizer: PreTrainedTokenizerBase, longest: int | None = None) -> list[int]:
    """Token ids of a prompt that a model continues: :func:`prefix_ids` once, then the text.

    Args:
        text: the prompt; one that a chat template wrote may begin with the prefix itself.
        tokenizer: the model's.
        longest: the maximum number of ids; a longer text is cut off from the left.
    """
    prefix, ids = prefix_ids(tokenizer), encode(text, tokenizer)
    if prefix and ids[: len(prefix)] == prefix:
        ids = ids[len(prefix) :]
    return prefix + (ids if longest is None else ids[max(0, len(ids) + len(prefix) - longest) :])


def _call(tokenizer: PreTrainedTokenizerBase, text: str, **options: Any) -> Any:
    try:
        return tokenizer(text, add_special_tokens=False, verbose=False, **options)
    except Exception as error:  # a tokenizer is a stranger's file: what it raises differs between kinds and releases
        raise FedgroveError(
            f"model: its tokenizer refuses a text of {len(text)} characters ({type(error).__name__}: {first_line(error)})",
            "copy the tokenizer's files again",
        ) from error
