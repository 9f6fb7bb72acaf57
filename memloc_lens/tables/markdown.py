"""The summary of a run as Markdown: methods as rows, metrics as columns, one table a ratio."""

from collections.abc import Callable, Mapping, Sequence

from memloc_lens.runs.schema import ByMethod, Cells, DeletionSummary, InjectionsSummary, InjectionSummary, Published
from memloc_lens.runs.visible import markdown
from memloc_lens.tables.terminal import Column, CountColumn, smallest_sets_heading


def deletion_tables(summary: DeletionSummary, columns: Sequence[Column]) -> str:
    """Return the tables of a DEL run, with the state before any ablation as first row.

    Args:
        summary: the content of `summary.json`.
        columns: the metrics of DEL; those without a heading or values are left out.

    Returns:
        Markdown: means with 95% confidence intervals, the best of a column in bold.

    Example:
        >>> interval = {"mean": -12.5, "low": -20.0, "high": -5.0, "n": 4}
        >>> summary = {
        ...     "benchmark": "del", "model": "embedded", "component": "neuron", "sequences": 4, "scope": "layer",
        ...     "before": {"self_acc": {"mean": 100.0, "low": 100.0, "high": 100.0, "n": 4}},
        ...     "methods": {"zero-out": {"0.05": {"self_acc": interval}}}, "published": {},
        ... }
        >>> from memloc_lens.benchmarks.measurement import METRICS
        >>> print(deletion_tables(summary, METRICS))
        4 sequences, model embedded. Changes when the located neurons are dropped; accuracies in points, distances in
        characters. Means with 95% confidence intervals; bold is the best of a column.
        <BLANKLINE>
        **5% of each layer's neurons**
        <BLANKLINE>
        | method | Self-Acc |
        |---|---|
        | before | 100.0 |
        | zero-out | **-12.5** [-20.0, -5.0] |
    """
    plural = f"{summary['component']}s"
    whose = "all" if summary["scope"] == "global" else "each layer's"
    parts = [
        f"{summary['sequences']} sequences, model {markdown(summary['model'])}. Changes when the located {plural} are "
        "dropped; accuracies in points, distances in characters. Means with 95% confidence intervals; bold is the best "
        "of a column."
    ]
    for ratio, rows in _by_ratio(summary["methods"]).items():
        parts.append(f"**{_percent(ratio)} of {whose} {plural}**")
        parts.append(comparison_table(rows, columns, _published(summary["published"], ratio), summary["before"]))
    if "smallest_sets" in summary:
        parts.append(f"**{smallest_sets_heading(summary)}**")
        parts.append(
            comparison_table(
                summary["smallest_sets"]["methods"], [CountColumn(plural), *columns], {}, summary["before"]
            )
        )
    if "text" in summary:
        text = summary["text"]
        parts.append(
            f"PPL is of {text['tokens']} tokens: {text['mean']:.1f} before, 95% confidence interval {text['low']:.1f} "
            f"to {text['high']:.1f} over rows of the text."
        )
    return "\n\n".join(parts)


def injection_tables(summary: InjectionSummary, columns_of: Callable[[float], Sequence[Column]]) -> str:
    """Return the tables of an INJ run, with how many injections succeeded.

    Args:
        summary: the content of `summary.json`.
        columns_of: gives the metrics of INJ at a ratio; those without a heading or values are left out.

    Returns:
        Markdown: means with 95% confidence intervals, the best of a column in bold.
    """
    plural = f"{summary['component']}s"
    parts = [
        f"{summary['sequences']} texts, model {markdown(summary['model'])}. Recall of the ground-truth {plural} in "
        "points. Means with 95% confidence intervals; bold is the best of a column."
    ]
    tables = _by_ratio(summary["methods"])
    for ratio in sorted(summary["injections"], key=float):
        parts.append(f"**{_percent(ratio)} of all {plural}**: {_injections(summary['injections'][ratio])}")
        if ratio in tables:  # nothing is scored if all injections failed
            parts.append(
                comparison_table(tables[ratio], columns_of(float(ratio)), _published(summary["published"], ratio))
            )
    return "\n\n".join(parts)


def _injections(made: InjectionsSummary) -> str:
    failed = f" Failed and not scored: {', '.join(map(markdown, made['failed']))}." if made["failed"] else ""
    return (
        f"{made['succeeded']} of {made['texts']} texts injected, in {made['steps']['mean']:.0f} steps on average. "
        f"AUROC of the norms of the weights {made['auroc_weight_norm']['mean']:.3f}, of their change "
        f"{made['auroc_norm_change']['mean']:.3f}.{failed}"
    )


def _by_ratio(methods: ByMethod) -> dict[str, dict[str, Cells]]:
    ratios = dict.fromkeys(ratio for cells in methods.values() for ratio in cells)
    return {
        ratio: {method: cells[ratio] for method, cells in methods.items() if ratio in cells}
        for ratio in sorted(ratios, key=float)
    }


def _published(figures: Published, ratio: str) -> dict[str, dict[str, float]]:
    return {method: ratios[ratio] for method, ratios in figures.items() if ratio in ratios}


def comparison_table(
    rows: Mapping[str, Cells],
    columns: Sequence[Column],
    published: Mapping[str, Mapping[str, float]] | None = None,
    before: Cells | None = None,
) -> str:
    """Return a table of methods, means with 95% confidence intervals, the best of a column in bold.

    Args:
        rows: the figures of each method.
        columns: those without a heading or values are left out.
        published: figures of a paper, as a row below a method's own.
        before: state before any ablation, as first row.

    Example:
        >>> from memloc_lens.tables.terminal import CountColumn
        >>> interval = {"mean": 7.0, "low": 5.0, "high": 9.0, "n": 4}
        >>> print(comparison_table({"zero-out": {"neurons": interval}}, [CountColumn("neurons")]))
        | method | neurons |
        |---|---|
        | zero-out | **7** [5, 9] |
    """
    published = published or {}
    shown = [column for column in columns if column.heading and any(column.name in cells for cells in rows.values())]
    lines = [_row("method", *(column.heading for column in shown)), "|" + "---|" * (len(shown) + 1)]
    if before is not None:
        means = (f"{before[column.name]['mean']:.1f}" if column.name in before else "" for column in shown)
        lines.append(_row("before", *means))
    for method, cells in rows.items():
        lines.append(_row(markdown(method), *(_cell(column, cells, rows) for column in shown)))
        if method in published:
            figures = published[method]
            paper = (f"{figures[column.name]:{column.form}}" if column.name in figures else "" for column in shown)
            lines.append(_row(f"{markdown(method)}, published", *paper))
    return "\n".join(lines)


def _cell(column: Column, cells: Cells, rows: Mapping[str, Cells]) -> str:
    if column.name not in cells:
        return ""
    value = cells[column.name]
    mean, low, high = (f"{number:{column.form}}" for number in (value["mean"], value["low"], value["high"]))
    best = max(
        (row[column.name]["mean"] for row in rows.values() if column.name in row), key=lambda m: column.better * m
    )
    return f"{f'**{mean}**' if value['mean'] == best else mean} [{low}, {high}]"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _percent(ratio: str) -> str:
    return f"{100 * float(ratio):g}%"
