"""The commands ``fedgrove federation …``. The substance is in the other modules of this package.

What they need is imported when it is first used, so that ``fedgrove --help`` does not wait for torch.
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
Run = Annotated[str | None, typer.Argument(metavar="[RUN]", help="The job's name; default: what was submitted last.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on standard output, nothing else.")]


def init(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]")] = Path(),
    name: Annotated[str | None, typer.Option(help="Of the federation.")] = None,
    server: Annotated[str | None, typer.Option(help="HOST:PORT by which everybody reaches the server.")] = None,
    site: Annotated[list[str] | None, typer.Option(help="A site's name; give it again for each.")] = None,
    operator: Annotated[list[str] | None, typer.Option(help="E-mail address of someone who may submit jobs.")] = None,
) -> None:
    """Writes federation.toml, who takes part; asks for what is not given.

    Example: fedgrove federation init --name wards --server fl.example.org:8002 --site ash --site birch --operator a@b.org
    """
    file = folder / kit_files.FEDERATION
    if file.exists():
        raise FedgroveError(f"{file} exists already", "edit it, or name another folder")
    name = name or _asked("Name of the federation")
    server = server or _asked("Server, as HOST:PORT", "localhost:8002")
    host, _, port = server.rpartition(":")
    sites = site or _asked("Sites, with spaces between").split()
    people = operator or _asked("Operators (e-mail addresses, with spaces between)").split()
    template = Template((TEMPLATES / "federation.toml").read_text(encoding="utf-8"))
    site_tables = "\n".join(f"[[sites]]\nname = {json.dumps(one)}\n" for one in sites)
    operator_tables = "\n".join(f"[[operators]]\nname = {json.dumps(one)}\n" for one in people)
    facts = {"name": json.dumps(name), "host": json.dumps(host or server), "port": port if host else "8002"}
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(template.substitute(facts, sites=site_tables, operators=operator_tables), encoding="utf-8")
    try:
        kit_files.read(file, kit_files.Federation)
    except FedgroveError:
        file.unlink()
        raise
    print(f"Wrote {file}. Look it over, then: fedgrove federation kits {file}")


def kits(
    file: Annotated[Path, typer.Argument(metavar="[federation.toml]")] = Path("federation.toml"),
    out: Annotated[Path | None, typer.Option(help="The folder of all kits; default: kits, next to the file.")] = None,
    renew: Annotated[
        list[str] | None, typer.Option(help="A site or operator (or 'server') whose certificate gets new dates.")
    ] = None,
) -> None:
    """Makes a folder for the server, each site and each operator: certificate, settings, a file to edit, a page to read.

    Kits that are there are kept: add a site to the file and say this again.

    Example: fedgrove federation kits federation.toml
    """
    folder = out or file.parent / "kits"
    federation = kit_files.read(file, kit_files.Federation)
    there = [kit.resolve() for kit in (folder / "server", *folder.glob("sites/*"), *folder.glob("operators/*")) if kit.is_dir()]
    for kit in kit_maker.make_kits(federation, folder, tuple(renew or ())):
        if kit in there:
            print(f"{kit}/startup: hand over its .crt file (no secret); put it there, and restart")
        else:
            print(f"{kit}: hand this folder over, by a safe way")
    for kit in there:
        if kit.parent.name == "sites" and kit.name not in {site.name for site in federation.sites}:
            print(f"{kit.name} is not in {file} any more; shut it out: fedgrove federation remove {kit.name} --kit OPERATOR")
    print(f"{folder / kit_maker.AUTHORITY} can make more kits: keep it, secret.")


def start(
    kit: Kit = Path(),
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay: for systemd and containers.")] = False,
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
    """Stops the server or a site; with an operator's kit, a run, which can be continued.

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
    """Who is there, since when, what each can do, and the runs.

    Example: fedgrove federation status --kit kits/operators/ops@example.org
    """
    status = remote.status(kit)
    if as_json:
        print(json.dumps(status, indent=2))
        return
    for site in status["sites"]:
        heard = "not connected" if site["heard"] is None else f"heard of {max(0, time.time() - site['heard']):.0f} s ago"
        print(f"{site['name']:<20} {heard}{_abilities(site['capabilities'])}")
    for run in status["runs"]:
        print(f"{run['name']:<20} {run['status']}")


def submit(
    job: Annotated[Path, typer.Argument(metavar="JOB.toml")],
    kit: OperatorKit = Path(),
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that ended early, or take sites back.")] = False,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the job.")] = None,
    quiet: Quiet = False,
    wait: Annotated[bool, typer.Option("--watch", help="Stay until the run ends.")] = False,
) -> None:
    """Sends a job to the sites: who is asked, what they agree to and the plan come before anything is computed.

    Example: fedgrove federation submit job.toml --kit kits/operators/ops@example.org
    """
    name = remote.submit(kit, job, set_ or [], resume)
    with progress.display(quiet, delay=0) as listener:
        error = remote.watch(kit, name, listener, planned=not wait)
    if error:
        raise FedgroveError(error)
    print(f"{name}: {'ended' if wait else 'the sites agreed, the run goes on'}. fedgrove federation watch|fetch --kit {kit}")


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
    """Brings the result here: model, adapter, report, plans, measurements.

    Example: fedgrove federation fetch --out runs/wards --kit kits/operators/ops@example.org
    """
    name = run or remote.latest(kit)
    print(f"Wrote {remote.fetch(kit, name, out or Path('runs') / name)}")


def remove(
    site: Annotated[str, typer.Argument(metavar="SITE", help="Its name.")],
    kit: OperatorKit = Path(),
    undo: Annotated[bool, typer.Option("--undo", help="Let it in again.")] = False,
) -> None:
    """Shuts a site out at the server, at once and until --undo, also after a restart. Runs that go on are stopped.

    Example: fedgrove federation remove birch --kit kits/operators/ops@example.org
    """
    stopped = remote.remove(kit, site, undo)
    if undo:
        print(f"The server lets {site} in again; start it there: fedgrove federation start")
        return
    print(f"The server knows no {site} any more. Take it out of federation.toml too, then: fedgrove federation kits")
    for run in stopped:
        print(f"Stopped {run}; continue it without {site} if its quorum allows: fedgrove federation submit JOB.toml --resume")


def doctor(kit: Kit = Path(), as_json: AsJson = False) -> None:
    """Looks at a kit: the server in reach, clock, certificate, data, template, model, disk, memory. Runs nothing.

    Example: fedgrove federation doctor kits/sites/ash
    """
    checks = site_doctor.examine(kit)
    examination.show(checks, as_json)
    if not all(check.ok for check in checks):
        raise typer.Exit(2)


COMMANDS = (init, kits, start, status, submit, watch, fetch, stop, remove, doctor)


def _asked(question: str, default: str | None = None) -> str:
    if not sys.stdin.isatty():
        raise FedgroveError(f"{question}? Give it as an option", "`fedgrove federation init --help`")
    reply: str = typer.prompt(question, default=default)
    return reply


def _abilities(capabilities: dict[str, Any] | None) -> str:
    if capabilities is None:
        return ""
    memory = f"{capabilities['memory'] / 2**30:.1f} GiB" if capabilities.get("memory") else "any memory"
    bits = ", ".join(map(str, capabilities.get("bits", ())))
    return f"; {memory}, speed {capabilities.get('speed')}, weights of {bits} bits"
