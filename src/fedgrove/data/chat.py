"""Conversations: a list of messages becomes text by the model's own chat template."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedgrove.data.tally import Tally
from fedgrove.data.values import clean, kind_of_value, text_of
from fedgrove.errors import FedgroveError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The date that a template reads where it asks for today's. Templates of Llama 3.1 and 3.2 write this one where they are given
# no clock. It never changes, so that one job makes the same model on every day and at every client.
DATE = datetime.datetime(2024, 7, 26)
# Roles of ShareGPT's files, in the words of chat templates; other roles stay as they are.
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
# Replaces transformers' function of this name, which reads the clock and cannot be given another date.
_FROZEN_CLOCK = (
    "{% macro strftime_now(format='%d %b %Y') %}{{ format"
    + "".join(f" | replace('%{code}', '{DATE.strftime('%' + code)}')" for code in "aAbBcdDeFGHIjmMpSTuUVwWxXyYzZ")
    + " }}{% endmacro %}"
)
_MARK = "\ue000answer\ue001"  # stands for an answer; of the private use area, so that no text holds it


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
        return self._by_template(tokenizer, self.messages)

    def trained_spans(self, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, int]]:
        """Which characters of :meth:`render` the assistant said: (from, to), with the end mark of the turn.

        A turn begins where the template, asked to begin an answer, stops. Templates of reasoning models write more there than
        a conversation without thoughts holds (``<think>``); such a turn begins with the answer's own text.

        A template may write earlier turns in another way than the last one (Qwen 3 drops what was thought); such a turn is
        not what a model would have to say, and is left out.
        """
        whole, spans = self.render(tokenizer), []
        for number, message in enumerate(self.messages):
            if message["role"] != "assistant" or number == 0:
                continue
            before = self._by_template(tokenizer, self.messages[:number], begins_answer=True)
            after = self._by_template(tokenizer, self.messages[: number + 1])
            answer = None
            if not (whole.startswith(before) and whole.startswith(after)):
                answer = self._answer(tokenizer, number, whole)
                if answer is None or not after.startswith(whole[: answer[1]]):
                    continue
            start = len(before) if whole.startswith(before) else answer[0] if answer else 0
            end = len(after) if whole.startswith(after) else answer[1] if answer else 0
            spans.append((start, end))
        return [(start, end) for start, end in spans if start < end]

    def _answer(self, tokenizer: PreTrainedTokenizerBase, number: int, whole: str) -> tuple[int, int] | None:
        """Which characters of ``whole`` are the content of a message; None if the template does not write it as it stands.

        The template is asked to write a mark instead of the content: what stands before and after the mark must be the same.
        """
        messages = [*self.messages]
        messages[number] = {**messages[number], "content": _MARK}
        before, mark, after = self._by_template(tokenizer, messages).partition(_MARK)
        end = len(whole) - len(after)
        if not mark or _MARK in after or not whole.startswith(before) or not whole.endswith(after) or end < len(before):
            return None
        return len(before), end

    def _by_template(
        self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], begins_answer: bool = False
    ) -> str:
        if not getattr(tokenizer, "chat_template", None):
            raise FedgroveError(
                f"{self.where}: the field holds messages, but the model's tokenizer has no chat template",
                "use a model that was trained to chat, or write a template of text fields",
            )
        try:
            template = _FROZEN_CLOCK + tokenizer.get_chat_template() if writes_date(tokenizer) else None
            return str(
                tokenizer.apply_chat_template(
                    [dict(message) for message in messages],
                    chat_template=template,
                    tokenize=False,
                    add_generation_prompt=begins_answer,
                )
            )
        except Exception as error:  # a template is a program of the model's author: it can raise anything
            raise FedgroveError(
                f"{self.where}: the model's chat template refuses these messages ({first_line(error)})", "correct the record"
            ) from error


def writes_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template asks for today's date, for which ``DATE`` is written."""
    return "strftime_now" in str(getattr(tokenizer, "chat_template", None))


def is_messages(value: Any) -> bool:
    """Whether a field of a record is meant as messages: a list of objects of which one names a speaker."""
    return (
        isinstance(value, list)
        and all(isinstance(message, dict) for message in value)
        and any("role" in message or "from" in message for message in value)
    )


def read_messages(value: Sequence[Mapping[str, Any]], where: str, field: str, tally: Tally) -> tuple[dict[str, Any], ...]:
    """A field's messages in one form: ``role``, ``content`` as text, and what else the chat template may ask for.

    ``from`` and ``value``, as in ShareGPT's files, are read as role and content. Parts of a content that are text are joined.
    A message without content, such as a call of a tool, has an empty one. Keys without a value are left out, because parquet
    files write each key into each message.

    Raises:
        FedgroveError: a message has no role, neither content nor tool calls, or a content that is no text; says which message.
    """
    messages = []
    for number, message in enumerate(value, 1):
        place = f"{where}, message {number}"
        given = {key: entry for key, entry in message.items() if entry is not None}
        role, content = given.pop("role", given.get("from")), given.pop("content", given.get("value"))
        if not isinstance(role, str) or not role:
            raise FedgroveError(f"{place}: it has no role", 'each message is {"role": "user", "content": "..."}')
        if "content" not in message and "value" not in message and not given.get("tool_calls"):
            raise FedgroveError(
                f"{place}: it has neither content nor tool calls", 'each message is {"role": "user", "content": "..."}'
            )
        if "from" in given:
            del given["from"]
            given.pop("value", None)
        text = _join(content, place, tally) if isinstance(content, list) else text_of(content, place, "content", tally)
        messages.append({**_clean_all(given, tally), "role": ROLES.get(role, role), "content": text})
    return tuple(messages)


def _join(parts: Sequence[Any], place: str, tally: Tally) -> str:
    """The text of a content that is given in parts."""
    texts = []
    for part in parts:
        if isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
            texts.append(clean(part["text"], tally))
        elif isinstance(part, str):
            texts.append(clean(part, tally))
        else:
            kind = f"a part of type {part['type']!r}" if isinstance(part, Mapping) and "type" in part else kind_of_value(part)
            raise FedgroveError(f"{place}: its content holds {kind}", "only parts of type 'text' can be read")
    return "".join(texts)


def _clean_all(value: Any, tally: Tally) -> Any:
    """The value with every text in it cleaned, and without keys that have no value."""
    if isinstance(value, str):
        return clean(value, tally)
    if isinstance(value, Mapping):
        return {str(key): _clean_all(entry, tally) for key, entry in value.items() if entry is not None}
    if isinstance(value, list):
        return [_clean_all(entry, tally) for entry in value]
    return value


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
