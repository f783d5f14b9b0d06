"""The stage ``head``: a classifier from sums is the one that the pooled records give, and plain transformers can use it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from elsewhere import second_device
from fedgrove import plugins
from fedgrove import run as server
from fedgrove.client.local_client import LocalClient
from fedgrove.client.serve import serve
from fedgrove.errors import FedgroveError
from fedgrove.job.load import load
from fedgrove.models.blocks import Decoder
from fedgrove.models.features import Features, pooled_states, projection, typical
from fedgrove.models.stream import Checkpoint
from fedgrove.rounds import wire
from fedgrove.rounds.aggregator.moments import BITS, CLIP, CODE, MOST_RECORDS, Moments, check
from fedgrove.rounds.disclosure import Disclosure
from fedgrove.runfolder import RunFolder
from fedgrove.stages.head.exchanges.guesses import SumGuesses, guess
from fedgrove.stages.head.exchanges.moments import SumMoments
from fedgrove.stages.head.heads import Linear, head_of
from fedgrove.stages.head.records import hold_out, read_labeled
from fedgrove.stages.head.requests import BIAS, CENTER, SCALE, WEIGHT
from fedgrove.stages.head.solving import TooFew, solve
from small import CLIENTS, Heard, Meddling, Moment, Small, cli, complaint, killed, lines, make_model, measurements
from test_report import Page

LABELS = ("bird", "fish", "tree")
WORDS = {
    "bird": "wing feather nest song sky beak",
    "fish": "sea water scale fin river deep",
    "tree": "leaf root bark branch wood green",
}
HEAD = {"kind": "head", "labels": list(LABELS), "length": 12}
SHARES = {"ash": (12, 3, 5), "birch": (2, 14, 4), "cedar": (6, 1, 13)}  # how many records of each label
HEADS = plugins.names("stages.head.heads")


def record(label: str, number: int) -> dict[str, str]:
    words = WORDS[label].split()
    rng = np.random.default_rng([LABELS.index(label), number])
    return {"text": " ".join(["the", *rng.choice(words, 5), *rng.choice(["of", "a", "was", "one"], 3)]), "label": label}


@pytest.fixture(scope="module")
def files(small: Small) -> dict[str, Path]:
    """A file of labeled records for every client, one with all of them, and a test."""
    found = {}
    every: list[dict[str, str]] = []
    for offset, (client, numbers) in enumerate(SHARES.items()):
        rows = [record(label, 100 * offset + i) for label, number in zip(LABELS, numbers, strict=True) for i in range(number)]
        every += rows
        found[client] = _write(small.folder / f"labeled-{client}.jsonl", rows)
    found["everybody"] = _write(small.folder / "labeled-everybody.jsonl", every[::-1])
    found["test"] = _write(small.folder / "labeled-test.jsonl", [record(LABELS[i % 3], 1000 + i) for i in range(24)])
    return found


def _write(file: Path, rows: list[dict[str, str]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def job(files: Mapping[str, Path], owners: tuple[str, ...] = CLIENTS, **changes: Any) -> dict[str, Any]:
    """Changes of the small job: a head of these owners."""
    stage = {key: changes.pop(key) for key in list(changes) if "__" not in key and key != "privacy"}
    data = [{"name": "test", "path": str(files["test"]), "prompt": "{text}", "answer": " {label}", "measure": "head"}]
    clients = [{"name": name, "data": str(files[name]), "prompt": "{text}", "answer": "{label}"} for name in owners]
    return {"clients": clients, "stages": [{**HEAD, **stage}], "evaluate__data": data, **changes}


def sums_of(run: Path) -> dict[str, Tensor]:
    return load_file(run / "head" / "head.safetensors")


def pooled(small: Small, file: Path, layers: tuple[int, ...] = (-1,), pool: str = "mean") -> tuple[Tensor, Tensor]:
    decoder = Decoder(Checkpoint(small.model))
    windows, truth = read_labeled([file], "{text}", "{label}", LABELS, decoder.checkpoint.tokenizer(), 12)
    with torch.no_grad():
        return pooled_states(decoder, windows, layers, pool), truth


# Features


def test_features_are_the_hidden_states_of_plain_transformers(small: Small, files: Mapping[str, Path]) -> None:
    model = AutoModel.from_pretrained(small.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(small.model)
    for layers, pool in (((0, 1, -1), "mean"), ((2,), "last"), ((-2, 0), "last")):
        found, _ = pooled(small, files["ash"], layers, pool)
        for row, line in zip(found, lines(files["ash"]), strict=True):
            ids = tokenizer(line["text"], truncation=True, max_length=12, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                states = model(ids, output_hidden_states=True).hidden_states
            expected = torch.cat([states[at][0].mean(0) if pool == "mean" else states[at][0, -1] for at in layers])
            torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)


def test_a_records_features_do_not_depend_on_the_others(small: Small, files: Mapping[str, Path]) -> None:
    every, _ = pooled(small, files["everybody"])
    for client in CLIENTS:
        own, _ = pooled(small, files[client])
        assert all((every == row).all(1).any() for row in own), "the same bits"


def test_a_head_of_features_is_one_of_hidden_states() -> None:
    """Center, scale and projection are folded into weight and bias."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(5, 12, generator=generator)
    scale = torch.exp2(torch.randint(-3, 4, (12,), generator=generator).float())
    for size in (None, 4, 12):
        matrix = projection(12, size, "seed")
        assert (matrix is None) == (size != 4)
        features = Features((-1,), "mean", torch.randn(12, generator=generator), scale, matrix)
        weight, bias = (torch.randn(*shape, generator=generator).double() for shape in ((3, 4 if size == 4 else 12), (3,)))
        raw_weight, raw_bias = features.unfold(weight, bias)
        expected = features.of(states) @ weight.T + bias
        torch.testing.assert_close((states @ raw_weight.T + raw_bias).double(), expected, rtol=1e-4, atol=1e-4)


def test_the_typical_size_is_that_of_single_tokens_and_a_power_of_two(small: Small) -> None:
    with torch.no_grad():
        center, scale = typical(Decoder(Checkpoint(small.model)), (0, -1), 12, "0/0")
        again = typical(Decoder(Checkpoint(small.model)), (0, -1), 12, "0/0")
    assert torch.equal(torch.stack([center, scale]), torch.stack(again))
    assert center.shape == scale.shape == (128,)
    assert torch.equal(scale.log2(), scale.log2().round())
    embeddings = load_file(small.model / "model.safetensors")["model.embed_tokens.weight"].float()
    assert ((scale[:64] * embeddings.std(0)) > 0.4).all()
    assert ((scale[:64] * embeddings.std(0)) < 2.5).all()


# Sums


def drawn(records: int = 60, width: int = 5, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    truth = torch.arange(records) % classes
    means = 2 * torch.randn(classes, width, generator=generator).double()
    mix = torch.randn(width, width, generator=generator).double()
    return means[truth] + torch.randn(records, width, generator=generator).double() @ mix, truth


def test_sums_depend_on_no_order_and_on_no_owner() -> None:
    features, truth = drawn()
    whole = Moments.over(features, truth, 4, True).tensors()
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    parts = [Moments.over(features[at], truth[at], 4, True).tensors() for at in order.split([7, 1, 30, 22])]
    assert all(torch.equal(whole[name], torch.stack([part[name] for part in parts]).sum(0)) for name in whole)
    assert whole["counts"].tolist() == [20, 20, 20, 0]
    check(Moments.of(whole), 60)


def test_sums_are_those_of_numpy() -> None:
    features, truth = drawn()
    moments = Moments.over(features, truth, 3, True)
    x, y = CODE.decode(CODE.encode(features)).numpy(), truth.numpy()
    np.testing.assert_allclose(moments.mean(), x.mean(0), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(moments.covariance(), np.cov(x.T, bias=True), rtol=1e-9, atol=1e-12)
    within = sum(np.cov(x[y == c].T, bias=True) * (y == c).mean() for c in range(3))
    np.testing.assert_allclose(moments.within(), within, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(moments.within_variances(), np.diag(within), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(moments.variances(), x.var(0), rtol=1e-9, atol=1e-12)


def test_one_odd_record_is_clipped() -> None:
    moments = Moments.over(torch.full((1, 2), 1e30), torch.zeros(1, dtype=torch.int64), 1, True)
    assert moments.sums.tolist() == [[CLIP * 2**BITS] * 2]
    check(moments, 1)
    assert MOST_RECORDS * int(CLIP * 2**BITS) ** 2 < 2**63


@pytest.mark.parametrize(("name", "value"), [
    ("counts", -1), ("counts", 61), ("sums", 2**40), ("squares", -1), ("squares", 2**50), ("products", 2**40),
])  # fmt: skip
def test_sums_that_no_records_have_are_refused(name: str, value: int) -> None:
    tensors = Moments.over(*drawn(), 3, True).tensors()
    tensors[name].view(-1)[0] = value
    with pytest.raises(wire.WireError):
        check(Moments.of(tensors), 60)


# Heads, against independent forms of them


def test_the_ridge_head_is_ridge_regression() -> None:
    features, truth = drawn()
    linear, classes = solve(Moments.over(features, truth, 3, True), "ridge", 0.1, LABELS)
    x, y = CODE.decode(CODE.encode(features)), torch.nn.functional.one_hot(truth, 3).double()
    centered = x - x.mean(0)
    penalty = torch.diag(len(x) * 0.1 * x.var(0, unbiased=False)).sqrt()
    rows = torch.cat([centered, penalty])
    weight = torch.linalg.lstsq(rows, torch.cat([y - y.mean(0), torch.zeros(5, 3).double()])).solution.T
    torch.testing.assert_close(linear.weight, weight)
    torch.testing.assert_close(linear.bias, y.mean(0) - weight @ x.mean(0))
    assert classes.tolist() == [0, 1, 2]
    torch.testing.assert_close((x @ linear.weight.T + linear.bias).sum(1), torch.ones(60).double())


def test_the_discriminant_is_bayes_rule_of_gaussians() -> None:
    features, truth = drawn(seed=3)
    truth = torch.where(torch.arange(60) < 20, 0, truth)  # one label is frequent
    moments = Moments.over(features, truth, 3, True)
    linear, _ = solve(moments, "discriminant", 1e-9, LABELS)
    x = CODE.decode(CODE.encode(features))
    posterior = []
    for label in range(3):
        of = torch.distributions.MultivariateNormal(moments.means()[label], moments.within())
        posterior.append(of.log_prob(x) + torch.log(moments.frequencies()[label]))
    torch.testing.assert_close((x @ linear.weight.T + linear.bias).softmax(1), torch.stack(posterior, 1).softmax(1), atol=1e-6,
                               rtol=1e-6)  # fmt: skip


def test_prototypes_choose_the_nearest_mean() -> None:
    features, truth = drawn(seed=4)
    moments = Moments.over(features, truth, 3, False)
    linear, _ = solve(moments, "prototypes", 1e-9, LABELS)
    x = CODE.decode(CODE.encode(features))
    size = moments.within_variances().sqrt()
    nearest = torch.cdist(x / size, moments.means() / size).argmin(1)
    assert (x @ linear.weight.T + linear.bias).argmax(1).tolist() == nearest.tolist()


@pytest.mark.parametrize("head", HEADS)
def test_an_owners_own_frequencies_are_bayes_rule(head: str) -> None:
    features, truth = drawn()
    method = head_of(head)
    linear, _ = solve(Moments.over(features, truth, 3, method.PRODUCTS), head, 0.1, LABELS)
    before, after = torch.full((3,), 1 / 3).double(), torch.tensor([0.7, 0.2, 0.1]).double()
    scores, moved = (features @ one.weight.T + one.bias for one in (linear, method.reweigh(linear, before, after)))
    if head == "ridge":
        torch.testing.assert_close(moved, scores * after / before)
    else:
        torch.testing.assert_close(moved.softmax(1), torch.softmax(scores + torch.log(after), 1))
        certain = method.reweigh(linear, before, torch.tensor([1.0, 1e-300, 1e-300]).double())
        assert ((features @ certain.weight.T + certain.bias).argmax(1) == 0).all()


def test_more_classes_of_equal_shares_are_held_out_alike() -> None:
    classes = torch.tensor([0] * 20 + [1] * 10 + [2] * 5)
    held = hold_out(classes[torch.randperm(35, generator=torch.Generator().manual_seed(0))], 0.2)
    assert int(held.sum()) == 7
    assert torch.bincount(classes[hold_out(classes, 0.2)]).tolist() == [4, 2, 1]
    assert not hold_out(classes[:1], 0.5).any()


# A whole stage


@pytest.mark.parametrize("head", HEADS)
def test_the_head_of_any_number_of_owners_is_that_of_the_pooled_records(
    small: Small, files: Mapping[str, Path], head: str, tmp_path: Path
) -> None:
    stage = {"head": head, "layers": [1, -1], "size": 40}
    apart = small.undisturbed(**job(files, **stage))
    assert cli("run", small.job("pooled", **job(files, ("everybody",), **stage)), "--out", tmp_path / "pooled")[0] == 0
    secure = job(files, **stage, privacy={"secure_aggregation": True})
    assert cli("run", small.job("secure", **secure), "--out", tmp_path / "secure")[0] == 0
    for run in (tmp_path / "pooled", tmp_path / "secure"):
        assert (run / "head" / "head.safetensors").read_bytes() == (apart / "head" / "head.safetensors").read_bytes()
    found, one = measurements(apart), measurements(tmp_path / "pooled")
    assert found[0, None, None, "head/test"] == one[0, None, None, "head/test"] > 0.8
    assert not any(client for _, _, client, _ in measurements(tmp_path / "secure"))
    sent = [line for line in lines(apart / "ledger.jsonl") if line["direction"] == "up" and line["kind"] == "head/moments"]
    assert len(sent) == 3, "one exchange"
    numbers = 3 + 3 * 40 + 40 + (40 * 39 // 2 if head_of(head).PRODUCTS else 0)
    assert max(line["bytes"] for line in sent) < 8 * numbers + 1500


def test_plain_transformers_load_it(small: Small, files: Mapping[str, Path]) -> None:
    run = small.undisturbed(**job(files, personal=0.25))
    card = (run / "head" / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code is not None
    scope: dict[str, Any] = {}
    exec(code[1].replace("FOLDER", str(run / "head")).replace("BASE", str(run / "model")), scope)
    truth = [line["label"] for line in lines(files["test"])]
    found = [scope["classify"](line["text"]) for line in lines(files["test"])]
    right = sum(a == b for a, b in zip(found, truth, strict=True)) / len(truth)
    assert right == measurements(run)[0, None, None, "head/test"]
    about = json.loads((run / "head" / "head.json").read_text())
    assert (about["labels"], about["layers"], about["pool"]) == (list(LABELS), [-1], "mean")
    assert (run / "model" / "model.safetensors").read_bytes() == (small.model / "model.safetensors").read_bytes()


def test_owners_compare_three_heads_on_their_own_records(small: Small, files: Mapping[str, Path]) -> None:
    run = small.undisturbed(**job(files, personal=0.25))
    found = measurements(run)
    for client in CLIENTS:
        assert found[0, None, client, "personal/records"] == 5
        folder = run / "clients" / client / "personal" / "stage-0"
        own = json.loads((folder / "head.json").read_text())["frequencies"]
        kept = [number - number // 4 for number in SHARES[client]]
        assert max(range(3), key=own.__getitem__) == max(range(3), key=kept.__getitem__)
        shared, personal = load_file(run / "head" / "head.safetensors"), load_file(folder / "head.safetensors")
        every = json.loads((run / "head" / "head.json").read_text())["frequencies"]
        ratio = torch.tensor(own) / torch.tensor(every)
        torch.testing.assert_close(personal["weight"], shared["weight"] * ratio[:, None], rtol=1e-5, atol=1e-6)
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    rows = {row[0]: row[1:] for row in page.csv("stage-0-own-heads")[1:]}
    for client in CLIENTS:
        names = ("personal/shared", "personal/personal", "personal/own")
        assert [float(value) for value in rows[client][1:]] == [found[0, None, client, name] for name in names]
    assert Disclosure.LABEL_SUMS.sentence in page.text
    assert Disclosure.HELD_OUT_ACCURACIES.sentence in page.text
    assert "as the plain mean of 3 owners" in page.text
    (text, records, together, *_) = page.csv("stage-0-head")[1]
    assert (text, records, float(together)) == ("test", "24", found[0, None, None, "head/test"])
    assert "head/" in (run / "model" / "README.md").read_text()


def test_owners_who_hold_nothing_out_are_named(small: Small, files: Mapping[str, Path], tmp_path: Path) -> None:
    status, said, _ = cli("run", small.job("few", **job(files, personal=0.01)), "--out", tmp_path / "run", "--quiet")
    assert status == 0
    assert "No comparison by ash, birch and cedar: too little text to hold out 0.01 of it" in " ".join(said.split())


def test_without_products_nothing_is_said_of_them(small: Small, files: Mapping[str, Path]) -> None:
    for head, products in (("prototypes", False), ("ridge", True)):
        run = small.undisturbed(**job(files, head=head, layers=[1, -1], size=40))
        discloses = json.loads((run / "plan-0-head.json").read_text())["discloses"]
        assert ("FEATURE_PRODUCTS" in discloses) == products


@pytest.mark.parametrize("moment", [
    Moment("os.rename", "*/ash/pooled-*.safetensors", "cut"),
    Moment("os.rename", "*/work/stage-0/moments.safetensors", "cut"),
    Moment("os.rename", "*/run/head", "kill"),
    Moment("os.rename", "*/cedar/personal/stage-0", "kill"),
    Moment("os.rename", "*/run/head.json", "cut"),
])  # fmt: skip
def test_a_killed_run_goes_on_to_the_same_bits(small: Small, files: Mapping[str, Path], tmp_path: Path, moment: Moment) -> None:
    changes = job(files, personal=0.25)
    killed("run", small.job("killed-head", **changes), "--out", tmp_path / "run", "--quiet", moment=moment)
    assert cli("run", small.job("killed-head", **changes), "--out", tmp_path / "run", "--resume")[0] == 0
    whole = small.undisturbed(**changes)
    for name in ("head/head.safetensors", "head.json", "clients/cedar/personal/stage-0/head.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes()
    assert measurements(tmp_path / "run") == measurements(whole)


def test_a_head_is_made_on_any_device(small: Small, files: Mapping[str, Path], tmp_path: Path) -> None:
    wanted = load(small.job("head-there", **job(files, personal=0.25, layers=[1, -1]), model__dtype="float32"))

    def weight(device: str, name: str) -> Tensor:
        run = RunFolder(tmp_path / name, wanted)
        server.run_job(wanted, server.local_engine(wanted, run.path / "clients", devices=[device]), run, device)
        run.close()
        return sums_of(run.path)["weight"]

    here = weight("cpu", "here")
    with second_device() as device:
        torch.testing.assert_close(weight(device, "there"), here, rtol=1e-2, atol=1e-3)


# Mistakes


def test_a_client_that_dies_leaves_the_sums_of_the_others(small: Small, files: Mapping[str, Path], tmp_path: Path) -> None:
    changes = job(files)
    wanted = load(small.job("dies", **changes, rounds={"quorum": 2}))
    heard = Heard()
    run = RunFolder(tmp_path / "run", wanted, listener=heard)
    server.run_job(wanted, Meddling(server.local_engine(wanted, run.path / "clients"), SumMoments.KIND), run)
    run.close()
    assert "birch: its process died (status -9)" in heard.lines
    two = small.job("two", **job(files, ("ash", "cedar")))
    assert cli("run", two, "--out", tmp_path / "two")[0] == 0
    assert torch.equal(sums_of(tmp_path / "run")["weight"], sums_of(tmp_path / "two")["weight"])
    assert json.loads((tmp_path / "run" / "head.json").read_text())["clients"] == ["ash", "cedar"]


@pytest.mark.parametrize(("stage", "says"), [
    ({"layers": [3]}, "stages.0.layers: 3, but the model has 2 blocks; give 0 (the embeddings) to 2"),
    ({"layers": [2, -1]}, "stages.0.layers: two of them are the same layer"),
    ({"labels": ["bird", "fish"]}, "the label 'tree' is none of bird, fish; add it to labels, or fix the key answer"),
    ({"labels": ["bird", "bird"]}, "labels: 'bird' is there twice"),
    ({"labels": ["bird ", "fish"]}, "it begins or ends with a space"),
    ({"head": "discriminant", "layers": [0, 1]},
     'head: 60 records, but "discriminant" of 3 labels on 128 features needs 131; lower size, add records'),
    ({"head": "forest"}, "choose one of discriminant, prototypes, ridge"),
    ({"privacy": {"secure_aggregation": True}, "personal": 0.2}, "stages.0.personal"),
])  # fmt: skip
def test_what_does_not_fit_is_one_line(
    small: Small, files: Mapping[str, Path], tmp_path: Path, stage: dict[str, Any], says: str
) -> None:
    assert says in complaint("run", small.job("wrong-head", **job(files, **stage)), "--out", tmp_path / "run")


def test_records_of_one_label_only_make_no_head(small: Small, files: Mapping[str, Path], tmp_path: Path) -> None:
    only = _write(tmp_path / "only.jsonl", [record("fish", i) for i in range(5)])
    changes = job({**files, "ash": only}, ("ash",))
    line = complaint("run", small.job("one-label", **changes), "--out", tmp_path / "run")
    assert (
        line == "head: all 5 records have the label 'fish', but a head needs records of two; add records, or fix the key answer"
    )
    _write(only, [record("fish", i) for i in range(5)] + [record("tree", 1)])
    status, _, err = cli("run", small.job("one-label", **changes), "--out", tmp_path / "run", "--resume")
    assert status == 0, err
    assert json.loads((tmp_path / "run" / "head" / "head.json").read_text())["labels"] == ["fish", "tree"]


def test_a_wrong_label_of_a_held_out_text_is_found_before_anybody_is_asked(
    small: Small, files: Mapping[str, Path], tmp_path: Path
) -> None:
    test = _write(tmp_path / "test.jsonl", [record("fish", 1), {"text": "the", "label": "stone"}])
    line = complaint("run", small.job("held-out-label", **job({**files, "test": test})), "--out", tmp_path / "run")
    assert line.startswith(f"{test}: the label 'stone' is none of")
    assert {sent["kind"] for sent in lines(tmp_path / "run" / "ledger.jsonl")} == {"rounds/capabilities"}


def test_an_owner_without_labels_is_named(small: Small, files: Mapping[str, Path], tmp_path: Path) -> None:
    changes = job(files)
    changes["clients"][1] = {"name": "birch", "data": str(files["birch"])}
    line = complaint("plan", small.job("no-labels", **changes))
    assert "clients.1: client 'birch' has no labels; give prompt and answer" in line
    assert line.endswith("or have labels guessed (stages.guesses)")
    client = LocalClient("birch", tmp_path, small.model, None, (files["birch"],), None)
    request = SumMoments(stage=0, **fields())
    tensors = {CENTER: torch.zeros(64), SCALE: torch.ones(64)}
    with pytest.raises(FedgroveError, match="client 'birch': its records have no labels; give prompt and answer"):
        serve(request.KIND, wire.pack(tensors, {"request": request.model_dump(mode="json")}), client, "cpu")


def fields(**changes: Any) -> dict[str, Any]:
    return {
        "head": "ridge", "labels": LABELS, "layers": (-1,), "pool": "mean", "length": 12, "size": None, "seed": "0/0",
        "personal": 0.0, "limit": MOST_RECORDS, **changes,
    }  # fmt: skip


@pytest.mark.parametrize(("changes", "tensors", "says"), [
    ({}, {CENTER: torch.zeros(63)}, "another shape or dtype"),
    ({}, {SCALE: torch.zeros(64)}, "not positive"),
    ({"layers": (7,)}, {}, "its model has 2 blocks"),
    ({"limit": 19}, {}, "it has 20 records, but at most 19 can be summed"),
])  # fmt: skip
def test_a_client_refuses_what_does_not_fit_its_model(
    small: Small, files: Mapping[str, Path], tmp_path: Path, changes: dict[str, Any], tensors: dict[str, Tensor], says: str
) -> None:
    client = LocalClient("ash", tmp_path, small.model, None, (files["ash"],), None, prompt="{text}", answer="{label}")
    request = SumMoments(stage=0, **fields(**changes))
    sent = {CENTER: torch.zeros(64), SCALE: torch.ones(64), **tensors}
    with pytest.raises(FedgroveError, match=says):
        serve(request.KIND, wire.pack(sent, {"request": request.model_dump(mode="json")}), client, "cpu")


def test_a_text_for_a_head_needs_a_stage_that_makes_one(small: Small, files: Mapping[str, Path]) -> None:
    changes = job(files)
    changes["stages"] = small.spec()["stages"]
    assert 'evaluate.data.0.measure: no stage makes a "head"' in complaint("plan", small.job("no-head", **changes))
    changes = job(files)
    changes["stages"] *= 2
    assert "make it the only stage" in complaint("plan", small.job("two-heads", **changes))


def test_too_few_records_say_how_many() -> None:
    features, truth = drawn(7)
    with pytest.raises(TooFew, match='head: 7 records, but "discriminant" of 3 labels on 5 features needs 8'):
        solve(Moments.over(features, truth, 3, True), "discriminant", 0.1, LABELS)
    assert isinstance(solve(Moments.over(*drawn(8), 3, True), "discriminant", 0.1, LABELS)[0], Linear)


def test_another_model_of_other_width_is_no_obstacle(small: Small, files: Mapping[str, Path], tmp_path: Path) -> None:
    """Three blocks, float32 positions: the sums fit whatever the width is."""
    model = make_model(tmp_path / "model", hidden_size=32, num_hidden_layers=3, intermediate_size=48)
    changes = job(files, layers=[2], pool="last")
    assert cli("run", small.job("other", **changes, model={"path": str(model)}), "--out", tmp_path / "run")[0] == 0
    assert sums_of(tmp_path / "run")["weight"].shape == (3, 32)


# Labels that are guessed


def guessing(files: Mapping[str, Path], **changes: Any) -> dict[str, Any]:
    """The job with labels at one client only; the others guess."""
    wanted = job(files, guesses=2, **changes)
    for client in wanted["clients"][1:]:
        del client["prompt"], client["answer"]
    return wanted


def test_guesses_are_the_clearer_half_of_each_label_and_none_of_a_rare_one() -> None:
    head = Linear(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 9.0]]).double(), torch.zeros(3).double())
    states = torch.tensor([[3.0, 0], [1.0, 0], [2.0, 0], [5.0, 0], [4.0, 0], [-1.0, 0], [-2.0, 0], [0.0, 1.0]])
    guessed, chosen = guess(head, torch.tensor([4, 7, 9]), states)
    assert guessed.tolist() == [4, 4, 4, 4, 4, 7, 7, 9]
    assert chosen.tolist() == [True, False, False, True, True, False, False, False]


def test_clients_without_labels_guess_them(small: Small, files: Mapping[str, Path], tmp_path: Path) -> None:
    """Against sums of guesses that are made here, from the hidden states of the clients' records."""
    run = small.undisturbed(**guessing(files))
    center, scale = typical(Decoder(Checkpoint(small.model)), (-1,), 12, "0/0")
    features = Features((-1,), "mean", center, scale, None)

    def sums(states: Tensor, classes: Tensor) -> Moments:
        return Moments.over(features.of(states), classes, len(LABELS), True)

    def head(moments: Moments) -> tuple[Linear, Tensor]:
        linear, classes = solve(moments, "ridge", 0.1, LABELS)
        weight, bias = features.unfold(linear.weight, linear.bias)
        return Linear(weight.double(), bias.double()), classes

    labeled = known = sums(*pooled(small, files["ash"]))
    for _ in range(2):
        linear, classes = head(known)
        known = labeled
        for name in ("birch", "cedar"):
            states, _ = pooled(small, files[name])
            guessed, chosen = guess(linear, classes, states)
            known = known.plus(sums(states[chosen], guessed[chosen]))
    assert torch.equal(sums_of(run)["weight"], head(known)[0].weight.float())
    made = json.loads((run / "head.json").read_text())
    assert (made["unlabeled"], made["records"]) == (["birch", "cedar"], sum(SHARES["ash"]))
    assert made["guessed"] == dict(zip(LABELS, (known.counts - labeled.counts).tolist(), strict=True))
    assert sum(made["guessed"].values()) >= 9
    found = measurements(run)
    assert found[0, None, None, "head/test"] > 0.5
    assert found[0, None, None, "labeled/test"] > 0.5
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    assert "birch and cedar have no labels" in page.text
    plan = json.loads((run / "plan-0-head.json").read_text())["clients"]
    assert plan["birch"]["upload"] == 3 * plan["ash"]["upload"]
    secure = small.job("guess-secure", **guessing(files, privacy={"secure_aggregation": True, "min_group": 2}))
    status, _, err = cli("run", secure, "--out", tmp_path / "secure")
    assert status == 0, err
    assert (tmp_path / "secure" / "head" / "head.safetensors").read_bytes() == (run / "head" / "head.safetensors").read_bytes()


def test_guesses_are_made_by_one_owner_of_all_records_too(small: Small, files: Mapping[str, Path], tmp_path: Path) -> None:
    wanted = small.job("guess-centralized", **guessing(files, evaluate__centralized=True))
    status, _, err = cli("run", wanted, "--out", tmp_path / "run")
    assert status == 0, err
    assert json.loads((tmp_path / "run" / "centralized" / "head.json").read_text())["guessed"].keys() == set(LABELS)


@pytest.mark.parametrize("moment", [
    Moment("os.rename", "*/work/stage-0/guesses-1.safetensors", "cut"),
    Moment("os.rename", "*/work/stage-0/guesses-2.safetensors", "kill"),
])  # fmt: skip
def test_a_killed_run_that_guesses_goes_on_to_the_same_bits(
    small: Small, files: Mapping[str, Path], tmp_path: Path, moment: Moment
) -> None:
    killed("run", small.job("killed-guess", **guessing(files)), "--out", tmp_path / "run", "--quiet", moment=moment)
    assert cli("run", small.job("killed-guess", **guessing(files)), "--out", tmp_path / "run", "--resume")[0] == 0
    whole = small.undisturbed(**guessing(files))
    for name in ("head/head.safetensors", "head.json"):
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes()
    assert measurements(tmp_path / "run") == measurements(whole)


def test_guessing_needs_clients_with_labels_and_without(small: Small, files: Mapping[str, Path]) -> None:
    every = small.job("all-labels", **job(files, guesses=1))
    assert "stages.0.guesses: every client has labels (answer), so none are guessed; set it to 0" in complaint("plan", every)
    none = guessing(files)
    del none["clients"][0]["prompt"], none["clients"][0]["answer"]
    line = complaint("plan", small.job("no-labels-at-all", **none))
    assert "stages.0.guesses: no client has labels (answer), so none are guessed; give one of them prompt and answer" in line


@pytest.mark.parametrize("head", [
    {}, {WEIGHT: torch.zeros(2, 63), BIAS: torch.zeros(2)}, {WEIGHT: torch.zeros(2, 64), BIAS: torch.zeros(2).double()},
])  # fmt: skip
def test_a_client_refuses_a_head_of_another_shape(
    small: Small, files: Mapping[str, Path], tmp_path: Path, head: dict[str, Tensor]
) -> None:
    client = LocalClient("birch", tmp_path, small.model, None, (files["birch"],), None)
    request = SumGuesses(stage=0, exchange=1, classes=LABELS[:2], **fields(guesses=2))
    tensors = {CENTER: torch.zeros(64), SCALE: torch.ones(64), **head}
    with pytest.raises(FedgroveError, match="client 'birch': the head that came has another shape or dtype; refused"):
        serve(request.KIND, wire.pack(tensors, {"request": request.model_dump(mode="json")}), client, "cpu")
