"""What a run is worth to each of its owners: both averages over owners, and the owner that is worst off.

An average that weighs owners by their text says what a random piece of text gets, and a large owner decides it. The plain
average says what a random owner gets. Both can hide an owner to whom the result is of no use, so the worst one is named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fedgrove.report.sheet import Column, Table
from fedgrove.report.summary import Summary
from fedgrove.report.words import plural


@dataclass(frozen=True)
class OverOwners:
    """Averages of one number over owners.

    Attributes:
        weighted: weighted by each owner's tokens or records.
        plain: every owner counts the same.
        worst: the name of the owner with the worst number, and the number.
        number: of owners.
    """

    weighted: float
    plain: float
    worst: tuple[str, float]
    number: int

    def says(self, show: Callable[[float], str], by: str = "tokens") -> str:
        """Such as "4.81 weighted by tokens, 4.79 as the plain mean of 4 owners, 5.20 for the worst (ward)"."""
        name, value = self.worst
        owners = plural(self.number, "owner")
        averages = f"{show(self.weighted)} weighted by {by}, {show(self.plain)} as the plain mean of {owners}"
        return f"{averages}, {show(value)} for the worst ({name})"


def over_owners(values: Mapping[str, float], weights: Mapping[str, float], higher_is_better: bool = False) -> OverOwners:
    """Averages a number of each owner.

    Args:
        values: by owner; at least one.
        weights: of the same owners, not all 0.
    """
    sign = -1.0 if higher_is_better else 1.0
    worst = max(sorted(values), key=lambda owner: sign * values[owner])
    weighted = sum(values[owner] * weights[owner] for owner in values) / sum(weights[owner] for owner in values)
    return OverOwners(weighted, sum(values.values()) / len(values), (worst, values[worst]), len(values))


def own_perplexities(summary: Summary) -> dict[str, OverOwners]:
    """Perplexity on the owners' own kinds of text, of the base model, each owner's own model and the federated model.

    An owner's kind of text is a held-out text of its name. Averages are of −log p, so they are geometric means of
    perplexities. Empty if there is no such text; without the models alone if these were not measured.
    """
    owned = [text for text in summary.texts if text in summary.clients]
    federated = summary.windows(summary.last)
    if not owned or not all(federated.get(text) for text in owned):
        return {}
    tokens = {text: sum(count for _, count in federated[text]) for text in owned}
    models = {"before": summary.dense, "federated": summary.federated}
    if all(text in summary.alone for text in owned):
        models["alone"] = {text: summary.alone[text][text] for text in owned}
    return {
        name: _exp(over_owners({text: math.log(of[text]) for text in owned}, tokens))
        for name, of in models.items()
        if all(0 < of[text] < math.inf for text in owned)
    }


def own_line(summary: Summary) -> str | None:
    """A sentence with both averages and the worst owner; None if there are not at least two owners' own texts."""
    found = own_perplexities(summary)
    if "federated" not in found or found["federated"].number < 2:
        return None
    says = f"On the owners' own kinds of text perplexity is {found['federated'].says('{:.1f}'.format)}"
    others = [
        f"{words} {found[name].weighted:.1f}, {found[name].plain:.1f} and {found[name].worst[1]:.1f} ({found[name].worst[0]})"
        for name, words in (("before", "before the run"), ("alone", "of each owner's model alone"))
        if name in found
    ]
    return f"{says}; {'; '.join(others)}."


def own_table(summary: Summary) -> Table | None:
    """The same as a table; None likewise."""
    found = own_perplexities(summary)
    if "federated" not in found or found["federated"].number < 2:
        return None
    columns = [Column("model"), Column("weighted by tokens", "{:.2f}".format), Column("plain mean", "{:.2f}".format)]
    columns += [Column("worst owner", "{:.2f}".format), Column("which")]
    names = {"before": "before the run", "alone": "each owner's alone", "federated": "federated"}
    rows = [
        [names[name], of.weighted, of.plain, of.worst[1], of.worst[0]]
        for name, of in ((name, found[name]) for name in names if name in found)
    ]
    return Table("owners", "Perplexity on the owners' own kinds of text, over owners (lower is better)", columns, rows)


def _exp(of: OverOwners) -> OverOwners:
    return OverOwners(math.exp(of.weighted), math.exp(of.plain), (of.worst[0], math.exp(of.worst[1])), of.number)
