"""The model card: README.md of a result in Hugging Face format, from the files of the run folder."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedgrove.report.disclosures import noisy, what_left, where_text_went
from fedgrove.report.reader import read_job, read_perplexities, read_stages
from fedgrove.report.stage_reports import report_of
from fedgrove.report.summary import Stage
from fedgrove.report.words import capitalized, change, file_name, plural

USE = "## How to use it"


def card(run: Path, base_card: str | None, use: str) -> str:
    """The card: stages, clients, quality, privacy, and how to use the model; then the card of the base model.

    Args:
        run: the run folder; its model need not exist yet.
        base_card: README.md of the base model.
        use: Markdown that explains how to use the model.
    """
    from huggingface_hub import EvalResult, ModelCardData  # slow to import, and the report does not need it

    job = read_job(run)
    stages = read_stages(run, job)
    base = _read(base_card or "")
    measured = read_perplexities(run)
    dense = measured.get((None, None), {})
    after = {text: value for text, value in measured.get((len(stages) - 1, None), {}).items() if text in dense}
    about: dict[str, Any] = base.data.to_dict()
    for key in ("base_model", "base_model_relation", "model-index", "model_name"):
        about.pop(key, None)
    tags = [*(about.pop("tags", None) or []), "fedgrove", "federated-learning"]
    tags += [tag for stage in stages for tag in report_of(stage.kind).TAGS]
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
        f"{plural(len(owners), 'owner')} of text together ({', '.join(owners)}); {where_text_went(stages)}.",
        "## What was done",
        "\n".join(f"{number}. {_done(stage)}" for number, stage in enumerate(stages, 1)),
        *dict.fromkeys(filter(None, (report_of(stage.kind).CARD for stage in stages))),
        "## Quality",
        _quality(dense, after, job),
        "## Privacy",
        "\n\n".join(privacy(job, stages)),
        USE,
        use,
        "Check what it writes before you rely on it: it was measured only on the texts above.",
    ]
    text = (base.text or "").strip()
    if text:
        parts += ["## The card of the base model", text]
    return f"---\n{data.to_yaml()}\n---\n" + "\n\n".join(parts) + "\n"


def card_of_form(model: Path, form: str, use: str, folder: str, relation: str = "finetune", library: str | None = None) -> str:
    """The card of an export: the model's card with other instructions for use, metadata and tags.

    Args:
        model: the model's directory.
        form: the name of the export's format.
        use: Markdown that explains how to use that format; ``FOLDER`` and ``BASE`` in it are replaced.
        folder: the name of the export's folder.
        relation: the relation to the base model, in the hub's terms.
        library: the library that loads the export; None: that of the model's card.
    """
    file = model / "README.md"
    card = _read(file.read_text(encoding="utf-8", errors="replace") if file.is_file() else f"# {model.name}\n")
    about: Any = card.data
    base = str(about.get("base_model") or file_name(str(model.resolve())))
    about.base_model_relation = relation
    about.library_name = library or about.get("library_name")
    about.tags = list(dict.fromkeys([*(about.get("tags") or []), form]))
    use = use.replace("FOLDER", folder).replace("BASE", base)
    section = rf"(?ms)^{USE}\n.*?(?=^Check what it writes|^## |\Z)"
    text, number = re.subn(section, lambda _: f"{USE}\n\n{use}\n\n", card.text, count=1)
    if not number:
        text = f"{card.text.strip()}\n\n{USE}\n\n{use}\n"
    return f"---\n{card.data.to_yaml()}\n---\n{text.lstrip()}"


def privacy(job: Mapping[str, Any], stages: Sequence[Stage]) -> list[str]:
    """Paragraphs about what left a client and who could see it, and the plans' notes."""
    notes = [note for stage in stages for note in stage.plan.get("notes", ())]
    repeats = [] if all(map(noisy, stages)) else ["A model can repeat text that it was trained or calibrated on."]
    return [*what_left(job, stages), *repeats, *notes]


def _read(text: str) -> Any:
    from huggingface_hub import ModelCard  # slow to import

    front = "" if text.startswith("---\n") else "---\nlibrary_name: transformers\n---\n"
    return ModelCard(front + text, ignore_metadata_errors=True)


def _done(stage: Stage) -> str:
    report = report_of(stage.kind)
    recipe = report.recipe(stage.config)
    return capitalized(report.describe(stage.config)) + (f"; {recipe}" if recipe else "")


def _quality(dense: Mapping[str, float], after: Mapping[str, float], job: Mapping[str, Any]) -> str:
    if not after:
        return "Not measured: the job named no held-out text."
    rows = [f"| {text} | {dense[text]:.2f} | {after[text]:.2f} | {change(after[text] / dense[text])} |" for text in after]
    length = job.get("evaluate", {}).get("length", 512)
    head = "| held-out text | base model | this model | |\n|---|---|---|---|\n"
    return f"Perplexity per token, windows of {length} tokens; lower is better.\n\n{head}" + "\n".join(rows)
