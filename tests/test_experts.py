"""Mixtures of experts: each expert has statistics of its own, whatever the form in which the checkpoint holds it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig
from typer.testing import CliRunner

from fedgrove.cli import app
from fedgrove.data.windows import calibration_windows
from fedgrove.errors import FedgroveError
from fedgrove.export import export
from fedgrove.input_statistics.statistics import InputStatistics
from fedgrove.models.blocks import Decoder
from fedgrove.models.experts import Experts
from fedgrove.models.masks import Target
from fedgrove.models.stream import Checkpoint
from fedgrove.models.tensor_files import save_tensors
from fedgrove.rounds.capabilities import Capabilities
from fedgrove.stages.prune.config import Config as PruneStage
from fedgrove.stages.prune.plan import make_plan
from fedgrove.stages.prune.pruners import magnitude, pruner_for, sparsegpt
from test_architectures import EXPERTS, LENGTH, LLAMA, run_job, same_bits, save, some_ids, tensors_of, two

FUSED = ("gate_up_proj", "down_proj")


def fuse(folder: Path, out: Path) -> Path:
    """The same model with the experts of each block in two tensors, as transformers writes it when it is asked to."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    model.save_pretrained(out, save_original_format=False)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / file, out)
    assert {name.rpartition(".")[2] for name, tensor in tensors_of(out).items() if tensor.dim() == 3} == set(FUSED)
    return out


def block_of(kind: str, seed: int = 0) -> nn.Module:
    """Fused experts of the transformers library with random weights."""
    torch.manual_seed(seed)
    config = MixtralConfig(**LLAMA, num_local_experts=6, num_experts_per_tok=2)
    if kind == "qwen3_moe":
        config = Qwen3MoeConfig(**LLAMA, **EXPERTS)
    experts = AutoModelForCausalLM.from_config(config).model.layers[0].mlp.experts
    for parameter in experts.parameters():
        parameter.data.normal_()
    return experts


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("tokens", [0, 1, 2, 50])
def test_linears_of_their_own_compute_what_fused_experts_compute(kind: str, tokens: int) -> None:
    fused = block_of(kind)
    apart = Experts(fused)
    for index, expert in enumerate(apart.children()):
        gate, up = fused.gate_up_proj.data[index].chunk(2)
        for linear, weight in ((expert.gate_proj, gate), (expert.up_proj, up), (expert.down_proj, fused.down_proj.data[index])):
            linear.weight = nn.Parameter(weight)
    number = len(fused.down_proj)
    hidden = torch.randn(tokens, LLAMA["hidden_size"])
    weights, chosen = torch.rand(tokens, number).topk(2)
    with torch.no_grad():
        expected = fused(hidden, chosen, weights) if tokens else hidden
        got = apart(hidden, chosen, weights)
    assert got.shape == expected.shape
    assert tokens == 0 or (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_an_expert_is_pruned_by_the_tokens_that_were_sent_to_it(demo: Path, grove: Path, tmp_path: Path) -> None:
    """One client alone, beside plain transformers with a hook on its fused experts."""
    source = save("mixtral", tmp_path / "model", grove, torch.float32)
    text = demo / "texts" / "theatre-heldout.txt"
    run = run_job(source, tmp_path, [{"name": "a", "data": str(text)}], pruner="sparsegpt", sparsity=0.6, source="dense")
    got = tensors_of(run / "model")
    ids = calibration_windows([text], None, Checkpoint(source).tokenizer(), 4, LENGTH, "0/0/a")
    whole = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    for index, block in enumerate(whole.model.layers):
        inputs: dict[str, InputStatistics] = {}

        def note(module: nn.Module, args: tuple[Tensor, ...], inputs: dict[str, InputStatistics] = inputs) -> None:
            for expert, gate_up in enumerate(module.gate_up_proj):
                x = args[0][(args[1] == expert).any(1)]
                gate, up = (x @ gate_up.T).chunk(2, 1)
                for leaf, read in (("w1", x), ("w3", x), ("w2", module.act_fn(gate) * up)):
                    inputs[f"{expert}.{leaf}"] = InputStatistics("gram")
                    inputs[f"{expert}.{leaf}"].add(read)

        block.mlp.experts.register_forward_pre_hook(note)
        with torch.no_grad():
            whole(input_ids=ids)
        assert len(inputs) == 12
        assert len({sums.tokens for sums in inputs.values()}) > 1, "a router that sends all experts alike tells nothing"
        assert sum(inputs[f"{expert}.w1"].tokens for expert in range(4)) == 2 * ids.numel()
        for name, sums in inputs.items():
            stored = f"model.layers.{index}.block_sparse_moe.experts.{name}.weight"
            before = tensors_of(source)[stored]
            expected, mask = sparsegpt.prune(before.clone(), sums, Target(0.6))
            differ = int(((got[stored] != 0) != mask).sum())
            assert differ <= 0.002 * mask.numel(), (stored, differ)
            alike = ((got[stored] != 0) == mask).all(1)
            assert (got[stored] - expected)[alike].abs().max() <= 1e-3 * before.abs().max(), stored


@pytest.mark.parametrize(("name", "aggregation"), [("mixtral", "fedspallm"), ("qwen2_moe", "pooled")])
def test_a_checkpoint_of_fused_experts_is_pruned_like_one_of_single_ones(
    name: str, aggregation: str, demo: Path, grove: Path, tmp_path: Path
) -> None:
    """And it stays fused: same names, same shapes, everything else the same bits; both load with the same logits."""
    single = save(name, tmp_path / "single", grove, torch.bfloat16)
    fused = fuse(single, tmp_path / "fused")
    results = []
    for source in (single, fused):
        (tmp_path / f"work-{source.name}").mkdir()
        results.append(
            run_job(source, tmp_path / f"work-{source.name}", two(demo), pruner="wanda", sparsity=0.5, aggregation=aggregation)
        )
    of_single, of_fused = (Checkpoint(run / "model") for run in results)
    before, after = tensors_of(fused), tensors_of(of_fused.path)
    assert {key: (value.shape, value.dtype) for key, value in after.items()} == {
        key: (value.shape, value.dtype) for key, value in before.items()
    }
    linears = Decoder(of_single).linear_names()
    matched = Decoder(of_fused).linear_names()
    assert list(linears) == list(matched)
    for linear, stored in linears.items():
        value = of_single.read(stored)
        assert same_bits(value, of_fused.read(matched[linear])), linear
        assert int((value == 0).sum()) == value.numel() // 2
    for key, value in after.items():
        if value.dim() == 3:
            assert (value == 0).sum((1, 2)).tolist() == [value[0].numel() // 2] * len(value)
        elif key not in matched.values():
            assert same_bits(value, before[key]), key
    logits = []
    for checkpoint in (of_single, of_fused):
        model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32).eval()
        with torch.no_grad():
            logits.append(model(input_ids=some_ids()).logits)
    assert torch.equal(*logits)
    decoder = Decoder(of_fused)
    hidden, calls = decoder.embed(some_ids())
    for index in range(len(decoder)):
        with decoder.loaded(index) as block:
            hidden = decoder.run(block, hidden, calls[index])
    assert torch.allclose(decoder.head(hidden[0]), logits[0], rtol=0, atol=1e-5 * float(logits[0].abs().max()))


def test_parts_of_a_fused_tensor_and_the_whole_lie_over_each_other_in_order(grove: Path, tmp_path: Path) -> None:
    fused = fuse(save("mixtral", tmp_path / "single", grove, torch.bfloat16), tmp_path / "fused")
    base = Checkpoint(fused)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    part = "model.layers.1.mlp.experts.2.up_proj.weight"
    whole = tensors_of(fused)[name]
    assert part not in base.names()
    assert base.spec(part) == (torch.Size([48, 32]), torch.bfloat16)
    assert torch.equal(base.read(part), whole[2, 48:])
    ones, twos = torch.ones(48, 32, dtype=torch.bfloat16), torch.full_like(whole, 2.0)
    save_tensors({part: ones}, tmp_path / "1" / "x.safetensors")
    save_tensors({name: twos}, tmp_path / "2" / "x.safetensors")
    first = base.over(tmp_path / "1")
    expected = whole.clone()
    expected[2, 48:] = 1
    assert torch.equal(first.read(name), expected)
    assert first.changed() == [name]
    assert torch.equal(first.over(tmp_path / "2").read(name), twos)
    assert torch.equal(first.over(tmp_path / "2").read(part), twos[2, 48:])
    twos[2, 48:] = 1
    assert torch.equal(base.over(tmp_path / "2").over(tmp_path / "1").read(name), twos)
    first.write(tmp_path / "out")
    assert torch.equal(tensors_of(tmp_path / "out")[name], expected)
    assert base.changed() == []


@pytest.mark.parametrize(
    ("aggregation", "pruner"),
    [("fedspallm", "sparsegpt"), ("pooled", "sparsegpt"), ("pooled", "dsnot"), ("fedspallm", "wanda")],
)
def test_an_expert_that_saw_no_token_loses_its_smallest_weights(
    aggregation: str, pruner: str, demo: Path, grove: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MixtralConfig(**LLAMA, num_local_experts=3, num_experts_per_tok=1))
    for layer in model.model.layers:
        layer.mlp.gate.weight.data[0] = 0.0  # it scores 0, and one of the others is never below
        layer.mlp.gate.weight.data[2] = -layer.mlp.gate.weight.data[1]
    source = tmp_path / "model"
    model.save_pretrained(source)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(grove / file, source)
    run = run_job(source, tmp_path, two(demo), pruner=pruner, sparsity=0.5, aggregation=aggregation)
    before, after = tensors_of(source), tensors_of(run / "model")
    for name, weight in before.items():
        if ".experts.0." in name:
            assert torch.equal(after[name], magnitude.prune(weight.clone(), InputStatistics("nothing"), Target(0.5))[0]), name
        elif ".experts." in name:
            assert not torch.equal(
                after[name] != 0, magnitude.prune(weight.clone(), InputStatistics("nothing"), Target(0.5))[1]
            ), name
        elif ".gate." in name:
            assert same_bits(after[name], weight), name


def test_only_a_pruner_that_asks_for_inputs_is_replaced_where_there_were_none() -> None:
    seen, unseen = InputStatistics("squares"), InputStatistics("squares")
    seen.add(torch.ones(3, 4))
    unseen.add(torch.ones(0, 4))
    assert (seen.tokens, unseen.tokens) == (3, 0)
    assert pruner_for("wanda", seen).__name__.endswith("wanda")
    assert pruner_for("wanda", unseen) is magnitude
    for needs in ("gram", "moments"):
        sums = InputStatistics(needs)  # type: ignore[arg-type]
        sums.add(torch.ones(0, 4))
        assert not sums.total.any()  # type: ignore[union-attr]
        assert sums.silent


def job_of(model: Path, folder: Path, demo: Path, **changes: Any) -> Path:
    texts = sorted((demo / "texts").glob("*-heldout.txt"))[:3]
    job = {
        "name": "tiny",
        "model": {"path": str(model)},
        "clients": [{"name": name, "data": str(text)} for name, text in zip("abc", texts, strict=True)],
        "stages": [
            {"kind": "prune", "pruner": "sparsegpt", "aggregation": "pooled", "sparsity": 0.5, "samples": 2, "length": LENGTH}
        ],
        **changes,
    }
    file = folder / f"job-{len(list(folder.glob('job-*')))}.toml"
    file.write_text(tomli_w.dumps(job))
    return file


def test_under_secure_aggregation_experts_come_out_bit_for_bit(demo: Path, grove: Path, tmp_path: Path) -> None:
    source = save("qwen2_moe", tmp_path / "model", grove, torch.float32)
    results = []
    for secure in (False, True):
        job = job_of(source, tmp_path, demo, privacy={"secure_aggregation": secure})
        out = tmp_path / f"run-{secure}"
        result = CliRunner().invoke(app, ["run", str(job), "--out", str(out), "--quiet"])
        assert result.exit_code == 0, result.output
        results.append(tensors_of(out / "model"))
    for name, tensor in results[0].items():
        assert same_bits(tensor, results[1][name]), name


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"kind": "structured", "channels": 0.25}, "channels or heads is not possible"),
    ],
)
def test_what_is_not_done_with_experts_is_refused_before_anything_runs(
    stage: dict[str, Any], words: str, demo: Path, grove: Path, tmp_path: Path
) -> None:
    source = save("qwen3_moe", tmp_path / "model", grove, torch.float32)
    job = job_of(source, tmp_path, demo, stages=[stage])
    result = CliRunner().invoke(app, ["plan", str(job)])
    assert result.exit_code == 2, result.output
    assert words in result.output.replace("\n", " ")


@pytest.mark.parametrize("form", ["onnx", "int8"])
def test_forms_that_pass_experts_by_or_break_on_them_are_refused(form: str, grove: Path, tmp_path: Path) -> None:
    source = save("mixtral", tmp_path / "model", grove, torch.bfloat16)
    with pytest.raises(FedgroveError, match=f"--to {form}: the experts of mixtral"):
        export(source, form, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_blocks_with_and_without_experts_are_planned_and_pruned(demo: Path, grove: Path, tmp_path: Path) -> None:
    """The plan counts the largest block, and no more work in it than its router lets through."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**LLAMA, **EXPERTS, mlp_only_layers=[0])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(grove / file, tmp_path / "model")
    decoder = Decoder(Checkpoint(tmp_path / "model"))
    assert [len(decoder.block_names(index)) for index in range(3)] == [7, 19, 19]
    stage = PruneStage(kind="prune", pruner="sparsegpt", sparsity=0.5, samples=4, length=LENGTH)
    share = make_plan(0, stage, decoder, {"a": Capabilities()}, 0).clients["a"]
    grams = 8 * (3 * 32**2 + 5 * (32**2 + 24**2))  # q, k and v; o; and for each expert two
    assert share.memory > grams
    run = run_job(tmp_path / "model", tmp_path, two(demo), pruner="wanda", sparsity=0.5)
    after = Checkpoint(run / "model")
    for stored in decoder.linear_names().values():
        value = after.read(stored)
        assert int((value == 0).sum()) == value.numel() // 2, stored
