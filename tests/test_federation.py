"""A federation of processes gives the bits of the in-process engine, and nothing leaves a site but what the docs say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("nvflare", reason="the extra fedgrove[flare] is not installed")

from federated import Lines, Running, environment
from fedgrove.stages.export import export
from small import Small

pytestmark = pytest.mark.xdist_group("federation")
SECRET = "zanzibar-7413"
TUNE = {
    "kind": "tune",
    "method": "fedpipe",
    "rounds": 2,
    "steps": 2,
    "length": 16,
    "batches": [1, 2],
    "ranks": [2, 4],
    "bits": [32],
}


def stages(small: Small) -> list[dict[str, object]]:
    return [small.spec()["stages"][0], TUNE]


@pytest.fixture(scope="module")
def federation(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("federation")
    running = Running(small, folder)
    private = folder / SECRET  # a path, a text and an exception that nobody else may ever see
    private.mkdir()
    text = small.texts["ash"].read_text(encoding="utf-8")
    (private / "ash.txt").write_text(text, encoding="utf-8")
    running.describe("ash", data=[str(private / "ash.txt")], result=True)
    try:
        with environment():
            running.start()
        yield running
    finally:
        running.close()


def test_the_model_is_that_of_the_in_process_engine_bit_for_bit(federation: Running, small: Small, tmp_path: Path) -> None:
    seen = Lines()
    assert federation.run("demo", seen, stages=stages(small), evaluate__alone=True, result="sites") is None
    assert any(step.startswith("prune") for step in seen.steps)
    alone = small.undisturbed(stages=stages(small))
    fetched = federation.fetch("demo")
    weights = (fetched / "model" / "model.safetensors").read_bytes()
    assert weights == (alone / "model" / "model.safetensors").read_bytes()
    assert (fetched / "adapter" / "adapter_model.safetensors").read_bytes() == (
        alone / "adapter" / "adapter_model.safetensors"
    ).read_bytes()
    assert json.loads((fetched / "pruning.json").read_text()) == json.loads((alone / "pruning.json").read_text())

    given = federation.sites["ash"] / "results" / "demo"
    export(given, "hf", tmp_path / "given")
    assert (tmp_path / "given" / "model.safetensors").read_bytes() == weights
    assert not (federation.sites["birch"] / "results").exists(), "birch did not want it"
    for kit in federation.sites.values():
        assert not list((kit / "work").glob("demo-*")), "no hidden states are left behind"
