"""Whatever befalls a site, the network or the server: the run says so, goes on while the quorum holds, and loses nothing.

One FLARE job takes a quarter of a minute to begin and to end, so several errors befall one run, a block each.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

pytest.importorskip("nvflare", reason="the extra fedgrove[flare] is not installed")

import fedgrove.stages.prune.pruners
from federated import MODEL, Lines, Running, environment
from fedgrove.deploy.flare import node, operator
from fedgrove.engines.flare import ABSENT, ENDED
from fedgrove.errors import FedgroveError
from small import ROOT, Small, make_model

pytestmark = pytest.mark.federation
SECRET = "zanzibar-7413"
NAMES = ("ash", "birch", "cedar", "dogwood", "elm")
BLOCKS = 12
BLOCK = "prune: round 1 of 1, block {} of 12"
GRACE = 10.0  # seconds: enough for a site on a busy machine; an hour's outage and a short one differ in nothing else

# A pruner that does at every block what the next line of a file says, in the folder of the site that it runs at.
PRUNER = """
import os, signal, time
from pathlib import Path
import torch
from fedgrove.errors import FedgroveError
from fedgrove.stages.prune.pruners import wanda

NEEDS = "squares"


def prune(weight, inputs, target):
    script = Path("errors.txt")
    lines = script.read_text().splitlines() if script.is_file() else []
    if lines and weight.shape == (64, 96):  # one linear of each block
        script.write_text("\\n".join(lines[1:]))
        match lines[0]:
            case "raise":
                raise RuntimeError("%(secret)s")
            case "data":
                raise FedgroveError("%(secret)s")
            case "disk":
                with open("/dev/full", "w") as full:
                    full.write("x" * 100000)
            case "memory":
                torch.ones(2**30)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "nap":
                time.sleep(10)  # a pass that starts again after a stop takes all that are left, within the timeout
            case "wait":
                for _ in range(500):  # at eight blocks longer than the 300 s that FLARE waits for a response that was lost
                    if Path("go-on.txt").is_file():
                        break
                    time.sleep(0.1)
            case "hang":
                time.sleep(600)
    return wanda.prune(weight, inputs, target)
"""

# What a site may do that its owner has tampered with: the process that FLARE starts answers by another file.
TAMPER = """
import importlib.abc, importlib.machinery, sys, time
from pathlib import Path

LATE = 61  # seconds: one more than the job allows


class Tamper(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "fedgrove.deploy.flare.executor":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def changed(module):
            execute(module)
            honest, earlier = module.FedgroveExecutor.execute, []

            def answer(self, task_name, shareable, fl_ctx, abort_signal):
                script = Path("lies.txt")
                lies = script.read_text().splitlines() if script.is_file() and shareable["kind"] == "prune/block" else []
                if lies:
                    script.write_text("\\n".join(lies[1:]))
                if lies and lies[0] == "late":
                    time.sleep(LATE)
                reply = honest(self, task_name, shareable, fl_ctx, abort_signal)
                earlier.append(dict(reply))
                match lies[0] if lies else "":
                    case "text":
                        reply["error"] = "%(secret)s"
                    case "replay":
                        reply.update(earlier[-2])
                    case "noise":
                        reply["body"] = b"noise"
                return reply

            module.FedgroveExecutor.execute = answer

        spec.loader.exec_module = changed
        return spec


sys.meta_path.insert(0, Tamper())
"""
# What a site's machine may do to the processes that FLARE starts there; the first word of a file in the kit says which.
BROKEN = """
import os, resource, signal, sys
from pathlib import Path

way = Path("way.txt").read_text().split() if Path("way.txt").is_file() else ["none"]
if "nvflare.private.fed.app.client.worker_process" in sys.orig_argv:  # the process of a run
    match way[0]:
        case "exit":
            os._exit(int(way[1]))
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
else:
    match os.environ.get("BROKEN"):
        case "python":
            sys.executable = "/gone/python"
        case "disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
"""
FAULTY = """
import os
import fedgrove.stages.prune.pruners
fedgrove.stages.prune.pruners.__path__.append(os.path.dirname(__file__))
"""
OLD = """
import importlib.metadata
known = importlib.metadata.version
importlib.metadata.version = lambda name: "0.0.9" if name == "fedgrove" else known(name)
"""


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """A federation whose model has a block for each error."""
    folder = tmp_path_factory.mktemp("grown")
    small = Small(folder)
    small.model = make_model(folder / "long", num_hidden_layers=BLOCKS)
    return small


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, dict[str, str]]]:
    """What is in the environment of a process that can misbehave, is tampered with, or is of an older fedgrove."""
    folder = tmp_path_factory.mktemp("paths")
    found = {}
    for name, code in (
        ("broken", BROKEN),
        ("faulty", FAULTY),
        ("tampered", FAULTY + TAMPER % {"secret": SECRET}),
        ("old", OLD),
    ):
        (folder / name).mkdir()
        (folder / name / "sitecustomize.py").write_text(code)
        (folder / name / "faulty.py").write_text(PRUNER % {"secret": SECRET})
        found[name] = {"PYTHONPATH": os.pathsep.join([str(folder / name), str(ROOT / "src")])}
    fedgrove.stages.prune.pruners.__path__.append(str(folder / "faulty"))
    yield found
    fedgrove.stages.prune.pruners.__path__.remove(str(folder / "faulty"))


@pytest.fixture(scope="module")
def federation(grown: Small, paths: dict[str, dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = Running(grown, tmp_path_factory.mktemp("federation"), NAMES, proxied="dogwood", grace=GRACE)
    try:
        running.start(
            server=paths["faulty"],
            ash=paths["faulty"],
            birch=paths["tampered"],
            cedar=paths["faulty"],
            dogwood=paths["faulty"],
            elm=paths["old"],
        )
        yield running
    finally:
        running.close()


def changed_copy(model: Path, folder: Path) -> Path:
    """A model that differs in one weight of one block."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.7.mlp.down_proj.weight"][0, 0] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def contributors(run: Path) -> list[list[str]]:
    """Who is in each block."""
    records = json.loads((run / "pruning.json").read_text(encoding="utf-8"))["tensors"]
    return [next(record["clients"] for record in records if record["block"] == block) for block in range(BLOCKS)]


def test_what_befalls_a_site_costs_its_part_of_a_block_and_no_more(federation: Running, grown: Small, tmp_path: Path) -> None:
    federation.describe("birch", limit="3GiB")
    federation.describe("cedar", allow={"secure": True})
    federation.describe("dogwood", models={MODEL: str(changed_copy(grown.model, tmp_path / "other"))})
    errors = ["", "raise", "data", "disk", "memory", "kill", "hang", "", "", "", "", ""]
    lies = ["", "", "", "", "", "", "", "text", "replay", "noise", "late", ""]
    (federation.sites["birch"] / "errors.txt").write_text("\n".join(errors))
    (federation.sites["birch"] / "lies.txt").write_text("\n".join(lies))
    seen = Lines()
    assert federation.run("errors", seen, stages__0__pruner="faulty", rounds={"quorum": 1, "timeout": 60}) is None
    messages = [line.partition(": ")[2] for line in seen.messages if line.startswith("birch: ")]
    expected = [
        "RuntimeError in its handler; the trace is in its own log/site.log",
        "FedgroveError in its handler; its text or settings are wrong, and its own log/site.log says why",
        "its disk is full; free some space there",
        "out of memory; raise limit in its site.toml, or lower samples or length",
        "its working process was killed (status -9); out of memory? Lower samples or length",
        "no response in 60 s (rounds.timeout)",
        "it sent an error that is not one of fedgrove's",
        "its response was refused: it belongs to another request",
        "its response was refused: the message is damaged (SafetensorError)",
        "no response in 60 s (rounds.timeout)",  # it comes a second later, and nobody waits for it
    ]
    assert messages == expected
    for line in (
        "cedar: it refuses what the job asks (allow.secure in its site.toml)",
        "dogwood: its model differs from the job's at block-0007; copy the model there again",
        "elm: its fedgrove is 0.0.9, this one is 0.1.0; install the same version",
    ):
        assert line in seen.messages
    both, one = ["ash", "birch"], ["ash"]
    who = contributors(federation.fetch("errors"))
    assert who == [both, *[one] * 10, both], "what came late is in no block"
    for folder in (federation.server, federation.operator, *(kit for name, kit in federation.sites.items() if name != "birch")):
        for file in (file for file in folder.rglob("*") if file.is_file()):
            assert SECRET.encode() not in file.read_bytes(), file
    assert SECRET in (federation.sites["birch"] / "log" / "site.log").read_text(encoding="utf-8"), "its owner can read it"


FOUR = [{"name": name} for name in NAMES[:4]]


def test_too_few_end_the_run_and_resuming_it_loses_nothing(federation: Running) -> None:
    for name in NAMES:
        federation.describe(name)
    three = [{"name": name} for name in NAMES[:3]]
    (federation.sites["birch"] / "errors.txt").write_text("\n".join(["", "", "raise"]))
    error = federation.run("few", clients=three, stages__0__pruner="faulty", rounds={"quorum": 3})
    assert error
    assert "(2 of 3 clients responded, 3 needed: rounds.quorum)" in error
    seen = Lines()
    assert federation.run("few", seen, resume=True, clients=three, stages__0__pruner="faulty", rounds={"quorum": 3}) is None
    assert not seen.has_phase(BLOCK.format(1)), "finished blocks are not done again"
    assert contributors(federation.fetch("few")) == [list(NAMES[:3])] * BLOCKS


def test_a_lost_network_and_a_lost_site_cost_their_part_of_some_blocks(federation: Running, grown: Small) -> None:
    for name in NAMES:
        federation.describe(name)
    assert federation.proxy
    seen = Lines()
    seen.at_phase[BLOCK.format(3)] = federation.proxy.cut
    cedar = federation.sites["cedar"]  # it takes its time until dogwood is back: FLARE needs up to a minute to connect anew
    (cedar / "errors.txt").write_text("\n".join(["wait" if block >= 4 else "" for block in range(BLOCKS)]))

    def restore() -> None:  # it was cut off before the request came, or before the response went
        assert federation.proxy
        federation.proxy.restore()
        seen.at_response["dogwood"] = back

    def back() -> None:
        (cedar / "go-on.txt").touch()
        federation.kill(federation.sites["ash"])

    seen.at_message["dogwood: "] = restore
    assert federation.run("lost", seen, clients=FOUR, stages__0__pruner="faulty", rounds={"quorum": 1, "timeout": 60}) is None
    who = contributors(federation.fetch("lost"))
    assert who[0] == ["ash", "birch", "cedar", "dogwood"]
    without = [block for block in range(BLOCKS) if "dogwood" not in who[block]]
    assert without, "the cut was felt"
    assert "dogwood" in who[max(without) + 1], "and it was taken back"
    assert "ash" not in who[-1]
    assert [line for line in seen.messages if line.startswith("ash: it cannot be reached")]


def test_a_site_that_was_killed_is_taken_back_while_the_run_goes_on(
    federation: Running, paths: dict[str, dict[str, str]]
) -> None:
    """FLARE hands a job out once; submitting it anew with resume stops the run, and it goes on with all who are there."""
    for name in NAMES:
        federation.describe(name)
        (federation.sites[name] / "errors.txt").unlink(missing_ok=True)
    if node.running(federation.sites["ash"]) is not None:
        federation.kill(federation.sites["ash"])
    federation.start_site("ash", **paths["faulty"])
    federation.wait_for(NAMES[:4])
    (federation.sites["birch"] / "errors.txt").write_text("\n".join([""] * 6 + ["nap"] * 6))  # time to submit it anew
    changes = {"clients": FOUR, "stages__0__pruner": "faulty", "rounds": {"quorum": 3, "timeout": 60}}
    seen = Lines()
    seen.at_phase[BLOCK.format(4)] = lambda: federation.kill(federation.sites["ash"])

    class Gone(Exception):
        """Whoever watches goes away; the run does not."""

    def go() -> None:
        raise Gone

    seen.at_phase[BLOCK.format(8)] = go
    with pytest.raises(Gone):
        federation.run("back", seen, **changes)
    now = time.time()
    federation.start_site("ash", **paths["faulty"])
    federation.wait_for(("ash",), since=now)
    seen, stopped = Lines(), []

    def stop() -> None:  # in the first block, where birch's pass starts again and naps for all that are left
        if not stopped:
            stopped.extend(operator.remove(federation.operator, "elm"))

    for block in range(7, BLOCKS):
        seen.at_phase[BLOCK.format(block)] = stop
    error = federation.run("back", seen, resume=True, **changes)
    assert (error, stopped) == ("the run was stopped; continue it with --resume", ["back"]), "removing a site stops a run"
    assert not seen.has_phase(BLOCK.format(1))
    operator.remove(federation.operator, "elm", undo=True)
    assert federation.run("back", resume=True, **changes) is None
    who = contributors(federation.fetch("back"))
    without = [block for block in range(BLOCKS) if "ash" not in who[block]]
    assert without, "the kill was felt"
    assert "ash" in who[-1], "and it was taken back"


def test_a_killed_server_is_resumed_to_the_same_bits(
    federation: Running, grown: Small, paths: dict[str, dict[str, str]]
) -> None:
    if node.running(federation.sites["ash"]) is None:
        federation.start_site("ash", **paths["faulty"])
        federation.wait_for(("ash",))
    seen = Lines()
    seen.at_phase[BLOCK.format(5)] = lambda: federation.kill(federation.server)
    with pytest.raises(FedgroveError, match="--resume"):
        federation.run("resumed", seen, clients=FOUR)
    with environment(**paths["faulty"]):
        node.start(federation.server)
    federation.wait_for(NAMES[:4])
    seen = Lines()
    assert federation.run("resumed", seen, resume=True, clients=FOUR) is None
    assert not seen.has_phase(BLOCK.format(1)), "finished blocks are not done again"
    assert seen.has_phase(BLOCK.format(BLOCKS))
    alone = in_process(grown)
    model = federation.fetch("resumed") / "model" / "model.safetensors"
    assert model.read_bytes() == (alone / "model" / "model.safetensors").read_bytes()


def test_secure_aggregation_opens_the_same_model(federation: Running, grown: Small) -> None:
    """Each site brings its own key and the roster that the operator signed; one of them answers in no other way."""
    federation.describe("cedar", allow={"secure": True})
    assert federation.run("masked", clients=FOUR, privacy={"secure_aggregation": True}) is None
    model = federation.fetch("masked") / "model" / "model.safetensors"
    assert model.read_bytes() == (in_process(grown) / "model" / "model.safetensors").read_bytes()


def test_what_is_learnt_leaves_a_site_under_a_mask_with_noise_and_without_its_loss(federation: Running) -> None:
    """Differential privacy of a whole client: a site that asks for noise agrees to a job with it, and to no other."""
    federation.describe("cedar", allow={"secure": True, "epsilon": 20.0, "delta": 1e-3})
    stage = {
        "kind": "tune", "method": "lora", "aggregation": "ffa_lora", "precision": "fixed", "rounds": 2, "steps": 1,
        "length": 16, "batches": [2], "ranks": [2], "bits": [32], "dp_unit": "client", "epsilon": 20.0, "delta": 1e-3,
    }  # fmt: skip
    private = {"clients": FOUR, "privacy": {"secure_aggregation": True}, "evaluate": {}}
    assert "allow.epsilon" in str(federation.run("louder", stages=[{**stage, "epsilon": 30.0}], **private))
    assert federation.run("private", stages=[stage], **private) is None
    out = federation.fetch("private")
    (note,) = json.loads((out / "plan-0-tune.json").read_text())["notes"]
    assert "(20, 0.001)-differential privacy of one whole client" in note
    assert "clients add their part of the noise" in note
    assert not any(json.loads(line)["name"] == "loss" for line in (out / "metrics.jsonl").read_text().splitlines())


def in_process(grown: Small) -> Path:
    """The same job in one process."""
    clients = [{"name": site["name"], "data": str(grown.texts.get(site["name"], grown.texts["ash"]))} for site in FOUR]
    return grown.undisturbed(clients=clients)


ODD = {
    "server": "the server's  folder",
    "ash": "it's a folder # {of} $HOME",
    "cedar": 'é "quoted" %s \\ 日本語',
    "gorse": "/".join(["long" * 50] * 4),
}


def test_sites_whose_process_does_not_start_are_missing_by_name_and_end_nobodys_run(
    small: Small, paths: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    """Odd folders work; at other sites a run's process ends at once, cannot be started, or the disk is full."""
    names = ("ash", "birch", "cedar", "dogwood", "elm", "fir", "gorse")
    running = Running(small, tmp_path / "federation", names, grace=GRACE)
    try:
        for name, folder in ODD.items():
            move(running.server if name == "server" else running.sites[name], tmp_path / "federation" / folder / name)
        broken, sound = paths["broken"], dict.fromkeys(ODD, paths["faulty"])
        for name, way in (("birch", "exit 1"), ("dogwood", "kill")):
            (running.sites[name] / "way.txt").write_text(way)
        bad = {"elm": broken | {"BROKEN": "python"}, "fir": broken | {"BROKEN": "disk"}}
        running.start(birch=broken, dogwood=broken, **bad, **sound)
        ash = running.sites["ash"]
        seen = Lines()
        error = running.run("missing", seen, rounds={"quorum": 5})
        assert error == f"client 'birch': {ENDED} (3 of 7 clients responded, 5 needed: rounds.quorum)"
        missing = [f"birch: {ENDED}", f"dogwood: {ENDED}", f"elm: {ENDED}", f"fir: {ABSENT}"]
        assert seen.messages[:4] == missing

        for name, way in (("birch", "exit 0"), ("dogwood", "exit 103")):
            (running.sites[name] / "way.txt").write_text(way)
        seen = Lines()

        def kill() -> None:
            kill_run(running.sites["gorse"])
            (ash / "go-on.txt").touch()

        seen.at_phase["prune: round 1 of 1, block 1 of 2"] = kill
        (ash / "errors.txt").write_text("wait\n")
        assert running.run("missing", seen, stages__0__pruner="faulty", rounds={"quorum": 2}) is None, "the name is free"
        assert seen.messages[:4] == missing
        assert f"gorse: {ENDED}" in seen.messages, "its process ended while the run went on"
        report = (running.fetch("missing") / "report.html").read_text(encoding="utf-8")
        assert all(name in report for name in ("birch", "dogwood", "elm", "fir"))
    finally:
        running.close()


def move(kit: Path, folder: Path) -> None:
    """Moves a kit; where it was, there is a link."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    kit.rename(folder)
    kit.symlink_to(folder)


def kill_run(kit: Path) -> None:
    """SIGKILL to the process of a run at a site, not to the site's own."""
    process = node.running(kit)
    assert process is not None
    for child in process.children():
        child.kill()
