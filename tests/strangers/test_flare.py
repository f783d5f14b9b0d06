"""Odd folders, odd files and sites that break: none of them ends a run of others, and each gets one line."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tomli_w

pytest.importorskip("nvflare", reason="the extra fedgrove[flare] is not installed")

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import CellMessageAuthHeaderKey, FLContextKey
from nvflare.apis.job_launcher_spec import JobProcessArgs, JobReturnCode
from nvflare.apis.workspace import Workspace
from nvflare.app_common.job_launcher.process_launcher import ProcessJobLauncher
from nvflare.fuel.f3.cellnet.cell import CoreCell
from nvflare.fuel.f3.cellnet.defs import CellChannel, MessageHeaderKey
from nvflare.fuel.f3.message import Message
from nvflare.private.admin_defs import Message as AdminMessage
from nvflare.private.defs import ERROR_MSG_PREFIX
from nvflare.private.fed.client import client_executor
from nvflare.private.fed.server import admin, job_runner
from nvflare.private.fed.server.fed_server import FederatedServer
from nvflare.utils.job_launcher_utils import get_client_job_args, get_server_job_args

from fedgrove.deploy.flare import coordinate, doctor, kits, node, operator
from fedgrove.deploy.flare.controller import FedgroveController
from fedgrove.deploy.flare.files import FEDERATION, SERVER, SITE, Federation, ServerFile, SiteFile, read
from fedgrove.deploy.flare.launcher import command
from fedgrove.deploy.flare.outcomes import STARTED, SiteOutcomes, ended_sites
from fedgrove.engines.base import Engine
from fedgrove.engines.error_codes import MESSAGES
from fedgrove.engines.flare import ABSENT, ENDED, NONCE, FlareEngine
from fedgrove.errors import FedgroveError
from fedgrove.events import Listener
from fedgrove.job.load import load, load_federated, read_toml
from small import CLIENTS, Small, cli, complaint

JOB_ID = "a87436de-b5e2-4a85-9a33-e0072cf85789"
FOLDERS = (
    "with space", "  two  spaces ", "it's", 'a "quoted" one', "a # b", "back\\slash", "$HOME", "{workspace}", "%s", "-m",
    "é and 日本語", "tab\tand\nnewline", "*", "~", "; exit 1", "`id`", "a=b", "l" * 250,
)  # fmt: skip


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("where", [get_client_job_args, get_server_job_args])
def test_the_command_of_a_job_survives_any_folder(folder: str, where: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """FLARE's ProcessJobLauncher splits the command by shlex."""
    monkeypatch.setattr(sys, "executable", f"/{folder}/bin/python")
    arguments: dict[str, tuple[str, Any]] = {name: (f"--{name}", f"/{folder}/{name}") for name in where()}
    arguments[JobProcessArgs.OPTIONS] = ("--set", " secure_train=true uid=ash print_conf=True")
    words = shlex.split(command(arguments, where()), True)
    assert words[0] == f"/{folder}/bin/python"
    for name, (option, value) in arguments.items():
        values = value.split() if name == JobProcessArgs.OPTIONS else [value]
        start = words.index(option, 1)
        assert words[start + 1 : start + 1 + len(values)] == values
    assert len(words) == 1 + sum(2 for _ in arguments) + 2, "the options are three words"


def test_flare_still_splits_a_command_that_the_launcher_gives() -> None:
    assert callable(ProcessJobLauncher.get_command)
    assert "get_command" in ProcessJobLauncher.launch_job.__code__.co_names


@pytest.fixture(scope="module")
def some_kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("odd folder é") / "kits"
    federation = Federation.model_validate(
        {"name": "wards", "sites": [{"name": name} for name in CLIENTS], "operators": [{"name": "ops@example.org"}]}
    )
    kits.make_kits(federation, out)
    return out


def test_kits_name_the_launchers_and_the_servers_component(some_kits: Path) -> None:
    for kit, kind in ((some_kits / "server", "server"), (some_kits / "sites" / "ash", "site")):
        resources = json.loads((kit / "local" / "resources.json").read_text(encoding="utf-8"))
        paths = {part["id"]: part["path"] for part in resources["components"]}
        assert paths["process_launcher"] == kits.LAUNCHERS[kind]
        assert (kits.OUTCOMES in paths.values()) == (kind == "server")


@pytest.mark.parametrize("name", ["new\nline", "tab\t", "bell\a", b"latin-\xe9", "/".join(["long" * 60] * 16)])
@pytest.mark.parametrize("kind", ["server", "sites/ash"])
def test_a_kit_whose_path_cannot_work_is_refused_by_start_and_doctor(
    some_kits: Path, tmp_path: Path, name: str | bytes, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = os.fsdecode(name)
    for part in folder.split("/"):  # a path this long can only be made in steps
        Path(part).mkdir()
        os.chdir(part)
    if len(folder) < 1000:
        shutil.copytree(some_kits / kind, "kit")
        kit = tmp_path / folder / "kit"
    else:
        kit = tmp_path / folder
    with pytest.raises(FedgroveError, match="move the kit to a") as caught:
        node.start(kit)
    str(caught.value).encode()
    assert "\n" not in str(caught.value)
    check = doctor.folder(kit)
    assert (check.ok, check.remedy) == (False, caught.value.remedy)


@pytest.mark.parametrize("blocked", ["transfer", "log", node.PID, "log/console.log"])
def test_a_kit_that_cannot_be_written_to_is_refused_by_start(
    some_kits: Path, tmp_path: Path, blocked: str, small: Small
) -> None:
    """Also for root, whom no permission stops: where a folder should be there is a file, and the other way round."""
    kit = tmp_path / "kit"
    shutil.copytree(some_kits / "server", kit)
    (kit / SERVER).write_text(tomli_w.dumps({"models": {"m": str(small.model)}}))
    if blocked in ("transfer", "log"):
        shutil.rmtree(kit / blocked, ignore_errors=True)
        (kit / blocked).write_text("")
    else:
        (kit / blocked).mkdir(parents=True)
    with pytest.raises(FedgroveError, match=r"it cannot be written to \(.*\); make it writable"):
        node.start(kit)


class Cell:
    """Takes the filters that a component adds, and passes messages through them as FLARE does."""

    def __init__(self) -> None:
        self.request: Any = None
        self.reply: Any = None

    def add_incoming_request_filter(self, channel: str, topic: str, cb: Any) -> None:
        self.request = cb

    def add_incoming_reply_filter(self, channel: str, topic: str, cb: Any) -> None:
        self.reply = cb


@pytest.fixture
def outcomes(tmp_path: Path) -> tuple[Cell, Path]:
    """The server's filters, and the folder of a job that was deployed."""
    for name in ("startup", "local", JOB_ID):
        (tmp_path / name).mkdir()
    cell, workspace = Cell(), Workspace(str(tmp_path))
    engine = SimpleNamespace(
        get_cell=lambda: SimpleNamespace(core_cell=cell),
        get_client_name_from_token=lambda token: {"t-ash": "ash", "t-birch": "birch"}.get(token, ""),
    )
    context = SimpleNamespace(
        get_engine=lambda: engine, get_workspace=lambda: workspace, get_prop={FLContextKey.CURRENT_JOB_ID: JOB_ID}.get
    )
    component = SiteOutcomes()
    component.handle_event(EventType.SYSTEM_START, context)
    component.handle_event(EventType.JOB_DEPLOYED, context)
    return cell, tmp_path / JOB_ID


@pytest.mark.parametrize("code", [0, 1, 9, -9, -11, 101, 102, 103, 104, 127, 255, None, "104", [104]])
def test_no_report_of_a_site_ends_a_job(outcomes: tuple[Cell, Path], code: Any) -> None:
    """Whatever code a site's process ends with, or a hostile site invents."""
    cell, job = outcomes
    message = Message({CellMessageAuthHeaderKey.TOKEN: "t-ash"}, {"job_id": JOB_ID, "code": code, "reason": "x"})
    assert cell.request(message) is None, "FLARE goes on with the message"
    assert message.payload["code"] == JobReturnCode.SUCCESS
    assert message.payload["code"] not in client_executor.REPORTABLE_JOB_FAILURES
    assert ended_sites(job) == {"ash"}


@pytest.mark.parametrize("job_id", [None, "", ".", "..", "../..", "/etc", "other", 7, JOB_ID + "/../x", "x" * 5000, "a\0b"])
def test_a_report_on_no_job_is_not_noted(outcomes: tuple[Cell, Path], job_id: Any) -> None:
    cell, job = outcomes
    cell.request(Message({CellMessageAuthHeaderKey.TOKEN: "t-ash"}, {"job_id": job_id, "code": 104}))
    assert not list(job.parent.rglob("ash"))


@pytest.mark.parametrize(
    ("token", "payload"), [("t-elm", {"job_id": JOB_ID}), (None, {"job_id": JOB_ID}), ("t-ash", b"?"), ("t-ash", None)]
)
def test_a_report_of_a_stranger_is_not_noted(outcomes: tuple[Cell, Path], token: Any, payload: Any) -> None:
    cell, job = outcomes
    cell.request(Message({CellMessageAuthHeaderKey.TOKEN: token}, payload))
    assert ended_sites(job) == set()


def test_a_site_that_cannot_start_its_process_is_one_that_is_silent(outcomes: tuple[Cell, Path]) -> None:
    cell, job = outcomes

    def reply(site: str, topic: str, body: Any) -> Message:
        message = Message({MessageHeaderKey.ORIGIN: site}, AdminMessage(topic, body))
        cell.reply(message)
        return message

    assert reply("ash", STARTED, f"{ERROR_MSG_PREFIX}: Start job execution exception").payload is None
    assert reply("birch", STARTED, "Start the client app...").payload is not None
    assert reply("birch", "reply_train.deploy", f"{ERROR_MSG_PREFIX}: x").payload is not None
    assert reply("../birch", STARTED, f"{ERROR_MSG_PREFIX}: x").payload is None
    assert ended_sites(job) == {"ash"}


def test_flare_decides_where_the_server_component_expects_it() -> None:
    """If this fails, FLARE has changed: read fedgrove/deploy/flare/outcomes.py again."""
    assert {"is_client_outcome_pending", "fail_run"} <= set(FederatedServer.process_job_failure.__code__.co_names)
    assert client_executor.REPORTABLE_JOB_FAILURES.get(JobReturnCode.SUCCESS) is None
    assert callable(CoreCell.add_incoming_request_filter)
    assert callable(CoreCell.add_incoming_reply_filter)
    assert CellChannel.CLIENT_MAIN
    assert '"admin"' in Path(admin.__file__).read_text(encoding="utf-8")
    silent = SimpleNamespace(client_name="ash", reply=None)
    assert admin.check_client_replies([silent], ["ash"], "start job") == []
    assert "JOB_DEPLOYED" in job_runner.JobRunner._deploy_job.__code__.co_names


class Controller:
    """A FLARE controller whose sites never fetch anything."""

    def __init__(self) -> None:
        self.cancelled: list[Any] = []

    def send(self, task: Any, context: Any, targets: list[str]) -> None:
        self.sent = targets

    def cancel_task(self, task: Any) -> None:
        self.cancelled.append(task)


def test_a_client_whose_process_ended_fails_at_once_by_name() -> None:
    connected = [SimpleNamespace(name=name) for name in ("ash", "birch")]
    context = SimpleNamespace(get_engine=lambda: SimpleNamespace(get_clients=lambda: connected))
    ended = iter([{"ash"}, {"ash", "birch"}])
    controller = Controller()
    engine: Engine = FlareEngine(
        controller, context, list(CLIENTS), "run", 60.0, lambda: False, lambda: next(ended, {"ash", "birch"})
    )
    replies = list(engine.request("kind", dict.fromkeys(CLIENTS, b"")))
    assert replies == [("ash", None, ENDED), ("cedar", None, ABSENT), ("birch", None, ENDED)]
    assert len(controller.cancelled) == 1


def test_a_response_that_comes_after_its_time_is_reported_once_as_late_and_not_again_as_dropped() -> None:
    """Whether FLARE at the site still sends it depends on a few milliseconds; what the run says does not."""
    connected = [SimpleNamespace(name="ash")]
    context = SimpleNamespace(get_engine=lambda: SimpleNamespace(get_clients=lambda: connected))
    sender = Controller()
    engine = FlareEngine(sender, context, ["ash"], "run", 60.0, lambda: False, set)
    late = MESSAGES["late"].format(word="0.2")
    assert list(engine.request("kind", {"ash": b""}, timeout=0.2)) == [("ash", None, late)]
    (nonce,) = (nonce for _, nonce in engine.given_up)

    heard: list[str] = []
    controller = FedgroveController()
    controller._engine, controller._recorder = engine, SimpleNamespace(message=heard.append)
    for client, result in (("birch", {NONCE: nonce}), ("ash", {NONCE: nonce}), ("ash", {NONCE: nonce}), ("ash", {NONCE: []})):
        controller.process_result_of_unknown_task(SimpleNamespace(name=client), "fedgrove", "id", result, None)
    dropped = "a late or repeated response was dropped"
    assert heard == [f"birch: {dropped}", f"ash: {dropped}", f"ash: {dropped}"], "only the first of its own is expected"


BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_every_toml_file_may_begin_with_a_byte_order_mark(small: Small, tmp_path: Path, end: bytes) -> None:
    def write(file_name: str, **tables: Any) -> Path:
        file = tmp_path / file_name
        file.write_bytes(BOM + tomli_w.dumps(tables).encode().replace(b"\n", end))
        return file

    job = tmp_path / "job.toml"
    job.write_bytes(BOM + small.job("bom").read_bytes().replace(b"\n", end))
    assert load(job).name == "small"
    federated = small.spec(clients=None, model__path="m", evaluate={})
    assert load_federated(write("federated.toml", **federated), sites=CLIENTS).clients[0].name == "ash"
    (tmp_path / "x.txt").write_text("text")
    assert read(write(SITE, data="x.txt", models={"m": "m"}), SiteFile).models
    assert read(write(SERVER, models={"m": "m"}), ServerFile).models
    people = {"sites": [{"name": "ash"}], "operators": [{"name": "a@b.org"}]}
    assert read(write(FEDERATION, name="wards", **people), Federation).name == "wards"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a = 1\nb = \xe9\n", "line 2 is not UTF-8; save the file as UTF-8"),
        (BOM + b"a = 1\n\n# caf\xe9\n", "line 3 is not UTF-8"),
        ("a = 1\n".encode("utf-16"), "line 1 is not UTF-8"),
        (b"\x00\x01", "not TOML"),
        (b"a = 1\nb = = 2\n", "line 2"),
        (b"a = 1\na = 2\n", "line 2"),
        (BOM + b"a = 1\nb\n", "line 2"),
        (BOM + BOM + b"a = 1\n", "line 1"),
        (b"a = " + b"[" * 100_000, "not TOML"),
        (b"a = " + b"1" * 10_000 + b"\n", "not TOML"),
        (b"a = 2024-13-45\n", "not TOML"),
        (b'{"a": 1}', "not TOML"),
        (b"\x1f\x8b\x08\x00", "not UTF-8"),
    ],
)
def test_what_is_no_toml_is_one_line_with_file_and_line(tmp_path: Path, content: bytes, words: str) -> None:
    for name, kind in (("job.toml", None), (SITE, SiteFile), (SERVER, ServerFile), (FEDERATION, Federation)):
        file = tmp_path / name
        file.write_bytes(content)
        with pytest.raises(FedgroveError) as caught:
            load(file) if kind is None else read(file, kind)  # type: ignore[type-var]
        assert str(caught.value).startswith(f"{file}: ")
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_toml_file_that_is_not_there_or_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "none.toml", tmp_path, tmp_path / "file" / "x.toml"):
        with pytest.raises(FedgroveError, match="no such job file; write one"):
            read_toml(path, "job file", "write one")


@pytest.mark.parametrize("host", ["::1", "[::1]", "2001:db8::1", "[2001:db8::1]", "fe80::1%eth0", "::ffff:192.0.2.1"])
def test_an_ipv6_address_as_the_servers_name_is_refused_in_plain_words(tmp_path: Path, host: str) -> None:
    others = ["--name", "wards", "--site", "ash", "--operator", "a@b.org"]
    bracketed = host if host.startswith("[") else f"[{host}]"
    for server in (host, f"{bracketed}:8002"):
        line = complaint("federation", "init", tmp_path / "new", "--server", server, *others)
        assert "is an IPv6 address, which NVIDIA FLARE cannot use; write a host name or an IPv4 address" in line
        assert not (tmp_path / "new" / FEDERATION).exists()
    file = tmp_path / FEDERATION
    sites = [{"name": "ash", "connect": f"{bracketed}:443"}]
    file.write_text(tomli_w.dumps({"name": "w", "sites": sites, "operators": [{"name": "a@b.org"}]}))
    with pytest.raises(FedgroveError, match=r"sites\.0\.connect: .* IPv6 address"):
        read(file, Federation)


@pytest.mark.parametrize(
    "server", ["fl.example.org:", "fl.example.org:http", ":8002", "fl.example.org:80 02", "host:-1", "host:8002:x"]
)
def test_an_address_of_no_form_is_refused_by_init(tmp_path: Path, server: str) -> None:
    others = ["--name", "wards", "--site", "ash", "--operator", "a@b.org"]
    assert f"--server {server}: this is no HOST:PORT" in complaint("federation", "init", tmp_path, "--server", server, *others)


@pytest.mark.parametrize(
    ("server", "host", "port"), [("fl.example.org", "fl.example.org", 8002), ("10.0.0.1:443", "10.0.0.1", 443)]
)
def test_an_address_that_works(tmp_path: Path, server: str, host: str, port: int) -> None:
    others = ["--name", "wards", "--site", "ash", "--operator", "a@b.org"]
    assert cli("federation", "init", tmp_path, "--server", server, *others)[0] == 0
    described = read(tmp_path / FEDERATION, Federation)
    assert (described.server.host, described.server.port) == (host, port)


class Nobody(Engine):
    """An engine whose clients all fail."""

    def __init__(self, names: list[str]):
        self.names = names

    def clients(self) -> list[str]:
        return sorted(self.names)

    def request(self, kind: str, messages: Any, timeout: float | None = None, largest: Any = None) -> Any:
        for client in sorted(messages):
            yield client, None, "it is asleep"


def coordinated(small: Small, folder: Path, number: int, resume: bool = False, **changes: Any) -> tuple[str | None, list[str]]:
    """What a submission ends with where no site responds, and the messages of it."""
    kit, config, results = folder / "the server's kit", folder / f"config {number}", folder / f"results {number}"
    for one in (kit, config, results):
        one.mkdir(exist_ok=True)
    (kit / SERVER).write_text(tomli_w.dumps({"models": {"m": str(small.model)}, "threads": 1}))
    spec = small.spec(**{"clients": [{"name": name} for name in CLIENTS], "model__path": "m", "evaluate": {}, **changes})
    (config / coordinate.JOB).write_text(tomli_w.dumps(spec))
    recorder = coordinate.Recorder()
    error = coordinate.coordinate(kit, config, results, resume, lambda names, run, grace: Nobody(names), recorder)
    state = json.loads((results / "run" / coordinate.STATE).read_text())
    assert state.get("line") == error
    assert state["messages"] == [str(event["text"]) for event in recorder.events if event["event"] == "message"]
    return error, [str(event["text"]) for event in recorder.events if event["event"] == "message"]


def test_a_federated_run_that_ended_before_it_began_can_be_submitted_again(small: Small, tmp_path: Path) -> None:
    for number, changes in enumerate([{}, {}, {"seed": 5}, {"rounds": {"quorum": 1}}]):
        error, messages = coordinated(small, tmp_path, number, **changes)
        assert "client 'ash': it is asleep (0 of 3 clients responded" in str(error)
        assert "ash: it is asleep" in messages
    assert "it is asleep" in str(coordinated(small, tmp_path, 9, resume=True)[0])


def test_a_federated_run_that_is_there_is_called_by_its_name(small: Small, tmp_path: Path) -> None:
    coordinated(small, tmp_path, 0)
    folder = tmp_path / "the server's kit" / "runs" / "small"
    (folder / "plan-0-prune.json").write_text("{}")
    error, _ = coordinated(small, tmp_path, 1)
    assert error == "name = 'small': a run is there already; continue it with --resume or give the job another name"
    error, _ = coordinated(small, tmp_path, 2, resume=True, seed=7)
    assert error == "--resume: the job differs from that of name = 'small' in seed; run that one, or give the job another name"
    (folder / "job.toml").unlink()
    error, _ = coordinated(small, tmp_path, 3)
    assert error == "name = 'small': the folder is not empty and holds no run; give the job another name"


def test_no_message_of_the_server_names_its_folders(small: Small, tmp_path: Path) -> None:
    broken = tmp_path / "secret-place" / "broken model"
    broken.mkdir(parents=True)
    (broken / "config.json").write_text("{")
    for number, (server, changes) in enumerate(
        [
            ({"models": {"m": str(tmp_path / "secret-place" / "gone")}}, {}),
            ({"models": {"m": str(broken)}}, {}),
            ({"models": {}}, {}),
            ({"models": {"m": "m"}, "no_such_key": 1}, {}),
        ]
    ):
        kit, config, results = tmp_path / "secret-place" / "kit", tmp_path / f"c{number}", tmp_path / f"r{number}"
        for one in (kit, config, results):
            one.mkdir(exist_ok=True)
        (kit / SERVER).write_text(tomli_w.dumps(server))
        spec = small.spec(clients=[{"name": "ash"}], model__path="m", evaluate={}, **changes)
        (config / coordinate.JOB).write_text(tomli_w.dumps(spec))
        recorder = coordinate.Recorder()
        error = coordinate.coordinate(kit, config, results, False, lambda names, run, grace: Nobody(names), recorder)
        assert error
        for text in (error, json.dumps(recorder.events), (results / "run" / coordinate.STATE).read_text()):
            assert "secret-place" not in text
            assert str(tmp_path) not in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/srv/kit/server.toml: no such key", "server.toml: no such key"),
        ("no such directory: /srv/kit", "no such directory: kit"),
        ("no such directory: /srv/models/my model/x", "no such directory: x"),
        ("cannot read '/home/ann/data.txt' (EIO)", "cannot read 'data.txt' (EIO)"),
        ("prune/block: 1/2 of it, and/or https://example.org/a/b", "prune/block: 1/2 of it, and/or https://example.org/a/b"),
        ("/tmp: full", "tmp: full"),
    ],
)
def test_a_path_is_cut_to_its_last_part(text: str, expected: str) -> None:
    assert coordinate.without_paths(text, [Path("/srv/kit"), Path("/srv/models/my model")]) == expected


@pytest.mark.parametrize(
    ("details", "words"),
    [
        (["server: OK", "ash: no space left on /srv/ash", "birch: no reply (deployment timeout)", "cedar: OK"], "ash, birch"),
        (["server: OK", "ash: denied: /a: b", "num_ok_sites 0 < required_min_sites 1"], "ash"),
        (["invalid_clients: elm", "server: [Errno 28] /srv/kit"], "server"),
        (["server: OK", "ash: OK"], None),
        ([], None),
        (None, None),
    ],
)
def test_the_operator_learns_which_sites_a_job_did_not_reach(
    details: list[str] | None, words: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Flare:
        def get_job_status(self, job: str) -> str:
            return "FAILED_TO_RUN"

        def get_job_meta(self, job: str) -> dict[str, Any]:
            return {"job_deploy_detail": details}

    monkeypatch.setattr(operator, "session", lambda kit: nullcontext(Flare()))
    monkeypatch.setattr(operator, "sent", lambda kit, name: JOB_ID)
    line = operator.watch(tmp_path, "wards", Listener())
    reached = f": it did not reach {words}" if words else ""
    assert line == f"wards: it ended before it started (FAILED_TO_RUN){reached}; the server's log says why"
