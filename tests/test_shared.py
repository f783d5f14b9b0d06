"""Models whose blocks share tensors, as MobiLlama's do: loaded, pruned, cut, tuned and written as what they are."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedgrove.client.hidden_states import Calibration
from fedgrove.client.windows import calibration_windows
from fedgrove.deploy.flare.exchanges.join import JoinRun
from fedgrove.input_statistics import fixed_point
from fedgrove.input_statistics.fixed_point import Statistic
from fedgrove.input_statistics.probe import probe
from fedgrove.input_statistics.statistics import InputStatistics
from fedgrove.job.load import load
from fedgrove.models.blocks import Decoder
from fedgrove.models.cost import measure_cost
from fedgrove.models.digest import digests
from fedgrove.models.masks import Target
from fedgrove.models.preconditions import check_parameters
from fedgrove.models.pretrained import load_full_model
from fedgrove.models.shared import SHARES, as_table
from fedgrove.models.stream import Checkpoint
from fedgrove.models.walk import walk
from fedgrove.rounds import wire
from fedgrove.run import local_clients, open_model
from fedgrove.stages.prune import pruners
from fedgrove.stages.structured.exchanges.scores import LARGEST, ScoreGroups
from fedgrove.stages.tune.frozen import load as load_frozen
from fedgrove.stages.tune.parametrizations import Attachment, lora
from small import CLIENTS, LENGTH, SAMPLES, Moment, Small, cli, complaint, killed, make_model
from test_architectures import plain, some_ids
from test_federation_site import make_site, send, sign

BLOCKS = 4
MLP = tuple(f"mlp.{name}_proj" for name in ("gate", "up", "down"))
MAP = {f"model.layers.*.{name}.weight": f"model.layers.0.{name}.weight" for name in MLP}
WEIGHTS = "model.safetensors"
POOLED = {
    "kind": "prune", "pruner": "sparsegpt", "aggregation": "pooled", "sparsity": 0.5, "samples": SAMPLES, "length": LENGTH,
}  # fmt: skip
VOTED = {**POOLED, "aggregation": "fedspallm", "source": "dense"}
NARROW = {
    "kind": "structured",
    "channels": 0.25,
    "heads": 0.5,
    "repair": False,
    "score": "fisher",
    "samples": SAMPLES,
    "length": LENGTH,
}
TUNE = {"kind": "tune", "method": "lora", "ranks": [4], "rounds": 1, "steps": 2, "batches": [1], "length": LENGTH}


def share(folder: Path, once: bool = False) -> Path:
    """Lets all blocks of a model have the feed-forward part of the first, stored in every block, or once."""
    tensors = load_file(folder / WEIGHTS)
    for block in range(1, BLOCKS):
        for name in MLP:
            tensors[f"model.layers.{block}.{name}.weight"] = tensors[f"model.layers.0.{name}.weight"].clone()
            if once:
                del tensors[f"model.layers.{block}.{name}.weight"]
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """A federation with a model whose four blocks share one feed-forward part, which is stored in each of them."""
    small = Small(tmp_path_factory.mktemp("shared"))
    small.model = share(make_model(small.folder / "each", num_hidden_layers=BLOCKS))
    share(make_model(small.folder / "once", num_hidden_layers=BLOCKS), once=True)
    return small


def changes(small: Small, model: str = "each", *stages: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Changes of a job: a model with its shares, stages, nothing measured."""
    return {
        "model": {"path": str(small.folder / model), "shares": MAP}, "stages": list(stages or [POOLED]), "evaluate": {}, **more,
    }  # fmt: skip


def tensors(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model" / WEIGHTS)


def are_shared(found: Mapping[str, Tensor], blocks: int = BLOCKS) -> bool:
    """Whether the copies of every shared tensor are equal, bit for bit."""
    names = [[f"model.layers.{block}.{name}.weight" for block in range(blocks)] for name in MLP]
    return all(torch.equal(found[first], found[other]) for first, *others in names for other in others)


def logits(checkpoint: Checkpoint, ids: Tensor) -> Tensor:
    """The logits of a model that runs block by block."""
    decoder = Decoder(checkpoint)
    *_, (_, _, hidden) = walk(decoder, [ids], len(decoder))
    return decoder.head(hidden[0])[None]


def with_one_part(folder: Path) -> nn.Module:
    """Plain transformers, in which all blocks have the very module of the first, as in MobiLlama's code."""
    model: Any = plain(folder)
    for layer in model.model.layers:
        layer.mlp = model.model.layers[0].mlp
    return model


# The model: what is stored once or in every block, and what other programs get


@pytest.mark.parametrize("form", ["each", "once"])
def test_the_blocks_compute_with_one_module(shared: Small, form: str) -> None:
    ids = some_ids()
    wanted = with_one_part(shared.folder / "each")
    with torch.no_grad():
        assert torch.equal(logits(Checkpoint(shared.folder / form, shares=MAP), ids), wanted(ids).logits)


def test_a_model_that_is_stored_once_is_written_for_other_programs_and_back(shared: Small, tmp_path: Path) -> None:
    ids, once = some_ids(), Checkpoint(shared.folder / "once", shares=MAP)
    once.write(tmp_path / "model")
    assert load_file(tmp_path / "model" / WEIGHTS).keys() == load_file(shared.folder / "once" / WEIGHTS).keys()
    assert json.loads((tmp_path / "model" / SHARES).read_text()) == once.shares
    assert cli("export", tmp_path / "model", "--to", "hf", "--out", tmp_path / "hf")[0] == 0
    assert load_file(tmp_path / "hf" / WEIGHTS).keys() == load_file(shared.folder / "each" / WEIGHTS).keys()
    with torch.no_grad():
        wanted = with_one_part(shared.folder / "each")(ids).logits
        assert torch.equal(plain(tmp_path / "hf")(ids).logits, wanted)
        assert torch.equal(load_full_model(tmp_path / "model", dtype=torch.float32)(ids).logits, wanted)
    assert cli("export", tmp_path / "hf", "--to", "shared", "--out", tmp_path / "back")[0] == 0
    assert (tmp_path / "back" / WEIGHTS).read_bytes() == (tmp_path / "model" / WEIGHTS).read_bytes()


def test_without_the_block_that_has_a_shared_tensor_the_next_one_has_it(shared: Small, tmp_path: Path) -> None:
    ids = some_ids()
    Checkpoint(shared.folder / "each").over(kept_blocks=(1, 3)).write(tmp_path / "plain")
    for form in ("each", "once"):
        shorter = Checkpoint(shared.folder / form, shares=MAP).over(kept_blocks=(1, 3))
        assert shorter.shares == {f"model.layers.1.{name}.weight": f"model.layers.0.{name}.weight" for name in MLP}
        with torch.no_grad():
            assert torch.equal(logits(shorter, ids), plain(tmp_path / "plain")(ids).logits)
        shorter.write(tmp_path / form)
        assert torch.equal(logits(Checkpoint(tmp_path / form), ids), logits(shorter, ids))


def test_a_plan_counts_a_shared_tensor_once(shared: Small) -> None:
    each, once = (Decoder(Checkpoint(shared.folder / form, shares=MAP)) for form in ("each", "once"))
    alone = Decoder(Checkpoint(shared.folder / "each"))
    (note,) = check_parameters(once)
    unique = sum(tensor.numel() for tensor in load_file(shared.folder / "once" / WEIGHTS).values())
    assert f"{unique:,} numbers" in note
    assert "12 parameters share 3 tensors" in note
    cost, of_each, unshared = (measure_cost(decoder, LENGTH, False) for decoder in (once, each, alone))
    assert cost == of_each
    assert cost.parameters + cost.others == unique
    assert (cost.multiplied, cost.saved) == (unshared.parameters, unshared.saved)
    assert (
        unshared.parameters - cost.parameters
        == (BLOCKS - 1) * sum(unshared.linears[f"model.layers.0.{n}"][0] * 64 for n in MLP[:2]) + (BLOCKS - 1) * 64 * 96
    )


# Pruning


def inputs_of(model: nn.Module, texts: Tensor, linear: str) -> list[list[Tensor]]:
    """What a linear of each block reads in plain transformers, batch by batch."""
    module: Any = model
    found: list[list[Tensor]] = [[] for _ in module.model.layers]
    at: list[int] = [0]

    def note(block: int) -> Any:
        return lambda *_: at.__setitem__(0, block)

    shared = module.model.layers[0].get_submodule(linear)
    hooks = [layer.register_forward_pre_hook(note(block)) for block, layer in enumerate(module.model.layers)]
    hooks.append(shared.register_forward_pre_hook(lambda _, args: found[at[0]].append(args[0])))
    with torch.no_grad():
        for ids in texts:
            model(ids)
    for hook in hooks:
        hook.remove()
    return found


def test_a_shared_matrix_is_pruned_once_by_the_sums_over_all_its_blocks_and_clients(shared: Small, tmp_path: Path) -> None:
    spec = changes(shared)
    run = shared.undisturbed(**spec)
    found = tensors(run)
    assert are_shared(found)
    assert [file.name for file in (run / "model").glob("*.safetensors")] == [WEIGHTS]
    assert Checkpoint(run / "model").num_bytes() == Checkpoint(shared.model).num_bytes()
    job = load(shared.job("reference", **spec))
    clients = local_clients(job, open_model(job.model), tmp_path)
    texts = [calibration_windows(client, SAMPLES, LENGTH, "0/0") for client in clients]
    model = with_one_part(shared.model)
    blocks = probe(Decoder(open_model(job.model)), LENGTH, job.seed)
    for linear, first in (("mlp.up_proj", "mlp.gate_proj"), ("mlp.down_proj", "mlp.down_proj")):
        total = None
        for block, inputs in enumerate(inputs_of(model, torch.cat(texts)[:, None], linear)):
            sums = Statistic(first, blocks[block][first].scale, products=True)
            for window in inputs:
                sums.add(window)
            sent = sums.tensors()
            known = fixed_point.finish(
                sent[f"change/{first}/squares"], sent[f"change/{first}/products"], sums.scale, sums.tokens
            )
            total = known.gram if total is None else total + known.gram
        weight = load_file(shared.model / WEIGHTS)[f"model.layers.0.{linear}.weight"]
        statistics = InputStatistics("gram", BLOCKS * len(CLIENTS) * SAMPLES * LENGTH, total)
        wanted, _ = pruners.prune("sparsegpt", weight.float().contiguous(), statistics, Target(0.5), "each")
        assert torch.equal(found[f"model.layers.0.{linear}.weight"], wanted.to(weight.dtype))


def test_a_client_that_prunes_alone_prunes_a_shared_matrix_by_the_inputs_of_all_blocks(shared: Small, tmp_path: Path) -> None:
    one = [{"name": "ash", "data": str(shared.texts["ash"])}]
    spec = changes(shared, "once", VOTED, clients=one)
    run = shared.undisturbed(**spec)
    job = load(shared.job("alone", **spec))
    (client,) = local_clients(job, open_model(job.model), tmp_path)
    model, linear = with_one_part(shared.model), "mlp.down_proj"
    total = None
    for inputs in inputs_of(model, calibration_windows(client, SAMPLES, LENGTH, "0/0")[None], linear):
        known = InputStatistics("gram")
        for batch in inputs:
            known.add(batch)
        total = known.gram if total is None else total + known.gram
    weight = load_file(shared.model / WEIGHTS)[f"model.layers.0.{linear}.weight"]
    statistics = InputStatistics("gram", BLOCKS * SAMPLES * LENGTH, total)
    wanted, _ = pruners.prune("sparsegpt", weight.float().contiguous(), statistics, Target(0.5), "mean")
    assert torch.equal(tensors(run)[f"model.layers.0.{linear}.weight"], wanted.to(weight.dtype))
    plan = json.loads((run / "plan-0-prune.json").read_text())
    records = json.loads((run / "pruning.json").read_text())["tensors"]
    assert len(records) == len({row["name"] for row in records}) == BLOCKS * 4 + 3
    each = load(shared.job("unshared", **{**spec, "model": {"path": str(shared.model)}}))
    assert plan["notes"]
    assert each.model.shares == {}


def test_secure_sums_and_one_stored_tensor_give_the_same_bits(shared: Small, tmp_path: Path) -> None:
    wanted = tensors(shared.undisturbed(**changes(shared)))
    job = shared.job("secure", **changes(shared, "once", privacy={"secure_aggregation": True}))
    assert cli("run", job, "--out", tmp_path / "run")[0] == 0
    found = tensors(tmp_path / "run")
    assert len(found) == len(wanted) - (BLOCKS - 1) * len(MLP)
    cards = [run / "model" / "README.md" for run in (tmp_path / "run", shared.undisturbed(**changes(shared)))]
    assert ["fedgrove export model --to hf" in card.read_text() for card in cards] == [True, False]
    assert all(torch.equal(found[name], wanted[name]) for name in found)


def test_blocks_that_share_all_their_linears_are_pruned_with_the_last_of_them(shared: Small, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "same", num_hidden_layers=BLOCKS)
    stored = load_file(folder / WEIGHTS)
    linears = [*MLP, *(f"self_attn.{name}_proj" for name in "qkvo")]
    every = {f"model.layers.*.{name}.weight": f"model.layers.0.{name}.weight" for name in linears}
    gone = [f"model.layers.{block}.{name}.weight" for block in range(1, BLOCKS) for name in linears]
    save_file({name: tensor for name, tensor in stored.items() if name not in gone}, folder / WEIGHTS, {"format": "pt"})
    model = {"path": str(folder), "shares": every}
    job = shared.job("same", **{**changes(shared, "each", VOTED, privacy={"secure_aggregation": True}), "model": model})
    assert cli("run", job, "--out", tmp_path / "run")[0] == 0
    records = json.loads((tmp_path / "run" / "pruning.json").read_text())["tensors"]
    assert [row["block"] for row in records] == [BLOCKS - 1] * len(linears)
    assert all(int((tensors(tmp_path / "run")[row["name"]] == 0).sum()) == row["numel"] // 2 for row in records)


@pytest.mark.parametrize(
    ("stage", "moment"),
    [
        (POOLED, Moment("os.rename", "*/round-0/block-0002.safetensors")),
        (VOTED, Moment("os.rename", "*/clients/birch/*/0002.sums")),
    ],
    ids=["pooled", "voted"],
)
def test_a_killed_run_goes_on_with_the_sums_so_far(
    shared: Small, tmp_path: Path, stage: dict[str, Any], moment: Moment
) -> None:
    spec = changes(shared, "each", stage)
    job = shared.job("killed", **spec)
    killed("run", job, "--out", tmp_path / "run", "--quiet", moment=moment)
    assert cli("run", job, "--out", tmp_path / "run", "--resume")[0] == 0
    undisturbed = shared.undisturbed(**spec)
    for file in (f"model/{WEIGHTS}", f"model/{SHARES}", "pruning.json"):
        assert (tmp_path / "run" / file).read_bytes() == (undisturbed / file).read_bytes()
    assert not list((tmp_path / "run" / "work").rglob("0002.sums"))


# Cutting and tuning


def test_what_is_cut_and_then_tuned_is_still_shared(shared: Small, tmp_path: Path) -> None:
    narrow = shared.undisturbed(**changes(shared, "each", NARROW))
    assert are_shared(tensors(narrow))
    again = {"path": str(narrow / "model")}  # a result says itself what its blocks share
    tuned = shared.undisturbed(**{**changes(shared, "each", TUNE), "model": again})
    assert are_shared(tensors(tuned))
    before, after = (load_file(run / "model" / WEIGHTS) for run in (narrow, tuned))
    assert not torch.equal(before["model.layers.0.mlp.up_proj.weight"], after["model.layers.0.mlp.up_proj.weight"])
    adapter = load_file(tuned / "adapter" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.{}.mlp.up_proj.lora_B.weight"
    assert torch.equal(adapter[name.format(0)], adapter[name.format(3)])


def test_a_cut_by_depth_is_tuned_as_what_it_is(shared: Small) -> None:
    deep = {**NARROW, "depth": 0.5, "protect_ends": False}
    full = {**TUNE, "method": "full", "ranks": None}
    del full["ranks"]
    found = [tensors(shared.undisturbed(**changes(shared, form, deep, full))) for form in ("each", "once")]
    assert are_shared(found[0], blocks=2)
    assert len(found[0]) - len(found[1]) == len(MLP)
    assert all(torch.equal(found[0][name], tensor) for name, tensor in found[1].items())


def test_a_score_of_shared_channels_adds_the_changes_of_a_window_over_the_blocks_first(shared: Small, tmp_path: Path) -> None:
    job = load(shared.job("scores", **changes(shared, "each", NARROW)))
    client = local_clients(job, open_model(job.model), tmp_path)[0]
    calibration = Calibration(stage=0, samples=SAMPLES, length=LENGTH, seed="0/0", through="gradients")
    request = ScoreGroups(stage=0, score="fisher", calibration=calibration, limit=LARGEST)
    sent = request.respond({}, client, "cpu").tensors
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in sent.items()} == request.expected(
        Decoder(open_model(job.model))
    )
    assert sent.keys() == {"change/0/channels", *(f"change/{block}/heads" for block in range(BLOCKS))}
    model: Any = with_one_part(shared.model)
    weight = model.model.layers[0].mlp.down_proj.weight
    total = torch.zeros(96, dtype=torch.float64)
    for ids in calibration_windows(client, SAMPLES, LENGTH, "0/0"):
        weight.grad = None
        predicted = model(ids[None]).logits[0, :-1]
        nn.functional.cross_entropy(predicted, ids[1:], reduction="sum").backward()
        total += (weight.double() * weight.grad.double()).sum(0).square()  # the gradient is the sum over the blocks
    assert torch.allclose(sent["change/0/channels"].double() / 2**24, total, rtol=1e-3, atol=1e-5)


def test_the_gradient_of_shared_factors_is_the_sum_over_the_blocks(shared: Small) -> None:
    ids, name = some_ids(), "mlp.down_proj"
    b, a = torch.randn(64, 2, generator=torch.Generator().manual_seed(0)) / 10, torch.randn(2, 96) / 10
    gradients = []
    for shares in (MAP, {}):
        model: Any = load_frozen(Decoder(Checkpoint(shared.model, torch.float32, shares=shares)), 32)
        linears = [f"model.layers.{block}.{name}" for block in range(BLOCKS)][: 1 if shares else BLOCKS]
        starts = {one: lora.start({"b": b, "a": a}, {}, (64, 96), 2, one, "0") for one in linears}
        lora.attach(model, starts, Attachment(dict.fromkeys(linears, 1.0), {}))
        with torch.enable_grad():
            model(ids).logits.square().mean().backward()
        modules = [model.get_submodule(one) for one in linears]
        gradients.append(sum(module.lora_B["own"].weight.grad for module in modules))
        assert (model.model.layers[3].mlp.down_proj is model.model.layers[0].mlp.down_proj) == bool(shares)
    assert gradients[0].abs().max() > 0
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-4, atol=1e-9)


def test_steps_along_seeds_move_a_shared_weight_once(shared: Small) -> None:
    seeds = {"kind": "tune", "method": "seeds", "rounds": 1, "steps": 2, "length": LENGTH, "learning_rate": 1e-3}
    found = tensors(shared.undisturbed(**changes(shared, "each", {**seeds, "perturbation": 1e-3})))
    assert are_shared(found)
    assert not torch.equal(
        found["model.layers.0.mlp.up_proj.weight"], Checkpoint(shared.model).read("model.layers.0.mlp.up_proj.weight")
    )


# What is offered, and what is refused


def test_doctor_offers_what_is_equal_and_says_nothing_once_it_is_declared(shared: Small) -> None:
    status, out, _ = cli("doctor", shared.job("offer", **{**changes(shared), "model": {"path": str(shared.model)}}))
    assert status == 0
    assert "12 tensors of blocks are copies of 3" in out
    table = as_table(Checkpoint(shared.model, shares=MAP).shares, BLOCKS)
    assert table.splitlines() == ["[model.shares]", *(f'"{name}" = "{stored}"' for name, stored in MAP.items())]
    assert all(line in out for line in table.splitlines())
    status, out, err = cli("doctor", shared.job("declared", **changes(shared)))
    assert status == 0, err
    assert "equal tensors" not in out
    assert "12 parameters share 3 tensors" in out


def test_a_tensor_that_is_missing_is_not_guessed(shared: Small) -> None:
    line = complaint("plan", shared.job("missing", **{**changes(shared), "model": {"path": str(shared.folder / "once")}}))
    assert "lacks the tensor model.layers.1.mlp.gate_proj.weight" in line
    assert '[model.shares] "model.layers.1.mlp.gate_proj.weight" = "model.layers.0.mlp.gate_proj.weight"' in line


GATE, Q, K = (f"model.layers.{{}}.{name}.weight" for name in ("mlp.gate_proj", "self_attn.q_proj", "self_attn.k_proj"))


@pytest.mark.parametrize(
    ("shares", "says"),
    [
        (
            {GATE.format(1): "model.layers.9.mlp.gate_proj.weight"},
            "no tensor of that name; name a tensor that is stored, such as",
        ),
        ({"model.layers.1.gate.weight": GATE.format(0)}, "model.layers.1.gate.weight is no parameter of the model"),
        ({GATE.format(1): Q.format(0)}, "is stored as BF16 [96, 64], but model.layers.0.self_attn.q_proj.weight"),
        ({GATE.format(1): GATE.format(2), GATE.format(2): GATE.format(1)}, "is a circle"),
        ({Q.format(1): Q.format(0)}, "are both stored, and differ, so they are not one tensor"),
        ({"lm head": GATE.format(0)}, "model.shares"),
    ],
    ids=["unknown tensor", "unknown parameter", "shape", "circle", "values", "name"],
)
def test_a_map_that_cannot_be_is_refused(shared: Small, shares: dict[str, str], says: str) -> None:
    job = shared.job("wrong", **{**changes(shared), "model": {"path": str(shared.model), "shares": shares}})
    assert says in complaint("plan", job)


@pytest.mark.parametrize(
    ("stage", "says"),
    [
        ({**VOTED, "source": "sequential"}, "stages.0.source: blocks 0 and 1 share model.layers.0.mlp.gate_proj.weight"),
        ({**VOTED, "layers": {"sample": 0.5, "cover": 1}}, 'set layers = "all"'),
        ({**POOLED, "allocation": "owl"}, 'set allocation = "even"'),
        ({**NARROW, "repair": True, "channels": 0.25, "samples": 8}, "set repair = false"),
    ],
    ids=["sequential", "layers", "owl", "repair"],
)
def test_what_sharing_makes_impossible_is_refused(shared: Small, stage: dict[str, Any], says: str) -> None:
    line = complaint("plan", shared.job("impossible", **changes(shared, "each", stage)))
    assert says in line
    assert line.count("; ") == 1


def test_half_of_a_feed_forward_part_cannot_be_cut(shared: Small) -> None:
    half = {name: stored for name, stored in MAP.items() if "down" not in name}
    job = shared.job("half", **{**changes(shared, "each", NARROW), "model": {"path": str(shared.model), "shares": half}})
    assert "but not all linears of channels; set channels to 0" in complaint("plan", job)


def test_a_site_shares_what_the_signed_job_says(shared: Small, tmp_path: Path) -> None:
    site = make_site(tmp_path / "ash", shared)
    join = JoinRun(digests=digests(Checkpoint(shared.model)), clock=time.time())
    sign(site, NARROW, model={"path": "m", "shares": MAP})
    assert send(site, join)[1] is None
    calibration = Calibration(stage=0, samples=SAMPLES, length=LENGTH, seed="0/0", through="gradients")
    response, error = send(site, ScoreGroups(stage=0, score="fisher", calibration=calibration, limit=LARGEST))
    assert response, error
    assert [name for name in wire.unpack(response)[0] if "channels" in name] == ["change/0/channels"]
    sign(site, NARROW, model={"path": "m", "shares": {GATE.format(1): "nowhere"}})
    assert send(site, join, run="other") == (None, "model Refusal shares")
