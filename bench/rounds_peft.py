"""The plain loop of rounds.py: what a user would write with transformers and peft to average adapters of several clients.

python bench/rounds_peft.py MODEL BATCHES.json ROUNDS THREADS BITS OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def adapted(model: str, bits: int) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32 if bits == 32 else torch.bfloat16, local_files_only=True
    )
    return get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")).eval()


def train(net: Any, batches: list[list[list[int]]]) -> None:
    """Some steps of AdamW."""
    import torch

    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    for batch in batches:
        ids = torch.tensor(batch)
        net(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def main(model: str, batches: str, rounds: str, threads: str, bits: str, out: str) -> None:
    import torch
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    torch.set_num_threads(int(threads))
    net = adapted(model, int(bits))
    clients = json.loads(Path(batches).read_text())
    steps = len(next(iter(clients.values()))) // int(rounds)
    for number in range(int(rounds)):
        before = {name: value.clone() for name, value in get_peft_model_state_dict(net).items()}
        mean = {name: torch.zeros_like(value) for name, value in before.items()}
        for text in clients.values():
            set_peft_model_state_dict(net, before)
            train(net, text[number * steps : (number + 1) * steps])
            for name, value in get_peft_model_state_dict(net).items():
                mean[name] += value.detach() / len(clients)
        set_peft_model_state_dict(net, mean)
    net.save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
