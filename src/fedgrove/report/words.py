"""Numbers in words: what the terminal and the page say of a run."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from fedgrove.report.paired import Interval, unclear
from fedgrove.report.summary import Summary

NOTHING = 0.005  # a relative difference in perplexity that we do not call a gain or a loss


def size(number: float) -> str:
    """Bytes for people, in powers of 1000: "3.4 MB"."""
    for unit in ("bytes", "kB", "MB"):
        if number < 999.95 or (unit == "bytes" and number < 1000):
            return f"{number:,.0f} bytes" if unit == "bytes" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:,.1f} GB"


def change(ratio: float) -> str:
    """A ratio as a signed difference: 0.98 -> "−2.0%"."""
    percent = f"{100 * (ratio - 1):+.1f}%"
    return percent.replace("-", "−")


def compared(ratio: float) -> str:
    """A ratio in words: 0.98 -> "2.0% lower"."""
    return f"{abs(ratio - 1):.1%} {'lower' if ratio < 1 else 'higher'}"


def ranges(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5] -> "0–2, 5"."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}–{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def plural(number: int, noun: str) -> str:
    """1 -> "1 client", 2 -> "2 clients"; "matrix" has a plural of its own, and only the first word gets one."""
    one, *rest = noun.split(" ")
    several = " ".join(["matrices" if one == "matrix" else one + "s", *rest])
    return f"{number:,} {noun if number == 1 else several}"


def file_name(path: str) -> str:
    """The last part of an absolute path, since folders tell of their owner; anything else, such as a hub id, as it is."""
    for flavour in (PurePosixPath(path), PureWindowsPath(path)):
        if flavour.is_absolute():
            return flavour.name
    return path


def verdict(summary: Summary) -> tuple[str, str]:
    """Two sentences: what was done, and whether working together paid and for whom most and least."""
    return _done(summary), _paid(summary)


def between(interval: Interval | None) -> str:
    """An interval of a ratio in brackets, to stand behind it: (0.9, 1.1) -> " (−10.0% to +10.0%)"."""
    return f" ({change(interval[0])} to {change(interval[1])})" if interval else ""


def own_texts(summary: Summary) -> str | None:
    """What the federated model is to the owners on their own kind of text; None where that was not measured."""
    together = summary.together
    ratios = {client: together[text] / summary.alone[client][text] for text, client in summary.owned.items()}
    if not ratios or len(summary.alone) == 1:
        return None
    best, worst = min(ratios, key=lambda client: ratios[client]), max(ratios, key=lambda client: ratios[client])
    open_ = [client for text, client in summary.owned.items() if unclear(summary.against_alone([client], [text]))]
    better = sum(ratio < 1 for client, ratio in ratios.items() if client not in open_)
    worse = len(ratios) - better - len(open_)
    all_ = len(ratios) == len(summary.alone)
    few = f"each of the {len(ratios)} owners" if len(ratios) > 1 else "the owner"
    every = "every owner" if all_ else f"{few} whose kind of text was held out"
    if better == len(ratios):
        whom = f"{every} is better off with the federated model than alone"
    elif worse == len(ratios):
        whom = f"{every} would have been better off alone"
    elif len(open_) == len(ratios):
        whom = "for no owner there is a clear difference between the federated model and what it has alone"
    else:
        whom = f"{better} of {len(ratios)} owners are" if better else "no owner is"
        whom += " better off with the federated model than alone"
        whom += f", {worse} worse" if worse else ""
        whom += f"; for {len(open_)} there is no clear difference" if open_ else ""
    spread = f"the federated model's perplexity there is {compared(ratios[best])} ({best})"
    if len(ratios) > 1:
        spread += f" to {compared(ratios[worst])} ({worst})"
    where = f"{_when(summary)}on its own kind of text"
    return f"{where[0].upper()}{where[1:]}, {whom}: {spread}."


def one_owner(summary: Summary) -> str | None:
    """What one owner of all the text would have; None where that was not run."""
    if not summary.centralized or not summary.texts:
        return None
    ratio = summary.mean(summary.federated) / summary.mean(summary.centralized)
    interval = summary.against_centralized(summary.texts)
    says = f"One owner of everybody’s text, in one place, would have {summary.mean(summary.centralized):.1f}"
    if unclear(interval) or ratio == 1:
        return f"{says}: no clear difference to the federated model{between(interval)}."
    return f"{says}: the federated model’s perplexity is {compared(ratio)}{between(interval)}."


def method(stage: Mapping[str, Any]) -> str:
    """A stage in a few words: "prune with sparsegpt to 50%, aggregation votes"."""
    if stage["kind"] == "structured":
        return (
            f"narrow by {stage['channels']:.0%} of the channels and {stage['heads']:.0%} of the heads, score {stage['score']}"
        )
    if stage["kind"] != "prune":
        by = stage.get("parametrization") if stage.get("planner") == "uniform" else stage.get("planner")
        return f"{stage['kind']} with {by}, aggregation {stage.get('aggregation')}" if by else str(stage["kind"])
    target = stage.get("pattern") or f"{100 * stage.get('sparsity', 0):g}%"
    uneven = f" ({stage['allocation']})" if stage.get("allocation", "even") != "even" else ""
    return f"prune with {stage.get('pruner')} to {target}{uneven}, aggregation {stage.get('aggregation')}"


def narrower(plan: Mapping[str, Any]) -> str:
    """What every block of a model lost: "176 of 704 channels and 2 of 8 heads out of every block"."""
    before, after = plan["before"], plan["after"]
    parts = []
    for what, each in (("channels", 1), ("heads", plan["queries"])):
        if before[what] > after[what]:
            parts.append(f"{each * (before[what] - after[what]):,} of {each * before[what]:,} {what}")
    return f"{' and '.join(parts)} out of every block"


def other_type(types: Sequence[str]) -> str:
    """What to say where the result is described as another architecture than the model it came from; else nothing."""
    before, after = types
    if before == after:
        return ""
    return (
        f"It is written as type {after}, because a configuration of type {before} cannot say that many heads: the same "
        "computation, tensor for tensor."
    )


def left(summary: Summary) -> list[str]:
    """What left its owner, stage by stage, and who could see it."""
    secure = summary.job.get("privacy", {}).get("secure_aggregation")
    says = "No text and no tokens. A client said a few numbers about itself once"
    says += ", and in the end its loss on each window of held-out text." if summary.alone else "."
    parts = [says]
    several = len(summary.job["stages"]) > 1
    for number, stage in enumerate(summary.job["stages"]):
        sent = f"a client sent {_sent(stage)}."
        parts.append(f"Stage {number}, {stage['kind']}: {sent}" if several else sent[0].upper() + sent[1:])
    if secure:
        who = "Whoever ran the server saw these added up over the clients, and those of no single one."
    else:
        who = "Whoever ran the server could see what each client sent."
    if not any(stage.get("epsilon") for stage in summary.job["stages"]):
        who += (
            " No noise was added: that is less than text, but it is computed from text, and nothing here is a proof of privacy."
        )
    return [*parts, who]


def _sent(stage: Mapping[str, Any]) -> str:
    if stage["kind"] == "structured":
        return "for each channel and head of every block one number: how much the loss on its text would change without it"
    if stage["kind"] == "tune":
        what = "the change of each matrix" if stage.get("parametrization") == "full" else "the factors of low-rank changes"
        says = f"in each round {what} that it had trained on its text, and its loss"
        if stage.get("planner") == "fedpipe":
            says += "; before the first a score for each matrix"
        return says + ("; in the end two losses on text that it held out for itself" if stage.get("personal") else "")
    if stage.get("aggregation") == "pooled":
        products = "" if stage.get("pruner") == "wanda" else ", and of the products of its channels"
        return f"for each block sums over its text: of the squares of what enters each matrix{products}"
    values = "" if stage.get("aggregation") == "masks" else " and their values"
    return f"for each block which weights it would keep{values}"


def _done(summary: Summary) -> str:
    owners = plural(len(summary.clients), "owner of text")
    if summary.narrowing:
        before, after = summary.narrowing["parameters"]
        return (
            f"{owners} narrowed one language model together: {narrower(summary.narrowing)}, which leaves "
            f"{after / before:.1%} of its weights to store and to compute with; no text left its owner."
        )
    if not summary.tensors:
        return f"{owners} worked on one language model together, and no text left its owner."
    asked = {row["target"] for row in summary.tensors}
    wanted = "as asked" if len(asked) > 1 else f"where {asked.pop():.1%} were asked for"
    exactly = ", in each exactly as asked" if summary.exact else f", {wanted}"
    return (
        f"{owners} pruned one language model together: {summary.sparsity:.1%} of the weights in "
        f"{plural(len(summary.tensors), 'matrix')} are zero{exactly}, and no text left its owner."
    )


def _paid(summary: Summary) -> str:
    if not summary.texts:
        return "Its quality was not measured: the job names no held-out text ([evaluate] data)."
    dense, federated = summary.mean(summary.dense), summary.mean(summary.federated)
    measured = (
        f"over {plural(len(summary.texts), 'text')} held out, its perplexity is {federated:.1f} "
        f"({dense:.1f} before, {change(federated / dense)})"
    )
    if summary.alone_mean is None:
        ratios = {text: summary.federated[text] / summary.dense[text] for text in summary.texts}
        most = max(ratios, key=lambda text: ratios[text])
        worst = f", and {change(ratios[most])} on {most}, which changed worst" if len(ratios) > 1 else ""
        lacking = "what clients have alone was not measured, so whether working together paid is open"
        return f"{measured.capitalize()}{worst}; {lacking}."
    if len(summary.alone) == 1:
        return f"{measured.capitalize()}; with one client there is nobody to work together with."
    ratio, interval = (
        summary.mean(summary.together) / summary.alone_mean,
        summary.against_alone(list(summary.alone), summary.texts),
    )
    paid = "paid" if ratio < 1 - NOTHING else "did not pay" if ratio > 1 + NOTHING else "made little difference"
    paid = "made no clear difference" if unclear(interval) else paid
    by_client = {client: summary.mean(summary.together) / summary.mean(alone) for client, alone in summary.alone.items()}
    best, worst = min(by_client, key=lambda c: by_client[c]), max(by_client, key=lambda c: by_client[c])
    open_ = {client for client in (best, worst) if unclear(summary.against_alone([client], summary.texts))}
    gains = _most_and_least((best, by_client[best]), (worst, by_client[worst]), open_)
    against = f"{compared(ratio)} than what a client has alone on average{between(interval)}"
    if summary.together is summary.federated:
        return f"Working together {paid}: {measured}, {against}; {gains}."
    return f"Working together {paid}: {_when(summary)}perplexity is {against}; {gains}. In the end, {measured}."


def _when(summary: Summary) -> str:
    """After which stage the clients measured what they have alone; nothing to say where that is the last."""
    if summary.together is summary.federated:
        return ""
    kinds = {"structured": "narrowing", "prune": "pruning", "tune": "tuning"}
    kind = summary.job["stages"][summary.alone_stage]["kind"]
    return f"after {kinds.get(kind, kind)}, "


def _most_and_least(best: tuple[str, float], worst: tuple[str, float], open_: Collection[str]) -> str:
    """Who gains most and least; ``open_``: those of the two for whom there is no clear difference."""

    def says(one: tuple[str, float], what: str) -> str:
        return f"{one[0]} {what} ({change(one[1])})"

    if len(open_) == len({best[0], worst[0]}):
        return "no client clearly gains or loses"
    if best[0] in open_ or worst[0] in open_:
        sure, other = (worst, best) if best[0] in open_ else (best, worst)
        what = "gains" if sure[1] < 1 else "loses"
        return f"{says(sure, f'{what} most')}, for {other[0]} there is no clear difference ({change(other[1])})"
    if worst[1] < 1:
        return f"{says(best, 'gains most')}, {says(worst, 'least')}"
    if best[1] < 1:
        return f"{says(best, 'gains most')}, {says(worst, 'fares worst')}"
    return f"{says(worst, 'loses most')}, {says(best, 'least')}"
