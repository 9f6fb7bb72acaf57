"""The pictures of runs and audits, each with a sentence in place of it and the numbers behind it."""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go

from memloc_lens import plots
from memloc_lens.plots.relearning import TITLES
from memloc_lens.runs.finished import FinishedRun


@dataclass(frozen=True)
class Picture:
    """A figure with what a reader has who cannot see it.

    Args:
        name: of its file, and in the page.
        heading: above it.
        figure: of plotly.
        alternative: a sentence in place of it.
        table: the numbers behind it, the first row being the headings.
    """

    name: str
    heading: str
    figure: go.Figure
    alternative: str
    table: list[list[str]]


@dataclass(frozen=True)
class Missing:
    """A picture that cannot be drawn, and why."""

    heading: str
    reason: str


Drawn = dict[str, tuple[str, Callable[[], go.Figure]]]
"""By name: a heading, and what draws the figure."""


def pictures(run: FinishedRun, ratio: float | None = None) -> list[Picture | Missing]:
    """Return the pictures of a run.

    Args:
        run: of DEL or INJ.
        ratio: of the pictures of one ratio, for DEL.
    """
    return _pictures(_drawn(run, ratio))


def relearning_pictures(folder: Path, lessons: Collection[str]) -> list[Picture | Missing]:
    """Return the curves of relearning of an erased checkpoint.

    Args:
        folder: of the checkpoint, with an audit.
        lessons: that the audit has; names that are none are left out, since they would name files.
    """
    return _pictures(
        {
            f"relearning-{lesson}": (title, partial(plots.relearning_figure, folder, lesson))
            for lesson, title in TITLES.items()
            if lesson in lessons
        }
    )


def _drawn(run: FinishedRun, ratio: float | None) -> Drawn:
    folder = run.path
    if run.summary["benchmark"] == "inj":
        return {
            f"recall-{each:g}": (f"Recall, {100 * each:g}% injected", partial(plots.recall_figure, folder, ratio=each))
            for each in run.ratios
        }
    found: Drawn = {
        "frontier": ("Forgetting against damage", partial(plots.frontier_figure, [folder])),
        "frontier-ppl": ("Forgetting against perplexity", partial(plots.frontier_figure, [folder], damage="ppl")),
        "cost": ("Cost against quality", partial(plots.cost_figure, [folder])),
        "layers": ("Where the located components are", partial(plots.layer_figure, folder, ratio=ratio)),
        "confusion": ("Which sequences are damaged", partial(plots.confusion_figure, folder, ratio=ratio)),
        "overlap": ("Do methods choose the same?", partial(plots.overlap_figure, folder, ratio=ratio)),
    }
    first = run.records[0]["sequence"]
    found["forgetting"] = ("Forgetting token by token", partial(plots.forgetting_figure, folder, first, ratio=ratio))
    if "ppl" not in run.summary["before"]:
        del found["frontier-ppl"]
    return found


def _pictures(drawn: Drawn) -> list[Picture | Missing]:
    return [_picture(name, heading, draw) for name, (heading, draw) in drawn.items()]


def _picture(name: str, heading: str, draw: Callable[[], go.Figure]) -> Picture | Missing:
    try:
        figure = draw()
    except ValueError as error:
        return Missing(heading, str(error))
    return Picture(name, heading, figure, alternative(figure), table(figure))


def alternative(figure: go.Figure) -> str:
    """Return a sentence that says what a figure shows."""
    layout = figure.layout
    axes = [_text(axis.title.text) for axis in (layout.xaxis, layout.yaxis)]
    names = [_text(trace.name) for trace in figure.data if trace.name and trace.showlegend is not False]
    of = f", of {', '.join(dict.fromkeys(names))}" if names else ""
    kind = "Heat map" if figure.data and figure.data[0].type == "heatmap" else "Chart"
    return f"{kind} of {axes[1] or 'rows'} against {axes[0] or 'columns'}{of}. {_text(layout.title.text)}".strip()


def table(figure: go.Figure) -> list[list[str]]:
    """Return the numbers of a figure: those of a heat map as they lie, otherwise a row for each point of a line."""
    (first, *_) = figure.data
    if first.type == "heatmap":
        values = np.asarray(first.z, dtype=float)
        columns = range(values.shape[1]) if first.x is None else first.x
        rows = range(values.shape[0]) if first.y is None else first.y
        return [
            ["", *map(_text, columns)],
            *([_text(row), *map(_number, line)] for row, line in zip(rows, values, strict=True)),
        ]
    layout = figure.layout
    headings = ["", _text(layout.xaxis.title.text), _text(layout.yaxis.title.text), "interval"]
    return [headings, *(row for trace in figure.data for row in _points(trace))]


def _points(trace: Any) -> list[list[str]]:
    above = getattr(trace.error_y, "array", None) if "error_y" in trace else None
    below = getattr(trace.error_y, "arrayminus", None) if above is not None else None
    rows = []
    for index, (x, y) in enumerate(zip(trace.x, trace.y, strict=True)):
        interval = ""
        if above is not None:
            low = y - (above if below is None else below)[index]
            interval = f"{_number(low)} to {_number(y + above[index])}"
        rows.append([_text(trace.name), _number(x), _number(y), interval])
    return rows


def _number(value: Any) -> str:
    if not isinstance(value, int | float | np.number):
        return _text(value)
    return "" if np.isnan(value) else f"{value:.4g}"


def _text(value: Any) -> str:
    """Return text as plotly shows it: without its tags and entities."""
    return unescape(re.sub(r"<[^>]*>", " ", str(value or "" if value is None else value))).strip()
