"""The model card: README.md of a result in the Hugging Face form, from the files of the run folder."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedgrove.report.words import change, file_name, method, plural

USE = "## How to use it"
QUANTISED = ("gguf", "int8", "nf4")


def card(run: Path, base_card: str | None, use: str) -> str:
    """What was done, on whose text, how good it is, what is protected, how to use it; then the card of the base model.

    Args:
        run: the run folder; its model need not be there yet.
        base_card: README.md of the model that the job began with.
        use: Markdown; ``FOLDER`` in it stands for the model's folder.
    """
    from huggingface_hub import EvalResult, ModelCardData

    job = tomllib.loads((run / "job.toml").read_text(encoding="utf-8"))
    base = _read(base_card or "")
    dense, after = _perplexities(run, len(job["stages"]) - 1)
    about: dict[str, Any] = base.data.to_dict()
    for key in ("base_model", "base_model_relation", "model-index", "model_name"):
        about.pop(key, None)
    kinds = {stage["kind"] for stage in job["stages"]}
    tags = [*(about.pop("tags", None) or []), "fedgrove", "federated-learning"]
    tags += ["pruned", "sparse"] if "prune" in kinds else []
    about = {"library_name": "transformers", "pipeline_tag": "text-generation", **about}
    results = [EvalResult("text-generation", text, text, "perplexity", round(value, 3)) for text, value in after.items()]
    data = ModelCardData(
        base_model=file_name(job["model"]["path"]),
        base_model_relation="finetune",
        tags=list(dict.fromkeys(tags)),
        model_name=job["name"] if results else None,
        eval_results=results or None,
        **about,
    )
    owners = [client["name"] for client in job.get("clients", [])]
    parts = [
        f"# {job['name']}",
        f"Made from `{file_name(job['model']['path'])}` with fedgrove by "
        f"{plural(len(owners), 'owner')} of text together ({', '.join(owners)}); no text left its owner.",
        "## What was done",
        "\n".join(f"{number}. {_done(stage)}" for number, stage in enumerate(job["stages"], 1)),
    ]
    if "structured" in kinds:
        parts.append("Its blocks are narrower than those of the base model, all alike; `config.json` says how wide.")
    if "prune" in kinds:
        parts.append("Pruned weights are exact zeros in dense tensors: whatever loads the base model loads this one.")
    parts += ["## Quality", _quality(dense, after, job), "## Privacy", privacy(job, run), USE, use]
    parts.append("Check what it writes before anybody relies on it: it was measured on the texts above and on nothing else.")
    text = (base.text or "").strip()
    if text:
        parts += ["## The card of the model that it came from", text]
    return f"---\n{data.to_yaml()}\n---\n" + "\n\n".join(parts) + "\n"


def card_of_form(model: Path, form: str, use: str, run: Path | None, folder: str) -> str:
    """The card of a model for another form of it: the same, but for how it is used and what it is on the hub.

    Args:
        model: the model's directory.
        form: what it became.
        use: Markdown of that form.
        run: the run folder, if there is one.
        folder: the name of the folder.
    """
    file = model / "README.md"
    card = _read(file.read_text(encoding="utf-8") if file.is_file() else f"# {model.name}\n")
    about: Any = card.data
    base = str(about.get("base_model") or file_name(str(model.resolve())))
    about.base_model_relation = "quantized" if form in QUANTISED else "adapter" if form == "adapter" else "finetune"
    about.library_name = "peft" if form == "adapter" else about.get("library_name")
    about.tags = list(dict.fromkeys([*(about.get("tags") or []), form]))
    use = use.replace("FOLDER", folder).replace("BASE", base)
    section = rf"(?ms)^{USE}\n.*?(?=^Check what it writes|^## |\Z)"
    text, found = re.subn(section, lambda _: f"{USE}\n\n{use}\n\n", card.text, count=1)
    if not found:
        text = f"{card.text.strip()}\n\n{USE}\n\n{use}\n"
    return f"---\n{card.data.to_yaml()}\n---\n{text.lstrip()}"


def privacy(job: Mapping[str, Any], run: Path | None = None) -> str:
    """What whoever ran the server could see, in two or three sentences, and what the plans promise."""
    says = ["No text and no tokens left their owner; what did leave was computed from text."]
    if job.get("privacy", {}).get("secure_aggregation"):
        says.append("Secure aggregation hid each owner's numbers: whoever ran the server saw their sums.")
    else:
        says.append("Whoever ran the server could see what each owner sent.")
    notes = [note for file in sorted(run.glob("plan-*.json")) for note in _json(file).get("notes", ())] if run else []
    noisy = any(stage.get("epsilon") is not None for stage in job["stages"])
    if not noisy:
        says.append("No noise was added: nothing here is a proof of differential privacy, and a model can repeat what it saw.")
    return " ".join(says) + "".join(f"\n\n{note}" for note in notes)


def _read(text: str) -> Any:
    from huggingface_hub import ModelCard

    front = "" if text.startswith("---\n") else "---\nlibrary_name: transformers\n---\n"
    return ModelCard(front + text, ignore_metadata_errors=True)


def _done(stage: Mapping[str, Any]) -> str:
    if stage["kind"] == "prune":
        how = f"{stage['samples']} windows of {stage['length']} tokens from each owner, rounds: {stage['rounds']}"
    elif stage["kind"] == "structured":
        how = f"{stage['samples']} windows of {stage['length']} tokens from each owner"
    else:
        how = f"{stage.get('rounds')} rounds of {stage.get('steps')} steps; merged into the weights"
    return f"{method(stage)}; {how}"


def _quality(dense: Mapping[str, float], after: Mapping[str, float], job: Mapping[str, Any]) -> str:
    if not after:
        return "Not measured: the job named no held-out text."
    rows = [f"| {text} | {dense[text]:.2f} | {after[text]:.2f} | {change(after[text] / dense[text])} |" for text in after]
    length = job.get("evaluate", {}).get("length", 512)
    head = "| held-out text | base model | this model | |\n|---|---|---|---|\n"
    return f"Perplexity per token, windows of {length} tokens; lower is better.\n\n{head}" + "\n".join(rows)


def _perplexities(run: Path, last: int) -> tuple[dict[str, float], dict[str, float]]:
    dense: dict[str, float] = {}
    after: dict[str, float] = {}
    for text in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines() if (run / "metrics.jsonl").is_file() else ():
        line = json.loads(text)
        if line["client"] is None and line["round"] is None and line["name"].startswith("perplexity/"):
            values = dense if line["stage"] is None else after if line["stage"] == last else {}
            values[line["name"].removeprefix("perplexity/")] = line["value"]
    return dense, {text: value for text, value in after.items() if text in dense}


def _json(file: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return value
