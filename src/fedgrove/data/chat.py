"""Conversations: a list of messages becomes text by the model's own chat template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2

from fedgrove.errors import FedgroveError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Chat:
    """A record's messages, in order: who says (``role``) what (``content``).

    Attributes:
        where: the place that an error names.
    """

    messages: tuple[Mapping[str, Any], ...]
    where: str

    def render(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The whole conversation, by the tokenizer's chat template.

        Raises:
            FedgroveError: the tokenizer has no chat template, or the template refuses these messages.
        """
        return self._by_template(tokenizer, len(self.messages), False)

    def trained_spans(self, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, int]]:
        """Which characters of :meth:`render` the assistant said: (from, to), its end mark with it.

        A template may write earlier turns in another way than the last one (Qwen 3 drops what was thought); such a turn is
        not what a model would have to say, and is left out.
        """
        whole, spans = self.render(tokenizer), []
        for number, message in enumerate(self.messages):
            if message["role"] == "assistant" and number > 0:
                before = self._by_template(tokenizer, number, True)
                after = self._by_template(tokenizer, number + 1, False)
                if whole.startswith(before) and whole.startswith(after):
                    spans.append((len(before), len(after)))
        return spans

    def _by_template(self, tokenizer: PreTrainedTokenizerBase, number: int, begins_answer: bool) -> str:
        if not getattr(tokenizer, "chat_template", None):
            raise FedgroveError(
                f"{self.where}: the field holds messages, but the model's tokenizer has no chat template",
                "use a model that was trained to chat, or write a template of text fields",
            )
        try:
            messages = [dict(message) for message in self.messages[:number]]
            return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=begins_answer))
        except jinja2.TemplateError as error:
            raise FedgroveError(
                f"{self.where}: the model's chat template refuses these messages ({error})", "correct the record"
            ) from error


def is_messages(value: Any) -> bool:
    """Whether a field of a record is a list of messages."""
    return (
        isinstance(value, list) and bool(value) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value)
    )


def as_text(part: str | Chat, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """A part of a record as the model will see it.

    Raises:
        FedgroveError: it holds messages, and there is no tokenizer, or none that can write them.
    """
    if isinstance(part, str):
        return part
    if tokenizer is None:
        raise FedgroveError(f"{part.where}: the field holds messages, which only a model can write", "name a text field")
    return part.render(tokenizer)
