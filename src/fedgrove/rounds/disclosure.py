"""What may leave a client, in phrases that plans, report, model card and ``docs/security.md`` share.

Separate from :mod:`fedgrove.rounds.request`, which imports torch, because the report does not import torch.
"""

from __future__ import annotations

from enum import Enum


class Disclosure(Enum):
    """What a response reveals about a client's text.

    The value is a phrase that completes "a client sends …". Plans contain the names.
    """

    CAPABILITIES = (
        "a few numbers about itself (memory, speed, links, how much text it has, whether it has labels, whether an endpoint "
        "runs its model)"
    )
    MASKS = "which weights of each block it would keep"
    WEIGHTS = "the values of the weights that it would keep"
    SQUARES = "for each block the sums, over its text, of the squared inputs of each matrix"
    PRODUCTS = "for each block the sums, over its text, of the products of each pair of input channels of a matrix"
    MOMENTS = "for each block the sums and variances, over its text, of the inputs of each matrix"
    OUTLIERS = "one number for each block, its share of outliers"
    SCORES = "one number for each channel and head of every block, how much the loss on its text would change without it"
    INFLUENCE = "one number for each block, how much it changes the hidden states of its text"
    EXPERT_TOKENS = "for each expert of every block, how many tokens of its text reach it"
    EXPERT_OUTPUTS = "for each expert of every block, the sum over these tokens of how much it adds to them"
    EXPERTS_HELD = "which experts of every block it holds, those that matter most to its text"
    IMPORTANCE = "a score for each matrix, how much tuning it would help"
    GRADIENTS = (
        "how far the gradients of its windows agree, one number, and how much of each matrix's gradient each rank can hold"
    )
    FACTORS = "the factors of low-rank changes that it trained on its text"
    CHANGES = "the changes of whole matrices that it trained on its text"
    SCALES = "the changes of per-channel scales that it trained on its text"
    COMPONENT_SUMS = "for each component of a mixture its weight in the text, and the sums of its features and their squares"
    DIRECTION = "where features of its text point together, one direction for all of it"
    LIKELIHOODS = "how many windows of its text have each likelihood under a mixture"
    MEMBERS = "how many of its windows each adapter of a pool trains on"
    LOSS_DIFFERENCES = "for each direction one number, how its loss changes along it, by two losses or by a gradient"
    CURVATURE = "for a few directions how its loss differs and curves along them"
    LOSS = "its mean training loss of each round"
    HELD_OUT_LOSSES = "losses on text that it held out for itself, and whether it keeps a result of its own"
    LABEL_SUMS = "for each label the number of its records and the sums of their features, and the sums of squared features"
    FEATURE_PRODUCTS = "the sums, over its records, of the products of each pair of features"
    HELD_OUT_ACCURACIES = "how often three heads find the label of records that it held out for itself"
    PROMPT_SCORES = "for each candidate prompt one number, the sum of its records' losses or how many get the right label"
    OWN_PROMPTS = "the prompt, or the words' probabilities, that a search on its records alone came to, and its loss"
    PROMPT_WORDS = "which words of a public list it would have in a prompt, and where"
    WINDOW_LOSSES = "the loss of its own model on each window of held-out text that the server sent"

    @property
    def sentence(self) -> str:
        """The phrase in plain words."""
        return self.value
