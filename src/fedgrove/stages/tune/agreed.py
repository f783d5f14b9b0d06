"""What of a request to train follows from the job: a site compares it before it trains."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedgrove.stages.tune.config import Config

if TYPE_CHECKING:
    from fedgrove.stages.tune.exchanges.train import Train


def beyond(request: Train, config: Config, secure: bool, clients: int) -> str | None:
    """The first field that the stage does not allow.

    A plan gives each client its own batch, ranks and bits, among those of the job. All else is the same for all clients.

    Args:
        secure: whether sums are computed under secure aggregation.
        clients: how many may take part.
    """
    training, fixed = request.training, request.fixed
    asked = {
        "parametrization": request.parametrization, "trainer": request.trainer,
        "shared_a": request.shared_a, "fixed": fixed is not None, "precision": request.dtype,
        "learning_rate": training.learning_rate, "optimizer": training.optimizer,
        "max_grad_norm": training.max_grad_norm, "proximal": training.proximal, "scales": request.scales,
        "personal_pull": request.pull,
    }  # fmt: skip
    scales = {name: config.scale(rank) for name, rank in request.ranks.items()} if request.method.RANKED else {}
    agreed = {
        "parametrization": config.parametrization, "trainer": config.trainer,
        "shared_a": config.aggregation_method.SHARED_A, "fixed": config.precision == "fixed", "precision": config.dtype,
        "learning_rate": config.learning_rate_in(request.round), "optimizer": config.optimizer,
        "max_grad_norm": config.max_grad_norm, "proximal": config.proximal, "scales": scales,
        "personal_pull": config.personal_pull,
    }  # fmt: skip
    differs = next((key for key in asked if asked[key] != agreed[key]), None)
    differs = differs or request.members_beyond(config)
    return differs or _noise_beyond(request, config, secure, clients) or _assignment_beyond(request, config)


def _noise_beyond(request: Train, config: Config, secure: bool, clients: int) -> str | None:
    """Whether the request leaves out or weakens the noise that the job promises."""
    windows, of_clients = request.windows, request.fixed.noise if request.fixed else None
    noise = windows if config.trainer_method.PRIVATE else of_clients
    if config.epsilon is None or noise is None:
        return "epsilon" if config.epsilon is not None or windows is not None or of_clients is not None else None
    if (windows if noise is of_clients else of_clients) is not None:
        return "epsilon"
    if (noise.epsilon, noise.delta, noise.rounds, noise.clip) != (config.epsilon, config.delta, config.rounds, config.dp_clip):
        return "epsilon"
    if windows is not None and windows.gate != config.noisy_gate:
        return "epsilon"
    if request.fixed is None or of_clients is None:
        return None
    return "noise" if (of_clients.adders > 0) != secure or request.fixed.everything > clients else None


def _assignment_beyond(request: Train, config: Config) -> str | None:
    """Whether the client's own part is none that a plan of the job can give it."""
    training, ranks = request.training, set(config.ranks) if request.method.RANKED else {1}
    if not set(request.ranks.values()) <= ranks:
        return "ranks"
    if request.fixed is not None:
        widest = request.fixed.widest
        if request.fixed.most != config.most_tokens:
            return "tokens"
        if not set(widest.values()) <= ranks or any(rank > widest.get(name, 0) for name, rank in request.ranks.items()):
            return "ranks"
    parts = request.dealt or config.max_steps  # dealt windows get a part of the steps
    if training.steps > (config.max_steps or config.steps) or (training.steps != config.steps and not parts):
        return "steps"
    if training.batch not in config.batches or training.micro > training.batch:
        return "batches"
    # else the server could have a client train on the same windows again
    return "seen" if request.seen > request.round * config.most_steps * max(config.batches) else None
