"""A stage that only some clients take part in: the others have no work in it, and go on from its result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from small import CLIENTS, Moment, Small, cli, complaint, killed, lines, measurements

ASH, BIRCH = CLIENTS[:2]
TUNE: dict[str, Any] = {
    "kind": "tune", "method": "lora", "planner": "uniform", "rounds": 2, "steps": 4, "length": 16, "batches": [4],
    "bits": [32], "ranks": [4], "learning_rate": 1e-2,
}  # fmt: skip


def asked(run: Path) -> set[tuple[int, str]]:
    """Which client trained in which stage."""
    return {(line["stage"], line["client"]) for line in lines(run / "ledger.jsonl") if line["kind"].startswith("tune/")}


def test_each_stage_asks_its_own_clients_and_goes_on_from_the_stage_before(small: Small, tmp_path: Path) -> None:
    stages = [{**TUNE, "clients": [ASH]}, {**TUNE, "clients": [BIRCH]}]
    job = small.job("in-turn", **small.one_word(), stages=stages)
    assert cli("run", job, "--out", tmp_path / "run", "--quiet")[0] == 0
    assert asked(tmp_path / "run") == {(0, ASH), (1, BIRCH)}
    plans = [json.loads((tmp_path / "run" / f"plan-{stage}-tune.json").read_text()) for stage in (0, 1)]
    assert [list(plan["clients"]) for plan in plans] == [[ASH], [BIRCH]]
    losses = {key[:3]: value for key, value in measurements(tmp_path / "run").items() if key[3] == "loss"}
    first, then = (
        next(value for (at, _, client), value in losses.items() if (at, client) == one) for one in ((0, ASH), (1, BIRCH))
    )
    assert then < 0.7 * first, "birch trains the model that ash has trained"


def test_a_client_that_joins_later_changes_nothing_before(small: Small, tmp_path: Path) -> None:
    stages = [{**TUNE, "clients": [ASH]}, {**TUNE, "rounds": 1}]
    found = []
    for name, word in (("one", "tree"), ("other", "river")):
        job = small.job(name, **small.one_word("tree", *[word] * (len(CLIENTS) - 1)), stages=stages)
        assert cli("run", job, "--out", tmp_path / name, "--quiet")[0] == 0
        found.append(measurements(tmp_path / name))
    assert asked(tmp_path / "one") == {(0, ASH), *((1, client) for client in CLIENTS)}
    first = [{key: value for key, value in of.items() if key[0] == 0} for of in found]
    assert first[0] == first[1]
    assert found[0] != found[1]


def test_a_killed_run_goes_on_to_the_same_bits(small: Small, tmp_path: Path) -> None:
    stages = [{**TUNE, "clients": [ASH]}, {**TUNE, "clients": [BIRCH, CLIENTS[2]]}]
    job = small.job("killed", stages=stages)
    for name in ("whole", "killed"):
        if name == "killed":
            killed("run", job, "--out", tmp_path / name, "--quiet", moment=Moment("open", "*/ledger.jsonl", count=9))
        assert cli("run", job, "--out", tmp_path / name, "--quiet", *(["--resume"] if name == "killed" else []))[0] == 0
    whole, again = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "killed"))
    assert whole == again


def test_text_too_short_for_a_stage_of_others_is_no_fault(small: Small, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("only a few words\n")
    clients = [{"name": ASH, "data": str(short)}, *({"name": name, "data": str(small.texts[name])} for name in CLIENTS[1:])]
    job = small.job("short", clients=clients, stages=[{**TUNE, "clients": list(CLIENTS[1:])}])
    assert cli("run", job, "--out", tmp_path / "run", "--quiet")[0] == 0
    assert "client 'ash'" in complaint("run", small.job("all", clients=clients, stages=[TUNE]), "--out", tmp_path / "all")


def test_a_pool_deals_to_the_clients_of_its_stage(small: Small, tmp_path: Path) -> None:
    two = list(CLIENTS[:2])
    pool = {**TUNE, "clients": two, "pool": {"gate": "groups", "groups": {"one": [two[0]], "two": [two[1]]}}}
    assert cli("run", small.job("pool", stages=[pool]), "--out", tmp_path / "run", "--quiet")[0] == 0
    assert sorted(json.loads((tmp_path / "run" / "pool" / "pool.json").read_text())["clients"]) == two


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"stages": [{**TUNE, "clients": ["elm"]}]}, "stages.0.clients: 'elm' is no client of the job; name some of ash"),
        ({"stages": [{**TUNE, "clients": [ASH, ASH]}]}, "stages.0.clients: 'ash' is there twice"),
        ({"stages": [{**TUNE, "clients": [ASH]}], "evaluate__alone": True}, "evaluate.alone: stages.0.clients leaves"),
        (
            {"stages": [{**TUNE, "clients": [ASH]}], "evaluate__centralized": True},
            "evaluate.centralized: stages.0.clients leaves clients out",
        ),
        (
            {"stages": [{**TUNE, "clients": [ASH], "aggregation": "ffa_lora", "precision": "fixed"}],
             "privacy": {"secure_aggregation": True}},
            "privacy.min_group: 3 clients in a sum, but there are 1 in stages.0.clients",
        ),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(small: Small, changes: dict[str, Any], says: str) -> None:
    assert says in complaint("plan", small.job("wrong", **changes))
