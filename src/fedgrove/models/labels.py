"""Classification by a language model: which of a few labels it finds the most likely after a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fedgrove.errors import FedgroveError


def score_labels(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], labels: Sequence[str], length: int = 512
) -> Tensor:
    """log p(label | prompt): the sum over the label's tokens, each given those before it.

    A prompt is computed once, whatever the number of labels. Prompt and label are tokenised each on its own, as a tuning
    stage does with ``prompt`` and ``answer``, so a label is written with the space or line that stands before the answer
    there. WeightedSum are not divided by the number of tokens: they are probabilities, and compare labels of one prompt only.

    Args:
        model: a causal language model of the transformers library, in any dtype, on any device.
        prompts: any texts; of a long one the last tokens count, as many as fit with the longest label into ``length``.
        labels: all that may be answered.
        length: tokens at most.

    Returns:
        (prompts, labels) float32 on the CPU.

    Raises:
        FedgroveError: a label has no tokens, or begins like another, which it would always beat; names it.
    """
    ids = [_encode(tokenizer, label) for label in labels]
    for label, tokens in zip(labels, ids, strict=True):
        longer = [other for other, its in zip(labels, ids, strict=True) if other != label and its[: len(tokens)] == tokens]
        if not tokens or longer:
            why = f"begins label {longer[0]!r}" if tokens else "is empty"
            raise FedgroveError(f"label {label!r} {why}: give labels of which none is the beginning of another")
    longest = max(map(len, ids))
    if longest >= length:
        raise FedgroveError(f"length: {length} tokens, but a label has {longest}", "raise it")
    device = next(model.parameters()).device
    padded = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens in ids], device=device)
    counts = torch.tensor([len(tokens) for tokens in ids], device=device)
    is_token = torch.arange(longest, device=device) < counts[:, None]
    scores = []
    with torch.inference_mode():
        for prompt in prompts:
            start = _encode(tokenizer, prompt)[-(length - longest) :] or [tokenizer.eos_token_id or 0]
            begun = cast(Any, model)(input_ids=torch.tensor([start], device=device), use_cache=longest > 1)
            logits = begun.logits[:, -1:].expand(len(ids), -1, -1)
            if longest > 1:
                begun.past_key_values.batch_repeat_interleave(len(ids))
                rest = cast(Any, model)(input_ids=padded[:, :-1], past_key_values=begun.past_key_values, use_cache=True)
                logits = torch.cat([logits, rest.logits], 1)
            chosen = logits.float().log_softmax(-1).gather(-1, padded[:, :, None])[:, :, 0]
            scores.append(chosen.masked_fill(~is_token, 0.0).sum(1).cpu())
    return torch.stack(scores) if scores else torch.zeros(0, len(labels))


def accuracy(scores: Tensor, truth: Sequence[int]) -> float:
    """The share of prompts whose most likely label is the true one; of equal ones the first counts.

    Args:
        scores: (prompts, labels).
        truth: for each prompt the index of its label.
    """
    return float((scores.argmax(1) == torch.tensor(truth)).double().mean())


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return cast(list[int], tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
