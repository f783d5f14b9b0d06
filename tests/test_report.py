"""The report: its numbers are the run folder's, it needs nothing but itself, and nothing in a run can break it."""

from __future__ import annotations

import csv
import html
import io
import json
import math
import random
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import tomli_w
from rich.console import Console
from safetensors.numpy import save_file

from fedgrove.errors import FedgroveError
from fedgrove.report import charts
from fedgrove.report.model_card import card
from fedgrove.report.owners import over_owners, own_line, own_perplexities
from fedgrove.report.page import write_report
from fedgrove.report.reader import read
from fedgrove.report.summary import geometric_mean
from fedgrove.report.table import result_table
from fedgrove.report.verdict import own_texts, verdict
from fedgrove.report.words import change, ranges, size
from fedgrove.rounds.disclosure import Disclosure
from fedgrove.stages.prune.report import BLOCK, contributors

VOID = {"meta", "br", "hr", "img", "link", "input"}
PRUNE = {"kind": "prune", "pruner": "wanda", "samples": 4, "length": 16, "rounds": 1}
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")


class Page(HTMLParser):
    """A page taken apart: tags must be balanced, every id may be there once, and charts have the marks of their legends."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"
        for shown, drawn in self._charts():
            assert shown <= drawn, f"a legend shows what its chart does not have: {shown - drawn}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("th", "td"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("th", "td"):
            self.tables[-1][-1][-1] += data
        if "style" not in self.open:
            self.words.append(data)

    def _charts(self) -> Iterator[tuple[set[tuple[str, str]], set[tuple[str, str]]]]:
        """The marks in each chart's legend, and those below it."""
        marks: tuple[set[tuple[str, str]], set[tuple[str, str]]] = (set(), set())
        for tag, attrs in [*self.tags, ("figure", {})]:
            if tag == "figure":
                yield marks
                marks, below = (set(), set()), False
            if attrs.get("role") == "img":
                below = True
            if tag in ("circle", "line", "rect"):
                marks[below].add((tag, attrs.get("class") or ""))

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def attributes(self, name: str) -> list[str]:
        return [value for _, attrs in self.tags if (value := attrs.get(name)) is not None]

    def csv(self, name: str) -> list[list[str]]:
        """A table's download."""
        (link,) = [a["href"] for tag, a in self.tags if tag == "a" and (a.get("download") or "").endswith(f"-{name}.csv")]
        head, _, data = (link or "").partition(",")
        assert head == "data:text/csv;charset=utf-8"
        return list(csv.reader(io.StringIO(unquote(data))))


def make_run(
    folder: Path,
    clients: Sequence[str] = ("ward", "law"),
    texts: Sequence[str] = ("ward", "law"),
    *,
    num_blocks: int = 2,
    rounds: int = 1,
    sample: float = 1.0,
    alone: bool = True,
    linears: Sequence[str] = LINEARS[:2],
) -> Path:
    """A run folder with the files of a real one and drawn numbers."""
    rng = random.Random(0)
    folder.mkdir()
    job = {
        "name": "drawn",
        "seed": 0,
        "model": {"path": "/home/alice/models/tiny", "dtype": "auto"},
        "clients": [{"name": name, "data": [f"/home/alice/private/{i}.jsonl"]} for i, name in enumerate(clients)],
        "stages": [
            {**PRUNE, "aggregation": "fedspallm", "sparsity": 0.5, "rounds": rounds},
        ],
        "evaluate": {"length": 64, "alone": alone, "data": [{"name": t, "path": "/home/alice/held.txt"} for t in texts]},
    }
    (folder / "job.toml").write_text(tomli_w.dumps(job), encoding="utf-8")
    number = max(1, round(sample * num_blocks))
    shares = {
        client: {
            "blocks": [sorted(rng.sample(range(num_blocks), number)) for _ in range(rounds)],
            "weight": num_blocks / number,
            "samples": 4,
            "sparsity": 0.5,
            "memory": 10**6,
            "upload": 5000 * rounds,
            "seconds": 0.1,
        }
        for client in clients
    }
    discloses = ["MASKS", "WEIGHTS", *(["WINDOW_LOSSES"] if alone else [])]
    plan = {"stage": 0, "kind": "prune", "sums": False, "discloses": discloses, "num_blocks": num_blocks}
    _write(folder / "plan-0-prune.json", {**plan, "clients": shares})
    records = [
        {
            "name": f"model.layers.{block}.{linear}.weight",
            "block": block,
            "round": rounds - 1,
            "target": 0.5,
            "sparsity": 0.5,
            "pruned": 32,
            "numel": 64,
            "pattern": None,
            "clients": [client for client in clients if block in shares[client]["blocks"][-1]],
            "agreement": rng.random(),
            "sha256": f"{rng.getrandbits(256):064x}",
        }
        for block in range(num_blocks)
        for linear in linears
    ]
    _write(folder / "pruning.json", {"stage": 0, **job["stages"][0], "tensors": records})
    lines: list[dict[str, Any]] = []
    examples = []
    for stage, client in [(None, None), (0, None), *((0, client) for client in clients if alone)]:
        for text in texts:
            value = 90 + 20 * rng.random() + (0 if stage is None else 5 if client is None else 10)
            lines.append(_metric(stage, client, text, value))
            examples.append(_examples(stage, client, text, value))
    _write_lines(folder / "metrics.jsonl", lines)
    _write_lines(folder / "examples.jsonl", examples)
    ledger = [
        _message(0, 0, client, direction, "rounds/capabilities", 100) for client in clients for direction in ("down", "up")
    ]
    for round_ in range(rounds):
        for client in clients:
            for _ in shares[client]["blocks"][round_]:
                ledger.append(_message(0, round_, client, "down", BLOCK, 500 if round_ == 0 else 4000))
                ledger.append(_message(0, round_, client, "up", BLOCK, 4000 + rng.randrange(1000)))
    _write_lines(folder / "ledger.jsonl", ledger)
    (folder / "model").mkdir()
    save_file({record["name"]: np.zeros((8, 8), np.float16) for record in records}, folder / "model" / "model.safetensors")
    return folder


def _write(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value), encoding="utf-8")


def _write_lines(file: Path, lines: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _metric(stage: int | None, client: str | None, text: str, value: float, name: str = "perplexity/") -> dict[str, Any]:
    return {"time": 1.7e9, "stage": stage, "round": None, "client": client, "name": name + text, "value": value}


def _examples(stage: int | None, client: str | None, text: str, value: float, spread: float = 0.3) -> dict[str, Any]:
    """Windows whose mean is this perplexity: some harder than others, for every model, and a little for each in its own way."""
    own = random.Random(f"{stage}/{client}/{text}")
    hard = [spread * (k - 4.5) / 4.5 + 0.02 * own.random() for k in range(10)]
    parts = [[63 * (math.log(value) + h - sum(hard) / 10), 63] for h in hard]
    return {"stage": stage, "client": client, "name": f"perplexity/{text}", "parts": parts}


def _message(stage: int, round_: int, client: str, direction: str, kind: str, size: int) -> dict[str, Any]:
    return {"stage": stage, "round": round_, "client": client, "direction": direction, "kind": kind, "bytes": size}


def _append(file: Path, line: dict[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as opened:
        opened.write(json.dumps(line) + "\n")


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _page(run: Path) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


def test_perplexities_are_those_of_the_metrics(run: Path) -> None:
    page = _page(run)
    head, *rows = page.csv("perplexity")
    measured = {
        (m["stage"], m["client"], m["name"].removeprefix("perplexity/")): m["value"] for m in _lines(run / "metrics.jsonl")
    }
    for row in rows[:2]:
        of = dict(zip(head, row, strict=True))
        text = of["held-out text"]
        dense, federated = measured[None, None, text], measured[0, None, text]
        assert float(of["dense"]) == dense
        assert float(of["federated"]) == federated
        assert float(of["law alone"]) == measured[0, "law", text]
    differences, *against = page.csv("differences")
    for row in against[:2]:
        of = dict(zip(differences, row, strict=True))
        text = of["held-out text"]
        assert float(of["against dense"]) == measured[0, None, text] / measured[None, None, text]
        assert float(of["against its owner alone"]) == measured[0, None, text] / measured[0, text, text]
    mean = dict(zip(head, rows[2], strict=True))
    assert float(mean["federated"]) == pytest.approx(math.sqrt(measured[0, None, "ward"] * measured[0, None, "law"]))
    assert page.tables[0][1][1] == f"{measured[None, None, 'ward']:.1f}"
    assert f"{geometric_mean([measured[0, None, t] for t in ('ward', 'law')]):.1f}" in page.text


def test_bytes_are_those_of_the_ledger(run: Path) -> None:
    ledger = _lines(run / "ledger.jsonl")
    head, *rows = _page(run).csv("bytes-by-client")
    for row in rows[:2]:
        of = dict(zip(head, row, strict=True))
        for column, direction in (("sent", "up"), ("received", "down")):
            of_client = [m["bytes"] for m in ledger if (m["client"], m["direction"]) == (of["client"], direction)]
            assert int(of[column]) == sum(of_client) - 100  # less the capabilities
        assert int(of["capabilities and measurement"]) == 200
        assert int(of["dense, each way"]) == 4 * 64 * 2  # four matrices in float16
    assert int(rows[2][1]) == int(rows[0][1]) + int(rows[1][1])


def test_blocks_and_matrices_are_those_of_the_pruning_file(run: Path) -> None:
    records = json.loads((run / "pruning.json").read_text())["tensors"]
    page = _page(run)
    head, *rows = page.csv("matrices")
    assert [(r[0], int(r[2]), float(r[5]), r[7]) for r in rows] == [
        (r["name"], r["pruned"], r["agreement"], r["sha256"]) for r in records
    ]
    head, *rows = page.csv("blocks")
    for row in rows:
        of = dict(zip(head, row, strict=True))
        block = [r for r in records if r["block"] == int(of["block"])]
        assert int(of["zeros"]) == sum(r["pruned"] for r in block)
        assert float(of["agreement"]) == pytest.approx(sum(r["agreement"] for r in block) / len(block))


def test_every_table_is_also_a_download_with_the_same_rows(run: Path) -> None:
    page = _page(run)
    downloads = [
        page.csv(name)
        for name in ("perplexity", "differences", "owners", "blocks", "matrices", "stage-0-clients", "bytes-by-client", "size")
    ]
    assert [[row[0] for row in table] for table in page.tables] == [[row[0] for row in rows] for rows in downloads]
    plain = [[title for title in rows[0] if not title.endswith((": low", ": high"))] for rows in downloads]
    assert [list(table[0]) for table in page.tables] == plain


def test_exports_measures_and_samples_are_shown_where_there_are_some(run: Path) -> None:
    before = _page(run)
    assert not {"exports", "measures", "samples"} & set(before.attributes("id"))
    (run / "gguf").mkdir()
    told = {"form": "gguf", "bytes": 900, "of_model": 1000, "length": 64}
    told |= {"perplexity": {"ward": 50.0, "law": 32.0}, "of_perplexity": {"ward": 40.0, "law": 40.0}}
    _write(run / "gguf.export.json", told)
    _write(run / "gone.export.json", told)
    for stage, value in ((None, 0.5), (0, 0.75)):
        for name, plus in (("accuracy/quiz", 0), ("accuracy.low/quiz", -0.1), ("accuracy.high/quiz", 0.1)):
            _append(run / "metrics.jsonl", _metric(stage, None, "", value + plus, name=name))
    _append(run / "metrics.jsonl", _metric(0, None, "", 2e6, name="memory/speed"))
    _write(run / "samples.json", {"tokens": 40, "samples": [{"prompt": "<b>The", "before": "cat {{ 1 }}", "after": "dog"}]})
    page = _page(run)
    assert page.csv("exports")[1:] == [["gguf", "900", "0.9", "2", "40.0", "1.0"]]
    assert page.csv("measures") == [
        ["what", "before", "before: low", "before: high", "after", "after: low", "after: high", "after against before"],
        ["quiz: accuracy", "0.5", "0.4", "0.6", "0.75", "0.65", "0.85", "1.5"],
        ["speed: memory", "", "", "", "2000000.0", "", "", ""],
    ]
    assert "0.500 0.400 to 0.600" in page.text
    assert "2.0 MB" in page.text
    assert page.csv("samples")[1:] == [["<b>The", "cat {{ 1 }}", "dog"]]
    assert "<b>The" in page.text
    assert "cat {{ 1 }}" in page.text


def test_several_rounds_and_stages_tell_whose_work_is_in_them(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ["a", "b", "c"], num_blocks=3, rounds=2)
    pruning = json.loads((run / "pruning.json").read_text())
    pruning["history"] = [
        {"stage": 0, "round": r, "block": b, "clients": ["a", "c"] if r == 0 else ["a", "b", "c"], "numel": 128,
         "pruned": 60 + r, "agreement": 0.5 + r / 4}
        for r in range(2) for b in range(3)
    ]  # fmt: skip
    _write(run / "pruning.json", pruning)
    page = _page(run)
    head, *rows = page.csv("stage-0-rounds")
    assert [dict(zip(head, row, strict=True)) for row in rows] == [
        {"round": f"round {r}", "blocks": "3", "clients": str(2 + r), "zeros": str(3 * (60 + r)),
         "achieved": str((60 + r) / 128), "agreement": str(0.5 + r / 4)}
        for r in range(2)
    ]  # fmt: skip
    summary = read(run)
    found = contributors(summary, summary.stages[0])
    assert found[0, 1] == ["a", "c"], "b was asked, but is not in it"
    assert found[1, 1] == ["a", "b", "c"]


def set_stages(run: Path, *stages: dict[str, Any]) -> None:
    """Gives a run other stages; ``discloses`` and ``notes`` of each go into its plan."""
    job = tomllib.loads((run / "job.toml").read_text())
    of_first = json.loads((run / "plan-0-prune.json").read_text())["clients"]
    (run / "plan-0-prune.json").unlink()
    job["stages"] = []
    for number, stage in enumerate(stages):
        told = {key: stage.pop(key) for key in ("discloses", "notes") if key in stage}
        job["stages"].append(stage)
        plan = {"stage": number, "kind": stage["kind"], "sums": stage.get("aggregation") == "pooled", "num_blocks": 2}
        plan |= {"clients": of_first if number == 0 else {}, **told}
        _write(run / f"plan-{number}-{stage['kind']}.json", plan)
    (run / "job.toml").write_text(tomli_w.dumps(job))


POOLED = {**PRUNE, "aggregation": "pooled", "sparsity": 0.5}
MASKS = {**PRUNE, "aggregation": "fedprllm", "sparsity": 0.7}


def test_each_stage_says_what_left_its_owner(run: Path) -> None:
    set_stages(
        run,
        {**POOLED, "pruner": "sparsegpt", "discloses": ["PRODUCTS", "SQUARES"]},
        {**MASKS, "discloses": ["MASKS"]},
        {"kind": "distil", "discloses": ["FACTORS", "LOSS", "HELD_OUT_LOSSES"]},
        {"kind": "distil"},
    )
    text = _page(run).text
    squares, products, masks, factors, loss, held_out = (
        Disclosure[name].sentence for name in ("SQUARES", "PRODUCTS", "MASKS", "FACTORS", "LOSS", "HELD_OUT_LOSSES")
    )
    assert f"Before the first stage each client sent {Disclosure.CAPABILITIES.sentence}." in text
    assert f"Stage 0, pruning: each client sent {squares}, and {products}." in text
    assert f"Stage 1, pruning: each client sent {masks}. Stage 2" in text
    assert f"Stage 2, distil: each client sent {factors}; {loss}; and {held_out}. Stage 3" in text
    assert "Stage 3, distil: each client sent data that is not listed in the plan." in text
    assert "could see what each client sent. No noise" in text
    job = tomllib.loads((run / "job.toml").read_text())
    job["privacy"] = {"secure_aggregation": True}
    (run / "job.toml").write_text(tomli_w.dumps(job))
    assert "saw sums over the clients in each stage, and not the numbers of any single client" in _page(run).text


@pytest.mark.parametrize(
    ("stage", "sent", "kept"),
    [
        ({**POOLED, "pruner": "dsnot", "discloses": ["SQUARES", "MOMENTS"]}, {"SQUARES", "MOMENTS"}, "protect_first_block"),
        ({**POOLED, "discloses": ["SQUARES"]}, {"SQUARES"}, "mixed = true"),
        (
            {**POOLED, "pruner": "sparsegpt", "mixed": True, "discloses": ["SQUARES", "PRODUCTS"]},
            {"SQUARES", "PRODUCTS", "no wider than the hidden states (mixed = true)"},
            "protect_first_block",
        ),
        (
            {**POOLED, "protect_first_block": True, "discloses": ["SQUARES"]},
            {"SQUARES", "Clients sent nothing about block 0"},
            "No text left its owner and",
        ),
        ({**MASKS, "discloses": ["MASKS", "OUTLIERS"]}, {"MASKS", "OUTLIERS"}, "mixed = true"),
    ],
)
def test_the_page_and_the_card_say_what_left_and_nothing_else(
    run: Path, stage: dict[str, Any], sent: set[str], kept: str
) -> None:
    set_stages(run, {**stage, "notes": ["Mind the <words>."]})
    for text in (_page(run).text, card(run, None, "Use it.")):
        for one in Disclosure:
            assert (one.sentence in text) == (one.name in sent or one is Disclosure.CAPABILITIES), one
        assert all(words in text for words in sent - set(Disclosure.__members__))
        assert kept not in text
        assert "Mind the <words>." in text
        assert "No noise was added" in text


def test_where_there_is_noise_it_is_not_denied(run: Path) -> None:
    private = {**POOLED, "epsilon": 4.0, "discloses": ["SQUARES"]}
    set_stages(run, private | {"notes": ["(4, 1e-06)-differential privacy"]})
    for text in (_page(run).text, card(run, None, "Use it.")):
        assert "Noise was added; the privacy guarantee is stated below." in text
        assert "(4, 1e-06)-differential privacy" in text
        assert "No noise" not in text
    set_stages(run, dict(private), {**MASKS, "discloses": ["MASKS"]})
    assert "Noise was added in stage 0 only" in _page(run).text


@pytest.mark.parametrize("alone", [True, False])
def test_losses_on_windows_are_told_where_clients_sent_them(tmp_path: Path, alone: bool) -> None:
    run = make_run(tmp_path / "run", alone=alone)
    for text in (_page(run).text, card(run, None, "Use it.")):
        assert (f"the client sent {Disclosure.WINDOW_LOSSES.sentence}." in text) is alone


def test_the_page_asks_nothing_of_a_network(run: Path) -> None:
    page = _page(run)
    assert "default-src 'none'" in (run / "report.html").read_text()
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "img", "iframe", "object", "embed", "base", "form")]
    assert not page.attributes("src")
    assert all(link.startswith("data:text/csv") for link in page.attributes("href"))
    assert not re.search(r"url\(|@import|https?://", (run / "report.html").read_text())


def test_the_page_can_be_read_without_seeing_it(run: Path) -> None:
    page = _page(run)
    assert ("html", {"lang": "en"}) in page.tags
    assert "drawn: fedgrove report" in page.text
    tags = [tag for tag, _ in page.tags]
    assert tags.count("caption") == tags.count("table") > 3
    assert all(attrs.get("scope") in ("row", "col") for tag, attrs in page.tags if tag == "th")
    images = [attrs for tag, attrs in page.tags if attrs.get("role") == "img"]
    assert len(images) == tags.count("figure") == 4
    assert all(attrs["aria-label"] for attrs in images)
    assert len(set(page.attributes("id"))) == len(page.attributes("id"))
    assert set(page.attributes("aria-labelledby")) <= set(page.attributes("id"))


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    hostile = ['<script>alert("1")</script>', "\"'><img src=x onerror=alert(1)>", "{{ 7 * 7 }}"]
    page = _page(make_run(tmp_path / "run", hostile, hostile, num_blocks=4, sample=0.5, rounds=2))
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "img"}
    assert not page.attributes("onerror")
    assert all(name in page.text for name in hostile)
    assert [row[0] for row in page.csv("perplexity")][1:4] == hostile


def test_a_spreadsheet_takes_no_name_for_a_formula(tmp_path: Path) -> None:
    page = _page(make_run(tmp_path / "run", ["=1+1", "law"]))
    assert [row[0] for row in page.csv("bytes-by-client")][1] == "'=1+1"


def test_folders_of_the_owner_are_not_passed_on(run: Path) -> None:
    page = _page(run)
    assert "alice" not in (run / "report.html").read_text()
    assert "0.jsonl" in page.text
    assert "tiny" in page.text


def test_a_large_run_stays_small(tmp_path: Path) -> None:
    clients = [f"{i:03}{'-a-name-as-long-as-a-job-file-lets-one-be':-<61}" for i in range(100)]
    run = make_run(
        tmp_path / "run", clients, clients, num_blocks=32, rounds=25, sample=0.5, linears=[*LINEARS, "mlp.down_proj"]
    )
    page = _page(run)
    assert (run / "report.html").stat().st_size < 2_200_000
    _, *rows = page.csv("stage-0-blocks")
    plan = json.loads((run / "plan-0-prune.json").read_text())["clients"]
    assert {row[0]: [[int(b) for b in cell.split(";")] for cell in row[1:]] for row in rows} == {
        client: share["blocks"] for client, share in plan.items()
    }
    assert page.csv("alone")[0][1:] == clients
    assert len(page.csv("bytes-by-round")) == 26


def test_a_run_without_evaluation_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", texts=(), alone=False)
    page = _page(run)
    assert "was not measured" in page.text
    assert "nan" not in page.text
    (run / "metrics.jsonl").unlink()
    job = (run / "job.toml").read_text().partition("[evaluate]")[0]
    (run / "job.toml").write_text(job)
    assert _page(run).text.count("ot measured") == page.text.count("ot measured")


def test_a_run_without_alone_leaves_it_open_whether_it_paid(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", alone=False)
    assert "it is unknown whether working together paid" in _page(run).text
    assert own_texts(read(run)) is None


def test_of_a_resumed_run_the_last_measurement_counts(run: Path) -> None:
    _append(run / "metrics.jsonl", _metric(0, None, "ward", 77.25))
    assert read(run).federated["ward"] == 77.25
    assert _page(run).csv("perplexity")[1][4] == "77.25"


def test_a_line_that_a_kill_cut_short_is_passed_over(run: Path) -> None:
    whole = read(run)
    for name in ("metrics.jsonl", "ledger.jsonl"):
        with (run / name).open("a", encoding="utf-8") as file:
            file.write('{"stage": 0, "cli')
    assert read(run) == whole


def test_a_client_that_was_measured_in_part_is_not_compared(run: Path) -> None:
    lines = _lines(run / "metrics.jsonl")
    _write_lines(run / "metrics.jsonl", lines[:-1])
    assert set(read(run).alone) == {"ward"}
    _page(run)


def test_several_stages_show_what_each_made(run: Path) -> None:
    job = tomllib.loads((run / "job.toml").read_text())
    job["stages"].append({"kind": "distil"})
    (run / "job.toml").write_text(tomli_w.dumps(job))
    _write(run / "plan-1-distil.json", {"stage": 1, "kind": "distil", "clients": {"ward": {"rank": 8}, "law": {"rank": 4}}})
    for text, value in (("ward", 60.0), ("law", 61.0)):
        _append(run / "metrics.jsonl", _metric(1, None, text, value))
    _append(run / "metrics.jsonl", _metric(1, "law", "loss", 1.5, name=""))
    _append(run / "ledger.jsonl", _message(1, 0, "law", "up", "something-new", 12345))
    summary = read(run)
    head, *rows = _page(run).csv("perplexity")
    assert [row[head.index("federated")] for row in rows[:2]] == ["60.0", "61.0"]
    assert [float(row[head.index("after stage 0")]) for row in rows[:2]] == [summary.after[0][t] for t in ("ward", "law")]
    assert summary.alone_stage == 0
    head, *rows = _page(run).csv("differences")
    assert float(rows[0][head.index("against its owner alone")]) == summary.after[0]["ward"] / summary.alone["ward"]["ward"]
    assert summary.uplink["law"] > 12345


def test_sampled_blocks_are_drawn_by_client_and_round(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ["a", "b", "c"], num_blocks=6, rounds=3, sample=0.5)
    text = html.unescape(write_report(run).read_text(encoding="utf-8"))
    plan = json.loads((run / "plan-0-prune.json").read_text())["clients"]
    for client, share in plan.items():
        for block in range(6):
            given = [round_ for round_, blocks in enumerate(share["blocks"]) if block in blocks]
            said = re.search(rf"<title>{client}, block {block}: (\d+) rounds? \((.*?)\)</title>", text)
            assert (said is not None) == bool(given)
            if said:
                assert (int(said[1]), said[2]) == (len(given), ranges(given))


def test_who_did_not_answer_is_named(run: Path) -> None:
    lines = _lines(run / "ledger.jsonl")
    gone = max(i for i, m in enumerate(lines) if (m["client"], m["direction"], m["kind"]) == ("law", "up", BLOCK))
    _write_lines(run / "ledger.jsonl", lines[:gone] + lines[gone + 1 :])
    assert "not answered: law (1)" in _page(run).text


def test_a_packed_model_is_weighed(run: Path) -> None:
    shutil.copytree(run / "model", run / "packed")
    (run / "packed" / "more").write_bytes(bytes(10))
    _, plain, packed = _page(run).csv("size")
    assert int(packed[1]) == int(plain[1]) + 10 == read(run).packed_bytes


def test_an_unfinished_run_says_how_to_continue_and_nothing_is_left(run: Path) -> None:
    shutil.rmtree(run / "model")
    with pytest.raises(FedgroveError, match="--resume"):
        write_report(run)
    assert not list(run.glob("report*"))
    with pytest.raises(FedgroveError, match="no run folder"):
        write_report(run / "nowhere")


def test_the_same_folder_makes_the_same_page(run: Path) -> None:
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    assert not (run / "report.html.partial").exists()


def test_the_verdict_says_who_gains_and_who_loses(run: Path) -> None:
    def measure(dense: float, together: float, ward: float, law: float) -> tuple[str, str | None]:
        lines = []
        for stage, client, value in ((None, None, dense), (0, None, together), (0, "ward", ward), (0, "law", law)):
            lines += [_metric(stage, client, text, value) for text in ("ward", "law")]
        _write_lines(run / "metrics.jsonl", lines)
        (run / "examples.jsonl").unlink(missing_ok=True)  # as of an older fedgrove: there are no intervals
        return verdict(read(run))[1], own_texts(read(run))

    paid, own = measure(100, 110, 120, 130)
    assert paid.startswith("Working together paid")
    assert "12.0% lower" in paid
    assert "law gains most (−15.4%), ward least (−8.3%)" in paid
    assert own
    assert "every owner is better off" in own
    mixed, own = measure(100, 110, 105, 130)
    assert "law gains most (−15.4%), ward fares worst (+4.8%)" in mixed
    assert own
    assert "1 of 2 owners" in own
    lost, own = measure(100, 140, 120, 130)
    assert lost.startswith("Working together did not pay")
    assert "ward loses most (+16.7%), law least (+7.7%)" in lost
    assert own
    assert "every owner would have been better off alone" in own
    assert measure(100, 120.1, 120, 120.3)[0].startswith("Working together made little difference")


def test_the_verdict_claims_nothing_that_other_windows_could_undo(run: Path) -> None:
    def measure(ward: float, law: float) -> str:
        metrics, examples = [], []
        for stage, client, value in ((None, None, 100.0), (0, None, 110.0), (0, "ward", ward), (0, "law", law)):
            for text in ("ward", "law"):
                metrics.append(_metric(stage, client, text, value))
                examples.append(_examples(stage, client, text, value))
        _write_lines(run / "metrics.jsonl", metrics)
        _write_lines(run / "examples.jsonl", examples)
        return " ".join(filter(None, (verdict(read(run))[1], own_texts(read(run)))))

    same = measure(110.3, 110.2)
    assert same.startswith("Working together made no clear difference")
    assert "no client clearly gains or loses" in same
    assert "no owner has a clear difference" in same
    mixed = measure(110.3, 130)
    assert mixed.startswith("Working together paid")
    assert "law gains most (−15.4%), for ward there is no clear difference (−0.3%)" in mixed
    assert "1 of 2 owners are better off with the federated model than alone; for 1 there is no clear difference" in mixed
    worse = measure(100, 110.2)
    assert "ward loses most (+10.0%), for law there is no clear difference" in worse
    assert "no owner is better off with the federated model than alone, 1 worse" in worse


def test_a_difference_is_as_sure_as_the_windows_say(run: Path) -> None:
    summary = read(run)
    head, *rows = _page(run).csv("differences")
    of = dict(zip(head, rows[0], strict=True))
    low, value, high = (float(of[f"against dense{end}"]) for end in (": low", "", ": high"))
    assert low < value < high
    assert high - low < 0.03, "the windows are uneven by a factor of 1.8, but in the same way for both models"
    before, after = (summary.examples[stage, None]["perplexity/ward"] for stage in (None, 0))
    each = [math.exp((new - old) / 63) for (new, _), (old, _) in zip(after, before, strict=True)]
    assert min(each) < low
    assert high < max(each)
    lines = _lines(run / "examples.jsonl")
    lines[0]["parts"].pop()
    _write_lines(run / "examples.jsonl", lines)
    assert _page(run).csv("differences")[1][2:4] == ["", ""], "these are not the same windows"


def test_what_one_owner_would_have_stands_beside_it(tmp_path: Path) -> None:
    run, inner = make_run(tmp_path / "run"), make_run(tmp_path / "run" / "centralized", ["centralized"], ["ward", "law"])
    _append(run / "metrics.jsonl", _metric(0, None, "", 0.5, name="accuracy/quiz"))
    _append(inner / "metrics.jsonl", _metric(0, None, "", 0.75, name="accuracy/quiz"))
    page, one = _page(run), read(inner)
    head, *rows = page.csv("perplexity")
    assert [float(row[head.index("centralized")]) for row in rows[:2]] == [one.federated["ward"], one.federated["law"]]
    head, *rows = page.csv("differences")
    assert float(rows[1][head.index("against centralized")]) == read(run).federated["law"] / one.federated["law"]
    head, *rows = page.csv("measures")
    assert rows[0][head.index("centralized")] == "0.75"
    assert f"in one place, perplexity would be {geometric_mean(list(one.federated.values())):.1f}" in page.text
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(result_table(read(run)))
    assert f"{one.federated['ward']:.1f}" in console.export_text()
    shutil.rmtree(inner / "model")
    assert "centralized" not in _page(run).csv("perplexity")[0], "it has not ended"


def test_nothing_is_said_of_owners_without_held_out_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ["ward", "law", "press"], ["law", "press"])
    assert "each of the 2 owners whose kind of text was held out" in (own_texts(read(run)) or "")


def test_both_averages_over_owners_and_the_worst_owner_are_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ["ward", "law"], ["ward", "law", "press"])
    summary = read(run)
    found = own_perplexities(summary)
    tokens = {text: sum(count for _, count in summary.windows(summary.last)[text]) for text in ("ward", "law")}
    for name, of in (("before", summary.dense), ("federated", summary.federated)):
        values = {text: of[text] for text in ("ward", "law")}  # no client has the name of the third text
        mean = sum(tokens[text] * math.log(values[text]) for text in values) / sum(tokens.values())
        assert found[name].weighted == pytest.approx(math.exp(mean))
        assert found[name].plain == pytest.approx(geometric_mean(list(values.values())))
        assert found[name].worst == (max(values, key=lambda text: values[text]), pytest.approx(max(values.values())))
    rows = {row[0]: row[1:] for row in _page(run).csv("owners")[1:]}
    assert rows["federated"][3] == found["federated"].worst[0]
    console = Console(width=400, record=True, file=io.StringIO())
    console.print(result_table(summary))
    assert (own_line(summary) or "?") in " ".join(console.export_text().split())
    best = over_owners({"a": 0.2, "b": 0.9}, {"a": 3, "b": 1}, higher_is_better=True)
    assert (best.weighted, best.plain, best.worst) == (pytest.approx(0.375), pytest.approx(0.55), ("a", 0.2))


def test_the_verdict_does_not_call_a_missed_target_exact(run: Path) -> None:
    assert "in each exactly the target" in verdict(read(run))[0]
    pruning = json.loads((run / "pruning.json").read_text())
    pruning["tensors"][0]["pruned"] = 30
    _write(run / "pruning.json", pruning)
    assert "with a target of 50.0%" in verdict(read(run))[0]


def test_the_terminal_shows_the_same_numbers(run: Path) -> None:
    summary = read(run)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(result_table(summary))
    text = " ".join(console.export_text().split())
    assert f"{summary.mean(summary.federated):.1f}" in text
    assert verdict(summary)[1] in text


def test_reading_a_run_needs_no_torch(run: Path) -> None:
    code = (
        "import sys, pathlib, fedgrove.report.table; from fedgrove.report.page import write_report; "
        "write_report(pathlib.Path(sys.argv[1])); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("values", [[7.3], [-12.0, 3.0], [0.0], [1e-6], [1e9, 2.5e9], [-0.4]])
def test_a_scale_holds_its_numbers_between_round_ticks(values: list[float]) -> None:
    scale = charts.Scale.over(values)
    assert scale.low <= min(0, *values) <= max(0, *values) <= scale.high
    assert 2 <= len(scale.ticks) <= 8
    assert scale.at(scale.low) == "0%"
    assert scale.at(scale.high) == "100%"


def test_words_for_numbers() -> None:
    assert [size(n) for n in (0, 999, 1000, 999_949, 999_950, 3_362_022, 2.5e9, 1.5e13)] == [
        "0 bytes",
        "999 bytes",
        "1.0 kB",
        "999.9 kB",
        "1.0 MB",
        "3.4 MB",
        "2.5 GB",
        "15,000.0 GB",
    ]
    assert [change(r) for r in (0.98, 1.0, 1.125)] == ["−2.0%", "+0.0%", "+12.5%"]
    assert ranges([5, 0, 1, 2]) == "0–2, 5"


def test_a_small_map_is_one_path_of_runs() -> None:
    assert charts.runs([[0, 1, 4], [], [2]]) == "M0 .5h2M4 .5h1M2 2.5h1"
