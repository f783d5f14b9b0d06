"""Jobs under secure aggregation: the same model as in the open, whoever drops out, and no response in the open."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedgrove import run as server
from fedgrove.client.hidden_states import Calibration
from fedgrove.client.local_client import LocalClient
from fedgrove.client.serve import respond, serve
from fedgrove.engines.local import LocalEngine
from fedgrove.errors import FedgroveError
from fedgrove.evaluation.held_out import Losses
from fedgrove.input_statistics import fixed_point as statistics
from fedgrove.job.load import load
from fedgrove.privacy.secagg.keys import Credentials
from fedgrove.privacy.secagg.masking import as_rings
from fedgrove.privacy.secagg.server import Opening
from fedgrove.privacy.secagg.session import new_session
from fedgrove.rounds import wire
from fedgrove.rounds.exchanges.secagg import Ciphertexts, Masking, Shares
from fedgrove.rounds.request import Reply, Response, Tensors
from fedgrove.runfolder import RunFolder
from fedgrove.stages.prune.exchanges.alone import EvaluateAlone
from fedgrove.stages.prune.exchanges.block import PruneBlock
from fedgrove.stages.prune.exchanges.statistics import SumInputs
from fedgrove.stages.prune.recipe import Recipe
from fedgrove.stages.tune.exchanges.base import KeepWeights
from fedgrove.stages.tune.exchanges.train import Trained
from secagg import uniform
from small import LENGTH, Small, complaint
from test_statistics import hashes, prune

Resumed = Callable[..., RunFolder]
OWNERS = ("ash", "birch", "cedar", "dogwood")


@pytest.fixture(scope="module")
def texts(small: Small) -> dict[str, list[str]]:
    words = "\n".join(path.read_text() for path in small.texts.values()).split()
    return {name: [" ".join(words[60 * i : 60 * i + 60])] for i, name in enumerate(OWNERS)}


class Recorder(LocalEngine):
    """Keeps what clients sent; some do not respond to some requests."""

    seen: list[tuple[str, str, bytes]]
    silent: frozenset[tuple[str, str]] = frozenset()

    def request(
        self, kind: str, messages: Mapping[str, bytes], timeout: float | None = None, largest: int | None = None
    ) -> Iterator[tuple[str, bytes | None, str | None]]:
        for client, answer, error in super().request(kind, messages, timeout):
            if (client, kind) in self.silent:
                yield client, None, "gone"
                continue
            if answer is not None:
                self.seen.append((client, kind, answer))
            yield client, answer, error


@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt"])
def test_a_job_gives_the_same_bits_with_and_without(
    small: Small, texts: dict[str, list[str]], tmp_path: Path, pruner: str
) -> None:
    class Engine(Recorder):
        seen = []  # noqa: RUF012

    plain = prune(small, tmp_path / "plain", texts, pruner=pruner)
    hidden = prune(small, tmp_path / "hidden", texts, Engine, privacy={"secure_aggregation": True}, pruner=pruner)
    assert hashes(hidden) == hashes(plain)
    answers = [wire.unpack(message)[0] for _, kind, message in Engine.seen if kind == "prune/statistics"]
    assert len(answers) == 2 * len(OWNERS)
    for tensors in answers:
        joined = np.concatenate(as_rings(tensors))
        bits = statistics.ring_bits(LENGTH * len(OWNERS))
        assert uniform((joined >> np.uint64(bits - 8)).astype(np.uint8))
        assert uniform(joined.view(np.uint8).reshape(-1, 8)[:, : bits // 8].flatten())
        assert not (joined >> np.uint64(bits)).any()


@pytest.mark.parametrize("aggregation", ["fedspallm", "fedprllm"])
def test_pruned_weights_and_votes_give_the_same_bits_with_and_without(
    small: Small, texts: dict[str, list[str]], tmp_path: Path, aggregation: str
) -> None:
    stage = {"pruner": "sparsegpt", "aggregation": aggregation, "rounds": 2}
    plain = prune(small, tmp_path / "plain", texts, **stage)
    assert plain == prune(small, tmp_path / "hidden", texts, privacy={"secure_aggregation": True}, **stage)


@pytest.mark.parametrize("part", ["weight/", "change/"])
def test_votes_and_values_that_do_not_add_up_are_refused(
    small: Small, texts: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    honest = PruneBlock.respond

    def poison(request: PruneBlock, tensors: Any, client: LocalClient, device: str) -> Response:
        response = honest(request, tensors, client, device)
        if client.name != "cedar":  # it votes for everything, or sends the largest number that the ring holds
            return response
        lie = 1 if part == "weight/" else 2**46
        lies = {name: torch.full_like(sent, lie) if name.startswith(part) else sent for name, sent in response.tensors.items()}
        return Response(lies, response.reply)

    monkeypatch.setattr(PruneBlock, "respond", poison)
    with pytest.raises(FedgroveError, match="no valid responses add up to these votes or values"):
        prune(
            small, tmp_path / "poisoned", texts, privacy={"secure_aggregation": True}, aggregation="fedspallm", pruner="wanda"
        )


@pytest.mark.parametrize(
    "kind",
    [
        "rounds/secagg/keys",
        "rounds/secagg/shares",
        "rounds/secagg/received",
        "prune/statistics",
        "rounds/secagg/check",
        "rounds/secagg/open",
    ],
)
def test_a_job_goes_on_when_a_client_drops_at_any_request(
    small: Small, texts: dict[str, list[str]], tmp_path: Path, kind: str
) -> None:
    class Engine(Recorder):
        seen = []  # noqa: RUF012
        silent = frozenset({("cedar", kind)})

    hidden = prune(small, tmp_path / "hidden", texts, Engine, privacy={"secure_aggregation": True}, pruner="wanda")
    early = kind not in ("rounds/secagg/check", "rounds/secagg/open")
    rest = {name: text for name, text in texts.items() if not early or name != "cedar"}
    assert hashes(hidden) == hashes(prune(small, tmp_path / "rest", rest, pruner="wanda"))
    assert all(row[2] == sorted(rest) for row in hidden.values())


def test_a_client_whose_shares_cannot_be_read_is_left_out_by_name(
    small: Small, texts: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class WithQuorum(Recorder):
        seen = []  # noqa: RUF012

    honest = Shares.respond

    def respond(request: Shares, tensors: Any, client: LocalClient, device: str) -> Response:
        response = honest(request, tensors, client, device)
        assert isinstance(response.reply, Ciphertexts)
        if client.name != "cedar":
            return response
        return Response(
            {},
            Ciphertexts(sealed_shares={peer: "00" * (len(text) // 2) for peer, text in response.reply.sealed_shares.items()}),
        )

    monkeypatch.setattr(Shares, "respond", respond)
    secure: dict[str, Any] = {"privacy": {"secure_aggregation": True}, "pruner": "wanda"}
    line = "client 'cedar': too few others could read its shares .3 of 4 clients are left, 4 needed: rounds.quorum."
    with pytest.raises(FedgroveError, match=line):
        prune(small, tmp_path / "all", texts, **secure)
    hidden = prune(small, tmp_path / "rest", texts, WithQuorum, **secure)
    rest = {name: text for name, text in texts.items() if name != "cedar"}
    assert hashes(hidden) == hashes(prune(small, tmp_path / "plain", rest, pruner="wanda"))


@pytest.fixture
def interrupted(small: Small, texts: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Resumed:
    """A run whose server was killed after it had opened the first sum, which cedar had dropped out of."""
    clients = []
    for name, records in texts.items():
        file = tmp_path / f"{name}.txt"
        file.write_text("\n".join(records))
        clients.append({"name": name, "data": str(file), "samples": 1})
    stage = {"stages__0__aggregation": "pooled", "stages__0__pruner": "wanda"}
    secure = {"privacy": {"secure_aggregation": True, "min_group": 2}, "rounds": {"quorum": 2}}
    job = load(small.job("interrupted", clients=clients, evaluate={}, **stage, **secure))
    honest = Opening.open

    def killed(opening: Opening, revealed: Any) -> Any:
        honest(opening, revealed)
        raise RuntimeError("killed")

    def resumed(silent: frozenset[tuple[str, str]] = frozenset(), without: str = "") -> RunFolder:
        class Engine(Recorder):
            seen = []  # noqa: RUF012

        Engine.silent = silent
        with closing(RunFolder(tmp_path / "run", job, resume=True)) as run:
            local_clients = server.local_clients(job, server.open_model(job.model), run.path / "clients")
            server.run_job(job, Engine([client for client in local_clients if client.name != without]), run)
        return run

    monkeypatch.setattr(Opening, "open", killed)
    with pytest.raises(RuntimeError, match="killed"):
        resumed(frozenset({("cedar", "prune/statistics")}))
    monkeypatch.setattr(Opening, "open", honest)
    return resumed


def test_a_run_that_goes_on_opens_the_same_sum_of_the_same_clients(interrupted: Resumed) -> None:
    run = interrupted()
    tensors = json.loads((run.path / "pruning.json").read_text())["tensors"]
    blocks = {row["block"]: row["clients"] for row in tensors}
    assert blocks == {0: ["ash", "birch", "dogwood"], 1: list(OWNERS)}


@pytest.mark.parametrize("how", [{"without": "birch"}, {"silent": frozenset({("birch", "prune/statistics")})}])
def test_a_run_that_goes_on_without_a_client_of_the_sum_is_one_line(interrupted: Resumed, how: dict[str, Any]) -> None:
    line = r"client 'birch': it was in the sum .* \(2 of 3 clients are there\); continue with --resume when it is back"
    with pytest.raises(FedgroveError, match=line):
        interrupted(**how)
    interrupted()  # birch is back


@pytest.mark.parametrize("forgets", ["prune/statistics", "rounds/secagg/keys"])
def test_a_server_that_asks_again_without_a_client_learns_nothing(interrupted: Resumed, tmp_path: Path, forgets: str) -> None:
    (tmp_path / "run" / "work" / "secure-sums.json").unlink()
    line = r"client 'ash': its response is already in a sum of other clients \(ash, birch, dogwood\); continue with --resume"
    with pytest.raises(FedgroveError, match=line):
        interrupted(frozenset({("birch", forgets)}))


def test_a_client_with_credentials_answers_nothing_in_the_open(small: Small, tmp_path: Path) -> None:
    job = load(small.job("open", stages__0__aggregation="pooled", evaluate={}, privacy={"secure_aggregation": True}))
    client = server.local_clients(job, server.open_model(job.model), tmp_path)[0]
    assert isinstance(client.credentials, Credentials)
    calibration = Calibration(stage=0, samples=1, length=LENGTH, seed="s")
    recipe = Recipe(pruner="wanda", damping="mean", sparsities=(0.5, 0.5), pattern=None, blocks=(0, 1))
    block = PruneBlock(stage=0, block=0, calibration=calibration, recipe=recipe, aggregation="fedspallm")
    sums = SumInputs(
        stage=0, block=0, calibration=calibration, consumers={}, widths={}, products=(), mixed=False, moments=False, limit=1
    )
    for request in (block, sums, EvaluateAlone(stage=0, texts={}, prune=block)):
        with pytest.raises(FedgroveError, match="only under secure aggregation"):
            serve(request.KIND, wire.pack({}, {"request": request.model_dump(mode="json")}), client, "cpu")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"stages__0__aggregation": "fedavg"}, 'aggregation "fedavg" cannot be summed securely; use one of'),
        ({"evaluate__alone": True}, "evaluate.alone: under secure"),
        ({"privacy__min_group": 4}, "privacy.min_group: 4 clients"),
        ({"stages__0__layers": {"sample": 0.5}}, "every client must be in every sum"),
    ],
)
def test_jobs_that_secure_aggregation_cannot_do_are_refused(small: Small, changes: dict[str, Any], says: str) -> None:
    spec = {"stages__0__aggregation": "pooled", "privacy__secure_aggregation": True, "evaluate": {}, **changes}
    assert says in complaint("plan", small.job("refused", **spec))


@pytest.mark.parametrize(
    ("tensors", "reply"),
    [
        ({"change/x": torch.zeros(2, dtype=torch.int32)}, Trained(tokens=1, loss=0.5)),
        ({"change/x": torch.zeros(2, dtype=torch.int32)}, Losses(shared=1.0, own=2.0)),
    ],
)
def test_a_server_that_asks_for_a_mask_where_there_is_nothing_to_mask_gets_nothing(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensors: Tensors, reply: Reply
) -> None:
    job = load(small.job("oracle", stages__0__aggregation="pooled", evaluate={}, privacy={"secure_aggregation": True}))
    client = server.local_clients(job, server.open_model(job.model), tmp_path)[0]
    request = KeepWeights(stage=1, part=0)
    monkeypatch.setattr(KeepWeights, "respond", lambda *arguments: Response(tensors, reply))
    session = new_session([one.name for one in job.clients], 64, request.sum_digest({}))
    masking = Masking(session=session, peers=[])
    with pytest.raises(FedgroveError, match="are not summed, so no mask would protect them; refused"):
        respond(request, {}, masking, client, "cpu")
    monkeypatch.setattr(KeepWeights, "OWN_FIELDS", frozenset())
    with pytest.raises(FedgroveError, match="says more than its masked sums; refused"):
        respond(request, {}, masking, client, "cpu")
