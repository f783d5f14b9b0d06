"""What several tests need: the shipped model, real statistics of it, and one thread so that small products stay fast."""

from __future__ import annotations

import gc
import os
from collections.abc import Generator
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import forks

if TYPE_CHECKING:
    from small import Small

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command does; it must be said before torch loads
if not os.environ.get("FEDGROVE_TEST_GPU"):  # the tests say what a CPU gives; those of a GPU are named in the Makefile
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_configure(config: pytest.Config) -> None:
    """Opens the session of :mod:`forks`, which workers share; then the fixtures of small.py, where tests run.

    The process that only hands tests out to workers takes five seconds less to start them without torch.
    """
    forks.open_session()
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("small")
    gc.disable()  # what tests are made of lives to the end; to look through it again and again takes seconds


def pytest_collection_finish() -> None:
    """Garbage is collected again, but not sought in what was there before."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    """At the end, also of a session that was interrupted."""
    forks.close_session()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Before every test: a server sets its process' number of threads, and another number gives other last bits."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def demo() -> Path:
    """The folder of the demo: a job, texts of four owners and a small trained Llama."""
    return Path(str(files("fedgrove") / "demo"))


@pytest.fixture(scope="session")
def grove(demo: Path) -> Path:
    """The shipped model's directory."""
    return demo / "grove-6m"


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """A federation that runs in a second."""
    from small import Small

    return Small(tmp_path_factory.mktemp("small"))


# The longest first: pytest-xdist hands out files in this order, and whoever gets a long one last keeps the others waiting.
LONGEST = (
    "test_federation.py",
    "test_tune_stage.py",
    "test_devices.py",
    "test_secagg.py",
    "test_mistakes.py",
    "test_hidden_states.py",
    "test_ia3.py",
    "test_cli.py",
    "test_resume.py",
    "test_tune_budget.py",
    "test_engine.py",
    "test_structured.py",
)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Every worker begins with another file: what pytest makes of a file for its ``assert``, it keeps for the other workers."""
    report = yield
    worker = getattr(collector.config, "workerinput", None)
    if worker and isinstance(collector, pytest.Dir):
        start = int(worker["workerid"].removeprefix("gw")) * len(report.result) // worker["workercount"]
        report.result = [*report.result[start:], *report.result[:start]]
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts files, not the tests in them; the same for every worker."""
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (rank.get(item.path.name, len(rank)), item.path))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many strangers' inputs (tests/strangers) were tried, and how many behaved as they should."""
    passed, failed = (
        [report for report in terminalreporter.stats.get(outcome, []) if "/strangers/" in report.nodeid]
        for outcome in ("passed", "failed")
    )
    if passed or failed:
        terminalreporter.write_line(f"strangers' inputs: {len(passed)} of {len(passed) + len(failed)} right")
