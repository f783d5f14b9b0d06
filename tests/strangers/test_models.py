"""Model directories as strangers have them: they are what transformers reads of them, or one line says why not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import decoders
from decoders import plain_perplexity, save_small
from fedgrove import doctor
from fedgrove.errors import FedgroveError
from fedgrove.export import Texts, export
from fedgrove.models.blocks import Decoder
from fedgrove.models.files import INDEX, WEIGHTS
from fedgrove.models.perplexity import nll_of_logits, perplexity, perplexity_of
from fedgrove.models.preconditions import check_finite, check_parameters, check_vocabulary
from fedgrove.models.pretrained import load_full_model
from fedgrove.models.stream import Checkpoint
from small import TOKENIZER, Small, cli, complaint, make_model

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
NORM = "model.norm.weight"
LINEAR = "model.layers.1.mlp.up_proj.weight"


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def put(folder: Path, tensors: dict[str, Tensor], name: str = WEIGHTS) -> None:
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, folder / name, metadata={"format": "pt"})


def say(folder: Path, name: str = "config.json", **changes: Any) -> None:
    told = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**told, **changes}))


def shards(folder: Path, names: tuple[str, ...], index: bool = True) -> None:
    """Spreads the weights over files."""
    tensors = weights(folder)
    (folder / WEIGHTS).unlink()
    parts = {name: dict(list(tensors.items())[number :: len(names)]) for number, name in enumerate(names)}
    for name, part in parts.items():
        put(folder, part, name)
    if index:
        places = {key: name for name, part in parts.items() for key in part}
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": places}))


def half(folder: Path) -> dict[str, Tensor]:
    """The weights, all wrong."""
    return {name: tensor * 0.5 for name, tensor in weights(folder).items()}


def other_head(folder: Path) -> Tensor:
    torch.manual_seed(5)
    return (weights(folder)[EMBEDDING].float() * 1.5 + 0.1 * torch.randn(4096, 64)).bfloat16()


ODD: dict[str, Callable[[Path], object]] = {
    "as it is": lambda d: None,
    "a later name beside": lambda d: put(d, half(d), "model_old.safetensors"),
    "an earlier name beside": lambda d: put(d, half(d), "a.safetensors"),
    "consolidated beside": lambda d: put(d, half(d), "consolidated.safetensors"),
    "a variant beside": lambda d: put(d, half(d), "model.fp16.safetensors"),
    "shards beside": lambda d: [put(d, half(d), f"model-0000{n}-of-00002.safetensors") for n in (1, 2)],
    "a stale index": lambda d: (d / INDEX).write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights(d), "model-00001-of-00002.safetensors")})
    ),
    "shards": lambda d: shards(d, ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")),
    "shards of odd names": lambda d: (shards(d, ("b.safetensors", "a.safetensors")), put(d, half(d), "z.safetensors")),
    "one shard": lambda d: shards(d, ("model-00001-of-00001.safetensors",)),
    "shards in a folder": lambda d: ((d / "w").mkdir(), shards(d, ("w/1.safetensors", "2.safetensors"))),
    "a tensor in two shards": lambda d: (
        shards(d, ("a.safetensors", "b.safetensors")),
        put(d, {**load_file(d / "a.safetensors"), **{k: v * 0 for k, v in load_file(d / "b.safetensors").items()}},
            "a.safetensors"),
    ),
    "weights that config.json names": lambda d: (
        put(d, weights(d), "mine.safetensors"), put(d, half(d)), say(d, transformers_weights="mine.safetensors")
    ),
    "an index that config.json names": lambda d: (
        shards(d, ("a.safetensors", "b.safetensors")),
        (d / INDEX).rename(d / "mine.safetensors.index.json"),
        say(d, transformers_weights="mine.safetensors.index.json"),
    ),
    "tied and stored twice": lambda d: put(d, {**weights(d), HEAD: weights(d)[EMBEDDING]}),
    "tied and stored twice with other values": lambda d: put(d, {**weights(d), HEAD: other_head(d)}),
    "tied and only the head stored": lambda d: put(
        d, {HEAD if name == EMBEDDING else name: tensor for name, tensor in weights(d).items()}
    ),
    "untied": lambda d: (put(d, {**weights(d), HEAD: other_head(d)}), say(d, tie_word_embeddings=False)),
    "saved without its head": lambda d: put(d, {name.removeprefix("model."): tensor for name, tensor in weights(d).items()}),
    "tensors that are not used": lambda d: put(d, {**weights(d), "model.layers.2.mtp.weight": torch.ones(3, 3)}),
    "code that is not needed": lambda d: (
        say(d, auto_map={"AutoModelForCausalLM": "modeling_x.X"}), (d / "modeling_x.py").write_text("raise SystemExit")
    ),
    "an attention that is not installed": lambda d: say(d, attn_implementation="flash_attention_2"),
}  # fmt: skip


def odd(name: str, folder: Path) -> Path:
    make_model(folder)
    ODD[name](folder)
    return folder


def windows() -> list[Tensor]:
    return [torch.randint(0, 4096, (1, 16), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]


def logits(folder: Path) -> Tensor:
    """By plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return torch.cat([model.eval()(input_ids=ids, return_dict=True).logits for ids in windows()])


def nll(folder: Path) -> float:
    target = torch.cat(windows())[:, 1:].flatten()
    return float(torch.nn.functional.cross_entropy(logits(folder)[:, :-1].flatten(0, 1), target).exp())


@pytest.mark.parametrize("name", ODD)
def test_an_odd_folder_is_measured_and_written_as_plain_transformers_loads_it(name: str, tmp_path: Path) -> None:
    folder = odd(name, tmp_path / "model")
    checkpoint = Checkpoint(folder)
    decoder = Decoder(checkpoint)
    check_parameters(decoder)
    assert perplexity(decoder, windows()) == pytest.approx(nll(folder), rel=1e-4)
    assert perplexity(decoder, windows()) == pytest.approx(nll(folder), rel=1e-4)  # with the ends that are loaded
    decoder.forget_ends()
    assert perplexity(decoder, windows()) == pytest.approx(nll(folder), rel=1e-4)
    checkpoint.write(tmp_path / "out")
    assert torch.equal(logits(tmp_path / "out"), logits(folder))
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert (INDEX in files) == (WEIGHTS not in files)
    assert not [file for file in files if file.endswith(".py")]
    assert sum(len(load_file(tmp_path / "out" / file)) for file in files if file.endswith(".safetensors")) == len(
        checkpoint.names()
    )
    if INDEX in files:
        places = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
        assert set(places) == set(checkpoint.names())
        assert all(name in load_file(tmp_path / "out" / file) for name, file in places.items())


SWITCHES: dict[str, dict[str, object]] = {
    "tuples": {"return_dict": False},
    "hidden states": {"output_hidden_states": True},
    "attentions": {"output_attentions": True},
    "attentions that were saved by an older release": {"_output_attentions": True},
    "routers": {"output_router_logits": True},
    "all": {"return_dict": False, "output_hidden_states": True, "output_attentions": True, "output_router_logits": True},
    "TorchScript": {"torchscript": True},
    "a cache": {"use_cache": True},
    "no cache": {"use_cache": False},
    "memory for gradients": {"gradient_checkpointing": True},
    "dropout": {"attention_dropout": 0.5, "hidden_dropout": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5, "dropout": 0.5},
    "chunks": {"chunk_size_feed_forward": 4},
    "generation": {"do_sample": True, "temperature": 0.1, "num_beams": 4, "max_length": 3, "repetition_penalty": 2.0},
}


@cache
def perplexity_as_saved(kind: str) -> float:
    with TemporaryDirectory() as folder:
        return plain_perplexity(save_small(kind, Path(folder)))


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "mixtral", "bloom", "bart"])
def test_settings_of_outputs_and_of_training_change_nothing(kind: str, switch: str, tmp_path: Path) -> None:
    folder = save_small(kind, tmp_path)
    expected = perplexity_as_saved(kind)
    say(folder, **SWITCHES[switch])
    ids = decoders.windows()
    assert perplexity(Decoder(Checkpoint(folder)), ids) == pytest.approx(expected, rel=1e-4)
    full = load_full_model(folder, dtype=torch.float32)
    assert perplexity_of(*nll_of_logits(lambda one: full(input_ids=one).logits, ids)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("form", ["packed", "gguf", "int8"])
def test_a_model_with_all_switches_is_exported(form: str, small: Small, tmp_path: Path) -> None:
    pytest.importorskip({"packed": "torch", "gguf": "gguf", "int8": "bitsandbytes"}[form])
    folder = make_model(tmp_path / "model")
    say(folder, **SWITCHES["all"])
    export(folder, form, tmp_path / "out", Texts((("held", small.texts["held-0"], None),), 16, 2))


@pytest.mark.parametrize("name", [name for name in ODD if "tied" in name or "beside" in name or "shards" in name])
def test_a_run_leaves_a_model_that_is_as_good_in_plain_transformers(name: str, small: Small, tmp_path: Path) -> None:
    folder = odd(name, tmp_path / "model")
    status, _, err = cli("run", small.job("odd", model__path=str(folder), evaluate={}), "--out", tmp_path / "run", "--quiet")
    assert status == 0, err
    result = tmp_path / "run" / "model"
    assert perplexity(Decoder(Checkpoint(result)), windows()) == pytest.approx(nll(result), rel=1e-4)
    assert bool(Decoder(Checkpoint(result)).untied) == bool(Decoder(Checkpoint(folder)).untied)
    if HEAD in Checkpoint(folder):
        assert torch.equal(Checkpoint(result).read(HEAD), Checkpoint(folder).read(HEAD))


@pytest.mark.parametrize("form", ["hf", "packed", "gguf", "int8"])
@pytest.mark.parametrize("name", [name for name in ODD if "tied" in name])
def test_an_export_is_of_the_same_model(name: str, form: str, tmp_path: Path) -> None:
    if form in ("gguf", "int8"):
        pytest.importorskip({"gguf": "gguf", "int8": "bitsandbytes"}[form])
    folder = odd(name, tmp_path / "model")
    out = export(folder, form, tmp_path / "out")
    if form == "packed":
        out = export(out, "hf", tmp_path / "back")
    if form == "gguf":
        model = AutoModelForCausalLM.from_pretrained(out, gguf_file="model.gguf", dtype=torch.float32).eval()
        with torch.no_grad():
            got = torch.cat([model(input_ids=ids).logits for ids in windows()])
        torch.testing.assert_close(got, logits(folder), rtol=1e-3, atol=1e-3)
    elif form == "int8":
        with torch.no_grad():
            model = AutoModelForCausalLM.from_pretrained(out, device_map="cpu").eval()
            got = torch.cat([model(input_ids=ids).logits for ids in windows()]).float()
        assert (got - logits(folder)).std() < 0.2 * logits(folder).std()
    else:
        assert torch.equal(logits(out), logits(folder))


def test_tied_tensors_that_differ_are_said(tmp_path: Path) -> None:
    notes = check_parameters(Decoder(Checkpoint(odd("tied and stored twice with other values", tmp_path))))
    assert any("lm_head.weight" in note and "untied" in note for note in notes)
    notes = check_parameters(Decoder(Checkpoint(odd("tensors that are not used", tmp_path / "more"))))
    assert any("model.layers.2.mtp.weight" in note for note in notes)


def test_shards_whose_index_is_lost_get_one(small: Small, tmp_path: Path) -> None:
    """transformers does not load this folder, but what a run, and every export, makes of it."""
    folder = make_model(tmp_path / "model")
    before = logits(folder)
    shards(folder, ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"), index=False)
    Checkpoint(folder).write(tmp_path / "out")
    assert torch.equal(logits(tmp_path / "out"), before)
    if pytest.importorskip("bitsandbytes"):
        export(folder, "int8", tmp_path / "int8")
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "lacks model-00002-of-00002.safetensors" in refusal(folder)


def test_an_adapter_beside_a_model_is_left_alone(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    before = logits(folder)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder), LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM")
    )
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink()
    Checkpoint(folder).write(tmp_path / "out")
    assert not list((tmp_path / "out").glob("adapter*"))
    assert torch.equal(logits(tmp_path / "out"), before)
    with torch.no_grad():
        got = load_full_model(folder, dtype=torch.float32)(input_ids=windows()[0]).logits
    torch.testing.assert_close(got, before[:1])
    (folder / WEIGHTS).unlink()
    assert "holds a PEFT adapter, not a model; merge it into" in refusal(folder)
    (folder / "config.json").unlink()
    assert "holds a PEFT adapter, not a model; merge it into" in refusal(folder)


def refusal(folder: Path, act: Callable[[Path], object] | None = None) -> str:
    with pytest.raises(FedgroveError) as fault:
        (act or _open)(folder)
    assert "\n" not in str(fault.value)
    return str(fault.value)


def _open(folder: Path) -> None:
    decoder = Decoder(Checkpoint(folder))
    check_parameters(decoder)
    check_vocabulary(decoder.checkpoint.tokenizer(), decoder)
    check_finite(decoder.checkpoint)


def replace(folder: Path, name: str, value: Tensor) -> None:
    put(folder, {**weights(folder), name: value})


def only(folder: Path, name: str) -> None:
    (folder / WEIGHTS).rename(folder / name)


def quantised(folder: Path, *leaves: str) -> None:
    """Linears replaced by what quantisers store."""
    tensors = {}
    for name, tensor in weights(folder).items():
        if name.endswith("_proj.weight"):
            tensors |= {name.removesuffix("weight") + leaf: torch.zeros(4, 4, dtype=torch.int32) for leaf in leaves}
        else:
            tensors[name] = tensor
    put(folder, tensors)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "outside": (lambda d: (shards(d, ("a.safetensors",)), _point(d, "../a.safetensors")), "outside of the folder"),
    "absolute": (lambda d: (shards(d, ("a.safetensors",)), _point(d, str(d / "a.safetensors"))), "outside of the folder"),
    "windows": (lambda d: (shards(d, ("a.safetensors",)), _point(d, "..\\a.safetensors")), "outside of the folder"),
    "inner dots": (lambda d: (shards(d, ("a.safetensors",)), _point(d, "x/../../a.safetensors")), "outside of the folder"),
    "pickled shard": (lambda d: (shards(d, ("a.safetensors",)), _point(d, "pytorch_model.bin")), "no .safetensors file"),
    "explicit outside": (lambda d: say(d, transformers_weights="../x.safetensors"), "outside of the folder"),
    "explicit missing": (lambda d: say(d, transformers_weights="x.safetensors"), "lacks x.safetensors"),
    "shard lost": (lambda d: (shards(d, ("a.safetensors", "b.safetensors")), (d / "b.safetensors").unlink()), "lacks b.saf"),
    "gguf": (lambda d: only(d, "m.gguf"), "holds m.gguf, which is an export"),
    "pickle": (lambda d: only(d, "pytorch_model.bin"), "no .safetensors file"),
    "variant": (lambda d: only(d, "model.fp16.safetensors"), "has model.fp16.safetensors, but neither"),
    "packed": (lambda d: only(d, "packed.json"), "holds a packed model"),
    "nothing": (lambda d: (d / WEIGHTS).unlink(), "copy the model again"),
    "missing": (lambda d: put(d, {k: v for k, v in weights(d).items() if k != LINEAR}), f"lacks the tensor {LINEAR}"),
    "no embedding": (lambda d: put(d, {k: v for k, v in weights(d).items() if k != EMBEDDING}), "lacks the tensor"),
    "no norm": (lambda d: put(d, {k: v for k, v in weights(d).items() if k != NORM}), f"lacks the tensor {NORM}"),
    "shape": (lambda d: replace(d, LINEAR, torch.ones(3, 3)), f"{LINEAR} has shape [3, 3]"),
    "turned": (lambda d: replace(d, LINEAR, weights(d)[LINEAR].T), f"{LINEAR} has shape"),
    "integers": (lambda d: replace(d, LINEAR, torch.zeros(96, 64, dtype=torch.int8)), "take the unquantised model"),
    "integer norm": (lambda d: replace(d, "model.norm.weight", torch.ones(64, dtype=torch.int64)), "model.norm.weight"),
    "float8": (lambda d: replace(d, LINEAR, weights(d)[LINEAR].to(torch.float8_e4m3fn)), "is quantised"),
    "float8 e5m2": (lambda d: replace(d, LINEAR, weights(d)[LINEAR].to(torch.float8_e5m2)), "is quantised"),
    "gptq": (lambda d: quantised(d, "qweight", "qzeros", "scales", "g_idx"), "is quantised"),
    "awq": (lambda d: quantised(d, "qweight", "qzeros", "scales"), "is quantised"),
    "compressed": (lambda d: quantised(d, "weight_packed", "weight_scale", "weight_shape"), "is quantised"),
    "bitsandbytes": (lambda d: quantised(d, "weight", "SCB"), "is quantised"),
    "nf4": (lambda d: quantised(d, "weight", "weight.absmax", "weight.quant_map"), "is quantised"),
    "key": (lambda d: say(d, quantization_config={"quant_method": "fp8"}), "is quantised (config.json"),
    "not a number": (lambda d: _spoil(d, LINEAR, float("nan")), f"{LINEAR} holds NaN or infinity; copy the model again"),
    "infinity": (lambda d: _spoil(d, EMBEDDING, float("-inf")), f"{EMBEDDING} holds NaN or infinity; copy the model again"),
    "string": (lambda d: say(d, rms_norm_eps="1e-6"), "config.json is not understood"),
    "float layers": (lambda d: say(d, num_hidden_layers="two"), "config.json"),
    "no heads": (lambda d: say(d, num_attention_heads=0), "config.json"),
    "activation": (lambda d: say(d, hidden_act="no-such"), "config.json"),
    "rope": (lambda d: say(d, rope_parameters={"rope_type": "no-such", "rope_theta": 1.0}), "config.json"),
    "list": (lambda d: (d / "config.json").write_text("[]"), "config.json is not understood"),
    "cut": (lambda d: (d / "config.json").write_text('{"model_type": "lla'), "config.json is not understood"),
    "bytes": (lambda d: (d / "config.json").write_bytes(b"\xff\xfe"), "config.json is not understood"),
    "future": (lambda d: say(d, model_type="from-the-future"), "unknown to the installed transformers"),
    "no type": (lambda d: (d / "config.json").write_text("{}"), "config.json is not understood"),
    "vision": (lambda d: (d / "config.json").write_text('{"model_type": "vit"}'), "no causal language model"),
    "clip": (lambda d: (d / "config.json").write_text('{"model_type": "clip"}'), "no causal language model"),
    "bert": (lambda d: (d / "config.json").write_text('{"model_type": "bert"}'), "type bert is an encoder"),
    "t5": (lambda d: (d / "config.json").write_text('{"model_type": "t5"}'), "type t5 is an encoder-decoder"),
    "tokenizer cut": (lambda d: (d / "tokenizer.json").write_text("{"), "has no tokenizer that loads"),
    "tokenizer config": (lambda d: (d / "tokenizer_config.json").write_text("[]"), "tokenizer_config.json is not understood"),
    "no tokenizer": (lambda d: [(d / name).unlink() for name in TOKENIZER], "has no tokenizer that loads"),
}  # fmt: skip


def _point(folder: Path, name: str) -> None:
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(places, name)}))


def _spoil(folder: Path, name: str, value: float) -> None:
    tensor = weights(folder)[name]
    tensor[3, 4] = value
    replace(folder, name, tensor)


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_used_is_one_line(name: str, tmp_path: Path) -> None:
    spoil, words = BAD[name]
    folder = make_model(tmp_path / "model")
    spoil(folder)
    line = refusal(folder)
    assert words in line
    assert "float32" not in line or words == "float32"
    checks = doctor.model(folder)
    assert [check for check in checks if not check.ok], "doctor refuses what a run would refuse"
    assert words in " ".join(f"{check.text}; {check.remedy}" for check in checks)


@pytest.mark.parametrize("name", ["not a number", "missing", "gptq", "string", "outside", "shape"])
def test_a_run_refuses_it_in_the_same_line(name: str, small: Small, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    BAD[name][0](folder)
    line = complaint("run", small.job("bad", model__path=str(folder)), "--out", tmp_path / "run")
    assert BAD[name][1] in line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_weights_that_a_smaller_dtype_does_not_hold_are_named(tmp_path: Path) -> None:
    folder = make_model(tmp_path)
    _spoil(folder, LINEAR, 1e30)
    assert 'set it to "auto"' in refusal(folder, lambda d: check_finite(Checkpoint(d, torch.float16)))
    check_finite(Checkpoint(folder))


def test_a_token_without_a_row_is_named(small: Small, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"eos_token": "<|done|>"})
    tokenizer.save_pretrained(folder)
    assert "'<|done|>' the id 4096, but the embedding has only 4096 rows" in refusal(folder)
    assert "4096 rows" in complaint("run", small.job("token", model__path=str(folder)), "--out", tmp_path / "run")
    with pytest.raises(FedgroveError, match="the id 4096"):
        Decoder(Checkpoint(folder)).embed(torch.full((1, 4), 4096))


CODE = "open({ran!r}, 'w').close()\nfrom transformers import LlamaConfig\nclass C(LlamaConfig):\n    model_type = 'mygrove'\n"


@pytest.mark.parametrize("part", ["config", "model", "tokenizer"])
def test_code_beside_a_model_is_never_run_or_asked_about(
    part: str, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("it asks"))
    folder, ran = make_model(tmp_path / "model"), tmp_path / "RAN"
    (folder / "mine.py").write_text(CODE.format(ran=str(ran)))
    match part:
        case "config":
            say(folder, model_type="mygrove", auto_map={"AutoConfig": "mine.C"})
        case "model":
            (folder / "config.json").write_text('{"model_type": "vit", "auto_map": {"AutoModelForCausalLM": "mine.C"}}')
        case "tokenizer":
            say(folder, "tokenizer_config.json", tokenizer_class="Mine", auto_map={"AutoTokenizer": ["mine.C", None]})
            (folder / "tokenizer.json").unlink()
    line = complaint("run", small.job("code", model__path=str(folder)), "--out", tmp_path / "run")
    assert "it needs Python code of its own, which is never run; take a model that transformers knows" in line
    assert not ran.exists()


def test_only_files_on_a_list_are_copied(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    good = ("README.md", "LICENSE", "LICENSE.txt", "NOTICE", "chat_template.jinja", "merges.txt", "spiece.model", "vocab.json")
    bad = ("x.py", "x.pyc", "x.pkl", "x.so", "x.sh", "x.bat", "x.dll", "x.ipynb", "x.pt", "x.bin", "x.gguf", "x.h5", "x.tar.gz",
           "x.exe", "training_args.bin", "trainer_state.json", "adapter_model.bin", ".env", "license.py", "x.onnx")  # fmt: skip
    for name in (*good, *bad):
        (folder / name).write_text("x")
    say(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["mine.C", None]})
    Checkpoint(folder).write(tmp_path / "out")
    packed = export(folder, "packed", tmp_path / "packed", None)
    export(packed, "hf", tmp_path / "back")
    for out in (tmp_path / "out", tmp_path / "back"):
        names = {file.name for file in out.iterdir()}
        assert set(good) <= names
        assert not set(bad) & names
        assert "auto_map" not in (out / "tokenizer_config.json").read_text()


def test_a_fingerprint_does_not_see_what_is_not_the_model(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    before = Checkpoint(folder).fingerprint()
    put(folder, half(folder), "model_old.safetensors")
    assert Checkpoint(folder).fingerprint() == before
    shutil.copytree(folder, tmp_path / "copy")
    replace(tmp_path / "copy", LINEAR, weights(folder)[LINEAR][:, :32].repeat(1, 2).float())
    assert Checkpoint(tmp_path / "copy").fingerprint() != before


def test_a_padding_token_without_a_row_is_no_fault(small: Small) -> None:
    decoder = Decoder(Checkpoint(small.model))
    tokenizer = AutoTokenizer.from_pretrained(small.model)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert max(tokenizer.get_vocab().values()) == 4096
    check_vocabulary(tokenizer, decoder)
