"""What was freed is the system's again."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

HOLES = """
import os
{begin}
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
first = bytearray(30 << 20)  # the C library learns from what is freed, and keeps what is smaller the next time
del first
before, held = resident(), []
for _ in range(20):
    large = bytearray(os.urandom(1)) * (8 << 20)
    held.append((large, bytearray(100_000)))  # a small one between each two large ones
held = [small for _, small in held]
del large
print(resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the C library of Linux")
def test_large_tensors_leave_no_holes_that_stay_in_memory() -> None:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}

    def left_over(begin: str) -> int:
        command = [sys.executable, "-c", HOLES.format(begin=begin)]
        return int(subprocess.run(command, env=plain, capture_output=True, check=True, text=True).stdout)

    kept = left_over("from fedgrove import heap; heap.keep_large_apart()")
    assert kept < 16 << 20
    assert left_over("") > 4 * max(kept, 1)  # without: else this test would not tell


def test_what_a_user_has_set_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedgrove import heap

    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "123456")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "654321")
    heap.keep_large_apart()
    assert [os.environ[f"MALLOC_{what}_THRESHOLD_"] for what in ("MMAP", "TRIM")] == ["123456", "654321"]
