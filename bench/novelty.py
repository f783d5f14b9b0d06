"""How well a pool's gate tells text that no owner has, beside the base model's loss: areas under ROC curves, and false alarms.

    .venv/bin/python bench/novelty.py --data ../shared/data --model SMOLLM2 --features features --results novelty.jsonl

Nothing is trained: windows of 64 tokens pass through the frozen model, and what is measured stays in the folder ``--features``.
*far*: the federation has MedQuAD and PubMedQA; new are six novels, E2E and the Rust book. *near*: it has nineteen of twenty
newsgroups; new is the one that is left out, each in turn. Half of the federation's windows are fitted; a fifth of these is held
out and says what is usual. The other half is fresh: of it 5 % should have p below 0.05. An area of 0.5 is chance, 1 is perfect.
"""

from __future__ import annotations

import argparse
import functools
import random
from pathlib import Path
from typing import Any

import gates
import personal
import results
import torch
import tune
from arguments import existing_folder
from safetensors.torch import load_file
from torch import Tensor

from fedgrove import api
from fedgrove.data.tokens import encode
from fedgrove.files import read_lines
from fedgrove.models.blocks import Decoder
from fedgrove.models.features import pooled_states, typical
from fedgrove.models.stream import Checkpoint
from fedgrove.models.tensor_files import save_tensors
from fedgrove.rounds.aggregator.moments import Moments
from fedgrove.stages.tune.frozen import load
from fedgrove.stages.tune.gates import feature_gate_of
from fedgrove.stages.tune.personal import losses
from fedgrove.stages.tune.pool.config import Pool as Settings
from fedgrove.stages.tune.pool.features import CENTER, SCALE, is_held_out, layers_of, numbers_of
from fedgrove.stages.tune.pool.novelty import count, p_values
from fedgrove.stages.tune.pool.scale import own_products, scaled, that_tell_apart

LENGTH = 64
KNOWN, NEW = (
    {"medquad": 1300, "pubmedqa": 700},
    {"novels": 200, "e2e": 200, "rustbook": 200},
)  # kinds of text, and windows of each
OF_GROUP = 40  # windows of a newsgroup
GATES = ("mixture", "keys")


def texts(kind: str, data: Path) -> list[str]:
    """Records of a kind, in random order."""
    if kind == "novels":
        files = sorted((data / "books").glob("*.txt"))
        words = " ".join(file.read_text(encoding="utf-8") for file in files).split(" ")
        found = [" ".join(words[start : start + 120]) for start in range(0, len(words), 120)]
    elif kind == "pubmedqa":
        found = [row["context"] for row in read_lines(data / kind / "train.jsonl")]
    elif kind.startswith("newsgroups/"):
        rows = read_lines(data / "newsgroups" / "train.jsonl")
        found = [row["text"] for row in rows if row["label"] == kind.partition("/")[2]]
    else:
        found = personal.records_of(kind, data)
    random.Random(kind).shuffle(found)
    return found


def windows(kind: str, data: Path, tokenizer: Any, number: int) -> Tensor:
    """(at most ``number``, ``LENGTH``): the first tokens of a text each, so that no two are of one text."""
    rows = (encode(text, tokenizer)[:LENGTH] for text in texts(kind, data))
    return torch.tensor([row for row in rows if len(row) == LENGTH][:number])


def measured(kind: str, number: int, data: Path, model: Path, folder: Path, layers: tuple[int, ...]) -> dict[str, Tensor]:
    """Pooled states of the windows of a kind, and the base model's mean loss of each; kept."""
    file = folder / f"{results.fingerprint(model)}-{kind.replace('/', '-')}-{number}.safetensors"
    if not file.is_file():
        decoder, tokenizer = Decoder(Checkpoint(model)), Checkpoint(model).tokenizer()
        ids = windows(kind, data, tokenizer, number)
        with torch.no_grad():
            states = pooled_states(decoder, list(ids), layers, "mean")
            each = [loss / tokens for loss, tokens in losses(load(decoder, 32), (ids, ids))]
        save_tensors({"states": states, "loss": torch.tensor(each)}, file)
    found: dict[str, Tensor] = load_file(file)
    return found


def area(fresh: Tensor, new: Tensor) -> float:
    """The probability that a new window's score is above that of a fresh one; half if they are equal."""
    above = (new[:, None] > fresh[None]).double() + 0.5 * (new[:, None] == fresh[None]).double()
    return float(above.mean())


def judged(known: list[Tensor], fresh: list[Tensor], new: dict[str, Tensor], gate: str, seed: int) -> dict[str, Any]:
    """Fits a gate to the owners' numbers and judges fresh and new ones.

    Args:
        known: of each kind, the windows of an owner, (windows, numbers).
    """
    method, settings = feature_gate_of(gate), Settings(gate=gate, members=4)  # type: ignore[call-arg]
    fitted = [of[~is_held_out(len(of))] for of in known]
    each = [Moments.over(of, torch.zeros(len(of), dtype=torch.int64), 1, products=True) for of in fitted]
    own = torch.stack([own_products(of) for of in each]).sum(0)
    mean, along = that_tell_apart(functools.reduce(Moments.plus, each), own, settings.size, len(known), settings.most)
    owners = [scaled(of, mean, along) for of in known]
    state = gates.fitted(method, settings, [scaled(of, mean, along) for of in fitted], seed)
    usual = count(torch.cat([method.surprise(of[is_held_out(len(of))], state) for of in owners]))
    score = functools.partial(_surprise, method, state, mean, along)
    of_fresh = score(torch.cat(fresh))
    return {
        "alarms": float((p_values(of_fresh, usual) < 0.05).double().mean()),
        "found": {kind: float((p_values(score(of), usual) < 0.05).double().mean()) for kind, of in new.items()},
        "area": {kind: area(of_fresh, score(of)) for kind, of in new.items()},
    }


def _surprise(method: Any, state: Any, mean: Tensor, along: Tensor, numbers: Tensor) -> Tensor:
    found: Tensor = method.surprise(scaled(numbers, mean, along), state)
    return found


def trial(data: Path, model: Path, folder: Path, seed: int) -> dict[str, Any]:
    """Both cases with both gates, and with the base model's loss alone."""
    decoder = Decoder(Checkpoint(model))
    layers = layers_of(Settings().blocks, len(decoder))  # type: ignore[call-arg]
    center, scale = typical(decoder, layers, LENGTH, str(seed))
    groups = sorted({row["label"] for row in read_lines(data / "newsgroups" / "train.jsonl")})
    kinds = KNOWN | NEW | {f"newsgroups/{group}": OF_GROUP for group in groups}
    numbers, loss = {}, {}
    for kind, number in kinds.items():
        of = measured(kind, number, data, model, folder, layers)
        order = torch.randperm(len(of["loss"]), generator=torch.Generator().manual_seed(seed))
        numbers[kind] = numbers_of(of["states"], {CENTER: center, SCALE: scale}, layers, str(seed))[order]
        loss[kind] = of["loss"][order]
    cases = {"far": (list(KNOWN), list(NEW))} | {
        f"near/{group}": ([f"newsgroups/{other}" for other in groups if other != group], [f"newsgroups/{group}"])
        for group in groups
    }
    found: dict[str, Any] = {}
    for case, (known, new) in cases.items():
        half = {kind: len(numbers[kind]) // 2 for kind in known}
        fitted = [numbers[kind][: half[kind]] for kind in known]
        fresh = [numbers[kind][half[kind] :] for kind in known]
        found[case] = {gate: judged(fitted, fresh, {kind: numbers[kind] for kind in new}, gate, seed) for gate in GATES}
        of_fresh = torch.cat([loss[kind][half[kind] :] for kind in known])
        found[case]["loss"] = {"area": {kind: area(of_fresh, loss[kind]) for kind in new}}
    return found


def main() -> None:
    """Runs what is not in the file of results, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=existing_folder, required=True)
    parser.add_argument("--model", type=existing_folder, default=tune.MODEL)
    parser.add_argument("--features", type=Path, required=True, help="where features are kept")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the split, and of the fit")
    parser.add_argument("--results", type=Path, help="a JSON-lines file: what stands there is not run again")
    args = parser.parse_args()
    api.hush()
    torch.set_num_threads(1)
    args.features.mkdir(exist_ok=True, parents=True)
    kept = results.Kept(args.results, args.model)
    every = [kept(functools.partial(trial, args.data, args.model, args.features, seed), seed=seed) for seed in args.seeds]
    print("| new | by | area, each seed | p < 0.05 of new | of fresh |", "|---|---|---|---|---|", sep="\n")
    near = [case for case in every[0] if case.startswith("near/")]
    for name, cases in [*((kind, ["far"]) for kind in NEW), ("a newsgroup, mean of 20", near)]:
        for by in (*GATES, "loss"):
            rows = [[one[case][by] for case in cases] for one in every]
            areas = ", ".join(f"{_mean([_of(row['area'], name) for row in of]):.3f}" for of in rows)
            found = alarms = ""
            if by in GATES:
                found = f"{_mean([_of(row['found'], name) for of in rows for row in of]):.0%}"
                alarms = f"{_mean([row['alarms'] for of in rows for row in of]):.1%}"
            print(f"| {name} | {by} | {areas} | {found} | {alarms} |")


def _of(values: dict[str, float], kind: str) -> float:
    """That of a kind, or of the only one."""
    return values[kind] if kind in values else next(iter(values.values()))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
