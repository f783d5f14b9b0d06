"""Each client trains the member whose loss on its text is lowest (IFCA: Ghosh et al., NeurIPS 2020).

Also the hard form of FedEM (Marfoq et al., NeurIPS 2021). Members that begin alike have the same loss, so in their first round
clients are dealt by the seed. What the members become depends on that: IFCA's analysis assumes starts that are apart already.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedgrove.stages.tune.gates import Looks

LOOKS: Looks = "members"
OF_CLIENTS = True
CHOOSES = False
KEYS = frozenset({"common", "windows"})


def choose(losses: Sequence[float]) -> int:
    """The member of the lowest loss, the first of several."""
    return min(range(len(losses)), key=losses.__getitem__)
