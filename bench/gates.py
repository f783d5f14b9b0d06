"""What a pool's gates find on the owners of pool.py: which owners and which windows are alike. Nothing is trained.

    .venv/bin/python bench/gates.py --data ../shared/data --streams --seeds 0 1 2 3 4 5 6 7 8 9
    .venv/bin/python bench/gates.py --data ../shared/data --sorted --seeds 0 1 2

``--streams``: which owners gate "similar" puts together, without and with noise, as the share of the 28 pairs of owners that
are together or apart as their kinds are; and how many members it finds by itself (*kinds* has four, *iid* one).

``--sorted``: the share of training windows that gates put with the kind that most windows of their member are of, by directions
between owners and by principal ones, and how many directions tell owners apart; of *kinds*, *mixed* and *iid*.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import tempfile
from pathlib import Path
from typing import Any

import pool
import results
import torch
import tune
from arguments import existing_folder

from fedgrove import api
from fedgrove.data.windows import training_windows
from fedgrove.models.blocks import Decoder
from fedgrove.models.features import pooled_states, typical
from fedgrove.models.stream import Checkpoint
from fedgrove.privacy.accounting import noise_of_part
from fedgrove.privacy.gaussian import GaussianMechanism
from fedgrove.rounds.aggregator.moments import Moments
from fedgrove.stages.tune.gates import feature_gate_of, similar
from fedgrove.stages.tune.pool.config import Pool as Settings
from fedgrove.stages.tune.pool.features import CENTER, SCALE, layers_of, numbers_of
from fedgrove.stages.tune.pool.fitting import ENOUGH
from fedgrove.stages.tune.pool.scale import (
    at_random,
    between_owners,
    directions,
    directions_of,
    own_products,
    scaled,
    that_tell_apart,
    unit,
)

MEMBERS = 4  # as many as there are kinds
EPSILONS = (None, 8.0, 4.0, 2.0, 1.0)


def streams(data: Path, model: Path, seed: int) -> dict[str, dict[str, Any]]:
    """By ε of the stage (δ 1e-5; "none"), what gate "similar" finds.

    Returns:
        ``right``: the share of pairs of the owners of *kinds* about which it is right; ``kinds`` and ``iid``: how many members
        it finds by itself.
    """
    settings = Settings(gate="similar", members=MEMBERS)
    by_itself = Settings(gate="similar", members="auto")
    numbers = {case: _numbers(case, data, model, settings, seed) for case in ("kinds", "iid")}
    found: dict[str, dict[str, Any]] = {}
    for epsilon in EPSILONS:
        members = _members(list(numbers["kinds"].values()), settings, epsilon, seed)
        owners = [(owner.partition("-")[0], member) for owner, member in zip(numbers["kinds"], members, strict=True)]
        right = [(one[0] == other[0]) == (one[1] == other[1]) for one, other in itertools.combinations(owners, 2)]
        alone = {case: len(set(_members(list(of.values()), by_itself, epsilon, seed))) for case, of in numbers.items()}
        found[str(epsilon or "none")] = {"right": sum(right) / len(right), **alone}
    return found


def sorting(data: Path, model: Path, seed: int) -> dict[str, float]:
    """By case, gate and directions, the share of windows with their kind; by case, how many directions tell owners apart."""
    found: dict[str, float] = {}
    for case in ("kinds", "mixed", "iid"):
        settings = Settings(gate="keys", members=MEMBERS)
        numbers = _numbers(case, data, model, settings, seed, by_kind=True)
        owners: dict[str, list[torch.Tensor]] = {}
        kinds: dict[str, list[int]] = {}
        for name, of in numbers.items():
            owner, _, kind = name.partition("/")
            owners.setdefault(owner, []).append(of)
            kinds.setdefault(owner, []).extend([pool.KINDS.index(kind)] * len(of))
        every = [torch.cat(of) for of in owners.values()]
        truth = torch.cat([torch.tensor(of) for of in kinds.values()])
        each = [Moments.over(of, torch.zeros(len(of), dtype=torch.int64), 1, products=True) for of in every]
        moments, own = functools.reduce(Moments.plus, each), torch.stack([own_products(of) for of in each]).sum(0)
        along = {
            "owners": that_tell_apart(moments, own, settings.size, len(every), MEMBERS),
            "windows": directions(moments, settings.size),
        }
        found[case] = between_owners(moments, own, settings.size, len(every))[1].shape[1]
        for gate, (which, (mean, axes)) in itertools.product(("keys", "mixture"), along.items()):
            members = torch.cat(_sorted(gate, [scaled(of, mean, axes) for of in every], settings, seed))
            right = sum(int(torch.bincount(truth[members == one]).max()) for one in members.unique().tolist())
            found[f"{case}, {gate}, {which}"] = right / len(truth)
    return found


def _sorted(gate: str, owners: list[torch.Tensor], settings: Settings, seed: int) -> list[torch.Tensor]:
    """The member that each of the owners' windows gets most of."""
    method = feature_gate_of(gate)
    state = fitted(method, settings, owners, seed, ENOUGH)
    return [method.weights(of, state).argmax(1) for of in owners]


def fitted(method: Any, settings: Settings, owners: list[torch.Tensor], seed: int, enough: float | None = None) -> Any:
    """The state of a gate that is fitted to what it looks at of owners, in one process.

    Args:
        enough: a gain with less than which the fit ends; None: it takes all its rounds.
    """
    state, before = method.begin(settings, owners[0].shape[1], str(seed)), -float("inf")
    for _ in range(settings.fit_rounds):
        each = [method.observe(of, state) for of in owners]
        sums = {name: torch.stack([one[name] for one in each]).sum(0) for name in each[0]}
        state, now = method.settle(state, sums)
        if enough is not None and now - before < enough:
            break
        before = now
    return method.finish(state, sums, 1)


def _numbers(
    case: str, data: Path, model: Path, settings: Settings, seed: int, by_kind: bool = False
) -> dict[str, torch.Tensor]:
    """Features of every owner's training windows before a gate scales them; by owner, or by "owner/kind"."""
    decoder, tokenizer = Decoder(Checkpoint(model)), Checkpoint(model).tokenizer()
    layers, prefix = layers_of(settings.blocks, len(decoder)), min(settings.prefix, pool.LENGTH)
    center, scale = typical(decoder, layers, prefix, str(seed))
    numbers = {}
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        files = {owner: train for owner, (train, _) in pool.deal(case, data, Path(name) / "data", seed).items()}
        if by_kind:
            of = {line: kind for kind in pool.KINDS for line in pool.records(kind, data, seed)}
            files = {part: file for owner, file in files.items() for part, file in _by_kind(owner, file, of).items()}
        for owner, train in files.items():
            ids, _ = training_windows([train], {"text": "{text}"}, tokenizer, pool.LENGTH)
            states = pooled_states(decoder, list(ids[:, :prefix]), layers, "mean")
            numbers[owner] = numbers_of(states, {CENTER: center, SCALE: scale}, layers, str(seed))
    return numbers


def _by_kind(owner: str, file: Path, kind_of: dict[str, str]) -> dict[str, Path]:
    """Files of an owner's records of each kind, by "owner/kind"."""
    parts: dict[str, list[str]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        parts.setdefault(kind_of[line], []).append(line)
    found = {}
    for kind, lines in parts.items():
        found[f"{owner}/{kind}"] = file.with_name(f"{file.stem}-{kind}.jsonl")
        found[f"{owner}/{kind}"].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return found


def _members(owners: list[torch.Tensor], settings: Settings, epsilon: float | None, seed: int) -> list[int]:
    """The member of each owner."""
    along = at_random(owners[0].shape[1], settings.size, str(seed))
    parts = 1 if isinstance(settings.members, int) else 2
    totals = [torch.stack([half.sum(0) for half in unit(of, along).tensor_split(parts)]) for of in owners]
    if epsilon is not None:
        mechanism = GaussianMechanism(1.0, noise_of_part(epsilon, 1e-5), adders=1)
        totals = [mechanism.add_share(total) for total in totals]
    pointing = torch.stack([directions_of(total) for total in totals])
    rows = list(pointing - pointing.mean(0))
    state = fitted(similar, settings, rows, seed)
    return [int(similar.weights(of, state).argmax()) for of in rows]


def main() -> None:
    """Runs what is not in the file of results, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=existing_folder, required=True)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--streams", action="store_true", help="which owners are found to be alike")
    which.add_argument("--sorted", action="store_true", help="which windows are found to be alike")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--results", type=Path, help="a JSON-lines file: what stands there is not run again")
    parser.add_argument("--model", type=existing_folder, default=tune.MODEL)
    args = parser.parse_args()
    api.hush()
    torch.set_num_threads(1)
    kept = results.Kept(args.results, args.model)
    if args.sorted:
        every = [kept(functools.partial(sorting, args.data, args.model, seed), sorted=True, seed=seed) for seed in args.seeds]
        print("| text, gate, directions | windows with their kind, each seed |", "|---|---|", sep="\n")
        for which in every[0]:
            shown = "{:.1%}" if "," in which else "{} directions between owners"
            print(f"| {which} | {', '.join(shown.format(one[which]) for one in every)} |")
        return
    if args.streams:
        every = [kept(functools.partial(streams, args.data, args.model, seed), streams=True, seed=seed) for seed in args.seeds]
        print("| ε of the stage | pairs right | all right | members found: kinds | iid |", "|---|---|---|---|---|", sep="\n")
        for epsilon in every[0]:
            of = [one[epsilon] for one in every]
            right = sum(one["right"] for one in of) / len(of)
            exact = sum(one["right"] == 1 for one in of)
            counts = [", ".join(str(one[case]) for one in of) for case in ("kinds", "iid")]
            print(f"| {epsilon} | {right:.0%} | {exact} of {len(of)} | {counts[0]} | {counts[1]} |")


if __name__ == "__main__":
    main()
