"""The job file: read, changed, filled in, written and read again."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

import pytest
from pydantic import ValidationError

from fedgrove.errors import FedgroveError
from fedgrove.job.load import load
from fedgrove.job.stage_config import config_of
from fedgrove.job.tables import KINDS, Client, Evaluate, Job, Model, Privacy, Rounds, Text
from fedgrove.models.masks import Target
from fedgrove.stages.prune.config import LayerSampling
from small import Small


def test_defaults_are_filled_in_and_the_written_job_is_the_same_job(small: Small, tmp_path: Path) -> None:
    job = load(small.job(stages__0__layers={"sample": 0.5}))
    assert job.seed == 0
    assert job.stages[0].aggregation == "fedspallm"
    assert job.stages[0].layers == LayerSampling(sample=0.5, cover=2)
    again = tmp_path / "elsewhere.toml"
    again.write_text(job.dumps())
    assert load(again) == job
    assert load(again).dumps() == job.dumps()


def test_clients_are_sorted_so_that_their_order_cannot_matter(small: Small) -> None:
    clients = small.spec()["clients"]
    assert load(small.job("a", clients=clients)) == load(small.job("b", clients=list(reversed(clients))))


def test_paths_are_relative_to_the_job_file(small: Small, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    job = load(small.job(clients__0__data=["ash.txt", "birch.txt"], model__path="model"))
    assert job.clients[0].data == (small.texts["ash"].resolve(), small.texts["birch"].resolve())
    assert job.model.path == str(small.model.resolve())


def test_a_job_is_frozen(small: Small) -> None:
    with pytest.raises(ValidationError):
        load(small.job()).seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "written", "meant"),
    [
        ("memory", "8GiB", 8 * 2**30),
        ("memory", "1.5 GB", 1_500_000_000),
        ("memory", 4096, 4096),
        ("uplink", "20Mbit", 20_000_000),
        ("uplink", "0.5 Gbit/s", 500_000_000),
    ],
)
def test_quantities_have_units(small: Small, key: str, written: object, meant: int) -> None:
    assert getattr(load(small.job(**{f"clients__0__{key}": written})).clients[0], key) == meant


@pytest.mark.parametrize("written", ["8 apples", "1.2.3GB", ".", "-1GB", "0", "GiB"])
def test_bad_quantities_are_refused(small: Small, written: str) -> None:
    with pytest.raises(FedgroveError, match=r"clients\.0\.memory"):
        load(small.job(clients__0__memory=written))


@pytest.mark.parametrize(
    ("change", "read"),
    [
        ("seed=7", lambda job: job.seed == 7),
        ("name=other", lambda job: job.name == "other"),
        ('name="other"', lambda job: job.name == "other"),
        ("stages.0.sparsity=0.6", lambda job: job.stages[0].target == Target(0.6)),
        ("clients.2.samples = 9", lambda job: job.clients[2].samples == 9),
        ("rounds.quorum=2", lambda job: job.rounds.quorum == 2),
        ("stages.0.rounds=2", lambda job: job.stages[0].rounds == 2),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_set_changes_a_key(small: Small, change: str, read: object) -> None:
    assert callable(read)
    assert read(load(small.job(), [change]))


def test_a_pattern_is_a_target(small: Small) -> None:
    job = load(small.job(stages__0__sparsity=None, stages__0__pattern="2:4"))
    assert job.stages[0].target == Target(0.5, (2, 4))


def test_a_client_may_prune_harder_but_somebody_must_reach_the_target(small: Small) -> None:
    load(small.job(clients__0__sparsity=0.8))
    with pytest.raises(FedgroveError, match=r"stages\.0\.sparsity.*every client prunes to 0.8 or more"):
        load(small.job(**{f"clients__{i}__sparsity": 0.8 for i in range(3)}))


def test_the_template_names_every_key_of_a_client_and_of_a_stage() -> None:
    template = (files("fedgrove") / "template.toml").read_text(encoding="utf-8")
    for key in Client.model_fields:
        assert f"{key} " in template or f"{key}=" in template, key
    for key in ("sparsity", "pattern", "layers", "rounds", "shrink", "samples", "length", "pruner", "aggregation"):
        assert key in template
    for table in ("[model]", "[[clients]]", "[[stages]]", "[evaluate]", "[rounds]"):
        assert table in template
    assert set(Job.model_fields) >= {"name", "seed", "model", "clients", "stages", "evaluate", "rounds"}


def with_examples(template: str) -> str:
    """The template with its two commented stages in place of its own."""
    before, _, after = template.partition("[[stages]]\n")
    examples = re.findall(r"(?m)^#   \[\[stages\]\]\n(?:#   .*\n)+", after)
    stages = re.sub(r"(?m)^#   ", "", "\n".join(examples))
    return before + stages + after[after.index("[evaluate]") :]


def test_the_example_stages_of_the_template_are_jobs(tmp_path: Path) -> None:
    template = (files("fedgrove") / "template.toml").read_text(encoding="utf-8")
    for name in ("hospital-a.jsonl", "hospital-b.csv", "heldout.txt"):
        (tmp_path / name).write_text("text\n")
    (tmp_path / "job.toml").write_text(template, encoding="utf-8")
    assert [stage.kind for stage in load(tmp_path / "job.toml").stages] == ["prune"]
    (tmp_path / "job.toml").write_text(with_examples(template), encoding="utf-8")
    job = load(tmp_path / "job.toml")
    assert [stage.kind for stage in job.stages] == ["structured", "tune"]
    assert job.stages[1].planner == "fedpipe"


def test_every_key_that_the_template_shows_exists() -> None:
    """Those behind one or two comment signs, whichever table they belong to."""
    template = (files("fedgrove") / "template.toml").read_text(encoding="utf-8")
    tables = [Job, *(config_of(kind) for kind in KINDS), Client, Evaluate, Rounds, Privacy, Model, Text]
    known = {key for table in tables for key in table.model_fields} | {"method"}
    shown = re.findall(r"(?m)^(?:#\s+){0,2}([a-z_]+) +?= ", template)
    assert len(shown) > 60
    assert set(shown) <= known
