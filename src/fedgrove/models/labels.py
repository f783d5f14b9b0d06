"""Classification by a language model: which of a few labels is the most likely after a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fedgrove.data.tokens import encode, encode_prompt
from fedgrove.errors import FedgroveError


def score_labels(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], labels: Sequence[str], length: int = 512
) -> Tensor:
    """log p(label | prompt): the sum over the label's tokens of log p(token | prompt and preceding tokens).

    Each prompt is computed once, regardless of the number of labels. Prompt and label are tokenized separately, as ``prompt``
    and ``answer`` are in a tuning stage, so a label includes the space or line break that precedes the answer there. The sums
    are not divided by the number of tokens: they are log-probabilities, and only comparable between labels of one prompt.

    Args:
        model: a causal language model of the transformers library, in any dtype, on any device.
        prompts: any texts; a long prompt is truncated from the left, so that it fits into ``length`` with the longest label.
        labels: all possible answers.
        length: the maximum number of tokens.

    Returns:
        (prompts, labels) float32 on the CPU.

    Raises:
        FedgroveError: a label has no tokens, or is a prefix of another one, which it would always beat; names the label.
    """
    ids = label_ids(labels, tokenizer)
    longest = max(map(len, ids))
    if longest >= length:
        raise FedgroveError(f"length: {length} tokens, but a label has {longest}", "raise it")
    device = next(model.parameters()).device
    padded = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens in ids], device=device)
    counts = torch.tensor([len(tokens) for tokens in ids], device=device)
    is_token = torch.arange(longest, device=device) < counts[:, None]  # not padding
    scores = []
    with torch.inference_mode():
        for prompt in prompts:
            prompt_ids = encode_prompt(prompt, tokenizer, length - longest) or [tokenizer.eos_token_id or 0]
            output = cast(Any, model)(input_ids=torch.tensor([prompt_ids], device=device), use_cache=longest > 1)
            logits = output.logits[:, -1:].expand(len(ids), -1, -1)
            if longest > 1:
                output.past_key_values.batch_repeat_interleave(len(ids))
                rest = cast(Any, model)(input_ids=padded[:, :-1], past_key_values=output.past_key_values, use_cache=True)
                logits = torch.cat([logits, rest.logits], 1)
            of_tokens = logits.float().log_softmax(-1).gather(-1, padded[:, :, None])[:, :, 0]
            scores.append(of_tokens.masked_fill(~is_token, 0.0).sum(1).cpu())
    return torch.stack(scores) if scores else torch.zeros(0, len(labels))


def label_ids(labels: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The token ids of each label.

    Raises:
        FedgroveError: a label has no tokens, or is a prefix of another one; names the label.
    """
    ids = [encode(label, tokenizer) for label in labels]
    for label, tokens in zip(labels, ids, strict=True):
        pairs = zip(labels, ids, strict=True)
        longer = [other for other, other_ids in pairs if other != label and other_ids[: len(tokens)] == tokens]
        if not tokens or longer:
            why = f"begins label {longer[0]!r}" if tokens else "is empty"
            raise FedgroveError(f"label {label!r} {why}: give labels of which none is the beginning of another")
    return ids


def accuracy(scores: Tensor, truth: Sequence[int]) -> float:
    """The fraction of prompts whose most likely label is the true one; among equally likely labels the first one counts.

    Args:
        scores: (prompts, labels).
        truth: the index of the true label of each prompt.
    """
    return float((scores.argmax(1) == torch.tensor(truth)).double().mean())
