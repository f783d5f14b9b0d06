"""The stage ``structured`` with ``experts``: whole experts go, and what is left is a plain mixture of the others."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from fedgrove import run as server
from fedgrove.client.hidden_states import Calibration
from fedgrove.client.local_client import LocalClient
from fedgrove.client.windows import calibration_windows
from fedgrove.errors import FedgroveError
from fedgrove.job.load import load
from fedgrove.models.blocks import Decoder
from fedgrove.models.expert_cut import Routing, highest_experts, kept_tensors, routing_of
from fedgrove.models.experts import TYPES
from fedgrove.models.preconditions import check_parameters
from fedgrove.models.stream import Checkpoint
from fedgrove.rounds.disclosure import Disclosure
from fedgrove.rounds.wire import WireError
from fedgrove.run import local_clients, open_model
from fedgrove.runfolder import RunFolder
from fedgrove.stages.structured.exchanges.experts import CODES, ScoreExperts, check_sums
from fedgrove.stages.structured.exchanges.scores import LARGEST
from small import (
    CLIENTS,
    LENGTH,
    TOKENIZER,
    Meddling,
    Moment,
    Small,
    cli,
    complaint,
    killed,
    lines,
    make_texts,
    measurements,
    process,
)
from test_architectures import ARCHITECTURES, LLAMA, plain, same_bits, some_ids, tensors_of
from test_experts import fuse
from test_structured import config_of, told_by

CUT = {"kind": "structured", "experts": 0.5, "samples": 3, "length": LENGTH}
STAGES = [CUT]
EXPERTS = 8
FUSED = ("gate_up_proj", "down_proj")


def mixture(name: str, folder: Path, grove: Path, **changes: Any) -> Path:
    """A random mixture of eight experts in float32; those types whose routers can choose groups first do so."""
    config = ARCHITECTURES[name].config()
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if hasattr(config, key):
            setattr(config, key, EXPERTS)
    groups = {"n_group": 2, "topk_group": 1} if hasattr(config, "n_group") else {}
    method = {"topk_method": "group_limited_greedy"} if name == "deepseek_v2" else {}
    for key, value in {**groups, **method, **changes}.items():
        setattr(config, key, value)
    return random_model(config, folder, grove)


def random_model(config: Any, folder: Path, grove: Path) -> Path:
    """A random model with the shipped tokenizer, in which no tensor is what an architecture would fill in."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for tensor in (*model.parameters(), *(buffer for name, buffer in model.named_buffers() if "correction_bias" in name)):
        tensor.data += 0.1 * torch.randn_like(tensor)
    model.save_pretrained(folder)
    for file in TOKENIZER:
        (folder / file).write_bytes((grove / file).read_bytes())
    return folder


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, grove: Path) -> Small:
    """A federation with a mixture of experts whose first block has none."""
    folder = tmp_path_factory.mktemp("mixed")
    return Small(folder, mixture("qwen3_moe", folder / "mixture", grove, mlp_only_layers=[0]))


def routers(model: nn.Module) -> dict[int, nn.Module]:
    """The routers of a plain model, by block."""
    blocks = enumerate(model.model.layers)  # type: ignore[union-attr,arg-type]
    return {index: block.mlp.gate for index, block in blocks if hasattr(block.mlp, "experts")}


def some_kept(blocks: Mapping[int, Any] | list[int], groups: int) -> dict[int, tuple[int, ...]]:
    """Half of the experts of every group, others in every block."""
    in_group, generator = EXPERTS // groups, torch.Generator().manual_seed(3)
    kept = {}
    for block in blocks:
        places = [torch.randperm(in_group, generator=generator)[: in_group // 2].sort().values for _ in range(groups)]
        kept[block] = tuple(torch.cat([part + in_group * group for group, part in enumerate(places)]).tolist())
    return kept


@contextmanager
def forced(model: nn.Module, kept: Mapping[int, tuple[int, ...]]) -> Iterator[None]:
    """Meanwhile the routers of a full model choose none but these experts: the others' selection is −∞."""
    linear = functional.linear

    def watched(router: nn.Module, gone: list[int]) -> Any:
        forward = router.forward

        def call(hidden: Tensor) -> Any:
            def masked(*args: Tensor) -> Tensor:
                return linear(*args).index_fill(-1, torch.tensor(gone, dtype=torch.int64), -torch.inf)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(functional, "linear", masked)
                return forward(hidden)

        return call

    for block, router in routers(model).items():
        gone = sorted(set(range(EXPERTS)) - set(kept[block]))
        router.forward = watched(router, gone)  # type: ignore[method-assign]
        if hasattr(router, "e_score_correction_bias"):  # the bias of an expert could win although its score is 0
            router.e_score_correction_bias[gone] = -torch.inf  # type: ignore[index,operator]
    yield


# The model without experts, in every architecture


@pytest.mark.parametrize("name", TYPES)
def test_the_model_is_plain_transformers_whose_router_may_not_choose_these_experts(
    name: str, tmp_path: Path, grove: Path
) -> None:
    folder = mixture(name, tmp_path / "model", grove)
    checkpoint = Checkpoint(folder)
    routing, full = routing_of(checkpoint.config), plain(folder)
    assert (routing.experts, routing.groups) == (EXPERTS, 2 if hasattr(checkpoint.config, "n_group") else 1)
    kept = some_kept(routers(full), routing.groups)
    fewer = checkpoint.over(kept_experts=kept)
    decoder = Decoder(fewer)
    assert not check_parameters(decoder)
    fewer.write(tmp_path / "fewer")
    smaller = plain(tmp_path / "fewer")
    with torch.no_grad(), forced(full, kept):
        expected = full(some_ids()).logits
        found = smaller(some_ids()).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert routing_of(smaller.config).experts == EXPERTS // 2
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in full.parameters())
    assert Checkpoint(tmp_path / "fewer").num_bytes() == fewer.num_bytes() < checkpoint.num_bytes()
    for block, router in routers(smaller).items():  # to the bit, whatever the type calls its tensors
        whole = routers(plain(folder))[block]
        for tensor in ("weight", "e_score_correction_bias"):
            if hasattr(whole, tensor):
                assert torch.equal(getattr(router, tensor), getattr(whole, tensor)[list(kept[block])])
        experts, before = (model.model.layers[block].mlp.experts for model in (smaller, full))  # type: ignore[union-attr,index]
        for tensor in FUSED:
            assert torch.equal(getattr(experts, tensor), getattr(before, tensor)[list(kept[block])])
    hidden, calls = decoder.embed(some_ids())
    for index in range(len(decoder)):
        with torch.no_grad(), decoder.loaded(index) as block_:
            hidden = decoder.run(block_, hidden, calls[index])
    with torch.no_grad():
        assert torch.allclose(decoder.head(hidden[0]), found, rtol=0, atol=1e-5 * float(found.abs().max()))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_fused_experts_lose_the_same_and_stay_fused(name: str, tmp_path: Path, grove: Path) -> None:
    single = mixture(name, tmp_path / "single", grove)
    fused = fuse(single, tmp_path / "fused")
    kept = some_kept([0, 1, 2], 1)
    one, other = (Checkpoint(folder).over(kept_experts=kept) for folder in (single, fused))
    linears, matched = Decoder(one).linear_names(), Decoder(other).linear_names()
    assert list(linears) == list(matched)
    for linear, stored in linears.items():
        assert same_bits(one.read(stored), other.read(matched[linear]))
    other.write(tmp_path / "out")
    after = tensors_of(tmp_path / "out")
    assert {len(tensor) for tensor in after.values() if tensor.dim() == 3} == {EXPERTS // 2}
    with torch.no_grad():
        one.write(tmp_path / "one")
        assert torch.equal(plain(tmp_path / "out")(some_ids()).logits, plain(tmp_path / "one")(some_ids()).logits)


def test_blocks_beyond_the_models_last_one_go_and_names_are_numbered_anew() -> None:
    names = [
        "model.embed_tokens.weight", "model.layers.0.mlp.gate_proj.weight", "model.layers.1.mlp.gate.weight",
        "model.layers.1.mlp.experts.3.up_proj.weight", "model.layers.1.mlp.experts.2.up_proj.weight",
        "model.layers.1.mlp.shared_experts.up_proj.weight", "model.layers.2.mlp.experts.0.up_proj.weight",
    ]  # fmt: skip
    assert kept_tensors(names, {1: (0, 3)}, 2) == {
        names[0]: (names[0], None),
        names[1]: (names[1], None),
        names[2]: (names[2], (0, 3)),
        "model.layers.1.mlp.experts.1.up_proj.weight": (names[3], None),
        names[5]: (names[5], None),
    }


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts"])
def test_the_number_is_written_under_the_name_that_the_configuration_uses(key: str, tmp_path: Path, grove: Path) -> None:
    """Qwen3-MoE's number has two names: that of the hub's files and that of newer releases of transformers."""
    folder = mixture("qwen3_moe", tmp_path / "model", grove)
    config = json.loads((folder / "config.json").read_text())
    for other in ("num_experts", "num_local_experts"):
        config.pop(other, None)
    (folder / "config.json").write_text(json.dumps({**config, key: EXPERTS}))
    Checkpoint(folder).over(kept_experts=some_kept([0, 1, 2], 1)).write(tmp_path / "fewer")
    written = json.loads((tmp_path / "fewer" / "config.json").read_text())
    assert written[key] == EXPERTS // 2
    assert len({"num_experts", "num_local_experts"} & written.keys()) == 1


# What is summed


def respond(small: Small, folder: Path, score: str = "reap", samples: int = 3) -> tuple[list[LocalClient], ScoreExperts]:
    job = load(small.job("apart", stages=STAGES))
    calibration = Calibration(stage=0, samples=samples, length=LENGTH, seed="0/0")
    clients = local_clients(job, open_model(job.model), folder)
    return clients, ScoreExperts(stage=0, score=score, calibration=calibration, limit=LARGEST // 3)


@pytest.mark.parametrize("name", TYPES)
def test_sums_are_those_of_plain_transformers_and_it_does_not_matter_who_has_which_text(
    name: str, tmp_path: Path, grove: Path
) -> None:
    mixed = Small(tmp_path, mixture(name, tmp_path / "model", grove))
    clients, request = respond(mixed, tmp_path / "apart")
    everybody = LocalClient("all", tmp_path / "all", clients[0].model, None, clients[0].data, None, owners=tuple(clients))
    with torch.no_grad():
        parts = [request.respond({}, client, "cpu") for client in reversed(clients)]
        whole = respond(mixed, tmp_path / "x", samples=9)[1].respond({}, everybody, "cpu").tensors
    layout = Decoder(Checkpoint(mixed.model))
    for part in parts:
        request.check(dict(part.tensors), part.reply, layout)
    assert whole.keys() == request.expected(layout).keys()
    for key, total in whole.items():
        assert torch.equal(sum((part.tensors[key] for part in parts[1:]), parts[0].tensors[key]), total)

    model = plain(mixed.model)
    expected: dict[str, Tensor] = {}

    def note(block: int) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> None:
            hidden, chosen, given = args
            for index in range(EXPERTS):
                token, place = torch.where(chosen == index)
                gate, up = (hidden[token] @ module.gate_up_proj[index].T).chunk(2, 1)  # type: ignore[index,union-attr]
                out = (module.act_fn(gate) * up) @ module.down_proj[index].T  # type: ignore[index,union-attr,operator]
                norms = given[token, place].double() * out.double().norm(dim=1)
                for key, value in (("tokens", float(len(token))), ("outputs", float(norms.sum()))):
                    sums = expected.setdefault(f"change/{key}", torch.zeros(3, EXPERTS, dtype=torch.float64))
                    sums[block, index] += value

        return hook

    for block, layer in enumerate(model.model.layers):  # type: ignore[union-attr,arg-type]
        layer.mlp.experts.register_forward_pre_hook(note(block))
    client = clients[0]
    with torch.no_grad():
        for ids in calibration_windows(client, 3, LENGTH, "0/0"):
            model(ids[None])
        sums = request.respond({}, client, "cpu").tensors
    for key, values in expected.items():
        found = CODES[key.rpartition("/")[2]].decode(sums[key])
        assert torch.equal(found, values) if key.endswith("tokens") else torch.allclose(found, values, rtol=1e-4, atol=1e-6)


def test_a_score_asks_for_no_more_than_it_needs(mixed: Small, tmp_path: Path) -> None:
    clients, request = respond(mixed, tmp_path, "frequency")
    assert request.discloses() == {Disclosure.EXPERT_TOKENS}
    with torch.no_grad():
        tensors = request.respond({}, clients[0], "cpu").tensors
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {"change/tokens": (2, EXPERTS)}


@pytest.mark.parametrize(
    ("tokens", "outputs", "words"),
    [
        ([3, 5, 0, 2], [1, 1, 0, 1], None),
        ([3, 5, 0, 1], [1, 1, 0, 1], "tokens does not add up to 2 experts for each of 5 tokens"),
        ([6, 4, 0, 0], [1, 1, 0, 0], "tokens is out of range"),
        ([5, 6, 0, -1], [1, 1, 0, 1], "tokens is out of range"),
        ([3, 5, 0, 2], [1, 1, 0, -1], "outputs is out of range"),
        ([3, 5, 0, 2], [1, 9, 0, 1], "outputs is out of range"),
        ([3, 5, 0, 2], [1, 1, 1, 1], "outputs is not 0 for an expert that got no token"),
    ],
)
def test_sums_that_cannot_be_are_refused(tokens: list[int], outputs: list[int], words: str | None) -> None:
    sums = {"tokens": torch.tensor([[5, 5, 0, 0], tokens]), "outputs": torch.tensor([[1, 0, 0, 0], outputs])}
    if words is None:
        check_sums(sums, 5, 2, 8)
        return
    with pytest.raises(WireError, match=words):
        check_sums(sums, 5, 2, 8)


@pytest.mark.parametrize(
    ("scores", "number", "groups", "kept"),
    [
        ([5.0, 1.0, 3.0, 2.0], 2, 1, (0, 2)),
        ([5.0, 6.0, 3.0, 2.0], 2, 2, (1, 2)),  # every group loses one, although both lowest are in the second
        ([1.0, 1.0, 1.0, 1.0], 2, 1, (2, 3)),
    ],
)
def test_what_matters_least_goes(scores: list[float], number: int, groups: int, kept: tuple[int, ...]) -> None:
    assert highest_experts(torch.tensor(scores), number, groups) == kept


# A whole stage


def test_experts_of_the_lowest_scores_go_and_the_rest_stays_to_the_bit(mixed: Small) -> None:
    run = mixed.undisturbed(stages=STAGES)
    told = told_by(run)
    assert told["num_experts"] == [EXPERTS, EXPERTS // 2]
    assert told["sums"] == {"experts": {"clients": list(CLIENTS), "tokens": 3 * 3 * LENGTH}}
    assert "experts" not in told["blocks"][0]
    kept = {row["block"]: tuple(sorted(set(range(EXPERTS)) - set(row["experts"]))) for row in told["blocks"][1:]}
    assert [len(experts) for experts in kept.values()] == [EXPERTS // 2] * 2
    expected = Checkpoint(mixed.model).over(kept_experts=kept)
    after = tensors_of(run / "model")
    assert list(after) == expected.names()
    assert all(same_bits(tensor, expected.read(name)) for name, tensor in after.items())
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    assert sum(p.numel() for p in model.parameters()) == told["parameters"][1] < told["parameters"][0]
    assert told["bytes"][1] == 4 * told["parameters"][1]
    assert routing_of(model.config) == Routing(EXPERTS // 2, 2)


def test_what_a_client_sends_is_what_the_plan_says(mixed: Small) -> None:
    run = mixed.undisturbed(stages=STAGES)
    plan = json.loads((run / "plan-0-structured.json").read_text())
    up = [line for line in lines(run / "ledger.jsonl") if (line["direction"], line["kind"]) == ("up", "structured/experts")]
    assert [line["client"] for line in up] == list(CLIENTS)
    for line in up:
        assert line["bytes"] == pytest.approx(plan["clients"][line["client"]]["upload"], rel=0.3)


def test_secure_aggregation_changes_no_bit(mixed: Small, tmp_path: Path) -> None:
    job = mixed.job("secure", stages=STAGES, privacy={"secure_aggregation": True})
    assert cli("run", job, "--out", tmp_path / "run")[0] == 0
    one, other = tensors_of(tmp_path / "run" / "model"), tensors_of(mixed.undisturbed(stages=STAGES) / "model")
    assert all(same_bits(one[name], other[name]) for name in other)


def test_a_killed_run_goes_on_to_the_same_bits(mixed: Small, tmp_path: Path) -> None:
    moment = Moment("os.rename", "*/stage-0/experts.safetensors", "cut")
    job = mixed.job("killed", stages=STAGES)
    killed("run", job, "--out", tmp_path / "run", "--quiet", moment=moment)
    assert cli("run", job, "--out", tmp_path / "run", "--resume")[0] == 0
    undisturbed = mixed.undisturbed(stages=STAGES)
    assert measurements(tmp_path / "run") == measurements(undisturbed)
    assert told_by(tmp_path / "run") == told_by(undisturbed)
    one, other = tensors_of(tmp_path / "run" / "model"), tensors_of(undisturbed / "model")
    assert all(same_bits(one[name], other[name]) for name in other)


def test_alone_is_what_a_client_would_have_made_by_itself(mixed: Small, tmp_path: Path) -> None:
    run = mixed.undisturbed(stages=STAGES, evaluate__alone=True)
    only = [{"name": "birch", "data": str(mixed.texts["birch"])}]
    assert cli("run", mixed.job("birch", stages=STAGES, clients=only), "--out", tmp_path / "run")[0] == 0
    alone = measurements(run)[0, None, "birch", "perplexity/held-0"]
    assert alone == measurements(tmp_path / "run")[0, None, None, "perplexity/held-0"]


def test_a_client_whose_tokens_do_not_add_up_is_named(mixed: Small, tmp_path: Path) -> None:
    job = load(mixed.job("meddled", stages=STAGES, evaluate={}))
    run = RunFolder(tmp_path / "run", job)

    def meddle(tensors: dict[str, Tensor], reply: dict[str, Any]) -> None:
        tensors["change/tokens"][1, 0] += 1

    engine = Meddling(server.local_engine(job, tmp_path / "clients"), ScoreExperts.KIND, change=meddle)
    with pytest.raises(FedgroveError, match="'birch': its response was refused: change/tokens does not add up to 2 experts"):
        server.run_job(job, engine, run)
    run.close()


def test_plan_page_and_card_speak_of_experts(mixed: Small) -> None:
    run = mixed.undisturbed(stages=STAGES)
    plans = json.loads(cli("plan", mixed.job("plan", stages=STAGES), "--json")[1])
    assert plans[0]["experts"] == {"blocks": [1, 2], "before": EXPERTS, "after": EXPERTS // 2, "groups": 1}
    assert plans[0]["parameters"] == told_by(run)["parameters"]
    assert "score reap: 4 of 8 experts out of every block" in " ".join(cli("plan", mixed.job("plan", stages=STAGES))[1].split())
    page = (run / "report.html").read_text()
    assert "4 of 8 experts out of every block that has any" in page
    assert Disclosure.EXPERT_OUTPUTS.sentence in page
    assert "50% of the experts, score reap" in (run / "model" / "README.md").read_text()
    assert config_of(run)["num_experts_per_tok"] == 2


def test_blocks_of_a_mixture_go_but_those_without_experts_stay(tmp_path: Path, grove: Path) -> None:
    """And what is left is tuned in the same job."""
    model = mixture("deepseek_v3", tmp_path / "model", grove, num_hidden_layers=5, first_k_dense_replace=1)
    small = Small(tmp_path, model)
    cut = {"kind": "structured", "depth": 0.4, "samples": 2, "length": LENGTH, "protect_ends": False}
    tune = {"kind": "tune", "method": "ia3", "rounds": 1, "steps": 1, "length": LENGTH, "batches": [1], "bits": [32]}
    assert cli("run", small.job("deep", stages=[cut, tune], evaluate={}), "--out", tmp_path / "run")[0] == 0
    told = told_by(tmp_path / "run")
    kept = tuple(told["kept_blocks"])
    assert len(kept) == 3
    assert kept[0] == 0
    after = plain(tmp_path / "run" / "model")
    assert [hasattr(block.mlp, "experts") for block in after.model.layers] == [False, True, True]
    assert sum(p.numel() for p in after.parameters()) == told["parameters"][1]
    before, gates = plain(model), routers(after)
    for place, block in enumerate(kept[1:], 1):
        assert torch.equal(gates[place].weight, before.model.layers[block].mlp.gate.weight)
    assert "2 of 5 blocks" in (tmp_path / "run" / "report.html").read_text()


def test_blocks_without_experts_in_the_middle_leave_no_plan_for_a_later_stage(tmp_path: Path, grove: Path) -> None:
    small = Small(tmp_path, mixture("qwen3_moe", tmp_path / "model", grove, num_hidden_layers=4, mlp_only_layers=[2]))
    cut = {"kind": "structured", "depth": 0.25, "samples": 2, "length": LENGTH}
    tune = {"kind": "tune", "method": "ia3", "length": LENGTH}
    assert "block 2 has no experts and comes after some" in complaint("plan", small.job("middle", stages=[cut, tune]))
    assert cli("plan", small.job("last", stages=[cut]))[0] == 0


def test_memory_does_not_grow_with_the_blocks(tmp_path: Path, grove: Path) -> None:
    """Blocks of 1.3 MB, so that a few of anything would show."""
    text = make_texts(tmp_path, ["all"])["all"]
    peaks = {}
    for number in (4, 16):
        sizes = {**LLAMA, "num_hidden_layers": number, "hidden_size": 64, "intermediate_size": 192}
        model = random_model(
            MixtralConfig(**sizes, num_local_experts=8, num_experts_per_tok=2), tmp_path / f"model-{number}", grove
        )
        job = {
            "name": "memory",
            "model": {"path": str(model)},
            "clients": [{"name": "ash", "data": str(text)}],
            "stages": [{**CUT, "samples": 1}],
        }
        file = tmp_path / f"{number}.toml"
        file.write_text(tomli_w.dumps(job))
        status, _, err = process("run", file, "--out", tmp_path / f"run-{number}", "--quiet", peak=tmp_path / "peak")
        assert status == 0, err
        peaks[number] = int((tmp_path / "peak").read_text())
    assert peaks[16] <= 1.1 * peaks[4], peaks


# What cannot be


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"experts": 0.1}, ("stages.0.experts", "0.1 of 8 experts is less than one", "give 0.12 or more")),
        ({"experts": 0.9}, ("stages.0.experts", "leaves 1, but the router chooses 2 for each token", "give 0.75 or less")),
        ({"channels": 0.25}, ("stages.0: experts", "not cut together with channels, heads or depth")),
        ({"depth": 0.25}, ("stages.0: experts", "not cut together with channels, heads or depth")),
        (
            {"experts": 0.0, "channels": 0.25},
            ("structured pruning of channels or heads is not possible", "cut experts or blocks"),
        ),
        (
            {"experts": 0.0, "depth": 0.7},
            ("stages.0.depth: 0.7 of 3 blocks are 2, but those that have no experts stay", "0.33"),
        ),
        ({"expert_score": "fisher"}, ("stages.0.expert_score", "frequency, reap")),
    ],
)
def test_a_cut_that_cannot_be_is_refused(mixed: Small, tmp_path: Path, changes: dict[str, Any], said: tuple[str, ...]) -> None:
    line = complaint("run", mixed.job("refused", stages=[{**CUT, **changes}], evaluate={}), "--out", tmp_path / "run")
    for part in said:
        assert part in line, line


@pytest.mark.parametrize(
    ("name", "share", "said"),
    [
        ("deepseek_v3", 0.75, "leaves 2, but the router chooses 2 for each token from 1 of 2 groups, groups by their best 2"),
        ("deepseek_v2", 0.75, "leaves 2, but the router chooses 2 for each token from 1 of 2 groups, which takes 4"),
        ("deepseek_v3", 0.2, "0.2 of 4 experts in each of 2 groups is less than one"),
    ],
)
def test_limits_on_groups_that_cannot_be_kept_are_refused(
    mixed: Small, tmp_path: Path, grove: Path, name: str, share: float, said: str
) -> None:
    folder = mixture(name, tmp_path / "model", grove)
    job = mixed.job("groups", model={"path": str(folder)}, stages=[{**CUT, "experts": share}], evaluate={})
    assert said in complaint("run", job, "--out", tmp_path / "run")


def test_a_model_without_experts_is_refused(small: Small, mixed: Small, tmp_path: Path, grove: Path) -> None:
    line = complaint("run", small.job("none", stages=STAGES, evaluate={}), "--out", tmp_path / "run")
    assert "stages.0.experts: the model has none in any of its 2 blocks (type llama); cut channels, heads or depth" in line
    config = Qwen3MoeConfig(**LLAMA, num_experts=4, num_experts_per_tok=2, mlp_only_layers=[0, 1, 2])
    dense = random_model(config, tmp_path / "dense", grove)
    line = complaint("run", mixed.job("dense", model={"path": str(dense)}, stages=STAGES, evaluate={}), "--out", tmp_path / "x")
    assert "none in any of its 3 blocks (type qwen3_moe)" in line


def test_a_configuration_without_a_number_of_experts_has_no_place_for_another() -> None:
    with pytest.raises(FedgroveError, match="type llama has no number of experts"):
        routing_of(ARCHITECTURES["llama"].config())
