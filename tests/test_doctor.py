"""The doctor: it finds what a run would stumble over, says the remedy, and shows a client's text to nobody else."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

from fedgrove import doctor
from fedgrove.client.local_client import LocalClient
from small import Small, cli


def checks(*args: object) -> tuple[int, dict[str, dict[str, Any]]]:
    status, out, _ = cli("doctor", *args, "--json")
    return status, {check["name"]: check for check in json.loads(out)}


def test_a_job_that_would_run_is_found_well(small: Small, tmp_path: Path) -> None:
    status, found = checks(small.job(), "--out", tmp_path / "runs")
    assert status == 0
    assert all(check["ok"] and not check["remedy"] for check in found.values())
    assert {"versions", "devices", "memory", "disk", "ports", "model readable", "tokenizer", "room for the run"} <= found.keys()
    first = " ".join(small.texts["ash"].read_text().split())
    assert first.startswith(" ".join(found["ash: ash.txt"]["sample"].removesuffix("…").split()))
    assert "3 clients" in found["stage 0 (prune)"]["text"]
    assert "prune with wanda" in found["could hold"]["text"]
    assert not (tmp_path / "runs").exists(), "it leaves nothing behind"
    assert cli("doctor", small.job())[1].count("ok  ") == len(found)


def test_the_first_record_is_shown_as_the_model_will_see_it(small: Small, tmp_path: Path) -> None:
    file = tmp_path / "notes.jsonl"
    lines = [{"q": "Why?", "a": ""}, *({"q": "Who?", "a": f"The ash, for the {i}th time."} for i in range(60))]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    owner = {"name": "ash", "data": str(file), "prompt": "Q: {q}\n", "answer": "A: {a}"}
    _, found = checks(small.job("shown", clients=[owner]))
    assert found["ash: notes.jsonl"]["sample"] == "Q: Why?\nA: "
    assert found["ash: notes.jsonl"]["text"].startswith("61 records, ")


def test_what_is_wrong_is_named_with_its_remedy(small: Small, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"note": "one"}\n{"notes": "two"}\n')
    spec = small.spec()["clients"]
    spec[0] = {"name": "ash", "data": str(file), "text": "{note}"}
    status, found = checks(small.job("wrong", clients=spec, model__path=str(tmp_path / "nowhere")))
    assert status == 2
    assert not found["model"]["ok"]
    assert "model.path" in found["model"]["remedy"]
    assert "line 2: no field 'note'" in found["ash: a.jsonl"]["text"] + found["ash: a.jsonl"]["remedy"]
    assert found["birch: birch.txt"]["ok"], "one fault hides no other"
    status, out, _ = cli("doctor", tmp_path / "no.toml")
    assert (status, out) == (2, "")


def test_a_plan_that_cannot_be_is_a_check_too(small: Small) -> None:
    status, found = checks(small.job(), "--set", "clients.0.memory=1MiB")
    assert status == 2
    assert "client 'ash': one block needs" in found["plan"]["text"]
    assert "leave the client out" in found["plan"]["remedy"]


def test_ports_are_tried(small: Small) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, found = checks("--listen", port, "--connect", f"127.0.0.1:{port}")
        assert status == 2
        assert "in use by another program" in found["ports"]["text"]
        assert found[f"reach 127.0.0.1:{port}"]["ok"]
    assert cli("doctor", "--listen", "99999")[0] == 2
    _, found = checks("--connect", f"127.0.0.1:{port}", "--connect", "here")
    assert "outgoing" in found[f"reach 127.0.0.1:{port}"]["remedy"]
    assert "HOST:PORT" in found["reach here"]["text"]


def test_a_site_keeps_its_text_out_of_what_may_be_sent(small: Small, tmp_path: Path) -> None:
    client = LocalClient("ash", tmp_path, small.model, None, (small.texts["ash"],), None, {"memory": 2**22})
    looked_at = doctor.site(client)
    words = set(small.texts["ash"].read_text().split()[:40])
    for check in looked_at:
        assert len(words & set((check.text + check.remedy).split())) <= 3, check
    assert any(check.sample for check in looked_at)
    assert looked_at[-1].text.startswith("in 4.0 MiB: nothing"), "what the client allows, not what the machine has"
    assert not looked_at[-1].ok


def test_a_check_tells_what_is_wrong_apart_from_the_remedy(tmp_path: Path) -> None:
    (check,) = doctor.model(tmp_path)
    assert (check.ok, check.text) == (False, f"model: {tmp_path} has no config.json")
    assert check.remedy == "give a Hugging Face model directory"
    (check,) = doctor.text("ash", tmp_path / "nowhere.txt", {"text": "{text}"})
    assert (check.ok, check.text, check.remedy) == (False, f"{tmp_path}/nowhere.txt: no such file or folder", "")


def test_held_out_text_is_read_by_the_templates_of_what_is_measured_on_it(small: Small, tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text('{"q": "Which tree?", "a": "ash"}\n')
    data = [{"name": "trees", "path": str(file), "measure": "accuracy", "prompt": "{q}", "answer": " {a}"}]
    status, found = checks(small.job("answers", evaluate={"data": data}))
    assert found["held-out trees: questions.jsonl"]["sample"] == "Which tree? ash"
    assert status == 0
