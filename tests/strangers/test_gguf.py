"""Exports of models as strangers have them: kinds of positions, tied heads, tokenizers, files; and of files that are wrong."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from fedgrove import plugins
from fedgrove.errors import FedgroveError
from fedgrove.export import Texts, export
from fedgrove.exports import Source
from fedgrove.exports.llamacpp import positions
from fedgrove.exports.llamacpp.positions import Positions
from fedgrove.models.blocks import Decoder
from fedgrove.models.stream import Checkpoint
from small import DEMO, TOKENIZER, complaint, save_random

gguf = pytest.importorskip("gguf")

END, PAD = "<|endoftext|>", "<|pad|>"

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 300, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.2,
    "pad_token_id": 1,
}  # fmt: skip
_FOLDER = tempfile.TemporaryDirectory()
TEXT = Path(_FOLDER.name) / "text.txt"
TEXT.write_text((DEMO / "texts" / "theatre-heldout.txt").read_text(encoding="utf-8")[:1000])
TEXTS = Texts((("held", TEXT, None),), 48, 2)
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32,
    "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
}  # fmt: skip
WRITTEN: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "another base": {"rope_type": "default", "rope_theta": 5e5},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    "linear, by a fraction": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5},
    "yarn": YARN,
    "yarn, other turns": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn, other attention": {**YARN, "attention_factor": 0.8},
    "yarn, no factor": {**YARN, "factor": None},
    "yarn, two scales": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
}
CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


def configured(kind: str, rope: dict[str, Any] | None = None, **changes: Any) -> PretrainedConfig:
    own = {"sliding_window": None} if kind == "mistral" else {"head_dim": 16} if kind == "qwen3" else {}
    rope = WRITTEN["default"] if rope is None else rope
    return CONFIGS[kind](**{**SIZES, **own, **changes}, rope_parameters=dict(rope))  # type: ignore[no-any-return]


def unchanged(tensors: dict[str, Any]) -> None:
    """Leaves the tensors as they are."""


def model(folder: Path, config: PretrainedConfig, change: Callable[[dict[str, Any]], None] = unchanged) -> Path:
    """A random model in float32 with the shipped tokenizer; ``change`` may alter the tensors that are stored."""
    save_random(folder, config)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    for name, content in tokenizer_files().items():
        (folder / name).write_bytes(content)
    return folder


@cache
def tokenizer_files() -> dict[str, bytes]:
    """A byte-level BPE tokenizer of 262 tokens: the readers of GGUF files take most of their time for the vocabulary."""
    words = [END, PAD, *sorted(ByteLevel.alphabet()), "th", "Ġt", "he", "the"]
    bpe = BPE({word: number for number, word in enumerate(words)}, [("t", "h"), ("Ġ", "t"), ("h", "e"), ("th", "e")])
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    with tempfile.TemporaryDirectory() as folder:
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=PAD)
        fast.save_pretrained(folder)
        return {name: (Path(folder) / name).read_bytes() for name in TOKENIZER}


def measured(out: Path) -> tuple[float, float]:
    """The perplexity of the export and of the model."""
    told = json.loads(out.with_name(f"{out.name}.export.json").read_text())
    return told["perplexity"]["held"], told["of_perplexity"]["held"]


def field(out: Path, key: str) -> Any:
    found = gguf.GGUFReader(out / "model.gguf").get_field(key)
    return None if found is None else found.contents()


def tensors_of(out: Path) -> set[str]:
    return {tensor.name for tensor in gguf.GGUFReader(out / "model.gguf").tensors}


def refusal(folder: Path, form: str = "gguf", texts: Texts = TEXTS) -> str:
    out = folder.with_name("refused")
    with pytest.raises(FedgroveError) as fault:
        export(folder, form, out, texts)
    assert not list(out.parent.glob("refused*"))
    return str(fault.value)


@pytest.mark.parametrize(
    ("kind", "rope"), [*(("llama", rope) for rope in WRITTEN), *((kind, "yarn") for kind in CONFIGS if kind != "llama")]
)
def test_a_file_has_the_positions_of_its_model(tmp_path: Path, kind: str, rope: str) -> None:
    folder = model(tmp_path / "model", configured(kind, WRITTEN[rope]))
    out = export(folder, "gguf", tmp_path / "out", Texts())
    decoder = Decoder(Checkpoint(folder))
    read = positions.read(gguf.GGUFReader(out / "model.gguf"))
    frequencies, attention = read.frequencies()
    rotary: Any = decoder.model.get_submodule("model.rotary_emb")
    np.testing.assert_allclose(frequencies, rotary.inv_freq.numpy(), rtol=1e-5)
    assert attention == pytest.approx(rotary.attention_scaling)
    assert read.divisors is None
    assert read.base == WRITTEN[rope]["rope_theta"]


@pytest.mark.parametrize(
    ("kind", "rope"),
    [("llama", "default"), ("llama", "linear"), ("mistral", "yarn, two scales"), ("qwen2", "yarn"), ("qwen3", "linear")],
)
def test_a_file_has_the_perplexity_of_its_model(tmp_path: Path, kind: str, rope: str) -> None:
    got, wanted = measured(export(model(tmp_path / "m", configured(kind, WRITTEN[rope])), "gguf", tmp_path / "out", TEXTS))
    assert got == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize(("kind", "head_dim"), [("llama", 16), ("mistral", 32)])
def test_llama3_positions_are_divisors_in_the_file(tmp_path: Path, kind: str, head_dim: int) -> None:
    config = configured(kind, LLAMA3, head_dim=head_dim)
    out = export(model(tmp_path / "model", config), "gguf", tmp_path / "out", TEXTS)
    got, wanted = measured(out)
    assert got == pytest.approx(wanted, rel=1e-3)
    (divisors,) = [t.data for t in gguf.GGUFReader(out / "model.gguf").tensors if t.name == "rope_freqs.weight"]
    assert divisors.shape == (head_dim // 2,)
    assert divisors.min() == 1
    assert divisors.max() == 8
    assert field(out, "llama.rope.scaling.type") is None, "llama.cpp would scale once more"


def test_llama_3_2_s_own_numbers(tmp_path: Path) -> None:
    rope = {**LLAMA3, "rope_theta": 5e5, "factor": 32.0, "original_max_position_embeddings": 8192}
    config = configured("llama", rope, max_position_embeddings=131072, num_attention_heads=2, head_dim=64)
    got, wanted = measured(export(model(tmp_path / "model", config), "gguf", tmp_path / "out", TEXTS))
    assert got == pytest.approx(wanted, rel=1e-3)


def test_what_yarn_says_is_under_llama_cpp_s_keys(tmp_path: Path) -> None:
    rope = {**YARN, "beta_fast": 16.0, "attention_factor": 2.0}
    out = export(model(tmp_path / "model", configured("qwen2", rope)), "gguf", tmp_path / "out", Texts())
    scaling = {"type": "yarn", "factor": 4.0, "original_context_length": 32, "yarn_beta_fast": 16.0, "yarn_beta_slow": 1.0}
    assert {key: field(out, f"qwen2.rope.scaling.{key}") for key in scaling} == scaling
    own = 0.1 * np.log(4) + 1  # llama.cpp multiplies its own factor by that of the file
    assert field(out, "qwen2.rope.scaling.attn_factor") == pytest.approx(2.0 / own)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        LONGROPE,
        {**YARN, "truncate": False},
    ],
    ids=["dynamic", "longrope", "yarn without truncation"],
)
def test_positions_that_llama_cpp_does_not_compute_are_refused(tmp_path: Path, kind: str, rope: dict[str, Any]) -> None:
    said = refusal(model(tmp_path / "model", configured(kind, rope)), texts=Texts())
    assert "positions of type" in said
    assert rope["rope_type"] in said
    assert "export --to hf" in said


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_divisors_that_llama_cpp_would_not_read_are_refused(tmp_path: Path, kind: str) -> None:
    assert f"'llama3' are not supported in a {kind} file" in refusal(model(tmp_path / "model", configured(kind, LLAMA3)))


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (Phi3Config(**SIZES), "phi3"),
        (Gemma2Config(**SIZES, head_dim=16), "gemma2"),
        (configured("qwen3", attention_bias=True), "_proj.bias"),
        (configured("llama", hidden_act="gelu"), "activation"),
    ],
    ids=["phi3", "gemma2", "qwen3 with biases", "gelu"],
)
def test_what_has_no_place_in_the_file_is_refused(tmp_path: Path, config: PretrainedConfig, word: str) -> None:
    said = refusal(model(tmp_path / "model", config), texts=Texts())
    assert word in said
    assert "convert_hf_to_gguf.py" in said


def doubled(name: str) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        tensors[name] = tensors[name] * 2

    return change


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], Callable[[dict[str, Any]], None]]] = {
    "no divisors": (LLAMA3, {"rope_type": "default", "rope_theta": 100.0}, unchanged),
    "other divisors": (LLAMA3, {**LLAMA3, "factor": 16.0}, unchanged),
    "divisors too many": (WRITTEN["default"], {**LLAMA3, "rope_theta": 1e4}, unchanged),
    "not scaled": (WRITTEN["linear"], WRITTEN["default"], unchanged),
    "scaled otherwise": (WRITTEN["linear"], {**WRITTEN["linear"], "factor": 2.1}, unchanged),
    "linear for yarn": (YARN, {**WRITTEN["linear"], "factor": 4.0}, unchanged),
    "yarn's attention": (YARN, {**YARN, "attention_factor": 1.0}, unchanged),
    "yarn's context": (YARN, {**YARN, "original_max_position_embeddings": 128}, unchanged),
    "another base": (WRITTEN["default"], WRITTEN["another base"], unchanged),
    "a linear": (LLAMA3, LLAMA3, doubled("model.layers.0.mlp.down_proj.weight")),
    "a norm": (YARN, YARN, doubled("model.norm.weight")),
    "the head": (WRITTEN["default"], WRITTEN["default"], doubled("lm_head.weight")),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_file_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    rope, other_rope, change = WRONG[wrong]
    right = model(tmp_path / "right", configured("llama", rope))
    other = model(tmp_path / "other", configured("llama", other_rope), change)
    form = plugins.load("exports", "gguf")
    honest = form.write
    monkeypatch.setattr(form, "write", lambda source, out: honest(Source(other), out))
    known = () if change is not unchanged else (("held", 300.0),)  # that is not compared: the positions are, beforehand
    assert "the export was removed" in refusal(right, texts=replace(TEXTS, known=known))


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_rows_in_the_wrong_order_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    form = plugins.load("exports", "gguf")
    monkeypatch.setattr(form, "_interleaved", lambda name, tensor, config: tensor)
    assert "the export was removed" in refusal(model(tmp_path / "model", configured(kind)))


@pytest.mark.parametrize("base", [100.0, 1e4, 1e6])
@pytest.mark.parametrize("dimensions", [8, 64, 128])
def test_frequencies_without_scaling_are_powers_of_the_base(base: float, dimensions: int) -> None:
    for scaling in ("none", "linear"):  # llama.cpp takes a file without a type for linear scaling by one
        frequencies, attention = Positions(dimensions, base, scaling).frequencies()
        assert frequencies == pytest.approx([base ** (-2 * i / dimensions) for i in range(dimensions // 2)])
        assert attention == 1


@pytest.mark.parametrize(
    "config",
    [
        configured("llama", attention_bias=True, mlp_bias=True, head_dim=32, rms_norm_eps=1e-2),
        configured("mistral", head_dim=32),
        configured("qwen2", num_key_value_heads=1),
        configured("qwen3", head_dim=32),
        configured("qwen3", head_dim=8, tie_word_embeddings=True),
    ],
    ids=["biases", "wide heads", "one key", "qwen3, wide", "qwen3, narrow, tied"],
)
def test_what_transformers_reader_drops_is_checked_nevertheless(tmp_path: Path, config: PretrainedConfig) -> None:
    got, wanted = measured(export(model(tmp_path / "model", config), "gguf", tmp_path / "out", TEXTS))
    assert got == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("name", ["mistral", "my qwen2"])
def test_the_name_of_the_folder_does_not_matter(tmp_path: Path, name: str) -> None:
    got, wanted = measured(export(model(tmp_path / name, configured("llama", LLAMA3)), "gguf", tmp_path / "out", TEXTS))
    assert got == pytest.approx(wanted, rel=1e-3)


def with_frequencies(tensors: dict[str, Any]) -> None:
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)


def with_equal_head(tensors: dict[str, Any]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def with_other_head(tensors: dict[str, Any]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()


def with_head_alone(tensors: dict[str, Any]) -> None:
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")


@pytest.mark.parametrize(
    ("change", "head"),
    [(with_frequencies, False), (with_equal_head, False), (with_other_head, True), (with_head_alone, False)],
    ids=["frequencies stored", "equal head stored", "another head stored", "head stored alone"],
)
def test_tensors_of_a_tied_model_are_those_that_transformers_loads(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], head: bool
) -> None:
    folder = model(tmp_path / "model", configured("llama", tie_word_embeddings=True), change)
    out = export(folder, "gguf", tmp_path / "out", Texts())
    names = tensors_of(out)
    assert ("output.weight" in names) == head
    assert "token_embd.weight" in names
    assert not any("rot" in name for name in names)
    ids = torch.arange(40)[None] * 37 % 256
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        got = AutoModelForCausalLM.from_pretrained(out, gguf_file="model.gguf", dtype=torch.float32)(ids).logits
    assert torch.allclose(got, wanted, atol=1e-3)


def template(folder: Path, first: list[str], last: list[str]) -> Path:
    """Lets a tokenizer put tokens before and after every text."""
    file = folder / "tokenizer.json"
    told = json.loads(file.read_text())
    ids = {entry["content"]: entry["id"] for entry in told["added_tokens"]}
    single = [{"SpecialToken": {"id": token, "type_id": 0}} for token in first]
    single += [{"Sequence": {"id": "A", "type_id": 0}}]
    single += [{"SpecialToken": {"id": token, "type_id": 0}} for token in last]
    tokens = {token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in {*first, *last}}
    processor = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": tokens}
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    told["post_processor"] = {"type": "Sequence", "processors": [byte_level, processor]}
    file.write_text(json.dumps(told))
    return folder


@pytest.mark.parametrize(
    ("first", "last"),
    [([], []), ([END], []), ([PAD], []), ([], [END]), ([END], [END])],
    ids=["neither", "bos", "another token than bos", "eos", "both"],
)
def test_what_the_tokenizer_adds_to_a_text_is_what_the_file_says(tmp_path: Path, first: list[str], last: list[str]) -> None:
    folder = template(model(tmp_path / "model", configured("llama")), first, last)
    out = export(folder, "gguf", tmp_path / "out", Texts())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert field(out, "tokenizer.ggml.add_bos_token") == bool(first)
    assert field(out, "tokenizer.ggml.add_eos_token") == bool(last)
    plain = tokenizer("It was", add_special_tokens=False)["input_ids"]
    begin = [field(out, "tokenizer.ggml.bos_token_id")] if first else []
    end = [field(out, "tokenizer.ggml.eos_token_id")] if last else []
    assert begin + plain + end == tokenizer("It was")["input_ids"]
    assert field(out, "tokenizer.ggml.eos_token_id") == tokenizer.eos_token_id
    assert field(out, "tokenizer.ggml.padding_token_id") == tokenizer.pad_token_id


@pytest.mark.parametrize(("first", "last"), [([END, PAD], []), ([], [PAD]), ([], [END, END])])
def test_what_llama_cpp_cannot_add_to_a_text_is_refused(tmp_path: Path, first: list[str], last: list[str]) -> None:
    said = refusal(template(model(tmp_path / "model", configured("llama")), first, last), texts=Texts())
    assert f"adds {', '.join(first + last)} to every text" in said


def test_tokens_without_rows_are_refused(tmp_path: Path) -> None:
    folder = model(tmp_path / "model", configured("llama", vocab_size=262))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"eos_token": "<|done|>"})
    tokenizer.save_pretrained(folder)
    assert "gives '<|done|>' the id 262, but the embedding has only 262 rows" in refusal(folder, texts=Texts())


def test_tokens_that_only_the_tokenizer_s_configuration_adds_are_written(tmp_path: Path) -> None:
    folder = model(tmp_path / "model", configured("llama"))
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "unk_token": "<|unknown|>"}))
    number = AutoTokenizer.from_pretrained(folder).unk_token_id
    out = export(folder, "gguf", tmp_path / "out", Texts())
    assert field(out, "tokenizer.ggml.unknown_token_id") == number
    assert field(out, "tokenizer.ggml.tokens")[number] == "<|unknown|>"
    assert field(out, "tokenizer.ggml.token_type")[number] == gguf.TokenType.CONTROL


def test_every_chat_template_is_written(tmp_path: Path) -> None:
    folder = model(tmp_path / "model", configured("llama"))
    templates = {"default": "{{ messages[0].content }}", "tool_use": "{{ messages[1].content }}"}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = templates
    tokenizer.save_pretrained(folder)
    out = export(folder, "gguf", tmp_path / "out", Texts())
    assert field(out, "tokenizer.chat_template") == templates["default"]
    assert field(out, "tokenizer.chat_template.tool_use") == templates["tool_use"]


COMMANDS = """
import json, sys
from fedgrove.cli import main

for command in json.loads(sys.argv[1]):
    sys.argv = ["fedgrove", *command]
    try:
        main()
    except SystemExit as end:
        assert not end.code, end.code
    print("END", file=sys.stderr)
from huggingface_hub.utils import are_progress_bars_disabled
assert are_progress_bars_disabled()
"""


def test_no_library_shows_a_bar_of_its_own(tmp_path: Path) -> None:
    folder = str(model(tmp_path / "model", configured("llama", intermediate_size=128)))
    kinds = [["gguf"], ["gguf", "--quiet"]]
    measure = ["--data", str(TEXT), "--length", "48", "--windows", "1"]
    commands = [["export", folder, "--out", f"{folder}-{'-'.join(kind)}", *measure, "--to", *kind] for kind in kinds]
    done = subprocess.run([sys.executable, "-c", COMMANDS, json.dumps(commands)], capture_output=True, text=True, check=True)
    assert "it/s" not in done.stderr
    assert done.stderr.split("END\n")[1:] == [""] * len(kinds)


FORMS = {"hf": "torch", "packed": "torch", "gguf": "gguf", "onnx": "onnxruntime", "int8": "bitsandbytes", "nf4": "bitsandbytes"}
BESIDES = {
    "generation_config.json": json.dumps({"do_sample": False, "temperature": 0.6, "eos_token_id": [0, 5]}),
    "chat_template.jinja": "{{ messages[0].content }}",
    "special_tokens_map.json": json.dumps({"bos_token": END}),
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two files without an index, with small files that not every model has."""
    folder = model(tmp_path_factory.mktemp("shards") / "model", configured("llama", intermediate_size=128))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for number, names in enumerate((list(tensors)[::2], list(tensors)[1::2]), 1):
        part = {name: tensors[name] for name in names}
        save_file(part, folder / f"model-0000{number}-of-00002.safetensors", metadata={"format": "pt"})
    for name, text in BESIDES.items():
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("form", sorted(FORMS.keys() - {"onnx"}))
def test_shards_without_an_index_are_exported_with_what_belongs_to_the_model(tmp_path: Path, shards: Path, form: str) -> None:
    pytest.importorskip(FORMS[form])
    before = {file.name: file.read_bytes() for file in shards.iterdir()}
    out = export(shards, form, tmp_path / "out", TEXTS)
    got, wanted = measured(out)
    assert form == "nf4" or got == pytest.approx(wanted, rel=0.2 if form == "int8" else 0.01)
    assert {file.name: file.read_bytes() for file in shards.iterdir()} == before
    assert str(shards).encode() not in b"".join(file.read_bytes() for file in out.iterdir() if file.suffix == ".json")
    if form == "packed":
        out = export(out, "hf", tmp_path / "back", Texts())
    if form != "gguf":
        for name in (*BESIDES, *TOKENIZER):
            assert (out / name).read_bytes() == before[name], name


def test_a_graph_is_made_of_the_tensors_of_shards_without_an_index(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    given: list[nn.Module] = []

    class Program:
        def save(self, file: Path) -> None:
            file.write_bytes(b"")

    monkeypatch.setattr(torch.onnx, "export", lambda model, *args, **kwargs: given.append(model) or Program())
    out = export(shards, "onnx", tmp_path / "out", Texts())
    checkpoint = Checkpoint(shards)
    parameters = dict(given[0].get_submodule("model").named_parameters())
    assert parameters.keys() == set(checkpoint.names())
    assert all(torch.equal(parameter, checkpoint.read(name)) for name, parameter in parameters.items())
    for name in (*BESIDES, *TOKENIZER):
        assert (out / name).read_bytes() == (shards / name).read_bytes(), name


def test_positions_that_grow_with_the_text_are_no_traceback_in_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    folder = model(tmp_path / "model", configured("llama", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}))
    said = complaint("export", folder, "--to", "onnx", "--out", tmp_path / "out", "--no-measure")
    assert "positions of type 'dynamic'" in said


@pytest.mark.parametrize("form", sorted(FORMS.keys() - {"hf", "packed"}))
def test_a_packed_model_is_unpacked_first(tmp_path: Path, form: str) -> None:
    packed = export(model(tmp_path / "model", configured("llama")), "packed", tmp_path / "packed", Texts())
    assert "is packed; unpack it with --to hf" in refusal(packed, form, Texts())


def test_what_torch_s_exporter_cannot_write_is_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise TypeError("some operator\nis not known")

    monkeypatch.setattr(torch.onnx, "export", fail)
    said = refusal(model(tmp_path / "model", configured("llama")), "onnx", Texts())
    assert "torch's exporter cannot write this llama model (TypeError)" in said


def test_a_text_that_cannot_be_read_is_found_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    monkeypatch.setattr(plugins.load("exports", "hf"), "write", lambda source, out: written.append(out))
    folder = model(tmp_path / "model", configured("llama"))
    for texts in (Texts((("held", tmp_path / "lost.txt", None),)), Texts((("held", TEXT, None), ("b", tmp_path / "b", None)))):
        refusal(folder, "hf", texts)
    assert not written
