"""A federation of processes gives the bits of the in-process engine, and nothing leaves a site but what the docs say."""

from __future__ import annotations

import configparser
import json
import os
import shlex
import shutil
import ssl
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

pytest.importorskip("nvflare", reason="the extra fedgrove[flare] is not installed")

from cryptography import x509

from federated import OPERATOR, Lines, Running, environment
from fedgrove.deploy.flare import kits, node, operator
from fedgrove.deploy.flare.doctor import shake_hands
from fedgrove.deploy.flare.files import Allow
from fedgrove.deploy.flare.installation import credentials
from fedgrove.engines.flare import ENDED
from fedgrove.errors import FedgroveError
from fedgrove.export import export
from fedgrove.job.load import load_federated
from fedgrove.plugins import names
from fedgrove.stages.tune.gates import PACKAGE as GATES
from small import ROOT, Small, cli, complaint, lines, wait_until
from test_head import files as labeled  # noqa: F401
from test_head import guessing
from test_prompt import files  # noqa: F401
from test_prompt import job as prompt_job

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
SEEDS = {
    "kind": "tune", "method": "seeds", "rounds": 1, "steps": 1, "length": 16, "batches": [1], "learning_rate": 1e-3,
    "perturbation": 2**-9,
}  # fmt: skip
POOL = {
    "kind": "tune", "method": "lora", "aggregation": "ffa_lora", "rounds": 2, "steps": 2, "length": 16, "batches": [1],
    "ranks": [2], "bits": [32],
    "pool": {"gate": "keys", "members": 2, "common": 0.5, "starts": 2, "fit_rounds": 2, "size": 4, "prefix": 8},
}  # fmt: skip


def stages(small: Small) -> list[dict[str, object]]:
    return [small.spec()["stages"][0], TUNE]


@pytest.fixture(scope="module")
def federation(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("federation")
    running = Running(small, folder, proxied="ash")
    private = folder / SECRET  # a path, a text and an exception that nobody else may ever see
    private.mkdir()
    text = small.texts["ash"].read_text(encoding="utf-8")
    (private / "ash.txt").write_text(text, encoding="utf-8")
    running.describe("ash", data=[str(private / "ash.txt")], result=True)
    try:
        running.start()
        yield running
    finally:
        running.close()


def test_the_model_is_that_of_the_in_process_engine_bit_for_bit(federation: Running, small: Small, tmp_path: Path) -> None:
    seen = Lines()
    wanted = [*stages(small), SEEDS, POOL]
    assert federation.run("demo", seen, stages=wanted, evaluate__alone=True, result="sites") is None
    assert any(phase.action == "prune" for phase in seen.phases)
    alone = small.undisturbed(stages=wanted)
    fetched = federation.fetch("demo")
    weights = (fetched / "model" / "model.safetensors").read_bytes()
    assert weights == (alone / "model" / "model.safetensors").read_bytes()
    assert (fetched / "adapter" / "adapter_model.safetensors").read_bytes() == (
        alone / "adapter" / "adapter_model.safetensors"
    ).read_bytes()
    for file in ("common.safetensors", "member-0.safetensors", "gate.safetensors"):
        assert (fetched / "pool" / file).read_bytes() == (alone / "pool" / file).read_bytes()
    assert json.loads((fetched / "pruning.json").read_text()) == json.loads((alone / "pruning.json").read_text())

    given = federation.sites["ash"] / "results" / "demo"
    export(given, "hf", tmp_path / "given")
    assert (tmp_path / "given" / "model.safetensors").read_bytes() == weights
    assert not (federation.sites["birch"] / "results").exists(), "birch did not want it"
    for kit in federation.sites.values():
        assert not list((kit / "work").glob("demo-*")), "no hidden states are left behind"


def test_every_gate_of_a_pool_is_that_of_the_in_process_engine(federation: Running, small: Small) -> None:
    special: dict[str, dict[str, object]] = {
        "groups": {"groups": {"wood": ["ash", "birch"], "other": ["cedar"]}},
        "losses": {"members": 2, "windows": 1},
        "mixture": {"members": 2, "starts": 1, "fit_rounds": 1, "size": 4, "prefix": 8},
        "random": {"members": 2},
        "user_centric": {},
        "similar": {"members": 2, "starts": 1, "fit_rounds": 1, "size": 4, "prefix": 8},
    }
    assert {"keys", *special} == set(names(GATES)), "keys are in the job above"
    gates = [{"gate": gate, **({} if gate == "user_centric" else {"common": 0.0}), **more} for gate, more in special.items()]
    rounds = [2 if pool["gate"] == "user_centric" else 1 for pool in gates]
    stages = [{**POOL, "rounds": number, "steps": 1, "pool": pool} for number, pool in zip(rounds, gates, strict=True)]
    changes = {"stages": stages, "evaluate__alone": False}
    assert federation.run("gates", Lines(), **changes, result="sites") is None
    here, fetched = small.undisturbed(**changes), federation.fetch("gates")
    for file in ("model/model.safetensors", "pool/member-0.safetensors", "pool/gate.safetensors"):
        assert (fetched / file).read_bytes() == (here / file).read_bytes()


def test_a_gate_is_fitted_with_noise_in_a_federation(federation: Running) -> None:
    pytest.importorskip("dp_accounting")
    pool = {"gate": "similar", "members": 2, "common": 0.0, "starts": 1, "fit_rounds": 1, "size": 4, "prefix": 8}
    stage = {**POOL, "rounds": 1, "steps": 1, "epsilon": 8.0, "delta": 1e-3, "pool": pool}
    assert federation.run("noise", Lines(), stages=[stage], evaluate__alone=False, result="sites") is None
    fetched = federation.fetch("noise")
    assert "novelty" not in load_file(fetched / "pool" / "gate.safetensors"), "how unusual text is would need more noise"
    assert (fetched / "pool" / "member-0.safetensors").is_file()


def run_with_answers(federation: Running, name: str, changes: dict[str, Any]) -> Path:
    """Runs a job whose sites say in their own files which records are theirs; the fetched run folder."""
    described = {name: (kit / "site.toml").read_text(encoding="utf-8") for name, kit in federation.sites.items()}
    for client in changes["clients"]:
        of_client = {key: client[key] for key in ("prompt", "answer") if key in client}
        federation.describe(client["name"], data=[client["data"]], result=client["name"] == "ash", **of_client)
    try:
        assert (
            federation.run(name, result="sites", **{key: value for key, value in changes.items() if key != "clients"}) is None
        )
    finally:
        for site, text in described.items():
            (federation.sites[site] / "site.toml").write_text(text, encoding="utf-8")
    return federation.fetch(name)


def test_a_prompt_is_that_of_the_in_process_engine(federation: Running, small: Small, files: dict[str, Path]) -> None:  # noqa: F811
    changes = prompt_job(files)
    here = small.undisturbed(**changes)
    fetched = run_with_answers(federation, "prompt", changes)
    for file in ("prompt.json", "prompt/prompt.safetensors"):
        assert (fetched / file).read_bytes() == (here / file).read_bytes()
    given = federation.sites["ash"] / "results" / "prompt" / "prompt" / "prompt.safetensors"
    assert given.read_bytes() == (here / "prompt" / "prompt.safetensors").read_bytes()


def test_a_head_is_that_of_the_in_process_engine_and_sites_say_whether_they_have_labels(
    federation: Running,
    small: Small,
    labeled: dict[str, Path],  # noqa: F811
) -> None:
    changes = guessing(labeled)
    here = small.undisturbed(**changes)
    fetched = run_with_answers(federation, "head", changes)
    for file in ("head.json", "head/head.safetensors"):
        assert (fetched / file).read_bytes() == (here / file).read_bytes()


def test_each_stage_is_the_work_of_its_own_sites(federation: Running, small: Small) -> None:
    adapters = {"kind": "tune", "method": "lora", "rounds": 1, "steps": 2, "length": 16, "batches": [2], "bits": [32]}
    turns = [{**adapters, "clients": ["ash", "birch"]}, {**adapters, "clients": ["birch", "cedar"]}]
    here = small.undisturbed(stages=turns)
    assert federation.run("turns", Lines(), stages=turns) is None
    fetched = federation.fetch("turns")
    model = Path("model") / "model.safetensors"
    assert (fetched / model).read_bytes() == (here / model).read_bytes()
    asked = {(line["stage"], line["client"]) for line in lines(fetched / "ledger.jsonl") if line["kind"] == "tune/train"}
    assert asked == {(stage, client) for stage, turn in enumerate(turns) for client in turn["clients"]}


def test_a_kit_starts_as_a_service_or_in_a_container(federation: Running, tmp_path: Path) -> None:
    for name, kit in {"server": federation.server, **federation.sites}.items():
        unit = configparser.RawConfigParser()
        unit.read(kit / f"fedgrove-{name}.service", encoding="utf-8")
        service = {key: value.replace(f"/srv/fedgrove/{name}", str(kit)) for key, value in unit["Service"].items()}
        words = shlex.split(service["execstart"])
        assert words[1:] == ["federation", "start", str(kit), "--foreground"]
        assert service["readwritepaths"] == service["workingdirectory"] == str(kit)
        if shutil.which("systemd-analyze"):
            here = tmp_path / f"fedgrove-{name}.service"
            here.write_text((kit / here.name).read_text(encoding="utf-8").replace(words[0], sys.executable), encoding="utf-8")
            verified = subprocess.run(["systemd-analyze", "verify", here], capture_output=True, text=True, check=False)
            assert here.name not in verified.stderr

        (service,) = yaml.safe_load((kit / "compose.yaml").read_text(encoding="utf-8"))["services"].values()
        assert service["command"][2].endswith("exec fedgrove federation start /kit --foreground")
        assert service["volumes"] == [".:/kit"]
        port = operator.address(kit)[1] if name == "server" else None
        assert service["ports"] == ([f"{port}:{port}"] if port else []), "nobody connects to a site"


def test_a_kit_whose_process_number_is_taken_does_not_seem_to_run(federation: Running, tmp_path: Path) -> None:
    """In a container the process that starts has the number of the one that ran before."""
    shutil.copytree(federation.sites["ash"] / "startup", tmp_path / "startup")
    with subprocess.Popen([sys.executable, "-c", "input()", tmp_path], stdin=subprocess.PIPE) as starting:
        (tmp_path / node.PID).write_text(str(starting.pid))
        assert node.running(tmp_path) is None
        starting.communicate(b"\n")


def test_a_stranger_gets_no_connection(federation: Running, tmp_path: Path) -> None:
    """Without a certificate, and with one of another federation of the same name."""
    own = federation.sites["ash"] / "startup"
    shake_hands(own, "localhost", federation.port)
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    shutil.copy(own / "rootCA.pem", nothing)
    with pytest.raises(OSError, match=r"(?i)certificate|reset|closed the connection|eof"):
        shake_hands(nothing, "localhost", federation.port)

    kits.make_kits(federation.described, tmp_path / "other")
    other = tmp_path / "other" / "sites" / "ash" / "startup"
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(other, "localhost", federation.port)
    shutil.copy(own / "rootCA.pem", other)
    with pytest.raises(OSError, match=r"(?i)certificate|unknown|reset|closed the connection|eof"):
        shake_hands(other, "localhost", federation.port)


def test_a_site_cannot_submit(federation: Running, tmp_path: Path) -> None:
    for name in ("ash", OPERATOR):
        kit = tmp_path / name
        shutil.copytree(federation.operator, kit)
        settings = kit / "startup" / "fed_admin.json"
        settings.write_text(settings.read_text(encoding="utf-8").replace(OPERATOR, name), encoding="utf-8")
        for secret in ("client.crt", "client.key"):
            shutil.copy(federation.sites["ash"] / "startup" / secret, kit / "startup" / secret)
        with (
            pytest.raises(FedgroveError, match=r"the server does not (accept this kit|let this kit do that)"),
            operator.session(kit) as flare,
        ):
            flare.submit_job(str(prepared(federation, tmp_path, f"by-{name[:3]}")))


def submit_raw(federation: Running, folder: Path) -> str:
    """Submits a folder of FLARE's as it is; gives the status that the job ends with."""
    with operator.session(federation.operator) as flare:
        job = flare.submit_job(str(folder))
        wait_until(lambda: str(flare.get_job_status(job)).startswith(operator.ENDED), pause=0.5)
        return str(flare.get_job_status(job))


def prepared(federation: Running, folder: Path, name: str) -> Path:
    """A job for one site as FLARE's folder, which a test then spoils."""
    job = load_federated(federation.job(name, clients=[{"name": "ash"}]), sites=federation.names)
    operator.write_flare_job(folder / name, job, resume=False)
    return folder / name


def test_a_job_that_brings_code_is_refused(federation: Running, tmp_path: Path) -> None:
    folder = prepared(federation, tmp_path, "code")
    custom = folder / "app_site" / "custom"
    custom.mkdir()
    (custom / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n")
    file = folder / "app_site" / "config" / "config_fed_client.json"
    file.write_text(file.read_text(encoding="utf-8").replace(kits.EXECUTOR, "mine.Mine"), encoding="utf-8")
    assert "COMPLETED" not in submit_raw(federation, folder)
    assert not (tmp_path / "ran").exists()
    assert b": NVFLARE_ERROR: BYOC not permitted" in everything(federation.server), "the site refuses it"


@pytest.mark.parametrize("where", ["app_site", "app_server"])
def test_a_job_that_names_another_class_is_refused(federation: Running, tmp_path: Path, where: str) -> None:
    folder = prepared(federation, tmp_path, f"class-{where[4:]}")
    file = next((folder / where / "config").glob("config_fed_*.json"))
    config = json.loads(file.read_text(encoding="utf-8"))
    config["components"] = [{"id": "touch", "path": "subprocess.Popen", "args": {"args": ["touch", str(tmp_path / "ran")]}}]
    file.write_text(json.dumps(config), encoding="utf-8")
    assert "COMPLETED" not in submit_raw(federation, folder)
    assert not (tmp_path / "ran").exists()
    kit = federation.sites["ash"] if where == "app_site" else federation.server
    assert b"Component 'subprocess.Popen' at config path" in everything(kit)


def everything(kit: Path) -> bytes:
    return b"".join(contents(file) for file in kit.rglob("*") if file.is_file())


def test_a_site_is_added_and_certificates_are_renewed_while_the_federation_lives(federation: Running) -> None:
    """As docs/federation.md says it: nobody restarts but those who are renewed. The next two tests ask them all."""
    four = (*federation.names, "dogwood")
    federation.file(four)
    assert "sites/dogwood: hand this folder over" in federation.kits()
    federation.describe("dogwood")
    federation.start_site("dogwood")
    federation.wait_for(four)
    for site in federation.sites.values():
        assert all(credentials(site, Allow()).public_key(name) for name in four), "secure aggregation knows it too"

    renewed = (federation.server, federation.sites["cedar"])
    before = [certificate(kit) for kit in renewed]
    assert federation.kits("--renew", "server", "--renew", "cedar").count("hand over its .crt file (not secret)") == 2
    for old, new in zip(before, map(certificate, renewed), strict=True):
        assert new.not_valid_after_utc > old.not_valid_after_utc
        assert new.public_key() == old.public_key()
    for kit in renewed:
        node.stop(kit)
    now = time.time()
    with environment():
        node.start(federation.server)
    federation.start_site("cedar")
    federation.wait_for(four, since=now)


def certificate(kit: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(next((kit / "startup").glob("*.crt")).read_bytes())


def test_a_job_below_the_privacy_floor_is_refused(federation: Running) -> None:
    federation.describe("cedar", allow={"secure": True})
    seen = Lines()
    error = federation.run("open", seen, clients=[{"name": "cedar"}, {"name": "dogwood"}])
    federation.describe("cedar")
    assert error == (
        "client 'cedar': it refuses what the job asks (allow.secure in its site.toml) "
        "(1 of 2 clients responded, 2 needed: rounds.quorum)"
    )
    assert not [phase for phase in seen.phases if phase.action == "prune"], "nothing is computed before all agree"


def test_a_site_whose_process_ends_at_once_is_one_missing_client(federation: Running, tmp_path: Path) -> None:
    """In a folder with a space everything works; at cedar the process of a run ends before it has done anything."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\nif 'nvflare.private.fed.app.client.worker_process' in sys.orig_argv: os._exit(1)\n"
    )
    birch, cedar = federation.sites["birch"], federation.sites["cedar"]
    for kit in (birch, cedar):
        node.stop(kit)
    now = time.time()
    moved = federation.folder / "a folder" / "birch"
    moved.parent.mkdir()
    birch.rename(moved)
    birch.symlink_to(moved)
    federation.start_site("birch")
    federation.start_site("cedar", PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT / "src")]))
    federation.wait_for(("birch", "cedar"), since=now)
    seen = Lines()
    clients = [{"name": name} for name in federation.names]
    assert federation.run("two", seen, clients=clients, rounds={"quorum": 2}, evaluate={}) is None
    assert seen.messages[:1] == [f"cedar: {ENDED}"]
    records = json.loads((federation.fetch("two") / "pruning.json").read_text(encoding="utf-8"))["tensors"]
    assert {tuple(record["clients"]) for record in records} == {("ash", "birch")}
    now = time.time()
    node.stop(cedar)
    federation.start_site("cedar")
    federation.wait_for(("cedar",), since=now)


def test_a_removed_site_does_not_come_back(federation: Running) -> None:
    birch, kit = federation.sites["birch"], federation.operator
    assert cli("federation", "remove", "birch", "--kit", kit)[0] == 0
    node.stop(birch)
    federation.start_site("birch")
    wait_until(lambda: node.running(birch) is None)
    assert b"Client 'birch' is disabled" in everything(birch)
    clients = [{"name": name} for name in federation.names]
    with pytest.raises(FedgroveError, match=r"client 'birch': it is not connected \(2 of 3 are, 3 needed"):
        operator.submit(kit, federation.job("without", clients=clients))
    shut_out = federation.server / "disabled_clients.json"
    assert json.loads(shut_out.read_text(encoding="utf-8")) == {"disabled_clients": ["birch"]}, "a new server reads it"
    assert "it was not removed" in complaint("federation", "remove", "cedar", "--undo", "--kit", kit)
    assert "no such site" in complaint("federation", "remove", "elm", "--kit", kit)
    assert cli("federation", "remove", "birch", "--undo", "--kit", kit)[0] == 0
    assert json.loads(shut_out.read_text(encoding="utf-8")) == {"disabled_clients": []}


def test_nothing_of_a_site_is_anywhere_else(federation: Running) -> None:
    """What the server, the operator and the other sites hold, and what went over the line, after all of the above."""
    words = (federation.folder / SECRET / "ash.txt").read_text(encoding="utf-8").split()
    sentences = [" ".join(words[i : i + 4]).encode() for i in range(0, len(words) - 4, 4)]
    looked = 0
    for folder in (federation.server, federation.operator, *(kit for name, kit in federation.sites.items() if name != "ash")):
        for file in (file for file in folder.rglob("*") if file.is_file()):
            content = contents(file)
            looked += len(content)
            assert SECRET.encode() not in content, file
            assert not [sentence for sentence in sentences if sentence in content], file
    assert looked > 10**6
    assert federation.proxy
    line = bytes(federation.proxy.passed)
    assert len(line) > 10**5
    assert not [secret for secret in (SECRET.encode(), *sentences) if secret in line]
    own = b"".join(contents(file) for file in federation.sites["ash"].rglob("*.toml"))
    assert SECRET.encode() in own, "where it belongs it is found"


def contents(file: Path) -> bytes:
    """A file's bytes, and those of what is in it where it is an archive."""
    data = file.read_bytes()
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            data += b"".join(archive.read(name) for name in archive.namelist())
    return data
