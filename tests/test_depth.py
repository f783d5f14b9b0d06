"""The stage ``structured`` with ``depth``: whole blocks go, and what is left is a plain model without them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, Qwen2Config

from fedgrove.client.hidden_states import Calibration
from fedgrove.client.local_client import LocalClient
from fedgrove.client.windows import calibration_windows
from fedgrove.errors import FedgroveError
from fedgrove.job.load import load
from fedgrove.models.blocks import Decoder
from fedgrove.models.experts import TYPES
from fedgrove.models.preconditions import check_parameters
from fedgrove.models.stream import Checkpoint
from fedgrove.models.tensor_files import save_tensors
from fedgrove.models.width import FAMILIES
from fedgrove.rounds.disclosure import Disclosure
from fedgrove.run import local_clients, open_model
from fedgrove.stages.structured.choice import kept_blocks
from fedgrove.stages.structured.exchanges.blocks import ScoreBlocks, influence
from fedgrove.stages.structured.exchanges.scores import CODE
from small import (
    CLIENTS,
    LENGTH,
    TOKENIZER,
    Moment,
    Small,
    cli,
    complaint,
    killed,
    make_model,
    make_texts,
    measurements,
    process,
    save_random,
)
from test_architectures import LLAMA, plain, save, some_ids
from test_structured import config_of, told_by, weights

DEEP = {"kind": "structured", "depth": 0.4, "samples": 3, "length": LENGTH, "repair": False}
BOTH = {**DEEP, "channels": 0.25, "heads": 0.5}
STAGES = [DEEP]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """A federation with a model of five blocks."""
    small = Small(tmp_path_factory.mktemp("deep"))
    small.model = make_model(small.folder / "deep", num_hidden_layers=5)
    return small


def skip(block: nn.Module) -> None:
    """Lets a block return its input as it is, in the form in which it returns its output."""
    forward = block.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        out = forward(*args, **kwargs)
        return given if isinstance(out, Tensor) else (given, *out[1:])

    block.forward = watched  # type: ignore[method-assign]


# The model without blocks, in every architecture


@pytest.mark.parametrize("name", [*FAMILIES, *TYPES])
def test_the_model_is_plain_transformers_with_these_blocks_skipped_to_the_bit(name: str, tmp_path: Path, grove: Path) -> None:
    folder = save(name, tmp_path / "model", grove, torch.float32, sharded=name == "llama")
    strip(folder)
    whole, kept = plain(folder), (0, 2)
    decoder = Decoder(Checkpoint(folder))
    shorter = Checkpoint(folder).over(kept_blocks=kept)
    assert not check_parameters(Decoder(shorter))
    shorter.write(tmp_path / "shorter")
    smaller = plain(tmp_path / "shorter")
    skip(whole.get_submodule(f"{decoder.prefix}.1"))
    ids = some_ids()
    with torch.no_grad():
        logits = smaller(ids).logits
        assert torch.equal(logits, whole(ids).logits)
        cache = smaller(ids[:, :-1], use_cache=True).past_key_values  # as in generation, where blocks are known by number
        torch.testing.assert_close(smaller(ids[:, -1:], past_key_values=cache).logits, logits[:, -1:], atol=1e-4, rtol=1e-4)
    blocks = smaller.get_submodule(decoder.prefix)
    assert len(list(blocks.children())) == 2
    assert Checkpoint(tmp_path / "shorter").num_bytes() == shorter.num_bytes()


def strip(folder: Path) -> None:
    """Takes out of config.json what the architecture would fill in by a pattern."""
    config = json.loads((folder / "config.json").read_text())
    config.pop("layer_types", None)
    if "use_sliding_window" in config:
        config["max_window_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))


def test_lists_with_an_entry_for_each_block_lose_those_of_the_blocks_that_go(tmp_path: Path, grove: Path) -> None:
    """Qwen2 with a sliding window from its second block on: a pattern that would be another one after the cut."""
    folder = tmp_path / "model"
    save_random(folder, Qwen2Config(**LLAMA, use_sliding_window=True, sliding_window=8, max_window_layers=1))
    strip(folder)
    whole = Checkpoint(folder)
    kinds = whole.config.layer_types
    assert len(set(kinds)) == 2
    shorter = whole.over(kept_blocks=(1, 2))
    shorter.write(tmp_path / "shorter")
    assert json.loads((tmp_path / "shorter" / "config.json").read_text())["layer_types"] == kinds[1:]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "shorter").config.layer_types == kinds[1:]


def test_a_block_that_computes_something_else_at_another_place_may_not_go(small: Small, tmp_path: Path) -> None:
    save_random(
        small.folder / "inverse",
        GPT2Config(vocab_size=4096, n_positions=64, n_embd=32, n_layer=4, n_head=4, scale_attn_by_inverse_layer_idx=True),
    )
    for name in TOKENIZER:
        (small.folder / "inverse" / name).write_bytes((small.model / name).read_bytes())
    job = small.job("inverse", model={"path": str(small.folder / "inverse")}, stages=[DEEP], evaluate={})
    line = complaint("run", job, "--out", tmp_path / "run")
    assert "depth: a configuration of type gpt2 with scale_attn_by_inverse_layer_idx" in line
    assert "set it to 0" in line


# What is summed


def test_influence_is_what_plain_transformers_says(deep: Small, tmp_path: Path) -> None:
    job = load(deep.job("influence", stages=STAGES))
    client = local_clients(job, open_model(job.model), tmp_path)[0]
    calibration = Calibration(stage=0, samples=3, length=LENGTH, seed="0/0")
    ids = calibration_windows(client, 3, LENGTH, "0/0")
    with torch.no_grad():
        hidden = plain(deep.model)(ids, output_hidden_states=True)
        model = plain(deep.model)
        states = list(hidden.hidden_states[:-1])  # the last one is normed
        last: list[Tensor] = []
        model.model.norm.register_forward_pre_hook(lambda module, args: last.append(args[0]))  # type: ignore[union-attr,arg-type,operator]
        model(ids)
        states.append(last[0])
        for span in (1, 2):
            sums, reply = ScoreBlocks(stage=0, span=span, calibration=calibration).respond({}, client, "cpu")
            assert reply.model_dump() == {"tokens": 3 * LENGTH}
            expected = torch.stack([influence(a, b).sum() for a, b in zip(states, states[span:], strict=False)])
            found = CODE.decode(sums["change/influence"])
            assert found.shape == (6 - span,)
            assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("scores", "left", "protect", "kept"),
    [
        ([5.0, 1.0, 3.0, 2.0, 0.5], 3, True, (0, 2, 4)),  # the last block may not go
        ([5.0, 1.0, 3.0, 2.0, 0.5], 3, False, (0, 2, 3)),
        ([9.0, 3.0, 2.0, 1.0], 3, True, (0, 1, 4)),  # runs of two: that of the blocks 3 and 4 may not go
        ([9.0, 3.0, 2.0, 1.0], 3, False, (0, 1, 2)),
    ],
)
def test_what_matters_least_goes(scores: list[float], left: int, protect: bool, kept: tuple[int, ...]) -> None:
    assert kept_blocks(torch.tensor(scores), 5, left, protect) == kept


def test_hidden_states_that_are_not_finite_are_named(deep: Small, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    broken = load_file(deep.model / "model.safetensors")
    broken[name] = torch.full_like(broken[name], 3e38)
    folder = make_model(tmp_path / "model", num_hidden_layers=5)
    save_tensors(broken, folder / "model.safetensors")
    job = deep.job("infinite", model={"path": str(folder)}, stages=STAGES, evaluate={})
    assert "the hidden states of its text are not finite" in complaint("run", job, "--out", tmp_path / "run")


# A whole stage


def test_blocks_of_least_influence_go_and_the_rest_stays_to_the_bit(deep: Small) -> None:
    run = deep.undisturbed(stages=STAGES, evaluate={})
    told, config = told_by(run), config_of(run)
    assert (config["num_hidden_layers"], config["intermediate_size"]) == (3, 96), "a table that names depth cuts only that"
    kept = told["kept_blocks"]
    assert kept[0] == 0
    assert kept[-1] == 4
    inner = told["influence"][1:4]
    assert told["influence"][kept[1]] == max(inner)
    assert told["sums"] == {"blocks": {"clients": list(CLIENTS), "tokens": 3 * 3 * LENGTH}}
    before, after = load_file(deep.model / "model.safetensors"), weights(run)
    for new, old in enumerate(kept):
        for name in ("mlp.up_proj.weight", "self_attn.o_proj.weight", "input_layernorm.weight"):
            assert torch.equal(after[f"model.layers.{new}.{name}"], before[f"model.layers.{old}.{name}"])
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    assert sum(p.numel() for p in model.parameters()) == told["parameters"][1] < told["parameters"][0]
    assert told["bytes"][1] == 2 * told["parameters"][1]


def test_depth_and_width_in_one_job_are_each_what_they_are_alone(deep: Small) -> None:
    both, width = deep.undisturbed(stages=[BOTH]), deep.undisturbed(stages=[{**BOTH, "depth": 0.0}], evaluate={})
    kept = told_by(both)["kept_blocks"]
    assert kept == told_by(deep.undisturbed(stages=STAGES, evaluate={}))["kept_blocks"]
    assert told_by(both)["blocks"] == [told_by(width)["blocks"][block] for block in kept]
    narrow, one = weights(width), weights(both)
    for new, old in enumerate(kept):
        for name in ("mlp.up_proj.weight", "self_attn.o_proj.weight"):
            assert torch.equal(one[f"model.layers.{new}.{name}"], narrow[f"model.layers.{old}.{name}"])
    assert (config_of(both)["num_hidden_layers"], config_of(both)["intermediate_size"]) == (3, 72)
    assert AutoModelForCausalLM.from_pretrained(both / "model").config.num_hidden_layers == 3


@pytest.mark.parametrize("changes", [{}, {"contiguous": True}])
def test_it_does_not_matter_who_has_which_text(deep: Small, tmp_path: Path, changes: dict[str, Any]) -> None:
    stage = {**DEEP, **changes}
    job = load(deep.job("apart", stages=[stage]))
    clients = local_clients(job, open_model(job.model), tmp_path / "apart")
    everybody = LocalClient("all", tmp_path / "all", clients[0].model, None, clients[0].data, None, owners=tuple(clients))
    span = 2 if changes else 1
    requests = {
        n: ScoreBlocks(stage=0, span=span, calibration=Calibration(stage=0, samples=n, length=LENGTH, seed="0/0"))
        for n in (3, 9)
    }
    parts = [requests[3].respond({}, client, "cpu").tensors["change/influence"] for client in reversed(clients)]
    whole = requests[9].respond({}, everybody, "cpu").tensors["change/influence"]
    assert torch.equal(sum(parts[1:], parts[0]), whole)


def test_a_contiguous_cut_takes_blocks_that_follow_each_other(deep: Small) -> None:
    told = told_by(deep.undisturbed(stages=[{**DEEP, "contiguous": True}], evaluate={}))
    gone = sorted(set(range(5)) - set(told["kept_blocks"]))
    assert gone in ([1, 2], [2, 3])
    assert len(told["influence"]) == 4
    assert told["influence"][gone[0]] == min(told["influence"][1:3])


def test_secure_aggregation_changes_no_bit(deep: Small, tmp_path: Path) -> None:
    job = deep.job("secure", stages=[BOTH], privacy={"secure_aggregation": True})
    assert cli("run", job, "--out", tmp_path / "run")[0] == 0
    one, other = weights(tmp_path / "run"), weights(deep.undisturbed(stages=[BOTH]))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_a_killed_run_goes_on_to_the_same_bits(deep: Small, tmp_path: Path) -> None:
    job = deep.job("killed", stages=[BOTH])
    moment = Moment("os.rename", "*/stage-0/blocks.safetensors", "cut")
    killed("run", job, "--out", tmp_path / "run", "--quiet", moment=moment)
    assert cli("run", job, "--out", tmp_path / "run", "--resume")[0] == 0
    undisturbed = deep.undisturbed(stages=[BOTH])
    assert measurements(tmp_path / "run") == measurements(undisturbed)
    assert told_by(tmp_path / "run") == told_by(undisturbed)


def test_alone_is_what_a_client_would_have_made_by_itself(deep: Small, tmp_path: Path) -> None:
    run = deep.undisturbed(stages=[BOTH], evaluate__alone=True)
    only = {"clients": [{"name": "birch", "data": str(deep.texts["birch"])}]}
    assert cli("run", deep.job("birch", stages=[BOTH], **only), "--out", tmp_path / "run")[0] == 0
    alone = measurements(run)[0, None, "birch", "perplexity/held-0"]
    assert alone == measurements(tmp_path / "run")[0, None, None, "perplexity/held-0"]


@pytest.mark.parametrize("stage", [DEEP, BOTH])
def test_clients_tune_the_shorter_model(deep: Small, tmp_path: Path, stage: dict[str, Any]) -> None:
    tune = {
        "kind": "tune", "method": "lora", "rounds": 2, "steps": 3, "length": LENGTH, "batches": [4], "ranks": [4], "bits": [32],
        "learning_rate": 0.01, "personal": 0.2,
    }  # fmt: skip
    job = deep.job("tuned", stages=[stage, tune], **deep.one_word())
    assert cli("run", job, "--out", tmp_path / "run")[0] == 0
    found = measurements(tmp_path / "run")
    name = next(name for (s, r, c, name) in found if s == 1 and r is None and c is None and "perpl" in name)
    assert found[1, None, None, name] < 0.5 * found[0, None, None, name]
    adapters = list((tmp_path / "run").glob("clients/*/personal/stage-1/adapter_model.safetensors"))
    for file in [*adapters, *(tmp_path / "run" / "adapter").glob("*.safetensors")]:
        assert not any(".layers.3." in tensor or ".layers.4." in tensor for tensor in load_file(file))


@pytest.mark.parametrize("form", ["gguf", "packed"])
def test_the_shorter_model_can_be_exported(deep: Small, tmp_path: Path, form: str) -> None:
    """An exact export is measured, and removed if it reads back as another model."""
    pytest.importorskip({"gguf": "gguf", "packed": "torch"}[form])
    assert cli("export", deep.undisturbed(stages=[BOTH]), "--to", form, "--out", tmp_path / form)[0] == 0


def test_plan_page_and_card_speak_of_blocks(deep: Small) -> None:
    run = deep.undisturbed(stages=[BOTH])
    plans = json.loads(cli("plan", deep.job("plan", stages=[BOTH]), "--json")[1])
    assert (plans[0]["num_blocks"], plans[0]["blocks_left"]) == (5, 3)
    assert plans[0]["parameters"] == told_by(run)["parameters"]
    page = (run / "report.html").read_text()
    assert "24 of 96 channels and 2 of 4 heads out of every block, and 2 of 5 blocks" in page
    gone = [str(block + 1) for block in range(5) if block not in told_by(run)["kept_blocks"]]
    assert f"Blocks {gone[0]} and {gone[1]} were removed" in page
    assert Disclosure.INFLUENCE.sentence in page
    card = (run / "model" / "README.md").read_text()
    assert "25% of the channels, 50% of the heads and 40% of the blocks" in card


def test_memory_does_not_grow_with_the_blocks(tmp_path: Path) -> None:
    """Blocks of 1.6 MB, so that a few of anything would show."""
    text = make_texts(tmp_path, ["all"])["all"]
    peaks = {}
    for number in (8, 32):
        model = make_model(
            tmp_path / f"model-{number}", num_hidden_layers=number, hidden_size=192, intermediate_size=1024, vocab_size=4096
        )
        small = {
            "name": "memory",
            "model": {"path": str(model)},
            "clients": [{"name": "ash", "data": str(text)}],
            "stages": [{**DEEP, "depth": 0.25, "samples": 1}],
        }
        file = tmp_path / f"{number}.toml"
        file.write_text(tomli_w.dumps(small))
        status, _, err = process("run", file, "--out", tmp_path / f"run-{number}", "--quiet", peak=tmp_path / "peak")
        assert status == 0, err
        peaks[number] = int((tmp_path / "peak").read_text())
    assert peaks[32] <= 1.1 * peaks[8], peaks


# What cannot be


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"depth": 0.1}, ("stages.0.depth", "0.1 of 5 blocks is less than one", "give 0.2 or more")),
        ({"depth": 0.8}, ("stages.0.depth", "0.8 of 5 blocks are 4, but the first and the last", "give 0.6 or less")),
        ({"depth": 1.0}, ("stages.0.depth", "less than 1")),
        ({"depth": 0.0, "channels": 0.0, "heads": 0.0}, ("stages.0", "nothing is cut")),
        ({"depth": 0.0, "channels": 1.0}, ("stages.0.channels", "less than 1")),
    ],
)
def test_a_cut_that_leaves_nothing_or_takes_nothing_is_refused(
    deep: Small, tmp_path: Path, changes: dict[str, Any], said: tuple[str, ...]
) -> None:
    job = deep.job("refused", stages=[{**DEEP, **changes}])
    line = complaint("run", job, "--out", tmp_path / "run")
    for part in said:
        assert part in line


def test_a_client_refuses_blocks_that_its_model_does_not_have(deep: Small, tmp_path: Path) -> None:
    job = load(deep.job("unknown", stages=STAGES))
    client = local_clients(job, open_model(job.model), tmp_path)[0]
    calibration = Calibration(stage=0, samples=3, length=LENGTH, seed="0/0")
    with pytest.raises(FedgroveError, match="5 blocks, but the request is for runs of 6"):
        ScoreBlocks(stage=0, span=6, calibration=calibration).respond({}, client, "cpu")
    with pytest.raises(FedgroveError, match="5 blocks, so none of index 5 can stay"):
        Checkpoint(deep.model).over(kept_blocks=(0, 5))
