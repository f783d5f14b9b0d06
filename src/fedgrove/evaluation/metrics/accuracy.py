"""Classification accuracy: how often the label that is most likely according to the model is correct."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedTokenizerBase

from fedgrove.errors import FedgroveError
from fedgrove.evaluation.metrics import Measured, mean
from fedgrove.events import OnProgress
from fedgrove.models.labels import score_labels

MAX_LABELS = 200  # every label is scored for every prompt; with more labels this is not classification


def accuracy(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    labels: Sequence[str] = (),
    length: int = 512,
    on_progress: OnProgress = lambda done, total: None,
) -> dict[str, Measured]:
    """Accuracy, and the accuracy of always choosing the most frequent answer (``majority``).

    Args:
        model: a causal language model of the transformers library.
        pairs: (prompt, correct answer), in the form that a tuning stage uses.
        labels: all possible answers; default: all answers that occur.
        length: tokens of prompt and label together; longer prompts are truncated from the left.
        on_progress: called after every prompt.

    Raises:
        FedgroveError: there are too many labels, or an answer is not one of them.
    """
    choices = list(labels) or sorted({answer for _, answer in pairs})
    if len(choices) > MAX_LABELS:
        raise FedgroveError(
            f"accuracy: {len(choices)} different answers", "accuracy needs few labels: use another answer template"
        )
    unknown = [answer for _, answer in pairs if answer not in choices]
    if unknown:
        raise FedgroveError(
            f"accuracy: the answer {unknown[0]!r} is none of the labels", "write labels exactly as the answers are written"
        )
    correct = []
    for number, (prompt, answer) in enumerate(pairs, 1):
        scores = score_labels(model, tokenizer, [prompt], choices, length)
        correct.append(float(choices[int(scores[0].argmax())] == answer))
        on_progress(number, len(pairs))
    frequent = Counter(answer for _, answer in pairs).most_common(1)[0][1]
    return {"accuracy": mean(correct), "majority": Measured(frequent / len(pairs))}
