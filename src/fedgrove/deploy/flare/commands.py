"""The commands ``fedgrove federation …``. The other modules of this package do the work.

Those modules are imported when they are first used, so that ``fedgrove --help`` does not wait for torch.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedgrove.deploy.flare import TEMPLATES
from fedgrove.errors import FedgroveError
from fedgrove.escape import MAX_WORD, printable
from fedgrove.lazy import lazy

if TYPE_CHECKING:
    from fedgrove import doctor as examination
    from fedgrove import progress
    from fedgrove.deploy.flare import doctor as site_doctor
    from fedgrove.deploy.flare import files as kit_files
    from fedgrove.deploy.flare import kits as kit_maker
    from fedgrove.deploy.flare import node
    from fedgrove.deploy.flare import operator as remote
else:
    examination, progress = lazy("doctor"), lazy("progress")
    site_doctor, kit_files, kit_maker, node, remote = (
        lazy(f"deploy.flare.{name}") for name in ("doctor", "files", "kits", "node", "operator")
    )

Kit = Annotated[Path, typer.Argument(metavar="KIT", help="The folder of a server or a site.")]
OperatorKit = Annotated[Path, typer.Option("--kit", help="The folder of an operator.")]
Run = Annotated[str | None, typer.Argument(metavar="[RUN]", help="The job's name; default: the run submitted last.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on standard output, nothing else.")]


def init(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]")] = Path(),
    name: Annotated[str | None, typer.Option(help="The federation's name.")] = None,
    server: Annotated[str | None, typer.Option(help="HOST:PORT by which everybody reaches the server.")] = None,
    site: Annotated[list[str] | None, typer.Option(help="A site's name; repeat the option for each site.")] = None,
    operator: Annotated[list[str] | None, typer.Option(help="E-mail address of someone who may submit jobs.")] = None,
) -> None:
    """Writes federation.toml, the list of participants; asks for options that are not given.

    Example: fedgrove federation init --name wards --server fl.example.org:8002 --site ash --site birch --operator a@b.org
    """
    file = folder / kit_files.FEDERATION
    if file.exists():
        raise FedgroveError(f"{file} exists already", "edit it, or name another folder")
    name = name or _asked("Name of the federation")
    server = server or _asked("Server, as HOST:PORT", "localhost:8002")
    host, colon, port = server.rpartition(":")
    if not colon or kit_files.is_ipv6(server):
        host, port = server, "8002"
    if not host or not port.isdecimal():
        raise FedgroveError(f"--server {server}: this is no HOST:PORT", "write for instance fl.example.org:8002")
    sites = site or _asked("Sites, separated by spaces").split()
    people = operator or _asked("Operators (e-mail addresses, separated by spaces)").split()
    template = Template((TEMPLATES / "federation.toml").read_text(encoding="utf-8"))
    site_tables = "\n".join(f"[[sites]]\nname = {json.dumps(one)}\n" for one in sites)
    operator_tables = "\n".join(f"[[operators]]\nname = {json.dumps(one)}\n" for one in people)
    facts = {"name": json.dumps(name), "host": json.dumps(host), "port": str(int(port))}
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(template.substitute(facts, sites=site_tables, operators=operator_tables), encoding="utf-8")
    try:
        kit_files.read(file, kit_files.Federation)
    except FedgroveError:
        file.unlink()
        raise
    print(f"Wrote {file}. Check it, then run: fedgrove federation kits {file}")


def kits(
    file: Annotated[Path, typer.Argument(metavar="[federation.toml]")] = Path("federation.toml"),
    out: Annotated[Path | None, typer.Option(help="The folder of all kits; default: kits, next to the file.")] = None,
    renew: Annotated[
        list[str] | None, typer.Option(help="A site or operator (or 'server') whose certificate gets new dates.")
    ] = None,
) -> None:
    """Makes a folder for the server, each site and each operator: certificate, settings, a file to edit, a README.

    Existing kits are kept. To add a site, add it to the file and run this command again.

    Example: fedgrove federation kits federation.toml
    """
    folder = out or file.parent / "kits"
    federation = kit_files.read(file, kit_files.Federation)
    there = [kit.resolve() for kit in (folder / "server", *folder.glob("sites/*"), *folder.glob("operators/*")) if kit.is_dir()]
    for kit in kit_maker.make_kits(federation, folder, tuple(renew or ())):
        if kit in there:
            print(f"{kit}/startup: hand over its .crt file (not secret); the participant replaces the old one and restarts")
        else:
            print(f"{kit}: hand this folder over in a secure way; it contains a private key")
    for kit in there:
        if kit.parent.name == "sites" and kit.name not in {site.name for site in federation.sites}:
            print(f"{kit.name} is not in {file} any more; exclude it: fedgrove federation remove {kit.name} --kit OPERATOR")
    print(f"{folder / kit_maker.AUTHORITY} can make more kits: keep it secret.")


def start(
    kit: Kit = Path(),
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Run in the foreground, for systemd and containers.")
    ] = False,
) -> None:
    """Starts the server or a site, in the background.

    Example: fedgrove federation start kits/server
    """
    process = node.start(kit, foreground)
    host, port = node.address(kit)
    print(f"Started {kit} as process {process}; the server is {host}:{port}. Stop: fedgrove federation stop {kit}")


def stop(
    kit: Kit = Path(),
    run: Annotated[str | None, typer.Option(help="With an operator's kit: the run to stop.")] = None,
) -> None:
    """Stops the server or a site; with an operator's kit, stops a run, which can be continued.

    Example: fedgrove federation stop kits/sites/ash
    """
    if node.kind_of(kit) == "operator":
        name = run or remote.latest(kit)
        remote.stop(kit, name)
        print(f"Stopped {name}; continue it: fedgrove federation submit JOB.toml --resume --kit {kit}")
    else:
        node.stop(kit)
        print(f"Stopped {kit}")


def status(kit: OperatorKit = Path(), as_json: AsJson = False) -> None:
    """Shows which sites are connected, when each was last heard from, their capabilities, and the runs.

    Example: fedgrove federation status --kit kits/operators/ops@example.org
    """
    status = remote.status(kit)
    if as_json:
        print(json.dumps(status, indent=2))
        return
    for site in status["sites"]:
        heard = "not connected" if site["heard"] is None else f"last heard from {max(0, time.time() - site['heard']):.0f} s ago"
        print(f"{site['name']:<20} {heard}{printable(_abilities(site['capabilities']))}")
    for run in status["runs"]:
        print(f"{printable(str(run['name']), MAX_WORD):<20} {printable(str(run['status']), MAX_WORD)}")


def submit(
    job: Annotated[Path, typer.Argument(metavar="JOB.toml")],
    kit: OperatorKit = Path(),
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a run that ended early, or include restarted sites again.")
    ] = False,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the job.")] = None,
    quiet: Quiet = False,
    wait: Annotated[bool, typer.Option("--watch", help="Wait until the run ends.")] = False,
) -> None:
    """Submits a job. The sites agree to it and the plan is made before anything is computed.

    Example: fedgrove federation submit job.toml --kit kits/operators/ops@example.org
    """
    name = remote.submit(kit, job, set_ or [], resume)
    with progress.display(quiet, delay=0) as listener:
        error = remote.watch(kit, name, listener, planned=not wait)
    if error:
        raise FedgroveError(error)
    print(f"{name}: {'ended' if wait else 'the sites agreed, the run continues'}. fedgrove federation watch|fetch --kit {kit}")


def watch(run: Run = None, kit: OperatorKit = Path(), quiet: Quiet = False) -> None:
    """Shows a run's progress until it ends.

    Example: fedgrove federation watch --kit kits/operators/ops@example.org
    """
    with progress.display(quiet, delay=0) as listener:
        error = remote.watch(kit, run or remote.latest(kit), listener)
    if error:
        raise FedgroveError(error)


def fetch(
    run: Run = None,
    kit: OperatorKit = Path(),
    out: Annotated[Path | None, typer.Option(help="The folder to write; default: runs/NAME.")] = None,
) -> None:
    """Downloads a run's result: model, adapter, report, plans, measurements.

    Example: fedgrove federation fetch --out runs/wards --kit kits/operators/ops@example.org
    """
    name = run or remote.latest(kit)
    print(f"Wrote {remote.fetch(kit, name, out or Path('runs') / name)}")


def remove(
    site: Annotated[str, typer.Argument(metavar="SITE", help="The site's name.")],
    kit: OperatorKit = Path(),
    undo: Annotated[bool, typer.Option("--undo", help="Admit the site again.")] = False,
) -> None:
    """Excludes a site at the server, immediately and until --undo, also across restarts. Current runs are stopped.

    Example: fedgrove federation remove birch --kit kits/operators/ops@example.org
    """
    stopped = remote.remove(kit, site, undo)
    if undo:
        print(f"The server admits {site} again; start it there: fedgrove federation start")
        return
    print(f"The server no longer admits {site}. Remove it from federation.toml too, then run: fedgrove federation kits")
    for run in (printable(name, MAX_WORD) for name in stopped):
        print(f"Stopped {run}; continue it without {site} if its quorum allows: fedgrove federation submit JOB.toml --resume")


def clean(kit: Kit = Path()) -> None:
    """Removes token ids, hidden states, weights and secrets that runs left at a site. The site must be stopped.

    It happens by itself when a run ends or the site is stopped, and at a start for runs that died long ago (keep in site.toml).

    Example: fedgrove federation clean kits/sites/ash
    """
    for folder in node.clean(kit):
        print(f"Cleaned {folder}")


def doctor(kit: Kit = Path(), as_json: AsJson = False) -> None:
    """Checks a kit: connection to the server, clock, certificate, data, template, model, disk, memory. Starts nothing.

    Example: fedgrove federation doctor kits/sites/ash
    """
    checks = site_doctor.examine(kit)
    examination.show(checks, as_json)
    if not all(check.ok for check in checks):
        raise typer.Exit(2)


COMMANDS = (init, kits, start, status, submit, watch, fetch, stop, remove, clean, doctor)


def _asked(question: str, default: str | None = None) -> str:
    if not sys.stdin.isatty():
        raise FedgroveError(f"{question}: not given, and there is no terminal to ask on", "`fedgrove federation init --help`")
    reply: str = typer.prompt(question, default=default)
    return reply


def _abilities(capabilities: dict[str, Any] | None) -> str:
    if capabilities is None:
        return ""
    memory = f"{capabilities['memory'] / 2**30:.1f} GiB" if capabilities.get("memory") else "any memory"
    bits = ", ".join(map(str, capabilities.get("bits", ())))
    return f"; {memory}, speed {capabilities.get('speed')}, weights of {bits} bits"
