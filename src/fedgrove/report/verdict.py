"""The results of a run in sentences, for the terminal and the page."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from fedgrove.report.disclosures import where_text_went
from fedgrove.report.paired import unclear
from fedgrove.report.stage_reports import report_of
from fedgrove.report.summary import Stage, Summary
from fedgrove.report.words import between, capitalized, change, compared, listed, plural

NOTHING = 0.005  # relative differences in perplexity up to this are not called a gain or a loss


def verdict(summary: Summary) -> tuple[str, str]:
    """Two texts: what was done; and whether working together paid, and for which client most and least."""
    return _done(summary), _paid(summary)


def own_texts(summary: Summary) -> str | None:
    """Compares the federated model with each owner's model alone on its own text; None if that was not measured."""
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
        whom = "no owner has a clear difference between the federated model and its model alone"
    else:
        whom = f"{better} of {len(ratios)} owners are" if better else "no owner is"
        whom += " better off with the federated model than alone"
        whom += f", {worse} worse" if worse else ""
        whom += f"; for {len(open_)} there is no clear difference" if open_ else ""
    spread = f"the federated model's perplexity there is {compared(ratios[best])} ({best})"
    if len(ratios) > 1:
        spread += f" to {compared(ratios[worst])} ({worst})"
    return f"{capitalized(f'{_when(summary)}on its own kind of text')}, {whom}: {spread}."


def one_owner(summary: Summary) -> str | None:
    """Compares the federated model with the centralized one; None if there is no centralized run."""
    if not summary.centralized or not summary.texts:
        return None
    ratio = summary.mean(summary.federated) / summary.mean(summary.centralized)
    interval = summary.against_centralized(summary.texts)
    says = f"With everybody’s text in one place, perplexity would be {summary.mean(summary.centralized):.1f}"
    if unclear(interval) or ratio == 1:
        return f"{says}: no clear difference from the federated model{between(interval)}."
    return f"{says}: the federated model’s perplexity is {compared(ratio)}{between(interval)}."


def alone_means(summary: Summary) -> str:
    """What was done to a client's model alone, as a participle: "pruned"."""
    return _did(summary.stages if summary.alone_stage is None else summary.stages[: summary.alone_stage + 1])


def _did(stages: Sequence[Stage]) -> str:
    return listed(list(dict.fromkeys(report_of(stage.kind).DID for stage in stages)))


def _done(summary: Summary) -> str:
    results = [outcome.says for outcome in summary.outcomes if outcome.says]
    says = f"{plural(len(summary.clients), 'owner of text')} {_did(summary.stages)} one language model together"
    return f"{says}{': ' if results else ''}{'; '.join(results)}. {capitalized(where_text_went(summary.stages))}."


def _paid(summary: Summary) -> str:
    if not summary.texts and summary.job.get("evaluate", {}).get("data"):
        return "Its perplexity was not measured."
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
        lacking = "the clients' models alone were not measured, so it is unknown whether working together paid"
        return f"{measured.capitalize()}{worst}; {lacking}."
    if len(summary.alone) == 1:
        return f"{measured.capitalize()}; there is only one client, so there is no comparison."
    ratio = summary.mean(summary.together) / summary.alone_mean
    interval = summary.against_alone(list(summary.alone), summary.texts)
    paid = "paid" if ratio < 1 - NOTHING else "did not pay" if ratio > 1 + NOTHING else "made little difference"
    paid = "made no clear difference" if unclear(interval) else paid
    by_client = {client: summary.mean(summary.together) / summary.mean(alone) for client, alone in summary.alone.items()}
    best, worst = min(by_client, key=lambda c: by_client[c]), max(by_client, key=lambda c: by_client[c])
    open_ = {client for client in (best, worst) if unclear(summary.against_alone([client], summary.texts))}
    gains = _most_and_least((best, by_client[best]), (worst, by_client[worst]), open_)
    against = f"{compared(ratio)} than the mean of the clients' models alone{between(interval)}"
    if summary.together is summary.federated:
        return f"Working together {paid}: {measured}, {against}; {gains}."
    return f"Working together {paid}: {_when(summary)}perplexity is {against}; {gains}. In the end, {measured}."


def _when(summary: Summary) -> str:
    """The stage after which the clients' models alone were measured, as a phrase; empty if it is the last stage."""
    if summary.alone_stage is None or summary.together is summary.federated:
        return ""
    kind = summary.stages[summary.alone_stage].kind
    return f"after {report_of(kind).DOING or kind}, "


def _most_and_least(best: tuple[str, float], worst: tuple[str, float], open_: Collection[str]) -> str:
    """A phrase about the clients that gain most and least; ``open_``: those of them without a clear difference."""

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
