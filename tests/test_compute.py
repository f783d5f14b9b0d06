"""``compute_dtype = "bfloat16"``: text passes through the blocks in half of the bits; the weights are not rounded to them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

from fedgrove.models.blocks import Decoder
from fedgrove.models.compute import dtype_of
from fedgrove.models.stream import Checkpoint
from small import Moment, Small, complaint, killed, process, result

BFLOAT16 = {"stages__0__compute_dtype": "bfloat16"}
FLOAT32 = {"stages__0__compute_dtype": "float32"}
WALKS = {
    "sequential": {},
    "dense": {"stages__0__source": "dense"},
    "pooled": {"stages__0__aggregation": "pooled"},
}


@pytest.fixture(scope="module")
def fine(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """A federation whose model is float32, with weights that bfloat16 cannot hold."""
    small = Small(tmp_path_factory.mktemp("fine"))
    model = LlamaForCausalLM.from_pretrained(small.model, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data *= 1 + torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0)) / 1000
    model.save_pretrained(small.model)
    return small


def linears(model: Path) -> dict[str, Tensor]:
    weights = load_file(model / "model.safetensors")
    return {name: weights[name] for name in Decoder(Checkpoint(model)).linear_names().values()}


@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("walk", WALKS.values(), ids=WALKS)
def test_what_blocks_compute_in_moves_near_ties_and_nothing_else(fine: Small, walk: dict[str, object], pruner: str) -> None:
    job = {**walk, "stages__0__pruner": pruner, "stages__0__samples": 8, "evaluate": {}}
    exact, rough = (linears(fine.undisturbed(**job, **compute) / "model") for compute in (FLOAT32, BFLOAT16))
    before = linears(fine.model)
    differing = 0
    for name, weight in rough.items():
        assert weight.dtype == torch.float32
        assert int((weight == 0).sum()) == weight.numel() // 2, "not exactly the target"
        alike = (weight == 0) == (exact[name] == 0)
        assert alike.double().mean() > 0.95, name
        assert (weight - exact[name]).norm() < 0.2 * exact[name].norm(), name  # a flipped entry moves what is left of its row
        differing += int((~alike).sum())
        if pruner == "wanda":  # it changes no weight, so what stands is what stood there, or the mean of three like it
            kept = weight != 0
            torch.testing.assert_close(weight[kept], before[name][kept], rtol=1e-6, atol=0)
    assert differing, "bfloat16 was not computed in"


def test_it_is_float32_where_a_job_says_nothing(fine: Small) -> None:
    said, unsaid = (fine.undisturbed(**compute) / "model" / "model.safetensors" for compute in (FLOAT32, {}))
    assert said.read_bytes() == unsaid.read_bytes()


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"avx512_bf16": True}, torch.bfloat16), ({"bf16": True}, torch.bfloat16), ({"avx512_bf16": False}, None), ({}, None)],
)
def test_auto_is_bfloat16_where_the_processor_multiplies_it(
    capabilities: dict[str, bool], expected: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert dtype_of("auto", "cpu") == expected
    assert dtype_of("auto", "cuda:0") is None, "there the decoder takes the dtype of the checkpoint"


def test_a_job_with_auto_is_that_of_the_dtype(fine: Small) -> None:
    chosen = FLOAT32 if dtype_of("auto", "cpu") is None else BFLOAT16
    auto, plain = (fine.undisturbed(**compute) for compute in ({"stages__0__compute_dtype": "auto"}, chosen))
    assert result(auto)["model/model.safetensors"] == result(plain)["model/model.safetensors"]


def test_a_killed_run_goes_on_to_the_same_bits(fine: Small, tmp_path: Path) -> None:
    expected = result(fine.undisturbed(**BFLOAT16))
    out = tmp_path / "run"
    killed("run", fine.job(**BFLOAT16), "--out", out, moment=Moment("os.rename", "*block-0001.safetensors"))
    shutil.rmtree(out / "clients")
    assert process("run", fine.job(**BFLOAT16), "--out", out, "--resume")[0] == 0
    assert result(out) == expected


def test_a_decoder_computes_in_what_it_is_told(fine: Small) -> None:
    ids = torch.arange(24).view(1, 24)
    outputs = []
    for dtype in (torch.float32, torch.bfloat16):
        decoder = Decoder(Checkpoint(fine.model), dtype=dtype)
        hidden, calls = decoder.embed(ids)
        with torch.no_grad(), decoder.loaded(0) as block:
            outputs.append(decoder.run(block, hidden, calls[0]))
        assert outputs[-1].dtype == dtype
        assert decoder.read_linear(0, "mlp.down_proj").dtype == torch.float32
    assert 0 < (outputs[1] - outputs[0]).norm() < 0.02 * outputs[0].norm()


def test_models_are_measured_in_the_dtype_of_evaluate(small: Small) -> None:
    """The federated model and what each client has alone; pruning itself is not touched."""
    lines, models = [], []
    for dtype in ("float32", "bfloat16"):
        run = small.undisturbed(evaluate__alone=True, evaluate__compute_dtype=dtype)
        metrics = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        lines.append({(m["stage"], m["client"], m["name"]): m["value"] for m in metrics if m["name"].startswith("perplexity/")})
        models.append(result(run)["model/model.safetensors"])
    assert models[0] == models[1]
    assert {client for _, client, _ in lines[0]} > {None}
    assert lines[0].keys() == lines[1].keys()
    for key, value in lines[0].items():
        assert 0 < abs(lines[1][key] / value - 1) < 0.02, key


def test_another_dtype_is_refused_in_a_line(fine: Small, tmp_path: Path) -> None:
    assert "stages.0.compute_dtype" in complaint("run", fine.job(stages__0__compute_dtype="float16"), "--out", tmp_path / "run")
