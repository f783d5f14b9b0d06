"""Every type of AutoModelForCausalLM, small and random: equal to plain transformers, refused in one line, or wrong.

``python bench/decoders.py [--train] [TYPE...]``; ``--train`` also prunes each type that is equal and tunes it for one step.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from fedgrove.errors import FedgroveError
from fedgrove.models.blocks import Decoder
from fedgrove.models.perplexity import perplexity
from fedgrove.models.preconditions import check_parameters
from fedgrove.models.stream import Checkpoint

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from decoders import LENGTH, TYPES, plain_perplexity, save_small, small_config, windows  # noqa: E402
from fedgrove.api import run  # noqa: E402
from small import TOKENIZER, Small  # noqa: E402

LARGE = 50  # million weights, beyond which a type whose default sizes do not shrink is left out


def measure(kind: str, folder: Path) -> tuple[str, str]:
    """What becomes of a type: a word, and details."""
    try:
        torch.manual_seed(0)
        with torch.device("meta"):
            numel = sum(p.numel() for p in AutoModelForCausalLM.from_config(small_config(kind)).parameters())
        if numel > LARGE * 1e6:
            return "not built", f"{numel / 1e6:,.0f} million weights"
        expected = plain_perplexity(save_small(kind, folder))
    except Exception as error:  # sizes that do not fit this type
        return "not built", " ".join(str(error).split())[:100]
    try:
        decoder = Decoder(Checkpoint(folder))
        check_parameters(decoder)
        found = perplexity(decoder, windows())
    except FedgroveError as error:
        return "refused", str(error)
    except Exception as error:  # a traceback is what this looks for
        return "wrong", repr(error)
    return ("equal" if math.isclose(found, expected, rel_tol=1e-4) else "wrong"), f"{found:.3f}, {expected:.3f}"


def train(model: Path, small: Small) -> tuple[str, str]:
    """Prunes a model and tunes it for one step."""
    for name in TOKENIZER:
        (model / name).write_bytes((small.model / name).read_bytes())
    tune = {"kind": "tune", "rounds": 1, "steps": 1, "length": LENGTH, "batches": [1], "ranks": [2], "bits": [32]}
    prune = {"kind": "prune", "pruner": "wanda", "sparsity": 0.5, "samples": 2, "length": LENGTH}
    try:
        run(small.spec(model__path=str(model), stages=[prune, tune], evaluate={}), out=model / "run", quiet=True)
        plain_perplexity(model / "run" / "model")
    except FedgroveError as error:
        return "not trained", str(error)
    except Exception as error:  # a traceback is what this looks for
        return "train wrong", repr(error)
    return "trained", ""


def main() -> None:
    """Prints a line for every type, and the counts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("types", nargs="*")
    parser.add_argument("--train", action="store_true")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as base:
        small = Small(Path(base))
        for kind in arguments.types or TYPES:
            with tempfile.TemporaryDirectory() as folder:
                results = [measure(kind, Path(folder))]
                if arguments.train and results[0][0] == "equal":
                    results.append(train(Path(folder), small))
            for word, details in results:
                counts[word] += 1
                print(f"{kind:<28}{word:<12}{details}", flush=True)
    print(", ".join(f"{word}: {count}" for word, count in sorted(counts.items())))


if __name__ == "__main__":
    main()
