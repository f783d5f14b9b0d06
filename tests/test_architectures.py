"""Sixteen architectures, tiny and random: each runs block by block as in plain transformers, is pruned and loads again."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tomli_w
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma2Config,
    Glm4MoeConfig,
    GPT2Config,
    GPT2Model,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.pytorch_utils import Conv1D
from typer.testing import CliRunner

from fedgrove.cli import app
from fedgrove.data.windows import calibration_windows
from fedgrove.errors import FedgroveError
from fedgrove.input_statistics.statistics import InputStatistics
from fedgrove.models.blocks import Decoder, as_matrix
from fedgrove.models.experts import expert_of, unfuse
from fedgrove.models.linears import find_blocks, linears
from fedgrove.models.masks import Target
from fedgrove.models.stream import Checkpoint
from fedgrove.stages.prune.calibration_pass import gather
from fedgrove.stages.prune.pruners import sparsegpt
from small import TOKENIZER, write_once

LENGTH = 24  # longer than the sliding windows
COMMON = {"vocab_size": 4096, "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 64}
LLAMA = {**COMMON, "num_hidden_layers": 3, "num_key_value_heads": 2, "intermediate_size": 48}
EXPERTS = {"moe_intermediate_size": 24, "num_experts": 5, "num_experts_per_tok": 2}
ROUTED = {"moe_intermediate_size": 24, "n_routed_experts": 5, "n_shared_experts": 1, "num_experts_per_tok": 2,
          "first_k_dense_replace": 0}  # fmt: skip
DEEPSEEK = {**LLAMA, **ROUTED, "n_routed_experts": 4, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16,
            "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}  # fmt: skip
MIXED = ["full_attention", "sliding_attention", "sliding_attention"]


class Architecture(NamedTuple):
    config: Callable[[], PreTrainedConfig]
    num_linears: int  # in a block
    num_statistics: int  # different inputs in a block
    dtype: torch.dtype
    pruner: str = "sparsegpt"
    target: tuple[str, Any] = ("sparsity", 0.5)
    sharded: bool = False


ARCHITECTURES = {
    "llama": Architecture(lambda: LlamaConfig(**LLAMA), 7, 4, torch.bfloat16, sharded=True),
    "mistral": Architecture(lambda: MistralConfig(**LLAMA, sliding_window=8), 7, 4, torch.float16),
    "qwen2": Architecture(
        lambda: Qwen2Config(**LLAMA, tie_word_embeddings=True), 7, 4, torch.bfloat16, target=("pattern", "2:4")
    ),
    "qwen3": Architecture(
        lambda: Qwen3Config(**LLAMA, head_dim=16, use_sliding_window=True, sliding_window=8, layer_types=MIXED),
        *(7, 4, torch.float32),
    ),
    "gemma2": Architecture(
        lambda: Gemma2Config(**LLAMA, head_dim=16, sliding_window=8, query_pre_attn_scalar=16), 7, 4, torch.bfloat16, "wanda"
    ),
    "opt": Architecture(
        lambda: OPTConfig(**COMMON, num_hidden_layers=3, ffn_dim=48, word_embed_proj_dim=16), 6, 4, torch.float16, sharded=True
    ),
    "gpt2": Architecture(
        lambda: GPT2Config(vocab_size=4096, n_positions=64, n_embd=32, n_layer=3, n_head=4), 4, 4, torch.float32,
        target=("pattern", "4:8"),
    ),
    "gpt_neox": Architecture(
        lambda: GPTNeoXConfig(**COMMON, num_hidden_layers=3, intermediate_size=48), 4, 4, torch.float16, "magnitude",
        ("sparsity", 0.7),
    ),
    "phi": Architecture(
        lambda: PhiConfig(**COMMON, num_hidden_layers=3, intermediate_size=48), 6, 3, torch.bfloat16, target=("sparsity", 0.7)
    ),
    "mixtral": Architecture(
        lambda: MixtralConfig(**LLAMA, num_local_experts=4, num_experts_per_tok=2), 16, 10, torch.float32, sharded=True
    ),
    "qwen2_moe": Architecture(
        lambda: Qwen2MoeConfig(**LLAMA, **EXPERTS, shared_expert_intermediate_size=40), 22, 14, torch.float16,
        target=("pattern", "2:4"),
    ),
    "qwen3_moe": Architecture(
        lambda: Qwen3MoeConfig(**LLAMA, **EXPERTS, head_dim=16, norm_topk_prob=True), 19, 12, torch.bfloat16, "wanda"
    ),
    "olmoe": Architecture(
        lambda: OlmoeConfig(**{**LLAMA, "intermediate_size": 24}, num_experts=5, num_experts_per_tok=2),
        *(19, 12, torch.float16), target=("sparsity", 0.7),
    ),
    "deepseek_v2": Architecture(lambda: DeepseekV2Config(**DEEPSEEK), 20, 14, torch.bfloat16, "magnitude"),
    "deepseek_v3": Architecture(
        lambda: DeepseekV3Config(**DEEPSEEK, n_group=2, topk_group=1), 20, 14, torch.bfloat16, "wanda", ("pattern", "2:4")
    ),
    "glm4_moe": Architecture(
        lambda: Glm4MoeConfig(**LLAMA, **ROUTED, head_dim=16), 22, 14, torch.bfloat16, "wanda"
    ),
}  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def save(name: str, folder: Path, grove: Path, dtype: torch.dtype, sharded: bool = False) -> Path:
    """A random model on disk in which no tensor is what an architecture would fill in by itself."""

    def write(target: Path) -> None:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(ARCHITECTURES[name].config())
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        model.to(dtype).save_pretrained(target, max_shard_size="100KB" if sharded else "1GB")
        for file in TOKENIZER:
            (target / file).write_bytes((grove / file).read_bytes())

    write_once(("architecture", name, dtype, sharded), folder, write)
    assert (folder / "model.safetensors.index.json").is_file() == sharded
    return folder


def plain(folder: Path) -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found.update((name, opened.get_tensor(name)) for name in opened.keys())  # noqa: SIM118 - no mapping
    return found


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def some_ids(rows: int = 1) -> Tensor:
    return torch.randint(0, 4096, (rows, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_block_by_block_gives_what_plain_transformers_gives(name: str, dtype: torch.dtype, grove: Path, tmp_path: Path) -> None:
    decoder = Decoder(Checkpoint(save(name, tmp_path / "model", grove, dtype)))
    ids = some_ids()
    hidden, calls = decoder.embed(ids)
    for index in range(len(decoder)):
        with decoder.loaded(index) as block:
            hidden = decoder.run(block, hidden, calls[index])
    with torch.no_grad():
        expected = plain(tmp_path / "model")(input_ids=ids).logits
    got = decoder.head(hidden[0])
    assert expected.std() > 0.1
    assert (got - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_linear_gets_the_statistics_of_its_own_inputs_and_no_product_is_done_twice(
    name: str, grove: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(name, tmp_path / "model", grove, torch.float32)
    decoder = Decoder(Checkpoint(folder))
    ids = some_ids(3)
    model = plain(folder)
    expected: dict[str, Tensor] = {}
    tokens: Counter[str] = Counter()

    def note(linear: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1]).double()
            tokens[linear] += len(x)
            expected[linear] = expected.get(linear, torch.zeros(x.shape[1], x.shape[1]).double()) + x.T @ x

        return hook

    def note_experts(experts: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            hidden, chosen = args[:2]
            for index, gate_up in enumerate(module.gate_up_proj):
                x = hidden[(chosen == index).any(1)]
                gate, up = (x @ gate_up.T).chunk(2, 1)
                reads = {"gate_proj": x, "up_proj": x, "down_proj": module.act_fn(gate) * up}
                for leaf, read in reads.items():
                    note(f"{experts}.{index}.{leaf}")(module, (read,))

        return hook

    for linear, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            module.register_forward_pre_hook(note(linear))
        elif hasattr(module, "gate_up_proj"):
            module.register_forward_pre_hook(note_experts(linear))
    with torch.no_grad():
        for row in ids:
            model(input_ids=row[None])

    products = []
    add = InputStatistics.add
    monkeypatch.setattr(InputStatistics, "add", lambda self, x: (products.append(id(self)), add(self, x)))
    states = [decoder.embed(row[None])[0] for row in ids]
    calls = decoder.embed(ids[:1])[1]
    for index in range(len(decoder)):
        products.clear()
        with decoder.loaded(index) as block:
            inputs = gather(decoder, block, states, calls[index], "gram")
            states = [decoder.run(block, hidden, calls[index]) for hidden in states]
        assert len(inputs) == ARCHITECTURES[name].num_linears
        assert len(set(products)) == ARCHITECTURES[name].num_statistics
        assert len(products) == ARCHITECTURES[name].num_statistics * len(ids)
        for linear, statistic in inputs.items():
            gram = expected[f"{decoder.prefix}.{index}.{linear}"]
            assert statistic.tokens == tokens[f"{decoder.prefix}.{index}.{linear}"]
            assert expert_of(linear) or statistic.tokens == ids.numel()
            assert (statistic.gram - gram).abs().max() <= 1e-5 * gram.abs().max(), linear


def run_job(model: Path, folder: Path, clients: list[dict[str, Any]], **stage: Any) -> Path:
    """Prunes a model; the run folder."""
    job = {
        "name": "tiny",
        "model": {"path": str(model)},
        "clients": clients,
        "stages": [{"kind": "prune", "samples": 4, "length": LENGTH, **stage}],
    }
    (folder / "job.toml").write_text(tomli_w.dumps(job))
    result = CliRunner().invoke(app, ["run", str(folder / "job.toml"), "--out", str(folder / "run"), "--quiet"])
    assert result.exit_code == 0, result.output
    return folder / "run"


def two(demo: Path) -> list[dict[str, Any]]:
    """Two unequal clients."""
    return [
        {"name": "a", "data": str(demo / "texts" / "theatre-heldout.txt")},
        {"name": "b", "data": str(demo / "texts" / "software-heldout.txt"), "samples": 6},
    ]


def check_pruned(before: Path, after: Path, num_linears: int, sparsity: float, pattern: str | None = None) -> None:
    """Every linear of every block is exactly as sparse as it should be, and no other bit has changed."""
    old, new = tensors_of(before), tensors_of(after)
    assert list(old) == list(new)
    pruned = 0
    for name, weight in new.items():
        if re.search(r"(layers|h)\.\d+\..*weight$", name) and weight.dim() == 2 and not re.search(r"(\.|_)gate\.", name):
            pruned += 1
            zero = weight == 0
            assert int(zero.sum()) == int(sparsity * weight.numel() + 0.5), name
            assert not torch.signbit(weight[zero]).any(), name
            if pattern:
                n, m = map(int, pattern.split(":"))
                by_input = zero.T if ".attn.c_" in name or ".mlp.c_" in name else zero  # GPT-2 keeps (in, out)
                assert (by_input.reshape(-1, m).sum(1) == m - n).all(), name
            assert not same_bits(weight, old[name]), name
            assert weight.dtype == old[name].dtype
        else:
            assert same_bits(weight, old[name]), name
    assert pruned == 3 * num_linears


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_two_clients_prune_it_and_plain_transformers_loads_the_result(
    name: str, demo: Path, grove: Path, tmp_path: Path
) -> None:
    is_ = ARCHITECTURES[name]
    source = save(name, tmp_path / "model", grove, is_.dtype, is_.sharded)
    run = run_job(source, tmp_path, two(demo), pruner=is_.pruner, **dict([is_.target]))
    sparsity, pattern = (0.5, is_.target[1]) if is_.target[0] == "pattern" else (is_.target[1], None)
    check_pruned(source, run / "model", is_.num_linears, sparsity, pattern)
    model = AutoModelForCausalLM.from_pretrained(run / "model", dtype="auto").eval()
    assert model.dtype == is_.dtype
    with torch.no_grad():
        logits = model(input_ids=some_ids()).logits
    assert torch.isfinite(logits).all()
    assert {file.name for file in source.iterdir()} <= {file.name for file in (run / "model").iterdir()}


@pytest.mark.parametrize("walk", ["sequential", "dense"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "phi"])
def test_a_block_at_a_time_gives_the_bits_of_a_model_that_is_whole_in_memory(
    name: str, walk: str, demo: Path, grove: Path, tmp_path: Path
) -> None:
    """One client alone, beside plain transformers with hooks: the whole model runs for every block's statistics."""
    is_ = ARCHITECTURES[name]
    source = save(name, tmp_path / "model", grove, is_.dtype, is_.sharded)
    text = demo / "texts" / "theatre-heldout.txt"
    run = run_job(source, tmp_path, [{"name": "a", "data": str(text)}], pruner="sparsegpt", sparsity=0.6, source=walk)
    got = tensors_of(run / "model")

    ids = calibration_windows([text], None, Checkpoint(source).tokenizer(), 4, LENGTH, "0/0/a")
    whole = plain(source)
    prefix, blocks = find_blocks(whole)
    for index, block in enumerate(blocks):
        inputs = {linear: InputStatistics("gram") for linear in linears(block)}
        hooks = [
            module.register_forward_pre_hook(lambda module, args, sums=inputs[linear]: sums.add(args[0]))
            for linear, module in linears(block).items()
        ]
        with torch.no_grad():
            whole(input_ids=ids)
            for hook in hooks:
                hook.remove()
            for linear, module in linears(block).items():
                weight = as_matrix(module, module.weight).float().clone().contiguous()
                after = as_matrix(module, sparsegpt.prune(weight, inputs[linear], Target(0.6))[0].to(is_.dtype))
                if walk == "sequential":
                    module.weight.copy_(after)
                assert same_bits(got[f"{prefix}.{index}.{linear}.weight"], after), (index, linear)


def test_a_model_that_was_saved_without_its_head_is_pruned_too(demo: Path, grove: Path, tmp_path: Path) -> None:
    """Its tensors lack the prefix ``transformer.``; the head is the embedding."""
    save("gpt2", tmp_path / "whole", grove, torch.float32)
    base = GPT2Model.from_pretrained(tmp_path / "whole")
    base.save_pretrained(tmp_path / "model")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / file).write_bytes((grove / file).read_bytes())
    assert "h.0.attn.c_attn.weight" in tensors_of(tmp_path / "model")
    run = run_job(tmp_path / "model", tmp_path, two(demo), pruner="wanda", sparsity=0.5)
    check_pruned(tmp_path / "model", run / "model", 4, 0.5)
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    assert torch.isfinite(model(input_ids=some_ids()).logits).all()


def test_another_dtype_is_written_when_the_job_asks_for_it(demo: Path, grove: Path, tmp_path: Path) -> None:
    source = save("llama", tmp_path / "model", grove, torch.float32)
    job = tmp_path / "job.toml"
    run_job(source, tmp_path, two(demo), pruner="wanda", sparsity=0.5)
    out = tmp_path / "half"
    result = CliRunner().invoke(app, ["run", str(job), "--out", str(out), "--quiet", "--set", "model.dtype=float16"])
    assert result.exit_code == 0, result.output
    assert {tensor.dtype for tensor in tensors_of(out / "model").values()} == {torch.float16}
    assert AutoModelForCausalLM.from_pretrained(out / "model", dtype="auto").dtype == torch.float16


def test_leftovers_of_older_releases_in_a_checkpoint_are_not_believed(grove: Path, tmp_path: Path) -> None:
    """Checkpoints of the hub hold causal masks and rotary frequencies that today's models compute themselves."""
    for name, leftover in (("gpt2", "transformer.h.0.attn.bias"), ("llama", "model.rotary_emb.inv_freq")):
        folder = save(name, tmp_path / name, grove, torch.float32)
        ids = some_ids()
        with torch.no_grad():
            expected = plain(folder)(input_ids=ids).logits
        save_file({**tensors_of(folder), leftover: torch.zeros(1, 1, 64, 64)}, folder / "model.safetensors")
        decoder = Decoder(Checkpoint(folder))
        hidden, calls = decoder.embed(ids)
        for index in range(len(decoder)):
            with decoder.loaded(index) as block:
                hidden = decoder.run(block, hidden, calls[index])
        assert (decoder.head(hidden[0]) - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_head_embeddings_norms_and_biases_are_no_linears_of_a_block(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(ARCHITECTURES[name].config())
    unfuse(model, model.config.model_type)
    prefix, blocks = find_blocks(model)
    assert len(blocks) == 3
    assert prefix in ("model.layers", "model.decoder.layers", "transformer.h", "gpt_neox.layers")
    for block in blocks:
        assert len(linears(block)) == ARCHITECTURES[name].num_linears
        assert model.get_output_embeddings() not in linears(block).values()


def test_a_model_without_decoder_blocks_is_refused() -> None:
    with pytest.raises(FedgroveError, match="no decoder blocks found in Sequential"):
        find_blocks(nn.Sequential(nn.Linear(4, 4)))


def test_a_block_lets_its_weights_go(grove: Path) -> None:
    decoder = Decoder(Checkpoint(grove))
    with decoder.loaded(2) as block:
        assert all(parameter.device.type == "cpu" for parameter in block.parameters())
    assert all(parameter.device.type == "meta" for block in decoder.blocks for parameter in block.parameters())


def test_a_checkpoint_that_lacks_a_tensor_is_refused_by_name(grove: Path, tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model", grove, torch.float32)
    tensors = tensors_of(folder)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    decoder = Decoder(Checkpoint(folder))
    with pytest.raises(FedgroveError, match=r"lacks the tensor model\.layers\.1\.mlp\.up_proj\.weight"), decoder.loaded(1):
        pass
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.ones(3, 3)
    save_file(tensors, folder / "model.safetensors")
    decoder = Decoder(Checkpoint(folder))
    with pytest.raises(FedgroveError, match=r"has shape \[3, 3\], but config.json specifies \[48, 32\]"), decoder.loaded(1):
        pass
