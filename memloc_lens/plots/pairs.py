"""Heat maps of pairs: what a target's components cost each sequence, and how alike the sets of two methods are."""

from pathlib import Path
from statistics import fmean

import plotly.graph_objects as go

from memloc_lens.benchmarks.finished_del import located_sets
from memloc_lens.components import component_of
from memloc_lens.plots.style import escaped, figure, heat_map, labels, percent
from memloc_lens.runs.finished import FinishedRun, read_run

CELL, AROUND = 22, 200
"""Pixels of a row, and of what is above and below a heat map."""


def confusion_figure(run: str | Path, method: str | None = None, ratio: float | None = None) -> go.Figure:
    """Draw the accuracy that every sequence loses without the components of each target.

    Args:
        run: folder of a finished DEL run.
        method: of the run. Default: the one with the largest loss of accuracy on the targets.
        ratio: of the run. Default: its largest.

    Returns:
        A heat map of points lost: rows are targets, columns the targets and then the other memorized sequences. Cells
        that were not measured are empty.

    Raises:
        ValueError: if the folder holds no finished DEL run, or lacks the method or the ratio.

    Example:
        >>> drawn = confusion_figure("runs/del", "activations")
        >>> len(drawn.data[0].z)
        2
    """
    finished = read_run(Path(run), "del")
    ratio = finished.check_ratio(ratio, max(finished.ratios, default=None))
    method = _most_lost(finished, ratio) if method is None else finished.check_method(method)
    changes = {target: record.get("acc_changes") for target, record in finished.at(method, ratio).items()}
    if None in changes.values():
        raise ValueError(f"the records of {run} do not tell sequences apart; run DEL again in a new folder")
    columns = list(dict.fromkeys([*changes, *(id for row in changes.values() for id in row or ())]))
    x, y = list(map(escaped, columns)), list(map(escaped, changes))
    values = [[-row[id] if id in row else None for id in columns] for row in changes.values() if row is not None]
    hover = "%{y} dropped: %{x} loses %{z:.1f}<extra></extra>"
    return figure(
        [heat_map(values, "points lost", x=x, y=y, hovertemplate=hover)],
        f"What {escaped(method)} costs each sequence",
        f"{percent(ratio)} of the {component_of(finished.config.get('component', 'neuron')).plural} dropped",
        x=labels(x) | dict(title="sequence", tickangle=-90),
        y=labels(y) | dict(title="target", autorange="reversed"),
        height=AROUND + 60 + CELL * min(len(changes), 40),
    )


def _most_lost(run: FinishedRun, ratio: float) -> str:
    """Return the method with the largest loss of accuracy on the targets."""
    records = {method: run.at(method, ratio).values() for method in run.methods}
    return min(
        (method for method in records if records[method]),
        key=lambda method: fmean(record["self_acc"] for record in records[method]),
    )


def overlap_figure(run: str | Path, ratio: float | None = None) -> go.Figure:
    """Draw how alike the sets of components are that two methods locate for a sequence.

    Args:
        run: folder of a finished DEL run.
        ratio: of the run. Default: its largest.

    Returns:
        A heat map of the Jaccard overlap of each pair of methods, the mean over targets, in percent.

    Raises:
        ValueError: if the folder holds no finished DEL run, has no records at the ratio, or lacks scores.

    Example:
        >>> drawn = overlap_figure("runs/del")
        >>> drawn.data[0].z[0][0]
        100.0
    """
    finished = read_run(Path(run), "del")
    ratio = finished.check_ratio(ratio, max(finished.ratios, default=None))
    targets = finished.summary["sequences"]
    methods = [method for method in finished.methods if finished.at(method, ratio)]
    sets = [located_sets(finished, method, ratio, targets) for method in methods]
    values = [
        [100 * fmean(here.overlap(there) for here, there in zip(row, column, strict=True)) for column in sets]
        for row in sets
    ]
    plural, names = component_of(finished.config["component"]).plural, list(map(escaped, methods))
    hover = "%{y} and %{x}: %{z:.1f}%<extra></extra>"
    return figure(
        [heat_map(values, "overlap (%)", x=names, y=names, zmin=0, zmax=100, texttemplate="%{text}",
                  text=[[f"{value:.0f}" for value in row] for row in values], hovertemplate=hover)],
        f"Overlap of the {plural} that two methods locate",
        f"Jaccard, {percent(ratio)} of the {plural}, mean of {targets} sequences",
        x=labels(names) | dict(title="", tickangle=-45),
        y=labels(names) | dict(title="", autorange="reversed"),
        height=AROUND + 100 + 2 * CELL * len(methods),
    )  # fmt: skip
