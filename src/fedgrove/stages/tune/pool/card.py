"""What a pool says of itself: ``pool.json`` for programs, a README for people."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedgrove.job.tables import Job
from fedgrove.report.words import file_name, plural

FACTS, GATE = "pool.json", "gate.safetensors"  # files of a pool
README = """---
library_name: peft
base_model: {base}
---
# {title}

{members} of one model, and a gate ("{gate}") that says how much of each a text gets. `member-K.safetensors` has what
member K has for itself, so that a weighted sum of members is again one adapter: of LoRA the B, with every scale multiplied in,
while all share the A in `common.safetensors`; of (IA)³ all scales, as the difference from one.

Members by the windows of text that they were trained on: {windows}.

For an owner who was not there, `fedgrove adopt RUN --data new.jsonl --out mine` finds weights and writes one adapter that plain
peft loads. `fedgrove gate RUN --data texts.jsonl` shows the weights of each text.
"""


def write_card(folder: Path, facts: Mapping[str, Any], job: Job) -> None:
    """Writes both files into a pool's folder."""
    base = file_name(job.model.name)  # not its folder, which may be private
    facts = {**facts, "model": base}
    (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    text = README.format(
        base=base,
        title=f"{job.name}: pool",
        members=plural(facts["members"], "adapter"),
        gate=facts["pool"]["gate"],
        windows=", ".join(f"{number:,}" for number in facts["windows"]),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
