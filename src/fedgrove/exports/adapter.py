"""The result of tuning as a LoRA adapter for peft, to be loaded on the job's base model.

Only for models that were not pruned: peft adds the full product of the factors, which would overwrite pruned weights.
"""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedgrove.errors import FedgroveError
from fedgrove.exports import Source
from fedgrove.models.files import CONFIG, find_model, small_contents
from fedgrove.models.perplexity import nll_of_logits
from fedgrove.models.pretrained import load_full_model
from fedgrove.models.stream import Checkpoint
from fedgrove.report.words import file_name
from fedgrove.stages.tune.frozen import hush

WHAT = "LoRA adapter for peft, to be loaded on the base model"
EXACT = True
RELATION, LIBRARY = "adapter", "peft"
USE = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("BASE")
model, tokenizer = PeftModel.from_pretrained(base, "FOLDER"), AutoTokenizer.from_pretrained("FOLDER")
```"""
FOLDER = "peft"  # not "adapter": RUN/adapter is written by the run
MAX_ZEROS = 0.001  # the fraction up to which a linear counts as not pruned


def write(source: Source, out: Path) -> None:
    """Copies the run's adapter and the tokenizer.

    Raises:
        FedgroveError: the source is no run, no stage trained adapters, or the model was pruned.
    """
    if source.run is None:
        raise FedgroveError("--to adapter: a model directory does not show what tuning changed", "give the run folder")
    adapter = source.run / "adapter"
    if not (adapter / "adapter_config.json").is_file():
        raise FedgroveError(f"--to adapter: no stage of {source.run} trained adapters", "export --to hf gives the full model")
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    checkpoint = Checkpoint(source.model)
    for linear in config["target_modules"]:
        name = f"{linear}.weight"
        if name in checkpoint and float((checkpoint.read(name) == 0).double().mean()) > MAX_ZEROS:
            raise FedgroveError(
                f"--to adapter: {linear} was pruned, and an adapter would refill its zeros", "--to hf gives the merged model"
            )
    config["base_model_name_or_path"] = file_name(_base(source)["path"])
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    shutil.copyfile(adapter / "adapter_model.safetensors", out / "adapter_model.safetensors")
    for name, content in small_contents(source.model).items():
        if name not in (CONFIG, "generation_config.json"):
            (out / name).write_bytes(content)


def losses(source: Source, folder: Path, windows: Sequence[Tensor]) -> tuple[float, int]:
    """Computed by peft, on the job's base model."""
    hush()
    from peft import PeftModel

    base_model = _base(source)
    base = load_full_model(find_model(base_model["path"], base_model.get("revision")), dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(folder)).eval()
    return nll_of_logits(lambda ids: model(input_ids=ids).logits, windows)


def _base(source: Source) -> dict[str, Any]:
    assert source.run is not None
    job = tomllib.loads((source.run / "job.toml").read_text(encoding="utf-8"))
    model: dict[str, Any] = job["model"]
    return model
