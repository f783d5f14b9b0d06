"""The engine boundary: no order, every failure an answer, the same bits wherever the clients work."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import pytest

from fedgrove import run as server
from fedgrove.engines.base import Engine
from fedgrove.engines.local import LocalEngine
from fedgrove.errors import FedgroveError
from fedgrove.job.load import load
from fedgrove.rounds import wire
from fedgrove.rounds.federation import Federation
from fedgrove.runfolder import RunFolder
from fedgrove.stages.prune.config import Config
from fedgrove.stages.prune.exchanges.block import PruneBlock
from fedgrove.stages.prune.plan import Plan
from fedgrove.stages.prune.stage import prune_request
from small import CLIENTS, LENGTH, SAMPLES, Heard, Small, alive, cli, complaint, lines, process, result, wait_until

Reply = tuple[str, bytes | None, str | None]
BIRCH = (SAMPLES + 1) * LENGTH  # the calibration tokens of birch, where it is asked for a window more
ODD = {"stages__0__pruner": "faulty", "clients__1__samples": SAMPLES + 1}


def model_of(run: Path) -> dict[str, str]:
    return {name: digest for name, digest in result(run).items() if name == "model/model.safetensors"}


class Wrapped:
    """A local engine whose replies pass through a function before they are given out."""

    def __init__(self, engine: LocalEngine, change: Callable[[str, list[Reply]], Iterable[Reply]]):
        self.engine = engine
        self.change = change

    def clients(self) -> list[str]:
        return self.engine.clients()

    def request(
        self, kind: str, messages: Mapping[str, bytes], timeout: float | None = None, largest: int | None = None
    ) -> Iterator[Reply]:
        yield from self.change(kind, list(self.engine.request(kind, messages, timeout)))


def run_with(small: Small, out: Path, change: Callable[[str, list[Reply]], Iterable[Reply]], **changes: object) -> list[str]:
    """Runs a job on a wrapped engine; gives the lines of progress."""
    job = load(small.job(**changes))
    heard = Heard()
    run = RunFolder(out, job, listener=heard)
    try:
        engine: Engine = Wrapped(server.local_engine(job, run.path / "clients"), change)
        server.run_job(job, engine, run)
    finally:
        run.close()
    return heard.lines


@pytest.mark.usefixtures("forked_workers")
def test_workers_give_the_same_bits(small: Small, tmp_path: Path) -> None:
    undisturbed = small.undisturbed(evaluate__alone=True)
    assert cli("run", small.job(evaluate__alone=True), "--out", tmp_path / "run", "--workers", "2", "--quiet")[0] == 0
    assert result(tmp_path / "run") == result(undisturbed)
    ledger = [sorted(map(str, lines(run / "ledger.jsonl"))) for run in (tmp_path / "run", undisturbed)]
    assert ledger[0] == ledger[1]


@pytest.mark.usefixtures("forked_workers")
def test_a_killed_worker_is_an_answer_that_names_its_client(small: Small, tmp_path: Path, faulty: Callable[..., None]) -> None:
    out, job = tmp_path / "run", small.job(**ODD)
    faulty("kill", BIRCH)
    line = complaint("run", job, "--out", out, "--workers", "1")
    assert line.startswith(f"client 'birch': its process died (status {-signal.SIGKILL}); out of memory?")
    assert "2 of 3 clients responded, 3 needed: rounds.quorum" in line
    assert not (out / "model").exists()

    status, _, err = cli("run", job, "--out", out, "--resume", "--workers", "1", "--set", "rounds.quorum=2")
    assert status == 0
    assert err.count("birch: its process died") == 2, "each block says who is missing"
    two = tmp_path / "two"
    clients = [client for client in small.spec()["clients"] if client["name"] != "birch"]
    assert cli("run", small.job(**{**ODD, "clients": clients, "clients__1__samples": SAMPLES}), "--out", two)[0] == 0
    assert model_of(out) == model_of(two), "those who answered are a federation of their own"
    records = json.loads((out / "pruning.json").read_text())["tensors"]
    assert {tuple(record["clients"]) for record in records} == {("ash", "cedar")}


@pytest.mark.usefixtures("forked_workers")
def test_a_client_that_hangs_is_out_of_time_and_can_be_asked_again(
    small: Small, tmp_path: Path, faulty: Callable[..., None]
) -> None:
    job = load(small.job(**ODD))
    run = RunFolder(tmp_path / "run", job)
    engine = server.local_engine(job, run.path / "clients", workers=2)
    try:
        (plan,) = server.make_plans(job, server.open_model(job.model), Federation(engine, run))  # both workers are awake now
        assert isinstance(plan, Plan)
        (stage,) = job.stages
        assert isinstance(stage, Config)
        sparsities = [stage.target.sparsity] * plan.num_blocks
        messages = {
            client: wire.pack(
                {}, {"request": prune_request(job, plan, stage, client, 0, 0, sparsities).model_dump(mode="json")}
            )
            for client in ("ash", "birch")
        }
        faulty("hang", BIRCH)
        replies = {client: (answer, error) for client, answer, error in engine.request(PruneBlock.KIND, messages, timeout=15)}
        hung = int((tmp_path / "hangs").read_text())
        assert replies["birch"] == (None, "no response in 15 s (rounds.timeout)")
        assert replies["ash"][0] is not None
        wait_until(lambda: not alive(hung))

        faulty("nothing")
        again = {client: (answer, error) for client, answer, error in engine.request(PruneBlock.KIND, messages)}
        assert again["birch"][0] is not None
        assert again["ash"] == replies["ash"], "a second request is answered with the same bytes"
    finally:
        engine.close()
        run.close()


def test_workers_end_with_a_run_that_is_killed(small: Small, tmp_path: Path, faulty: Callable[..., None]) -> None:
    faulty("hang")
    job = small.job(stages__0__pruner="faulty")

    command = ("run", job, "--out", tmp_path / "run", "--workers", "1")
    path = {"PYTHONPATH": os.environ["PYTHONPATH"]}
    status, _, _ = process(*command, env=path, kill_after=lambda: wait_until(lambda: (tmp_path / "hangs").exists()))
    assert status == -signal.SIGKILL
    wait_until(lambda: not alive(int((tmp_path / "hangs").read_text())))


def test_a_client_that_fails_once_is_asked_again(small: Small, tmp_path: Path, faulty: Callable[..., None]) -> None:
    calm, out = tmp_path / "calm", tmp_path / "run"
    assert cli("run", small.job(**ODD), "--out", calm)[0] == 0
    faulty("raise-once", BIRCH)
    assert cli("run", small.job(**ODD, rounds__retries=1), "--out", out)[0] == 0
    assert model_of(out) == model_of(calm)
    sent = [line for line in lines(out / "ledger.jsonl") if line["client"] == "birch" and line["kind"] == PruneBlock.KIND]
    assert [line["direction"] for line in sent] == ["down", "down", "up", "down", "up"]


def test_the_run_goes_on_while_the_quorum_holds(small: Small, tmp_path: Path, faulty: Callable[..., None]) -> None:
    faulty("raise", BIRCH)
    status, _, err = cli("run", small.job(**{**ODD, "evaluate__alone": True}, rounds__quorum=2), "--out", tmp_path / "run")
    assert status == 0
    assert "birch: RuntimeError in its handler" in err
    alone = {line["client"] for line in lines(tmp_path / "run" / "metrics.jsonl")}
    assert alone == {None, "ash", "cedar"}, "nothing is claimed of a client that gave nothing"
    complaint("run", small.job(**ODD, rounds__quorum=3), "--out", tmp_path / "three")


def test_the_order_of_answers_changes_nothing(small: Small, tmp_path: Path) -> None:
    rng = random.Random(0)

    def shuffled(kind: str, replies: list[Reply]) -> list[Reply]:
        return rng.sample(replies, len(replies))

    run_with(small, tmp_path / "run", shuffled, stages__0__rounds=2)
    assert result(tmp_path / "run") == result(small.undisturbed(stages__0__rounds=2))


def test_a_late_answer_or_a_stranger_does_no_harm(small: Small, tmp_path: Path) -> None:
    late: list[Reply] = []

    def untidy(kind: str, replies: list[Reply]) -> Iterator[Reply]:
        yield "dogwood", b"never asked", None
        for client, answer, error in replies:
            if kind == PruneBlock.KIND and client == "birch" and not late:
                late.append((client, answer, error))
                yield client, None, "no response in 1 s (rounds.timeout)"
                continue
            if len(late) == 1:  # now it is asked again, and both answers come
                yield late[0]
                late.append(late[0])
            yield client, answer, error
            yield client, None, "lost"

    said = run_with(small, tmp_path / "run", untidy, rounds__retries=1)
    assert not [line for line in said if "dogwood" in line]
    calm = result(small.undisturbed())
    assert {**result(tmp_path / "run"), "job.toml": calm["job.toml"]} == calm


def test_an_answer_to_another_ask_is_refused(small: Small, tmp_path: Path) -> None:
    first: list[Reply] = []

    def stuck(kind: str, replies: list[Reply]) -> Iterator[Reply]:
        for reply in replies:
            if kind == PruneBlock.KIND and reply[0] == "birch":
                first.append(reply)
                reply = first[0]
            yield reply

    with pytest.raises(FedgroveError, match="client 'birch': its response was refused: it belongs to another request"):
        run_with(small, tmp_path / "run", stuck)


def test_an_engine_that_forgets_a_client_does_not_make_a_smaller_federation(small: Small, tmp_path: Path) -> None:
    def forgetful(kind: str, replies: list[Reply]) -> list[Reply]:
        return [reply for reply in replies if kind != PruneBlock.KIND or reply[0] != "birch"]

    with pytest.raises(FedgroveError, match="client 'birch': it sent no response"):
        run_with(small, tmp_path / "run", forgetful)


def test_sites_are_sorted_and_errors_come_as_answers(small: Small, tmp_path: Path) -> None:
    job = load(small.job(clients=list(reversed(small.spec()["clients"]))))
    engine = server.local_engine(job, tmp_path)
    assert engine.clients() == sorted(CLIENTS)
    replies = list(engine.request("no such kind", {"ash": wire.pack({}, {}), "birch": b"noise"}))
    assert [(client, answer) for client, answer, _ in replies] == [("ash", None), ("birch", None)]
    assert all(error and "\n" not in error for _, _, error in replies)
