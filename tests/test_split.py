"""Splitting one text among clients: nothing is lost or given twice, the seed decides, and the job that comes out runs."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from fedgrove.report.split import holdings_page
from fedgrove.split import Split, _hold_out, by_dirichlet, split
from small import Small, cli, complaint, lines

LABELS = ("ash", "birch", "cedar", "elm", "fir")


@pytest.fixture
def posts(tmp_path: Path) -> Path:
    file = tmp_path / "posts.jsonl"
    rows = [{"text": f"post {i} is about trees and their leaves", "label": LABELS[i * i % 5]} for i in range(300)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def dealt(made: Split) -> dict[str, list[str]]:
    """The texts of every file that was written."""
    return {file.stem: [row["text"] for row in lines(file)] for file in sorted(made.folder.glob("*.jsonl"))}


@pytest.mark.parametrize("by", ["iid", "dirichlet", "field", "size"])
def test_every_record_goes_to_one_client_or_is_held_out(posts: Path, tmp_path: Path, by: str) -> None:
    made = split(posts, tmp_path / "out", by=by, clients=3, field="label", alpha=2.0)  # type: ignore[arg-type]
    got = dealt(made)
    assert sorted(text for texts in got.values() for text in texts) == sorted(row["text"] for row in lines(posts))
    assert len(got.pop("heldout")) == made.held_out == 30
    assert {holding.name: holding.records for holding in made.holdings} == {name: len(texts) for name, texts in got.items()}
    for holding in made.holdings:
        assert sum(holding.labels.values()) == holding.records
        assert holding.characters > 30 * holding.records


@pytest.mark.parametrize("by", ["iid", "dirichlet", "field", "size"])
def test_of_every_client_its_own_records_are_held_out_and_none_twice(posts: Path, tmp_path: Path, by: str) -> None:
    def deal(name: str) -> Split:
        return split(posts, tmp_path / name, by=by, clients=3, field="label", alpha=2.0, held_out_each=0.2)  # type: ignore[arg-type]

    made = deal("out")
    got = dealt(made)
    own = {file.stem: [row["text"] for row in lines(file)] for file in (made.folder / "heldout").iterdir()}
    every = [text for texts in (*got.values(), *own.values()) for text in texts]
    assert sorted(every) == sorted(row["text"] for row in lines(posts)), "no record in two files, and none lost"
    assert made.held_out_each == {name: len(texts) for name, texts in own.items()}
    for holding in made.holdings:
        number = len(own[holding.name])
        assert number == round(0.2 * (holding.records + number))
    data = tomllib.loads((made.folder / "job.toml").read_text())["evaluate"]["data"]
    assert {one["name"]: one["path"] for one in data} == {
        "heldout": "heldout.jsonl", **{holding.name: f"heldout/{holding.name}.jsonl" for holding in made.holdings}
    }  # fmt: skip
    again = deal("again")
    assert all((again.folder / name).read_bytes() == (made.folder / name).read_bytes()
               for one in made.holdings for name in (f"{one.name}.jsonl", f"heldout/{one.name}.jsonl"))  # fmt: skip
    plain = split(posts, tmp_path / "plain", by=by, clients=3, field="label", alpha=2.0)  # type: ignore[arg-type]
    whole = {name: {*texts, *own.get(name, [])} for name, texts in got.items()}
    assert whole == {name: set(texts) for name, texts in dealt(plain).items()}, "who gets what does not change"


def test_what_a_client_holds_out_is_of_the_same_kinds_as_what_it_keeps() -> None:
    """χ² of label shares: p below 0.01 for at most 1 in 20 owners, over 20 seeds; a draw that ignores order passes, too."""
    labels = [LABELS[i * i % 5] + "abc"[i % 3] for i in range(600)]
    values = sorted(set(labels))
    ok = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        for part in by_dirichlet(range(600), labels, 8, 0.3, rng):
            held = set(_hold_out(part, labels, 0.2, rng))
            table = np.array([[sum(labels[i] == v for i in part if (i in held) == is_held) for v in values]
                              for is_held in (True, False)])  # fmt: skip
            table = table[:, table.sum(0) > 0]
            if not held or table.shape[1] < 2:
                continue
            expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
            statistic = float(((table - expected) ** 2 / expected).sum())
            degrees = table.shape[1] - 1
            ok.append(float(torch.special.gammaincc(torch.tensor(degrees / 2), torch.tensor(statistic / 2))) > 0.01)
            rare = np.abs(table[0] - 0.2 * table.sum(0))
            assert rare.max() < 1.5, "each label gives its share, up to one record"
    assert len(ok) > 100
    assert sum(ok) >= 0.95 * len(ok)


def test_a_client_with_one_record_keeps_it() -> None:
    rng = np.random.default_rng(0)
    assert _hold_out([7], [], 0.9, rng) == []
    assert len(_hold_out([7, 8], [], 0.9, rng)) == 1


def test_the_seed_decides(posts: Path, tmp_path: Path) -> None:
    def draw(name: str, seed: int) -> dict[str, list[str]]:
        return dealt(split(posts, tmp_path / name, by="dirichlet", clients=4, field="label", seed=seed))

    assert draw("a", 0) == draw("b", 0) != draw("c", 1)


def test_iid_is_even_and_a_small_alpha_is_not(posts: Path, tmp_path: Path) -> None:
    def shares(by: str, alpha: float) -> list[float]:
        """Of each client: how much of it is its most frequent label."""
        made = split(posts, tmp_path / f"{by}-{alpha}", by=by, clients=5, field="label", alpha=alpha, seed=3)  # type: ignore[arg-type]
        return [max(holding.labels.values()) / holding.records for holding in made.holdings]

    even = [holding.records for holding in split(posts, tmp_path / "even", clients=7).holdings]
    assert max(even) - min(even) <= 1
    uneven = shares("dirichlet", 0.1)
    assert sum(uneven) / len(uneven) > 0.6
    assert max(shares("dirichlet", 1000.0)) < 0.6
    sizes = [holding.records for holding in split(posts, tmp_path / "sizes", by="size", clients=4, alpha=0.5).holdings]
    assert max(sizes) > 2 * min(sizes)


def test_a_field_names_its_clients(posts: Path, tmp_path: Path) -> None:
    made = split(posts, tmp_path / "one-each", by="field", field="label", held_out=0)
    present = {row["label"] for row in lines(posts)}
    assert {holding.name for holding in made.holdings} == present
    assert all(set(holding.labels) == {holding.name} for holding in made.holdings)
    assert not (made.folder / "heldout.jsonl").exists()
    two = split(posts, tmp_path / "two", by="field", field="label", clients=2)
    assert {holding.name for holding in two.holdings} == {"client-1", "client-2"}
    assert not set(two.holdings[0].labels) & set(two.holdings[1].labels)


def test_a_client_that_would_be_empty_is_said_and_left_out(posts: Path, tmp_path: Path) -> None:
    status, out, _ = cli("split", posts, "--clients", 12, "--by", "size", "--alpha", 0.02, "--out", tmp_path / "out", "--quiet")
    assert status == 0
    empty = re.findall(r"(client-\d+) got no record and is left out", out)
    assert empty
    job = tomllib.loads((tmp_path / "out" / "job.toml").read_text())
    assert {client["name"] for client in job["clients"]} == {f"client-{i + 1}" for i in range(12)} - set(empty)


def test_the_job_that_comes_out_runs(small: Small, tmp_path: Path) -> None:
    out = tmp_path / "out"
    notes = tmp_path / "notes.csv"
    words = [word.strip('",') for word in small.texts["ash"].read_text().split()]
    notes.write_text("ward,note\n" + "".join(f"{'ab'[i % 2]},{' '.join(words[i : i + 40])}\n" for i in range(60)))
    status, told, err = cli("split", notes, "--by", "field", "--field", "ward", "--text", "{note}", "--model", small.model,
                            "--out", out)  # fmt: skip
    assert status == 0, err
    assert "Who holds what" in told
    changes = ("--set", "stages.0.samples=2", "--set", "stages.0.length=16", "--set", "evaluate.length=32")
    assert cli("run", out / "job.toml", "--out", tmp_path / "run", "--quiet", *changes)[0] == 0
    assert set(tomllib.loads((tmp_path / "run" / "job.toml").read_text())["clients"][0]) > {"name", "data", "text"}


def test_plain_text_is_dealt_by_passages(tmp_path: Path) -> None:
    text = "".join(f"line {i} of a long text\n" for i in range(2000))
    (tmp_path / "a.txt").write_text(text)
    got = dealt(split(tmp_path / "a.txt", tmp_path / "out", clients=2, held_out=0))
    assert sorted("".join(got["client-1"] + got["client-2"]).splitlines()) == sorted(text.splitlines())


def test_the_picture_says_every_number_and_asks_no_network(posts: Path, tmp_path: Path) -> None:
    made = split(posts, tmp_path / "out", by="dirichlet", clients=3, field="label")
    page = holdings_page(made.holdings, "posts <b>")
    for holding in made.holdings:
        for label, number in holding.labels.items():
            assert f"{holding.name}, {label}: {number:,} records" in page
    assert "posts &lt;b&gt;" in page
    assert "://" not in page
    assert "<script" not in page
    bars = holdings_page(split(posts, tmp_path / "bars", clients=3).holdings, "posts")
    assert bars.count("<rect") == 3


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--by", "dirichlet", "--clients", 3), "--field label"),
        (("--by", "field", "--field", "label", "--clients", 9), "has 3 values; give 3 at most"),
        (("--by", "iid"), "--clients 8"),
        (("--clients", 3, "--field", "colour"), "no field 'colour'; it has: text, label"),
        (("--clients", 3, "--text", "{body}"), "no field 'body'"),
        (("--clients", 3, "--text", "body"), "--text: it names no field"),
        (("--clients", 3, "--heldout", 1.0), "--heldout"),
        (("--clients", 3, "--heldout-each", -0.1), "--heldout-each"),
        (("--clients", 3, "--alpha", 0), "--alpha"),
        (("--clients", 0), "--clients: must be at least 1"),
    ],
)
def test_what_does_not_fit_is_named(posts: Path, tmp_path: Path, args: tuple[object, ...], words: str) -> None:
    assert words in complaint("split", posts, *args, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_taken_stays(posts: Path, tmp_path: Path) -> None:
    assert "exists already" in complaint("split", posts, "--clients", 3, "--out", tmp_path)
