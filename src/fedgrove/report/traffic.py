"""The page's section on bytes: what each client sent and received, from the ledger."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from fedgrove.report import charts
from fedgrove.report.charts import Chart, Row, Scale
from fedgrove.report.sheet import Column, Table
from fedgrove.report.summary import Summary
from fedgrove.report.words import plural, shortened, size


def bytes_chart(summary: Summary) -> Chart | None:
    """A bar for each client: bytes sent; None if no client sent any."""
    up, down = summary.uplink, summary.downlink
    if not any(up.values()):
        return None
    dense = summary.dense_bytes
    unit = 1e9 if max(dense, *up.values(), *down.values()) >= 1e9 else 1e6
    scale = Scale.over(value / unit for value in (dense, *up.values(), *down.values()))
    rows = []
    for client in summary.clients:
        marks = [
            charts.grid(scale),
            charts.bar(scale, up[client] / unit, "strong", f"{client} sent {up[client]:,} bytes"),
            charts.tick(scale, down[client] / unit, "received", f"{client} received {down[client]:,} bytes"),
        ]
        if dense:
            marks.append(charts.tick(scale, dense / unit, "target", f"dense: {dense:,} bytes"))
        rows.append(Row(client, Markup("").join(marks), size(up[client])))
    legend = [("strong", "sent"), ("received", "received")]
    if dense:
        legend.append(("target", "dense weights, each way"))
    most = max(up, key=lambda client: up[client])
    alt = f"Bytes sent by each of {plural(len(rows), 'client')}: {size(min(up.values()))} to {size(up[most])} ({most}); "
    alt += f"dense weights would be {size(dense)}." if dense else "see the table."
    name = "GB" if unit == 1e9 else "MB"
    return Chart("bars", alt, rows, charts.tick_labels(scale, [f"{value:g} {name}" for value in scale.ticks]), legend)


def bytes_map(summary: Summary) -> Chart | None:
    """A heat map of bytes sent by client and round; None if there is only one round, or no bytes were sent."""
    sent = summary.sent_by_round("up")
    most = max((value for by_client in sent.values() for value in by_client.values()), default=0)
    if len(sent) < 2 or not most:
        return None
    rows, total = [], summary.uplink
    for client in summary.clients:
        cells = {
            column: (
                0.1 + 0.9 * by_client[client] / most,
                f"{shortened(client)}, {_round(summary, key)}: {by_client[client]:,} bytes",
            )
            for column, (key, by_client) in enumerate(sorted(sent.items()))
            if by_client.get(client)
        }
        rows.append(Row(client, charts.cells(len(sent), cells), size(total[client])))
    alt = f"Bytes that each client (rows) sent in each round (columns), at most {size(most)} in one."
    many_stages = len({stage for stage, _ in sent}) > 1
    labels = [f"{stage}/{round_}" if many_stages else str(round_) for stage, round_ in sorted(sent)]
    return Chart("heat", alt, rows, charts.column_labels(labels))


def bytes_by_client(summary: Summary) -> Table | None:
    """Bytes of each client, and of all; None if there was no traffic."""
    if not summary.traffic:
        return None
    up, down = summary.uplink, summary.downlink
    overhead_up, overhead_down = summary.sent("up", overhead=True), summary.sent("down", overhead=True)
    overhead = {client: overhead_up[client] + overhead_down[client] for client in summary.clients}
    columns = [Column("client"), Column("sent", size), Column("received", size)]
    columns += [Column("dense, each way", size), Column("sent against dense", "{:.3f}".format)] if summary.dense_bytes else []
    columns += [Column("capabilities and measurement", size)]

    def row(name: str, up: int, down: int, dense: int, overhead: int) -> list[Any]:
        return [name, up, down, *([dense, up / dense] if dense else []), overhead]

    return Table(
        "bytes-by-client",
        "Bytes of each client, counted as they were sent",
        columns,
        [row(c, up[c], down[c], summary.dense_bytes, overhead[c]) for c in summary.clients],
        [row("all", sum(up.values()), sum(down.values()), summary.dense_bytes * len(summary.clients), sum(overhead.values()))],
    )


def bytes_by_round(summary: Summary) -> Table | None:
    """Bytes of all clients in each round; None if there is only one round."""
    up, down = summary.sent_by_round("up"), summary.sent_by_round("down")
    keys = sorted(up.keys() | down.keys())
    if len(keys) < 2:
        return None
    comparable = summary.dense_bytes > 0
    columns = [Column("round"), Column("clients that sent", "{:,}".format), Column("sent", size), Column("received", size)]
    columns += [Column("dense, each way", size)] if comparable else []
    rows = []
    for key in keys:
        sent = up.get(key, {})
        values = [len(sent), sum(sent.values()), sum(down.get(key, {}).values())]
        dense = summary.dense_round_bytes(key[0]) * len(summary.clients) or None
        rows.append([_round(summary, key), *values, *([dense] if comparable else [])])
    return Table("bytes-by-round", "Bytes of all clients in each round", columns, rows)


def _round(summary: Summary, key: tuple[int, int]) -> str:
    return f"stage {key[0]}, round {key[1]}" if len(summary.stages) > 1 else f"round {key[1]}"
