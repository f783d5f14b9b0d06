"""The held-out texts whose records have answers that a stage measures itself on."""

from __future__ import annotations

from collections.abc import Iterator

from fedgrove.job.tables import Evaluate, Text


def labeled(evaluate: Evaluate, measure: str) -> Iterator[tuple[Text, str, str]]:
    """Each text with this ``measure``, and its templates of prompt and answer; a job gives both, or is refused."""
    for text in evaluate.data:
        if text.measure == measure:
            assert text.prompt is not None
            assert text.answer is not None
            yield text, text.prompt, text.answer
