"""The Flower app of rounds.py: FedAvg of LoRA adapters in Flower's simulation, with one client at a time on all cores.

python bench/rounds_flower.py MODEL BATCHES.json ROUNDS THREADS BITS OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from flwr.client import ClientApp, NumPyClient
from flwr.common import Context, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.simulation import run_simulation
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from rounds_peft import adapted, train

MODEL, BATCHES, ROUNDS, THREADS, BITS, OUT = sys.argv[1:]
torch.set_num_threads(int(THREADS))


def values(net: Any) -> list[Any]:
    return [value.detach().numpy() for value in get_peft_model_state_dict(net).values()]


def put(net: Any, arrays: list[Any]) -> None:
    names = get_peft_model_state_dict(net).keys()
    set_peft_model_state_dict(net, {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)})


class Client(NumPyClient):
    def __init__(self, number: int):
        self.batches = list(json.loads(Path(BATCHES).read_text()).values())[number]

    def fit(self, parameters: list[Any], config: dict[str, Any]) -> tuple[list[Any], int, dict[str, Any]]:
        torch.set_num_threads(int(THREADS))
        net = adapted(MODEL, int(BITS))
        put(net, parameters)
        steps = len(self.batches) // int(ROUNDS)
        number = config["round"] - 1
        train(net, self.batches[number * steps : (number + 1) * steps])
        return values(net), 1, {}


class Saving(FedAvg):
    def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
        if failures:
            raise RuntimeError(failures)
        parameters, metrics = super().aggregate_fit(server_round, results, failures)
        if server_round == int(ROUNDS):
            net = adapted(MODEL, int(BITS))
            put(net, parameters_to_ndarrays(parameters))
            net.save_pretrained(OUT)
        return parameters, metrics


def client(context: Context) -> Any:
    return Client(int(context.node_config["partition-id"])).to_client()


def server(context: Context) -> ServerAppComponents:
    strategy = Saving(
        fraction_fit=1.0,
        fraction_evaluate=0.0,
        min_available_clients=4,
        initial_parameters=ndarrays_to_parameters(values(adapted(MODEL, int(BITS)))),
        on_fit_config_fn=lambda number: {"round": number},
    )
    return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=int(ROUNDS)))


if __name__ == "__main__":
    run_simulation(
        server_app=ServerApp(server_fn=server),
        client_app=ClientApp(client_fn=client),
        num_supernodes=4,
        backend_config={"client_resources": {"num_cpus": int(THREADS), "num_gpus": 0.0}},
    )
