"""Every number of a real run's report is in its folder, or made of numbers there in a way that this test does by itself."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedgrove.report.page import write_report
from fedgrove.report.summary import geometric_mean
from small import Small, lines
from test_report import Page

TABLES = {
    "perplexity", "differences", "blocks", "matrices", "stage-0-clients", "stage-1-capabilities", "stage-1-given",
    "stage-1-importance", "stage-1-rounds", "bytes-by-client", "bytes-by-round", "size",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(small: Small) -> Path:
    """A federation that prunes and tunes, with what owners have alone and what one owner would have."""
    tune = {"kind": "tune", "rounds": 2, "steps": 2, "length": 16, "batches": [1], "ranks": [2], "bits": [32], "eval_every": 1}
    return small.undisturbed(stages=[small.spec()["stages"][0], tune], evaluate__centralized=True)


def leaves(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from leaves(part)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)


def in_folder(run: Path) -> np.ndarray:
    """All numbers of the folder's files, the files' sizes, and sums of its messages and of its pruned matrices."""
    found = list(leaves(tomllib.loads((run / "job.toml").read_text())))
    for file in run.rglob("*.json"):
        found += leaves(json.loads(file.read_text()))
    for file in run.rglob("*.jsonl"):
        if file.name != "examples.jsonl":
            found += leaves(lines(file))
    found.append(float(sum(file.stat().st_size for file in (run / "model").iterdir())))
    sums: dict[Any, float] = defaultdict(float)
    for line in lines(run / "ledger.jsonl"):
        around = line["kind"].endswith(("/capabilities", "/alone"))
        keys = [(line["client"], around), ("all", around)]
        keys += [(*key, line["direction"]) for key in keys]
        keys += [(line["stage"], line["client"], line["direction"], around, line["kind"])]
        if not around:
            keys += [(line["stage"], line["round"], line["direction"])]
        for key in keys:
            sums[key] += line["bytes"]
    for row in json.loads((run / "pruning.json").read_text())["tensors"]:
        for key in ("numel", "pruned"):
            sums[row["block"], key] += row[key]
            sums[key] += row[key]
            sums["bytes of", key] += 2 * row[key]  # the small model is bfloat16
        sums[row["block"], "agreement"] += row["agreement"] * row["numel"]
        sums[row["block"], "target"] += row["target"] * row["numel"]
    models: dict[Any, dict[str, float]] = defaultdict(dict)  # by stage and client, perplexity by text
    for line in lines(run / "metrics.jsonl"):
        if line["round"] is None and line["name"].startswith("perplexity/"):
            models[line["stage"], line["client"]][line["name"]] = line["value"]
    means = {model: geometric_mean([*of.values()]) for model, of in models.items()}
    alone = [[*of.values(), means[model]] for model, of in models.items() if model[1]]
    found += [*means.values(), *(sum(clients) / len(clients) for clients in zip(*alone, strict=True))]
    return np.unique([*found, *sums.values(), *(3 * sums[key] for key in list(sums) if key == ("bytes of", "numel"))])


def strangers(page: Page, numbers: np.ndarray) -> list[str]:
    """Numbers of the page's tables that are neither in the folder nor a ratio of two that are, nor a mean of their column."""

    def known(value: float) -> bool:
        at = np.searchsorted(numbers, value)
        near = numbers[max(0, at - 1) : at + 1]
        return bool(np.isclose(near, value, rtol=1e-12, atol=0).any()) or value == 0

    def ratio(value: float, of: np.ndarray) -> bool:
        of = of[of != 0]
        wanted = value * of
        at = np.clip(np.searchsorted(of, wanted), 1, len(of) - 1)
        return any(np.isclose(of[near], wanted, rtol=1e-12, atol=0).any() for near in (at, at - 1))

    found = []
    for name in TABLES:
        head, *rows = page.csv(name)
        for column, title in enumerate(head):
            if column == 0 or title.endswith((": low", ": high", "sha256")):
                continue
            above: list[float] = []
            for row in rows:
                try:
                    value = float(row[column])
                except ValueError:
                    continue
                means = [geometric_mean(above)] if above and min(above) > 0 else []
                same_row = np.unique([float(cell) for cell in row if cell.replace(".", "", 1).isdigit()])
                mean = bool(np.isclose(means, value, rtol=1e-12).any())
                if not (
                    known(value) or ratio(value, numbers) or mean or (name == "bytes-by-client" and ratio(value, same_row))
                ):
                    found.append(f"{name}, {row[0]}, {title}: {row[column]}")
                above.append(value)
    return found


def test_every_number_of_the_tables_is_in_the_run_folder(run: Path) -> None:
    page = Page(write_report(run).read_text())
    offered = {name for name in TABLES if page.csv(name)}
    assert offered == TABLES
    assert sum(len(row) for name in TABLES for row in page.csv(name)) > 300
    assert strangers(page, in_folder(run)) == []


@pytest.mark.parametrize(
    ("file", "key", "tables"),
    [
        ("metrics.jsonl", "value", {"perplexity", "differences", "stage-1-rounds"}),
        ("centralized/metrics.jsonl", "value", {"perplexity", "differences"}),
        ("ledger.jsonl", "bytes", {"bytes-by-client", "bytes-by-round", "stage-0-clients"}),
        ("pruning.json", "agreement", {"blocks", "matrices"}),
    ],
)
def test_a_number_that_is_not_there_would_be_found(run: Path, tmp_path: Path, file: str, key: str, tables: set[str]) -> None:
    page = Page(write_report(run).read_text())
    other = Path(shutil.copytree(run, tmp_path / "run"))

    def changed(value: Any, inside: bool = False) -> Any:
        if isinstance(value, dict):
            return {name: changed(part, inside or name == key) for name, part in value.items()}
        if isinstance(value, list):
            return [changed(part, inside) for part in value]
        return value * 1.0000123 + 0.0123 if inside and isinstance(value, int | float) else value

    text = (other / file).read_text()
    parts = [json.dumps(changed(json.loads(line))) for line in (text.splitlines() if file.endswith("l") else [text])]
    (other / file).write_text("\n".join([*parts, ""]))
    assert {found.split(", ")[0] for found in strangers(page, in_folder(other))} >= tables
