"""The stage ``structured`` with ``repair``: what reads the groups that were cut makes up for them, by sums over all clients."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import tomli_w
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fedgrove import run as server
from fedgrove.client.hidden_states import Calibration
from fedgrove.data.windows import evaluation_windows
from fedgrove.errors import FedgroveError
from fedgrove.input_statistics.exchange import SCALE
from fedgrove.input_statistics.probe import probe
from fedgrove.job.load import load
from fedgrove.models.blocks import Decoder, as_matrix
from fedgrove.models.perplexity import perplexity
from fedgrove.models.stream import Checkpoint
from fedgrove.models.tensor_files import save_tensors
from fedgrove.models.width import FAMILIES, Width, family_of, width_of
from fedgrove.rounds.disclosure import Disclosure
from fedgrove.runfolder import RunFolder
from fedgrove.stages.structured.cut import ConsumerInputs, cut_block, cut_parts
from fedgrove.stages.structured.exchanges.inputs import SumInputs, half_of
from fedgrove.stages.structured.repair import repair, shifted_bias
from small import CLIENTS, LENGTH, Heard, Meddling, Moment, Small, cli, complaint, make_model, measurements
from test_architectures import plain, save, some_ids
from test_statistics import owners  # noqa: F401 (a fixture)
from test_structured import goes_on_to_the_same_bits, same, told_by, weights

CUT = {"kind": "structured", "channels": 0.25, "heads": 0.5, "samples": 6, "length": LENGTH}
STAGES = [CUT]


def grams(x: Tensor) -> tuple[Tensor, Tensor]:
    """Σ x xᵀ of either half of some tokens."""
    halves = x.double().tensor_split(2)
    return halves[0].T @ halves[0], halves[1].T @ halves[1]


# The solution


@pytest.fixture(scope="module")
def problem() -> tuple[Tensor, Tensor, Tensor]:
    """A weight, correlated inputs of 300 tokens, and the inputs that stay."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 8, generator=generator) @ torch.randn(8, 24, generator=generator)
    x += 0.3 * torch.randn(300, 24, generator=generator)
    return torch.randn(10, 24, generator=generator), x, torch.tensor([i for i in range(24) if i % 4])


def test_the_solution_is_that_of_least_squares_with_a_ridge(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    weight, x, kept = problem
    repaired = repair(weight, grams(x), kept)
    assert repaired.ridge is not None
    inputs = x.double()[:, kept]
    size = repaired.ridge * float(inputs.square().sum(0).mean())
    ridge = size**0.5 * torch.eye(len(kept), dtype=torch.float64)
    missing = (x.double() @ weight.double().T) - inputs @ weight[:, kept].double().T
    rows, wanted = torch.cat([inputs, ridge]), torch.cat([missing, torch.zeros(len(kept), 10, dtype=torch.float64)])
    expected = weight[:, kept].double() + torch.linalg.lstsq(rows, wanted).solution.T
    assert torch.allclose(repaired.weight, expected, rtol=1e-6, atol=1e-8)
    assert 0 < repaired.error < 0.5


def test_channels_that_depend_on_others_are_repaired_to_one_in_ten_thousand() -> None:
    generator = torch.Generator().manual_seed(1)
    free = torch.randn(400, 20, generator=generator)
    x = torch.cat([free, 0.3 * free @ torch.randn(20, 12, generator=generator)], dim=1)
    weight, kept = torch.randn(16, 32, generator=generator), torch.arange(20)
    whole = x @ weight.T
    left = x[:, kept].double() @ repair(weight, grams(x), kept).weight.T
    assert float((left - whole).norm() / whole.norm()) < 1e-4
    assert float((x[:, kept] @ weight[:, kept].T - whole).norm() / whole.norm()) > 0.1


def test_what_cannot_be_repaired_stays_as_it_was_cut() -> None:
    """Inputs that have nothing to do with each other: whatever half of them says, the other half contradicts."""
    x = torch.randn(60, 40, generator=torch.Generator().manual_seed(2))
    weight, kept = torch.randn(8, 40, generator=torch.Generator().manual_seed(3)), torch.arange(30)
    orthogonal = tuple(torch.diag(gram.diagonal()) for gram in grams(x))
    repaired = repair(weight, (orthogonal[0], orthogonal[1]), kept)
    assert (repaired.ridge, repaired.error) == (None, 1.0)
    assert torch.equal(repaired.weight, weight[:, kept].double())
    silent = repair(weight, (torch.zeros(40, 40, dtype=torch.float64), grams(x)[0]), kept)
    assert silent.ridge is None


def test_a_repaired_weight_grows_no_more_than_a_client_takes() -> None:
    """The cut channel is the difference of two channels that are nearly equal, times a thousand."""
    generator = torch.Generator().manual_seed(4)
    base, tiny = torch.randn(200, 1, generator=generator), torch.randn(200, 1, generator=generator)
    x = torch.cat([base, base + 1e-2 * tiny, 10 * tiny], dim=1)
    weight = torch.tensor([[0.1, 0.1, 1.0]])
    repaired = repair(weight, grams(x), torch.tensor([0, 1]))
    assert float(repaired.weight.norm()) <= 2 * float(weight.norm())


def test_the_mean_of_the_output_is_kept_by_the_bias(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    weight, x, kept = problem
    x, bias, after = x + 1, torch.arange(10.0), weight[:, kept]
    shifted = shifted_bias(bias, weight, after, x.double().mean(0), kept)
    whole = (x.double() @ weight.double().T + bias).mean(0)
    assert torch.allclose((x[:, kept].double() @ after.double().T + shifted).mean(0), whole)


def test_a_window_is_in_a_half_by_its_own_tokens() -> None:
    windows = torch.randint(4096, (64, LENGTH), generator=torch.Generator().manual_seed(0))
    halves = [half_of(ids) for ids in windows]
    assert 16 < sum(halves) < 48
    assert halves[::-1] == [half_of(ids) for ids in windows.flip(0)]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_block_of_every_architecture_is_repaired(name: str, tmp_path: Path, grove: Path) -> None:
    """Of the last block, by its inputs in plain transformers: the outputs of its consumers come closer to what they were."""
    decoder = Decoder(Checkpoint(save(name, tmp_path / "model", grove, torch.float32)))
    config, block = decoder.checkpoint.config, len(decoder) - 1
    before = width_of(config)
    after = Width(before.channels * 3 // 4, before.heads // 2 if family_of(config).heads else before.heads)
    model, seen = plain(decoder.checkpoint.path), {}
    parts = cut_parts(config, after)
    for kind, part in parts.items():

        def note(module: nn.Module, args: tuple[Tensor, ...], kind: str = kind) -> None:
            seen[kind] = args[0].detach().flatten(0, -2)

        model.get_submodule(f"{decoder.prefix}.{block}.{part.consumer}").register_forward_pre_hook(note)
    with torch.no_grad():
        model(some_ids(12))
    kept = {kind: torch.arange(getattr(after, kind)) for kind in ("channels", "heads")}
    inputs = {kind: ConsumerInputs(grams(x), x.double().mean(0)) for kind, x in seen.items()}
    has_bias = {kind: hasattr(decoder.blocks[block].get_submodule(part.consumer), "bias") for kind, part in parts.items()}
    known = {kind: one if has_bias[kind] and _bias(decoder, block, parts[kind].consumer) else ConsumerInputs(one.halves, None)
             for kind, one in inputs.items()}  # fmt: skip
    repaired, how = cut_block(decoder, block, kept, known)
    plainly, _ = cut_block(decoder, block, kept)
    assert repaired.keys() >= plainly.keys()
    names = decoder.block_names(block)
    for kind, part in parts.items():
        module = decoder.blocks[block].get_submodule(part.consumer)
        x, stored = seen[kind].double(), names[part.consumer]
        columns = torch.arange(x.shape[1]).view(getattr(before, kind), -1)[kept[kind]].flatten()
        bias = stored.removesuffix("weight") + "bias"
        whole = x @ decoder.read_linear(block, part.consumer).double().T
        errors = []
        for cut in (plainly, repaired):
            out = x[:, columns] @ as_matrix(module, cut[stored]).double().T
            if bias in cut:
                out = out + cut[bias].double() - decoder.checkpoint.read(bias).double()
            errors.append(float((out - whole).norm()))
        assert errors[1] < 0.9 * errors[0]
        assert how[kind]["error"] < 1


def _bias(decoder: Decoder, block: int, linear: str) -> bool:
    return getattr(decoder.blocks[block].get_submodule(linear), "bias", None) is not None


# A whole stage


def test_dependent_channels_of_a_model_are_repaired_by_the_clients_sums(small: Small, tmp_path: Path) -> None:
    """A quarter of the channels are copies of others that hardly count, so these are cut, and the others take over."""
    folder = make_model(tmp_path / "model", seed=3)
    tensors = load_file(folder / "model.safetensors")
    for block in (0, 1):
        for name in ("gate_proj", "up_proj"):
            rows = tensors[f"model.layers.{block}.mlp.{name}.weight"]
            rows[72:] = rows[:24]
        tensors[f"model.layers.{block}.mlp.down_proj.weight"][:, 72:] *= 2**-6
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    save_tensors(tensors, folder / "model.safetensors")
    job = small.job("copies", model={"path": str(folder), "dtype": "float32"}, stages=[{**CUT, "heads": 0.0}], evaluate={})
    assert cli("run", job, "--out", tmp_path / "run")[0] == 0
    after = weights(tmp_path / "run")
    for row in told_by(tmp_path / "run")["blocks"]:
        assert row["channels"] == list(range(72, 96))
        before = tensors[f"model.layers.{row['block']}.mlp.down_proj.weight"]
        expected = before[:, :72].clone()
        expected[:, :24] += before[:, 72:]
        found = after[f"model.layers.{row['block']}.mlp.down_proj.weight"]
        assert float((found - expected).norm() / before[:, 72:].norm()) < 1e-3
        assert row["repair"]["channels"]["error"] < 1e-4


def test_what_was_repaired_is_all_that_differs_from_a_cut(small: Small) -> None:
    run, plainly = small.undisturbed(stages=STAGES), small.undisturbed(stages=[{**CUT, "repair": False}], evaluate={})
    one, other = weights(run), weights(plainly)
    changed = {name for name in one if not torch.equal(one[name], other[name])}
    told = told_by(run)
    readers = {"channels": "mlp.down_proj", "heads": "self_attn.o_proj"}
    assert changed == {
        f"model.layers.{row['block']}.{readers[kind]}.weight"
        for row in told["blocks"]
        for kind, how in row["repair"].items()
        if how["ridge"] is not None
    }
    assert changed
    assert [row["clients"] for row in told["blocks"]] == [list(CLIENTS)] * 2
    assert all(row["repair"].keys() == {"channels", "heads"} for row in told["blocks"])
    assert [(row["channels"], row["heads"]) for row in told["blocks"]] == [
        (row["channels"], row["heads"]) for row in told_by(plainly)["blocks"]
    ]


def test_owners_get_the_model_that_one_owner_of_all_their_text_would_get(
    small: Small,
    tmp_path: Path,
    owners: Mapping[str, list[str]],  # noqa: F811
) -> None:
    runs = small.apart_and_pooled(tmp_path, owners, stages=STAGES)
    assert [row["repair"] for row in told_by(runs[0])["blocks"]] == [row["repair"] for row in told_by(runs[1])["blocks"]]
    assert same(*runs)


def test_secure_aggregation_changes_no_bit(small: Small, tmp_path: Path) -> None:
    job = small.job("secure", stages=STAGES, privacy={"secure_aggregation": True})
    assert cli("run", job, "--out", tmp_path / "run")[0] == 0
    assert same(tmp_path / "run", small.undisturbed(stages=STAGES))


@pytest.mark.parametrize(
    "moment",
    [
        Moment("os.rename", "*/round-0/block-0000.safetensors", "cut"),
        Moment("os.rename", "*/round-0/block-0001.safetensors", "cut"),
        Moment("os.rename", "*/alone/birch/block-0001.safetensors", "cut"),
    ],
    ids=["first", "second", "alone"],
)
def test_a_killed_run_goes_on_to_the_same_bits(small: Small, tmp_path: Path, moment: Moment) -> None:
    goes_on_to_the_same_bits(small, tmp_path, moment, STAGES)


@pytest.mark.parametrize("depth", [0.0, 0.4])
def test_alone_is_what_a_client_would_have_made_by_itself(small: Small, tmp_path: Path, depth: float) -> None:
    stages = STAGES
    if depth:
        small = Small(tmp_path, make_model(tmp_path / "deep", num_hidden_layers=5))
        stages = [{**CUT, "depth": depth}]
    run = small.undisturbed(stages=stages, evaluate__alone=True)
    only = {"clients": [{"name": "birch", "data": str(small.texts["birch"])}]}
    assert cli("run", small.job("birch", stages=stages, **only), "--out", tmp_path / "run")[0] == 0
    alone = measurements(run)[0, None, "birch", "perplexity/held-0"]
    assert alone == measurements(tmp_path / "run")[0, None, None, "perplexity/held-0"]


@pytest.mark.parametrize("quorum", [2, None])
def test_a_client_that_dies_between_scores_and_repair(small: Small, tmp_path: Path, quorum: int | None) -> None:
    heard = Heard()
    rounds = {"quorum": quorum} if quorum else {}
    wanted = load(small.job("dying", stages=STAGES, rounds=rounds))
    run = RunFolder(tmp_path / "run", wanted, listener=heard)
    engine = Meddling(server.local_engine(wanted, tmp_path / "run" / "clients"), SumInputs.KIND)
    try:
        if quorum is None:
            with pytest.raises(FedgroveError, match=re.escape("client 'birch': its process died (status -9)")) as error:
                server.run_job(wanted, engine, run)
            assert "\n" not in str(error.value)
            return
        server.run_job(wanted, engine, run)
    finally:
        run.close()
    assert "birch: its process died (status -9)" in heard.lines
    told = told_by(tmp_path / "run")
    assert told["sums"]["groups"]["clients"] == list(CLIENTS)
    assert [row["clients"] for row in told["blocks"]] == [["ash", "cedar"]] * 2


def test_a_client_refuses_sums_that_no_repair_needs(small: Small, tmp_path: Path) -> None:
    job = load(small.job("curious", stages=STAGES))
    client = server.local_clients(job, server.open_model(job.model), tmp_path)[0]
    inputs = probe(Decoder(Checkpoint(small.model)), LENGTH, 0)[0]
    first = "self_attn.q_proj"
    request = SumInputs(
        stage=0,
        block=0,
        calibration=Calibration(stage=0, samples=6, length=LENGTH, seed="0/0"),
        consumers={name: one for one, shared in inputs.items() for name in shared.consumers},
        widths={first: inputs[first].scale.numel()},
        products=(first,),
        moments=False,
        limit=2**61,
    )
    with pytest.raises(FedgroveError, match=r"no linear that reads what is cut has the input of self_attn\.q_proj; refused"):
        request.respond({SCALE + first: inputs[first].scale}, client, "cpu")


def test_plan_page_and_card_speak_of_the_repair(small: Small) -> None:
    run = small.undisturbed(stages=STAGES)
    page = (run / "report.html").read_text()
    assert "solved for anew" in page
    assert Disclosure.PRODUCTS.sentence in page
    assert "50% of the heads, score diagonal_fisher, repaired" in (run / "model" / "README.md").read_text()
    plans = json.loads(cli("plan", small.job("plan", stages=STAGES), "--json")[1])
    share = plans[0]["clients"]["ash"]
    sent = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    up = sum(line["bytes"] for line in sent if (line["client"], line["direction"], line["stage"]) == ("ash", "up", 0))
    assert up == pytest.approx(share["upload"], rel=0.35)
    assert "reveal the subspace" in " ".join(plans[0]["notes"])


def test_too_few_windows_are_refused_with_the_number_that_it_takes(small: Small, tmp_path: Path) -> None:
    job = small.job("few", stages=[{**CUT, "samples": 1}])
    line = complaint("run", job, "--out", tmp_path / "run")
    assert "stages.0.repair: all clients together have 3 windows of 16 tokens" in line
    assert "a linear of 96 inputs takes 6 or more" in line
    assert "set samples to 2 or more, or repair = false" in line


def test_least_squares_lowers_the_loss_of_a_trained_model(grove: Path, tmp_path: Path, demo: Path) -> None:
    """On the shipped model, on held-out text of the same owners, at least a quarter of what the cut costs is undone."""
    names = ("publisher", "theatre")
    clients = [{"name": name, "data": str(demo / "texts" / f"{name}.txt")} for name in names]
    stage = {"kind": "structured", "samples": 4, "length": 128}
    file, run = tmp_path / "job.toml", tmp_path / "run"
    file.write_text(tomli_w.dumps({"name": "trained", "model": {"path": str(grove)}, "clients": clients, "stages": [stage]}))
    assert cli("run", file, "--out", run)[0] == 0
    whole, repaired = Checkpoint(grove), Checkpoint(run / "model")
    before = width_of(whole.config)
    for row in told_by(run)["blocks"]:
        kept = {
            kind: torch.tensor(sorted(set(range(getattr(before, kind))) - set(row[kind]))) for kind in ("channels", "heads")
        }
        save_tensors(cut_block(Decoder(whole), row["block"], kept)[0], tmp_path / "cut" / f"{row['block']}.safetensors")
    held_out = [evaluation_windows(demo / "texts" / f"{name}-heldout.txt", None, whole.tokenizer(), 256, 2) for name in names]

    def loss(model: Checkpoint) -> float:
        return sum(math.log(perplexity(Decoder(model), windows)) for windows in held_out)

    cut = loss(repaired.over(tmp_path / "cut"))
    assert cut - loss(repaired) > 0.25 * (cut - loss(whole))
