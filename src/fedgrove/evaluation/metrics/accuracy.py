"""Classification accuracy: how often the label that is most likely according to the model is correct."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedTokenizerBase

from fedgrove.errors import FedgroveError
from fedgrove.evaluation.metrics import Measured, mean
from fedgrove.events import OnProgress
from fedgrove.models.labels import score_labels

MAX_LABELS = 200  # every label is scored for every prompt; with more labels this is not classification


@dataclass(frozen=True)
class Answers:
    """What a model chooses, record by record.

    Attributes:
        correct: whether the chosen label is the answer.
        confidence: the probability of the chosen label if the labels were all there is: the softmax of their log-probabilities.
    """

    correct: list[bool]
    confidence: list[float]


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
        FedgroveError: there are too many labels or only one, or an answer is not one of them.
    """
    answers = answer(model, tokenizer, pairs, possible(labels, pairs), length, on_progress)
    frequent = Counter(answer for _, answer in pairs).most_common(1)[0][1]
    return {"accuracy": mean([float(right) for right in answers.correct]), "majority": Measured(frequent / len(pairs))}


def possible(labels: Sequence[str], pairs: Sequence[tuple[str, str]]) -> list[str]:
    """All possible answers: the labels, or else all answers that occur.

    Raises:
        FedgroveError: there are too many or only one, or an answer is not one of them.
    """
    choices = list(labels) or sorted({answer for _, answer in pairs})
    if len(choices) > MAX_LABELS:
        raise FedgroveError(
            f"accuracy: {len(choices)} different answers", "accuracy needs few labels: use another answer template"
        )
    if len(choices) == 1:
        raise FedgroveError(
            f"accuracy: every answer is {choices[0]!r}, so there is nothing to choose from",
            "name all labels, or take more records",
        )
    unknown = [answer for _, answer in pairs if answer not in choices]
    if unknown:
        raise FedgroveError(
            f"accuracy: the answer {unknown[0]!r} is none of the labels", "write labels exactly as the answers are written"
        )
    return choices


def answer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    choices: Sequence[str],
    length: int,
    on_progress: OnProgress,
) -> Answers:
    """The likeliest choice for each prompt, beside the correct answer. Arguments as of :func:`accuracy`."""
    found = Answers([], [])
    for number, (prompt, right) in enumerate(pairs, 1):
        scores = score_labels(model, tokenizer, [prompt], choices, length)[0]
        best = int(scores.argmax())
        found.correct.append(choices[best] == right)
        found.confidence.append(float(scores.double().softmax(0)[best]))
        on_progress(number, len(pairs))
    return found
