"""Every form of a result reads back as the model that it was made from, in the program that it is meant for."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from huggingface_hub import ModelCard
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

import fedgrove.cli
from fedgrove import export as exporting
from fedgrove import plugins
from fedgrove.errors import FedgroveError
from fedgrove.export import Texts, export
from fedgrove.exports import Source
from fedgrove.job.load import load
from fedgrove.models.masks import Target
from fedgrove.models.stream import Checkpoint
from fedgrove.models.tensor_files import save_tensors
from fedgrove.stages.prune.pruners import magnitude
from small import CLIENTS, DEMO, TOKENIZER, Small, cli, complaint, make_model, save_random

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 4100, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "attention_factor": 0.8, "original_max_position_embeddings": 16,
}  # fmt: skip


def model(folder: Path, config: Any) -> Path:
    """A random model in float32 with the shipped tokenizer."""
    save_random(folder, config)
    for name in TOKENIZER:
        (folder / name).write_bytes((DEMO / "grove-6m" / name).read_bytes())
    return folder


def logits(folder: Path, ids: Tensor, **how: Any) -> Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, **how)(ids).logits.float()  # type: ignore[no-any-return]


IDS = torch.arange(7, 7 + 40)[None] * 37 % 4000


@pytest.fixture(scope="module")
def exported(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """A run and its model in a form, made once; for onnx a model of one block, because torch takes seconds to trace a block."""
    folder = tmp_path_factory.mktemp("exported")

    @cache
    def of(form: str) -> tuple[Path, Path]:
        of_one_block = {"model__path": str(make_model(folder / "one-block", num_hidden_layers=1))}
        run = small.undisturbed(**small.two_texts(), **(of_one_block if form == "onnx" else {}))
        return run, export(run, form, folder / form)

    return of


@pytest.mark.parametrize("form", ["hf", "packed", "gguf", "onnx"])
def test_a_form_that_loses_nothing_reads_back_as_the_run_measured(
    exported: Callable[[str], tuple[Path, Path]], form: str
) -> None:
    pytest.importorskip("gguf" if form == "gguf" else "onnxruntime" if form == "onnx" else "torch")
    run, out = exported(form)
    told = json.loads((out.parent / f"{form}.export.json").read_text())
    measured = {
        line["name"].removeprefix("perplexity/"): line["value"]
        for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if (line["stage"], line["client"]) == (0, None) and line["name"].startswith("perplexity/")
    }
    assert told["perplexity"].keys() == measured.keys() == {"held-0", "held-1"}
    assert told["of_perplexity"] == measured
    for text, value in told["perplexity"].items():
        assert value == pytest.approx(measured[text], rel=0.01)
    assert told["bytes"] == exporting.folder_bytes(out)
    assert told["of_model"] == exporting.folder_bytes(run / "model")
    assert not list(out.parent.glob("*.partial"))


@pytest.mark.parametrize(("form", "most"), [("int8", 0.03), ("nf4", 0.4)])
def test_few_bits_load_in_plain_transformers_and_keep_zeros(tmp_path: Path, form: str, most: float) -> None:
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.functional import dequantize_4bit

    plain = make_model(tmp_path / "model", intermediate_size=128)
    weights = {name: Checkpoint(plain).read(name).float() for name in Checkpoint(plain).names() if "_proj" in name}
    pruned = {name: magnitude.prune(w, None, Target(0.5))[0].bfloat16() for name, w in weights.items()}  # type: ignore[arg-type]
    save_tensors(pruned, tmp_path / "over" / "block.safetensors")
    Checkpoint(plain).over(tmp_path / "over").write(tmp_path / "pruned")
    out = export(
        tmp_path / "pruned", form, tmp_path / form, Texts((("held", DEMO / "texts" / "theatre-heldout.txt", None),), 32, 2)
    )
    assert json.loads((tmp_path / f"{form}.export.json").read_text())["perplexity"]["held"] > 1
    before, after = logits(tmp_path / "pruned", IDS), logits(out, IDS)
    assert 0 < float((after - before).norm() / before.norm()) < most
    name = "model.layers.0.mlp.up_proj"
    zeros = Checkpoint(tmp_path / "pruned").read(f"{name}.weight") == 0
    linear = AutoModelForCausalLM.from_pretrained(out).get_submodule(name)
    weight = linear.weight.data
    assert weight.dtype in (torch.int8, torch.uint8)
    values = dequantize_4bit(weight, linear.weight.quant_state) if form == "nf4" else weight
    assert zeros.any()
    assert not values[zeros].any()


def test_nf4_is_refused_where_bitsandbytes_cannot_compute(small: Small, tmp_path: Path) -> None:
    assert "96 inputs" in complaint("export", small.undisturbed(), "--to", "nf4", "--out", tmp_path / "nf4")


def test_onnx_takes_any_number_of_texts_and_tokens(exported: Callable[[str], tuple[Path, Path]]) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    run, out = exported("onnx")
    session = onnxruntime.InferenceSession(str(out / "model.onnx"))
    for ids in (IDS[:, :1], IDS, IDS[:, :33].repeat(3, 1)):
        wanted = logits(run / "model", ids, dtype=torch.float32)
        got = session.run(None, {"input_ids": ids.numpy()})[0]
        assert torch.allclose(torch.from_numpy(got), wanted, atol=1e-3)


CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "llama, tied, wide heads": LlamaConfig(**SIZES, tie_word_embeddings=True, head_dim=32),
    "llama 3.1": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "llama, linear": LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
    "llama, yarn": LlamaConfig(**SIZES, rope_parameters=YARN),
    "llama, biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_llama_cpp_computes_what_transformers_computes(tmp_path: Path, name: str) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is built by hand: pip install llama-cpp-python")
    out = export(model(tmp_path / "model", CONFIGS[name]), "gguf", tmp_path / "gguf", Texts())
    llama = llama_cpp.Llama(str(out / "model.gguf"), n_ctx=64, logits_all=True, verbose=False)
    llama.eval(IDS[0].tolist())
    got = torch.from_numpy(np.array(llama.scores[: IDS.shape[1]]))
    wanted = logits(tmp_path / "model", IDS)[0]
    assert float((got - wanted).norm() / wanted.norm()) < 2e-3
    llama.close()


@pytest.mark.parametrize("name", ["llama, tied, wide heads", "mistral", "qwen2"])  # it takes every Qwen3's heads as 128 wide
def test_transformers_reads_our_gguf_as_the_model(tmp_path: Path, name: str) -> None:
    pytest.importorskip("gguf")
    out = export(model(tmp_path / "model", CONFIGS[name]), "gguf", tmp_path / "gguf", Texts())
    assert torch.allclose(logits(out, IDS, gguf_file="model.gguf"), logits(tmp_path / "model", IDS), atol=1e-3)


def test_llama_cpp_cuts_text_as_the_tokenizer_does(grove: Path, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is built by hand: pip install llama-cpp-python")
    out = export(grove, "gguf", tmp_path / "gguf", Texts())
    llama = llama_cpp.Llama(str(out / "model.gguf"), vocab_only=True, verbose=False)
    tokenizer = AutoTokenizer.from_pretrained(grove)
    for text in ("It was the 3rd of May, 1987; don't  ask!\n\n\tWhy?", "Ünïcode 漢字 🙂 x==y", "a<|endoftext|>b"):
        assert llama.tokenize(text.encode(), add_bos=True, special=True) == tokenizer(text)["input_ids"]
    llama.close()


def test_what_gguf_does_not_know_is_refused_with_a_way_out(tmp_path: Path) -> None:
    pytest.importorskip("gguf")

    def refused(folder: Path) -> str:
        with pytest.raises(FedgroveError, match=r"convert_hf_to_gguf\.py") as fault:
            export(folder, "gguf", tmp_path / "out", Texts())
        assert not list(tmp_path.glob("out*"))
        return str(fault.value)

    assert "gemma2" in refused(model(tmp_path / "gemma", Gemma2Config(**SIZES, head_dim=16)))
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert "dynamic" in refused(model(tmp_path / "dynamic", LlamaConfig(**SIZES, rope_parameters=dynamic)))
    file = model(tmp_path / "words", LlamaConfig(**SIZES)) / "tokenizer.json"
    told = json.loads(file.read_text())
    told["pre_tokenizer"] = {"type": "Whitespace"}
    file.write_text(json.dumps(told))
    assert "pre-tokenizer" in refused(tmp_path / "words")


@pytest.fixture(scope="module")
def tuned(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that tunes and prunes nothing."""
    stage = {"kind": "tune", "rounds": 1, "steps": 2, "length": 16, "batches": [1], "ranks": [2], "bits": [32]}
    clients = [{"name": name, "data": str(small.texts[name])} for name in CLIENTS[:2]]
    evaluate = {"data": [str(small.texts["held-0"])], "length": 32, "windows": 4}
    job = {"name": "tuned", "model": {"path": str(small.model)}, "clients": clients, "stages": [stage], "evaluate": evaluate}
    folder = tmp_path_factory.mktemp("tuned")
    (folder / "job.toml").write_text(tomli_w.dumps(job))
    assert cli("run", folder / "job.toml", "--out", folder / "run", "--quiet")[0] == 0
    return folder / "run"


def test_an_adapter_on_the_first_model_is_the_result(small: Small, tuned: Path, tmp_path: Path) -> None:
    out = export(tuned, "adapter", tmp_path / "adapter")
    told = json.loads((tmp_path / "adapter.export.json").read_text())
    assert told["perplexity"]["held-0"] == pytest.approx(told["of_perplexity"]["held-0"], rel=0.01)
    everything = b"".join(file.read_bytes() for file in out.iterdir())
    assert str(small.folder).encode() not in everything, "folder names reveal their owner"
    assert ModelCard((out / "README.md").read_text()).data.to_dict()["base_model_relation"] == "adapter"


def test_an_adapter_that_would_refill_zeros_is_refused(small: Small, tuned: Path, tmp_path: Path) -> None:
    assert "no stage" in complaint("export", small.undisturbed(), "--to", "adapter")
    assert "give the run folder" in complaint("export", small.model, "--to", "adapter")
    pruned = tmp_path / "pruned"
    for name in ("job.toml", "metrics.jsonl"):
        (pruned / name).parent.mkdir(exist_ok=True)
        (pruned / name).write_bytes((tuned / name).read_bytes())
    (pruned / "adapter").symlink_to(tuned / "adapter")
    (pruned / "model").symlink_to(small.undisturbed() / "model")
    assert "refill" in complaint("export", pruned, "--to", "adapter")
    assert not list(pruned.glob("peft*"))


def test_a_form_that_reads_back_otherwise_is_not_kept(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = plugins.load("exports", "hf")
    honest = hf.losses

    def losses(*args: Any) -> tuple[float, int]:
        total, count = honest(*args)
        return total + 0.02 * count, count

    monkeypatch.setattr(hf, "losses", losses)
    with pytest.raises(FedgroveError, match="the export was removed"):
        export(small.undisturbed(), "hf", tmp_path / "hf")
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_one_line_that_says_what_to_install(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for form, extra in (("gguf", "gguf"), ("onnx", "onnx"), ("int8", "quantize"), ("nf4", "quantize")):
        with pytest.raises(FedgroveError, match=rf'--to {form} needs .*pip install "fedgrove\[{extra}\]"'):
            export(small.undisturbed(), form, tmp_path / form, Texts())
    assert not list(tmp_path.iterdir())


def test_the_command_measures_on_other_text_and_shows_every_form(small: Small, tmp_path: Path) -> None:
    text = small.texts["held-0"]
    for form in ("packed", "hf"):
        out = tmp_path / form
        status, said, _ = cli("export", small.undisturbed(), "--to", form, "--out", out, "--data", text, "--length", 40)
        assert status == 0
        told = json.loads((tmp_path / f"{form}.export.json").read_text())
        assert told["length"] == 40
        assert told["perplexity"][str(text)] == told["of_perplexity"][str(text)]
    assert said.index("packed") < said.index("│ hf"), "the smallest first"
    assert cli("export", tmp_path / "packed", "--to", "hf", "--out", tmp_path / "back", "--no-measure")[0] == 0
    assert json.loads((tmp_path / "back.export.json").read_text())["perplexity"] == {}
    said_help = fedgrove.cli.export.__doc__ or ""
    said = complaint("export", small.undisturbed(), "--to", "zip")
    assert all(form in said for form in plugins.names("exports"))
    assert all(f"**{form}**" in said_help for form in plugins.names("exports"))


def test_the_card_tells_base_method_owners_metrics_privacy_and_use(small: Small, tmp_path: Path) -> None:
    run = small.undisturbed()
    text = (run / "model" / "README.md").read_text()
    about = ModelCard(text).data.to_dict()
    assert about["base_model"] == "model"
    assert {"fedgrove", "federated-learning", "pruned"} <= set(about["tags"])
    results = about["model-index"][0]["results"]
    measured = [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if line["stage"] == 0]
    measured = [line for line in measured if line["client"] is None and line["name"].startswith("perplexity/")]
    wanted = {line["name"]: line["value"] for line in measured}
    assert {f"perplexity/{r['dataset']['name']}": r["metrics"][0]["value"] for r in results} == {
        name: round(value, 3) for name, value in wanted.items()
    }
    for word in (*CLIENTS, "wanda", "fedspallm", "## Privacy", "could see what each client sent", "## How to use it"):
        assert word in text
    assert str(small.folder) not in text
    card = ModelCard((export(run, "packed", tmp_path / "packed", Texts()) / "README.md").read_text())
    assert "packed" in card.data.to_dict()["tags"]
    assert "fedgrove export packed --to hf" in card.text
    assert "pipeline(" not in card.text
    assert card.text.count("## How to use it") == 1
    assert "## Quality" in card.text


def test_every_form_says_what_a_form_must_say() -> None:
    for name in plugins.names("exports"):
        form = plugins.load("exports", name)
        assert form.WHAT
        assert isinstance(form.EXACT, bool)
        assert "FOLDER" in form.USE
        assert callable(form.write)
        assert callable(form.losses)


def test_a_source_that_is_a_model_directory_is_measured_itself(small: Small, tmp_path: Path) -> None:
    texts = Texts((("held", small.texts["held-0"], None),), 32, 2)
    export(small.model, "hf", tmp_path / "hf", texts)
    told = json.loads((tmp_path / "hf.export.json").read_text())
    assert told["perplexity"] == told["of_perplexity"]
    assert math.isfinite(told["perplexity"]["held"])
    assert exporting.held_out(Source(small.model)) == Texts()


def test_held_out_folders_are_measured_as_files_are(small: Small, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_bytes(small.texts["held-0"].read_bytes())
    made = load(small.job("folder", evaluate={"data": [str(tmp_path / "texts"), str(small.texts["held-0"])]}))
    (tmp_path / "job.toml").write_text(made.dumps())
    assert [name for name, *_ in exporting.held_out(Source(small.model, tmp_path)).files] == ["texts", "held-0"]


def test_a_run_that_measured_answers_is_exported_and_measured_by_its_other_texts(small: Small, tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps({"q": f"Tree {i}?", "a": f"{'ash' if i % 2 else 'oak'}"}) + "\n" for i in range(4)))
    pair = {"path": str(questions), "prompt": "{q}", "answer": " {a}"}
    answers = [{"name": name, "measure": name, **pair} for name in ("accuracy", "generation")]
    for name, data in (("both", [str(small.texts["held-0"]), *answers]), ("answers", answers)):
        wanted = {"data": data, "length": 32, "windows": 2, "tokens": 2}
        run = tmp_path / f"run-{name}"
        assert cli("run", small.job(f"export-{name}", evaluate=wanted), "--out", run, "--quiet")[0] == 0
        status, said, err = cli("export", run, "--to", "hf", "--out", tmp_path / name, "--quiet")
        assert (status, err) == (0, "")
        told = json.loads((tmp_path / f"{name}.export.json").read_text())
        assert list(told["perplexity"]) == list(told["of_perplexity"]) == (["held-0"] if name == "both" else [])
        assert ("not measured" in said) == (name == "answers")
