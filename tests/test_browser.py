"""The pages in a real browser: what only a browser knows of them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedgrove.report.compare import write_comparison
from fedgrove.report.page import write_report
from fedgrove.report.split import holdings_page
from fedgrove.split import Holding
from test_report import make_run

pytest.importorskip("playwright", reason='no browser: pip install "fedgrove[browser]"')
pytest.importorskip("axe_playwright_python", reason='no axe: pip install "fedgrove[browser]"')

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Request, sync_playwright

PHONE, DESK, PAPER = 390, 1280, 673  # pixels; paper: A4 less the margins
PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FOLDERS = ("/usr/bin", "/usr/local/bin", "/snap/bin", "/opt/google/chrome")  # besides PATH, which may be short in a test


def find_program(name: str) -> str | None:
    """Where a program is installed."""
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(FOLDERS))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Playwright's own Chromium, or one of this machine. One that is installed and does not start is a failure, not a skip."""
    with sync_playwright() as playwright:
        own = Path(playwright.chromium.executable_path)
        installed = [own] if own.is_file() else [Path(path) for path in map(find_program, PROGRAMS) if path]
        if not installed:
            pytest.skip("no Chromium is installed here: playwright install chromium, or apt-get install chromium")
        opened = playwright.chromium.launch(executable_path=installed[0])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One page of every kind, with everything on it that a run can have."""
    folder = tmp_path_factory.mktemp("pages")
    first = make_run(folder / "first", ["a-ward-with-a-long-name", "law", "press"], ["law", "press"], rounds=3, sample=0.5)
    make_run(first / "centralized", ["centralized"], ["law", "press"])
    (first / "samples.json").write_text('{"samples": [{"prompt": "The", "before": "cat sat", "after": "dog ate"}]}')
    second = make_run(folder / "second", ["law", "press"], ["law", "press"])
    made = {"report": write_report(first), "comparison": folder / "compare.html", "split": folder / "split.html"}
    write_comparison([first, second], made["comparison"])
    holdings = [Holding(f"client-{i}", 10 + i, 1000, {"ash": 4, f"tree-{i}": 6 + i}) for i in range(4)]
    made["split"].write_text(holdings_page(holdings, "posts.jsonl: dirichlet, alpha 0.3, seed 0"), encoding="utf-8")
    hundred = [f"client-{i:03}" for i in range(100)]
    made["hundred clients"] = write_report(
        make_run(folder / "hundred", hundred, hundred[:8], num_blocks=32, rounds=50, sample=0.25, alone=False)
    )
    return made


def faults(browser: Browser, file: Path, width: int, scheme: str = "light", axe: bool = True) -> list[str]:
    """What is wrong with a page at a width."""
    found: list[str] = []

    def asked(request: Request) -> None:
        if request.url != file.as_uri():
            found.append(f"it asks for {request.url}")

    tab: Any = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    try:
        tab.on("console", lambda message: found.append(f"console: {message.text}") if message.type != "log" else None)
        tab.on("pageerror", lambda fault: found.append(f"error: {fault}"))
        tab.on("request", asked)
        tab.goto(file.as_uri(), wait_until="load")
        wide = tab.evaluate("document.documentElement.scrollWidth")
        if wide > width:
            found.append(f"it is {wide} pixels wide")
        if axe:
            for violation in Axe().run(tab).response["violations"]:
                if violation["impact"] in ("serious", "critical"):
                    found.append(f"axe: {violation['id']} in {violation['nodes'][0]['html']}")
    finally:
        tab.close()
    return found


@pytest.mark.parametrize("name", ["report", "comparison", "split"])
def test_a_page_has_no_fault_that_a_browser_can_tell(browser: Browser, pages: dict[str, Path], name: str) -> None:
    assert faults(browser, pages[name], DESK) == []
    assert faults(browser, pages[name], PHONE) == []
    assert faults(browser, pages[name], DESK, "dark") == []


def test_a_page_of_a_hundred_clients_has_none_either(browser: Browser, pages: dict[str, Path]) -> None:
    assert faults(browser, pages["hundred clients"], DESK, axe=False) == []
    assert faults(browser, pages["hundred clients"], PHONE, axe=False) == []


def test_a_fault_is_found_where_there_is_one(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(
        '<html lang="en"><title>x</title><img src="http://127.0.0.1:9/x.png"><script>throw new Error("oops")</script>'
        '<div style="width:2000px; color:#eee; background:#fff">pale</div>'
    )
    found = " ".join(faults(browser, file, PHONE))
    for fault in ("it asks for http://127.0.0.1:9/x.png", "error: oops", "pixels wide", "image-alt", "color-contrast"):
        assert fault in found


@pytest.mark.parametrize("name", ["report", "comparison", "split", "hundred clients"])
def test_a_page_prints_on_paper_and_nothing_is_cut_off(browser: Browser, pages: dict[str, Path], name: str) -> None:
    tab = browser.new_page(viewport={"width": PAPER, "height": 950})
    try:
        tab.goto(pages[name].as_uri())
        tab.emulate_media(media="print")
        cut = tab.evaluate(
            "[...document.querySelectorAll('table, figure, pre, h1, p')]"
            ".filter(part => part.getBoundingClientRect().right > innerWidth + 1).map(part => part.textContent.slice(0, 60))"
        )
        assert cut == []
        assert tab.pdf(format="A4", prefer_css_page_size=True).startswith(b"%PDF-")
    finally:
        tab.close()
