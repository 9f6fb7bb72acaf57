"""The table at the end of a run: methods as rows, metrics as columns, one block a ratio."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from rich.console import Console
from rich.table import Table

from memloc_lens.runs.schema import Cells, DeletionSummary, InjectionSummary, TuningSummary
from memloc_lens.runs.visible import plain


@runtime_checkable
class Column(Protocol):
    """A metric as a column: its name in the summary, its heading, which change is better, and the printed format."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def heading(self) -> str: ...  # noqa: D102
    @property
    def better(self) -> int: ...  # noqa: D102
    @property
    def form(self) -> str: ...  # noqa: D102


@dataclass(frozen=True)
class CountColumn:
    """The number of components as a column: the fewer, the better."""

    name: str
    better: int = -1
    form: str = ".0f"

    @property
    def heading(self) -> str:
        """The plural of the components."""
        return self.name


def smallest_sets_heading(summary: DeletionSummary) -> str:
    """Return what the smallest sets of a summary are sets of, and until when components were dropped."""
    smallest = summary["smallest_sets"]
    limit = "" if smallest["limit"] is None else f" is below {smallest['limit']:g}"
    return f"Smallest sets of {summary['component']}s, until {smallest['until']}{limit}"


def wide_console(console: Console | None = None) -> Console:
    """Return a console as wide as tables need if the output is not a terminal."""
    console = console or Console()
    return console if console.is_terminal else Console(file=console.file, width=160)


def print_comparison(
    summary: DeletionSummary | InjectionSummary,
    heading: str,
    title_of: Callable[[str], str],
    columns_of: Callable[[str], Sequence[Column]],
    footer: Iterable[str] = (),
    console: Console | None = None,
) -> None:
    """Print means with 95% intervals, the best of each column marked with *, published figures below a method.

    Args:
        summary: of a DEL or INJ run.
        heading: printed above the tables.
        title_of: gives the title of the table of a ratio.
        columns_of: gives the columns of the table of a ratio; those without a heading or values are left out.
        footer: lines below the tables.
        console: where to print. Default: the terminal, or as wide as needed if there is none.
    """
    console = wide_console(console)
    console.print()
    console.print(plain(heading), "means with 95% intervals; * marks the best of a column", sep="\n", highlight=False)
    for ratio in dict.fromkeys(ratio for cells in summary["methods"].values() for ratio in cells):
        rows = {method: cells[ratio] for method, cells in summary["methods"].items() if ratio in cells}
        columns = [
            column
            for column in columns_of(ratio)
            if column.heading and any(column.name in cells for cells in rows.values())
        ]
        table = Table(title=plain(title_of(ratio)), title_justify="left", title_style="bold")
        table.add_column("method", no_wrap=True)
        for column in columns:
            table.add_column(column.heading, justify="right", no_wrap=True)
        if summary["benchmark"] == "del":
            before = summary["before"]
            means = (f"{before[column.name]['mean']:.1f}" if column.name in before else "" for column in columns)
            table.add_row("before", *means, style="dim")
        for method, cells in rows.items():
            table.add_row(plain(method), *(_cell(column, cells, _best(column, rows)) for column in columns))
            figures = summary.get("published", {}).get(method, {}).get(ratio)
            if figures:
                paper = (f"{figures[c.name]:{c.form}}" if c.name in figures else "" for c in columns)
                table.add_row("  published", *paper, style="dim")
        console.print(table)
    for line in (*footer, *_partial(summary)):
        console.print(plain(line), highlight=False)


def _partial(summary: DeletionSummary | InjectionSummary) -> Iterator[str]:
    """Yield the methods of DEL that were measured on fewer sequences than the table is about."""
    for method, ratios in summary["methods"].items() if summary["benchmark"] == "del" else ():
        counts = {cell["n"] for cells in ratios.values() for name, cell in cells.items() if name == "self_acc"}
        if counts and min(counts) < summary["sequences"]:
            yield f"{method}: {min(counts)} of {summary['sequences']} sequences only; name it in a run to complete it"


def _best(column: Column, rows: dict[str, Cells]) -> float:
    means = [cells[column.name]["mean"] for cells in rows.values() if column.name in cells]
    return max(means, key=lambda mean: column.better * mean)


def _cell(column: Column, cells: Cells, best: float) -> str:
    if column.name not in cells:
        return ""
    value = cells[column.name]
    mean, low, high = (f"{number:{column.form}}" for number in (value["mean"], value["low"], value["high"]))
    marked = f"[bold]{mean}*[/bold]" if value["mean"] == best else f"{mean} "
    return f"{marked}\n[dim]\\[{low}, {high}][/dim]"


def print_tuning(summary: TuningSummary, console: Console | None = None) -> None:
    """Print what each setting of the learned masks reached, the chosen ones marked with *."""
    console = wide_console(console)
    ratios = list(dict.fromkeys(ratio for cells in summary["tried"].values() for ratio in cells))
    table = Table(title=f"Recall as a share of its ceiling, in points; {summary['sequences']} dev texts; * is chosen")
    table.add_column("settings", no_wrap=True)
    for ratio in ratios:
        table.add_column(f"{100 * float(ratio):g}%", justify="right", no_wrap=True)
    for name, cells in summary["tried"].items():
        chosen = "*" if name in summary["chosen"].values() else " "
        means = (
            f"{cells[ratio]['recall_of_ceiling']['mean']:.1f}{chosen}" if ratio in cells else "" for ratio in ratios
        )
        table.add_row(plain(name), *means, style="bold" if chosen == "*" else None)
    console.print(table)
