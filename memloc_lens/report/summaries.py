"""What was run, and the tables of a run's summary, as a page shows them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from memloc_lens.benchmarks.injection import metrics_at
from memloc_lens.benchmarks.measurement import METRICS
from memloc_lens.runs.finished import FinishedRun
from memloc_lens.runs.schema import Cells
from memloc_lens.tables.terminal import Column, CountColumn, smallest_sets_heading

NOT_TOLD = ("sequences", "methods", "written_by", "extents", "smallest_sets", "context")
"""Parts of a configuration that are too long for a list, or told elsewhere."""


@dataclass(frozen=True)
class Cell:
    """A figure: its value, how it is printed, its interval in words, and whether it is the best of its column."""

    value: float
    text: str
    interval: str = ""
    best: bool = False


@dataclass(frozen=True)
class Row:
    """A method, or the state before; a kind "method" is sorted, others stay where they are."""

    name: str
    kind: str
    cells: list[Cell | None]


@dataclass(frozen=True)
class Table:
    """A table of methods."""

    title: str
    headings: list[str]
    rows: list[Row] = field(default_factory=list)
    note: str = ""


def about(run: FinishedRun) -> dict[str, Any]:
    """Return what was run: names and values, `methods` with their settings, and the commands that `made` it."""
    return {
        "facts": {name: value for name, value in run.config.items() if name not in NOT_TOLD and value is not None},
        "methods": {
            method: {name: value for name, value in settings.items() if name != "callable"}
            for method, settings in run.config["methods"].items()
            if method in run.methods
        },
        "made": run.config.get("written_by", []),
    }


def tables(run: FinishedRun) -> list[Table]:
    """Return a table for each ratio of a run's summary."""
    return _of_deletion(run.summary) if run.summary["benchmark"] == "del" else _of_injection(run.summary)


def _of_deletion(summary: Mapping[str, Any]) -> list[Table]:
    plural = f"{summary['component']}s"
    whose = "all" if summary["scope"] == "global" else "each layer's"
    note = (
        "Changes when the located components are dropped; accuracies in points, distances in characters. Means with "
        f"95% intervals over {summary['sequences']} sequences."
    )
    found = [
        _table(f"{100 * float(ratio):g}% of {whose} {plural}", ratio, summary, METRICS, note, summary["before"])
        for ratio in _ratios(summary)
    ]
    if "smallest_sets" in summary:
        smallest = {"methods": {name: {"": cells} for name, cells in summary["smallest_sets"]["methods"].items()}}
        columns = [CountColumn(plural), *METRICS]
        found.append(_table(smallest_sets_heading(summary), "", smallest, columns, note))  # type: ignore[arg-type]
    return found


def _of_injection(summary: Mapping[str, Any]) -> list[Table]:
    found = []
    for ratio in _ratios(summary):
        made = summary["injections"][ratio]
        note = (
            f"{made['succeeded']} of {made['texts']} texts injected, in {made['steps']['mean']:.0f} steps on average. "
            f"AUROC of the norms of the weights {made['auroc_weight_norm']['mean']:.3f}, of their change "
            f"{made['auroc_norm_change']['mean']:.3f}. Recall in points; means with 95% intervals over texts."
        )
        title = f"Injected into {100 * float(ratio):g}% of all {summary['component']}s"
        found.append(_table(title, ratio, summary, metrics_at(float(ratio)), note))
    return found


def _ratios(summary: Mapping[str, Any]) -> list[str]:
    return sorted({ratio for cells in summary["methods"].values() for ratio in cells}, key=float)


def _table(
    title: str,
    ratio: str,
    summary: Mapping[str, Any],
    columns: Sequence[Column],
    note: str,
    before: Cells | None = None,
) -> Table:
    cells_of = {method: ratios[ratio] for method, ratios in summary["methods"].items() if ratio in ratios}
    shown = [c for c in columns if c.heading and any(c.name in cells for cells in cells_of.values())]
    table = Table(title, [column.heading for column in shown], note=note)
    if before:
        means = [before[column.name]["mean"] if column.name in before else None for column in shown]
        table.rows.append(
            Row("before", "before", [mean if mean is None else Cell(mean, f"{mean:.1f}") for mean in means])
        )
    for method, cells in cells_of.items():
        table.rows.append(Row(method, "method", [_cell(column, cells, cells_of.values()) for column in shown]))
        figures = summary.get("published", {}).get(method, {}).get(ratio)
        if figures:
            paper = [Cell(figures[c.name], f"{figures[c.name]:{c.form}}") if c.name in figures else None for c in shown]
            table.rows.append(Row(f"{method}, published", "published", paper))
    return table


def _cell(column: Column, cells: Cells, all_cells: Any) -> Cell | None:
    if column.name not in cells:
        return None
    own = cells[column.name]
    best = max((c[column.name]["mean"] for c in all_cells if column.name in c), key=lambda mean: column.better * mean)
    mean, low, high = (f"{own[name]:{column.form}}" for name in ("mean", "low", "high"))  # type: ignore[literal-required]
    return Cell(own["mean"], mean, f"{low} to {high}", own["mean"] == best)
