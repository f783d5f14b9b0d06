"""Checkpoints on disk: what is written is what was read, plain transformers loads it, and damage is named in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fedgrove.errors import FedgroveError
from fedgrove.export import export, folder_bytes
from fedgrove.exports import packed as packing
from fedgrove.exports.packed import FILES, LAYOUT
from fedgrove.models import plain
from fedgrove.models.files import INDEX, find_model
from fedgrove.models.masks import Target
from fedgrove.models.stream import Checkpoint
from fedgrove.models.tensor_files import SAFETENSORS_DTYPES, save_tensors, write_safetensors
from fedgrove.stages.prune.pruners import magnitude

SHARD = "model-00002-of-"


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found.update((name, opened.get_tensor(name)) for name in opened.keys())  # noqa: SIM118 - no mapping
    return found


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def complaint(act: Callable[[], object]) -> str:
    with pytest.raises(FedgroveError) as fault:
        act()
    assert "\n" not in str(fault.value)
    return str(fault.value)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A small random Llama in several files, with an index, untied, in bfloat16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32,
    )  # fmt: skip
    folder = tmp_path / "sharded"
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder, max_shard_size="16KB")
    assert (folder / INDEX).is_file()
    assert len(list(folder.glob("*.safetensors"))) > 2
    (folder / "README.md").write_text("A card.\n")
    (folder / "empty.txt").write_bytes(b"")
    return folder


def test_what_is_written_is_what_was_read(grove: Path, sharded: Path, tmp_path: Path) -> None:
    for source in (grove, sharded):
        out = tmp_path / f"copy-of-{source.name}"
        Checkpoint(source).write(out)
        assert {file.name for file in out.iterdir()} == {file.name for file in source.iterdir()}
        assert_same(tensors_of(out), tensors_of(source))
        for name, content in files_of(source).items():
            if not name.endswith((".safetensors", INDEX)):
                assert files_of(out)[name] == content, name
        again = tmp_path / f"copy-of-the-copy-of-{source.name}"
        Checkpoint(out).write(again)
        assert files_of(again) == files_of(out)
        assert not out.with_name(out.name + ".partial").exists()
    old, new = (json.loads((folder / INDEX).read_text()) for folder in (sharded, tmp_path / "copy-of-sharded"))
    assert new["weight_map"] == old["weight_map"]
    assert new["metadata"]["total_size"] == old["metadata"]["total_size"] == Checkpoint(sharded).num_bytes()


def test_plain_transformers_loads_what_is_written(grove: Path, sharded: Path, tmp_path: Path) -> None:
    for source in (grove, sharded):
        Checkpoint(source).write(tmp_path / f"copy-of-{source.name}")
        models = [AutoModelForCausalLM.from_pretrained(path) for path in (source, tmp_path / f"copy-of-{source.name}")]
        ids = torch.arange(16)[None]
        with torch.no_grad():
            old, new = (model(input_ids=ids).logits for model in models)
        assert torch.isfinite(new).all()
        assert torch.equal(old, new)


def test_another_dtype_is_read_and_written(sharded: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(sharded, torch.float32)
    name = checkpoint.names()[0]
    assert checkpoint.spec(name) == (checkpoint.read(name).shape, torch.float32)
    checkpoint.write(tmp_path / "out")
    assert_same(tensors_of(tmp_path / "out"), {name: t.float() for name, t in tensors_of(sharded).items()})
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.float32
    assert Checkpoint(tmp_path / "out").num_bytes() == 2 * Checkpoint(sharded).num_bytes()


def test_the_newest_overlay_wins_and_the_rest_shines_through(sharded: Path, tmp_path: Path) -> None:
    name, other = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    base = Checkpoint(sharded)
    values = {}
    for i in (1, 2):
        values[i] = torch.full((48, 32), float(i), dtype=torch.bfloat16)
        save_tensors(
            {name: values[i], **({other: values[i].clone()} if i == 1 else {})}, tmp_path / f"{i}" / "block.safetensors"
        )
    piled = base.over(tmp_path / "1").over(tmp_path / "2")
    assert torch.equal(piled.read(name), values[2])
    assert torch.equal(piled.read(other), values[1])
    assert torch.equal(base.over(tmp_path / "2", tmp_path / "1").read(name), values[1])
    assert torch.equal(base.read(name), tensors_of(sharded)[name])
    assert piled.over(tmp_path / "1").overlays == piled.overlays  # what is there keeps its place
    piled.write(tmp_path / "out")
    assert_same(tensors_of(tmp_path / "out"), {**tensors_of(sharded), name: values[2], other: values[1]})


def test_an_overlay_that_was_written_over_is_read_anew(sharded: Path, tmp_path: Path) -> None:
    name = "model.norm.weight"
    for shape in ((32,), (16,)):
        save_tensors({name: torch.ones(shape)}, tmp_path / "over" / "block.safetensors")
        assert Checkpoint(sharded).over(tmp_path / "over").spec(name)[0] == torch.Size(shape)


def test_a_file_of_every_dtype_is_what_safetensors_reads(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    tensors = {"empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5), "odd": torch.arange(7, dtype=torch.uint8)}
    for dtype in SAFETENSORS_DTYPES:
        tensors[str(dtype)] = (torch.randn(3, 5, generator=random) * 10).to(dtype)
    tensors["turned"] = torch.randn(4, 6, generator=random).T
    file = tmp_path / "x.safetensors"
    write_safetensors(file, {name: (t.shape, t.dtype) for name, t in tensors.items()}, tensors.values())
    assert_same(tensors_of(tmp_path), tensors)
    with safe_open(file, framework="pt") as opened:
        assert list(opened.offset_keys()) == list(tensors)


def test_a_fingerprint_tells_models_apart(grove: Path, sharded: Path, tmp_path: Path) -> None:
    shutil.copytree(sharded, tmp_path / "copy")
    assert Checkpoint(tmp_path / "copy").fingerprint() == Checkpoint(sharded).fingerprint()
    assert Checkpoint(grove).fingerprint() != Checkpoint(sharded).fingerprint()
    (tmp_path / "copy" / "config.json").write_text((sharded / "config.json").read_text() + "\n")
    assert Checkpoint(tmp_path / "copy").fingerprint() != Checkpoint(sharded).fingerprint()


def test_a_directory_that_is_no_model_is_refused(grove: Path, sharded: Path, tmp_path: Path) -> None:
    assert "config.json" in complaint(lambda: Checkpoint(tmp_path / "nowhere"))
    (tmp_path / "pickled").mkdir()
    shutil.copy(grove / "config.json", tmp_path / "pickled")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'echo'\ntR.")
    said = complaint(lambda: Checkpoint(tmp_path / "pickled"))
    assert "no .safetensors file" in said
    assert "save_pretrained" in said
    shutil.copytree(grove, tmp_path / "bad-config")
    (tmp_path / "bad-config" / "config.json").write_text('{"model_type": ')
    assert "config.json is not understood" in complaint(lambda: Checkpoint(tmp_path / "bad-config").config)
    (tmp_path / "bad-config" / "config.json").write_text('{"model_type": "no-such-thing"}')
    assert "config.json is not understood" in complaint(lambda: Checkpoint(tmp_path / "bad-config").config)
    assert "no tokenizer" in complaint(Checkpoint(sharded).tokenizer)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    victim = next(sharded.glob(f"{SHARD}*"))
    victim.unlink()
    said = complaint(lambda: Checkpoint(sharded))
    assert victim.name in said
    assert "copy it there" in said


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', "{}", '{"weight_map": {"x": 7}}', "\xff"])
def test_a_damaged_index_is_named(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_text(text, encoding="latin-1")
    assert INDEX in complaint(lambda: Checkpoint(sharded))


@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_a_damaged_file_is_named(sharded: Path, damage: str) -> None:
    victim = next(sharded.glob(f"{SHARD}*"))
    content = victim.read_bytes()
    victim.write_bytes({"cut": content[:-100], "empty": b"", "text": b"version https://git-lfs.github.com/spec/v1\n"}[damage])
    said = complaint(lambda: Checkpoint(sharded))
    assert str(victim) in said
    assert "copy it again" in said


def test_a_dtype_that_cannot_be_pruned_is_named(sharded: Path) -> None:
    victim = next(sharded.glob(f"{SHARD}*"))
    tensors = dict(tensors_of(sharded))
    with safe_open(victim, framework="pt") as opened:
        name = next(iter(opened.keys()))
    save_file({name: tensors[name].float().to(torch.float8_e4m3fn)}, victim)
    said = complaint(lambda: Checkpoint(sharded))
    assert name in said
    assert "F8_E4M3" in said


def test_nothing_is_written_over_and_nothing_half_written_stays(
    grove: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert "exists already" in complaint(lambda: Checkpoint(grove).write(out))
    out.rmdir()

    def full(path: Path, *rest: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(plain, "write_safetensors", full)
        with pytest.raises(OSError, match="No space left"):
            Checkpoint(grove).write(out)
    assert not out.exists()
    Checkpoint(grove).write(out)  # what the first try left does not disturb the second
    assert_same(tensors_of(out), tensors_of(grove))


def test_a_model_that_is_neither_here_nor_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for path in ("nobody/has-this-model", "no such/name/at all", "/no/such/folder"):
        assert complaint(lambda path=path: find_model(path)).startswith(f"model.path: {path} is neither")
    assert find_model(str(tmp_path)) == tmp_path


@pytest.fixture
def half(grove: Path, tmp_path: Path) -> Path:
    """The shipped model with half of the weights of its linears gone."""
    tensors = tensors_of(grove)
    overlay = {}
    for name, tensor in tensors.items():
        if "_proj" in name:
            assert tensor.dim() == 2
            overlay[name] = magnitude.prune(tensor.float(), None, Target(0.5))[0].bfloat16()  # type: ignore[arg-type]
    save_tensors(overlay, tmp_path / "over" / "block.safetensors")
    Checkpoint(grove).over(tmp_path / "over").write(tmp_path / "half")
    return tmp_path / "half"


def test_a_pruned_model_is_packed_to_less_than_half_and_comes_back_bit_for_bit(half: Path, tmp_path: Path) -> None:
    packed = export(half, "packed", tmp_path / "packed")
    linears = {name: t for name, t in tensors_of(half).items() if "_proj" in name}
    dense = sum(t.numel() * 2 for t in linears.values())
    rest = Checkpoint(half).num_bytes() - dense
    assert folder_bytes(packed) < 0.40 * dense + rest + sum(file.stat().st_size for file in half.glob("*.json"))
    assert folder_bytes(packed) <= 0.45 * folder_bytes(half)  # with its embeddings, which nobody prunes
    assert not list(packed.glob("*.safetensors"))
    assert files_of(export(packed, "hf", tmp_path / "back")) == files_of(half)
    with torch.no_grad():
        assert torch.isfinite(AutoModelForCausalLM.from_pretrained(tmp_path / "back")(torch.arange(9)[None]).logits).all()


@pytest.mark.parametrize("part", [1, 10_000, 2**40])
def test_a_model_in_several_files_is_packed_in_several_parts_and_comes_back(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    monkeypatch.setattr(packing, "PART", part)
    Checkpoint(sharded).write(tmp_path / "model")
    packed = export(tmp_path / "model", "packed", tmp_path / "packed")
    parts = len(list(packed.glob("model-*.packed")))
    assert parts == {1: len(Checkpoint(sharded).names()), 2**40: 1}.get(part, parts)
    assert parts > 1 or part == 2**40
    assert files_of(export(packed, "hf", tmp_path / "back")) == files_of(tmp_path / "model")


def test_a_plain_model_is_exported_as_it_is(half: Path, tmp_path: Path) -> None:
    assert files_of(export(half, "hf", tmp_path / "again")) == files_of(half)


def test_mistakes_in_an_export_are_named(half: Path, grove: Path, tmp_path: Path) -> None:
    packed = export(half, "packed", tmp_path / "packed")
    assert "exists already" in complaint(lambda: export(half, "hf", packed))
    assert "packed already" in complaint(lambda: export(packed, "packed", tmp_path / "twice"))
    assert "config.json" in complaint(lambda: export(tmp_path / "over", "hf", tmp_path / "out"))

    def spoiled(name: str, content: bytes | None) -> str:
        copy = tmp_path / "spoiled"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(packed, copy)
        if content is None:
            (copy / name).unlink()
        else:
            (copy / name).write_bytes(content)
        said = complaint(lambda: export(copy, "hf", tmp_path / "out"))
        assert not (tmp_path / "out").exists()
        assert str(copy / name) in said
        return said

    part = "model-00001.packed"
    whole = (packed / part).read_bytes()
    flipped = bytearray(whole)
    flipped[len(flipped) // 2] ^= 1
    for content in (None, b"", whole[:-1], bytes(flipped)):
        assert "copy it again" in spoiled(part, content)
    for content in (None, b"", b"\0" * 64):
        spoiled(FILES, content)
    layout = json.loads((packed / LAYOUT).read_text())
    for text in ("", "{", "[]", "{}", json.dumps({**layout, "parts": [["x"]]}), json.dumps({**layout, "shards": 3})):
        assert "copy it again" in spoiled(LAYOUT, text.encode())
    assert "format" in spoiled(LAYOUT, json.dumps({**layout, "format": 99}).encode())
