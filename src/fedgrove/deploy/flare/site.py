"""What a site answers, in its working process: the site decides, the job asks.

A run begins with an ask ``join`` that says what the job wants. The site compares it with its own ``site.toml`` and with its
copy of the model, and agrees or refuses. Later asks are answered only as far as they keep to what was agreed.
"""

from __future__ import annotations

import json
import math
import os
import re
import resource
import shutil
import time
import traceback
from functools import lru_cache
from pathlib import Path

import torch

from fedgrove.client import handlers as client
from fedgrove.client.handlers import TEXTLESS, LocalClient
from fedgrove.deploy.flare.files import SITE, Allow, SiteFile, model_folder, read
from fedgrove.deploy.flare.kits import KEY, ROSTER, SIGNATURE, TRUSTED
from fedgrove.engines import error_codes as faults
from fedgrove.engines.error_codes import Refusal
from fedgrove.engines.worker import Reply
from fedgrove.errors import FedgroveError
from fedgrove.models.digest import digests, first_difference
from fedgrove.models.stream import Checkpoint
from fedgrove.privacy.secagg.keys import Credentials
from fedgrove.rounds import wire
from fedgrove.rounds.wire import Info
from fedgrove.stages.prune.plan import Capabilities

JOIN, RESULT, DONE = "join", "result", "done"
CLOCK = "log/clock.json"  # the server's clock and this one, when a job was last asked for
STAGES = {  # kinds of ask by kind of stage
    "prune": {"prune", "pooled", "allocate"},
    "structured": {"structured"},
    "tune": {"base", "importance", "train", "personal"},
}
SETTINGS = (
    "pruner",
    "aggregation",
    "score",
    "length",
    "allocation",
    "personal",
)  # of a stage, which an ask may repeat and not change
METHODS = ("pruner", "method", "aggregation", "score", "allocation")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def threads(kit: Path) -> int:
    """How many the site's file gives the working process."""
    try:
        return read(kit / SITE, SiteFile).threads or os.cpu_count() or 1
    except FedgroveError:
        return 1  # whoever asks is told that the file does not hold together


def answer(kit: Path, run: str, kind: str, message: bytes) -> Reply:
    """Answers one ask; of a fault nothing leaves but a code and the name of a class.

    Args:
        kit: the site's folder.
        run: the name of the run's working files.
        kind: "join", "result", "done" or a name in :data:`fedgrove.client.handlers.HANDLERS`.
        message: of :func:`fedgrove.rounds.wire.pack`.
    """
    reply: Reply
    try:
        reply = _answer(kit, run, kind, message), None
    except Exception as fault:
        reply = None, faults.of(fault)
        _log(kit, traceback.format_exc())
    _log(kit, f"{run} {kind}: {len(message)} bytes in, {f'{len(reply[0])} bytes out' if reply[0] else reply[1]}")
    return reply


def _answer(kit: Path, run: str, kind: str, message: bytes) -> bytes:
    if not _NAME.fullmatch(run):
        raise Refusal("terms", "run")
    try:
        own = read(kit / SITE, SiteFile)
    except FedgroveError as fault:
        raise Refusal("site-file") from fault
    _limit(own.limit)
    folder = kit / own.work / run
    if kind == JOIN:
        return wire.pack({}, join(kit, own, folder, wire.unpack(message)[1]))
    agreed = folder / "agreed.json"
    if not agreed.is_file():
        raise Refusal("joined")
    terms: Info = json.loads(agreed.read_text(encoding="utf-8"))
    if kind == RESULT:
        tensors, info = wire.unpack(message)
        _keep(kit / "results" / terms["name"], own, tensors, info)
        return wire.pack({}, {})
    if kind == DONE:
        if (folder / "personal").is_dir():  # this site's own adapter, where it is better than the shared one
            shutil.rmtree(kit / "results" / f"{terms['name']}-personal", ignore_errors=True)
            (kit / "results").mkdir(exist_ok=True)
            (folder / "personal").rename(kit / "results" / f"{terms['name']}-personal")
        shutil.rmtree(folder)
        return wire.pack({}, {})
    keeps_to(own.allow, terms, kind, wire.unpack(message)[1])
    return client.serve(kind, message, described(kit, own, folder, terms), own.device)


def join(kit: Path, own: SiteFile, folder: Path, terms: Info) -> Info:
    """Agrees to a job, or refuses it.

    Args:
        terms: ``name``, ``model``, ``dtype``, ``digests`` of the server's copy, ``stages`` (as in the job), ``secure``,
            ``alone``, ``clients``: the members by name, ``clock``: the server's, in seconds since 1970.

    Returns:
        ``result``: whether the site wants the finished model; ``card``: what it says of itself.

    Raises:
        Refusal: names the key of ``site.toml``, or the part of the model that differs.
    """
    (kit / "log").mkdir(exist_ok=True)
    (kit / CLOCK).write_text(json.dumps({"server": float(terms["clock"]), "here": time.time()}), encoding="utf-8")
    key = refused(own.allow, terms)
    if key is not None:
        raise Refusal("refused", key)
    if not _NAME.fullmatch(terms["name"]):
        raise Refusal("terms", "name")
    try:
        path = model_folder(own.models, terms["model"], kit)
    except FedgroveError as fault:
        raise Refusal("models") from fault
    checkpoint = Checkpoint(path, _dtype(terms["dtype"]))
    differs = first_difference(terms["digests"], digests(checkpoint, kit / own.work / f"digests-{terms['model']}.json"))
    if differs is not None:
        raise Refusal("model", differs)
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / "agreed.partial"
    beside.write_text(json.dumps(terms), encoding="utf-8")
    beside.replace(folder / "agreed.json")
    return {"result": own.result, "card": card_of(own)}


def refused(allow: Allow, terms: Info) -> str | None:
    """The key of ``[allow]`` that a job goes beyond; None where it may."""
    stages = terms["stages"]
    if any(stage["kind"] not in allow.stages for stage in stages):
        return "allow.stages"
    methods = {stage[key] for stage in stages for key in METHODS if stage.get(key, "even") != "even"}
    if allow.methods != "all" and not methods <= set(allow.methods):
        return "allow.methods"
    if len(set(terms["clients"])) < allow.group:
        return "allow.group"
    if allow.secure and not terms["secure"]:
        return "allow.secure"
    if allow.epsilon is not None and any(_noise(stage) > allow.epsilon for stage in stages):
        return "allow.epsilon"
    if terms["alone"] and not allow.alone:
        return "allow.alone"
    if allow.samples is not None and any(stage.get("samples", 0) > allow.samples for stage in stages):
        return "allow.samples"
    return None


def _noise(stage: Info) -> float:
    """The ε of a stage; infinite where it has an ask without noise."""
    return float(stage.get("epsilon") or math.inf) if stage.get("allocation", "even") == "even" else math.inf


def keeps_to(allow: Allow, terms: Info, kind: str, ask: Info) -> None:
    """Refuses an ask that the job which the site agreed to does not hold; ``site.toml`` may have become stricter since.

    Raises:
        Refusal: names the key.
    """
    key = refused(allow, terms)
    if key is not None:
        raise Refusal("refused", key)
    if kind in TEXTLESS - {"base"}:
        return
    if kind == "evaluate":
        if not terms["alone"]:
            raise Refusal("terms", "evaluate.alone")
        ask = ask["walk"]  # it may be walked anew: what is asked is then what "prune" would have been
    number = ask.get("stage")
    if type(number) is not int or not 0 <= number < len(terms["stages"]):
        raise Refusal("terms", "stage")
    stage: Info = terms["stages"][number]
    sums = stage.get("aggregation") == "pooled"
    if kind == "evaluate":
        kind = "pooled" if sums else "prune"
    if kind not in STAGES[stage["kind"]] or (kind in ("prune", "pooled") and (kind == "pooled") != sums):
        raise Refusal("terms", "kind")
    for key in SETTINGS:
        if key in ask and key in stage and ask[key] != stage[key]:
            raise Refusal("terms", key)
    if kind == "pooled" and "noise" in ask:
        noise = ask["noise"]
        if (stage.get("epsilon") is None) != (noise is None) or (noise and noise["epsilon"] > stage["epsilon"]):
            raise Refusal("terms", "epsilon")
        if ask["products"] and stage["pruner"] == "wanda":
            raise Refusal("terms", "products")
    if kind == "train":
        private = ask.get("private") if stage.get("dp_unit") == "window" else (ask.get("whole") or {}).get("noise")
        if ask["settings"]["steps"] != stage["steps"]:
            raise Refusal("terms", "steps")
        if stage.get("epsilon") is not None and (private is None or _beyond(private, stage, terms["secure"])):
            raise Refusal("terms", "epsilon")
    if kind == "importance" and stage.get("epsilon") is not None:
        raise Refusal("terms", "epsilon")
    if allow.samples is not None and ask.get("samples", 0) > allow.samples:
        raise Refusal("refused", "allow.samples")


def _beyond(private: Info, stage: Info, secure: bool) -> bool:
    """Whether a client would spend more than the job said, or leave noise to others that nobody is bound to add."""
    if any(private[key] > stage[key] for key in ("epsilon", "delta")):
        return True
    if private["rounds"] < stage["rounds"] or private["bound"] != stage["bound"]:
        return True
    return stage["dp_unit"] == "client" and secure and not private["adders"]


def described(kit: Path, own: SiteFile, folder: Path, terms: Info) -> LocalClient:
    """The site as its handlers see it. With credentials it sends nothing of its text but masked, whatever it is asked."""
    return LocalClient(
        name=name_of(kit),
        folder=folder,
        model=model_folder(own.models, terms["model"], kit),
        dtype=_dtype(terms["dtype"]),
        data=own.data,
        text=own.text,
        card=card_of(own),
        credentials=credentials(kit, own.allow) if terms["secure"] or own.allow.secure else None,
        prompt=own.prompt,
        answer=own.answer,
    )


def card_of(own: SiteFile) -> Info:
    """What the site says of itself: see :class:`fedgrove.plan.Capabilities`."""
    return {key: value for key, value in own.model_dump(mode="json").items() if key in Capabilities.model_fields}


def name_of(kit: Path) -> str:
    """Under which name this site's certificate was made."""
    settings = json.loads((kit / "startup" / "fed_client.json").read_text(encoding="utf-8"))
    name: str = settings["client"]["fqsn"]
    return name


def credentials(kit: Path, allow: Allow) -> Credentials:
    """The site's key for secure aggregation, and the roster that the operator signed."""
    folder = kit / "secure"
    try:
        roster = (folder / ROSTER).read_bytes()
        key, signature, operator = (
            bytes.fromhex((folder / name).read_text(encoding="utf-8")) for name in (KEY, SIGNATURE, TRUSTED)
        )
        smallest = int(json.loads(roster)["min_group"])
    except (OSError, ValueError, KeyError) as fault:
        raise FedgroveError(f"{folder}: a key, the roster or its signature is missing or damaged; ask the operator") from fault
    return Credentials(key, roster, signature, operator, max(2, allow.group, smallest))


def _keep(folder: Path, own: SiteFile, tensors: dict[str, torch.Tensor], info: Info) -> None:
    """Takes one file of the packed result; with the last one the folder gets its name."""
    if not own.result:
        raise Refusal("refused", "result")
    if not _NAME.fullmatch(info["file"]):
        raise Refusal("terms", "file")
    beside = folder.with_name(folder.name + ".partial")
    beside.mkdir(parents=True, exist_ok=True)
    (beside / info["file"]).write_bytes(tensors["bytes"].numpy().tobytes())
    if info["last"]:
        shutil.rmtree(folder, ignore_errors=True)
        beside.rename(folder)


def _dtype(name: str) -> torch.dtype | None:
    return None if name == "auto" else getattr(torch, name)


@lru_cache(maxsize=1)
def _limit(most: int | None) -> None:
    """From now on this process is refused more memory than that."""
    if most is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def _log(kit: Path, text: str) -> None:
    log = kit / "log" / "site.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text.rstrip()}\n")
