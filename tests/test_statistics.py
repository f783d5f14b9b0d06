"""The aggregation ``pooled``: several owners get, bit for bit, the model that one owner of all their text would get."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fedgrove import run as server
from fedgrove.client.hidden_states import Calibration
from fedgrove.engines.local import LocalEngine
from fedgrove.errors import FedgroveError
from fedgrove.input_statistics import fixed_point as statistics
from fedgrove.input_statistics.exchange import SCALE
from fedgrove.input_statistics.fixed_point import Statistic
from fedgrove.input_statistics.probe import probe
from fedgrove.input_statistics.shared_inputs import shared_inputs
from fedgrove.input_statistics.statistics import InputStatistics
from fedgrove.job.load import load
from fedgrove.models.blocks import Decoder
from fedgrove.models.linears import find_blocks
from fedgrove.models.stream import Checkpoint
from fedgrove.rounds import wire
from fedgrove.rounds.disclosure import Disclosure
from fedgrove.rounds.wire import CHANGE, WireError
from fedgrove.runfolder import RunFolder
from fedgrove.stages.prune.exchanges.statistics import SumInputs
from small import LENGTH, Moment, Small, cli, complaint, killed, lines

SHARES = {"ash": 5, "birch": 1, "cedar": 3, "dogwood": 2}  # windows of each owner


@pytest.fixture(scope="module")
def owners(small: Small, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Records of exactly one window each, so that windows can be dealt to owners in any way."""
    tokenizer = AutoTokenizer.from_pretrained(small.model)
    text = "\n".join(path.read_text() for path in small.texts.values())
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    records = []
    for start in range(0, len(ids) - LENGTH, LENGTH):
        record = tokenizer.decode(ids[start : start + LENGTH - 1])
        if len(tokenizer(record, add_special_tokens=False)["input_ids"]) == LENGTH - 1 and record not in records:
            records.append(record)
    dealt, at = {}, 0
    for name, number in SHARES.items():
        dealt[name] = records[at : at + number]
        at += number
    assert at <= len(records)
    return dealt


def prune(
    small: Small,
    folder: Path,
    texts: Mapping[str, list[str]],
    engine: type[LocalEngine] = LocalEngine,
    privacy: object = None,
    **stage: object,
) -> dict:  # type: ignore[type-arg]
    """Runs a job of these owners; gives hash and contributors of every tensor."""
    folder.mkdir()
    clients = []
    for name, records in texts.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"text": record}) + "\n" for record in records), encoding="utf-8")
        clients.append({"name": name, "data": str(file), "samples": len(records)})
    rounds = {"quorum": 1} if engine is not LocalEngine else {}
    stage = {"aggregation": "pooled", "samples": 9, **stage}
    changes = {f"stages__0__{key}": value for key, value in stage.items()}
    job = small.job(
        folder.name,
        clients=clients,
        evaluate={},
        rounds=rounds,
        privacy=privacy or {},
        **changes,
    )
    wanted = load(job)
    run = RunFolder(folder / "run", wanted)
    local_clients = server.local_clients(wanted, server.open_model(wanted.model), run.path / "clients")
    server.run_job(wanted, engine(local_clients), run)
    run.close()
    tensors = json.loads((run.path / "pruning.json").read_text())["tensors"]
    return {row["name"]: (row["sha256"], row["pruned"], row["clients"]) for row in tensors}


def hashes(tensors: dict) -> dict:  # type: ignore[type-arg]
    return {name: row[:2] for name, row in tensors.items()}


@pytest.mark.parametrize(
    ("source", "pruner"), [("sequential", "wanda"), ("sequential", "sparsegpt"), ("sequential", "dsnot"), ("dense", "alps")]
)
def test_four_unequal_owners_get_the_bits_of_the_pooled_data(
    small: Small, owners: dict[str, list[str]], tmp_path: Path, source: str, pruner: str
) -> None:
    stage = {"source": source, "pruner": pruner, "sparsity": 0.7}
    apart = prune(small, tmp_path / "apart", owners, **stage)
    everything = [record for records in owners.values() for record in records]
    pooled = prune(small, tmp_path / "pooled", {"pool": everything}, **stage)
    random.Random(0).shuffle(everything)
    otherwise = prune(small, tmp_path / "otherwise", {"x": everything[:2], "y": everything[2:]}, **stage)
    assert hashes(apart) == hashes(pooled) == hashes(otherwise)
    assert all(row[2] == sorted(SHARES) for row in apart.values())
    less = prune(small, tmp_path / "less", {"pool": everything[:-1]}, **stage)
    assert hashes(less) != hashes(pooled)  # one window more or less does change the result


class Birchless(LocalEngine):
    """An engine on which one client is never reached again once the run has begun."""

    def request(
        self, kind: str, messages: Mapping[str, bytes], timeout: float | None = None, largest: int | None = None
    ) -> Iterator[tuple[str, bytes | None, str | None]]:
        for client, answer, error in super().request(kind, messages, timeout):
            yield (client, None, "gone") if client == "birch" and kind == SumInputs.KIND else (client, answer, error)


@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt"])
def test_a_client_that_drops_leaves_the_pooled_result_of_the_rest(
    small: Small, owners: dict[str, list[str]], tmp_path: Path, pruner: str
) -> None:
    dropped = prune(small, tmp_path / "dropped", owners, Birchless, pruner=pruner)
    rest = [record for name, records in owners.items() if name != "birch" for record in records]
    pooled = prune(small, tmp_path / "pooled", {"pool": rest}, pruner=pruner)
    assert hashes(dropped) == hashes(pooled)
    assert all("birch" not in row[2] for row in dropped.values())


def test_mixed_prunes_wide_inputs_with_wanda(small: Small, owners: dict[str, list[str]], tmp_path: Path) -> None:
    made = {
        key: hashes(prune(small, tmp_path / key, owners, **stage))
        for key, stage in {
            "mixed": {"pruner": "sparsegpt", "mixed": True},
            "wanda": {"pruner": "wanda"},
            "full": {"pruner": "sparsegpt"},
        }.items()
    }
    for name in made["mixed"]:
        assert made["mixed"][name] == made["wanda" if "down_proj" in name else "full"][name]
        assert made["wanda"][name] != made["full"][name]


def test_with_mixed_a_client_sends_no_products_of_wide_inputs(small: Small, tmp_path: Path) -> None:
    job = load(small.job("curious", stages__0__aggregation="pooled", stages__0__pruner="sparsegpt"))
    client = server.local_clients(job, server.open_model(job.model), tmp_path)[0]
    inputs = probe(Decoder(Checkpoint(small.model)), LENGTH, 0)[0]
    request = SumInputs(
        stage=0,
        block=0,
        calibration=Calibration(stage=0, samples=2, length=LENGTH, seed="0/0"),
        consumers={name: first for first, one in inputs.items() for name in one.consumers},
        widths={first: one.scale.numel() for first, one in inputs.items()},
        products=tuple(name for name in inputs if name != "mlp.down_proj"),
        mixed=True,
        moments=False,
        limit=2**61,
    )
    scales = {SCALE + name: one.scale for name, one in inputs.items()}
    assert "change/mlp.gate_proj/products" in request.respond(scales, client, "cpu").tensors
    with pytest.raises(FedgroveError, match="products of inputs that mixed = true excludes; refused"):
        request.model_copy(update={"products": tuple(inputs)}).respond(scales, client, "cpu")


def test_sums_are_damped_channel_by_channel_unless_the_job_says_otherwise(
    small: Small, owners: dict[str, list[str]], tmp_path: Path
) -> None:
    stage = {"pruner": "sparsegpt", "sparsity": 0.7}
    by_default = hashes(prune(small, tmp_path / "default", owners, **stage))
    published = hashes(prune(small, tmp_path / "published", owners, damping="mean", **stage))
    assert by_default == hashes(prune(small, tmp_path / "each", owners, damping="each", **stage)) != published


def test_a_protected_first_block_is_asked_of_nobody(small: Small, owners: dict[str, list[str]], tmp_path: Path) -> None:
    made = prune(small, tmp_path / "protected", owners, pruner="wanda", protect_first_block=True)
    for name, (_, pruned, clients) in made.items():
        assert clients == ([] if ".0." in name else sorted(SHARES))
        assert pruned > 0
    ledger = lines(tmp_path / "protected" / "run" / "ledger.jsonl")
    assert sum(line["kind"] == SumInputs.KIND and line["direction"] == "up" for line in ledger) == len(SHARES)


def test_fixed_point_agrees_with_floating_point() -> None:
    torch.manual_seed(0)
    sizes = torch.logspace(-1.5, 1, 96)
    probe = InputStatistics("squares")
    probe.add(torch.randn(50, 96) * sizes)
    x = torch.randn(4, 40, 96) * sizes
    statistic = Statistic("a", statistics.scale_of(probe), products=True)
    statistic.add(x)
    answer = statistic.tensors()
    got = statistics.finish(answer["change/a/squares"], answer["change/a/products"], statistic.scale, statistic.tokens)
    exact = (x.double().reshape(-1, 96).T @ x.double().reshape(-1, 96)) / (sizes[:, None] * sizes).double()
    torch.testing.assert_close(got.gram / (sizes[:, None] * sizes).double(), exact, rtol=1e-5, atol=2e-3)
    assert torch.equal(got.gram, got.gram.T)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e18])
def test_inputs_that_do_not_fit_are_not_summed(bad: float) -> None:
    x = torch.ones(1, 4, 3)
    x[0, 1, 2] = bad
    with pytest.raises(Exception, match="inputs of a are not finite or far larger"):
        Statistic("a", torch.ones(3), products=True).add(x)


def _answer() -> dict[str, torch.Tensor]:
    statistic = Statistic("a", torch.ones(5), products=True)
    statistic.add(torch.randn(2, 8, 5))
    return statistic.tensors()


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("squares", -1, "squares is out of range"),
        ("squares", 2**61, "squares is out of range"),
        ("products", 2**40, "products is larger than the squares allow"),
        ("products", -(2**40), "products is larger than the squares allow"),
    ],
)
def test_numbers_that_are_no_sums_of_squares_and_products_are_refused(name: str, value: int, says: str) -> None:
    answer = _answer()
    check = ({"a": 5}, ["a"], 2, 2**60)
    statistics.check_sums(answer, *check)
    answer[f"{CHANGE}a/{name}"][1] = value
    with pytest.raises(WireError, match=says):
        statistics.check_sums(answer, *check)


def test_a_liar_is_refused_by_name(small: Small, owners: dict[str, list[str]], tmp_path: Path) -> None:
    class Liar(LocalEngine):
        def request(
            self, kind: str, messages: Mapping[str, bytes], timeout: float | None = None, largest: int | None = None
        ) -> Iterator[tuple[str, bytes | None, str | None]]:
            for client, answer, error in super().request(kind, messages, timeout):
                if client == "cedar" and kind == SumInputs.KIND and answer is not None:
                    tensors, info = wire.unpack(answer)
                    answer = wire.pack(tensors, {**info, "tokens": 10 * info["tokens"]})
                yield client, answer, error

    made = prune(small, tmp_path / "liar", owners, Liar, pruner="wanda")
    rest = [record for name, records in owners.items() if name != "cedar" for record in records]
    assert hashes(made) == hashes(prune(small, tmp_path / "rest", {"pool": rest}, pruner="wanda"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"stages__0__pruner": "magnitude"}, "needs no sums"),
        ({"stages__0__rounds": 2}, "rounds: aggregation"),
        ({"stages__0__mixed": True}, "mixed: pruner"),
        ({"stages__0__damping": "each"}, "damping: pruner"),
        ({"clients__0__sparsity": 0.6}, "clients.sparsity: with aggregation"),
        ({"stages__0__aggregation": "fedspallm", "stages__0__source": "dense", "stages__0__rounds": 2}, "a second round"),
    ],
)
def test_what_does_not_go_together_is_refused(small: Small, changes: dict[str, object], says: str) -> None:
    spec = {"stages__0__aggregation": "pooled", **changes}
    assert says in complaint("plan", small.job("refused", **spec))


def test_the_plan_shows_the_bytes_of_each_choice_and_what_leaks(small: Small) -> None:
    job = small.job("choices", stages__0__aggregation="pooled")
    status, out, _ = cli("plan", job)
    assert status == 0
    for words in ("wanda", "sparsegpt, mixed", "protect_first_block"):
        assert words in " ".join(out.split())
    status, out, _ = cli("plan", job, "--json")
    choices = json.loads(out)[0]["choices"]
    assert choices["wanda"] < choices["sparsegpt, mixed"] < choices["sparsegpt"]
    _, out, _ = cli("plan", job, "--json", "--set", "stages.0.protect_first_block=true")
    assert json.loads(out)[0]["notes"][:-1] == []
    few = ("--set", "stages.0.pruner=sparsegpt", "--set", "stages.0.protect_first_block=true")
    _, out, _ = cli("plan", job, "--json", *few)
    assert "3 of 3 clients send products of inputs with 96 channels, summed over fewer tokens" in json.loads(out)[0]["notes"][0]
    _, out, _ = cli("plan", job, "--json", *few, "--set", "stages.0.samples=6")
    assert json.loads(out)[0]["notes"][:-1] == []
    run = small.folder / "choices-run"
    assert cli("run", job, "--out", run, "--quiet")[0] == 0
    sent = sum(
        row["bytes"]
        for row in lines(run / "ledger.jsonl")
        if row["client"] == "ash" and row["kind"] == SumInputs.KIND and row["direction"] == "up"
    )
    assert sent == pytest.approx(choices["wanda"], rel=0.4)  # little data: names and headers are a good part of it


def test_wanda_takes_a_thousandth_of_a_160m_llama() -> None:
    config = LlamaConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, vocab_size=32000
    )
    with init_empty_weights():
        model = LlamaForCausalLM(config)
    dense = 2 * sum(parameter.numel() for parameter in model.parameters())
    assert 150e6 < dense / 2 < 170e6
    block = find_blocks(model)[1][0]
    sums = {}
    with shared_inputs(block, lambda name: InputStatistics("nothing")) as inputs, init_empty_weights():
        hidden = torch.empty(1, 4, 768, device="meta")
        block(hidden, position_embeddings=(hidden[..., :64], hidden[..., :64]))
    torch.manual_seed(0)
    for name in {id(shared): name for name, shared in inputs.items()}.values():
        statistic = Statistic(name, torch.ones(3072 if name == "mlp.down_proj" else 768), products=False)
        for _ in range(16):
            statistic.add(torch.randn(1, 512, statistic.scale.numel()))
        sums |= statistic.tensors()
    assert len(sums) == 4
    assert 12 * len(wire.pack(sums, {"tokens": 8192})) <= dense / 1000


@pytest.mark.parametrize(("source", "secure"), [("dense", False), ("sequential", True)])
def test_a_killed_run_goes_on_to_the_same_bits(small: Small, tmp_path: Path, source: str, secure: bool) -> None:
    changes = {"aggregation": "pooled", "pruner": "sparsegpt", "source": source}
    job = small.job(
        f"killed-{source}-{secure}",
        evaluate={},
        privacy={"secure_aggregation": secure},
        **{f"stages__0__{key}": value for key, value in changes.items()},
    )
    killed("run", job, "--out", tmp_path / "run", moment=Moment("os.rename", "*/work/*block-0001.safetensors"))
    assert cli("run", job, "--out", tmp_path / "run", "--resume", "--quiet")[0] == 0
    assert cli("run", job, "--out", tmp_path / "whole", "--quiet")[0] == 0
    for file in ("model/model.safetensors", "pruning.json"):
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.parametrize("secure", [False, True])
def test_the_report_says_what_was_sent_and_who_could_see_it(small: Small, tmp_path: Path, secure: bool) -> None:
    job = small.job(f"told-{secure}", evaluate={}, privacy={"secure_aggregation": secure}, stages__0__aggregation="pooled")
    assert cli("run", job, "--out", tmp_path / "run", "--quiet")[0] == 0
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Every client sent sums of all 2 blocks" in page
    assert "were not answered" not in page
    assert Disclosure.SQUARES.sentence in page
    assert Disclosure.PRODUCTS.sentence not in page
    assert ("Whoever ran the server could see what each client sent" in page) is not secure
    assert ("sums over the clients in each stage" in page) is secure
    assert "protect_first_block = true" in page
