"""Records as people have them: each value becomes its text, or one line says which record holds no text and what to do."""

from __future__ import annotations

import bz2
import csv
import datetime
import decimal
import gzip
import io
import json
import lzma
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from fedgrove.data import readers
from fedgrove.data.readers import PASSAGE
from fedgrove.data.sources import read_fields, read_texts, suggest_template
from fedgrove.data.tally import Tally
from fedgrove.data.template import MISSING, look_up, template_fields, template_of
from fedgrove.errors import FedgroveError

NOTE = "The patient reports mild pain, but no fever."
GIVEN = settings(
    max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def refused(path: Path, template: str | None = None) -> str:
    """The line with which reading a source ends."""
    with pytest.raises(FedgroveError) as caught:
        list(read_texts(path, template))
    line = str(caught.value)
    assert "\n" not in line
    assert path.name in line
    assert caught.value.remedy or "no such file" in line
    return line


# Values


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a text", "a text"),
        (7, "7"),
        (-(10**30), str(-(10**30))),
        (0, "0"),
        (2.5, "2.5"),
        (1e300, "1e+300"),
        ("", None),
        (" \n", None),
        (None, None),
        (math.nan, None),
        ("\ud83d broken", "\ufffd broken"),
        ("\ude00\ud83d", "\ufffd\ufffd"),
        ("\ud83d\ude00", "😀"),
        ("a\0b", "a\0b"),
        ("{text}", "{text}"),
        ("\u2028line\u2029", "\u2028line\u2029"),
        ("عربى \u202e", "عربى \u202e"),
    ],
)
def test_a_value_of_json_becomes_text(tmp_path: Path, value: Any, text: str | None) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": value}) + "\n")
    assert list(read_texts(file)) == ([] if text is None else [text])


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (["one", "two"], "a list"),
        ([], None),
        ([[]], "a list"),
        ([None], "a list"),
        ([{"a": 1}], "a list"),
        ({"en": "one"}, "an object"),
        ({}, "an object"),
        (True, "true or false"),
        (False, "true or false"),
        (math.inf, "infinity"),
        (-math.inf, "infinity"),
    ],
)
@pytest.mark.parametrize("template", ["{text}", "Note: {text}"])
def test_what_is_no_text_is_named(tmp_path: Path, value: Any, kind: str | None, template: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": NOTE}) + "\n\n" + json.dumps({"text": value}) + "\n")
    if kind is None and template == "{text}":
        assert list(read_texts(file)) == [NOTE], "an empty list is a conversation without messages"
    else:
        assert f"line 3: the field 'text' holds {kind or 'a list'}; name a text field" in refused(file, template)


@GIVEN
@given(value=JSON)
def test_any_json_is_its_text_or_one_line(tmp_path: Path, value: Any) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": value}) + "\n")
    if isinstance(value, str | int | float) and not isinstance(value, bool) and value not in (math.inf, -math.inf):
        text = "" if value != value else re.sub("[\ud800-\udfff]", "\ufffd", json.loads(json.dumps(str(value))))
        assert list(read_texts(file)) == ([text] if text.strip() else [])
    elif value is None or value == []:
        assert list(read_texts(file)) == []
    else:
        refused(file)


DAY = datetime.date(2024, 7, 26)


@pytest.mark.parametrize(
    ("column", "text"),
    [
        (pyarrow.array([NOTE]), NOTE),
        (pyarrow.array([NOTE], pyarrow.large_string()), NOTE),
        (pyarrow.array([NOTE]).dictionary_encode(), NOTE),
        (pyarrow.array([5], pyarrow.uint64()), "5"),
        (pyarrow.array([0.5], pyarrow.float32()), "0.5"),
        (pyarrow.array([math.nan]), None),
        (pyarrow.array([None], pyarrow.string()), None),
        (pyarrow.nulls(1), None),
        (pyarrow.array([decimal.Decimal("12.30")]), "12.30"),
        (pyarrow.array([DAY]), "2024-07-26"),
        (pyarrow.array([datetime.datetime(2024, 7, 26, 9, 30)]), "2024-07-26 09:30:00"),
        (pyarrow.array([datetime.time(9, 30)]), "09:30:00"),
        (pyarrow.array([b"bytes"]), "bytes"),
        (pyarrow.array([True]), "true or false"),
        (pyarrow.array([["a", "b"]]), "a list"),
        (pyarrow.array([{"en": "a"}]), "an object"),
        (pyarrow.array([datetime.timedelta(1)]), "a timedelta"),
        (pyarrow.array([math.inf]), "infinity"),
        (pyarrow.array([[("k", "v")]], pyarrow.map_(pyarrow.string(), pyarrow.string())), "a list"),
    ],
)
def test_a_value_of_parquet_becomes_text_or_is_named(tmp_path: Path, column: Any, text: str | None) -> None:
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": column}), file)
    types = pyarrow.types
    kind = column.type
    if (
        types.is_nested(kind)
        or types.is_boolean(kind)
        or types.is_binary(kind)
        or types.is_duration(kind)
        or text == "infinity"
    ):
        assert f"record 1: the field 'text' holds {text}" in refused(file)
    else:
        assert list(read_texts(file)) == ([] if text is None else [text])


def test_sound_and_pictures_beside_a_text_are_not_decoded(tmp_path: Path) -> None:
    broken = {"bytes": b"no sound, no picture", "path": None}
    table = datasets.Dataset.from_list([{"text": NOTE, "sound": broken, "picture": broken}])
    table = table.cast_column("sound", datasets.Audio()).cast_column("picture", datasets.Image())
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    assert list(read_texts(tmp_path / "a.parquet")) == list(read_texts(tmp_path / "saved")) == [NOTE]
    assert "holds an object" in refused(tmp_path / "a.parquet", "{sound}")


def test_two_columns_of_one_name_are_named(tmp_path: Path) -> None:
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], ["text", "text"])
    parquet.write_table(twice, tmp_path / "a.parquet")
    assert "2 columns are named 'text'" in refused(tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("id,text,text\n1,a,b\n")
    assert "line 1: 2 columns are named 'text'" in refused(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_text("id,text,,\n1,a,,\n")
    assert list(read_texts(tmp_path / "a.csv")) == ["a"], "columns without a name are those of a spreadsheet's margin"


# Fields


KEYS = [
    "review/text",
    "review.score",
    "factual?",
    "1st_note",
    "a-b",
    "Überschrift",
    "笔记",
    "a:b",
    "a!r",
    "a[0]",
    "a{b}c",
    '"quoted"',
    "back\\slash",
    "__class__",
    "0",
    "😀",
]


@pytest.mark.parametrize("field", [*KEYS, "Note (free)", "a b", "tab\there", "line\nbreak", " "])
def test_any_key_can_be_named_and_the_remedy_names_it_so_that_it_works(tmp_path: Path, field: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"id": 1, field: NOTE}) + "\n")
    remedy = re.search(r'such as text = ("(?:[^"\\]|\\.)*")', refused(file))
    assert remedy, "a remedy is said"
    template = json.loads(remedy[1])
    assert template_fields(template) == [field]
    assert list(read_texts(file, template)) == [NOTE]


@pytest.mark.parametrize("field", ["{", "{}", "{a}", "a}"])
def test_a_key_that_no_template_can_name_is_not_suggested(tmp_path: Path, field: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({field: NOTE}) + "\n")
    assert "such as" not in refused(tmp_path / "a.jsonl")


@GIVEN
@given(key=st.text(min_size=1, max_size=6), value=TEXT)
def test_a_template_of_a_key_reads_that_key(key: str, value: str) -> None:
    template = template_of(key)
    assume(template is not None)
    assert template is not None
    assert template_fields(template) == [key]
    assert look_up({key: value}, key) == value


@GIVEN
@given(record=st.dictionaries(st.text(max_size=5), JSON, max_size=4))
def test_what_is_suggested_can_be_read(record: dict[str, Any]) -> None:
    template = suggest_template(record)
    if template is not None:
        (field,) = template_fields(template)
        assert look_up(record, field) is not MISSING


def test_a_field_of_an_object_is_reached(tmp_path: Path) -> None:
    record = {"data": {"text": NOTE, "meta": {"by": "ash"}}, "data.by": "birch"}
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(record) + "\n")
    assert list(read_texts(file, "{data.text} {data.meta.by} {data.by}")) == [f"{NOTE} ash birch"]
    assert "no field 'data.none'" in refused(file, "{data.none}")
    datasets.Dataset.from_list([record]).to_parquet(tmp_path / "a.parquet")
    assert list(read_texts(tmp_path / "a.parquet", "{data.text} {data.meta.by} {data.by}")) == [f"{NOTE} ash birch"]
    assert 'such as text = "{data.text}"' in refused(file), "the longest text"


def test_the_fields_of_a_wide_table_fit_into_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(",".join(f"f{i}" for i in range(3000)) + "\n" + "," * 2999 + "\n")
    assert len(refused(tmp_path / "a.csv")) < 500


# Files


def packed(content: str, suffix: str) -> bytes:
    data = content.encode()
    return {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}.get(suffix, bytes)(data)


@pytest.mark.parametrize("packing", ["", ".gz", ".bz2", ".xz"])
@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".json", '[{"text": "one"}, {"text": "two"}]'),
        (".json", '\ufeff [\n {"text": "one"}\n,\n{"text": "two"} ]\n'),
        (".json", '{"text": "one"}\n{"text": "two"}'),
        (".jsonl", '[{"text": "one"},{"text": "two"}]'),
        (".ndjson", '{"text": "one"}\r\n\r\n{"text": "two"}\r\n'),
        (".tsv", "id\ttext\n1\tone\n2\ttwo\n"),
        (".tab", '\ufeffid\ttext\r\n1\t"one"\r\n2\ttwo\r\n'),
        (".csv", "sep=;\nid;text\n1;one\n2;two\n"),
        (".csv", '"sep=|"\nid|text\n1|one\n2|two\n'),
        (".csv", "id|text\n1|one\n2|two\n"),
        (".csv", "id,text\r1,one\r2,two\r"),
        (".CSV", '"Notiz, frei";text\n"x, y";one\n"x; y";two\n'),
        (".csv", '"a;b;c",text\n"1;2",one\n3,two\n'),
        (".csv", "text\none\ntwo\n"),
    ],
)
def test_a_file_is_what_it_holds(tmp_path: Path, suffix: str, content: str, packing: str) -> None:
    file = tmp_path / f"a{suffix}{packing}"
    file.write_bytes(packed(content, packing))
    assert list(read_texts(file)) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.json", '{\n "text": "one"\n}\n', "line 1: the object that begins here goes on in the next line"),
        ("a.json", '{"data": [\n{"text": "one"}]}', "line 1: the object that begins here goes on in the next line"),
        ("a.json", '[{"text": "one"}, 7]', "record 2: not a JSON object"),
        ("a.json", '[{"text": "one"} {"text": "two"}]', "record 1: not JSON (no comma after it)"),
        ("a.json", '[{"text": "one"}', "record 1: the file ends inside its array"),
        ("a.json", '[{"text": "one"}, ', "record 1: the file ends inside its array"),
        ("a.json", '[{"text": "one"},]', "record 2: not JSON"),
        ("a.json", '[{"text": "one"}] [{"text": "two"}]', "text follows the end of its array"),
        ("a.json", "[" * 5000, "record 1: not JSON"),
        ("a.json", '[{"text": ' + "9" * 5000 + "}]", "record 1: not JSON"),
        ("a.json", '"text"', "line 1: not a JSON object"),
        ("a.jsonl", '{"text": "one"}\n{"text": "tw', "line 2: not JSON"),
        ("a.jsonl", "{'text': 'one'}\n", "line 1: not JSON"),
        ("a.jsonl", '{"text": "one"} {"text": "two"}\n', "line 1: not JSON"),
        ("a.csv", 'id,text\n1,"He said: come back.\n2,two\n', "line 2: the record that begins here opens a double quote"),
        ("a.csv", 'id,text\n1,"one" and more\n', "line 2: not CSV in the record that begins here"),
        ("a.csv", "id,text\n1,one,two\n", "line 2: more fields than the first line names"),
        ("a.csv", "id,text\n1,a\0b\n", "it holds zero bytes, so it is no text"),
        ("a.txt", "a\0b", "it holds zero bytes, so it is no text"),
        ("a.pdf", "%PDF", "unknown kind of file"),
        ("a", "text", "unknown kind of file"),
        ("a.zip", "PK", "unknown kind of file"),
        ("a.parquet", "PAR1", "not a parquet file that can be read"),
        ("a.parquet.gz", "PAR1", "unknown kind of file"),
        ("a.jsonl.gz", "no gzip", "not a jsonl file that can be read"),
        ("a.txt.xz", "no xz", "not a txt file that can be read"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_named(tmp_path: Path, name: str, content: str, line: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert line in refused(tmp_path / name)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "latin-1", "shift-jis", "cp1252"])
@pytest.mark.parametrize("suffix", [".txt", ".csv", ".jsonl"])
def test_another_encoding_is_named(tmp_path: Path, encoding: str, suffix: str) -> None:
    word = "桜" if encoding == "shift-jis" else "Ärztin"
    content = {".txt": f"{word}\n", ".csv": f"text\n{word}\n", ".jsonl": f'{{"text": "{word}"}}\n'}[suffix]
    (tmp_path / f"a{suffix}").write_bytes(content.encode(encoding))
    refused(tmp_path / f"a{suffix}")


def test_a_file_that_was_cut_off_while_packed_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(NOTE.encode() * 100)[:-20])
    assert "not a txt file that can be read" in refused(tmp_path / "a.txt.gz")


def test_rows_behind_an_open_quote_that_another_quote_closes_are_not_one_text(tmp_path: Path) -> None:
    rows = "".join(f"{i},{NOTE.replace(',', '')}\n" for i in range(3, 500))
    (tmp_path / "a.csv").write_text(f'id,text\n1,one\n2,"He said: come back.\n{rows}500,"\n501,two\n')
    assert "line 3: the record that begins here opens a double quote" in refused(tmp_path / "a.csv")


def test_a_long_letter_of_many_lines_is_one_text(tmp_path: Path) -> None:
    letter = "\n".join(f"Line {i} of the letter{', with a comma' * (i % 3)}" for i in range(2000))
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id", "text"], ["1", letter], ["2", "short"]])
    assert list(read_texts(tmp_path / "a.csv")) == [letter, "short"]


@GIVEN
@given(
    rows=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=8),
    separator=st.sampled_from(",;\t|"),
    quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL, csv.QUOTE_NONNUMERIC]),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_a_table_reads_as_it_was_written(
    tmp_path: Path, rows: Sequence[tuple[str, str]], separator: str, quoting: int, end: str
) -> None:
    bare = "\r" in "".join(text for row in rows for text in row) and quoting != csv.QUOTE_ALL
    assume(not bare)  # releases of Python differ in whether csv.writer puts these in quotes
    file = tmp_path / "a.csv"
    written = io.StringIO(newline="")
    writer = csv.writer(written, delimiter=separator, quoting=quoting, lineterminator=end)  # type: ignore[arg-type]
    writer.writerow(["first", "text"])
    writer.writerows(rows)
    file.write_text(written.getvalue(), encoding="utf-8-sig", newline="")
    fields = [(first, second) for first, second in read_fields(file, {"prompt": "{first}", "text": "{text}"})]
    assert fields == [*rows]


@GIVEN
@given(records=st.lists(st.dictionaries(st.text(max_size=4), JSON, max_size=3), max_size=6), indent=st.sampled_from([None, 1]))
def test_an_array_is_read_one_element_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, records: list[dict[str, Any]], indent: int | None
) -> None:
    monkeypatch.setattr(readers, "CHUNK", 5)
    file = tmp_path / "a.json"
    file.write_text(json.dumps(records, indent=indent))
    assert repr([record for _, record in readers.read_json(file, (), Tally())]) == repr(json.loads(json.dumps(records)))


@GIVEN
@given(text=st.text(st.sampled_from("ab 木\n\r\t"), max_size=300))
def test_passages_are_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(readers, "PASSAGE", 16)
    file = tmp_path / "a.txt"
    file.write_text(text, encoding="utf-8")
    passages = [str(record) for _, record in readers.read_text(file, (), Tally())]
    assert "".join(passages).rstrip() == file.read_text(encoding="utf-8").rstrip()
    assert all(len(passage) <= 32 for passage in passages)


@pytest.mark.parametrize("text", ["word " * 20_000, "木" * 20_000, "x\n" * 20_000, "a" * 5000 + " " + "b" * 20_000])
def test_no_passage_is_longer_than_two(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    passages = list(read_texts(tmp_path / "a.txt"))
    assert "".join(passages) == text
    assert max(map(len, passages)) <= 2 * PASSAGE


# Folders


def test_of_a_folder_the_data_are_read_and_the_rest_is_said(tmp_path: Path) -> None:
    for name, content in {
        "train.jsonl": '{"text": "one"}\n',
        "more/notes.txt": "two",
        "README.md": "# A data set",
        "LICENSE.txt": "MIT",
        "dataset_infos.json": "{}",
        ".cache/x.jsonl": '{"text": "never"}\n',
        "picture.png": "PNG",
        "License agreement.txt": "three",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    tally = Tally()
    assert sorted(part for (part,) in read_fields(tmp_path, {"text": "{text}"}, tally)) == ["one", "three", "two"]
    assert tally.files == 3
    assert sorted(tally.passed_over) == ["LICENSE.txt", "README.md", "dataset_infos.json", "picture.png"]
    assert list(read_texts(tmp_path / "README.md")) == ["# A data set"], "a file that is named is read"
