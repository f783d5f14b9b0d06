"""Checks a kit: network, certificates, settings file, text and model."""

from __future__ import annotations

import json
import os
import socket
import ssl
import stat
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from fedgrove import doctor
from fedgrove.deploy.flare import require_flare
from fedgrove.deploy.flare.exchanges.join import CLOCK
from fedgrove.deploy.flare.files import JOB, SERVER, SITE, Allow, ServerFile, SiteFile, model_folder, read
from fedgrove.deploy.flare.installation import Installation, credentials, roster_number
from fedgrove.deploy.flare.kits import CONTROLLER, EXECUTOR, FORM, MADE, NEVER, name_of
from fedgrove.deploy.flare.node import address, check_path, kind_of, running
from fedgrove.errors import FedgroveError
from fedgrove.escape import printable
from fedgrove.files import private_files
from fedgrove.machine import Check, check_machine

APART = 300.0  # the largest accepted difference of two clocks in seconds; it includes the time of a message
SOON = 30  # days before its end from which a certificate should be renewed


def examine(kit: Path) -> list[Check]:
    """Runs every check of a kit: a server's, a site's or an operator's."""
    require_flare()
    kind = kind_of(kit)
    host, port = address(kit)
    alive = running(kit) is not None
    listen = [port] if kind == "server" and not alive else []
    connect = [f"{host}:{port}"] if kind != "server" or alive else []
    checks = [folder(kit), made(kit), *check_machine(kit, listen, connect)]
    checks.append(certificate(kit, kind, datetime.now(UTC)))
    checks.append(private_keys(kit))
    if connect and kind != "server":
        checks.append(accepted(kit, host, port))
    if kind != "site":
        checks.append(private_folders(kit, None))
    if kind != "operator":
        checks.append(hardened(kit, kind))
        checks.append(
            Check("process", True, "it is running" if alive else "it is not running; start it with fedgrove federation start")
        )
    if kind == "site":
        checks.append(clock(kit, datetime.now(UTC)))
    if kind == "server":
        checks += _server(kit)
    if kind == "site":
        checks += _site(kit)
    return checks


def folder(kit: Path) -> Check:
    """Whether the kit's process can be started in its folder."""
    try:
        check_path(kit)
    except FedgroveError as error:
        return Check("folder", False, error.what, error.remedy or "")
    if not os.access(kit, os.W_OK):
        return Check("folder", False, f"{kit} cannot be written to", "make it writable for this user")
    return Check("folder", True, "it can be written to")


def made(kit: Path) -> Check:
    """Whether the kit was made by a version of fedgrove whose kits this one can use."""
    remedy = "have it made anew: fedgrove federation kits, after moving this folder away"
    try:
        said = json.loads((kit / MADE).read_text(encoding="utf-8"))
        form, version = int(said["form"]), printable(str(said["fedgrove"]))
    except (OSError, ValueError, KeyError, TypeError):
        return Check("kit", False, "it was made by an earlier version of fedgrove", remedy)
    if form != FORM:
        return Check("kit", False, f"it was made by fedgrove {version}, whose kits are of another form", remedy)
    return Check("kit", True, f"made by fedgrove {version}")


def certificate(kit: Path, kind: str, now: datetime) -> Check:
    """Whether the kit's certificate is valid at the time ``now``."""
    file = kit / "startup" / ("server.crt" if kind == "server" else "client.crt")
    try:
        ends = x509.load_pem_x509_certificate(file.read_bytes())
    except (OSError, ValueError) as error:
        return Check("certificate", False, f"{file} is not readable ({type(error).__name__})", "get the kit again")
    remedy = "ask the operator: fedgrove federation kits --renew NAME"
    if now < ends.not_valid_before_utc:
        return Check("certificate", False, "it is not valid yet by this machine's clock", "set the clock (NTP)")
    days = (ends.not_valid_after_utc - now).days
    text = f"valid until {ends.not_valid_after_utc:%Y-%m-%d}, {days} days"
    if now > ends.not_valid_after_utc:
        return Check("certificate", False, f"it ended on {ends.not_valid_after_utc:%Y-%m-%d}, if the clock is right", remedy)
    return Check("certificate", True, text, remedy if days < SOON else "")


def clock(kit: Path, now: datetime) -> Check:
    """Whether this machine's clock agrees with the server's. The server sends its time with every job."""
    try:
        times = json.loads((kit / CLOCK).read_text(encoding="utf-8"))
        ahead, asked = times["here"] - times["server"], datetime.fromtimestamp(times["here"], UTC)
    except FileNotFoundError:
        text = (
            f"{now:%Y-%m-%d %H:%M} UTC here; "
            "the server's clock is not known before the first job: compare it with `date -u` there"
        )
        return Check("clock", True, text)
    when = f"when a job arrived on {asked:%Y-%m-%d %H:%M} UTC"
    if abs(ahead) < APART:
        return Check("clock", True, f"agreed with the server's {when}")
    text = f"{abs(ahead) / 60:.0f} minutes {'ahead of' if ahead > 0 else 'behind'} the server's {when}"
    return Check("clock", False, text, "set the wrong clock (NTP)")


def private_keys(kit: Path) -> Check:
    """Whether the private keys are readable by their owner only."""
    for file in [*(kit / "startup").glob("*.key"), *(kit / "secure").glob("*.key")]:
        if stat.S_IMODE(file.stat().st_mode) & 0o077:
            return Check("keys", False, f"{file} can be read by others", f"chmod 600 {file}")
    return Check("keys", True, "readable by their owner only")


def private_folders(kit: Path, work: Path | None) -> Check:
    """Whether the kit and the folder of working files can be read by their owner only; ``work`` None: there is none."""
    for folder in [kit, work]:
        if folder is not None and folder.is_dir() and stat.S_IMODE(folder.stat().st_mode) & 0o077:
            remedy = f"chmod 700 {folder}" + ("" if folder == kit else f", or give work a folder of its own in {SITE}")
            return Check("private", False, f"{folder} can be read by others", remedy)
    return Check("private", True, "only their owner reads the kit and its working files")


def accepted(kit: Path, host: str, port: int) -> Check:
    """Whether the server presents a certificate of this federation and accepts the kit's certificate."""
    try:
        shake_hands(kit / "startup", host, port)
    except (OSError, ssl.SSLError) as error:
        text = f"{host}:{port}: no TLS connection with this kit's certificate ({type(error).__name__})"
        return Check(
            "server", False, text, "check that it is this federation's server and that no proxy in between terminates TLS"
        )
    return Check("server", True, f"{host}:{port} and this kit accept each other's certificates")


def shake_hands(startup: Path, host: str, port: int) -> None:
    """Opens a TLS connection as FLARE does and reads a byte: the server refuses an unknown certificate before that.

    Raises:
        OSError: the server does not respond, or one side refuses the other's certificate.
    """
    context = ssl.create_default_context(cafile=str(startup / "rootCA.pem"))
    context.check_hostname = False  # FLARE checks the name; this check is about the federation's root certificate
    context.set_alpn_protocols(["h2"])
    if (startup / "client.crt").is_file():
        context.load_cert_chain(startup / "client.crt", startup / "client.key")
    with socket.create_connection((host, port), timeout=5) as plain, context.wrap_socket(plain, server_hostname=host) as secure:
        if not secure.recv(1):
            raise ConnectionError("the server closed the connection")


def hardened(kit: Path, kind: str) -> Check:
    """Whether the kit's settings still forbid custom code, shell commands and sending logs, as when it was made."""
    resources = json.loads((kit / "local" / "resources.json").read_text(encoding="utf-8"))
    rights = json.loads((kit / "local" / "authorization.json").read_text(encoding="utf-8"))["permissions"]
    loose = [f"{role}.{right}" for role, has in rights.items() for right in NEVER if has.get(right, "none") != "none"]
    if resources.get("class_allow_list") != [CONTROLLER if kind == "server" else EXECUTOR]:
        loose.append("class_allow_list")
    if kind == "site" and resources.get("allow_log_streaming") is not False:
        loose.append("allow_log_streaming")
    defaults = [file.name for file in (kit / "local").glob("*.default") if not file.name.startswith("log_config")]
    if loose or defaults:
        text = f"local/ allows more than it should: {', '.join(loose + defaults)}"
        return Check("hardened", False, text, "get the kit again")
    return Check("hardened", True, "no custom code, no shell, one class, no logs are sent")


def _server(kit: Path) -> list[Check]:
    try:
        settings = read(kit / SERVER, ServerFile)
        checks = [Check(SERVER, True, f"models: {', '.join(settings.models) or 'none yet'}")]
        for name in settings.models:
            checks += doctor.model(model_folder(settings.models, name, kit))
    except FedgroveError as error:
        return [Check(SERVER, False, error.what, error.remedy or "fix that")]
    return checks


def _site(kit: Path) -> list[Check]:
    try:
        settings = read(kit / SITE, SiteFile)
    except FedgroveError as error:
        return [Check(SITE, False, error.what, error.remedy or "fix that")]
    models = settings.models
    checks = [
        Check(SITE, bool(models), f"models: {', '.join(models) or 'none'}", "" if models else "list the models in [models]")
    ]
    for name in models:
        try:
            model_folder(models, name, kit)
        except FedgroveError as error:
            checks.append(Check("model", False, error.what, error.remedy or "fix that"))
            continue
        checks += doctor.site(Installation(kit, settings, run="", job=kit / JOB).client(name))
    work = kit / settings.work
    with private_files(), suppress(OSError):  # the next line says so
        work.mkdir(parents=True, exist_ok=True)
    checks.append(private_folders(kit, work))
    if not os.access(work, os.W_OK):
        checks.append(Check("work", False, f"{work} cannot be written to", "make it writable for this user"))
    return [*checks, roster(kit)]


def roster(kit: Path) -> Check:
    """Whether the roster for secure aggregation is signed by the operator and contains this site."""
    name = name_of(kit)
    try:
        credentials(kit, Allow()).public_key(name)
    except FedgroveError as error:
        return Check("roster", False, error.what, "get secure/ again from the operator")
    number, date = roster_number(kit)
    if not number:
        return Check(
            "roster", False, "it has no number: it was made by an earlier version", "get secure/ again from the operator"
        )
    trusted = (kit / "secure" / "operator.pub").read_text(encoding="utf-8")
    return Check(
        "roster",
        True,
        f"number {number} of {date}, signed by the operator whose key is {trusted[:16]}…; compare the key with the operator "
        "by telephone",
    )
