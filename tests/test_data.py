"""Private text: files to records to texts to windows of tokens."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fedgrove.data import calibration_windows, evaluation_windows, read_texts, template_fields
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


def test_templates_reach_into_nothing() -> None:
    assert template_fields("{question}\n{the answer}") == ["question", "the answer"]
    assert template_fields("{{not a field}} {text}") == ["text"]
    for bad in ("{a.b}", "{a[0]}", "{}", "{0}", "{text!r}", "{text:>10}", "{__class__.x}", "no field"):
        with pytest.raises(ValueError, match="field"):
            template_fields(bad)


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


def test_all_files_of_a_client_are_drawn_from(small: Small, tokenizer: PreTrainedTokenizerBase) -> None:
    files = [small.texts["ash"], small.texts["birch"], small.texts["cedar"]]
    windows = calibration_windows(files, None, tokenizer, 5, 16, "s")
    each = [calibration_windows([file], None, tokenizer, n, 16, "s") for file, n in zip(files, (1, 2, 2), strict=True)]
    assert torch.equal(windows, torch.cat(each))
    assert calibration_windows(files, None, tokenizer, 2, 16, "s").shape == (2, 16), "fewer windows than files"


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
