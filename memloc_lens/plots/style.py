"""How all figures look: one colour, marker and dash a method, and what titles, axes and heat maps have in common."""

import html
import re
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go

from memloc_lens.localizers import FURTHER, LOCALIZERS, WRAPPERS
from memloc_lens.runs.schema import Interval
from memloc_lens.runs.visible import visible

INK, LINES, CLEAR = "#808080", "rgba(128, 128, 128, 0.25)", "rgba(0, 0, 0, 0)"
"""Grey that reads on white and on black, of text and of lines, and what is not painted."""

COLOURS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#8C564B", "#0072B2", "#D55E00", "#B8A91D", "#999999")
"""Those of Okabe and Ito that read on white and on black; the brown, the olive and the grey are ours."""
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "triangle-down", "cross", "star")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
STYLES = len(COLOURS) * len(SYMBOLS)  # the two lengths share no factor, so that no pair comes twice

NAMES = (*LOCALIZERS, *FURTHER)
PLACES = (*NAMES, *(f"{wrapper}-{name}" for wrapper in WRAPPERS for name in NAMES))
"""The methods of the package, whose places decide what they look like."""

LABELS, LETTERS = 20, 24
"""The most labels beside a heat map, and the most letters of one."""


class Style(NamedTuple):
    """What a method looks like."""

    colour: str
    symbol: str
    dash: str


def style_of(method: str) -> Style:
    """Return what a method looks like in every figure; its marker tells it apart without colour.

    Args:
        method: name of a method; one that is not of the package's own has a look by its name.

    Example:
        >>> style_of("zero-out")
        Style(colour='#009E73', symbol='diamond', dash='solid')
    """
    if method in PLACES:
        place = PLACES.index(method)
    else:
        place = len(PLACES) + zlib.crc32(method.encode()) % (STYLES - len(PLACES))
    return Style(
        COLOURS[place % len(COLOURS)], SYMBOLS[place % len(SYMBOLS)], DASHES[place // len(COLOURS) % len(DASHES)]
    )


def escaped(text: object) -> str:
    """Return text as plotly shows it as it is written: not as HTML, and not as a formula.

    Example:
        >>> escaped("<b> for $5")
        '&lt;b&gt; for &#36;5'
    """
    return html.escape(visible(text), quote=False).replace("$", "&#36;")


def shortened(text: str) -> str:
    """Return an escaped label with at most 24 letters of it."""
    letters = re.findall(r"&[^;]*;|.", text)
    return text if len(letters) <= LETTERS else f"{''.join(letters[: LETTERS - 1])}…"


def percent(share: float) -> str:
    """Return a share as text.

    Example:
        >>> percent(0.005)
        '0.5%'
    """
    return f"{100 * share:g}%"


def method_line(method: str, x: Sequence[float], y: Sequence[Interval], **others: Any) -> go.Scatter:
    """Return the line of a method: means, with 95% intervals as error bars.

    Args:
        method: name of the method.
        x: one a point.
        y: one a point.
        others: of `go.Scatter`.
    """
    colour, symbol, dash = style_of(method)
    return go.Scatter(
        x=list(x),
        y=[point["mean"] for point in y],
        error_y=error_bars(y, colour),
        name=escaped(method),
        **dict(mode="lines+markers") | others,
        line=dict(color=colour, dash=dash, width=2),
        marker=dict(color=colour, symbol=symbol, size=8),
    )


def error_bars(points: Sequence[Interval], colour: str) -> dict[str, Any]:
    """Return 95% intervals as error bars of plotly; of few skewed values, one may not hold the mean."""
    return dict(
        type="data",
        symmetric=False,
        array=[max(point["high"] - point["mean"], 0) for point in points],
        arrayminus=[max(point["mean"] - point["low"], 0) for point in points],
        color=colour,
        thickness=1,
        width=3,
    )


def heat_map(values: Sequence[Sequence[float | None]], unit: str, **others: Any) -> go.Heatmap:
    """Return a heat map in colours that also read in grey; None leaves a cell empty.

    Args:
        values: row by row.
        unit: what the colours mean.
        others: of `go.Heatmap`; `x` and `y` are numbers, or names that are escaped already.
    """
    gap = 1 if max(len(values), len(values[0])) <= 4 * LABELS else 0
    return go.Heatmap(
        z=values,
        **dict(colorscale="Viridis", xgap=gap, ygap=gap) | others,
        colorbar=dict(title=dict(text=unit, side="right"), outlinewidth=0, thickness=14),
    )


def labels(names: Sequence[str]) -> dict[str, Any]:
    """Return the settings of an axis with escaped names: long ones are cut, and of many some are left out."""
    shown = names[:: -(-len(names) // LABELS)]
    return dict(type="category", tickvals=shown, ticktext=[shortened(name) for name in shown], showgrid=False)


def figure(
    traces: Sequence[Any], title: str, subtitle: str, x: dict[str, Any], y: dict[str, Any], height: int = 450
) -> go.Figure:
    """Return a figure on a transparent ground, which fits light and dark pages.

    Args:
        traces: of plotly.
        title: is escaped already, like all text here.
        subtitle: below the title, smaller.
        x: settings of the axis; `title` is its text.
        y: settings of the axis; `title` is its text.
        height: in pixels.
    """
    axis = dict(gridcolor=LINES, zerolinecolor=LINES, linecolor=INK, ticks="outside", tickcolor=LINES, automargin=True)
    layout = go.Layout(
        template="none",
        title=dict(text=title, subtitle=dict(text=subtitle, font=dict(size=12, color=INK)), x=0.02, xanchor="left"),
        font=dict(color=INK, size=13),
        paper_bgcolor=CLEAR,
        plot_bgcolor=CLEAR,
        xaxis=axis | x | dict(title=dict(text=x["title"])),
        yaxis=axis | y | dict(title=dict(text=y["title"])),
        height=height,
        margin=dict(t=90),
    )
    return go.Figure(list(traces), layout)
