"""The report of a large run: its size, the time to write it, and the time until a browser shows it.

    .venv/bin/python bench/report.py --write

A run folder with random numbers (made by the tests' code): 100 clients, 50 rounds, 32 blocks, 8 held-out texts. Needs a
Chromium and the extra ``browser``.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from page import write
from playwright.sync_api import sync_playwright

from fedgrove.report.page import write_report

ROOT = Path(__file__).parent.parent
PAINTED = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now()))))"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true", help="into docs/benchmarks.md")
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    from test_report import make_run

    clients = [f"client-{i:03}" for i in range(100)]
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        run = make_run(Path(folder) / "run", clients, clients[:8], num_blocks=32, rounds=50, sample=0.25, alone=True)
        before = time.process_time()
        file = write_report(run)
        written = time.process_time() - before
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium") or shutil.which("google-chrome"))
        opened = []
        for _ in range(5):
            tab = browser.new_page(viewport={"width": 1280, "height": 900})
            tab.goto(file.as_uri(), wait_until="load")
            opened.append(tab.evaluate(PAINTED) / 1000)
            tab.close()
        browser.close()
        rows = [
            ("size of the page", f"{file.stat().st_size / 1e6:.2f} MB"),
            ("writing it, seconds of processor time", f"{written:.2f}"),
            ("opening it until it is painted, seconds, median of five", f"{statistics.median(opened):.2f}"),
            ("each", ", ".join(f"{seconds:.2f}" for seconds in opened)),
        ]
    text = "| | |\n|---|---|\n" + "\n".join(f"| {what} | {value} |" for what, value in rows)
    print(text)
    if given.write:
        write("report", text)


if __name__ == "__main__":
    main()
