"""Classification: how often the label that the model finds the most likely is the right one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedTokenizerBase

from fedgrove.errors import FedgroveError
from fedgrove.evaluation.metrics import Measured, mean
from fedgrove.events import OnProgress
from fedgrove.models.labels import score_labels

MOST = 200  # labels; more are no classification, and each is computed for every prompt


def accuracy(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    labels: Sequence[str] = (),
    length: int = 512,
    on_progress: OnProgress = lambda done, total: None,
) -> dict[str, Measured]:
    """Accuracy, and what always saying the most frequent answer would give (``majority``).

    Args:
        model: a causal language model of the transformers library.
        pairs: (prompt, right answer), each written as a tuning stage would write them.
        labels: all that may be answered; none: all answers that occur.
        length: tokens of prompt and label together; of a longer prompt the last ones count.
        on_progress: called after every prompt.

    Raises:
        FedgroveError: too many labels, or an answer is none of them.
    """
    named = list(labels) or sorted({answer for _, answer in pairs})
    if len(named) > MOST:
        raise FedgroveError(f"accuracy: {len(named)} different answers", "it needs a few labels: give another answer template")
    wrong = [answer for _, answer in pairs if answer not in named]
    if wrong:
        raise FedgroveError(f"accuracy: the answer {wrong[0]!r} is none of the labels", "labels are written as answers are")
    right = []
    for number, (prompt, answer) in enumerate(pairs, 1):
        scores = score_labels(model, tokenizer, [prompt], named, length)
        right.append(float(named[int(scores[0].argmax())] == answer))
        on_progress(number, len(pairs))
    frequent = Counter(answer for _, answer in pairs).most_common(1)[0][1]
    return {"accuracy": mean(right), "majority": Measured(frequent / len(pairs))}
