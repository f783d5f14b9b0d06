"""Every mistake that a user makes is one line that names the key, file or client; nothing half-written is left."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fedgrove import run as server
from fedgrove.engines.local import LocalEngine
from fedgrove.job.load import load
from fedgrove.job.tables import Job
from fedgrove.rounds import wire
from fedgrove.stages.prune.exchanges.block import PruneBlock
from small import LENGTH, SAMPLES, Moment, Small, alive, cli, complaint, free, make_model, one_line, process, result, wait_until

Tell = Callable[..., None]  # see small.faulty
BYTES = b"\xff\xfe not UTF-8"


def refused(small: Small, tmp_path: Path, *words: str, name: str = "bad", **changes: object) -> str:
    """Plans and runs a job: both must refuse it in the same words, and the mended job may have the run's folder."""
    job = small.job(name, **changes)
    planned = complaint("plan", job)
    line = complaint("run", job, "--out", tmp_path / "run")
    assert line == planned
    assert {file.name for file in tmp_path.glob("run/*")} <= {"job.toml", "ledger.jsonl", "clients"}
    for word in words:
        assert word in line, line
    return line


# The job file


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"clients__0__data": "nowhere.txt"}, ("clients.0.data", "no such file or folder", "nowhere.txt")),
        ({"evaluate__data": ["nowhere.txt"]}, ("evaluate.data.0.path", "no such file")),
        ({"stages__0__sparsity": 1.2}, ("stages.0.sparsity", "less than 1", "1.2")),
        ({"stages__0__sparsity": float("nan")}, ("stages.0.sparsity",)),
        ({"stages__0__sparsity": "0.5"}, ("stages.0.sparsity", "write a number, not '0.5'")),
        ({"stages__0__samples": True}, ("stages.0.samples", "write a whole number, not True")),
        ({"stages__0__pattern": "2:4"}, ("stages.0", "one of sparsity", "pattern")),
        ({"stages__0__sparsity": None}, ("stages.0", "one of sparsity", "pattern")),
        ({"stages__0__sparsity": None, "stages__0__pattern": "4:2"}, ("stages.0", "0 < N < M")),
        ({"stages__0__sparsity": None, "stages__0__pattern": "half"}, ("stages.0.pattern", "half")),
        ({"stages__0__pruner": "sparsegtp"}, ("stages.0.pruner", "magnitude, sparsegpt, wanda")),
        ({"stages__0__aggregation": "vote"}, ("stages.0.aggregation", "fedavg, fedprllm, fedspallm, pooled")),
        ({"stages__0__kind": "prun"}, ("stages.0.kind", "prune")),
        ({"stages__0__shrink": 0.5, "stages__0__aggregation": "fedavg"}, ("stages.0", "shrink", "fedspallm")),
        ({"stages__0__sample": 3}, ("stages.0.sample", "no such key", "did you mean samples?")),
        ({"stages__0__Sparsity": 0.5}, ("stages.0.Sparsity", "did you mean sparsity?")),
        ({"stages__0__channels": 0.5}, ("stages.0.channels", 'it belongs to kind = "structured"')),
        ({"stages__0__layers": {"sample": 0.5, "covers": 2}}, ("stages.0.layers.covers", "did you mean cover?")),
        ({"stages__0__layers": "some"}, ("stages.0.layers", "'all', or write a table, not 'some'")),
        ({"stages__0__owl_m": 3.0}, ("owl_m", "without allocation", "leave it out")),
        ({"stages__0__delta": 1e-3}, ("delta", "without epsilon", "leave it out")),
        ({"stages__0": {"kind": "structured", "contiguous": True}}, ("contiguous", "without depth", "leave it out")),
        ({"stages__0": {"kind": "structured", "depth": 0.5, "score": "taylor"}}, ("score", "without channels or heads")),
        ({"stages__0": {"kind": "tune", "method": "lora", "deadline": 5.0}}, ("deadline", 'planner "uniform"', "leave it out")),
        ({"stages__0": {"kind": "tune", "dp_clip": 0.5}}, ("dp_clip", "without epsilon; set epsilon as well")),
        ({"stages__0": {"kind": "head", "labels": ["a", "b"], "head": "rigde"}}, ("stages.0.head", "ridge")),
        ({"stages__0__rounds": 0}, ("stages.0.rounds", "greater than or equal to 1")),
        ({"stages__0__layers": {"sample": 0.5, "cover": 4}}, ("stages.0.layers.cover", "there are 3")),
        ({"stages__0__layers": {"sample": 0.5}, "evaluate__alone": True}, ("evaluate.alone", "set it to false")),
        ({"clients": []}, ("clients", "at least 1")),
        ({"stages": []}, ("stages", "at least 1")),
        ({"clients__1__name": "ash"}, ("clients", "'ash' is given twice")),
        ({"clients__1__name": "Ash"}, ("clients", "given twice, in whatever case; rename one")),
        ({"clients__0__data": ""}, ("clients.0.data", "it is empty; name a file or a folder")),
        ({"clients__0__data": 3}, ("clients.0.data", "write a path, in quotes, not 3")),
        ({"clients__0__memory": "."}, ("clients.0.memory", "8GiB")),
        ({"clients__0__speed": "fast"}, ("clients.0.speed", "a number", "'measure', not 'fast'")),
        ({"clients__0__prompt": "{note", "clients__0__answer": "{text}"}, ("clients.0.prompt", "{note is never closed")),
        ({"evaluate__data": "held-0.txt"}, ("evaluate.data", "write a list, in brackets, not 'held-0.txt'")),
        ({"clients__1__name": "../ash"}, ("clients.1.name", "../ash")),
        ({"clients__1__memory": "8 apples"}, ("clients.1.memory", "8GiB")),
        ({"clients__1__uplink": "fast"}, ("clients.1.uplink", "20Mbit")),
        ({"clients__0__text": "{}"}, ("clients.0.text", "{}")),
        ({"clients__0__text": "{note"}, ("clients.0.text",)),
        ({"clients__0__text": "note"}, ("clients.0.text", "names no field", "{text}")),
        ({"rounds__quorum": 4}, ("rounds.quorum", "there are 3 clients")),
        ({"model__path": None}, ("model.path", "required")),
        ({"model__dtype": "int4"}, ("model.dtype", "float32")),
        ({"evaluate": {"data": ["held-0.txt", "./held-0.txt"]}}, ("evaluate.data", "'held-0' is given twice")),
    ],
    ids=lambda value: " ".join(map(str, value))[:60] if isinstance(value, Mapping) else "",
)
def test_a_bad_value_names_its_key(small: Small, tmp_path: Path, changes: dict[str, object], words: tuple[str, ...]) -> None:
    refused(small, tmp_path, "bad.toml", *words, **changes)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("stages.0.sparsity", ("--set", "KEY=VALUE")),
        ("=0.5", ("--set", "KEY=VALUE")),
        ("stages.1.sparsity=0.5", ("--set stages.1.sparsity", "'1'")),
        ("stagse.0.sparsity=0.5", ("--set stagse.0.sparsity", "'stagse'")),
        ("stages.x=0.5", ("--set stages.x", "'x'")),
        ("stages.²=0.5", ("--set stages.²", "'²'")),
        ("stages.0.sparsity=much", ("stages.0.sparsity", "much")),
        ("stages.0.sparsity.x=1", ("--set stages.0.sparsity.x",)),
        ("seed=1\nname='x'", ("seed",)),
    ],
)
def test_a_bad_set_is_named(small: Small, change: str, words: tuple[str, ...]) -> None:
    line = complaint("plan", small.job("set"), "--set", change)
    for word in words:
        assert word in line


def test_a_job_that_is_no_job_is_named(tmp_path: Path) -> None:
    assert "nothing.toml: no such job file; `fedgrove init` writes one" in complaint("run", tmp_path / "nothing.toml")
    file = tmp_path / "job.toml"
    file.write_text("name = \n")
    assert f"{file}: not TOML" in complaint("plan", file)
    file.write_bytes(BYTES)
    assert f"{file}: not TOML" in complaint("plan", file)
    assert "no such job file" in complaint("run", tmp_path)
    file.write_text("name = 'a'\nclients = 3\nmodel = 4\nstages = 'x'\n")
    assert f"{file}: " in complaint("run", file)


def test_init_does_not_overwrite(tmp_path: Path) -> None:
    assert cli("init", tmp_path)[0] == 0
    (tmp_path / "job.toml").write_text("mine")
    assert "job.toml exists already; edit it, or name another folder" in complaint("init", tmp_path)
    assert (tmp_path / "job.toml").read_text() == "mine"


# A client's data


def test_a_field_that_the_data_lacks_is_named(small: Small, tmp_path: Path) -> None:
    rows = [{"question": "Who?", "answer": "She. " * 50}, {"question": "When?"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    refused(
        small, tmp_path, "client 'ash'", "a.jsonl, line 2", "no field 'answer'", "it has: question", "Fix the template",
        clients__0__data=str(tmp_path / "a.jsonl"), clients__0__text="{question}\n{answer}",
    )  # fmt: skip


def test_a_csv_without_the_field_is_named(small: Small, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,notes\n1,hello\n")
    refused(
        small, tmp_path, "client 'ash'", "a.csv, line 2", "no field 'note'", "it has: id, notes",
        clients__0__data=str(tmp_path / "a.csv"), clients__0__text="{note}",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", ("a.txt: it holds no text",)),
        ("a.txt", b"\n \n", ("a.txt: it holds no text",)),
        ("a.txt", b"too few words", ("a.txt", "tokens, but 3 windows of 16 need 48; lower samples or length, or add text")),
        ("a.txt", BYTES, ("a.txt: not UTF-8", "convert it")),
        ("a.jsonl", b'{"text": "fine"}\n{"text": "broken\n', ("a.jsonl, line 2: not JSON", "one object a line")),
        ("a.jsonl", b'["a", "list"]\n', ("a.jsonl, record 1: not a JSON object",)),
        ("a.jsonl", b"", ("a.jsonl: it holds no text",)),
        ("a.jsonl", b'{"text": "' + BYTES + b'"}\n', ("a.jsonl: not UTF-8",)),
        ("a.json", b'{\n"text": "pretty"\n}', ("a.json, line 1: the object that begins here goes on in the next line",)),
        ("a.csv", b"text\n", ("a.csv: it holds no text",)),
        ("a.csv", b'text\n"' + b"x" * 200_000 + b"\nmore\n", ("a.csv, line 2", "opens a double quote and never closes it")),
        ("a.parquet", b"PAR1 not really", ("a.parquet: not a parquet file",)),
        ("a.docx", b"PK", ("a.docx: unknown kind of file; use .csv, .json, .jsonl, .md, .ndjson, .parquet",)),
    ],
    ids=lambda value: value[:12].decode(errors="replace") if isinstance(value, bytes) else "",
)
def test_data_that_cannot_be_used_is_named(
    small: Small, tmp_path: Path, name: str, content: bytes, words: tuple[str, ...]
) -> None:
    (tmp_path / name).write_bytes(content)
    refused(small, tmp_path, "client 'birch'", *words, clients__1__data=str(tmp_path / name))


def test_a_file_that_may_not_be_read_is_named(small: Small, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("secret " * 100)
    file.chmod(0)
    if os.access(file, os.R_OK):
        pytest.skip("this user may read everything")
    refused(small, tmp_path, "client 'birch'", "a.txt", "Permission denied", clients__1__data=str(file))


def test_a_held_out_text_that_is_too_short_is_named(small: Small, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("")
    line = complaint("run", small.job("bad", evaluate__data=[str(tmp_path / "short.txt")]), "--out", tmp_path / "run")
    assert "short.txt: it holds fewer than two tokens of text" in line


def test_a_run_that_was_refused_gives_its_folder_to_the_mended_job(small: Small, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("too few words")
    refused(small, tmp_path, "client 'ash'", clients__0__data=str(tmp_path / "a.txt"))
    assert cli("run", small.job(), "--out", tmp_path / "run")[0] == 0
    assert result(tmp_path / "run") == result(small.undisturbed())
    assert (tmp_path / "run" / "ledger.jsonl").read_bytes() == (small.undisturbed() / "ledger.jsonl").read_bytes()


def test_a_folder_with_a_job_file_of_its_own_is_not_taken(small: Small, tmp_path: Path) -> None:
    mine = tmp_path / "job.toml"
    mine.write_bytes(small.job().read_bytes())
    assert "a run is there already" in complaint("run", mine, "--out", tmp_path)
    assert "the job differs" in complaint("run", mine, "--out", tmp_path, "--resume")
    assert mine.read_bytes() == small.job().read_bytes()


# The model


def test_a_pattern_that_does_not_fit_is_named(small: Small, tmp_path: Path) -> None:
    model = make_model(tmp_path / "odd", intermediate_size=70)
    changes = {"model__path": str(model), "stages__0__sparsity": None, "stages__0__pattern": "2:4"}
    refused(small, tmp_path, 'pattern "2:4"', "mlp.down_proj has 70 inputs, not a multiple of 4", "choose another", **changes)


def test_a_model_without_decoder_blocks_is_named(small: Small, tmp_path: Path) -> None:
    model = make_model(tmp_path / "empty", num_hidden_layers=0)
    refused(small, tmp_path, "model: no decoder blocks found in LlamaForCausalLM", model__path=str(model))


def test_a_model_that_is_no_language_model_is_named(small: Small, tmp_path: Path) -> None:
    model = make_model(tmp_path / "t5")
    (model / "config.json").write_text('{"model_type": "t5"}')
    refused(small, tmp_path, "t5", "encoder-decoder", model__path=str(model))
    (model / "config.json").write_text('{"model_type": "from-the-future"}')
    refused(small, tmp_path, "config.json", "from-the-future", model__path=str(model))
    (model / "config.json").unlink()
    refused(small, tmp_path, "has no config.json", model__path=str(model))


def test_pickled_weights_are_not_read(small: Small, tmp_path: Path) -> None:
    model = make_model(tmp_path / "pickled")
    (model / "model.safetensors").unlink()
    torch.save({"model.norm.weight": torch.ones(64)}, model / "pytorch_model.bin")
    refused(small, tmp_path, "has no .safetensors file; convert it", "can run code", model__path=str(model))


def test_damaged_weights_are_named(small: Small, tmp_path: Path) -> None:
    model = make_model(tmp_path / "damaged")
    os.truncate(model / "model.safetensors", 5000)
    refused(small, tmp_path, "model.safetensors is damaged", "copy it again", model__path=str(model))


def test_a_model_without_a_tokenizer_is_named(small: Small, tmp_path: Path) -> None:
    model = make_model(tmp_path / "mute")
    for file in model.glob("tokenizer*"):
        file.unlink()
    refused(small, tmp_path, "mute has no tokenizer", model__path=str(model))


@pytest.mark.parametrize("path", ["no/where/at-all", "nobody-at-all/no-such-model"])
def test_a_model_that_does_not_exist_is_named(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    refused(small, tmp_path, f"model.path: {path} is neither a directory here nor an accessible model", model__path=path)


# Folders


def test_an_out_that_cannot_be_used_is_named(small: Small, tmp_path: Path) -> None:
    job = small.job()
    file = tmp_path / "file"
    file.write_text("mine")
    assert f"--out {file}: this is a file; name a folder" in complaint("run", job, "--out", file)
    assert "file" in complaint("run", job, "--out", file / "below")
    assert "--out /dev/null: nothing can be written there" in complaint("run", job, "--out", "/dev/null")
    assert f"{file}: this is a file; name a folder" in complaint("init", file)
    assert f"--out {tmp_path}: the folder is not empty" in complaint("run", job, "--out", tmp_path)
    assert "the folder is not empty" in complaint("run", job, "--out", tmp_path, "--resume")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    done = small.undisturbed()
    assert f"--out {done}: a run is there already; continue it with --resume" in complaint("run", job, "--out", done)


def test_the_demo_does_not_overwrite_a_run(small: Small) -> None:
    done = small.undisturbed()
    assert "a run is there already; continue it with --resume" in complaint("demo", "--out", done)
    assert "--resume: the job differs" in complaint("demo", "--out", done, "--resume")


def test_another_job_does_not_resume_a_run(small: Small) -> None:
    done = small.undisturbed()
    before = result(done)
    line = complaint("run", small.job(), "--out", done, "--resume", "--set", "stages.0.sparsity=0.6")
    assert f"--resume: the job differs from {done / 'job.toml'} in stages.0.sparsity; run that one" in line
    assert result(done) == before


def test_two_processes_do_not_share_a_run_folder(small: Small, tmp_path: Path) -> None:
    from fedgrove.runfolder import RunFolder

    job = small.job()
    first = RunFolder(tmp_path / "run", load(job))
    try:
        status, out, err = process("run", job, "--out", tmp_path / "run", "--resume", "--quiet")
    finally:
        first.close()
    assert "another process is running there; wait for it or name another folder" in one_line(status, out, err)


def test_a_run_that_has_not_ended_is_not_shown_or_given_away(small: Small, tmp_path: Path) -> None:
    out = tmp_path / "run"
    status, _, _ = process("run", small.job(), "--out", out, moment=Moment("os.rename", "*/model"))
    assert status == -signal.SIGKILL
    for command in (("export", out, "--to", "packed"), ("report", out), ("evaluate", out, "--data", small.texts["held-0"])):
        line = complaint(*command)
        assert f"{out}: this run has not ended; continue it: fedgrove run {out}" in line
        assert "--resume" in line
    assert not (out / "packed").exists()
    assert not (out / "report.html").exists()


def test_commands_on_what_is_not_there_say_so(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    nothing = tmp_path / "nothing"
    assert f"{nothing}: no such folder" in complaint("export", nothing, "--to", "hf")
    assert f"{nothing}: no run folder" in complaint("report", nothing)
    assert "neither a directory here" in complaint("evaluate", nothing, "--data", small.texts["ash"])
    assert f"{nothing}: no such file" in complaint("evaluate", small.model, "--data", nothing)
    assert "exists already" in complaint("export", small.model, "--to", "hf", "--out", tmp_path)
    tmp_path.joinpath("empty").mkdir()
    assert "has no config.json" in complaint("export", tmp_path / "empty", "--to", "packed")


def test_an_option_that_has_no_effect_is_refused(small: Small, tmp_path: Path) -> None:
    run, text = small.undisturbed(), small.texts["held-0"]
    for option in (("--length", 16), ("--text", "{note}")):
        assert f"{option[0]}: it belongs to --data" in complaint("export", run, "--to", "hf", "--out", tmp_path / "x", *option)
    line = complaint("export", run, "--to", "hf", "--out", tmp_path / "x", "--data", text, "--no-measure")
    assert "--no-measure: nothing would be measured" in line
    assert "--out: the page of one run is RUN/report.html" in complaint("report", run, "--out", tmp_path / "page.html")
    pair = ("--prompt", "{a}", "--answer", "{b}")
    assert "--prompt: --measure perplexity does not use it" in complaint("evaluate", run, "--data", text, *pair)
    line = complaint("evaluate", run, "--data", text, *pair, "--measure", "accuracy", "--text", "{note}")
    assert "--text: --measure accuracy does not use it" in line
    assert not list(tmp_path.iterdir())


def test_a_held_out_text_bears_the_name_of_its_file_as_far_as_a_name_goes(small: Small, tmp_path: Path) -> None:
    names = {"Ärzte an Bord.txt": "Arzte-an-Bord", "本.txt": "text", "-a-.txt": "a"}
    for file in names:
        (tmp_path / file).write_text("a tree")
    job = load(small.job("named", evaluate__data=[str(tmp_path / file) for file in names]))
    assert [text.name for text in job.evaluate.data] == list(names.values())


def test_a_template_on_the_command_line_is_checked_as_one_in_a_job(small: Small) -> None:
    line = complaint("evaluate", small.model, "--data", small.texts["held-0"], "--text", "{note")
    assert line == "text '{note': the field {note is never closed; write {{ for a brace of the text"


# What happens in a round


FULL = {
    "the job": Moment("open", "*/job.toml.partial", "full"),
    "the ledger": Moment("open", "*/ledger.jsonl", "full", 8),
    "hidden states": Moment("open", "*/clients/birch/*/0001.partial", "full"),
    "a client's own block": Moment("open", "*/clients/cedar/alone/*.partial", "full"),
    "a finished block": Moment("open", "*/round-0/block-0001.safetensors.partial", "full"),
    "a measurement": Moment("open", "*/metrics.jsonl", "full", 4),
    "pruning.json": Moment("open", "*/pruning.json.partial", "full"),
    "the model": Moment("open", "*/model.partial/model.safetensors", "full"),
}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("moment", FULL.values(), ids=FULL.keys())
def test_a_full_disk_is_named_and_the_run_resumes(small: Small, tmp_path: Path, moment: Moment) -> None:
    changes = {"evaluate__alone": "/alone/" in moment.path}
    out, job = tmp_path / "run", small.job(**changes)
    line = one_line(*process("run", job, "--out", out, "--quiet", moment=moment))
    assert "disk is full" in line or "No space left on device" in line
    assert "--resume" in line
    if "/clients/" in moment.path:
        assert f"client '{moment.path.split('/')[2]}'" in line
    assert not (out / "model").exists()
    free(out)
    assert cli("run", job, "--out", out, "--resume")[0] == 0
    assert result(out) == result(small.undisturbed(**changes))


INTERRUPTED = {
    "in a client's work": Moment("open", "*/clients/birch/*/0001.partial", "interrupt"),
    "while a block is written": Moment("os.rename", "*/round-0/block-0000.safetensors", "interrupt"),
    "while the model is written": Moment("open", "*/model.partial/model.safetensors", "interrupt"),
}


@pytest.mark.parametrize("moment", INTERRUPTED.values(), ids=INTERRUPTED.keys())
def test_an_interrupted_run_says_so_and_resumes(small: Small, tmp_path: Path, moment: Moment) -> None:
    out, job = tmp_path / "run", small.job()
    line = one_line(*process("run", job, "--out", out, "--quiet", moment=moment), status=130)
    assert line == "interrupted; a run continues with --resume"
    assert not (out / "model").exists()
    assert cli("run", job, "--out", out, "--resume")[0] == 0
    assert result(out) == result(small.undisturbed())


def test_ctrl_c_at_a_terminal_ends_the_run_and_its_workers(small: Small, tmp_path: Path, faulty: Tell) -> None:
    """Ctrl-C reaches the whole process group, while clients work."""
    out = tmp_path / "run"
    job = small.job(stages__0__pruner="faulty", evaluate={})
    faulty("hang")
    command = ("run", job, "--out", out, "--workers", "2", "--threads", "1", "--quiet")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(process, *command, env={"PYTHONPATH": os.environ["PYTHONPATH"]}, fork_workers=True)
        wait_until((tmp_path / "hangs").exists)
        worker = int((tmp_path / "hangs").read_text())
        os.killpg(os.getpgid(worker), signal.SIGINT)
        ended = running.result(timeout=60)
    assert one_line(*ended, status=130) == "interrupted; a run continues with --resume"
    wait_until(lambda: not alive(worker))
    assert not (out / "model").exists()
    faulty("nothing")
    assert cli("run", job, "--out", out, "--resume")[0] == 0


def test_a_client_that_raises_is_named(small: Small, tmp_path: Path, faulty: Tell) -> None:
    odd = {"stages__0__pruner": "faulty", "clients__1__samples": SAMPLES + 1}
    out, job = tmp_path / "run", small.job(**odd)
    faulty("raise", (SAMPLES + 1) * LENGTH)
    line = complaint("run", job, "--out", out)
    log = out / "clients" / "birch" / "error.log"
    assert line.startswith(
        f"client 'birch': RuntimeError in its handler: the handler fails; the trace is in {log} (2 of 3 clients responded"
    )
    assert "the handler fails" in log.read_text()
    assert not (out / "model").exists()
    faulty("nothing")
    assert cli("run", job, "--out", out, "--resume")[0] == 0
    undisturbed = tmp_path / "undisturbed"
    assert cli("run", job, "--out", undisturbed)[0] == 0
    assert result(out) == result(undisturbed)


Change = Callable[[dict[str, torch.Tensor], wire.Info], object]
Q = "self_attn.q_proj"


def _not_a_number(tensors: dict[str, torch.Tensor], info: wire.Info) -> None:
    mask = tensors[f"weight/{Q}"]
    tensors[f"change/{Q}"].view(-1)[int(mask.view(-1).nonzero()[0])] = float("nan")


def _denser(tensors: dict[str, torch.Tensor], info: wire.Info) -> None:
    mask = tensors[f"weight/{Q}"].view(-1)
    mask[(~mask).nonzero()[0]] = True


BAD_REPLIES: dict[str, tuple[Change, str]] = {
    "NaN": (_not_a_number, f"change/{Q} holds NaN or infinity"),
    "another shape": (
        lambda t, _: t.update({f"change/{Q}": t[f"change/{Q}"][:32], f"weight/{Q}": t[f"weight/{Q}"][:32]}),
        f"change/{Q} has shape [32, 64], not [64, 64]",
    ),
    "another dtype": (
        lambda t, _: t.update({f"change/{Q}": t[f"change/{Q}"].float()}),
        f"change/{Q} has dtype float32, not bfloat16",
    ),
    "a tensor less": (lambda t, _: (t.pop(f"change/{Q}"), t.pop(f"weight/{Q}")), f"change/{Q} is missing"),
    "a tensor more": (lambda t, _: t.update({"change/lm_head": torch.ones(2)}), "'change/lm_head' was not requested"),
    "another sparsity": (_denser, f"weight/{Q} prunes 2047 of 4096 weights, not 0.5 of them"),
}


@contextlib.contextmanager
def tampered(monkeypatch: pytest.MonkeyPatch, change: Callable[[bytes], bytes]) -> Iterator[None]:
    """In this block, what birch answers about the second block is changed on its way."""

    class Tampered(LocalEngine):
        def request(
            self, kind: str, messages: Mapping[str, bytes], timeout: float | None = None, largest: int | None = None
        ) -> Iterator[tuple[str, bytes | None, str | None]]:
            self.rounds = getattr(self, "rounds", 0) + (kind == PruneBlock.KIND)
            for client, answer, error in super().request(kind, messages, timeout):
                if kind == PruneBlock.KIND and client == "birch" and self.rounds == 2 and answer is not None:
                    answer = change(answer)
                yield client, answer, error

    def engine(job: Job, folder: Path, workers: int = 0) -> LocalEngine:
        return Tampered(server.local_clients(job, server.open_model(job.model), folder), workers)

    with monkeypatch.context() as patch:
        patch.setattr("fedgrove.api.local_engine", engine)
        yield


@pytest.mark.parametrize(("change", "what"), BAD_REPLIES.values(), ids=BAD_REPLIES.keys())
def test_a_bad_reply_is_refused(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Change, what: str
) -> None:
    def changed(answer: bytes) -> bytes:
        tensors, info = wire.unpack(answer)
        change(tensors, info)
        return wire.pack(tensors, info)

    check_refused_and_resumed(small, tmp_path / "run", monkeypatch, changed, what)


@pytest.mark.parametrize(
    "change",
    [
        lambda answer: answer[:-7],
        lambda answer: answer[: len(answer) // 2] + b"\0" * 64 + answer[len(answer) // 2 + 64 :],
        lambda answer: b"",
        lambda answer: b"\xff" * 64,
    ],
    ids=["cut", "overwritten", "empty", "noise"],
)
def test_damaged_bytes_are_refused(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[bytes], bytes]
) -> None:
    check_refused_and_resumed(small, tmp_path / "run", monkeypatch, change, "")


def check_refused_and_resumed(
    small: Small, out: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[bytes], bytes], what: str
) -> None:
    job = small.job()
    with tampered(monkeypatch, change):
        line = complaint("run", job, "--out", out)
    assert line.startswith(f"client 'birch': its response was refused: {what}")
    assert not (out / "model").exists()
    assert [file.name for file in (out / "work").rglob("*.safetensors")] == ["block-0000.safetensors"]
    assert cli("run", job, "--out", out, "--resume")[0] == 0
    assert result(out) == result(small.undisturbed())
