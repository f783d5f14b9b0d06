"""A quarter of every block's channels and heads cut out: bytes, tokens per second, and what perplexity says.

    .venv/bin/python bench/structured.py speed --write
    .venv/bin/python bench/structured.py quality --data ../shared/data --write
    .venv/bin/python bench/structured.py cuts --data ../shared/data --shares 0.15 0.25 0.4 --seeds 0 1 2
    .venv/bin/python bench/structured.py cuts --data ../shared/data --shares 0.15 0.25 0.4 --seeds 0 --tuned

``speed`` cuts a Llama of random weights, large enough that blocks and not embeddings matter, in a job of two clients, and times
both models in plain transformers on the CPU, in turn. ``quality`` cuts and tunes the shipped model with the eight owners of
bench/owners.py. ``cuts`` compares, for any model (``--model``), channels and heads cut, the same repaired, the same fraction of
the blocks, and scores, two controls among them; with ``--tuned``, before and after the same short tuning. The results of both
are kept in bench/structured.jsonl and not measured again; delete a line to measure it again.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import owners
import page
import torch
from arguments import existing_folder
from results import Kept
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import fedgrove.run
import fedgrove.stages.structured.exchanges.scores as exchange
import fedgrove.stages.structured.scores
from fedgrove import api, plugins
from fedgrove.job.tables import Job
from fedgrove.models.blocks import Decoder
from fedgrove.models.stream import Checkpoint
from fedgrove.models.width import width_of
from fedgrove.report.paired import Examples, ratio_interval
from fedgrove.report.summary import Summary
from fedgrove.rounds.request import Response
from fedgrove.runfolder import RunFolder
from fedgrove.stages.structured.exchanges.inputs import SumInputs

GROVE = Path(api.__file__).parent / "demo" / "grove-6m"
RESULTS = Path(__file__).with_suffix(".jsonl")
SHAPE = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16, "num_attention_heads": 16,
    "num_key_value_heads": 8, "vocab_size": 16000, "max_position_embeddings": 1024, "tie_word_embeddings": True,
}  # fmt: skip
PROMPT, NEW = 256, 32
TUNE = {
    "kind": "tune", "method": "lora", "rounds": 3, "steps": 3, "length": 256, "batches": [2], "ranks": [16], "bits": [32],
    "learning_rate": 4e-3, "precision": "float32",
}  # fmt: skip
SHORT = {
    **TUNE,
    "rounds": 1,
    "steps": 4,
    "batches": [1],
    "learning_rate": 1e-3,
    "lr_schedule": "linear",
}  # of cuts
ROWS: dict[str, dict[str, Any] | None] = {
    "as it came": None,
    "cut together, fisher": {"score": "fisher", "repair": False},
    "cut at random": {"score": "chance", "repair": False},
    "cut together, taylor (LLM-Pruner, vector-wise)": {"score": "taylor", "repair": False},
    "cut together, fisher, repaired": {"score": "fisher"},
}
CUTS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {  # the keys that get the fraction, and others
    "cut": (("channels", "heads"), {"repair": False, "score": "fisher"}),
    "repaired": (("channels", "heads"), {"score": "fisher"}),
    "taylor": (("channels", "heads"), {"repair": False, "score": "taylor"}),
    "diagonal_fisher": (("channels", "heads"), {"repair": False, "score": "diagonal_fisher"}),
    "weights": (("channels", "heads"), {"repair": False, "score": "weights"}),
    "chance": (("channels", "heads"), {"repair": False, "score": "chance"}),
    "taylor, repaired": (("channels", "heads"), {"score": "taylor"}),
    "diagonal_fisher, repaired": (("channels", "heads"), {"score": "diagonal_fisher"}),
    "weights, repaired": (("channels", "heads"), {"score": "weights"}),
    "chance, repaired": (("channels", "heads"), {"score": "chance"}),
    "fewer blocks": (("depth",), {}),
    "fewer blocks, contiguous": (("depth",), {"contiguous": True}),
}
ALONE = "cut alone, fisher, mean of the eight models"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("part", choices=["speed", "quality", "cuts"])
    arguments.add_argument("--data", type=existing_folder, help="the folder with the owners' texts, for quality and cuts")
    arguments.add_argument("--share", type=float, default=0.25, help="of channels and of heads that goes")
    arguments.add_argument("--models", type=Path, help="a folder for speed's two models, which are made if they are not there")
    arguments.add_argument("--repeats", type=int, default=7)
    arguments.add_argument("--windows", type=int, default=2, help="held-out windows of 512 tokens of each owner")
    arguments.add_argument("--model", type=existing_folder, default=GROVE, help="for cuts")
    arguments.add_argument("--shares", type=float, nargs="+", default=[0.15, 0.25, 0.4], help="for cuts")
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="for cuts")
    arguments.add_argument("--owners", type=int, default=len(owners.OWNERS), help="how many of them, for cuts")
    arguments.add_argument("--samples", type=int, default=8, help="windows that each owner calibrates on, for cuts")
    arguments.add_argument("--length", type=int, default=512, help="tokens of these windows and of held-out ones, for cuts")
    arguments.add_argument("--rows", nargs="+", choices=CUTS, default=list(CUTS), help="for cuts")
    arguments.add_argument("--tuned", action="store_true", help="tune each model after the cut, for cuts")
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments.add_argument(
        "--kept", action="store_true", help="measure nothing: the table of what bench/structured.jsonl holds"
    )
    arguments.add_argument("--page", help="the name of the place in docs/benchmarks.md; default: structured-PART")
    arguments.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    fedgrove.stages.structured.scores.__path__.append(str(Path(__file__).parent / "controls"))
    plugins.load("stages.structured.scores", "weights").install()
    remember()
    with tempfile.TemporaryDirectory() as folder:
        text = {"speed": speed, "quality": quality, "cuts": cuts}[given.part](given, Path(folder))
    print(text)
    if given.write:
        page.write(given.page or f"structured-{given.part}", text)


def speed(given: Any, folder: Path) -> str:
    """The table of bytes and tokens per second."""
    folder = given.models or folder
    models = {"dense": folder / "dense", "cut": folder / "run" / "model"}
    if not models["cut"].is_dir():
        make_models(models["dense"], given.share, folder)
    loaded = {name: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for name, path in models.items()}
    seconds = seconds_of(loaded, given.repeats)
    lines = ["| | dense | cut | ratio |", "|---|---|---|---|"]

    def line(what: str, form: str, dense: float, cut: float) -> None:
        lines.append(f"| {what} | {form.format(dense)} | {form.format(cut)} | {cut / dense:.2f} |")

    weights = [sum(parameter.numel() for parameter in net.parameters()) / 1e6 for net in loaded.values()]
    line("weights, millions", "{:.0f}", *weights)
    sizes = [sum(file.stat().st_size for file in path.glob("*.safetensors")) / 1e6 for path in models.values()]
    line("MB on disk (bfloat16)", "{:.0f}", *sizes)
    for what, key, tokens in ((f"tokens/s, reading {PROMPT}", "read", PROMPT), (f"tokens/s, writing {NEW} more", "write", NEW)):
        line(what, "{:.1f}", *(tokens / statistics.median(seconds[name][key]) for name in loaded))
    return "\n".join(lines)


def seconds_of(models: dict[str, Any], repeats: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of every repeat, by model: to "read" a prompt of 256 tokens, and to "write" 32 more; models take turns."""
    vocabulary = min(model.config.vocab_size for model in models.values())
    prompt = torch.randint(vocabulary, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    seconds: dict[str, dict[str, list[float]]] = {name: {"read": [], "write": []} for name in models}
    with torch.no_grad():
        for attempt in range(repeats + 1):  # the first warms up
            for name, net in models.items():
                began = time.perf_counter()
                cache = net(prompt, use_cache=True).past_key_values
                read_in = time.perf_counter()
                token = prompt[:, -1:]
                for _ in range(NEW):
                    out = net(token, past_key_values=cache, use_cache=True)
                    token = out.logits[:, -1:].argmax(-1)
                ended = time.perf_counter()
                if attempt:
                    seconds[name]["read"].append(read_in - began)
                    seconds[name]["write"].append(ended - read_in)
    return seconds


def make_models(dense: Path, share: float, folder: Path) -> None:
    """A Llama of random weights, and what a job makes of it."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16).save_pretrained(dense)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (dense / name).write_bytes((GROVE / name).read_bytes())
    texts = GROVE.parent / "texts"
    clients = [{"name": name, "data": str(texts / f"{name}.txt")} for name in ("publisher", "theatre")]
    stage = {"kind": "structured", "channels": share, "heads": share, "samples": 1, "length": 128}
    carry_out(str(dense), clients, [stage], {}, folder / "run")


def quality(given: Any, folder: Path) -> str:
    """The table of perplexities."""
    files = dict(owners.plain_files(given.data, folder))
    kept = Kept(RESULTS, GROVE, only=given.kept)
    clients = [{"name": owner, "data": str(files[owner])} for owner in owners.OWNERS]
    evaluate = {
        "data": [{"name": owner, "path": str(files[f"{owner}-heldout"])} for owner in owners.OWNERS],
        "windows": given.windows,
    }
    structured = {"kind": "structured", "channels": given.share, "heads": given.share, "samples": 4}

    def tuned(changes: dict[str, Any] | None) -> list[float]:
        """Perplexity before tuning and after it."""
        summary = run([TUNE] if changes is None else [{**structured, **changes}, TUNE], evaluate)
        before = summary.dense if changes is None else summary.after[0]
        return [summary.mean(before), summary.mean(summary.federated)]

    def alone() -> list[float]:
        """The mean of the models that the owners cut each alone; they are not tuned."""
        return [run([{**structured, **ROWS["cut together, fisher"]}], {**evaluate, "alone": True}).alone_mean or math.nan]

    def run(stages: list[dict[str, Any]], evaluate: dict[str, Any]) -> Summary:
        out = Path(tempfile.mkdtemp(dir=folder)) / "run"
        return carry_out(str(GROVE), clients, stages, evaluate, out)

    lines = ["| | before tuning | tuned |", "|---|---|---|"]
    rows: dict[str, Callable[[], list[float]]] = {name: partial(tuned, changes) for name, changes in ROWS.items()}
    for name, measure in {**rows, ALONE: alone}.items():
        if found := kept(measure, row=name, share=given.share, windows=given.windows):
            lines.append(f"| {name} | {found[0]:.1f} | {f'{found[1]:.1f}' if len(found) > 1 else '–'} |")
    return "\n".join(lines)


def cuts(given: Any, folder: Path) -> str:
    """The table of losses of cut models, and of how much of what a cut costs its repair undoes."""
    files = dict(owners.plain_files(given.data, folder))
    kept = Kept(RESULTS, given.model, only=given.kept)
    names = list(owners.OWNERS)[: given.owners]
    clients = [{"name": owner, "data": str(files[owner])} for owner in names]
    data = [{"name": owner, "path": str(files[f"{owner}-heldout"])} for owner in names]
    evaluate = {"data": data, "windows": given.windows, "length": given.length}

    config = Checkpoint(given.model).config
    numbers = {**asdict(width_of(config)), "depth": config.num_hidden_layers}

    def cut_of(row: str, share: float) -> dict[str, Any]:
        """The keys of the stage; empty if the fraction is less than one of everything."""
        keys, others = CUTS[row]
        found = {key: share for key in keys if share * numbers[key] >= 1}
        return {**dict.fromkeys(keys, 0.0), **found, **others} if found else {}

    def losses(share: float, seed: int, row: str) -> dict[str, Any]:
        """The mean loss before and after the cut, and with ``--tuned`` after the tuning; and each window's after the cut."""
        stage = {"kind": "structured", "samples": given.samples, "length": given.length, **cut_of(row, share)}
        out = Path(tempfile.mkdtemp(dir=folder)) / "run"
        stages = [stage, SHORT] if given.tuned else [stage]
        summary = carry_out(str(given.model), clients, stages, evaluate, out, seed)
        perplexities = (
            [summary.dense, summary.after[0], summary.federated] if given.tuned else [summary.dense, summary.federated]
        )
        every = [math.log(summary.mean(one)) for one in perplexities]
        return {"losses": every, "windows": owners.losses(summary, 0, None)}

    head, rule = (
        "| fraction | row | loss before | after, by seed | mean | over fisher | undone, by seed |",
        "|---|" + "---|" * 6,
    )
    lines = [head + " tuned |", rule + "---|"] if given.tuned else [head, rule]
    settings = {key: getattr(given, key) for key in ("owners", "samples", "length", "windows")}
    if given.tuned:
        settings |= {"tuned": True, "bits": SHORT["bits"]}
    for share in given.shares:
        found: dict[str, list[dict[str, Any]]] = {}
        for row in given.rows:
            if not cut_of(row, share):
                continue
            every = [
                kept(partial(losses, share, seed, row), row=row, share=share, seed=seed, **settings) for seed in given.seeds
            ]
            if None in every:
                continue
            found[row] = every
            cut, repaired = found.get(row.removesuffix(", repaired") if row != "repaired" else "cut"), every
            undone = ", ".join(map(undone_of, cut, repaired)) if cut and cut is not repaired else "–"
            fisher = found.get("repaired" if row.endswith("repaired") else "cut")
            over = over_base(every, fisher, given.length) if fisher and fisher is not every else "–"
            columns = [by_seed(every, 1), f"{statistics.mean(one['losses'][1] for one in every):.3f}", over, undone]
            if given.tuned:
                columns.append(by_seed(every, 2))
            lines.append(f"| {share:g} | {row} | {every[0]['losses'][0]:.3f} | {' | '.join(columns)} |")
    return "\n".join(lines)


def undone_of(cut: dict[str, Any], repaired: dict[str, Any]) -> str:
    """How much of what a cut cost its repair took back."""
    before, after, mended = cut["losses"][0], cut["losses"][1], repaired["losses"][1]
    return f"{(after - mended) / (after - before):.0%}" if after > before else "no loss"


def over_base(every: list[dict[str, Any]], base: list[dict[str, Any]], length: int) -> str:
    """The mean loss less that of the base row, with its 95 % interval over held-out windows if these were kept."""
    less = statistics.mean(one["losses"][1] for one in every) - statistics.mean(one["losses"][1] for one in base)
    between = ratio_interval(examples(every, length), examples(base, length), list(every[0].get("windows", ())))
    return f"{less:+.3f}" + (f" [{math.log(between[0]):+.3f}, {math.log(between[1]):+.3f}]" if between else "")


def examples(results: list[dict[str, Any]], length: int) -> list[Examples]:
    """(loss, tokens) of each held-out window, by owner, of each result that has them."""
    return [owners.examples(one["windows"], length) for one in results if "windows" in one]


def by_seed(results: list[dict[str, Any]], column: int) -> str:
    """One loss of every seed."""
    return ", ".join(f"{one['losses'][column]:.3f}" for one in results)


def remember() -> None:
    """Keeps what is measured in the dense model for other rows: its losses, gradients, and sums of inputs for the repair."""
    measure, products = exchange.group_products, {}
    respond, sums = SumInputs.respond, {}
    examine, losses = fedgrove.run.evaluate, {}

    def evaluate(model: Checkpoint, stage: int | None, run: RunFolder, device: str) -> None:
        key = str(model.path), run.job.evaluate.model_dump_json()
        if stage is None and key in losses:
            for line in losses[key]:
                run.log(None, None, None, line["name"], line["value"])
            return
        examine(model, stage, run, device)
        losses.setdefault(key, [line for line in run.metrics() if line["stage"] is None])

    def group_products(decoder: Decoder, ids: torch.Tensor, store: Any, of_weights: Any = None) -> Iterator[Any]:
        score = of_weights and of_weights.__module__
        key = str(decoder.checkpoint.path), score, hashlib.sha256(ids.numpy().tobytes()).hexdigest()
        if key not in products:
            products[key] = list(measure(decoder, ids, store, of_weights))
        return iter(products[key])

    def remembered(request: SumInputs, tensors: Any, client: Any, device: str) -> Any:
        key = str(client.model), client.name, request.block, request.calibration.model_dump_json(), tuple(request.widths)
        if key not in sums:
            sums[key] = respond(request, tensors, client, device)
        found = sums[key]
        copies = {name: tensor.clone() for name, tensor in found.tensors.items()}  # the aggregator adds in place
        return Response(copies, found.reply)

    fedgrove.run.evaluate = evaluate
    exchange.group_products = group_products
    SumInputs.respond = remembered  # type: ignore[method-assign]


def carry_out(
    model: str, clients: list[dict[str, Any]], stages: list[dict[str, Any]], evaluate: dict[str, Any], out: Path, seed: int = 0
) -> Summary:
    """Runs a job into a run folder, and says what came of it."""
    stages_and_text = {"clients": clients, "stages": stages, "evaluate": evaluate}
    job = Job.model_validate({"name": "structured", "seed": seed, "model": {"path": model}, **stages_and_text})
    return api.run(job, out, quiet=True).summary


if __name__ == "__main__":
    main()
