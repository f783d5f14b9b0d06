"""Writes the result of tuning as a PEFT adapter, in addition to the merged model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor, nn

from fedgrove.files import atomic_folder
from fedgrove.models.blocks import Decoder
from fedgrove.models.tensor_files import save_tensors
from fedgrove.report.words import file_name
from fedgrove.stages.tune.factors import Factors
from fedgrove.stages.tune.frozen import hush

if TYPE_CHECKING:  # whoever reads a job need not wait for peft
    from peft import PeftConfig

T = TypeVar("T")


def write_lora(
    out: Path, decoder: Decoder, changes: Mapping[str, Factors], base: str, title: str, pruned: bool, changed: bool
) -> bool:
    """Writes the changes as a LoRA adapter that plain peft loads: float32 factors, ``adapter_config.json`` and a card.

    Each linear keeps the full rank of its change (no approximation), with α = rank, so that peft scales it by 1.

    Args:
        out: the folder; an existing one is replaced.
        changes: by linear; of linears that share a weight, the first.
        base: the model that the job names.
        title: the title of the adapter's card.
        pruned: the model has zeros that the adapter would refill; the card then warns about this.
        changed: earlier stages changed the model, so the adapter does not fit the model that the job names.

    Returns:
        False if all changes have rank 0; then nothing is written.
    """
    hush()
    from peft import LoraConfig

    compressed = {name: factors.compress() for name, factors in changes.items()}
    compressed = {name: factors for name, factors in compressed.items() if factors.rank}
    if not compressed:
        return False
    each = _of_every_use(compressed, decoder)
    pattern = {f"^{name.replace('.', chr(92) + '.')}$": factors.rank for name, factors in each.items()}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        r=1,
        lora_alpha=1,
        target_modules=sorted(each),
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        fan_in_fan_out=not isinstance(decoder.model.get_submodule(next(iter(compressed))), nn.Linear),
        inference_mode=True,
    )
    tensors = {}
    for name, factors in each.items():
        tensors[f"{name}.lora_A.weight"] = factors.a
        tensors[f"{name}.lora_B.weight"] = factors.b
    _write(out, config, tensors, _card(base, title, pruned, changed))
    return True


def write_ia3(out: Path, decoder: Decoder, scales: Mapping[str, Tensor], base: str, title: str, changed: bool) -> bool:
    """Writes (IA)³ scales as an adapter that plain peft loads: every linear's output is multiplied by 1 + s, float32.

    Linears without biases only: peft scales these too. Zeros of a pruned model stay zeros under it.

    Args:
        scales: by linear, (out,) each; of linears that share a weight, the first.
        out, base, title, changed: as in :func:`write_lora`.

    Returns:
        False if there are no scales; then nothing is written.
    """
    hush()
    from peft import IA3Config

    if not scales:
        return False
    each = _of_every_use(scales, decoder)
    config = IA3Config(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        target_modules=sorted(each),
        feedforward_modules=[],
        inference_mode=True,
    )
    tensors = {f"{name}.ia3_l": 1 + scale[:, None] for name, scale in each.items()}
    _write(out, config, tensors, _card(base, title, False, changed))
    return True


def _of_every_use(changes: Mapping[str, T], decoder: Decoder) -> dict[str, T]:
    """Plain peft knows nothing of linears that blocks share: each has the same change."""
    return {
        f"{decoder.prefix}.{block}.{linear}": changes[name]
        for block in range(len(decoder))
        for linear in decoder.block_names(block)
        if (name := decoder.linear_name(block, linear)) in changes
    }


def _write(out: Path, config: PeftConfig, tensors: Mapping[str, Tensor], card: str) -> None:
    """Writes an adapter's folder; tensors by the name of the linear."""
    with atomic_folder(out, replace=True) as partial:
        config.save_pretrained(str(partial))
        named = {f"base_model.model.{name}": value.float().contiguous() for name, value in tensors.items()}
        save_tensors(named, partial / "adapter_model.safetensors", {"format": "pt"})
        (partial / "README.md").write_text(card, encoding="utf-8")
        settings = json.loads((partial / "adapter_config.json").read_text(encoding="utf-8"))
        settings["target_modules"] = sorted(settings["target_modules"])  # peft writes a set: its order is random
        (partial / "adapter_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _card(base: str, title: str, pruned: bool, changed: bool) -> str:
    base = file_name(base)
    if pruned:
        use = (
            "**Do not load this adapter: the result is the merged model.** The model was tuned under the mask of its "
            "pruned weights. A plain adapter adds its unmasked product, which would refill every zero that pruning made. "
            "This folder records the factors before masking."
        )
    elif changed:
        use = "Load it on the model that the stages before tuning produced, not on the base model that the job names."
    else:
        use = f"`PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), DIR)` gives the tuned model."
    return f"---\nlibrary_name: peft\nbase_model: {base}\n---\n# {title}\n\n{use}\n"
