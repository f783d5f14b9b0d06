"""The state of a tuning stage between two rounds, from which a killed run resumes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from fedgrove.models.tensor_files import save_tensors
from fedgrove.stages.tune.changes import State
from fedgrove.stages.tune.objective import Progress
from fedgrove.stages.tune.parametrizations import parametrization_of
from fedgrove.stages.tune.plan import Plan
from fedgrove.stages.tune.server_optimizers import ServerOptimizerState

Measurement = tuple[str | None, str, float]  # client, name, value


@dataclass
class TuningState:
    """The state of a tuning stage between two rounds.

    Attributes:
        plan: the plan in force.
        states: by linear, the change at the server.
        optimizer: by linear, the state of the server optimizer.
        seen: by client, how many windows it has trained on.
        clock: modelled seconds so far.
        metrics: the measurements of the latest round.
        shapes: (out, in) of every linear that has a state.
        measured: what the clients measured instead of a key "auto", by key.
        progress: what rounds gained, where the planner learns from it.
    """

    plan: Plan
    states: dict[str, State[Any]] = field(default_factory=dict)
    optimizer: dict[str, ServerOptimizerState[Any]] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)
    clock: float = 0.0
    metrics: list[Measurement] = field(default_factory=list)
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)

    def write(self, file: Path) -> None:
        """Writes the state to one safetensors file, atomically."""
        tensors: dict[str, Tensor] = {}
        for name, state in self.states.items():
            for kind, change in (("live", state.live), ("frozen", state.frozen)):
                tensors |= {f"{kind}/{part}/{name}": value for part, value in change.parts().items()}
        for name, remembered in self.optimizer.items():
            tensors |= {f"first/{part}/{name}": value for part, value in remembered.first.parts().items()}
        facts = {
            "plan": self.plan.model_dump(mode="json"),
            "linears": {name: list(shape) for name, shape in self.shapes.items()},
            "seen": self.seen,
            "clock": self.clock,
            "metrics": self.metrics,
            "measured": self.measured,
            "progress": asdict(self.progress),
            "second": {name: remembered.second for name, remembered in self.optimizer.items()},
        }
        save_tensors(tensors, file, {"state": json.dumps(facts)})

    def put(self, name: str, shape: tuple[int, int], state: State[Any]) -> None:
        """Stores the new state of a linear (out, in)."""
        self.states[name] = state
        self.shapes[name] = shape

    def state_of(self, name: str, shape: tuple[int, int]) -> State[Any]:
        """The state of a linear; no change if no client tuned it yet."""
        none = parametrization_of(self.plan.parametrization).none(shape)
        return self.states.get(name, State(none, none))

    @classmethod
    def read(cls, file: Path) -> TuningState:
        """Reads a file of :meth:`write`."""
        with safe_open(file, framework="pt") as opened:
            facts: dict[str, Any] = json.loads(opened.metadata()["state"])
            parts: dict[tuple[str, str], dict[str, Tensor]] = {}
            for key in opened.keys():  # noqa: SIM118
                kind, part, name = key.split("/", 2)
                parts.setdefault((kind, name), {})[part] = opened.get_tensor(key)
        plan = Plan(**facts["plan"])
        method = parametrization_of(plan.parametrization)
        learnt = {**facts["progress"], "rounds": [tuple(one) for one in facts["progress"]["rounds"]]}
        state = cls(plan, seen=facts["seen"], clock=facts["clock"], measured=facts["measured"])
        state.progress = Progress(**learnt)
        state.metrics = [(client, name, value) for client, name, value in facts["metrics"]]

        def change(kind: str, name: str, shape: tuple[int, int]) -> Any:
            return method.change_of(parts[kind, name]) if (kind, name) in parts else method.none(shape)

        for name, (rows, columns) in facts["linears"].items():
            shape = (rows, columns)
            state.put(name, shape, State(change("live", name, shape), change("frozen", name, shape)))
            if name in facts["second"]:
                state.optimizer[name] = ServerOptimizerState(change("first", name, shape), facts["second"][name])
        return state
