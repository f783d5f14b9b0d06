"""The stage ``prompt``: the server names candidates, and the sum of the clients' scores is the score of the pooled records."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from small import CLIENTS, Small, cli, measurements

LABELS = (" bird", " fish", " tree")
WORDS = {" bird": "wing feather nest", " fish": "sea water scale", " tree": "leaf root bark"}
PROMPT = {
    "kind": "prompt", "labels": list(LABELS), "length": 16, "rounds": 3, "population": 4, "records": 50, "dimension": 6,
    "start": " It is a", "spread": 1.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def files(small: Small) -> dict[str, Path]:
    """A file of labeled records for every client, one with all of them, and a test."""
    found, every = {}, []
    for offset, client in enumerate((*CLIENTS, "test")):
        rows = []
        for number in range(6 + offset):
            label = LABELS[(number + offset) % 3]
            rows.append({"text": f"{WORDS[label]} {number} of {client}", "label": label.strip()})
        found[client] = _write(small.folder / f"prompted-{client}.jsonl", rows)
        every += rows if client != "test" else []
    found["everybody"] = _write(small.folder / "prompted-everybody.jsonl", every[::-1])
    return found


def _write(file: Path, rows: list[dict[str, str]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def job(files: Mapping[str, Path], owners: tuple[str, ...] = CLIENTS, **changes: Any) -> dict[str, Any]:
    """Changes of the small job: a prompt from these owners' records."""
    stage = {key: changes.pop(key) for key in list(changes) if "__" not in key and key != "privacy"}
    templates = {"prompt": "{text}", "answer": " {label}"}
    data = [{"name": "test", "path": str(files["test"]), "measure": "prompt", **templates}]
    clients = [{"name": name, "data": str(files[name]), **templates} for name in owners]
    return {
        "clients": clients, "stages": [{**PROMPT, **stage}], "evaluate__data": data, "evaluate__alone": False, **changes,
    }  # fmt: skip


def same(one: Path, other: Path) -> None:
    """Two runs found the same prompt, and measured the same."""
    assert (one / "prompt" / "prompt.json").read_bytes() == (other / "prompt" / "prompt.json").read_bytes()
    for name in ("prompt.safetensors", "adapter_model.safetensors", "prompt.txt"):
        if (one / "prompt" / name).is_file():
            assert (one / "prompt" / name).read_bytes() == (other / "prompt" / name).read_bytes()
    assert measurements(one) == measurements(other)


def test_the_prompt_of_any_number_of_owners_is_that_of_the_pooled_records(
    small: Small, files: Mapping[str, Path], tmp_path: Path
) -> None:
    apart = small.undisturbed(**job(files))
    pooled = small.job("pooled-prompt", **job(files, ("everybody",)))
    assert cli("run", pooled, "--out", tmp_path / "pooled")[0] == 0
    secure = small.job("secure-prompt", **job(files, privacy={"secure_aggregation": True}))
    assert cli("run", secure, "--out", tmp_path / "secure")[0] == 0
    same(apart, tmp_path / "pooled")
    same(apart, tmp_path / "secure")
