"""What an operator does with a running federation: submit a job, watch it, fetch its result, stop it."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import tomli_w

from fedgrove.deploy.flare import require_flare
from fedgrove.deploy.flare.coordinate import HELD_OUT, STATE, text_name
from fedgrove.deploy.flare.files import FEDERATION, JOB, Federation, read
from fedgrove.deploy.flare.kits import CONTROLLER, EXECUTOR, ROSTER
from fedgrove.deploy.flare.node import address, kind_of, reachable
from fedgrove.errors import FedgroveError
from fedgrove.escape import printable
from fedgrove.events import Listener, Message, Phase, from_json
from fedgrove.files import write_atomically
from fedgrove.job.federated import FederatedJob
from fedgrove.job.load import load_federated

CAPABILITIES = "capabilities.json"  # the sites' capabilities, from the run that was watched last
SENT = "sent.json"  # by run: the id of the FLARE job that it was last submitted as
ENDED = ("FINISHED", "ABORTED", "FAILED")
GOING = ("DISPATCHED", "RUNNING")
BEFORE_COMPUTING = ("join", "plan")  # actions of phases: the sites agree, the plan is made
STOPPING = 60.0  # seconds that a run may take to stop


def check_kit(kit: Path) -> None:
    """Raises :class:`FedgroveError` if the folder is not an operator's kit."""
    require_flare()
    if kind_of(kit) != "operator":
        raise FedgroveError(f"{kit}: this is not an operator's kit", "name one with --kit")


@contextmanager
def session(kit: Path) -> Iterator[Any]:
    """A connection to the server with this operator's certificate.

    Raises:
        FedgroveError: not an operator's kit, no server at its address, or the server does not accept the certificate.
    """
    check_kit(kit)
    from nvflare.fuel.flare_api.flare_api import new_secure_session

    host, port = address(kit)
    if not reachable(host, port):
        raise FedgroveError(f"{host}:{port}: no server listens there", "is the server started, and the firewall open?")
    settings = json.loads((kit / "startup" / "fed_admin.json").read_text(encoding="utf-8"))["admin"]
    with redirect_stdout(None):  # FLARE prints to stdout too
        try:
            opened = new_secure_session(settings["username"], str(kit.resolve()), timeout=15)
        except Exception as error:  # FLARE raises exceptions of many types
            raise FedgroveError(f"{host}:{port}: the server does not accept this kit ({type(error).__name__})") from error
    try:
        yield _Quiet(opened)
    finally:
        with redirect_stdout(None):
            opened.close()


class _Quiet:
    """A FLARE session whose calls print nothing."""

    def __init__(self, flare: Any):
        self._flare = flare

    def __getattr__(self, name: str) -> Callable[..., Any]:
        call = getattr(self._flare, name)

        from nvflare.fuel.flare_api.api_spec import AuthorizationError

        def quietly(*args: Any, **kwargs: Any) -> Any:
            with redirect_stdout(None):
                try:
                    return call(*args, **kwargs)
                except AuthorizationError as error:
                    raise FedgroveError("the server does not let this kit do that", "is it an operator's?") from error

        return quietly


def submit(kit: Path, file: Path, changes: Sequence[str] = (), resume: bool = False) -> str:
    """Sends a job to the server; returns the run's name.

    Args:
        resume: continue the run of this name. If it is still running, it is stopped first: FLARE distributes a job to
            the sites only once, so a site whose process ended can take part again only after a new submission.

    Raises:
        FedgroveError: the job is not valid, or fewer of its sites are connected than its quorum.
    """
    check_kit(kit)
    federation = read(kit / FEDERATION, Federation)
    job = load_federated(file, changes, [site.name for site in federation.sites])
    if job.privacy.secure_aggregation:
        job = job.model_copy(update={"roster": _roster_number(kit)})
    with session(kit) as flare:
        connected = {client.name for client in flare.get_system_info().client_info}
        wanted = [client.name for client in job.clients]
        away = [name for name in wanted if name not in connected]
        quorum = job.rounds.quorum or len(wanted)
        if len(wanted) - len(away) < quorum:
            raise FedgroveError(
                f"it is not connected ({len(wanted) - len(away)} of {len(wanted)} are, {quorum} needed: rounds.quorum)",
                "start it there: fedgrove federation start",
                client=away[0],
            )
        before = _sent(kit).get(job.name)
        if resume and before:
            _end(flare, before)
        with tempfile.TemporaryDirectory() as folder:
            write_flare_job(Path(folder) / job.name, job, resume)
            _remember(kit, job.name, flare.submit_job(str(Path(folder) / job.name)))
    return job.name


def _roster_number(kit: Path) -> int:
    """The number of the newest roster that this operator's kit has.

    Raises:
        FedgroveError: it has none.
    """
    try:
        return int(json.loads((kit / ROSTER).read_text(encoding="utf-8"))["number"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FedgroveError(
            f"{kit / ROSTER}: the roster is missing or of an earlier version",
            "run fedgrove federation kits again, and copy the new roster to all kits",
        ) from error


def write_flare_job(folder: Path, job: FederatedJob, resume: bool) -> None:
    """Writes FLARE's JSON files, which name installed classes and contain no code, the job file and held-out texts."""
    at_server, at_site = folder / "app_server" / "config", folder / "app_site" / "config"
    at_server.mkdir(parents=True)
    at_site.mkdir(parents=True)
    names = [client.name for client in job.clients]
    meta = {
        "name": job.name,
        "resource_spec": {},
        "min_clients": 1,  # the run checks its own quorum, and names the sites that are missing
        "deploy_map": {"app_server": ["server"], "app_site": names},
    }
    workflow = {"id": "fedgrove", "path": CONTROLLER, "args": {"resume": resume}}
    server = {
        "format_version": 2,
        "server": {"task_request_interval": 0.1},
        "workflows": [workflow],
        "components": [],
        "task_data_filters": [],
        "task_result_filters": [],
    }
    executor = {"tasks": ["fedgrove"], "executor": {"path": EXECUTOR, "args": {}}}
    site = {
        "format_version": 2,
        "executors": [executor],
        "components": [],
        "task_data_filters": [],
        "task_result_filters": [],
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2), encoding="utf-8")
    (at_server / "config_fed_server.json").write_text(json.dumps(server, indent=2), encoding="utf-8")
    (at_site / "config_fed_client.json").write_text(json.dumps(site, indent=2), encoding="utf-8")
    tables = job.model_dump(mode="json", exclude_none=True)
    tables["clients"] = [{"name": name} for name in names]
    for text in tables["evaluate"]["data"]:
        source = Path(text["path"])
        name = text_name(source)
        (at_server / HELD_OUT).mkdir(exist_ok=True)
        shutil.copyfile(source, at_server / HELD_OUT / name)
        text["path"] = name
    for config in (at_server, at_site):  # a site reads the job itself: what the server says of it is not believed
        (config / JOB).write_text(tomli_w.dumps(tables), encoding="utf-8")


def watch(kit: Path, name: str, listener: Listener, *, planned: bool = False) -> str | None:
    """Passes the events of a run to a listener until the run ends.

    Args:
        planned: return as soon as the sites have agreed and the plan is made.

    Returns:
        None if the run ended well (or the plan is made), else one line that says why it did not.
    """
    job = sent(kit, name)
    number = shown = 0  # of events; of messages among them
    with session(kit) as flare:
        while True:
            try:
                status = str(flare.get_job_status(job))
            except Exception as error:  # FLARE raises exceptions of many types
                raise FedgroveError(
                    f"{name}: the server is gone ({type(error).__name__})", "start it again, then submit with --resume"
                ) from error
            try:
                reply = flare.do_app_command(job, "progress", {"since": number})
            except Exception:  # the job is not running yet, or no longer
                reply = None
            events, capabilities = _read_progress(reply)
            if capabilities:
                write_atomically(kit / CAPABILITIES, json.dumps(capabilities, indent=2))
            for event in map(from_json, events):
                number += 1  # also for an event of an unknown type: the server counts it too
                shown += isinstance(event, Message)
                if event is not None:
                    listener.on_event(event)
                if planned and isinstance(event, Phase) and event.action not in BEFORE_COMPUTING:
                    return None
            if status.startswith(ENDED):
                break
            time.sleep(0.5)
    with tempfile.TemporaryDirectory() as folder:
        try:
            fetched = _fetch(kit, job, Path(folder))
        except FedgroveError:
            return f"{name}: it ended before it started ({status}){_not_deployed(kit, job)}; the server's log says why"
        state = json.loads((fetched / STATE).read_text(encoding="utf-8"))
    for line in state.get("messages", [])[shown:]:  # those of the run's last moments
        listener.on_event(Message(printable(str(line))))
    return None if state["state"] == "ended" else printable(str(state["line"]))


def _not_deployed(kit: Path, job: str) -> str:
    """Which sites did not take a job that the server handed out, in words; empty: none. Why is in their own logs."""
    with session(kit) as flare:
        try:
            details = flare.get_job_meta(job).get("job_deploy_detail") or []
        except FedgroveError:
            raise
        except Exception:  # FLARE raises exceptions of many types
            return ""
    replies = [str(detail).partition(": ") for detail in details]  # "SITE: OK", "SITE: why not", and remarks
    sites = sorted({printable(site) for site, colon, reply in replies if colon and reply != "OK" and site != "invalid_clients"})
    return f": it did not reach {', '.join(sites)}" if sites else ""


def _read_progress(reply: object) -> tuple[list[object], dict[str, Any]]:
    """The events and the sites' capabilities in a server's reply; empty if the reply is malformed."""
    fields = reply if isinstance(reply, dict) else {}
    events, capabilities = fields.get("events"), fields.get("capabilities")
    return events if isinstance(events, list) else [], capabilities if isinstance(capabilities, dict) else {}


def fetch(kit: Path, name: str, out: Path) -> Path:
    """Downloads a run's result to the folder ``out``: model or adapter, report, plans, measurements.

    Raises:
        FedgroveError: ``out`` exists, or there is nothing to fetch yet.
    """
    if out.exists():
        raise FedgroveError(f"--out {out}: it exists already", "name another folder")
    with tempfile.TemporaryDirectory(dir=out.parent if out.parent.is_dir() else None) as folder:
        shutil.move(_fetch(kit, sent(kit, name), Path(folder)), out)
    return out


def _fetch(kit: Path, job: str, folder: Path) -> Path:
    with session(kit) as flare:
        try:
            download = flare.download_job_result(job, str(folder))
        except Exception as error:
            raise FedgroveError(
                f"there is nothing to fetch yet ({type(error).__name__})", "wait for the run with `fedgrove federation watch`"
            ) from error
    states = sorted(Path(download).rglob(STATE))
    if not states:
        raise FedgroveError("the run has no result", "the server's log says why")
    return states[0].parent


def stop(kit: Path, name: str) -> None:
    """Stops a run; it can be continued.

    Raises:
        FedgroveError: it is not running, or was not submitted with this kit.
    """
    with session(kit) as flare:
        try:
            flare.abort_job(sent(kit, name))
        except Exception as error:
            raise FedgroveError(f"{name}: it is not running ({type(error).__name__})") from error


def _end(flare: Any, job: str) -> bool:
    """Stops a FLARE job and waits until it has ended; returns whether it was running."""
    try:
        if str(flare.get_job_status(job)).startswith(ENDED):
            return False
        flare.abort_job(job)
    except FedgroveError:
        raise
    except Exception:  # of many types. A job that ran when the server was killed stays "RUNNING" for ever
        return False
    ends = time.monotonic() + STOPPING
    while not str(flare.get_job_status(job)).startswith(ENDED):
        if time.monotonic() > ends:
            raise FedgroveError(f"the run does not stop within {STOPPING:g} s", "the server's log says why")
        time.sleep(0.5)
    return True


def remove(kit: Path, site: str, undo: bool = False) -> list[str]:
    """Excludes a site at the server, whatever certificate it presents, or admits it again. Restarts do not undo it.

    Current runs are stopped, because the site's process would take part in them until they end.

    Returns:
        The names of the runs that were stopped.

    Raises:
        FedgroveError: there is no such site or, with ``undo``, the site was not removed.
    """
    check_kit(kit)
    known = [entry.name for entry in read(kit / FEDERATION, Federation).sites]
    with session(kit) as flare:
        if undo:
            if not flare.enable_client(site)["clients"][0]["was_disabled"]:
                raise FedgroveError(f"{site}: it was not removed")
            return []
        known += [client.name for client in flare.get_system_info().client_info]
        if site not in known:
            raise FedgroveError(f"{site}: there is no such site", f"there are {', '.join(sorted(set(known)))}")
        flare.disable_client(site)
        return [job["job_name"] for job in flare.list_jobs() if str(job["status"]) in GOING and _end(flare, job["job_id"])]


def status(kit: Path) -> dict[str, Any]:
    """The server's status, the sites (``heard``: the last contact, in seconds since 1970) and the runs."""
    check_kit(kit)
    federation = read(kit / FEDERATION, Federation)
    with session(kit) as flare:
        system = flare.get_system_info()
        heard = {client.name: client.last_connect_time for client in system.client_info}
        jobs = [
            {"name": job.get("job_name", job.get("name")), "job": job["job_id"], "status": job["status"]}
            for job in flare.list_jobs()
        ]
    file = kit / CAPABILITIES
    capabilities = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    sites = [
        {"name": site.name, "heard": heard.get(site.name), "capabilities": capabilities.get(site.name)}
        for site in federation.sites
    ]
    return {"server": system.server_info.status, "sites": sites, "runs": jobs}


def sent(kit: Path, name: str | None) -> str:
    """The id of the FLARE job of a run.

    Raises:
        FedgroveError: no run of that name was submitted with this kit.
    """
    known = _sent(kit)
    if name not in known:
        raise FedgroveError(f"{name}: this kit has submitted no run of that name", f"there are {', '.join(known) or 'none'}")
    return known[name]


def latest(kit: Path) -> str:
    """The name of the run that was submitted last with this kit."""
    known = _sent(kit)
    if not known:
        raise FedgroveError("nothing was submitted with this kit yet")
    return list(known)[-1]


def _sent(kit: Path) -> dict[str, str]:
    file = kit / SENT
    known: dict[str, str] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return known


def _remember(kit: Path, name: str, job: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9-]{8,64}", job):
        raise FedgroveError("the server did not accept the job", "its log says why")
    known = {other: number for other, number in _sent(kit).items() if other != name} | {name: job}
    write_atomically(kit / SENT, json.dumps(known, indent=2))
