"""The result as a table for a terminal."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from fedgrove.report.summary import Summary

MOST_COLUMNS = 5  # more clients than this share one column


def result_table(summary: Summary, model_bytes: int, packed_bytes: int | None = None) -> Group:
    """Perplexity on every held-out text, dense, alone and federated; then sparsity and bytes."""
    clients = sorted(summary.alone)
    one_column = len(clients) > MOST_COLUMNS
    table = Table(title="Perplexity on text that nobody pruned with (lower is better)", title_justify="left")
    table.add_column("held-out text")
    table.add_column("dense", justify="right")
    if one_column:
        table.add_column("alone,\nmean", justify="right")
    else:
        for client in clients:
            table.add_column(f"{client}\nalone", justify="right")
    table.add_column("federated", justify="right", style="bold green")

    def row(name: str, dense: float, alone: list[float], federated: float) -> list[str]:
        if one_column:
            alone = [sum(alone) / len(alone)]
        return [name, *(f"{value:.1f}" for value in (dense, *alone, federated))]

    for text in summary.texts:
        alone = [summary.alone[client][text] for client in clients]
        table.add_row(*row(text, summary.dense[text], alone, summary.federated[text]))
    if summary.texts:
        table.add_section()
        means = [summary.mean(summary.alone[client]) for client in clients]
        table.add_row(*row("geometric mean", summary.mean(summary.dense), means, summary.mean(summary.federated)))

    lines = [verdict(summary)]
    sent = max(summary.uplink.values(), default=0)
    dense = sum(row["numel"] for row in summary.tensors) * 2
    lines.append(
        f"Each client sent at most {_megabytes(sent)}: {sent / dense:.2f} of the pruned matrices in dense bfloat16. "
        "No text left its owner."
    )
    if packed_bytes is not None:
        lines.append(
            f"The model takes {_megabytes(model_bytes)}; packed {_megabytes(packed_bytes)} ({packed_bytes / model_bytes:.2f})."
        )
    return Group(*([table] if summary.texts else []), Text("\n".join(lines)))


def verdict(summary: Summary) -> str:
    """One or two sentences: how sparse, and whether working together paid."""
    exact = all(row["pruned"] == _asked(row) for row in summary.tensors)
    sparsity = f"{summary.sparsity:.1%} of the weights in {len(summary.tensors)} matrices are zero"
    sparsity += ", in every one exactly as asked." if exact else "."
    if summary.alone_mean is None or not summary.texts:
        return sparsity
    ratio = summary.mean(summary.federated) / summary.alone_mean
    verb = f"{1 - ratio:.1%} lower" if ratio < 1 else f"{ratio - 1:.1%} higher"
    return f"{sparsity} Pruned together, perplexity is {verb} than what a client has alone, on average."


def _asked(row: dict[str, float]) -> int:
    return int(row["target"] * row["numel"] + 0.5)


def _megabytes(number: int) -> str:
    return f"{number / 1e6:.1f} MB"
