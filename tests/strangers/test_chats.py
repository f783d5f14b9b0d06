"""Conversations as people have them, by chat templates as models bring them: what is read, and what is trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fedgrove.data.chat import DATE, Chat, writes_date
from fedgrove.data.sources import read_fields, read_texts
from fedgrove.data.windows import IGNORED, calibration_windows, evaluation_windows, training_windows
from fedgrove.errors import FedgroveError
from small import Small

TALK = [
    {"role": "user", "content": "Which bed is free?"},
    {"role": "assistant", "content": "Bed seven."},
    {"role": "user", "content": "And tomorrow?"},
    {"role": "assistant", "content": "Bed nine."},
]
PARTS = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '\n' }}{% endfor %}"
BEGINS = "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
# By the trick of each template: what is trained on of TALK, its parts in order.
TEMPLATES = {
    "plain": (PARTS + BEGINS, ["Bed seven.\n", "Bed nine.\n"]),
    "begins with bos": ("<|endoftext|>" + PARTS + BEGINS, ["Bed seven.\n", "Bed nine.\n"]),
    "thinks before an answer": (
        PARTS + "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}",
        ["Bed seven.\n", "Bed nine.\n"],
    ),
    "thinks, and writes empty thoughts into the last turn": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if loop.last and m['role'] == 'assistant' %}<think></think>"
        "{% endif %}{{ m['content'] + '\n' }}{% endfor %}" + BEGINS,
        ["<think></think>Bed nine.\n"],
    ),
    "drops thoughts": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'].split('</think>')[-1] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}",
        ["Bed seven.\n", "Bed nine.\n"],
    ),
    "default system prompt": (
        "{% if messages[0]['role'] != 'system' %}<|system|>You help.\n{% endif %}" + PARTS + BEGINS,
        ["Bed seven.\n", "Bed nine.\n"],
    ),
    "ends only the last turn": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% if loop.last %}</s>{% endif %}{% endfor %}"
        + BEGINS,
        ["Bed seven.", "Bed nine.</s>"],
    ),
    "trims": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|> ' + m['content'] | trim }}{% if not loop.last %}{{ '\n\n' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '\n\n<|assistant|> ' }}{% endif %}",
        ["Bed seven.", "Bed nine."],
    ),
    "no mark where an answer begins": (PARTS, ["<|assistant|>Bed seven.\n", "<|assistant|>Bed nine.\n"]),
    "instructions in brackets": (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}"
        "{{ ' ' + m['content'] + '</s>' }}{% endif %}{% endfor %}",
        [" Bed seven.</s>", " Bed nine.</s>"],
    ),
    "writes answers in capitals": ("{% for m in messages %}{{ m['content'] | upper }}{{ loop.length }}{% endfor %}", []),
    "writes no answers": ("{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{{ loop.length }}{% endfor %}", []),
}


@pytest.fixture
def tokenizer(small: Small) -> PreTrainedTokenizerBase:
    """The shipped model's tokenizer, to be given a template."""
    return AutoTokenizer.from_pretrained(small.model)


def chat_file(folder: Path, *talks: Any) -> Path:
    file = folder / "a.jsonl"
    file.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    return file


def read_one(file: Path) -> Chat:
    ((chat,),) = read_fields(file, {"text": "{messages}"})
    assert isinstance(chat, Chat)
    return chat


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_answers_are_trained_on_and_nothing_of_the_user(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template, answers = TEMPLATES[name]
    chat = Chat(tuple(TALK), "a record")
    whole = chat.render(tokenizer)
    assert [whole[begin:end] for begin, end in chat.trained_spans(tokenizer)] == answers


def test_thoughts_of_an_answer_are_where_the_template_writes_them(tokenizer: PreTrainedTokenizerBase) -> None:
    talk = [TALK[0], {"role": "assistant", "content": "<think>\nOne is taken.</think>Bed seven."}]
    for name, answer in (
        ("thinks before an answer", "One is taken.</think>Bed seven.\n"),
        ("plain", "<think>\nOne is taken.</think>Bed seven.\n"),
    ):
        tokenizer.chat_template = TEMPLATES[name][0]
        chat = Chat(tuple(talk), "a record")
        assert [chat.render(tokenizer)[begin:end] for begin, end in chat.trained_spans(tokenizer)] == [answer]


def test_a_conversation_without_an_answer_is_passed_over(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = TEMPLATES["plain"][0]
    alone = training_windows([chat_file(tmp_path, TALK)], {"text": "{messages}"}, tokenizer, 8)
    among = training_windows([chat_file(tmp_path, TALK[:1], TALK, [])], {"text": "{messages}"}, tokenizer, 8)
    assert [part.tolist() for part in among] == [part.tolist() for part in alone]
    with pytest.raises(FedgroveError, match=r"line 2: no turn of the assistant that can be trained on, nor in any other of 2"):
        training_windows([chat_file(tmp_path, TALK[:1], TALK[:1])], {"text": "{messages}"}, tokenizer, 8)


@pytest.mark.parametrize(
    "messages",
    [
        [{"from": "human", "value": "Which bed is free?"}, {"from": "gpt", "value": "Bed seven."}],
        [{"from": "user", "value": "Which bed is free?"}, {"from": "assistant", "value": "Bed seven."}],
        [{"role": "human", "content": "Which bed is free?"}, {"role": "gpt", "content": "Bed seven."}],
        [{"role": "user", "content": [{"type": "text", "text": "Which bed "}, {"type": "text", "text": "is free?"}]}, TALK[1]],
        [{"role": "user", "content": ["Which bed ", "is free?"]}, TALK[1]],
        [TALK[0], {**TALK[1], "tool_calls": None, "name": None}],
        [TALK[0], {"role": "assistant", "content": "Bed seven.", "value": None, "from": None}],
    ],
)
def test_messages_of_every_form_are_one(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, messages: Any) -> None:
    tokenizer.chat_template = TEMPLATES["plain"][0]
    assert read_one(chat_file(tmp_path, messages)).render(tokenizer) == Chat(tuple(TALK[:2]), "").render(tokenizer)


@pytest.mark.parametrize("content", [{"content": None}, {"content": ""}, {}])
def test_a_call_of_a_tool_has_an_empty_content(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, content: Any) -> None:
    tokenizer.chat_template = PARTS + "{% for m in messages if m.tool_calls %}{{ m.tool_calls[0].function.name }}{% endfor %}"
    call = {"role": "assistant", **content, "tool_calls": [{"function": {"name": "find_bed", "arguments": {"ward": 3}}}]}
    chat = read_one(chat_file(tmp_path, [TALK[0], call]))
    assert chat.render(tokenizer).endswith("<|assistant|>\nfind_bed")


@pytest.mark.parametrize(
    ("messages", "line"),
    [
        ([TALK[0], {"role": "assistant"}], "message 2: it has neither content nor tool calls"),
        ([{"role": "user", "content": {"text": "a"}}], "message 1: the field 'content' holds an object"),
        ([{"role": "user", "content": True}], "message 1: the field 'content' holds true or false"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "message 1: its content holds a part of type 'image'"),
        ([{"role": "user", "content": [7]}], "message 1: its content holds a int"),
        ([TALK[0], {"content": "Bed seven."}], "message 2: it has no role"),
        ([TALK[0], {"role": None, "content": "Bed seven."}], "message 2: it has no role"),
        ([TALK[0], {"role": ["user"], "content": "Bed seven."}], "message 2: it has no role"),
        ([TALK[0], "Bed seven."], "the field 'messages' holds a list"),
        ({"role": "user", "content": "a"}, "the field 'messages' holds an object"),
    ],
)
def test_messages_that_are_none_are_named(tmp_path: Path, messages: Any, line: str) -> None:
    with pytest.raises(FedgroveError) as caught:
        list(read_fields(chat_file(tmp_path, TALK, messages), {"text": "{messages}"}))
    assert f"a.jsonl, line 2{'' if line.startswith('the') and 'content' not in line else ', '}" in str(caught.value)
    assert line in str(caught.value)
    assert caught.value.remedy


@settings(
    max_examples=80, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    messages=st.lists(
        st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "tool_calls", "name"]),
            st.none() | st.text(max_size=5) | st.integers() | st.booleans() | st.lists(st.text(max_size=3), max_size=2),
            max_size=4,
        ),
        max_size=3,
    )
)
def test_any_list_of_objects_is_a_conversation_or_one_line(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, messages: Any
) -> None:
    tokenizer.chat_template = TEMPLATES["plain"][0]
    try:
        texts = list(read_texts(chat_file(tmp_path, messages), "{messages}", tokenizer))
    except FedgroveError as error:
        assert "line 1" in str(error)  # noqa: PT017 (both ends are right)
    else:
        assert all(isinstance(text, str) for text in texts)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[7]['content'] + 1 }}",
        "{{ raise_exception('no system prompt') }}",
        "{% for m in messages %}",
        "{{ 1 / 0 }}",
        "{{ messages | nofilter }}",
        "{{ messages[0]['content'].__class__ }}{{ messages[0]['content'].missing.more }}",
    ],
)
def test_whatever_a_template_raises_is_one_line(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(FedgroveError, match=r"a\.jsonl, line 1: the model's chat template refuses these messages \("):
        list(read_texts(chat_file(tmp_path, TALK), "{messages}", tokenizer))


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024"),
        ("{% if strftime_now is defined %}{% set d = strftime_now('%Y-%m-%d, %A') %}{{ d }}{% endif %}", "2024-07-26, Friday"),
        ("{% macro today() %}{{ strftime_now('%H:%M') }}{% endmacro %}{{ today() }}", "00:00"),
    ],
)
def test_the_date_of_a_template_is_always_the_same(tokenizer: PreTrainedTokenizerBase, template: str, text: str) -> None:
    tokenizer.chat_template = template
    assert writes_date(tokenizer)
    assert Chat(tuple(TALK), "").render(tokenizer) == text
    assert DATE.strftime("%d %b %Y") == "26 Jul 2024"


# The tokenizer's own first token


def with_bos(tokenizer: PreTrainedTokenizerBase) -> tuple[PreTrainedTokenizerBase, int]:
    begin = tokenizer.convert_tokens_to_ids("<|pad|>")
    assert isinstance(begin, int)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|pad|> $A", special_tokens=[("<|pad|>", begin)]
    )
    return tokenizer, begin


def test_every_window_begins_as_the_tokenizer_begins_a_text(small: Small, tokenizer: PreTrainedTokenizerBase) -> None:
    file = small.texts["ash"]
    plain = evaluation_windows(file, None, tokenizer, 15)
    tokenizer, begin = with_bos(tokenizer)
    windows = evaluation_windows(file, None, tokenizer, 16)
    assert [window[0, 0] for window in windows] == [begin] * len(windows)
    assert [window[0, 1:].tolist() for window in windows] == [window[0].tolist() for window in plain]
    ids, labels = training_windows([file], {"text": "{text}"}, tokenizer, 16)
    drawn = calibration_windows([file], None, tokenizer, 3, 16, "s")
    for packed in (ids, drawn):
        assert packed[:, 0].tolist() == [begin] * len(packed)
        assert not (packed[:, 1:] == begin).any()
    assert labels[:, 0].tolist() == [IGNORED] * len(labels)
    assert (labels[:, 1:] == ids[:, 1:]).all()


def test_a_chat_that_begins_with_the_token_gets_no_second_one(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer, begin = with_bos(tokenizer)
    tokenizer.chat_template = "<|pad|>" + TEMPLATES["plain"][0]
    file = chat_file(tmp_path, TALK)
    length = len(tokenizer(Chat(tuple(TALK), "").render(tokenizer), add_special_tokens=False)["input_ids"])
    for ids in (
        training_windows([file], {"text": "{messages}"}, tokenizer, length)[0],
        calibration_windows([file], "{messages}", tokenizer, 1, length, "s"),
        evaluation_windows(file, "{messages}", tokenizer, length)[0],
    ):
        assert ids[0].tolist().count(begin) == 1
        assert ids[0, 0] == begin
