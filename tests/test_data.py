"""Private text: files to records to texts to windows of tokens."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fedgrove.data.sources import facts_of, read_texts
from fedgrove.data.template import MISSING, look_up, template_fields
from fedgrove.data.windows import IGNORED, calibration_windows, evaluation_windows, training_windows
from fedgrove.errors import FedgroveError
from small import Small

RECORDS = [{"question": "Who?", "answer": "Ash."}, {"question": "Où ?", "answer": 'A "quoted"\nline.'}]
TEXTS = ["Who?\nAsh.", 'Où ?\nA "quoted"\nline.']
TEMPLATE = "{question}\n{answer}"


@pytest.fixture(scope="module")
def tokenizer(small: Small) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(small.model)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".JSONL"])
def test_every_kind_of_file_gives_the_same_texts(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a{suffix}"
    match suffix.lower():
        case ".csv":
            with file.open("w", newline="", encoding="utf-8-sig") as opened:  # as a spreadsheet saves it
                writer = csv.DictWriter(opened, ["question", "answer"])
                writer.writeheader()
                writer.writerows(RECORDS)
        case ".parquet":
            datasets.Dataset.from_list(RECORDS).to_parquet(file)
        case _:
            file.write_text("\n\n".join(json.dumps(record) for record in RECORDS), encoding="utf-8")
    assert list(read_texts(file, TEMPLATE)) == TEXTS


def test_reading_parquet_leaves_no_copy_of_private_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    file = tmp_path / "a.parquet"
    datasets.Dataset.from_list(RECORDS).to_parquet(file)
    assert list(read_texts(file, TEMPLATE)) == TEXTS
    assert sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()) == 0, "more than an empty lock file"


def test_a_record_without_text_is_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": null}\n{"text": " "}\n{"text": 7, "more": [1]}\n')
    assert list(read_texts(file)) == ["7"]


def test_plain_text_is_cut_into_passages_that_lose_nothing(tmp_path: Path) -> None:
    text = "".join(f"line {i} of a long text\n" for i in range(1000))
    (tmp_path / "a.md").write_text(text)
    passages = list(read_texts(tmp_path / "a.md"))
    assert "".join(passages) == text
    assert len(passages) > 3
    assert all(passage.endswith("\n") for passage in passages)


@pytest.mark.parametrize(
    ("template", "fields"),
    [
        ("{question}\n{the answer}", ["question", "the answer"]),
        ("{{not a field}} {text}", ["text"]),
        ("{{{text}}}", ["text"]),
        ("{review/text}{review.score}", ["review/text", "review.score"]),
        ("{a{{b}}}", ["a{b}"]),
        ("{factual?} {1st_note} {Note (free)}", ["factual?", "1st_note", "Note (free)"]),
        ("{text!r}{text:>10}{a[0]}", ["text!r", "text:>10", "a[0]"]),
    ],
)
def test_any_key_may_stand_between_braces(template: str, fields: list[str]) -> None:
    assert template_fields(template) == fields


@pytest.mark.parametrize("template", ["no field", "{}", "{text", "text}", "{{text}}", "{a{b}", ""])
def test_a_template_that_is_none_is_refused(template: str) -> None:
    with pytest.raises(ValueError, match="field"):
        template_fields(template)


def test_a_template_reads_keys_and_nothing_else() -> None:
    record = {"a": {"b": {"c": 1}, "b.c": 2}, "a.b": 3, "d": [4], "e": "text"}
    assert look_up(record, "a.b") == 3, "the key itself comes first"
    assert look_up(record, "a.b.c") == 2, "then the object under the longest key"
    for field in ("d.0", "d[0]", "e.upper", "e.__class__", "a.", ".a", "f"):
        assert look_up(record, field) is MISSING


def test_windows_are_packed_and_drawn_by_the_seed(small: Small, tokenizer: PreTrainedTokenizerBase) -> None:
    file = small.texts["ash"]
    windows = calibration_windows([file], None, tokenizer, 4, 16, "0/0/ash")
    assert (windows.shape, windows.dtype) == ((4, 16), torch.int64)
    ids = tokenizer(file.read_text(), add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    assert windows.view(-1).tolist() == ids[:64], "one passage: the windows are its beginning, with no padding"


def test_another_seed_draws_other_records(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": f"record number {i} says little"}) + "\n" for i in range(200)))

    def draw(seed: str) -> torch.Tensor:
        return calibration_windows([file], None, tokenizer, 3, 20, seed)

    assert torch.equal(draw("a"), draw("a"))
    assert not torch.equal(draw("a"), draw("b"))
    assert (draw("a") == tokenizer.eos_token_id).any(), "records are told apart by the end-of-text token"


def test_all_files_of_a_client_are_one_source(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    large, tiny = tmp_path / "large.jsonl", tmp_path / "tiny.jsonl"
    large.write_text("".join(json.dumps({"text": f"a large file says {i}"}) + "\n" for i in range(300)))
    tiny.write_text('{"text": "one tiny record"}\n')
    joined = tmp_path / "together" / "large.jsonl"
    joined.parent.mkdir()
    joined.write_text(large.read_text() + tiny.read_text())
    one, both = (calibration_windows(paths, None, tokenizer, 40, 16, "s") for paths in ([joined], [large, tiny]))
    assert torch.equal(one, both)
    with pytest.raises(FedgroveError, match=r"large\.jsonl and 1 more: \d+ tokens, but 4000 windows of 16 need 64000"):
        calibration_windows([large, tiny], None, tokenizer, 4000, 16, "s")


def test_a_text_with_too_few_tokens_says_how_many_there_are(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file = tmp_path / "a.txt"
    file.write_text("four words are here\n" * 3)
    count = len(tokenizer(file.read_text(), add_special_tokens=False)["input_ids"]) + 1
    assert calibration_windows([file], None, tokenizer, 1, count, "s").shape == (1, count)
    with pytest.raises(FedgroveError, match=f"{count} tokens, but 1 windows of {count + 1} need {count + 1}"):
        calibration_windows([file], None, tokenizer, 1, count + 1, "s")


def test_evaluation_cuts_the_text_as_it_stands(small: Small, tokenizer: PreTrainedTokenizerBase) -> None:
    file = small.texts["held-0"]
    ids = tokenizer(file.read_text(), add_special_tokens=False)["input_ids"]
    windows = evaluation_windows(file, None, tokenizer, 50)
    assert torch.cat(windows, dim=1)[0].tolist() == ids[: len(ids) - (len(ids) % 50 == 1)]
    assert [window.shape[1] for window in windows[:-1]] == [50] * (len(windows) - 1)
    assert [window.shape[1] for window in evaluation_windows(file, None, tokenizer, 50, 2)] == [50, 50]


# Folders, data sets and chats

CHATML = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TALK = [
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "An ash tree."},
    {"role": "user", "content": "Where?"},
    {"role": "assistant", "content": "By the river."},
]


@pytest.fixture
def talker(small: Small) -> PreTrainedTokenizerBase:
    """A tokenizer that knows how chats are written."""
    chatting = AutoTokenizer.from_pretrained(small.model)
    chatting.chat_template = CHATML
    return chatting


def write_chats(file: Path, *talks: object) -> Path:
    file.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    return file


def test_a_folder_is_its_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.csv").write_text("text\nsecond\n")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n')
    (tmp_path / "z.txt").write_text("third\n")
    (tmp_path / ".hidden.txt").write_text("never\n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert list(read_texts(tmp_path)) == ["first", "second", "third\n"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FedgroveError, match="empty: this folder holds no"):
        list(read_texts(tmp_path / "empty"))


def test_a_folder_is_evaluated_file_by_file(tmp_path: Path, small: Small, tokenizer: PreTrainedTokenizerBase) -> None:
    for name in ("held-0", "held-1"):
        (tmp_path / f"{name}.txt").write_text(small.texts[name].read_text())
    ids: list[int] = []
    for name in ("held-0", "held-1"):
        ids += tokenizer(small.texts[name].read_text(), add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    assert (
        torch.cat(evaluation_windows(tmp_path, None, tokenizer, 50), dim=1)[0].tolist()
        == ids[: len(ids) - (len(ids) % 50 == 1)]
    )


def test_a_saved_data_set_is_read_where_it_lies(tmp_path: Path) -> None:
    datasets.Dataset.from_list(RECORDS).save_to_disk(tmp_path / "one")
    assert list(read_texts(tmp_path / "one", TEMPLATE)) == TEXTS
    splits = {"train": datasets.Dataset.from_list(RECORDS), "test": datasets.Dataset.from_list(RECORDS[:1])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "two")
    with pytest.raises(FedgroveError, match=r"it has the splits train, test; name the folder of one: .*two/train"):
        list(read_texts(tmp_path / "two", TEMPLATE))
    assert list(read_texts(tmp_path / "two" / "test", TEMPLATE)) == TEXTS[:1]
    assert facts_of(tmp_path / "two" / "test") != facts_of(tmp_path / "two" / "train")


def test_a_data_set_of_the_hub_is_streamed_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"text": f"the {split} split"}) + "\n")
    assert list(read_texts(Path(f"hub:{tmp_path}"))) == ["the train split"], "a directory has the hub's form too"
    assert list(read_texts(Path(f"hub:{tmp_path}:test"))) == ["the test split"]
    assert list(read_texts(Path(f"hub:{tmp_path}:default:test"))) == ["the test split"]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(FedgroveError, match="hub:nobody/nothing: not a data set that the hub gives out to you here"):
        list(read_texts(Path("hub:nobody/nothing")))
    with pytest.raises(FedgroveError, match="write hub:OWNER/NAME"):
        list(read_texts(Path("hub:a:b:c:d")))


def test_a_job_may_name_folders_and_the_hub(small: Small, tmp_path: Path) -> None:
    from fedgrove.job.load import load

    data = [str(tmp_path), "hub:owner/name:train"]
    job = load(small.job("sources", clients=[{"name": "ash", "data": data}]))
    assert [str(path) for path in job.clients[0].data] == data


def test_messages_are_written_by_the_chat_template(tmp_path: Path, talker: PreTrainedTokenizerBase) -> None:
    file = write_chats(tmp_path / "a.jsonl", TALK[:2])
    expected = "<|user|>Who are you?</s>\n<|assistant|>An ash tree.</s>\n"
    assert list(read_texts(file, "{messages}", talker)) == [expected]
    length = len(talker(expected, add_special_tokens=False)["input_ids"]) + 1
    windows = calibration_windows([file], "{messages}", talker, 1, length, "s")
    assert talker.decode(windows[0]) == expected + talker.eos_token


def test_only_what_the_assistant_says_is_learnt(tmp_path: Path, talker: PreTrainedTokenizerBase) -> None:
    file = write_chats(tmp_path / "a.jsonl", TALK)
    ids, labels = training_windows([file], {"text": "{messages}"}, talker, 8)
    learnt = talker.decode([int(label) for label in labels.view(-1) if label != IGNORED])
    assert "An ash tree.</s>" in learnt
    assert "By the river" in learnt
    assert "Who" not in learnt
    assert "Where" not in learnt
    assert bool(((labels == ids) | (labels == IGNORED)).all())


def test_a_turn_that_the_template_rewrites_later_is_not_learnt(tmp_path: Path, talker: PreTrainedTokenizerBase) -> None:
    talker.chat_template = (  # as Qwen 3 does: only the last turn is written with what was thought
        "{% for m in messages %}<|{{ m.role }}|>{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}"
        "{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    _, labels = training_windows([write_chats(tmp_path / "a.jsonl", TALK)], {"text": "{messages}"}, talker, 8)
    learnt = talker.decode([int(label) for label in labels.view(-1) if label != IGNORED])
    assert "think" in learnt
    assert "ash" not in learnt


@pytest.mark.parametrize(
    ("template", "talk", "words"),
    [
        ("{messages}!", TALK, "line 1: the field 'messages' holds messages; its template is \"{messages}\" and nothing else"),
        ("{messages}", TALK[:1], "line 1: no turn of the assistant"),
    ],
)
def test_chats_that_cannot_be_used_are_named(
    tmp_path: Path, talker: PreTrainedTokenizerBase, template: str, talk: object, words: str
) -> None:
    with pytest.raises(FedgroveError) as fault:
        training_windows([write_chats(tmp_path / "a.jsonl", talk)], {"text": template}, talker, 8)
    assert words in str(fault.value)


def test_a_model_that_cannot_chat_says_so(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file = write_chats(tmp_path / "a.jsonl", TALK)
    with pytest.raises(FedgroveError, match="line 1: the field holds messages, but the model's tokenizer has no chat template"):
        list(read_texts(file, "{messages}", tokenizer))


@pytest.mark.parametrize("comma", [",", ";", "\t"])
def test_a_csv_is_read_by_the_separator_of_its_first_line(tmp_path: Path, comma: str) -> None:
    file = tmp_path / "a.csv"
    file.write_text(f'id{comma}note\n1{comma}"one, two; three\tfour"\n2{comma}five\n')
    assert list(read_texts(file, "{id}: {note}")) == ["1: one, two; three\tfour", "2: five"]
    file.write_text("note\nall of this line\n")
    assert list(read_texts(file, "{note}")) == ["all of this line"]


def test_text_that_would_be_cut_off_at_a_comma_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("id,note\n1,one, two\n")
    with pytest.raises(FedgroveError, match=r"line 2: more fields than the first line names; .* in double quotes"):
        list(read_texts(file, "{note}"))


def test_a_source_that_was_given_no_template_is_told_one(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("note\nhello\n")
    with pytest.raises(FedgroveError, match=r"it has: note\. Fix the template \(key text\): .* such as text = \"\{note\}\""):
        list(read_texts(file))


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet", "txt"])
def test_a_long_text_is_read_whole(tmp_path: Path, suffix: str) -> None:
    long = "word " * 60_000  # longer than the 131,072 characters that csv takes by default
    file = tmp_path / f"a.{suffix}"
    match suffix:
        case "csv" | "tsv":
            with file.open("w", newline="", encoding="utf-8") as opened:
                writer = csv.writer(opened, delimiter="," if suffix == "csv" else "\t")
                writer.writerows([["id", "text"], ["1", long], ["2", "short"]])
        case "parquet":
            datasets.Dataset.from_list([{"text": long}, {"text": "short"}]).to_parquet(file)
        case "jsonl":
            file.write_text(f"{json.dumps({'text': long})}\n{json.dumps({'text': 'short'})}\n")
        case "txt":
            file.write_text(f"{long}\nshort")
    texts = list(read_texts(file))
    if suffix == "txt":
        assert "".join(texts) == f"{long}\nshort"
        assert max(map(len, texts)) <= 8192, "a line without an end is cut at white space"
        assert all(text.endswith("d") for text in texts[:-2])
    else:
        assert texts == [long, "short"]


def test_a_tsv_is_read_by_tabs_whatever_else_its_first_line_holds(tmp_path: Path) -> None:
    file = tmp_path / "a.tsv"
    file.write_text("name, first, last\tnote\nAsh, the tree\thello\n")
    assert list(read_texts(file, "{note}")) == ["hello"]
    file = tmp_path / "a.csv"
    file.write_text('"first, last, or both";note\nAsh;hello\n')
    assert list(read_texts(file, "{note}")) == ["hello"], "what is quoted separates nothing"


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('note\none\n"two\nthree\nfour\n', 3),
        ('note\n"one"\n"two', 3),
        ('"note\none\ntwo\n', 1),
        ('id,note\n1,"a ""b"" c\n2,d\n', 2),
    ],
)
def test_a_quote_that_is_never_closed_does_not_swallow_the_rest_of_the_file(tmp_path: Path, content: str, line: int) -> None:
    file = tmp_path / "a.csv"
    file.write_text(content)
    with pytest.raises(FedgroveError, match=f"a.csv, line {line}: the record that begins here opens a double quote") as caught:
        list(read_texts(file, "{note}"))
    assert caught.value.remedy is not None


def test_a_csv_without_a_last_line_end_or_without_records_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    for content, texts in (('note\none\n"two"', ["one", "two"]), ("note\n", []), ("note", []), ("", [])):
        file.write_text(content)
        assert list(read_texts(file, "{note}")) == texts


def test_a_parquet_file_may_have_brackets_in_its_name(tmp_path: Path) -> None:
    for name in ("notes [2024].parquet", "notes 2.parquet"):
        datasets.Dataset.from_list([{"text": name}]).to_parquet(tmp_path / name)
    assert list(read_texts(tmp_path / "notes [2024].parquet")) == ["notes [2024].parquet"]


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 100_000])
def test_json_that_python_does_not_read_is_named(tmp_path: Path, value: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(f'{{"text": {value}}}\n')
    with pytest.raises(FedgroveError, match=r"a\.jsonl, line 1: not JSON \(.*\); one object a line is expected"):
        list(read_texts(file))
