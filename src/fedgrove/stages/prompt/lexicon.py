"""A closed list of words as a model sees them: their embeddings, and how much it expects each of them at a place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedgrove.client.local_client import LocalClient
from fedgrove.data.tokens import prefix_ids
from fedgrove.models.blocks import Decoder
from fedgrove.models.continuations import Node, embed, last_states, log_probabilities
from fedgrove.stages.prompt.candidates import are_ids, as_words
from fedgrove.stages.prompt.editing import Lexicon
from fedgrove.stages.prompt.merging import mean_embeddings


def embeddings_of(words: Sequence[Sequence[int]], decoder: Decoder) -> Tensor:
    """The model's input embeddings of words, (words, width) float32 on the CPU: of several tokens their mean."""
    table = embed(decoder, torch.tensor([token for word in words for token in word]))
    return mean_embeddings(table.cpu(), words)


def lexicon_of(ids: Tensor, decoder: Decoder, client: LocalClient) -> Lexicon:
    """What a client's model knows of a list of words that came from the server.

    What the model expects at a place follows from the words before it alone, not from any record; of a word of several tokens
    it is its first one.

    Args:
        ids: token ids of the words, as :func:`~fedgrove.stages.prompt.candidates.as_ids` makes them.

    Raises:
        FedgroveError: they are none of the model; names the client.
    """
    if not are_ids(ids, decoder.checkpoint.config.get_text_config().vocab_size) or bool((ids[:, 0] < 0).any()):
        raise client.error("the list of words that came is none of this model; refused")
    words, tokenizer = as_words(ids), decoder.checkpoint.tokenizer()
    before = prefix_ids(tokenizer) or [tokenizer.eos_token_id or 0]
    first = ids[:, 0].long()

    def expected(prompt: Sequence[int]) -> Tensor:
        tokens, ends = list(before), [len(before) - 1]
        for word in prompt:
            tokens += words[word]
            ends.append(len(tokens) - 1)
        ((states,),) = last_states(decoder, [[Node(None, embed(decoder, torch.tensor([tokens])))]])
        return log_probabilities(decoder, states[0, ends], first.expand(len(ends), -1))

    return Lexicon(embeddings_of(words, decoder), expected)
