"""The site decides, the job asks; of a fault nothing leaves but a code. None of this needs FLARE."""

from __future__ import annotations

import errno
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from fedgrove.client.handlers import HANDLERS, TEXTLESS

from fedgrove.deploy.flare import files
from fedgrove.deploy.flare.doctor import clock
from fedgrove.deploy.flare.files import Allow, Federation, SiteFile
from fedgrove.deploy.flare.site import STAGES, answer, keeps_to, refused
from fedgrove.engines import error_codes as faults
from fedgrove.engines.error_codes import Refusal
from fedgrove.errors import FedgroveError
from fedgrove.job.load import load_federated
from fedgrove.models.digest import digests, first_difference
from fedgrove.models.stream import Checkpoint
from fedgrove.rounds import wire
from small import Small, complaint, make_model

PRUNE = {"kind": "prune", "pruner": "wanda", "aggregation": "fedspallm", "samples": 16, "length": 512}
SUMS = {**PRUNE, "aggregation": "pooled", "epsilon": 4.0}
TUNE = {"kind": "tune", "method": "fedpipe", "aggregation": "flexlora", "length": 512, "steps": 4}


def terms(*stages: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"stages": list(stages), "clients": ["ash", "birch", "cedar"], "secure": False, "alone": False, **changes}


@pytest.mark.parametrize(
    ("allow", "wanted", "key"),
    [
        ({}, terms(PRUNE, TUNE), None),
        ({"stages": ("prune",)}, terms(PRUNE, TUNE), "allow.stages"),
        ({"methods": ("wanda", "fedspallm")}, terms(PRUNE), None),
        ({"methods": ("wanda", "fedspallm")}, terms(SUMS), "allow.methods"),
        ({"group": 4}, terms(PRUNE), "allow.group"),
        ({"group": 3}, terms(PRUNE, clients=["ash", "ash", "ash"]), "allow.group"),
        ({"secure": True}, terms(PRUNE), "allow.secure"),
        ({"secure": True}, terms(PRUNE, secure=True), None),
        ({"epsilon": 4.0}, terms(SUMS), None),
        ({"epsilon": 2.0}, terms(SUMS), "allow.epsilon"),
        ({"epsilon": 2.0}, terms(PRUNE), "allow.epsilon"),
        ({"epsilon": 4.0}, terms({**SUMS, "allocation": "owl"}), "allow.epsilon"),
        ({"alone": False}, terms(PRUNE, alone=True), "allow.alone"),
        ({"samples": 15}, terms(PRUNE), "allow.samples"),
    ],
)
def test_a_job_beyond_what_a_site_allows_is_refused_by_the_key(
    allow: dict[str, Any], wanted: dict[str, Any], key: str | None
) -> None:
    assert refused(Allow(**allow), wanted) == key


@pytest.mark.parametrize(
    ("kind", "ask", "word"),
    [
        ("prune", {"stage": 0, "pruner": "wanda", "aggregation": "fedspallm", "length": 512, "samples": 16}, None),
        ("prune", {"stage": 0, "pruner": "sparsegpt", "aggregation": "fedspallm"}, "pruner"),
        ("prune", {"stage": 0, "aggregation": "fedit"}, "aggregation"),
        ("prune", {"stage": 0, "length": 1024}, "length"),
        ("prune", {"stage": 1}, "kind"),
        ("prune", {"stage": 3}, "stage"),
        ("prune", {"stage": True}, "stage"),
        ("prune", {}, "stage"),
        ("pooled", {"stage": 0}, "kind"),
        ("pooled", {"stage": 2, "noise": {"epsilon": 4.0}, "products": []}, None),
        ("pooled", {"stage": 2, "noise": {"epsilon": 4.1}, "products": []}, "epsilon"),
        ("pooled", {"stage": 2, "noise": None, "products": []}, "epsilon"),
        ("pooled", {"stage": 2, "noise": {"epsilon": 4.0}, "products": ["x"]}, "products"),
        ("train", {"stage": 1, "length": 512, "settings": {"steps": 4}}, None),
        ("train", {"stage": 1, "settings": {"steps": 5}}, "steps"),
        ("train", {"stage": 0}, "kind"),
        ("evaluate", {"walk": {"stage": 0}}, "evaluate.alone"),
    ],
)
def test_an_ask_that_the_job_does_not_hold_is_refused(kind: str, ask: dict[str, Any], word: str | None) -> None:
    wanted = terms(PRUNE, TUNE, SUMS)
    if word is None:
        keeps_to(Allow(), wanted, kind, ask)
        return
    with pytest.raises(Refusal) as refusal:
        keeps_to(Allow(), wanted, kind, ask)
    assert (refusal.value.code, refusal.value.word) == ("terms", word)


def test_every_kind_of_ask_belongs_to_a_stage_or_holds_no_text() -> None:
    known = set().union(*STAGES.values()) | TEXTLESS | {"evaluate"}
    assert known == set(HANDLERS), "a new kind of ask: say in federation/site.py which stage may bring it"


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (RuntimeError("secret"), "RuntimeError in its handler; the trace is in its own log/site.log"),
        (FedgroveError("/secret/notes.txt: too short"), "FedgroveError in its handler"),
        (OSError(errno.ENOSPC, "full", "/secret"), "its disk is full"),
        (RuntimeError("secret: can't allocate memory"), "out of memory"),
        (MemoryError("secret"), "out of memory"),
        (Refusal("model", "block-0007"), "its model differs from the job's at block-0007"),
        (type("Sec ret\n", (Exception,), {})(), "Secret in its handler"),
    ],
)
def test_the_text_of_an_exception_stays_at_the_site(fault: Exception, says: str) -> None:
    travelled = faults.of(fault)
    assert "secret" not in travelled
    assert says in faults.told(travelled)


@pytest.mark.parametrize("sent", [None, "", "fault", "fault a b c", "unknown Error", "fault Err{word}", "fault E\nx"])
def test_what_is_no_code_of_ours_is_not_shown(sent: str | None) -> None:
    assert faults.told(sent) == "it answered with an error that is not one of fedgrove's"


def test_the_first_block_in_which_two_models_differ_is_named(small: Small, tmp_path: Path) -> None:
    mine = digests(Checkpoint(small.model), tmp_path / "digests.json")
    assert digests(Checkpoint(small.model), tmp_path / "digests.json") == mine
    assert sorted(mine) == ["block-0000", "block-0001", "ends", "tokenizer"]
    assert first_difference(mine, mine) is None
    other = digests(Checkpoint(make_model(tmp_path / "other", seed=1)))
    assert first_difference(mine, other) == "block-0000"
    assert first_difference(mine, {**mine, "tokenizer": "0"}) == "tokenizer"


def test_a_site_that_did_not_agree_answers_nothing(small: Small, tmp_path: Path) -> None:
    file = tmp_path / "site.toml"
    message = wire.pack({}, {"calibrations": []})
    assert answer(tmp_path, "run", "card", message) == (None, "site-file Refusal")
    file.write_text(f'data = "{small.texts["ash"]}"\n[models]\nm = "{small.model}"\n')
    assert answer(tmp_path, "run", "card", message) == (None, "joined Refusal")
    assert answer(tmp_path, "../run", "card", message) == (None, "terms Refusal run")


@pytest.mark.parametrize(
    ("behind", "ok", "says"),
    [
        (0, True, "like the server's when a job"),
        (7200, False, "120 minutes behind the"),
        (-7200, False, "120 minutes ahead of the"),
    ],
)
def test_a_clock_that_is_wrong_is_seen_when_a_job_is_asked_for(
    behind: int, ok: bool, says: str, small: Small, tmp_path: Path
) -> None:
    assert "not known before the first job" in clock(tmp_path, datetime.now(UTC)).text
    (tmp_path / "site.toml").write_text(f'data = "{small.texts["ash"]}"\n[models]\n')
    answer(tmp_path, "run", "join", wire.pack({}, terms(PRUNE, clock=time.time() + behind, clients=["ash"])))
    check = clock(tmp_path, datetime.now(UTC))
    assert (check.ok, check.text.startswith(says)) == (ok, True), check


@pytest.mark.parametrize(
    ("text", "kind", "says"),
    [
        ('name = "f"\nsites = []\noperators = []', Federation, "sites: "),
        (
            'name = "f"\n[[sites]]\nname = "a"\n[[sites]]\nname = "A"\n[[operators]]\nname = "a@b.org"',
            Federation,
            "is given twice",
        ),
        ('name = "f"\n[[sites]]\nname = "a/b"\n[[operators]]\nname = "a@b.org"', Federation, "sites.0.name"),
        ("data = []\n[models]", SiteFile, "data: write where this site's text lies"),
        ('data = "nowhere.txt"\n[models]', SiteFile, "data.0: no such file"),
        ("data = []\n[models]\n[allow]\nsecret = 1", SiteFile, "write where this site"),
    ],
)
def test_a_mistake_in_a_file_is_named_by_its_key(text: str, kind: type[files.Part], says: str, tmp_path: Path) -> None:
    (tmp_path / "file.toml").write_text(text)
    with pytest.raises(FedgroveError, match=says):
        files.read(tmp_path / "file.toml", kind)


def test_a_job_for_a_federation_names_sites_and_nothing_of_theirs(small: Small) -> None:
    job = load_federated(small.job(clients=None, model__path="any-name"), sites=["ash", "birch"])
    assert [client.name for client in job.clients] == ["ash", "birch"]
    assert job.model.path == "any-name"
    with pytest.raises(FedgroveError, match=r"clients\.0\.data: in a federation the site's own file says that"):
        load_federated(small.job(), sites=["ash", "birch"])
    with pytest.raises(FedgroveError, match="'dogwood' is no site; there are ash, birch"):
        load_federated(small.job(clients=[{"name": "dogwood"}]), sites=["ash", "birch"])


def test_a_folder_that_is_no_kit_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("nvflare")
    assert "this is no kit" in complaint("federation", "start", tmp_path)
    assert "this is no kit" in complaint("federation", "doctor", tmp_path)
    assert "federation.toml: no such file" in complaint("federation", "kits", tmp_path / "federation.toml")
