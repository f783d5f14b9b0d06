"""Shows that a change to the code leaves every result as it was, bit for bit.

    .venv/bin/python bench/same_bits.py --keep before.json

Runs a table of small jobs with two checkouts, one after the other: the one before the change (a git worktree of commit b8a2acf,
unless --before names a folder) and the one that this file stands in (or --after). Every run is a process of its own, on one
thread, without a GPU, with this interpreter; only the source folder differs. What is compared: the bytes of all safetensors
files of the run (model, adapter, what a client keeps, the run that is centralized), and every number in metrics.jsonl but
times. A number that only the later checkout writes is no difference.

Jobs are written in today's vocabulary; for a checkout that still has src/fedgrove/server.py they are translated. Jobs with an
epsilon are not here: their noise comes from the operating system. A job takes some five seconds with each checkout; --quick
leaves out those marked slow: the demo, and two on a real federation of three sites. Status 1 where anything differs, or fails,
that EXPECTED_DIFFERENCES does not explain.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import tomli_w
import torch

COMMIT = "b8a2acf"  # the last one before the rebuild
DAMPED = "sums of SparseGPT are damped channel by channel since"
ROUNDS = "with Wanda, a second round had more zeros than the target"
NEW = "it is a new key"
EXPECTED_DIFFERENCES: dict[str, str] = {  # by name of the job: why its result may differ
    "prune-tune-centralized": "a client's name seeds its batches; the owner of all text was centralised",
    **dict.fromkeys(("prune-pooled-sparsegpt", "prune-pooled-2:4", "prune-pooled-bfloat16"), DAMPED),
    **dict.fromkeys(("prune-fedspallm-rounds", "prune-fedprllm-rounds"), ROUNDS),
    **dict.fromkeys(("prune-mended", "prune-mended-dense", "prune-pooled-mended", "prune-pooled-magnitude-mended"), NEW),
}

# Keys and values as they are called today, and before. Keys by the kind of stage, or by the table of the job file.
OLD_KEYS: dict[str, dict[str, str]] = {
    "prune": {"aggregation": "rule", "max_weight_growth": "bound", "owl_m": "outlier", "owl_lambda": "spread",
              "compute_dtype": "compute"},
    "structured": {},
    "tune": {"aggregation": "rule", "importance_steps": "warmup", "replan_every": "refresh", "eval_every": "measure",
             "upload_price": "price", "server_optimizer": "server", "server_lr": "server_rate", "lr_schedule": "decay",
             "max_grad_norm": "clip", "dp_clip": "bound", "dp_unit": "protects"},
    "evaluate": {"centralized": "centralised"},
    "privacy": {"min_group": "smallest"},
}  # fmt: skip
OLD_VALUES: dict[str, dict[str, str]] = {
    "kind": {"structured": "narrow"},
    "aggregation": {"fedspallm": "votes", "fedprllm": "masks", "fedavg": "mean", "pooled": "statistics", "flexlora": "ranks",
                    "fedit": "mean", "ffa_lora": "frozen_a", "flora": "stacked", "fedex_lora": "residual"},
}  # fmt: skip
OLD_METRICS: dict[str, str] = {}  # by the name of a metric today: its name before
TIMES = ("seconds", "clock", "time")  # the last part of the name of a metric that is no result

THREADS = 1
CLIENTS = {"ash": "publisher.txt", "birch": "software.txt", "cedar": "theatre.txt"}
HELD_OUT = {"held-0": "publisher-heldout.txt", "held-1": "theatre-heldout.txt"}
CHARACTERS = 5000  # of each text
OPERATOR = "ops@example.org"
LONGEST = 1800  # seconds for a command, on however busy a machine
CALL = (
    "import fedgrove, os; assert fedgrove.__file__.startswith(os.environ['PYTHONPATH']), fedgrove.__file__; "
    "from fedgrove.cli import main; main()"
)

Spec = dict[str, Any]


def job(*stages: Spec, clients: Mapping[str, Spec] | None = None, **tables: Spec) -> Spec:
    """A job of three clients; paths are relative to the folder of the inputs."""
    owners = [{"name": name, "data": f"{name}.txt", **(clients or {}).get(name, {})} for name in CLIENTS]
    evaluate = {"data": [f"{name}.txt" for name in HELD_OUT], "length": 32, "windows": 4, **tables.pop("evaluate", {})}
    model = {"path": "model"}
    return {"name": "same-bits", "model": model, "clients": owners, "stages": list(stages), "evaluate": evaluate, **tables}


def prune(aggregation: str = "fedspallm", pruner: str = "wanda", **changes: Any) -> Spec:
    target = {} if "pattern" in changes else {"sparsity": 0.5}
    return {"kind": "prune", "pruner": pruner, "aggregation": aggregation, **target, "samples": 3, "length": 16, **changes}


def structured(score: str = "fisher", **changes: Any) -> Spec:
    return {"kind": "structured", "score": score, "samples": 3, "length": 16, **changes}


def tune(method: str = "lora", aggregation: str | None = None, **changes: Any) -> Spec:
    grid = ([1, 2, 4], [2, 4], [32, 16]) if method == "fedpipe" else ([2], [4], [32])
    rule = {"aggregation": aggregation} if aggregation else {}
    return {"kind": "tune", "method": method, **rule, "rounds": 2, "steps": 2, "length": 16, "learning_rate": 0.01,
            **dict(zip(("batches", "ranks", "bits"), grid, strict=True)), **changes}  # fmt: skip


def table() -> dict[str, Spec]:
    """The jobs by name."""
    secure = {"secure_aggregation": True, "min_group": 3}
    alone = {"alone": True}
    sampled = {"rounds": 2, "layers": {"sample": 0.5, "cover": 2}}
    uneven: dict[str, Spec] = {"ash": {"memory": "64MiB", "uplink": "1Mbit"}, "birch": {"speed": 4}, "cedar": {"samples": 5}}
    harder: dict[str, Spec] = {"ash": {"sparsity": 0.6}, "cedar": {"samples": 5}}
    fixed = {"aggregation": "ffa_lora", "precision": "fixed"}
    jobs: dict[str, Spec] = {}
    for rule in ("fedspallm", "fedavg", "fedprllm", "pooled"):
        for pruner in ("sparsegpt", "wanda", "dsnot", "magnitude"):
            if (rule, pruner) != ("pooled", "magnitude"):  # it needs nothing that could be pooled
                jobs[f"prune-{rule}-{pruner}"] = job(prune(rule, pruner))
        jobs[f"prune-{rule}-2:4"] = job(prune(rule, "sparsegpt", pattern="2:4"))
        jobs[f"prune-{rule}-bfloat16"] = job(prune(rule, "sparsegpt", compute_dtype="bfloat16"))
    for rule in ("fedspallm", "fedavg", "fedprllm"):
        jobs[f"prune-{rule}-sampled"] = job(prune(rule, "sparsegpt", **sampled), clients=uneven)
        jobs[f"prune-{rule}-dense"] = job(prune(rule, "sparsegpt", source="dense"))
        jobs[f"prune-{rule}-rounds"] = job(prune(rule, rounds=2), clients=harder)
    jobs |= {
        "prune-shrink": job(prune(shrink=0.5)),
        "prune-trim": job(prune(pruner="sparsegpt", trim=1)),
        "prune-no-expand": job(prune(expand=False)),
        "prune-mended": job(prune(pruner="sparsegpt", mend="dsnot")),
        "prune-mended-dense": job(prune("fedprllm", mend="dsnot", source="dense")),
        "prune-pooled-mended": job(prune("pooled", "sparsegpt", mend="dsnot")),
        "prune-pooled-magnitude-mended": job(prune("pooled", "magnitude", mend="dsnot")),
        "prune-damping-each": job(prune(pruner="sparsegpt", damping="each")),
        "prune-growth": job(prune(pruner="sparsegpt", max_weight_growth=1.5), rounds={"quorum": 2}),  # cedar is refused
        "prune-fedavg-growth": job(prune("fedavg", "sparsegpt", max_weight_growth=1.5), rounds={"quorum": 2}),
        "prune-owl": job(prune(allocation="owl", owl_m=3.0, owl_lambda=0.1), evaluate=alone),
        "prune-pooled-owl": job(prune("pooled", "sparsegpt", allocation="owl", owl_m=3.0, owl_lambda=0.1)),
        "prune-pooled-sequential": job(prune("pooled", "sparsegpt", source="sequential")),
        "prune-pooled-damping-mean": job(prune("pooled", "sparsegpt", damping="mean")),
        "prune-pooled-first-block": job(prune("pooled", protect_first_block=True)),
        "prune-pooled-mixed": job(prune("pooled", "sparsegpt", mixed=True)),
        "prune-pooled-personal": job(prune("pooled", "sparsegpt", samples=4, personal=0.5)),
        "prune-pooled-sampled": job(prune("pooled", layers={"sample": 0.7, "cover": 2}), clients=uneven),
        "prune-alone": job(prune(pruner="sparsegpt"), evaluate=alone),
        "prune-prune": job(prune(sparsity=0.3), prune("fedprllm", "magnitude")),
        "secure-fedspallm": job(prune(pruner="sparsegpt"), privacy=secure),
        "secure-fedspallm-owl": job(prune(allocation="owl"), privacy=secure),
        "secure-fedprllm": job(prune("fedprllm", "sparsegpt"), privacy=secure),
        "secure-fedspallm-mended": job(prune(mend="dsnot"), privacy=secure),
        "secure-pooled": job(prune("pooled", "sparsegpt"), privacy=secure),
        "secure-pooled-wanda-owl": job(prune("pooled", allocation="owl"), privacy=secure),
        "secure-pooled-dsnot-sequential": job(prune("pooled", "dsnot", source="sequential"), privacy=secure),
        "secure-structured": job(structured(heads=0.5), privacy=secure),
        "secure-tune": job(tune(**fixed), privacy=secure),
        "secure-tune-fedpipe": job(tune("fedpipe", **fixed), privacy=secure),
        "secure-prune-tune": job(prune("pooled", "sparsegpt"), tune(**fixed), privacy=secure),
        "structured-fisher": job(structured(channels=0.3, heads=0.5), evaluate=alone),
        "structured-taylor": job(structured("taylor", channels=0.3, heads=0.5)),
        "structured-channels": job(structured(heads=0.0)),
        "structured-tune": job(structured(channels=0.3, heads=0.5), tune()),
        "tune-full": job(tune("full")),
        "tune-fedpipe": job(tune("fedpipe"), clients=uneven),
        "tune-fedpipe-replan": job(tune("fedpipe", rounds=3, replan_every=1, importance_steps=2, upload_price=0.8)),
    }
    for rule in ("flexlora", "fedit", "ffa_lora", "flora", "fedex_lora"):
        jobs[f"tune-lora-{rule}"] = job(tune("lora", rule))
        if rule not in ("flexlora", "fedex_lora"):  # the first is the default, above; the other needs equal ranks
            jobs[f"tune-fedpipe-{rule}"] = job(tune("fedpipe", rule), clients=uneven)
    jobs |= {
        "tune-momentum": job(tune(rounds=3, server_optimizer="momentum", server_lr=0.8)),
        "tune-adam": job(tune(rounds=3, server_optimizer="adam", server_lr=0.01)),
        "tune-fixed": job(tune(**fixed)),
        "tune-personal": job(tune(personal=0.3)),
        "tune-linear": job(tune(rounds=3, lr_schedule="linear", eval_every=1)),
        "tune-proximal": job(tune(proximal=0.1, steps=3)),
        "tune-sgd": job(tune(optimizer="sgd", max_grad_norm=0.5, alpha=4.0)),
        "tune-float32": job(tune(precision="float32")),
        "tune-no-partition": job(tune("fedpipe", partition=False), clients=uneven),
        "tune-int8": job(tune(bits=[8])),
        "tune-nf4": job(tune(bits=[4])),
        "tune-alone": job(tune(), evaluate=alone),
        "prune-tune": job(prune(pruner="sparsegpt"), tune()),
        "prune-tune-full": job(prune(), tune("full")),
        "prune-tune-alone": job(prune("pooled", "sparsegpt"), tune("fedpipe"), evaluate=alone),
        "prune-tune-centralized": job(prune(), tune(), evaluate={"centralized": True}),
        "demo (slow)": {},
        "federation (slow)": job(prune(pruner="sparsegpt"), tune("fedpipe")),
        "federation-secure (slow)": job(prune("pooled", "sparsegpt"), tune(**fixed), privacy=secure),
    }
    return jobs


def translated(spec: Spec, checkout: Path) -> Spec:
    """The same job in the words of a checkout."""
    if not spec or not (checkout / "src" / "fedgrove" / "server.py").is_file():
        return spec

    def part(told: Spec, kind: str) -> Spec:
        renamed = OLD_KEYS.get(kind, {})
        return {renamed.get(k, k): OLD_VALUES[k].get(v, v) if k in OLD_VALUES else v for k, v in told.items()}

    made = {key: part(value, key) if key in OLD_KEYS else value for key, value in spec.items()}
    return {**made, "stages": [part(stage, stage["kind"]) for stage in spec["stages"]]}


def make_inputs(folder: Path, checkout: Path) -> str:
    """A random Llama of two blocks and a short text for everybody; the hash of it all."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    grove = next((checkout / "src" / "fedgrove").rglob("grove-6m"))
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=4096, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
        initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(grove / name, folder / "model")
    for name, source in {**CLIENTS, **HELD_OUT}.items():
        text = (grove.parent / "texts" / source).read_text(encoding="utf-8")
        (folder / f"{name}.txt").write_text(text[:CHARACTERS], encoding="utf-8")
    files = [file for file in sorted(folder.rglob("*")) if file.suffix in (".safetensors", ".txt", ".json")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def write(file: Path, content: Spec) -> Path:
    file.write_text(tomli_w.dumps(content), encoding="utf-8")
    return file


class Failed(Exception):
    """A command ended with another status than 0."""


def call(checkout: Path, *arguments: object) -> str:
    """Calls fedgrove of a checkout: what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(checkout / "src"), "OMP_NUM_THREADS": str(THREADS),
                   "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}  # fmt: skip
    command = [sys.executable, "-P", "-c", CALL, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LONGEST)
    if done.returncode:
        raise Failed((done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1])
    return done.stdout


def run(name: str, spec: Spec, checkout: Path, inputs: Path) -> dict[str, Any]:
    """Runs one job with a checkout: the hashes of what came out, and its numbers."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="same-bits-", ignore_cleanup_errors=True) as temporary:
        out = Path(temporary) / "run"
        said = translated(spec, checkout)
        try:
            if name.startswith("demo"):
                call(checkout, "demo", "--quiet", "--out", out)
            elif name.startswith("federation"):
                federate(name.split()[0], said, checkout, inputs, Path(temporary) / "federation", out)
            else:
                call(checkout, "run", write(inputs / "job.toml", said), "--quiet", "--out", out)
        except (Failed, subprocess.TimeoutExpired) as fault:
            return {"hash": "failed", "failed": str(fault)}
        return {**outcome(out), "seconds": round(time.monotonic() - began, 1)}


def outcome(out: Path) -> dict[str, Any]:
    """What a run folder holds that must not change."""
    files = {
        str(file.relative_to(out)).replace("centralized", "centralised"): file.read_bytes()
        for file in out.rglob("*.safetensors")
        if "work" not in file.relative_to(out).parts
    }
    numbers = {}
    for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        told = json.loads(line)
        metric = OLD_METRICS.get(told["name"], told["name"])
        if metric.rpartition("/")[2] not in TIMES:
            numbers[f"stage {told['stage']}, round {told['round']}, client {told['client']}: {metric}"] = told["value"]
    return {
        "hash": hashlib.sha256(b"".join(data for _, data in sorted(files.items()))).hexdigest(),
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())},
        "numbers": numbers,
    }


def federate(name: str, spec: Spec, checkout: Path, inputs: Path, folder: Path, out: Path) -> None:
    """Runs a job on a server and three sites, each a process, on the loopback address, and fetches the result."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    folder.mkdir()
    people = [{"name": site} for site in CLIENTS]
    members = {"server": {"host": "localhost", "port": port}, "sites": people, "operators": [{"name": OPERATOR}]}
    told = write(folder / "federation.toml", {"name": "same-bits", **members})
    call(checkout, "federation", "kits", told, "--out", folder)
    server, operator = folder / "server", folder / "operators" / OPERATOR
    sites = {site: folder / "sites" / site for site in CLIENTS}
    own = {"threads": THREADS, "models": {"small": str(inputs / "model")}}
    write(server / "server.toml", own)
    for site, kit in sites.items():
        write(kit / "site.toml", {"data": [str(inputs / f"{site}.txt")], **own})
    file = write(inputs / "job.toml", {**spec, "name": name, "model": {"path": "small"}, "clients": people})
    try:
        for kit in (server, *sites.values()):
            call(checkout, "federation", "start", kit)
        ends = time.monotonic() + 180
        while '"heard": null' in call(checkout, "federation", "status", "--json", "--kit", operator):
            if time.monotonic() > ends:
                raise Failed("the server does not hear of all sites")
            time.sleep(1)
        call(checkout, "federation", "submit", file, "--watch", "--quiet", "--kit", operator)
        call(checkout, "federation", "fetch", name, "--out", out, "--kit", operator)
    finally:
        for kit in (*sites.values(), server):
            with contextlib.suppress(OSError, ValueError, psutil.Error):
                process = psutil.Process(int((kit / "process.pid").read_text()))
                if str(kit.resolve()) in process.cmdline():
                    family = [process, *process.children(recursive=True)]
                    for one in family:
                        one.kill()
                    psutil.wait_procs(family, timeout=10)


def git(checkout: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(checkout), *arguments], check=True, capture_output=True, text=True).stdout.strip()


@contextlib.contextmanager
def worktree(checkout: Path) -> Iterator[Path]:
    """The commit before the change, in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="same-bits-") as temporary:
        git(checkout, "worktree", "add", "--detach", f"{temporary}/before", COMMIT)
        try:
            yield Path(temporary) / "before"
        finally:
            git(checkout, "worktree", "remove", "--force", f"{temporary}/before")


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What of a run is not as it was, in words."""
    if "failed" in before or "failed" in after:
        return [f"{side} fails: {told['failed']}" for side, told in (("before", before), ("after", after)) if "failed" in told]
    names = before["files"].keys() | after["files"].keys()
    found = [name for name in sorted(names) if before["files"].get(name) != after["files"].get(name)]
    numbers = [name for name, value in before["numbers"].items() if after["numbers"].get(name) != value]
    return found + ([f"{len(numbers)} of {len(before['numbers'])} numbers, such as {numbers[0]}"] if numbers else [])


def compare(names: Sequence[str], before: Path, after: Path | None, keep: Path | None) -> int:
    """Runs the jobs and prints the table; the status of the command. Without ``after`` only fills ``keep``."""
    jobs, faults = table(), 0
    kept: dict[str, Any] = json.loads(keep.read_text(encoding="utf-8")) if keep and keep.is_file() else {}
    clean = not git(before, "status", "--porcelain", "--", "src")  # what is not committed has no name to be kept by
    print(f"{'job':<32} {'before':<12} {'after':<12} result", flush=True)
    with tempfile.TemporaryDirectory(prefix="same-bits-") as temporary:
        inputs = Path(temporary)
        conditions = {
            "commit": git(before, "rev-parse", "HEAD"),
            "inputs": make_inputs(inputs, after or before),
            "threads": THREADS,
            "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
            **{package: importlib.metadata.version(package) for package in ("torch", "transformers")},
        }
        for name in names:
            digest = hashlib.sha256(json.dumps([conditions, jobs[name]], sort_keys=True).encode()).hexdigest()
            key = f"{name} {digest[:16]}"
            was = kept.get(key) if clean else None
            if was is None:
                was = run(name, jobs[name], before, inputs)
                if keep and clean and "failed" not in was:
                    kept[key] = {**was, "conditions": conditions, "job": jobs[name]}
                    keep.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            now = run(name, jobs[name], after, inputs) if after else was
            found, why = differences(was, now), EXPECTED_DIFFERENCES.get(name)
            faults += bool(found) and why is None
            said = f"differs{f' ({why})' if why else ''}: {'; '.join(found)}" if found else "same" if after else "-"
            print(f"{name:<32} {was['hash'][:12]:<12} {now['hash'][:12] if after else '-':<12} {said}", flush=True)
    return 1 if faults else 0


def main() -> int:
    here = Path(__file__).resolve().parent.parent
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--before", type=Path, help=f"checkout before the change; default: a worktree of {COMMIT}")
    arguments.add_argument("--after", type=Path, default=here, help="checkout with the change; default: this one")
    arguments.add_argument("--keep", type=Path, help="a JSON file: what came out before is kept there, and not run again")
    arguments.add_argument("--only", nargs="+", metavar="NAME", help="these jobs alone (a slow one without its mark)")
    arguments.add_argument("--quick", action="store_true", help="leave the slow jobs out")
    arguments.add_argument("--before-only", action="store_true", help="run nothing with the change: fills --keep")
    arguments.add_argument("--list", action="store_true", help="say the names of the jobs, and run nothing")
    given = arguments.parse_args()
    names = [name for name in table() if not (given.quick and "(slow)" in name)]
    if given.only:
        if unknown := set(given.only) - {name.split()[0] for name in names}:
            arguments.error(f"no such job: {', '.join(sorted(unknown))}; --list says which there are")
        names = [name for name in names if name.split()[0] in given.only]
    if given.list:
        print("\n".join(names))
        return 0
    after = None if given.before_only else given.after.resolve()
    with contextlib.nullcontext(given.before.resolve()) if given.before else worktree(here) as before:
        return compare(names, before, after, given.keep)


if __name__ == "__main__":
    sys.exit(main())
