"""Half of the experts of a trained mixture cut out: by REAP, by how often they are used, and at random.

    .venv/bin/python bench/experts.py --data ../shared/data --write

A mixture of experts is made of the shipped model: each block's feed-forward part is copied eight times with a little noise, a
router chooses two of the copies for each token, and all is trained on the text of three owners. One mixture is made for each
seed. Then the three owners cut it in a job. The results are kept in bench/experts.jsonl and not measured again; delete a line
to measure it again.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import owners
import page
import torch
from arguments import existing_folder
from results import Kept
from structured import GROVE, carry_out
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM
from transformers.utils import logging

import fedgrove.stages.structured.expert_scores
from fedgrove.data.sources import read_texts

RESULTS = Path(__file__).with_suffix(".jsonl")
OWNERS = ("medquad", "shakespeare", "e2e")
EXPERTS, PER_TOKEN = 8, 2
BATCH, LENGTH = 4, 256
ROWS = {"REAP": "reap", "frequency": "frequency", "at random": "drawn"}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", type=existing_folder, required=True, help="the folder with the owners' texts")
    arguments.add_argument("--steps", type=int, default=100, help="of training the mixture, 4 × 256 tokens each")
    arguments.add_argument("--noise", type=float, default=0.1, help="of the copies, as a fraction of the weights' deviation")
    arguments.add_argument("--shares", type=float, nargs="+", default=[0.5], help="of the experts that goes")
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--samples", type=int, default=8, help="windows of 256 tokens that each owner calibrates on")
    arguments.add_argument("--windows", type=int, default=8, help="held-out windows of 256 tokens of each owner")
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments.add_argument("--kept", action="store_true", help="measure nothing: the table of what bench/experts.jsonl holds")
    arguments.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    fedgrove.stages.structured.expert_scores.__path__.append(str(Path(__file__).parent / "controls"))
    with tempfile.TemporaryDirectory() as folder:
        text = cuts(given, Path(folder))
    print(text)
    if given.write:
        page.write("experts", text)


def cuts(given: Any, folder: Path) -> str:
    """The table of held-out losses, the mean over the owners' texts."""
    files = dict(owners.plain_files(given.data, folder))
    kept = Kept(RESULTS, GROVE, only=given.kept)
    clients = [{"name": owner, "data": str(files[owner])} for owner in OWNERS]
    data = [{"name": owner, "path": str(files[f"{owner}-heldout"])} for owner in OWNERS]
    evaluate = {"data": data, "windows": given.windows, "length": LENGTH}

    def losses(seed: int, share: float, score: str) -> list[float]:
        """The loss of the mixture, without the experts that this score cuts, and the part of the router's choices cut."""
        model = folder / f"mixture-{seed}"
        if not model.is_dir():
            mixture = upcycled(given.noise, seed)
            train(mixture, [files[owner] for owner in OWNERS], given.steps, seed)
            save(mixture, model)
        cut = {"kind": "structured", "experts": share, "expert_score": score, "samples": given.samples, "length": LENGTH}
        out = Path(tempfile.mkdtemp(dir=folder)) / "run"
        summary = carry_out(str(model), clients, [cut], evaluate, out, seed)
        routed = [block["routed"] for block in summary.files["structured.json"]["blocks"]]
        return [math.log(summary.mean(summary.dense)), math.log(summary.mean(summary.federated)), statistics.mean(routed)]

    lines = [
        "| of the experts go | by | loss before, by seed | loss after, by seed | mean | of the router's choices went |",
        "|---|---|---|---|---|---|",
    ]
    settings = {key: getattr(given, key) for key in ("steps", "noise", "samples", "windows")}
    found: dict[tuple[float, str], list[list[float]]] = {}
    for seed in given.seeds:
        for share in given.shares:
            for row, score in ROWS.items():
                result = kept(partial(losses, seed, share, score), row=row, share=share, seed=seed, **settings)
                if result:
                    found.setdefault((share, row), []).append(result)
    for (share, row), every in found.items():
        before, after = (", ".join(f"{result[place]:.3f}" for result in every) for place in (0, 1))
        mean, routed = (statistics.mean(result[place] for result in every) for place in (1, 2))
        lines.append(f"| {share:.0%} | {row} | {before} | {after} | {mean:.3f} | {routed:.0%} |")
    return "\n".join(lines)


def upcycled(noise: float, seed: int) -> MixtralForCausalLM:
    """The shipped model as a mixture: its feed-forward parts copied, with noise, and routers of random weights."""
    torch.manual_seed(seed)
    dense = AutoModelForCausalLM.from_pretrained(GROVE, dtype=torch.float32)
    keys = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "head_dim", "rms_norm_eps", "rope_parameters", "max_position_embeddings", "tie_word_embeddings", "bos_token_id",
        "eos_token_id", "hidden_act",
    )  # fmt: skip
    config = MixtralConfig(
        **{key: getattr(dense.config, key) for key in keys},
        num_local_experts=EXPERTS,
        num_experts_per_tok=PER_TOKEN,
        sliding_window=None,
        router_aux_loss_coef=0.02,
    )
    mixture = MixtralForCausalLM(config)
    others = {name: tensor for name, tensor in dense.state_dict().items() if ".mlp." not in name}
    mixture.load_state_dict(others, strict=False)
    for block, sparse in zip(dense.model.layers, mixture.model.layers, strict=True):
        mlp, experts = block.mlp, sparse.mlp.experts
        copies = {"gate_up_proj": torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]), "down_proj": mlp.down_proj.weight}
        for name, weight in copies.items():
            copy = getattr(experts, name)
            copy.data = weight.detach() + noise * weight.std().detach() * torch.randn_like(copy)
    return mixture


def train(mixture: MixtralForCausalLM, texts: list[Path], steps: int, seed: int) -> None:
    """AdamW on windows of all owners alike, with the loss that makes the router use all experts."""
    tokenizer = AutoTokenizer.from_pretrained(GROVE)
    streams = []
    for file in texts:
        text = "\n\n".join(read_texts(file))[: 4 * BATCH * LENGTH * steps]  # about four characters a token
        streams.append(torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(mixture.parameters(), lr=5e-4, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-4, total_steps=steps, pct_start=0.1)
    mixture.train()
    for _ in range(steps):
        ids = torch.stack(
            [window(streams[int(torch.randint(len(streams), (), generator=generator))], generator) for _ in range(BATCH)]
        )
        loss = mixture(input_ids=ids, labels=ids, output_router_logits=True).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(mixture.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    mixture.eval()


def window(stream: Tensor, generator: torch.Generator) -> Tensor:
    """Some tokens that follow each other."""
    start = int(torch.randint(len(stream) - LENGTH, (), generator=generator))
    return stream[start : start + LENGTH]


def save(mixture: MixtralForCausalLM, folder: Path) -> None:
    """A model directory with the shipped tokenizer."""
    mixture.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((GROVE / name).read_bytes())


if __name__ == "__main__":
    main()
