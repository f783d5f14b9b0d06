"""The other side of llmc.py: prunes with llm-compressor. Run by the Python that has it (fedgrove is not needed there).

    python bench/llmc_rival.py MODEL OUT WINDOWS.json sparsegpt|wanda SPARSITY DTYPE THREADS

The last line on stdout is one JSON object: seconds of pruning alone.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "LLM_COMPRESSOR_LOG_LEVEL": "CRITICAL"}


def main(model_dir: str, out: str, windows: str, pruner: str, sparsity: str, dtype: str, threads: str) -> None:
    import torch

    torch.set_num_threads(int(threads))
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    ids = json.loads(Path(windows).read_text())
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(window) for window in ids]})
    modifier = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[pruner]
    recipe = modifier(
        sparsity=float(sparsity), mask_structure="0:0", ignore=["re:.*lm_head"]
    )  # "lm_head" alone matches nothing
    start = time.perf_counter()
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=data,
        recipe=recipe,
        batch_size=1,
        num_calibration_samples=len(ids),
        max_seq_length=len(ids[0]),
        shuffle_calibration_samples=False,
    )
    seconds = time.perf_counter() - start
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main(*sys.argv[1:])
