"""Files and folders that are there completely or not at all."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from fedgrove.files import atomic_file, atomic_folder, read_lines, write_atomically


def test_a_file_is_replaced_only_when_all_of_it_is_written(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "file.json"
    write_atomically(file, "wörds\n")
    assert file.read_bytes() == "wörds\n".encode()
    write_atomically(file, b"\x00\xff", fsync=True)
    assert file.read_bytes() == b"\x00\xff"
    with pytest.raises(RuntimeError):
        _fail_halfway(file)
    assert file.read_bytes() == b"\x00\xff"
    write_atomically(file, "and again")
    assert [path.name for path in file.parent.iterdir()] == ["file.json"]


def _fail_halfway(file: Path) -> None:
    with atomic_file(file) as partial:
        partial.write_text("half of")
        raise RuntimeError


def test_a_secret_is_its_owners_alone_whatever_was_left_behind(tmp_path: Path) -> None:
    file, partial = tmp_path / "key", tmp_path / "key.partial"
    partial.write_text("of a process that was killed")
    partial.chmod(0o666)
    with open(partial, encoding="utf-8") as left:  # noqa: PTH123
        write_atomically(file, "secret", mode=0o600)
        assert left.read() == "of a process that was killed", "who held the old file open does not read the new one"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.read_text() == "secret"
    assert not partial.exists()


def test_a_folder_is_there_only_when_all_of_it_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "model"
    with atomic_folder(folder) as partial:
        (partial / "one").write_text("1")
        assert not folder.exists()
    assert (folder / "one").read_text() == "1"
    with pytest.raises(OSError, match="not empty"), atomic_folder(folder) as partial:
        (partial / "two").write_text("2")
    with pytest.raises(KeyboardInterrupt), atomic_folder(folder, replace=True) as partial:
        raise KeyboardInterrupt
    assert [path.name for path in folder.parent.iterdir()] == ["model"], "nothing is left of what failed"
    assert (folder / "one").exists()
    (tmp_path / "deep" / "model.partial" / "three").mkdir(parents=True)  # a process was killed
    with atomic_folder(folder, replace=True) as partial:
        (partial / "two").write_text("2")
    assert [path.name for path in folder.iterdir()] == ["two"]


def test_lines_are_read_up_to_one_that_a_kill_cut_short(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    assert read_lines(file) == []
    file.write_text('{"a": 1}\n\n{"a": 2}\n{"a"')
    assert read_lines(file) == [{"a": 1}, {"a": 2}]
