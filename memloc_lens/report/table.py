"""The table at the end of a run: methods as rows, metrics as columns, one block a ratio."""

from typing import Any

from rich.console import Console
from rich.table import Table

COLUMNS = {
    "self_acc": ("Self-Acc", -1),
    "self_dist": ("Self-Dist", 1),
    "self_free_acc": ("Free-Acc", -1),
    "neg_acc": ("Neg-Acc", 1),
    "neg_dist": ("Neg-Dist", -1),
    "control_acc": ("Ctrl-Acc", 1),
    "ppl": ("PPL", -1),
}
"""Heading of each metric, and whether a higher (1) or a lower (-1) change is better."""


def print_table(summary: dict[str, Any], console: Console | None = None) -> None:
    """Print a summary: mean changes with 95% intervals, the best of each column and ratio marked with *.

    Args:
        summary: what `summary.json` holds.
        console: where to; by default the terminal, or as wide as needed where there is none.
    """
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=160)
    before = summary["before"]
    console.print(
        f"\nDEL on {summary['model']}, {summary['sequences']} sequences: change when the located neurons are dropped"
        "\n(accuracies in points, distances in characters; mean with 95% interval; * is the best of its column)"
    )
    ratios = dict.fromkeys(ratio for cells in summary["methods"].values() for ratio in cells)
    for ratio in ratios:
        rows = {method: cells[ratio] for method, cells in summary["methods"].items() if ratio in cells}
        columns = [metric for metric in COLUMNS if any(metric in cells for cells in rows.values())]
        share = "all" if summary["scope"] == "global" else "each layer's"
        table = Table(title=f"{100 * float(ratio):g}% of {share} neurons", title_justify="left")
        table.add_column("method")
        for metric in columns:
            table.add_column(COLUMNS[metric][0], justify="right")
        table.add_row("before", *(f"{before[metric]['mean']:.1f}" for metric in columns), style="dim", end_section=True)
        for method, cells in rows.items():
            table.add_row(method, *(_cell(metric, cells, rows) for metric in columns))
        console.print(table)


def _cell(metric: str, cells: dict[str, Any], rows: dict[str, Any]) -> str:
    if metric not in cells:
        return ""
    better = COLUMNS[metric][1]
    means = [other[metric]["mean"] for other in rows.values() if metric in other]
    value = cells[metric]
    best = better * value["mean"] == max(better * mean for mean in means)
    text = f"{value['mean']:+.1f} [{value['low']:+.1f}, {value['high']:+.1f}]"
    return f"[bold]{text}*[/bold]" if best else f"{text} "
