"""The table at the end of a run: methods as rows, metrics as columns, one block a ratio."""

from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Column:
    """A metric as a column.

    Args:
        metric: its name in the summary.
        heading: its name in the table.
        better: whether a higher (1) or a lower (-1) value is better.
        form: how a value is written.
    """

    metric: str
    heading: str
    better: int = 1
    form: str = ".1f"

    def best(self, rows: dict[str, Any]) -> float:
        """The best mean of the column."""
        return max((cells[self.metric]["mean"] for cells in rows.values() if self.metric in cells), key=self._key)

    def _key(self, mean: float) -> float:
        return self.better * mean


DELETION = (
    Column("self_acc", "Self-Acc", -1, "+.1f"),
    Column("self_dist", "Self-Dist", 1, "+.1f"),
    Column("self_free_acc", "Free-Acc", -1, "+.1f"),
    Column("neg_acc", "Neg-Acc", 1, "+.1f"),
    Column("neg_dist", "Neg-Dist", -1, "+.1f"),
    Column("control_acc", "Ctrl-Acc", 1, "+.1f"),
    Column("ppl", "PPL", -1, "+.1f"),
)


def insertion_columns(ratio: float) -> tuple[Column, ...]:
    """The columns of an INJ table."""
    return (
        *(Column(f"recall@{times * ratio:g}", f"R@{100 * times * ratio:g}%") for times in (1, 2, 5)),
        Column("recall_of_ceiling", "of ceiling"),
        Column(f"recall_global@{ratio:g}", "R global"),
        Column("auroc", "AUROC", form=".3f"),
        Column("auroc_net", "AUROC net", form="+.3f"),
        Column("average_precision", "AP", form=".3f"),
    )


def print_table(summary: dict[str, Any], console: Console | None = None) -> None:
    """Print a summary: means with 95% intervals, the best of each column marked with *, published figures beside.

    Args:
        summary: what `summary.json` of a DEL or INJ run holds.
        console: where to; by default the terminal, or as wide as needed where there is none.
    """
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=160)
    if summary["benchmark"] == "tuning":
        _print_tuning(summary, console)
        return
    is_deletion = summary["benchmark"] == "del"
    where = f"{summary['model']}, {summary['sequences']}"
    heading = (
        f"DEL on {where} sequences: change when the located neurons are dropped (accuracies in points, distances in "
        "characters)"
        if is_deletion
        else f"INJ on {where} texts: how many of the neurons that a text was written into are found (recall in points)"
    )
    console.print(f"\n{heading}\nmeans with 95% intervals; * marks the best of a column", highlight=False)
    for ratio in dict.fromkeys(ratio for cells in summary["methods"].values() for ratio in cells):
        rows = {method: cells[ratio] for method, cells in summary["methods"].items() if ratio in cells}
        wanted = DELETION if is_deletion else insertion_columns(float(ratio))
        columns = [column for column in wanted if any(column.metric in cells for cells in rows.values())]
        table = Table(title=_title(summary, ratio), title_justify="left", title_style="bold")
        table.add_column("method", no_wrap=True)
        for column in columns:
            table.add_column(column.heading, justify="right", no_wrap=True)
        if is_deletion:
            before = summary["before"]
            table.add_row("before", *(f"{before[column.metric]['mean']:.1f}" for column in columns), style="dim")
        for method, cells in rows.items():
            table.add_row(method, *(_cell(column, cells, column.best(rows)) for column in columns))
            figures = summary.get("published", {}).get(method, {}).get(ratio)
            if figures:
                paper = (f"{figures[c.metric]:{c.form}}" if c.metric in figures else "" for c in columns)
                table.add_row("  published", *paper, style="dim")
        console.print(table)
    if text := summary.get("text"):
        console.print(
            f"PPL is of {text['tokens']} tokens: {text['mean']:.1f} before, 95% interval {text['low']:.1f} to "
            f"{text['high']:.1f} over rows of the text",
            highlight=False,
        )
    for ratio, injections in summary.get("injections", {}).items():
        if injections["failed"]:
            console.print(f"{_share(ratio)} of all neurons were too few for {', '.join(injections['failed'])}")


def _title(summary: dict[str, Any], ratio: str) -> str:
    if summary["benchmark"] == "del":
        return f"{_share(ratio)} of {'all' if summary['scope'] == 'global' else 'each layer' + chr(39) + 's'} neurons"
    made = summary["injections"][ratio]
    ceiling = next(cells[ratio]["recall_ceiling"]["mean"] for cells in summary["methods"].values() if ratio in cells)
    return (
        f"{_share(ratio)} of all neurons: {made['succeeded']} of {made['texts']} texts injected, in "
        f"{made['steps']['mean']:.0f} steps on average; ceiling of R@{_share(ratio)} {ceiling:.1f}; AUROC of W_out's "
        f"norms {made['auroc_weight_norm']['mean']:.3f}, of their change {made['auroc_norm_change']['mean']:.3f}"
    )


def _share(ratio: str) -> str:
    return f"{100 * float(ratio):g}%"


def _cell(column: Column, cells: dict[str, Any], best: float) -> str:
    if column.metric not in cells:
        return ""
    value = cells[column.metric]
    mean, low, high = (f"{value[part]:{column.form}}" for part in ("mean", "low", "high"))
    marked = f"[bold]{mean}*[/bold]" if value["mean"] == best else f"{mean} "
    return f"{marked}\n[dim]\\[{low}, {high}][/dim]"


def _print_tuning(summary: dict[str, Any], console: Console) -> None:
    ratios = list(dict.fromkeys(ratio for cells in summary["tried"].values() for ratio in cells))
    table = Table(title=f"Recall as a share of its ceiling, in points; {summary['sequences']} dev texts; * is chosen")
    table.add_column("settings", no_wrap=True)
    for ratio in ratios:
        table.add_column(_share(ratio), justify="right", no_wrap=True)
    for name, cells in summary["tried"].items():
        chosen = "*" if name in summary["chosen"].values() else " "
        means = (
            f"{cells[ratio]['recall_of_ceiling']['mean']:.1f}{chosen}" if ratio in cells else "" for ratio in ratios
        )
        table.add_row(name, *means, style="bold" if chosen == "*" else None)
    console.print(table)
