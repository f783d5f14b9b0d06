"""A federation small enough to run in a second, and ways to let real processes die at an exact moment."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import pytest
import tomli_w
import torch
import typer.testing
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import fedgrove.stages.prune.pruners
import forks
from fedgrove.engines.base import Engine
from fedgrove.events import Event, Listener, Message, Phase
from fedgrove.rounds import wire

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "src" / "fedgrove" / "demo"
CLIENTS = ("ash", "birch", "cedar")
LENGTH = 16
SAMPLES = 3
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
# Its runner would make the command anew for every call, which takes longer than some of the calls.
typer.testing._get_command = cache(typer.testing._get_command)  # type: ignore[attr-defined]


def write_once(key: Hashable, folder: Path, write: Callable[[Path], object]) -> Path:
    """Fills a folder with the files that a function writes; for an equal key the function is called once.

    To draw and save a model takes ten times as long as to write its files again. Whichever it was, what a test draws next with
    torch is the same.
    """
    if key not in _WRITTEN:
        with tempfile.TemporaryDirectory() as temporary:
            write(Path(temporary))
            _WRITTEN[key] = {file.name: file.read_bytes() for file in Path(temporary).iterdir()}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in _WRITTEN[key].items():
        (folder / name).write_bytes(content)
    torch.manual_seed(0)
    return folder


_WRITTEN: dict[Hashable, dict[str, bytes]] = {}


def make_model(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A random Llama of two blocks in bfloat16, with the shipped model's tokenizer."""

    def write(target: Path) -> None:
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = LlamaConfig(
            **{**sizes, "num_key_value_heads": 2, "vocab_size": 4096, "max_position_embeddings": 64, **changes},
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            initializer_range=0.1,
        )
        torch.manual_seed(seed)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(target)
        for name in TOKENIZER:
            (target / name).write_bytes((DEMO / "grove-6m" / name).read_bytes())

    return write_once(("llama", seed, *sorted(changes.items())), folder, write)


def save_random(folder: Path, config: Any) -> None:
    """Saves a random model of any architecture in float32, without a tokenizer."""
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, tensor in made.named_parameters():
            if tensor.dim() == 1:  # norms and biases begin as ones and zeros, which would hide a mistake
                tensor.add_(0.3 * torch.randn_like(tensor))
            elif "embed" in name:
                tensor.mul_(5)
    made.save_pretrained(folder)


def make_texts(folder: Path, clients: Sequence[str] = CLIENTS) -> dict[str, Path]:
    """For every client, and for ``held-0`` and ``held-1``, a few hundred words that nobody else has."""
    words = (DEMO / "texts" / "publisher.txt").read_text(encoding="utf-8").split()
    texts = {}
    for i, name in enumerate((*clients, "held-0", "held-1")):
        texts[name] = folder / f"{name}.txt"
        texts[name].write_text("\n".join(" ".join(words[j : j + 12]) for j in range(200 * i, 200 * i + 200, 12)) + "\n")
    return texts


class Small:
    """A folder with a model and texts, and the jobs that are written there.

    Args:
        folder: the folder.
        model: another model than :func:`make_model`'s.
    """

    def __init__(self, folder: Path, model: Path | None = None):
        self.folder = folder
        self.model = model or make_model(folder / "model")
        self.texts = make_texts(folder)
        self._runs: dict[str, Path] = {}

    def spec(self, **changes: Any) -> dict[str, Any]:
        """A job as plain data; ``changes`` are keys such as ``stages__0__rounds=2``."""
        job: dict[str, Any] = {
            "name": "small",
            "model": {"path": str(self.model)},
            "clients": [{"name": name, "data": str(self.texts[name])} for name in CLIENTS],
            "stages": [{"kind": "prune", "pruner": "wanda", "sparsity": 0.5, "samples": SAMPLES, "length": LENGTH}],
            "evaluate": {
                "data": [str(self.texts["held-0"])],
                "length": 32,
                "windows": 2,
            },
        }
        for key, value in changes.items():
            place: Any = job
            *path, last = (int(step) if step.isdigit() else step for step in key.split("__"))
            for step in path:
                place = place[step] if isinstance(step, int) else place.setdefault(step, {})
            if value is None:
                place.pop(last)
            else:
                place[last] = value
        return job

    def job(self, name: str = "job", **changes: Any) -> Path:
        """Writes a job file."""
        file = self.folder / f"{name}.toml"
        file.write_text(tomli_w.dumps(self.spec(**changes)), encoding="utf-8")
        return file

    def one_word(self, *words: str) -> dict[str, Any]:
        """Changes of a job: everybody's text, and the one that is measured on, is one word over and over.

        Whoever learns from such text gets better at it by a factor, so what a test says of that is no matter of how a processor
        rounds.

        Args:
            words: one for each client; default: the same for all. It is measured on the first.
        """
        words = words or ("tree",) * len(CLIENTS)
        for word in words:
            (self.folder / f"only-{word}.txt").write_text(f"{' '.join([word] * 12)}\n" * 17)
        data = [str(self.folder / f"only-{word}.txt") for word in words]
        clients = [{"name": name, "data": file} for name, file in zip(CLIENTS, data, strict=True)]
        return {"clients": clients, "evaluate__data": data[:1]}

    def two_texts(self) -> dict[str, Any]:
        """The change of a job after which it is measured on two texts, not on one."""
        return {"evaluate__data": [str(self.texts["held-0"]), str(self.texts["held-1"])]}

    def apart_and_pooled(self, folder: Path, owners: Mapping[str, list[str]], **changes: Any) -> tuple[Path, Path]:
        """The runs of owners each with their records, and of one owner with all of them in another order."""
        pooled = {"everybody": [record for records in reversed(list(owners.values())) for record in records]}
        for name, texts in (("apart", owners), ("pooled", pooled)):
            (folder / name).mkdir()
            clients = []
            for client, records in texts.items():
                file = folder / name / f"{client}.jsonl"
                file.write_text("".join(json.dumps({"text": record}) + "\n" for record in records), encoding="utf-8")
                clients.append({"name": client, "data": str(file), "samples": len(records)})
            job = self.job(name, **{**changes, "clients": clients, "evaluate": {}})
            assert cli("run", job, "--out", folder / name / "run")[0] == 0
        return folder / "apart" / "run", folder / "pooled" / "run"

    def undisturbed(self, **changes: Any) -> Path:
        """The run folder of a job that nothing happened to; the same job is run once."""
        key = hashlib.sha256(repr(sorted(changes.items())).encode()).hexdigest()[:12]
        if key not in self._runs:
            out = self.folder / f"run-{key}"
            assert cli("run", self.job(f"job-{key}", **changes), "--out", out)[0] == 0
            self._runs[key] = out
        return self._runs[key]

    def continued(self, out: Path, moment: Moment, **changes: Any) -> Path:
        """The run folder of a job that was killed at a moment, in a process of its own, and continued in this one."""
        job = self.job("continued", **changes)
        killed("run", job, "--out", out, "--quiet", moment=moment)
        assert cli("run", job, "--out", out, "--resume", "--quiet")[0] == 0
        return out


class Meddling:
    """An engine between the rounds and a real one, which changes some clients' responses of one kind."""

    def __init__(
        self,
        engine: Engine,
        kind: str,
        of: Collection[str] = ("birch",),
        change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None] | None = None,
    ):
        """``change`` gets tensors and reply of a response; None: the client dies instead of responding."""
        self.engine, self.kind, self.of, self.change = engine, kind, of, change

    def clients(self) -> list[str]:
        return self.engine.clients()

    def request(
        self, kind: str, messages: Mapping[str, bytes], timeout: float | None = None, largest: int | None = None
    ) -> Iterator[Any]:
        for client, answer, error in self.engine.request(kind, messages, timeout):
            if kind != self.kind or client not in self.of or answer is None:
                yield client, answer, error
            elif self.change is None:
                yield client, None, "its process died (status -9)"
            else:
                tensors, reply = wire.unpack(answer)
                self.change(tensors, reply)
                yield client, wire.pack(tensors, reply), None


class Heard(Listener):
    """Keeps the lines of progress."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def on_event(self, event: Event) -> None:
        match event:
            case Message(text):
                self.lines.append(text)
            case Phase():
                self.lines.append(event.message)


def cli(*args: object) -> tuple[int, str, str]:
    """Calls the command in this process: status, standard output, standard error. A traceback fails the test."""
    from fedgrove.cli import app

    result = CliRunner().invoke(app, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def complaint(*args: object, status: int = 2) -> str:
    """Runs a command that must fail with one line on standard error and nothing else; gives the line."""
    quiet = ("--quiet",) if args[0] in ("run", "evaluate", "demo", "plan", "split", "export") else ()
    got, out, err = cli(*args, *quiet)
    return one_line(got, out, err, status)


def one_line(got: int, out: str, err: str, status: int = 2) -> str:
    """Checks that a command failed with one line and nothing else; gives the line without its ``fedgrove: ``."""
    assert got == status, (got, err)
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("fedgrove: "), err
    return err.removeprefix("fedgrove: ").strip()


def result(run: Path) -> dict[str, str]:
    """What a job must give bit for bit: every file of the model, what is told of it, the plan, every measurement."""
    files = [*sorted((run / "model").iterdir()), run / "pruning.json", *sorted(run.glob("plan-*.json")), run / "job.toml"]
    hashes = {str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    return hashes | {f"metric {key}": repr(value) for key, value in measurements(run).items()}


def measurements(run: Path) -> dict[tuple[Any, ...], float]:
    """The metrics by what was measured; nothing may stand there twice."""
    found: dict[tuple[Any, ...], float] = {}
    for line in lines(run / "metrics.jsonl"):
        assert set(line) == {"time", "stage", "round", "client", "name", "value"}
        key = (line["stage"], line["round"], line["client"], line["name"])
        assert key not in found, f"{key} is there twice"
        found[key] = line["value"]
    return found


def lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, all of them whole."""
    text = file.read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


@dataclass(frozen=True)
class Moment:
    """What befalls a process, at the ``count``-th of Python's audit events of that name on a path of that pattern.

    The event comes just before the thing happens: ``os.rename`` with the new name, ``open`` with the name and the mode.

    Attributes:
        does: "kill": SIGKILL. "cut": likewise, with half of what was to be written on the disk. "interrupt": SIGINT.
            "full": the file that is opened is on a full disk (a link to /dev/full, where the kernel refuses every write).
    """

    event: str
    path: str
    does: str = "kill"
    count: int = 1


def process(
    *args: object,
    moment: Moment | None = None,
    env: Mapping[str, str] | None = None,
    kill_after: Callable[[], None] | None = None,
    peak: Path | None = None,
    fork_workers: bool = False,
) -> tuple[int, str, str]:
    """Calls the command in a process of its own: status (negative: the signal), standard output, standard error.

    The process leads a group, as what a shell starts does.

    Args:
        args: of the command.
        moment: what befalls the process, and when.
        env: its environment, besides what there is.
        kill_after: the process is killed when this returns.
        peak: a file for the most memory that the process ever held, in KiB.
        fork_workers: its worker processes import nothing either, see :func:`forked_workers`.
    """
    call = partial(_command, [str(arg) for arg in args], moment, dict(env or {}), peak, fork_workers)
    return _forked(call, kill_after)


def python(code: str, *args: object, path: Path) -> tuple[int, str, str]:
    """Runs code in a process of its own, with the package fedgrove of a folder: status, standard output, standard error.

    Args:
        code: what ``python -c`` would run.
        args: of the code.
        path: the folder that has the package.
    """
    return _forked(partial(_code, code, [str(arg) for arg in args], path))


def _forked(call: Callable[[], None], kill_after: Callable[[], None] | None = None) -> tuple[int, str, str]:
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        status = forks.run(partial(_child, call, out, err), kill_after)
        return status, out.read_text(errors="replace"), err.read_text(errors="replace")


def forked_jobs() -> str:
    """The PYTHONPATH of processes whose Python processes are forked as well; see forked_jobs/sitecustomize.py."""
    forks.start()
    return os.pathsep.join(str(ROOT / folder) for folder in ("tests/forked_jobs", "src"))


@pytest.fixture
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's worker processes cost no import either."""
    _fork_workers(monkeypatch)


def _fork_workers(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("fedgrove.engines.worker.get_context", lambda _: multiprocessing.get_context("fork"))


def killed(*args: object, moment: Moment) -> None:
    """Calls the command in a process of its own, which must die at that moment."""
    status, _, err = process(*args, moment=moment)
    assert status == -signal.SIGKILL, (status, err)


def _child(call: Callable[[], None], out: Path, err: Path) -> None:
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    os.setpgrp()
    sys.stdout, sys.stderr = io.TextIOWrapper(io.FileIO(1, "w")), io.TextIOWrapper(io.FileIO(2, "w"), line_buffering=True)
    torch.set_num_threads(1)
    try:
        call()
    finally:
        sys.stdout.flush()


def _command(
    args: list[str], moment: Moment | None, env: dict[str, str], peak: Path | None, fork_workers: bool = False
) -> None:
    os.environ.update(env)
    if fork_workers:
        _fork_workers(pytest.MonkeyPatch())
    for stream in (sys.stdout, sys.stderr):
        cast(io.TextIOWrapper, stream).reconfigure(encoding=env.get("PYTHONIOENCODING"))
    fedgrove.stages.prune.pruners.__path__.extend(
        folder for folder in env.get("PYTHONPATH", "").split(os.pathsep) if "plugins" in folder
    )
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell makes what it starts in the background deaf to it
    if moment:
        sys.addaudithook(_Fate(moment))
    sys.argv = ["fedgrove", *args]
    from fedgrove.cli import main

    try:
        main()
    finally:
        if peak:
            peak.write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


def _code(code: str, args: list[str], path: Path) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "fedgrove"]:
        del sys.modules[name]
    sys.path.insert(0, str(path))
    sys.argv = ["-c", *args]
    exec(compile(code, "-c", "exec"), {"__name__": "__main__"})


class _Fate:
    def __init__(self, moment: Moment):
        self.moment = moment
        self.left = moment.count

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if event != self.moment.event or not self.left:
            return
        if event == "open" and (not isinstance(args[1], str) or args[1] in ("r", "rb")):
            return
        path = str(args[1] if event == "os.rename" else args[0])
        if not fnmatch(path, self.moment.path):
            return
        self.left -= 1
        if self.left:
            return
        match self.moment.does:
            case "interrupt":
                os.kill(os.getpid(), signal.SIGINT)
            case "full":
                fill(Path(path))
            case "cut" if event == "os.rename":
                os.truncate(args[0], Path(args[0]).stat().st_size // 2)
            case "cut":
                os.write(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), b'{"time": 17')
        if self.moment.does in ("kill", "cut"):
            os.kill(os.getpid(), signal.SIGKILL)


def fill(path: Path) -> None:
    """From now on the disk is full for this file."""
    with contextlib.suppress(FileNotFoundError):
        path.rename(path.with_name(path.name + ".kept"))
    path.symlink_to("/dev/full")


def free(folder: Path) -> None:
    """Gives the disk room again."""
    for link in [path for path in folder.rglob("*") if path.is_symlink()]:
        link.unlink()
        kept = link.with_name(link.name + ".kept")
        if kept.exists():
            kept.rename(link)


FAULTY = '''
"""Wanda, until a file says otherwise; a client with one window more than the others can be singled out."""
import os, signal, time
from pathlib import Path
from fedgrove.stages.prune.pruners import wanda

NEEDS = "squares"
FOLDER = Path({folder!r})


def prune(weight, inputs, target):
    does, tokens = (FOLDER / "does").read_text().split()
    if int(tokens) in (0, inputs.tokens):
        match does:
            case "raise":
                raise RuntimeError("the handler fails")
            case "raise-once":
                (FOLDER / "does").write_text("nothing 0")
                raise RuntimeError("the handler fails")
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                (FOLDER / "hangs.partial").write_text(str(os.getpid()))  # whoever waits for the file reads it at once
                (FOLDER / "hangs.partial").rename(FOLDER / "hangs")
                time.sleep(600)
    return wanda.prune(weight, inputs, target)
'''


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A pruner ``faulty`` for one test, in this process and in those that it starts: wanda, until it is told to misbehave.

    Call it with "raise", "raise-once", "kill" or "hang", and with the number of calibration tokens of the one client that
    shall do so (0: everybody); with "nothing" it behaves again.
    """
    folder = tmp_path / "plugins"
    folder.mkdir()
    (folder / "faulty.py").write_text(FAULTY.format(folder=str(tmp_path)))
    (folder / "sitecustomize.py").write_text(
        f"import fedgrove.stages.prune.pruners\nfedgrove.stages.prune.pruners.__path__.append({str(folder)!r})\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(ROOT / "src")]))
    monkeypatch.setattr(fedgrove.stages.prune.pruners, "__path__", [*fedgrove.stages.prune.pruners.__path__, str(folder)])
    monkeypatch.delitem(sys.modules, "fedgrove.stages.prune.pruners.faulty", raising=False)
    monkeypatch.delattr(fedgrove.stages.prune.pruners, "faulty", raising=False)

    def tell(does: str = "nothing", tokens: int = 0) -> None:
        (tmp_path / "does").write_text(f"{does} {tokens}")

    tell()
    return tell


def wait_until(condition: Callable[[], bool], pause: float = 0.1) -> None:
    """Waits for something that must happen, and asks again after every pause (seconds); fails where it never does."""
    for _ in range(600):
        if condition():
            return
        time.sleep(pause)
    raise AssertionError("it never happened")


def alive(pid: int) -> bool:
    """Whether a process runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
