"""What a site has spent of its privacy, and what it has released, over all runs: the files outlive every run.

Runs get their names from the server, so nothing here depends on them. What counts is the job that the operator signed: the
same terms may be run again, and get the same responses; other terms spend again.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from fedgrove.deploy.flare.policy import Terms
from fedgrove.engines.error_codes import Refusal
from fedgrove.files import write_atomically

FOLDER = "ledger"
SPENT = f"{FOLDER}/spent.json"
ROSTER = f"{FOLDER}/roster.json"


def releases(kit: Path, terms: Terms) -> Path:
    """The folder in which the site records what it has released for a job; see :mod:`fedgrove.privacy.release`."""
    return kit / FOLDER / terms.digest[:32]


def spent(kit: Path) -> dict[str, float]:
    """The ε that a site has spent, by the digest of the job's terms."""
    file = kit / SPENT
    if not file.is_file():
        return {}
    budgets: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))
    return budgets


def accept_roster(kit: Path, number: int) -> None:
    """Records the number of the roster that a site uses: it never goes back to an earlier one, which may list a removed site.

    Raises:
        Refusal: the site has used a later one.
    """
    file = kit / ROSTER
    latest: int = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else 0
    if number < latest:
        raise Refusal("roster", str(number))
    if number > latest:
        write_atomically(file, json.dumps(number), fsync=True)


def spend(kit: Path, terms: Terms, budget: float | None) -> None:
    """Records the ε of a job before the site responds to it; a job that was recorded before costs nothing more.

    Args:
        kit: the site's folder.
        terms: of the job.
        budget: ε of all jobs together (``allow.budget``); None: any.

    Raises:
        Refusal: the budget does not suffice.
    """
    before, epsilon = spent(kit), terms.spends()[0]
    if terms.digest in before:
        return
    if budget is not None and not math.fsum([*before.values(), epsilon]) <= budget:
        raise Refusal("refused", "allow.budget")
    if math.isfinite(epsilon):
        write_atomically(kit / SPENT, json.dumps({**before, terms.digest: epsilon}, indent=1), fsync=True)
