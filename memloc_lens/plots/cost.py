"""What is forgotten at equal damage against the seconds that it takes to localize a sequence."""

from collections.abc import Sequence
from pathlib import Path

import plotly.graph_objects as go

from memloc_lens.benchmarks.frontier import MAIN, FrontierSettings, compare
from memloc_lens.plots.frontier import folders
from memloc_lens.plots.style import error_bars, figure, method_line, style_of
from memloc_lens.runs.schema import Cells, Interval

LEAST = 0.001
"""Runs record no fewer seconds."""


def cost_figure(runs: str | Path | Sequence[str | Path]) -> go.Figure:
    """Draw what the targets lose at 2 points of damage against the seconds to localize a sequence, a point a method.

    Args:
        runs: folders of finished DEL runs of one model on the same targets and negatives, or one folder.

    Returns:
        Means over targets with 95% intervals. Less than a millisecond is drawn as one.

    Raises:
        ValueError: if a folder holds no finished DEL run, or runs do not fit together.

    Example:
        >>> drawn = cost_figure("runs/del")
        >>> drawn.layout.xaxis.type
        'log'
    """
    compared = compare(FrontierSettings(folders(runs)))
    return figure(
        [_point(method, found["values"]) for method, found in compared["methods"].items()],
        "Forgetting against time",
        f"mean of {len(compared['sequences'])} sequences, 95% intervals; at 2 points of Neg-Acc",
        x=dict(title="time to localize a sequence (seconds)", type="log"),
        y=dict(title="Self-Acc lost (points)", rangemode="tozero"),
    )


def _point(method: str, values: Cells) -> go.Scatter:
    measured = values["seconds"]
    seconds: Interval = {
        "mean": max(measured["mean"], LEAST),
        "low": max(measured["low"], LEAST),
        "high": max(measured["high"], LEAST),
        "n": measured["n"],
    }
    return method_line(
        method,
        [seconds["mean"]],
        [values[MAIN]],
        mode="markers",
        error_x=error_bars([seconds], style_of(method).colour),
        hovertemplate="%{y:.1f} lost, %{x:.3g} seconds",
    )
