"""Architectures of AutoModelForCausalLM: measured as plain transformers measures them, or refused in one line.

``bench/decoders.py`` takes every type; here is a choice of different ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BartConfig, BartForConditionalGeneration

from decoders import LENGTH, plain_perplexity, save_small, small_config, windows
from fedgrove.api import run
from fedgrove.errors import FedgroveError
from fedgrove.models import cost
from fedgrove.models.blocks import Decoder
from fedgrove.models.cost import measure_cost
from fedgrove.models.linears import find_blocks, linears
from fedgrove.models.perplexity import perplexity
from fedgrove.models.positions import positions
from fedgrove.models.preconditions import check_length, check_parameters
from fedgrove.models.stream import Checkpoint
from fedgrove.stages.prune.calibration_pass import gather
from small import TOKENIZER, Small

MEASURED = (
    "apertus", "bart", "biogpt", "bloom", "codegen", "cohere", "ctrl", "deepseek_v2", "diffllama", "ernie4_5",
    "falcon", "gemma3_text", "glm4", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_neox_japanese", "gptj", "mixtral",
    "modernbert-decoder", "mpt", "nanochat", "olmo2", "openai-gpt", "opt", "persimmon", "phi", "phi3",
    "qwen3_moe", "stablelm", "trocr", "xglm",
)  # fmt: skip
ENCODERS = ("bert", "bert-generation", "camembert", "electra", "megatron-bert", "rembert", "roberta", "roformer", "xlnet")
REFUSED = ("bamba", "falcon_mamba", "gpt_oss", "jamba", "mamba", "recurrent_gemma", "rwkv")
HARD = {"gpt2": 64, "opt": 64, "gptj": 64, "biogpt": 64, "ctrl": 64, "gpt_neo": 64, "mpt": 64, "roberta": 62}
SOFT = ("bloom", "falcon", "llama", "phi", "xglm")


def decoder_of(folder: Path) -> Decoder:
    decoder = Decoder(Checkpoint(folder))
    check_parameters(decoder)
    return decoder


@pytest.mark.parametrize("kind", MEASURED)
def test_a_type_is_measured_as_plain_transformers_measures_it(kind: str, tmp_path: Path) -> None:
    folder = save_small(kind, tmp_path)
    assert perplexity(decoder_of(folder), windows()) == pytest.approx(plain_perplexity(folder), rel=1e-4)


@pytest.mark.parametrize("kind", ["bloom", "gpt2", "mixtral", "phi3"])
def test_activations_in_16_bits_are_those_of_all_tokens_though_measured_on_few(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = decoder_of(save_small(kind, tmp_path))
    few = measure_cost(decoder, 64, masked=False).saved_half
    monkeypatch.setattr(cost, "FEW", 64)
    assert few == pytest.approx(measure_cost(decoder, 64, masked=False).saved_half, rel=0.01)


@pytest.mark.parametrize("kind", MEASURED)
def test_of_a_type_activations_are_measured_in_32_and_16_bits(kind: str, tmp_path: Path) -> None:
    found = measure_cost(decoder_of(save_small(kind, tmp_path)), 16, masked=False)
    assert 2 * found.saved * 0.7 < found.saved_half < 4 * found.saved * 1.3


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        *((kind, {}) for kind in (*MEASURED, "bigbird_pegasus", "blenderbot", "marian", "mbart", "mvp", "pegasus", "plbart")),
        *((kind, {"is_decoder": True, "add_cross_attention": True}) for kind in ("bert", "roberta", "gpt2")),
    ],
)
def test_every_linear_that_is_pruned_is_run(kind: str, changes: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_config(small_config(kind, **changes)).eval()
    run: set[nn.Module] = set()
    modules = [module for block in find_blocks(model)[1] for module in linears(block).values()]
    for module in modules:
        module.register_forward_pre_hook(lambda module, _: run.add(module))
    with torch.no_grad():
        model(input_ids=windows()[0], use_cache=False)
    assert run == set(modules)


def test_cross_attention_without_an_encoder_stays_as_it_is(small: Small, tmp_path: Path) -> None:
    folder = save_small("bart", tmp_path / "model")
    for name in TOKENIZER:
        (folder / name).write_bytes((small.model / name).read_bytes())
    tune = {"kind": "tune", "rounds": 1, "steps": 1, "length": LENGTH, "batches": [1], "ranks": [2], "bits": [32]}
    prune = {"kind": "prune", "pruner": "wanda", "sparsity": 0.5, "samples": 2, "length": LENGTH}
    run(small.spec(model__path=str(folder), stages=[prune, tune], evaluate={}), out=tmp_path / "run", quiet=True)
    before, after = Checkpoint(folder), Checkpoint(tmp_path / "run" / "model")
    pruned = set(Decoder(before).linear_names().values())
    crossing = {name for name in before.names() if ".encoder_attn." in name}
    assert crossing
    assert not crossing & pruned
    assert {name for name in before.names() if not torch.equal(before.read(name), after.read(name))} == pruned
    assert all(float((after.read(name) == 0).double().mean()) >= 0.49 for name in pruned)


def test_a_linear_that_blocks_do_not_run_is_a_line(tmp_path: Path) -> None:
    decoder = Decoder(Checkpoint(save_small("llama", tmp_path)))
    ids = windows()[0]
    hidden, calls = decoder.embed(ids)
    decoder.blocks[0].add_module("spare", nn.Linear(4, 4))
    with decoder.zeroed(0) as block, pytest.raises(FedgroveError, match="LlamaDecoderLayer do not run their linear spare"):
        gather(decoder, block, [hidden], calls[0], "squares")


@pytest.mark.parametrize("kind", ["falcon", "bloom", "gpt2", "llama", "gpt_bigcode"])
@pytest.mark.parametrize("tied", [True, False])
def test_both_with_a_tied_head_and_with_one_of_its_own(kind: str, tied: bool, tmp_path: Path) -> None:
    folder = save_small(kind, tmp_path, tie_word_embeddings=tied)
    assert perplexity(decoder_of(folder), windows()) == pytest.approx(plain_perplexity(folder), rel=1e-4)


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra", "roformer", "megatron-bert"])
def test_an_encoder_that_is_used_as_a_decoder_is_one(kind: str, tmp_path: Path) -> None:
    folder = save_small(kind, tmp_path, is_decoder=True)
    assert perplexity(decoder_of(folder), windows()) == pytest.approx(plain_perplexity(folder), rel=1e-4)


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_is_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(FedgroveError, match=f"type {kind} is an encoder; fedgrove prunes causal decoders"):
        Decoder(Checkpoint(save_small(kind, tmp_path)))


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    sizes = {name: value for name, value in small_config("bart").to_dict().items() if name.endswith(("layers", "dim", "heads"))}
    BartForConditionalGeneration(BartConfig(**sizes, d_model=32, vocab_size=64)).save_pretrained(tmp_path)
    with pytest.raises(FedgroveError, match="type bart is an encoder-decoder; fedgrove prunes causal decoders"):
        Decoder(Checkpoint(tmp_path))


@pytest.mark.parametrize("kind", REFUSED)
def test_state_space_models_and_unknown_experts_are_refused(kind: str, tmp_path: Path) -> None:
    folder = save_small(kind, tmp_path)
    with pytest.raises(FedgroveError) as refusal:
        perplexity(decoder_of(folder), windows())
    assert "three dimensions" in str(refusal.value)


@pytest.mark.parametrize("kind", ["cpmant", "prophetnet"])
def test_a_type_with_other_hidden_states_than_those_of_tokens_is_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(FedgroveError, match=f"type {kind} does not have one vector of hidden states for each token"):
        perplexity(decoder_of(save_small(kind, tmp_path)), windows())


def test_blocks_that_are_not_run_one_after_the_other_are_refused(tmp_path: Path) -> None:
    decoder = Decoder(Checkpoint(save_small("llama", tmp_path)))
    again = decoder.blocks[0]
    decoder.blocks[1].register_forward_pre_hook(lambda block, args: (again(args[0]),))
    with pytest.raises(FedgroveError, match="does not run its 3 blocks one after the other"):
        decoder.embed(windows()[0])


@pytest.mark.parametrize("kind", ["xglm", "gemma3_text", "falcon", "gpt2", "opt", "codegen"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_type_runs_in_16_bits_in_which_no_constant_stays_in_32(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = save_small(kind, tmp_path, dtype)
    decoder = Decoder(Checkpoint(folder), dtype=dtype)
    hidden, calls = decoder.embed(windows()[0])
    assert hidden.dtype == dtype
    for index in range(len(decoder)):
        with decoder.loaded(index) as block:
            hidden = decoder.run(block, hidden, calls[index])
    logits = decoder.head(hidden[0])
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        plain = model(input_ids=windows()[0], use_cache=False).logits[0]
    torch.testing.assert_close(logits.float(), plain.float(), rtol=0.05, atol=0.05 * float(plain.float().std()))


@pytest.mark.parametrize("kind", HARD)
def test_learnt_positions_are_a_hard_limit_which_is_exact(kind: str, tmp_path: Path) -> None:
    decoder = Decoder(Checkpoint(save_small(kind, tmp_path, **({"is_decoder": True} if kind == "roberta" else {}))))
    assert positions(decoder.model, decoder.checkpoint.config) == (HARD[kind], True)
    decoder.embed(torch.full((1, HARD[kind]), 5))
    with pytest.raises(FedgroveError, match=f"positions for {HARD[kind]}; set it to at most {HARD[kind]}"):
        decoder.embed(torch.full((1, HARD[kind] + 1), 5))
    with pytest.raises(FedgroveError, match=r"evaluate\.length = 65"):
        check_length(decoder, 65, "evaluate.length")


@pytest.mark.parametrize("kind", SOFT)
def test_other_positions_are_a_note_at_most(kind: str, tmp_path: Path) -> None:
    decoder = Decoder(Checkpoint(save_small(kind, tmp_path)))
    limit, is_hard = positions(decoder.model, decoder.checkpoint.config)
    assert not is_hard
    assert check_length(decoder, 64, "stages.0.length") is None
    assert (check_length(decoder, 80, "stages.0.length") is None) == (limit is None)
    decoder.embed(torch.full((1, 80), 5))
