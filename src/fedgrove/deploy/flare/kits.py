"""Makes what each member is handed: a folder with its certificate, hardened settings, its own file and a page to read.

FLARE's ``provision`` makes keys and certificates; what it leaves permissive is closed here, before anybody starts
anything. The folder ``authority`` can make more members: whoever runs this keeps it secret.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import tomli_w
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

from fedgrove.deploy.flare import require_flare
from fedgrove.deploy.flare.files import FEDERATION, SERVER, SITE, Federation
from fedgrove.engines.error_codes import VERSION
from fedgrove.errors import FedgroveError

HUB, SEAT = "fedgrove.engines.flare.Hub", "fedgrove.engines.flare.Seat"
PATIENCE = 7200  # seconds after which the server forgets a silent site; a run asks it again and again before that
LIFETIME = timedelta(days=360)  # of a member's certificate, as FLARE makes them
AUTHORITY = "authority"
ROSTER, SIGNATURE, KEY, TRUSTED = "roster.json", "roster.sig", "site.key", "operator.pub"
# What an operator's certificate may do. Nobody brings code, nobody runs a shell.
NEVER = {"byoc": "none", "shell_commands": "none", "clone_job": "none", "server-predeployed-flwr": "none"}
ALWAYS = {"submit_job": "any", "manage_job": "any", "view": "any"}
AT_SERVER = {**ALWAYS, "download_job": "any", "operate": "any", "app_command": "any", **NEVER}
AT_SITE = {**ALWAYS, "download_job": "none", "operate": "none", "app_command": "none", **NEVER}


def make_kits(federation: Federation, out: Path, renew: tuple[str, ...] = ()) -> list[Path]:
    """Makes the kits that are not there yet; those that are keep their certificates and what people wrote in them.

    Args:
        out: the folder of all kits.
        renew: members that are given a new certificate for the key that they have; "server" for the server.

    Returns:
        The folders that were made or renewed.

    Raises:
        FedgroveError: an unknown name, or FLARE refused something.
    """
    require_flare()
    out = out.resolve()
    places = _places(federation, out)
    for name in renew:
        if name not in places:
            raise FedgroveError(f"--renew {name}: no such member; there are {', '.join(sorted(places))}")
    authority = out / AUTHORITY
    authority.mkdir(parents=True, exist_ok=True)
    authority.chmod(0o700)
    for name in renew:
        _prolong(authority, federation.server.host if name == "server" else name)
    made = _provision(federation, authority)
    changed = []
    for name, place in places.items():
        source = made / (federation.server.host if name == "server" else name)
        if place.is_dir():
            if name in renew:
                for certificate in source.glob("startup/*.crt"):
                    shutil.copy2(certificate, place / "startup" / certificate.name)
                changed.append(place)
            continue
        beside = place.with_name(f"{place.name}.partial")
        shutil.rmtree(beside, ignore_errors=True)
        beside.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, beside)
        beside.chmod(0o700)
        if place.parent.name == "operators":
            _harden_operator(beside)
        elif name == "server":
            _harden(beside, "server", _server_resources)
            _fill(beside, federation, name, "server")
        else:
            _harden(beside, "site", _site_resources)
            _fill(beside, federation, name, "site")
        beside.rename(place)
        changed.append(place)
    shutil.rmtree(made.parent.parent)  # a second copy of every secret
    for person in federation.operators:
        described = tomli_w.dumps(federation.model_dump(mode="json", exclude_none=True))
        (places[person.name] / FEDERATION).write_text(described, encoding="utf-8")
    _sign_roster(federation, authority, places)
    return changed


def _places(federation: Federation, out: Path) -> dict[str, Path]:
    places = {"server": out / "server"}
    places |= {site.name: out / "sites" / site.name for site in federation.sites}
    return places | {person.name: out / "operators" / person.name for person in federation.operators}


def _provision(federation: Federation, authority: Path) -> Path:
    """Has FLARE make keys and certificates from the kept state; gives the folder of this round's packages."""
    port = federation.server.port
    server = {"name": federation.server.host, "type": "server", "org": "fedgrove", "fed_learn_port": port, "admin_port": port}
    participants: list[dict[str, Any]] = [server]
    for site in federation.sites:
        entry: dict[str, Any] = {"name": site.name, "type": "client", "org": "fedgrove"}
        if site.connect:
            host, _, there = site.connect.rpartition(":")
            entry["connect_to"] = {"host": host, "port": int(there)}
        participants.append(entry)
    participants += [
        {"name": person.name, "type": "admin", "org": "fedgrove", "role": "project_admin"} for person in federation.operators
    ]
    of = "nvflare.lighter.impl"
    project = {
        "api_version": 3,
        "name": federation.name,
        "description": "made by fedgrove",
        "participants": participants,
        "builders": [
            {"path": f"{of}.workspace.WorkspaceBuilder"},
            {"path": f"{of}.static_file.StaticFileBuilder", "args": {"config_folder": "config", "scheme": "grpc"}},
            {"path": f"{of}.cert.CertBuilder", "args": {"root_valid_days": federation.days}},
            {"path": f"{of}.signature.SignatureBuilder"},
        ],
    }
    described = authority / "project.yml"
    described.write_text(json.dumps(project, indent=2), encoding="utf-8")  # JSON is YAML
    workspace = authority / "packages"
    shutil.rmtree(workspace, ignore_errors=True)
    kept = authority / "cert.json"
    state = workspace / federation.name / "state"
    if kept.is_file():
        state.mkdir(parents=True)
        shutil.copy2(kept, state / kept.name)
    command = [sys.executable, "-m", "nvflare.cli", "provision", "-p", str(described), "-w", str(workspace), "--force"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=authority, check=False)
    made = sorted((workspace / federation.name).glob("prod_*"))
    if done.returncode or not made:
        told = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise FedgroveError(f"nvflare provision failed: {told[-1] if told else done.returncode}")
    shutil.copy2(state / kept.name, kept)
    kept.chmod(0o600)
    return made[-1]


def _prolong(authority: Path, subject: str) -> None:
    """A certificate with new dates, for the same key.

    Sites hold tokens that the server signed: with another key it would know none of them any more. And no secret has to
    travel.
    """
    kept = authority / "cert.json"
    state = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    if subject not in state:
        return  # it has none yet, and gets one now
    root = x509.load_pem_x509_certificate(state["root_cert"].encode())
    key = serialization.load_pem_private_key(state["root_pri_key"].encode(), password=None)
    assert isinstance(key, RSAPrivateKey)
    old = x509.load_pem_x509_certificate(state[subject]["cert"].encode())
    now = datetime.now(UTC)
    if now >= root.not_valid_after_utc:
        raise FedgroveError(f"--renew: the root certificate ended on {root.not_valid_after_utc:%Y-%m-%d}; make a new one")
    new = x509.CertificateBuilder(
        issuer_name=root.subject,
        subject_name=old.subject,
        public_key=old.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=now - timedelta(days=1),  # for a clock that is slow
        not_valid_after=min(now + LIFETIME, root.not_valid_after_utc),
        extensions=list(old.extensions),
    )
    state[subject]["cert"] = new.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()
    beside = kept.with_suffix(".partial")
    beside.unlink(missing_ok=True)
    _write_secret(beside, json.dumps(state))
    beside.replace(kept)


def _harden(kit: Path, kind: str, change: Any) -> None:
    """Settles who may do what at this member; FLARE's defaults let more happen."""
    local = kit / "local"
    resources = json.loads((local / "resources.json.default").read_text(encoding="utf-8"))
    change(resources)
    resources["class_list_enforcement_mode"] = "enforce"
    resources["class_allow_list"] = [HUB if kind == "server" else SEAT]
    rights = {"project_admin": AT_SERVER if kind == "server" else AT_SITE}
    authorization = {"format_version": "1.0", "permissions": rights}
    (local / "resources.json").write_text(json.dumps(resources, indent=2), encoding="utf-8")
    (local / "authorization.json").write_text(json.dumps(authorization, indent=2), encoding="utf-8")
    for left in ("resources.json.default", "authorization.json.default", "privacy.json.sample"):
        (local / left).unlink()
    for script in [*(kit / "startup").glob("*.sh"), kit / "readme.txt"]:
        script.unlink(missing_ok=True)  # `fedgrove federation start` starts it, with this Python


def _server_resources(resources: dict[str, Any]) -> None:
    resources["servers"][0]["heart_beat_timeout"] = PATIENCE
    components = [part for part in resources["components"] if part["id"] != "log_receiver"]
    for part in components:
        if part["id"] == "job_scheduler":
            part["args"]["max_jobs"] = 1
    resources["components"] = components


def keep_jobs_in(kit: Path) -> None:
    """Has the server keep jobs in its own folder, wherever it was put: in /tmp others could read them and clean up."""
    file = kit / "local" / "resources.json"
    resources = json.loads(file.read_text(encoding="utf-8"))
    resources["snapshot_persistor"]["args"]["storage"]["args"]["root_dir"] = str(kit / "store" / "snapshots")
    for part in resources["components"]:
        if part["id"] == "job_manager":
            part["args"]["uri_root"] = str(kit / "store" / "jobs")
    file.write_text(json.dumps(resources, indent=2), encoding="utf-8")


def _site_resources(resources: dict[str, Any]) -> None:
    resources["allow_log_streaming"] = False
    # It sends error logs, with traces and paths, to the server; and the allow list would refuse it and so every job.
    resources["components"] = [part for part in resources["components"] if part["id"] != "site_log_streamer"]


def _harden_operator(kit: Path) -> None:
    for left in [*(kit / "startup").glob("*.sh"), *(kit / "startup").glob("*.ipynb"), kit / "startup" / "readme.txt"]:
        left.unlink(missing_ok=True)


def _fill(kit: Path, federation: Federation, name: str, kind: str) -> None:
    """The file that its owner edits, the page that its owner reads, the service that starts it."""
    texts = files("fedgrove") / "deploy" / "flare" / "texts"
    facts = {
        "name": name,
        "federation": federation.name,
        "host": federation.server.host,
        "port": str(federation.server.port),
        "others": ", ".join(site.name for site in federation.sites if site.name != name),
        "operators": ", ".join(person.name for person in federation.operators),
        "unit": f"fedgrove-{name}.service",
        "package": f"fedgrove[flare]=={VERSION}",
        "ports": f'"{federation.server.port}:{federation.server.port}"' if kind == "server" else "",
    }
    for source, target in (
        (f"{kind}.toml", SITE if kind == "site" else SERVER),
        (f"{kind}.md", "README.md"),
        ("unit.service", facts["unit"]),
        ("compose.yaml", "compose.yaml"),
    ):
        text = Template((texts / source).read_text(encoding="utf-8")).safe_substitute(facts)
        (kit / target).write_text(text, encoding="utf-8")


def _sign_roster(federation: Federation, authority: Path, places: dict[str, Path]) -> None:
    """Keys of the sites for secure aggregation, and the list of them under the operator's signature, in every site's kit."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    signing = authority / "operator.key"
    if not signing.is_file():
        _write_secret(signing, Ed25519PrivateKey.generate().private_bytes_raw().hex())
    operator = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(signing.read_text(encoding="utf-8")))
    public = {}
    for site in federation.sites:
        own = authority / "public-keys" / site.name
        if not own.is_file():
            key = Ed25519PrivateKey.generate()
            _write_secret(places[site.name] / "secure" / KEY, key.private_bytes_raw().hex())
            own.parent.mkdir(exist_ok=True)
            own.write_text(key.public_key().public_bytes_raw().hex(), encoding="utf-8")
        public[site.name] = own.read_text(encoding="utf-8").strip()
    roster = json.dumps({"clients": public, "min_group": federation.min_group}, sort_keys=True)
    for folder in [authority, *(places[site.name] / "secure" for site in federation.sites)]:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ROSTER).write_text(roster, encoding="utf-8")
        (folder / SIGNATURE).write_text(operator.sign(roster.encode()).hex(), encoding="utf-8")
        (folder / TRUSTED).write_text(operator.public_key().public_bytes_raw().hex(), encoding="utf-8")


def _write_secret(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as opened:
        opened.write(text)
