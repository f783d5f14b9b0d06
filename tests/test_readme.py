"""Every command of the README works as it stands, in order, in a folder with the files that it speaks of."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedgrove.api import run
from fedgrove.cli import app
from fedgrove.job.load import load
from small import Small, make_model

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DEMO = ROOT / "src" / "fedgrove" / "demo"
POOL = {
    "kind": "tune", "method": "lora", "rounds": 2, "steps": 1, "length": 16, "batches": [1], "ranks": [2], "bits": [32],
    "pool": {"gate": "keys", "members": 2, "common": 0.5, "starts": 2, "fit_rounds": 2, "size": 4, "prefix": 8},
}  # fmt: skip


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def test_commands_and_the_python_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_model(Path("my-model"), max_position_embeddings=512)  # the length of windows of a job that names none
    Path("heldout.txt").write_text((DEMO / "texts" / "theatre-heldout.txt").read_text(encoding="utf-8")[:6000])
    records = [json.loads(line) for line in (DEMO / "texts" / "hospital.jsonl").read_text(encoding="utf-8").splitlines()]
    Path("a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    notes = ['"' + record["context"].replace('"', "'") + '"' for record in records[:24]]
    Path("b.csv").write_text("\n".join(["note", *notes]) + "\n", encoding="utf-8")
    (job,) = blocks("toml")
    Path("job.toml").write_text(job, encoding="utf-8")

    runner = CliRunner()
    ran = 0
    for line in "".join(blocks("sh")).splitlines():
        words = shlex.split(line, comments=True)
        if words[0] == "make":
            assert f"\n{words[1]}: " in (ROOT / "Makefile").read_text(encoding="utf-8")  # CI runs one, the other is its demo
        elif words[0] == "pip":
            assert words == ["pip", "install", "."]  # tests/test_package.py does what this does, and fetches nothing
        elif words[0] == "fedgrove":
            result = runner.invoke(app, words[1:])
            assert result.exit_code == 0, f"{line}\n{result.output}"
            ran += 1
        else:
            assert words == [".", ".venv/bin/activate"]
    assert ran >= 10
    assert tomllib.loads(Path("my-job/job.toml").read_text(encoding="utf-8"))["name"] == "my-job"
    Path("job.toml").write_text(job.replace("sparsity = 0.5", "sparsity = 0.5\nsamples = 1\nlength = 64"), encoding="utf-8")
    (example,) = blocks("python")
    exec(compile(example, "README.md", "exec"), {})
    assert "perplexity" in capsys.readouterr().out
    assert Path("runs/third/report.html").is_file()
    same = [path.relative_to("unpacked") for path in Path("unpacked").iterdir()]
    assert all((Path("unpacked") / name).read_bytes() == (Path("runs/first/model") / name).read_bytes() for name in same)


def test_commands_of_the_guides(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the tutorial and of every how-to, in this order, on a job that is over in a second."""
    pytest.importorskip("gguf")
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(small.job("guides", evaluate__windows=2), "job.toml")
    posts = [{"text": f"post {i} about {i % 3}", "label": f"topic-{i % 3}"} for i in range(60)]
    Path("posts.jsonl").write_text("".join(json.dumps(post) + "\n" for post in posts))
    text = {"text": small.texts["ash"].read_text(encoding="utf-8")}
    for name in ("new", "texts"):
        Path(f"{name}.jsonl").write_text(json.dumps(text) + "\n", encoding="utf-8")
    ran = set()
    for page in [ROOT / "docs" / "tutorial.md", *sorted((ROOT / "docs" / "how-to").glob("*.md"))]:
        for line in "".join(re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)).splitlines():
            words = shlex.split(line, comments=True)
            if words[0] != "fedgrove" or words[1] == "demo":  # CI runs the demo, and a loop over all forms takes long
                assert words[:2] in (["make", "demo"], [".", ".venv/bin/activate"], ["fedgrove", "demo"], ["for", "form"]), line
                continue
            if "runs/third" in words:
                shutil.copytree("runs/second", "runs/third")
            if "runs/pool" in words and not Path("runs/pool").is_dir():
                run(load(small.job("pool", stages=[POOL], evaluate={})), Path("runs/pool"), quiet=True)
            result = CliRunner().invoke(app, words[1:])
            assert result.exit_code == 0, f"{page.name}: {line}\n{result.output}"
            ran.add(words[1])
    assert ran == {"doctor", "plan", "run", "report", "export", "split", "adopt", "gate", "route"}
    assert (tmp_path / "plain" / "model.safetensors").read_bytes() == Path("runs/first/model/model.safetensors").read_bytes()


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
