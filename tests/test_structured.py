"""The stage ``structured``: whole channels and heads go, and what is left is a plain, smaller model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedgrove import run as server
from fedgrove.client.hidden_states import Calibration
from fedgrove.errors import FedgroveError
from fedgrove.job.load import load
from fedgrove.models.blocks import Decoder, as_matrix
from fedgrove.models.experts import TYPES
from fedgrove.models.linears import linears
from fedgrove.models.stream import Checkpoint
from fedgrove.models.tensor_files import save_tensors
from fedgrove.models.width import FAMILIES, Width, family_of, width_of
from fedgrove.rounds.disclosure import Disclosure
from fedgrove.rounds.wire import CHANGE
from fedgrove.runfolder import RunFolder
from fedgrove.stages.structured.cut import cut_block
from fedgrove.stages.structured.exchanges.scores import CODE, LARGEST, ScoreGroups
from fedgrove.stages.structured.gradients import group_products
from fedgrove.stages.structured.scores import diagonal_fisher, fisher, taylor
from small import CLIENTS, LENGTH, Heard, Meddling, Moment, Small, cli, complaint, killed, lines, measurements
from test_architectures import ARCHITECTURES, plain, save, some_ids
from test_statistics import owners  # noqa: F401 (a fixture)

CUT = {"kind": "structured", "channels": 0.25, "heads": 0.5, "samples": 3, "length": LENGTH, "repair": False}
TUNE = {
    "kind": "tune", "method": "lora", "rounds": 2, "steps": 3, "length": LENGTH, "batches": [4], "ranks": [4], "bits": [32],
    "learning_rate": 0.01,
}  # fmt: skip
STAGES = [CUT]


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model" / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def goes_on_to_the_same_bits(small: Small, folder: Path, moment: Moment, stages: list[dict[str, Any]]) -> None:
    """Kills a run, and resumes it: model, measurements and record are those of a run that nothing disturbed."""
    changes = {"stages": stages, "evaluate__alone": "/alone/" in moment.path}
    job, run = small.job("killed", **changes), folder / "run"
    killed("run", job, "--out", run, "--quiet", moment=moment)
    assert cli("run", job, "--out", run, "--resume")[0] == 0
    undisturbed = small.undisturbed(**changes)
    assert same(run, undisturbed)
    assert measurements(run) == measurements(undisturbed)
    assert told_by(run) == told_by(undisturbed)


def told_by(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "structured.json").read_text())
    return found


def config_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "model" / "config.json").read_text())
    return found


def mean_perplexity(run: Path, stage: int | None) -> float:
    found = [
        v for (s, r, c, name), v in measurements(run).items() if s == stage and r is None and c is None and "perpl" in name
    ]
    return sum(found) / len(found)


class Kept:
    """Windows in memory, for a walk without a client."""

    def __init__(self) -> None:
        self.windows: dict[int, list[Tensor]] = {}

    def write(self, index: int, windows: Iterable[Tensor], number: int) -> int:
        self.windows[index] = [window.detach().clone() for window in windows]
        assert len(self.windows[index]) == number
        return index

    def read(self, index: int) -> Iterator[Tensor]:
        return iter(self.windows[index])


# What is cut, in every architecture


@pytest.mark.parametrize("name", FAMILIES)
def test_the_narrow_model_computes_what_the_model_computes_without_its_groups(name: str, tmp_path: Path, grove: Path) -> None:
    folder = save(name, tmp_path / "model", grove, torch.float32)
    model = Checkpoint(folder)
    decoder, family = Decoder(model), family_of(model.config)
    before = width_of(model.config)
    after = Width(before.channels * 3 // 4, before.heads // 2 if family.heads else before.heads)
    whole = plain(folder)
    overlay = tmp_path / "overlay"
    for block in range(len(decoder)):
        generator = torch.Generator().manual_seed(block)
        kept = {
            kind: torch.randperm(getattr(before, kind), generator=generator)[: getattr(after, kind)].sort().values
            for kind in ("channels", "heads")
        }
        save_tensors(cut_block(decoder, block, kept)[0], overlay / f"block-{block}.safetensors")
        for kind, part in (("channels", family.channels), ("heads", family.heads)):
            if part is None:
                continue
            reader = whole.get_submodule(f"{decoder.prefix}.{block}.{part.consumer}")
            matrix = as_matrix(reader, reader.weight.data)
            stays = torch.zeros(getattr(before, kind), dtype=torch.bool).index_fill(0, kept[kind], True)
            matrix.view(len(matrix), len(stays), -1)[:, ~stays] = 0
    narrow = model.over(overlay, width=after)
    narrow.write(tmp_path / "structured")
    smaller = plain(tmp_path / "structured")
    ids = some_ids()
    with torch.no_grad():
        assert torch.allclose(smaller(ids).logits, whole(ids).logits, atol=1e-4)
    assert width_of(smaller.config) == after
    parameters = sum(parameter.numel() for parameter in smaller.parameters())
    assert parameters < sum(parameter.numel() for parameter in whole.parameters())
    assert Checkpoint(tmp_path / "structured").num_bytes() == narrow.num_bytes() < model.num_bytes()


def test_a_llama_whose_heads_no_longer_divide_its_width_is_written_as_a_mistral(small: Small, tmp_path: Path) -> None:
    from small import make_model

    folder = make_model(tmp_path / "model", num_attention_heads=8, num_key_value_heads=4)
    run = tmp_path / "run"
    assert cli("run", small.job("mistral", model={"path": str(folder)}, stages=[{**CUT, "heads": 0.25}]), "--out", run)[0] == 0
    config = config_of(run)
    assert config["architectures"] == ["MistralForCausalLM"]
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (6, 3, 8)
    assert config["sliding_window"] is None
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    assert AutoTokenizer.from_pretrained(run / "model")("word").input_ids
    assert type(model).__name__ == "MistralForCausalLM"
    assert "type mistral" in (run / "report.html").read_text()
    again = cli("evaluate", run, "--data", small.texts["held-0"], "--length", "32", "--json", "--quiet")
    assert again[0] == 0


# What is summed


def reference(model: nn.Module, linear: nn.Module, ids: Tensor, number: int) -> Tensor:
    """Σ w·∂L/∂w over each group of a linear's columns, from the gradient of the weight itself; (windows, groups)."""
    rows = []
    for window in ids:
        model.zero_grad()
        logits = model(window[None]).logits[0, :-1]
        nn.functional.cross_entropy(logits, window[1:], reduction="sum").backward()
        weight = linear.weight
        product = as_matrix(linear, (weight * weight.grad).detach()).double().sum(0)
        rows.append(product.view(number, -1).sum(1))
    return torch.stack(rows)


@pytest.mark.parametrize("name", FAMILIES)
def test_products_are_those_of_weights_and_their_gradients(name: str, tmp_path: Path, grove: Path) -> None:
    folder = save(name, tmp_path / "model", grove, torch.float32)
    decoder = Decoder(Checkpoint(folder))
    ids = some_ids(3)
    with torch.no_grad():  # as clients respond to requests
        found = dict(group_products(decoder, ids, Kept()))
    assert list(found) == list(reversed(range(len(decoder))))
    model = plain(folder)
    width, family = width_of(decoder.checkpoint.config), family_of(decoder.checkpoint.config)
    for block in (0, len(decoder) - 1):
        for kind, part in (("channels", family.channels), ("heads", family.heads)):
            if part is None:
                assert kind not in found[block]
                continue
            linear = model.get_submodule(f"{decoder.prefix}.{block}.{part.consumer}")
            expected = reference(model, linear, ids, getattr(width, kind))
            assert torch.allclose(found[block][kind], expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("name", FAMILIES)
def test_single_weights_are_squared_by_window_in_all_linears_of_a_group(name: str, tmp_path: Path, grove: Path) -> None:
    folder = save(name, tmp_path / "model", grove, torch.float32)
    decoder, ids = Decoder(Checkpoint(folder)), some_ids(2)
    with torch.no_grad():  # as clients respond to requests
        found = dict(group_products(decoder, ids, Kept(), diagonal_fisher.weigh))
    model, last = plain(folder), len(decoder) - 1
    width, family = width_of(decoder.checkpoint.config), family_of(decoder.checkpoint.config)
    of_kinds = {"channels": family.channels} | ({"heads": family.heads} if family.heads else {})
    assert found[last].keys() == of_kinds.keys()
    expected = {kind: torch.zeros(len(ids), getattr(width, kind), dtype=torch.float64) for kind in of_kinds}
    for row, window in enumerate(ids):
        model.zero_grad()
        nn.functional.cross_entropy(model(window[None]).logits[0, :-1], window[1:], reduction="sum").backward()
        for kind, part in of_kinds.items():
            for linear in (*part.producers, part.consumer):
                module = model.get_submodule(f"{decoder.prefix}.{last}.{linear}")
                squares = as_matrix(module, (module.weight * module.weight.grad).detach()).double().square()
                of_inputs = squares.sum(0) if linear == part.consumer else squares.sum(1)
                expected[kind][row] += of_inputs.view(getattr(width, kind), -1).sum(1)
    for kind, squares in expected.items():
        assert torch.allclose(found[last][kind], squares, rtol=1e-3, atol=1e-3 * float(squares.max()))


def test_every_linear_that_reads_or_makes_a_group_is_named_by_its_family(tmp_path: Path, grove: Path) -> None:
    assert set(FAMILIES) == set(ARCHITECTURES) - set(TYPES)
    for name in FAMILIES:
        decoder = Decoder(Checkpoint(save(name, tmp_path / name, grove, torch.float32)))
        family = family_of(decoder.checkpoint.config)
        named = [linear for part in (family.channels, family.heads) if part for linear in (*part.producers, part.consumer)]
        assert set(named) <= set(linears(decoder.blocks[0]))


def test_sums_depend_on_no_order_and_on_no_owner() -> None:
    products = torch.randn(12, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for score in (fisher, taylor, diagonal_fisher):
        whole = CODE.encode_sum(score.weigh(products), LARGEST)
        parts = [CODE.encode_sum(score.weigh(part), LARGEST) for part in products.flip(0).split([5, 1, 6])]
        assert torch.equal(whole, sum(parts[1:], parts[0]))
    assert torch.allclose(fisher.finish(whole), whole)
    assert (taylor.finish(whole) >= 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_gradients_that_do_not_fit_are_refused(value: float) -> None:
    with pytest.raises(FedgroveError, match="not finite, or too large"):
        CODE.encode_sum(torch.tensor([[1.0, value]], dtype=torch.float64), LARGEST)


def test_a_client_whose_gradients_do_not_fit_says_what_would_do(small: Small, tmp_path: Path) -> None:
    job = load(small.job("large", stages=STAGES))
    client = server.local_clients(job, server.open_model(job.model), tmp_path)[0]
    calibration = Calibration(stage=0, samples=1, length=LENGTH, seed="0/0", through="gradients")
    request = ScoreGroups(stage=0, score="fisher", calibration=calibration, limit=1)
    with pytest.raises(FedgroveError) as error, torch.no_grad():
        request.respond({}, client, "cpu")
    assert str(error.value) == (
        "client 'ash': the gradients of its text are not finite or too large; try model.dtype = \"float32\""
    )


# A whole stage


def test_every_block_loses_the_same_and_a_plain_configuration_says_so(small: Small) -> None:
    run = small.undisturbed(stages=STAGES)
    config = config_of(run)
    assert (config["intermediate_size"], config["num_attention_heads"], config["num_key_value_heads"]) == (72, 2, 1)
    assert config["head_dim"] == 16
    told = told_by(run)
    assert [(len(row["channels"]), len(row["heads"])) for row in told["blocks"]] == [(24, 1), (24, 1)]
    assert told["sums"] == {"groups": {"clients": list(CLIENTS), "tokens": 3 * 3 * LENGTH}}
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    assert sum(p.numel() for p in model.parameters()) == told["parameters"][1] < told["parameters"][0]
    assert told["bytes"][1] == 2 * told["parameters"][1]
    before = load_file(small.model / "model.safetensors")
    row = told["blocks"][1]
    stays = [i for i in range(96) if i not in row["channels"]]
    after = weights(run)
    assert torch.equal(before["model.layers.1.mlp.up_proj.weight"][stays], after["model.layers.1.mlp.up_proj.weight"])
    assert torch.equal(before["model.layers.1.mlp.down_proj.weight"][:, stays], after["model.layers.1.mlp.down_proj.weight"])


def test_what_was_cut_is_what_matters_least_to_all_text_together(small: Small) -> None:
    run = small.undisturbed(stages=[{**CUT, "heads": 0.0, "score": "fisher"}], evaluate={})
    decoder = Decoder(Checkpoint(small.model))
    job = load(run / "job.toml")
    from fedgrove.data.windows import calibration_windows

    tokenizer = AutoTokenizer.from_pretrained(small.model)
    ids = torch.cat([calibration_windows(c.data, c.text, tokenizer, 3, LENGTH, f"0/0/{c.name}") for c in job.clients])
    model = plain(small.model)
    for block in (0, 1):
        linear = model.get_submodule(f"{decoder.prefix}.{block}.mlp.down_proj")
        score = reference(model, linear, ids, 96).square().sum(0)
        assert sorted(score.argsort()[:24].tolist()) == told_by(run)["blocks"][block]["channels"]


def test_scores_choose_and_the_models_differ(small: Small) -> None:
    one, other = small.undisturbed(stages=STAGES), small.undisturbed(stages=[{**CUT, "score": "taylor"}], evaluate={})
    assert told_by(one)["blocks"] != told_by(other)["blocks"]


@pytest.mark.parametrize("score", ["fisher", "diagonal_fisher"])
def test_owners_get_the_model_that_one_owner_of_all_their_text_would_get(
    small: Small,
    tmp_path: Path,
    owners: Mapping[str, list[str]],  # noqa: F811
    score: str,
) -> None:
    runs = small.apart_and_pooled(tmp_path, owners, stages=[{**CUT, "score": score}])
    assert told_by(runs[0])["sums"]["groups"]["tokens"] == told_by(runs[1])["sums"]["groups"]["tokens"]
    assert same(*runs)


def test_secure_aggregation_changes_no_bit_and_shows_no_client(small: Small, tmp_path: Path) -> None:
    job = small.job("secure", stages=STAGES, privacy={"secure_aggregation": True})
    assert cli("run", job, "--out", tmp_path / "run")[0] == 0
    assert same(tmp_path / "run", small.undisturbed(stages=STAGES))


@pytest.mark.parametrize(
    "moment",
    [
        Moment("os.rename", "*/stage-0/groups.safetensors", "cut"),
        Moment("os.rename", "*/round-0/block-0001.safetensors", "cut"),
        Moment("os.rename", "*/alone/birch/block-0001.safetensors", "cut"),
    ],
    ids=["sums", "a block", "alone"],
)
def test_a_killed_run_goes_on_to_the_same_bits(small: Small, tmp_path: Path, moment: Moment) -> None:
    goes_on_to_the_same_bits(small, tmp_path, moment, STAGES)


def meddle(does: str, tensors: dict[str, Tensor], reply: dict[str, Any]) -> None:
    name = f"{CHANGE}1/channels"
    match does:
        case "negative":
            tensors[name] = -tensors[name] - 1
        case "huge":
            tensors[name] = tensors[name] + LARGEST
        case "shape":
            tensors[name] = tensors[name][:-1]
        case "tokens":
            reply["tokens"] *= 1000


def run_meddled(small: Small, out: Path, does: str, **changes: Any) -> list[str]:
    heard = Heard()
    wanted = load(small.job("meddled", stages=STAGES, **changes))
    run = RunFolder(out, wanted, listener=heard)
    try:
        change = None if does == "vanish" else partial(meddle, does)
        engine = Meddling(server.local_engine(wanted, out / "clients"), ScoreGroups.KIND, change=change)
        server.run_job(wanted, engine, run)
    finally:
        run.close()
    return heard.lines


@pytest.mark.parametrize(
    ("does", "why"),
    [
        ("negative", "change/1/channels is out of range"),
        ("huge", "change/1/channels is out of range"),
        ("shape", "has shape [95], not [96]"),
        ("tokens", "claims 48000 tokens, not 48"),
    ],
)
def test_an_answer_that_is_none_is_refused(small: Small, tmp_path: Path, does: str, why: str) -> None:
    with pytest.raises(FedgroveError, match=re.escape(why)) as fault:
        run_meddled(small, tmp_path / "run", does)
    assert str(fault.value).startswith("client 'birch'")


def test_without_a_client_the_model_is_that_of_the_others(small: Small, tmp_path: Path) -> None:
    said = run_meddled(small, tmp_path / "run", "vanish", rounds__quorum=2)
    assert "birch: its process died (status -9)" in said
    others = [{"name": name, "data": str(small.texts[name])} for name in CLIENTS if name != "birch"]
    assert cli("run", small.job("others", stages=STAGES, clients=others, evaluate={}), "--out", tmp_path / "others")[0] == 0
    assert same(tmp_path / "run", tmp_path / "others")
    assert told_by(tmp_path / "run")["sums"]["groups"]["clients"] == ["ash", "cedar"]


def test_alone_is_what_a_client_would_have_made_by_itself(small: Small, tmp_path: Path) -> None:
    run = small.undisturbed(stages=STAGES, evaluate__alone=True)
    only = {"clients": [{"name": "birch", "data": str(small.texts["birch"])}]}
    assert cli("run", small.job("birch", stages=STAGES, **only), "--out", tmp_path / "run")[0] == 0
    alone = measurements(run)[0, None, "birch", "perplexity/held-0"]
    assert alone == measurements(tmp_path / "run")[0, None, None, "perplexity/held-0"]


@pytest.mark.parametrize("method", ["full", "fedpipe"])
def test_tuning_recovers_the_narrow_model(small: Small, method: str) -> None:
    words = small.one_word()
    run = small.undisturbed(stages=[CUT, {**TUNE, "method": method}], **words)
    narrow = small.undisturbed(stages=STAGES, **words)
    assert mean_perplexity(run, 1) < 0.5 * mean_perplexity(run, 0)
    assert mean_perplexity(run, 0) == mean_perplexity(narrow, 0)
    assert config_of(run) == config_of(narrow)
    assert {name: tensor.shape for name, tensor in weights(run).items()} == {n: t.shape for n, t in weights(narrow).items()}
    AutoModelForCausalLM.from_pretrained(run / "model")


def test_clients_tune_the_narrow_model_with_its_biases(small: Small, tmp_path: Path, grove: Path) -> None:
    folder = save("qwen2", tmp_path / "model", grove, torch.float32)
    spec = {**small.one_word(), "model": {"path": str(folder)}}
    job = small.job("biases", stages=[{**CUT, "heads": 0.5}, TUNE], **spec)
    assert cli("run", job, "--out", tmp_path / "run")[0] == 0
    assert mean_perplexity(tmp_path / "run", 1) < 0.5 * mean_perplexity(tmp_path / "run", 0)
    assert weights(tmp_path / "run")["model.layers.0.self_attn.q_proj.bias"].shape == (16,)
    losses = [v for (s, r, c, name), v in measurements(tmp_path / "run").items() if name == "loss" and r == 0 and c]
    assert len(losses) == 3


def test_page_card_and_table_speak_of_a_smaller_model(small: Small) -> None:
    run = small.undisturbed(stages=STAGES, evaluate__alone=True)
    page = (run / "report.html").read_text()
    assert "Fewer or narrower blocks" in page
    assert "24 of 96 channels and 2 of 4 heads out of every block" in page
    assert "zeros take as much space" not in page
    assert "structurally pruned on its own text only" in page
    assert Disclosure.SCORES.sentence in page
    card = (run / "model" / "README.md").read_text()
    assert "Structured pruning of 25% of the channels and 50% of the heads" in card
    assert "exact zeros" not in card
    sent = [
        line["bytes"] for line in lines(run / "ledger.jsonl") if (line["kind"], line["direction"]) == (ScoreGroups.KIND, "up")
    ]
    assert max(sent) < 4000, "a number for each of 196 groups, and names"


def test_the_plan_says_what_goes_and_what_it_takes(small: Small) -> None:
    job = small.job("plan", stages=[CUT, TUNE])
    plans = json.loads(cli("plan", job, "--json")[1])
    assert plans[0]["before"] == {"channels": 96, "heads": 2}
    assert plans[0]["after"] == {"channels": 72, "heads": 1}
    assert plans[0]["parameters"] == told_by(small.undisturbed(stages=STAGES))["parameters"]
    assert all(share["memory"] > 0 and share["upload"] > 0 for share in plans[0]["clients"].values())
    assert "24 of 96 channels and 2 of 4 heads" in " ".join(cli("plan", job)[1].split())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stages": [{**CUT, "channels": 0.0, "heads": 0.0}]}, ("stages.0", "nothing is cut")),
        (
            {"stages": [{**CUT, "heads": 0.25}]},
            ("stages.0.heads", "0.25 of 2 groups of heads is less than one", "give 0.5 or more"),
        ),
        ({"stages": [{**CUT, "score": "best"}]}, ("stages.0.score", "fisher, taylor")),
        ({"stages": [TUNE, CUT]}, ("stages.1.kind", "first stage")),
        (
            {"stages": [CUT, {"kind": "prune", "sparsity": 0.5, "samples": 3, "length": LENGTH}]},
            ("stages.1.kind", "two jobs"),
        ),
        ({"stages": STAGES, "clients__0__memory": "1MiB"}, ("client 'ash'", "MiB of memory", "lower length")),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    small: Small, tmp_path: Path, changes: dict[str, Any], said: tuple[str, ...]
) -> None:
    line = complaint("run", small.job("refused", **changes), "--out", tmp_path / "run")
    for part in said:
        assert part in line


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_heads_that_a_configuration_cannot_say_are_refused(small: Small, tmp_path: Path, grove: Path, name: str) -> None:
    folder = save(name, tmp_path / "model", grove, torch.float32)
    line = complaint("run", small.job("gpt", model={"path": str(folder)}, stages=STAGES), "--out", tmp_path / "run")
    assert f"type {name} does not allow fewer heads" in line
    assert "set it to 0" in line
