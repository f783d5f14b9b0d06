"""Makes the kits of server, sites and operators: a certificate, hardened settings, a file to edit and a README.

FLARE's ``provision`` makes keys and certificates. Its permissive settings are replaced here, before anything is
started. Whoever has the folder ``authority`` can make more kits, so keep it secret, on the machine where kits are made.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from string import Template
from typing import Any

import tomli_w
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

from fedgrove.deploy.flare import TEMPLATES, require_flare
from fedgrove.deploy.flare.files import FEDERATION, SERVER, SITE, Federation
from fedgrove.engines.error_codes import VERSION
from fedgrove.errors import FedgroveError
from fedgrove.files import atomic_folder, write_atomically
from fedgrove.job.tables import KINDS

CONTROLLER = "fedgrove.deploy.flare.controller.FedgroveController"  # the only class FLARE may load at the server
EXECUTOR = "fedgrove.deploy.flare.executor.FedgroveExecutor"  # the only one at a site
OUTCOMES = "fedgrove.deploy.flare.outcomes.SiteOutcomes"
LAUNCHERS = {
    "server": "fedgrove.deploy.flare.launcher.ServerLauncher",
    "site": "fedgrove.deploy.flare.launcher.SiteLauncher",
}
PATIENCE = 7200  # seconds after which the server drops a silent site; until then a run keeps sending it requests
LIFETIME = timedelta(days=360)  # how long a renewed certificate is valid: as long as FLARE's own
AUTHORITY = "authority"
MADE, FORM = "kit.json", 2  # what a kit says of itself; a kit of another form must be made anew
ROSTER, SIGNATURE, KEY, TRUSTED = "roster.json", "roster.sig", "site.key", "operator.pub"
# The rights of an operator's certificate: no custom code and no shell commands for anybody.
NEVER = {"byoc": "none", "shell_commands": "none", "clone_job": "none", "server-predeployed-flwr": "none"}
ALWAYS = {"submit_job": "any", "manage_job": "any", "view": "any"}
AT_SERVER = {**ALWAYS, "download_job": "any", "operate": "any", "app_command": "any", **NEVER}
AT_SITE = {**ALWAYS, "download_job": "none", "operate": "none", "app_command": "none", **NEVER}


def make_kits(federation: Federation, out: Path, renew: tuple[str, ...] = ()) -> list[Path]:
    """Makes the kits that do not exist yet. Existing kits keep their certificates and the files that people edited.

    Args:
        out: the folder of all kits.
        renew: names of sites and operators whose certificate is renewed, for the same key; "server" for the server.

    Returns:
        The folders that were made or renewed.

    Raises:
        FedgroveError: ``renew`` has an unknown name, the root certificate has ended, or ``nvflare provision`` failed.
    """
    require_flare()
    out = out.resolve()
    kits = _kits(federation, out)
    for name in renew:
        if name not in kits:
            raise FedgroveError(f"--renew {name}: no such participant", f"there are {', '.join(sorted(kits))}")
    authority = out / AUTHORITY
    authority.mkdir(parents=True, exist_ok=True)
    authority.chmod(0o700)
    for name in renew:
        _prolong(authority, federation.server.host if name == "server" else name)
    packages = _provision(federation, authority)
    changed = []
    for name, kit in kits.items():
        source = packages / (federation.server.host if name == "server" else name)
        if kit.is_dir():
            if name in renew:
                for certificate in source.glob("startup/*.crt"):
                    shutil.copy2(certificate, kit / "startup" / certificate.name)
                changed.append(kit)
            continue
        with atomic_folder(kit) as partial:
            shutil.copytree(source, partial, dirs_exist_ok=True)
            partial.chmod(0o700)
            (partial / MADE).write_text(json.dumps({"form": FORM, "fedgrove": VERSION}), encoding="utf-8")
            if kit.parent.name == "operators":
                _harden_operator(partial)
            elif name == "server":
                _harden(partial, "server", _server_resources)
                _fill(partial, federation, name, "server")
            else:
                _harden(partial, "site", _site_resources)
                _fill(partial, federation, name, "site")
        changed.append(kit)
    shutil.rmtree(packages.parent.parent)  # it contains a second copy of every secret
    for person in federation.operators:
        described = tomli_w.dumps(federation.model_dump(mode="json", exclude_none=True))
        (kits[person.name] / FEDERATION).write_text(described, encoding="utf-8")
    _sign_roster(federation, authority, kits)
    return changed


def _kits(federation: Federation, out: Path) -> dict[str, Path]:
    kits = {"server": out / "server"}
    kits |= {site.name: out / "sites" / site.name for site in federation.sites}
    return kits | {person.name: out / "operators" / person.name for person in federation.operators}


def _provision(federation: Federation, authority: Path) -> Path:
    """Has FLARE make keys and certificates, from the stored state if any; returns the folder of the new packages."""
    port = federation.server.port
    server = {"name": federation.server.host, "type": "server", "org": "fedgrove", "fed_learn_port": port, "admin_port": port}
    participants: list[dict[str, Any]] = [server]
    for site in federation.sites:
        entry: dict[str, Any] = {"name": site.name, "type": "client", "org": "fedgrove"}
        if site.connect:
            host, _, proxy_port = site.connect.rpartition(":")
            entry["connect_to"] = {"host": host, "port": int(proxy_port)}
        participants.append(entry)
    participants += [
        {"name": person.name, "type": "admin", "org": "fedgrove", "role": "project_admin"} for person in federation.operators
    ]
    impl = "nvflare.lighter.impl"
    project = {
        "api_version": 3,
        "name": federation.name,
        "description": "made by fedgrove",
        "participants": participants,
        "builders": [
            {"path": f"{impl}.workspace.WorkspaceBuilder"},
            {"path": f"{impl}.static_file.StaticFileBuilder", "args": {"config_folder": "config", "scheme": "grpc"}},
            {"path": f"{impl}.cert.CertBuilder", "args": {"root_valid_days": federation.days}},
            {"path": f"{impl}.signature.SignatureBuilder"},
        ],
    }
    described = authority / "project.yml"
    described.write_text(json.dumps(project, indent=2), encoding="utf-8")  # JSON is YAML
    workspace = authority / "packages"
    shutil.rmtree(workspace, ignore_errors=True)
    state_file = authority / "cert.json"
    state = workspace / federation.name / "state"
    if state_file.is_file():
        state.mkdir(parents=True)
        shutil.copy2(state_file, state / state_file.name)
    command = [sys.executable, "-m", "nvflare.cli", "provision", "-p", str(described), "-w", str(workspace), "--force"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=authority, check=False)
    packages = sorted((workspace / federation.name).glob("prod_*"))
    if done.returncode or not packages:
        output = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise FedgroveError(f"nvflare provision failed: {output[-1] if output else done.returncode}")
    shutil.copy2(state / state_file.name, state_file)
    state_file.chmod(0o600)
    return packages[-1]


def _prolong(authority: Path, subject: str) -> None:
    """Renews a certificate: new dates, the same key.

    The key stays the same because sites hold tokens that the server signed with it: with a new key, the server would
    reject all of them. Also, no secret has to be sent.
    """
    state_file = authority / "cert.json"
    state = json.loads(state_file.read_text(encoding="utf-8")) if state_file.is_file() else {}
    if subject not in state:
        return  # it has no certificate yet; _provision makes one
    root = x509.load_pem_x509_certificate(state["root_cert"].encode())
    key = serialization.load_pem_private_key(state["root_pri_key"].encode(), password=None)
    assert isinstance(key, RSAPrivateKey)
    old = x509.load_pem_x509_certificate(state[subject]["cert"].encode())
    now = datetime.now(UTC)
    if now >= root.not_valid_after_utc:
        raise FedgroveError(
            f"--renew: the root certificate ended on {root.not_valid_after_utc:%Y-%m-%d}",
            "make a new federation, with another --out",
        )
    new = x509.CertificateBuilder(
        issuer_name=root.subject,
        subject_name=old.subject,
        public_key=old.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=now - timedelta(days=1),  # so that a machine whose clock is slow accepts it
        not_valid_after=min(now + LIFETIME, root.not_valid_after_utc),
        extensions=list(old.extensions),
    )
    state[subject]["cert"] = new.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()
    write_atomically(state_file, json.dumps(state), mode=0o600)


def _harden(kit: Path, kind: str, change: Any) -> None:
    """Writes who may do what at the server or a site; FLARE's defaults allow more."""
    local = kit / "local"
    resources = json.loads((local / "resources.json.default").read_text(encoding="utf-8"))
    change(resources)
    for part in resources["components"]:
        if part["id"] == "process_launcher":
            part["path"] = LAUNCHERS[kind]
    resources["class_list_enforcement_mode"] = "enforce"
    resources["class_allow_list"] = [CONTROLLER if kind == "server" else EXECUTOR]
    rights = {"project_admin": AT_SERVER if kind == "server" else AT_SITE}
    authorization = {"format_version": "1.0", "permissions": rights}
    (local / "resources.json").write_text(json.dumps(resources, indent=2), encoding="utf-8")
    (local / "authorization.json").write_text(json.dumps(authorization, indent=2), encoding="utf-8")
    for unused in ("resources.json.default", "authorization.json.default", "privacy.json.sample"):
        (local / unused).unlink()
    for script in [*(kit / "startup").glob("*.sh"), kit / "readme.txt"]:
        script.unlink(missing_ok=True)  # not needed: `fedgrove federation start` starts the process, with this Python


def _server_resources(resources: dict[str, Any]) -> None:
    resources["servers"][0]["heart_beat_timeout"] = PATIENCE
    components = [part for part in resources["components"] if part["id"] != "log_receiver"]
    for part in components:
        if part["id"] == "job_scheduler":
            part["args"]["max_jobs"] = 1
    resources["components"] = [*components, {"id": "site_outcomes", "path": OUTCOMES, "args": {}}]


def name_of(kit: Path) -> str:
    """The name in a site's certificate."""
    settings = json.loads((kit / "startup" / "fed_client.json").read_text(encoding="utf-8"))
    name: str = settings["client"]["fqsn"]
    return name


def keep_jobs_in(kit: Path) -> None:
    """Sets the server's job store to a folder in its kit, wherever the kit is now.

    FLARE's default is in /tmp, where other users could read the jobs and cleaning up could delete them.
    """
    file = kit / "local" / "resources.json"
    resources = json.loads(file.read_text(encoding="utf-8"))
    resources["snapshot_persistor"]["args"]["storage"]["args"]["root_dir"] = str(kit / "store" / "snapshots")
    for part in resources["components"]:
        if part["id"] == "job_manager":
            part["args"]["uri_root"] = str(kit / "store" / "jobs")
    file.write_text(json.dumps(resources, indent=2), encoding="utf-8")


def _site_resources(resources: dict[str, Any]) -> None:
    resources["allow_log_streaming"] = False
    # site_log_streamer sends error logs, with traces and paths, to the server; class_allow_list would refuse it, and so
    # every job.
    resources["components"] = [part for part in resources["components"] if part["id"] != "site_log_streamer"]


def _harden_operator(kit: Path) -> None:
    for unused in [*(kit / "startup").glob("*.sh"), *(kit / "startup").glob("*.ipynb"), kit / "startup" / "readme.txt"]:
        unused.unlink(missing_ok=True)


def _fill(kit: Path, federation: Federation, name: str, kind: str) -> None:
    """Writes the settings file to edit, the README, the systemd unit and the compose file."""
    facts = {
        "name": name,
        "federation": federation.name,
        "host": federation.server.host,
        "port": str(federation.server.port),
        "others": ", ".join(site.name for site in federation.sites if site.name != name),
        "operators": ", ".join(person.name for person in federation.operators),
        "unit": f"fedgrove-{name}.service",
        "package": f"fedgrove[flare]=={VERSION}",
        "stages": json.dumps(KINDS),
        "ports": f'"{federation.server.port}:{federation.server.port}"' if kind == "server" else "",
    }
    for source, target in (
        (f"{kind}.toml", SITE if kind == "site" else SERVER),
        (f"{kind}.md", "README.md"),
        ("unit.service", facts["unit"]),
        ("compose.yaml", "compose.yaml"),
    ):
        text = Template((TEMPLATES / source).read_text(encoding="utf-8")).safe_substitute(facts)
        (kit / target).write_text(text, encoding="utf-8")


def _sign_roster(federation: Federation, authority: Path, kits: dict[str, Path]) -> None:
    """Makes the sites' keys for secure aggregation; writes the signed roster of public keys into their kits."""
    signing = authority / "operator.key"
    if not signing.is_file():
        _write_secret(signing, Ed25519PrivateKey.generate().private_bytes_raw().hex())
    operator = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(signing.read_text(encoding="utf-8")))
    public = {}
    for site in federation.sites:
        public_key = authority / "public-keys" / site.name
        if not public_key.is_file():
            key = Ed25519PrivateKey.generate()
            _write_secret(kits[site.name] / "secure" / KEY, key.private_bytes_raw().hex())
            public_key.parent.mkdir(exist_ok=True)
            public_key.write_text(key.public_key().public_bytes_raw().hex(), encoding="utf-8")
        public[site.name] = public_key.read_text(encoding="utf-8").strip()
    roster = _numbered({"clients": public, "min_group": federation.min_group}, authority / ROSTER)
    for person in federation.operators:
        if person.name in kits:  # jobs name the number of the roster
            (kits[person.name] / ROSTER).write_text(roster, encoding="utf-8")
    for folder in [authority, *(kits[site.name] / "secure" for site in federation.sites)]:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ROSTER).write_text(roster, encoding="utf-8")
        (folder / SIGNATURE).write_text(operator.sign(roster.encode()).hex(), encoding="utf-8")
        (folder / TRUSTED).write_text(operator.public_key().public_bytes_raw().hex(), encoding="utf-8")


def _numbered(content: dict[str, Any], last: Path) -> str:
    """A roster with a number and a date: those of the last one if it says the same, else the next number and today."""
    before: dict[str, Any] = json.loads(last.read_text(encoding="utf-8")) if last.is_file() else {}
    number, date = before.pop("number", 0), before.pop("date", "")
    if before != content or not number:
        number, date = number + 1, f"{datetime.now(UTC):%Y-%m-%d}"
    return json.dumps({**content, "number": number, "date": date}, sort_keys=True)


def _write_secret(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as opened:
        opened.write(text)
