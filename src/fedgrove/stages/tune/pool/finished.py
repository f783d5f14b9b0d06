"""A pool that a run wrote: reading it, the weights that its gate gives a text, and losses of its mixtures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fedgrove.errors import FedgroveError
from fedgrove.evaluation.held_out import Parts
from fedgrove.models.blocks import Decoder
from fedgrove.models.digest import digests, first_difference
from fedgrove.models.features import pooled_states
from fedgrove.models.files import find_model
from fedgrove.models.stream import Checkpoint
from fedgrove.report.reader import read_job
from fedgrove.stages.tune.exchanges.gate import NOVELTY
from fedgrove.stages.tune.frozen import load_again
from fedgrove.stages.tune.gates import feature_gate_of
from fedgrove.stages.tune.parametrizations import Attachment, Mixable, mixable_of
from fedgrove.stages.tune.personal import Windows, losses
from fedgrove.stages.tune.pool.card import FACTS, GATE
from fedgrove.stages.tune.pool.config import Pool as Settings
from fedgrove.stages.tune.pool.features import ALONG, MEAN, STATE, features_of, layers_of, numbers_of
from fedgrove.stages.tune.pool.members import Member, mixture, read_members
from fedgrove.stages.tune.pool.novelty import p_values
from fedgrove.stages.tune.pool.scale import directions_of, unit


@dataclass(frozen=True)
class Pool:
    """A pool that a run wrote.

    Attributes:
        facts: the content of ``pool.json``.
        settings: the table ``pool`` of the job.
        members: their changes, by linear.
        gate: tensors of a gate that looks at features; else empty.
        base: the table ``model`` of the run's job; empty if the pool is without its run.
    """

    facts: Mapping[str, Any]
    settings: Settings
    members: tuple[Member, ...]
    gate: dict[str, Tensor]
    base: Mapping[str, Any]

    @classmethod
    def read(cls, run: Path) -> Pool:
        """Reads ``RUN/pool``.

        Raises:
            FedgroveError: there is none.
        """
        folder = run / "pool"
        if not has_pool(run):
            raise FedgroveError(
                f"{run}: this run has no pool", "give a run whose stage tune has the key pool, and that has ended"
            )
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        gate = load_file(folder / GATE) if (folder / GATE).is_file() else {}
        base = read_job(run)["model"] if (run / "job.toml").is_file() else {}
        members = read_members(mixable_of(facts["parametrization"]), folder, facts["members"])
        return cls(facts, Settings(**facts["pool"]), tuple(members), gate, base)

    def model(self, given: str | None = None, device: str = "cpu") -> Decoder:
        """The model that the members change.

        Args:
            given: a directory or hub id; None: the model of the job.

        Raises:
            FedgroveError: it is another model, or none is given and earlier stages of the run changed it or there is no job.
        """
        if given is None and self.facts["changed"]:
            raise FedgroveError(
                "an earlier stage of the run changed the model before the pool was trained", "give that model with --model"
            )
        if given is None and not self.base:
            raise FedgroveError("the pool's folder has no job.toml beside it", f"give {self.facts['model']} with --model")
        name = given or self.base["path"]
        dtype = self.base.get("dtype", "auto")  # the pool was trained on these, whatever is on the disk
        checkpoint = Checkpoint(
            find_model(name, None if given else self.base.get("revision")),
            None if dtype == "auto" else getattr(torch, dtype),
            shares=self.base.get("shares", {}),
        )
        differs = first_difference(digests(checkpoint), self.facts["digests"])
        if differs is not None:
            raise FedgroveError(
                f"{name}: it is not the model that the pool was trained on ({differs} differs)", "give that one"
            )
        return Decoder(checkpoint, device)

    @property
    def method(self) -> Mixable:
        """The module of the parametrization."""
        return mixable_of(self.facts["parametrization"])

    @property
    def shares(self) -> list[float]:
        """The part of all windows that each member was trained on."""
        total = sum(self.facts["windows"])
        return [number / total for number in self.facts["windows"]]

    @property
    def groups(self) -> list[str]:
        """Whose member each one is, if that is known: a group's, or a client's."""
        return list(self.facts["weights"]) if "weights" in self.facts else sorted(self.settings.groups)

    @property
    def gives_one_member(self) -> bool:
        """Whether an owner gets one member as a whole, and no mixture: then losses choose among members as well as the gate."""
        return not self.gate or feature_gate_of(self.settings.gate).OF_CLIENTS

    def look(self, decoder: Decoder, texts: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """What the gate says of texts of one owner.

        Args:
            texts: (tokens,) token ids each; their first ``prefix`` tokens are looked at.

        Returns:
            Weights (texts, members), and p-values (texts,): the part of the federation's windows that are as unusual or more;
            None: they were not counted, as the gate was fitted with noise.

        Raises:
            FedgroveError: the gate looks at no text.
        """
        if not self.gate:
            raise FedgroveError(f'gate "{self.settings.gate}" looks at no features of text', "give a run with another gate")
        layers, gate = layers_of(self.settings.blocks, len(decoder)), feature_gate_of(self.settings.gate)
        prefix = min(self.settings.prefix, self.facts["length"])
        states = pooled_states(decoder, [ids[:prefix] for ids in texts], layers, "mean")
        numbers = numbers_of(states, self.gate, layers, self.facts["seed"])
        state = {name.removeprefix(STATE): value for name, value in self.gate.items() if name.startswith(STATE)}
        features = features_of(numbers, self.gate, gate.OF_CLIENTS)
        fitted = features
        if gate.OF_CLIENTS:
            fitted = directions_of(unit(numbers, self.gate[ALONG]).sum(0, keepdim=True)) - self.gate[MEAN][:1]
        weights = gate.weights(fitted, state).expand(len(texts), -1)
        known = self.gate.get(NOVELTY)
        return weights, None if known is None else p_values(gate.surprise(features, state), known)

    def mix(self, weights: Sequence[float]) -> dict[str, Any]:
        """The members' mixture, one adapter; without weights that are 0."""
        return mixture(self.method, self.members, weights)

    def losses(self, decoder: Decoder, changes: Member, windows: Windows) -> Parts:
        """The loss of each window with a change of the model, and its number of predicted tokens."""
        method = self.method
        every = {name: change for member in self.members for name, change in member.items()}
        starts = {}
        for name, change in every.items():  # a linear that is not changed gets a change of 0: the same model is used again
            starts[name] = method.applied(changes.get(name, change.scaled(0.0)), decoder.read_shape(name))
        model = load_again(decoder, 32, ("pool", tuple(sorted(every))))
        masks = {name: decoder.read_matrix(name) != 0 for name in self.facts["masked"]}
        method.attach(model, starts, Attachment({}, masks))
        return losses(model, windows)

    def write(self, out: Path, decoder: Decoder, changes: Member, title: str, given: str | None = None) -> None:
        """Writes a mixture as an adapter that plain peft loads.

        Args:
            given: as for :meth:`model`.
        """
        masked, base = bool(self.facts["masked"]), given or self.base["path"]
        self.method.write_adapter(out, decoder, changes, base, title, masked, bool(self.facts["changed"]))


def has_pool(run: Path) -> bool:
    """Whether a run left a pool: none if all its rounds trained one adapter."""
    return (run / "pool" / FACTS).is_file()
