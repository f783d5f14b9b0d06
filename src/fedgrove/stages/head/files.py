"""A head as files: weights in safetensors, what they belong to in JSON, and a card with a loader in plain transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from fedgrove.files import atomic_folder
from fedgrove.models.tensor_files import save_tensors
from fedgrove.report.words import file_name
from fedgrove.stages.head.heads import Linear

CARD = """---
library_name: transformers
pipeline_tag: text-classification
base_model: {base}
---
# {title}

A linear head ({head}) of {number} labels on the hidden states of `{base}`, which stays as it is. transformers' own classes for
classification read the last token and have no bias, so they cannot hold it; this loads it:

```python
import json, torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

about, head = json.load(open("FOLDER/head.json")), load_file("FOLDER/head.safetensors")
tokenizer = AutoTokenizer.from_pretrained("BASE")
model = AutoModel.from_pretrained("BASE", dtype=torch.float32).eval()

def classify(text):
    ids = tokenizer(text, truncation=True, max_length=about["length"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    x = torch.cat([states[layer][0]{pooled} for layer in about["layers"]])
    return about["labels"][int((head["weight"] @ x + head["bias"]).argmax())]
```

`text` is a record as the key `prompt` of the job writes it.
"""
POOLED = {"mean": ".mean(0)", "last": "[-1]"}


class About(Protocol):
    """The settings of a head, of a request or a job."""

    @property
    def head(self) -> str: ...
    @property
    def layers(self) -> tuple[int, ...]: ...
    @property
    def pool(self) -> str: ...
    @property
    def length(self) -> int: ...


def write_head(
    folder: Path, about: About, linear: Linear, labels: Sequence[str], frequencies: Tensor, base: str, title: str
) -> None:
    """Writes ``head.safetensors``, ``head.json`` and ``README.md``; an existing folder is replaced.

    Args:
        linear: for hidden states.
        labels: of its rows.
        frequencies: of the labels, that the head assumes.
        base: the model that the job names.
        title: of the card.
    """
    facts = {
        "base_model": file_name(base), "head": about.head, "labels": list(labels), "frequencies": frequencies.tolist(),
        "layers": list(about.layers), "pool": about.pool, "length": about.length,
    }  # fmt: skip
    with atomic_folder(folder, replace=True) as partial:
        tensors = {"weight": linear.weight.float().contiguous(), "bias": linear.bias.float().contiguous()}
        save_tensors(tensors, partial / "head.safetensors", {"format": "pt"})
        (partial / "head.json").write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        card = CARD.format(base=file_name(base), title=title, head=about.head, number=len(labels), pooled=POOLED[about.pool])
        (partial / "README.md").write_text(card, encoding="utf-8")
