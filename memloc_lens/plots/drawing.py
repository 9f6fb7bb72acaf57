"""A figure of plotly, drawn by matplotlib: lines, markers, bars and heat maps in one pair of axes."""

import html
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MultipleLocator, NullFormatter
from numpy import ndarray

DASHES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-.", "longdash": (0, (8, 3))}
MARKERS = {
    "circle": "o",
    "square": "s",
    "diamond": "D",
    "triangle-up": "^",
    "triangle-down": "v",
    "cross": "P",
    "x": "X",
    "star": "*",
}
PIXEL = 0.5
"""Points of a pixel: figures of a page are made smaller for a column."""

LINE, LETTER = 0.12, 4.0
"""Inches of a line of a title or of the legend, and points of a letter."""

Places = dict[str, int]
"""Where the names along an axis are; empty for numbers."""

Entry = tuple[Any, str]
"""A line of the legend: what was drawn, and its name."""


def drawn(figure: go.Figure, width: float) -> Figure:
    """Draw a figure of plotly.

    Args:
        figure: with traces of the kinds in `DRAWN`.
        width: in inches; the height has the proportions of the figure, and place for titles and legend.

    Raises:
        ValueError: if the figure has something that cannot be drawn.

    Example:
        >>> drawing = drawn(go.Figure(go.Scatter(x=[1, 10], y=[3, 4]), {"xaxis": {"type": "log"}}), width=3.3)
        >>> drawing.axes[0].get_xscale()
        'log'
    """
    _check(figure)
    layout = figure.layout
    drawing = Figure(figsize=(width, 1), layout="constrained", facecolor="white")
    axes = drawing.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    traces = [trace for trace in figure.data if trace.visible in (None, True)]
    places = {axis: _categories(traces, axis) for axis in ("x", "y")}
    entries = [entry for trace in traces for entry in DRAWN[trace.type](axes, trace, traces, places)]
    for axis, names in places.items():
        _set_axis(axes, axis, layout[f"{axis}axis"], names)
    lines = _set_titles(drawing, layout.title, width)
    if layout.showlegend or (layout.showlegend is None and len(entries) > 1):
        lines += _set_legend(drawing, entries, width)
    drawing.set_figheight(width * (layout.height or 450) / (layout.width or 700) + LINE * lines)
    return drawing


def _check(figure: go.Figure) -> None:
    """Refuse what would be left out or drawn elsewhere."""
    for trace in figure.data:
        if trace.type not in DRAWN:
            raise ValueError(f"a trace of the kind {trace.type!r} cannot be drawn; {', '.join(DRAWN)} can")
        if {getattr(trace, "xaxis", None), getattr(trace, "yaxis", None)} - {None, "x", "y"}:
            raise ValueError(f"the trace {trace.name!r} is in axes of its own; one pair of axes can be drawn")
        if trace.type == "scatter" and "text" in (trace.mode or ""):
            raise ValueError(f"the trace {trace.name!r} writes text; lines and markers can be drawn")
    for kind in ("shapes", "annotations", "images"):
        if figure.layout[kind]:
            raise ValueError(f"the layout has {kind}, which cannot be drawn; lines, markers, bars and heat maps can")


def text_of(text: str | None) -> str:
    """Return the text that plotly shows: line breaks as such, other tags left out.

    Example:
        >>> text_of("<b>a</b> &lt;b&gt;<br>c")
        'a <b>\\nc'
    """
    return html.unescape(re.sub(r"<[^>]*>", "", re.sub(r"<br */?>", "\n", text or "")))


def colour_of(colour: Any) -> Any:
    """Return a colour of plotly as matplotlib reads it; None stays.

    Example:
        >>> colour_of("rgba(255, 0, 0, 0.5)"), colour_of("#777777")
        ((1.0, 0.0, 0.0, 0.5), '#777777')
    """
    if not isinstance(colour, str) or not colour.startswith("rgb"):
        return colour
    red, green, blue, *alpha = map(float, re.findall(r"[\d.]+", colour))
    return (red / 255, green / 255, blue / 255, *alpha)


def _categories(traces: Sequence[Any], axis: str) -> Places:
    values = [value for trace in traces if trace[axis] is not None for value in trace[axis]]
    names = dict.fromkeys(values) if any(isinstance(value, str) for value in values) else {}
    return {name: place for place, name in enumerate(names)}


def _along(trace: Any, axis: str, size: int, places: dict[str, Places]) -> Float[ndarray, " point"]:
    """Return where the points of a trace are along an axis."""
    if trace[axis] is not None:
        return np.array([places[axis].get(value, value) for value in trace[axis]], dtype=float)
    start, step = (trace[f"{axis}0"], trace[f"d{axis}"])
    return (start or 0) + (1 if step is None else step) * np.arange(size, dtype=float)


def _scatter(axes: Axes, trace: go.Scatter, _: Sequence[Any], places: dict[str, Places]) -> list[Entry]:
    mode = trace.mode or ("lines+markers" if len(trace.y) < 20 else "lines")
    symbol = str(trace.marker.symbol or "circle")
    colour = colour_of(trace.line.color or trace.marker.color)
    x, y = (_along(trace, axis, len(trace.y), places) for axis in ("x", "y"))
    bars = axes.errorbar(
        x,
        y,
        xerr=_errors(trace.error_x),
        yerr=_errors(trace.error_y),
        color=colour,
        linestyle=DASHES[trace.line.dash or "solid"] if "lines" in mode else "none",
        linewidth=PIXEL * (trace.line.width or 2),
        marker=MARKERS.get(symbol.removesuffix("-open"), "o") if "markers" in mode else "none",
        markersize=PIXEL * (trace.marker.size or 6),
        markerfacecolor="none" if symbol.endswith("-open") else colour,
        elinewidth=0.6,
        capsize=1.2,
        alpha=trace.opacity,
        zorder=2 + (trace.zorder or 0),
    )
    return _entries(trace, bars.lines[0])


def _bar(axes: Axes, trace: go.Bar, traces: Sequence[Any], places: dict[str, Places]) -> list[Entry]:
    """Draw bars beside those of other traces."""
    beside = [other for other in traces if other.type == "bar"]
    width = 0.8 / len(beside)
    shift = next(place for place, other in enumerate(beside) if other is trace) - (len(beside) - 1) / 2
    bars = axes.bar(
        _along(trace, "x", len(trace.y), places) + shift * width,
        trace.y,
        width,
        yerr=_errors(trace.error_y),
        color=colour_of(trace.marker.color),
        error_kw=dict(elinewidth=0.6, capsize=1.2),
    )
    return _entries(trace, bars)


def _heatmap(axes: Axes, trace: go.Heatmap, _: Sequence[Any], places: dict[str, Places]) -> list[Entry]:
    values = np.array([[np.nan if value is None else value for value in row] for row in trace.z], dtype=float)
    x, y = (_along(trace, axis, size, places) for axis, size in zip("xy", values.shape[::-1], strict=True))
    colours = [(place, colour_of(colour)) for place, colour in trace.colorscale]
    mesh = axes.pcolormesh(
        _edges(x),
        _edges(y),
        np.ma.masked_invalid(values),
        cmap=LinearSegmentedColormap.from_list("", colours),
        vmin=trace.zmin,
        vmax=trace.zmax,
        rasterized=values.size > 2000,
    )
    bar = axes.figure.colorbar(mesh, ax=axes, label=text_of(trace.colorbar.title.text), pad=0.02)
    bar.outline.set_visible(False)
    for (row, column), value in np.ndenumerate(values) if trace.text is not None else ():
        dark = sum(mesh.cmap(mesh.norm(value))[:3]) < 1.5
        colour = "white" if dark else "black"
        place = float(x[column]), float(y[row])
        axes.text(*place, text_of(trace.text[row][column]), color=colour, ha="center", va="center", fontsize=6)
    return []


DRAWN: dict[str, Callable[[Axes, Any, Sequence[Any], dict[str, Places]], list[Entry]]] = {
    "scatter": _scatter,
    "bar": _bar,
    "heatmap": _heatmap,
}
"""What draws each kind of trace, and returns its lines of the legend."""


def _entries(trace: Any, artist: Any) -> list[Entry]:
    return [] if trace.showlegend is False or not trace.name else [(artist, text_of(trace.name))]


def _errors(bars: Any) -> list[Sequence[float]] | None:
    """Return how far error bars reach down and up."""
    if bars.array is None:
        return None
    return [bars.array if bars.symmetric is not False else bars.arrayminus, bars.array]


def _edges(centres: Float[ndarray, " cell"]) -> Float[ndarray, " edge"]:
    between = (centres[1:] + centres[:-1]) / 2
    first, last = (between[0], between[-1]) if len(between) else (centres[0] + 0.5, centres[0] - 0.5)
    return np.array([2 * centres[0] - first, *between, 2 * centres[-1] - last])


def _set_axis(axes: Axes, name: str, settings: Any, places: Places) -> None:
    """Give an axis its title, scale, range and labels."""
    axis = getattr(axes, f"{name}axis")
    axis.set_label_text(text_of(settings.title.text))
    if settings.type == "log":
        axes.set(**{f"{name}scale": "log"})
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    if settings.range is not None:
        axes.set(**{f"{name}lim": [10**end if settings.type == "log" else end for end in settings.range]})
    elif settings.rangemode == "tozero":
        axes.set(**{f"{name}lim": (min(0, getattr(axes, f"get_{name}lim")()[0]), None)})
    if settings.autorange == "reversed":
        axis.set_inverted(True)
    _set_ticks(axis, settings, places)
    if settings.showgrid is not False:
        axis.grid(True, color="#dddddd", linewidth=0.4)
        axes.set_axisbelow(True)


def _set_ticks(axis: Axis, settings: Any, places: Places) -> None:
    values = settings.tickvals if settings.tickvals is not None else tuple(places)
    texts = settings.ticktext if settings.ticktext is not None else values
    if settings.tickvals is not None or places:
        axis.set_ticks([places.get(value, value) for value in values], [text_of(str(text)) for text in texts])
    elif settings.type == "log":
        low, high = sorted(axis.get_view_interval())
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    elif settings.dtick is not None:
        axis.set_major_locator(MultipleLocator(settings.dtick))
    if settings.tickangle:
        axis.set_tick_params(rotation=-settings.tickangle)
        aslant = dict(ha="right", va="top", rotation_mode="anchor") if settings.tickangle > -90 else {}
        for label in axis.get_ticklabels():
            label.set(**aslant)


def _set_titles(drawing: Figure, title: Any, width: float) -> int:
    """Write the title and the subtitle in lines that fit, and return how many there are."""
    each = (text_of(title.text), text_of(title.subtitle.text))
    lines = [line for text in each for line in textwrap.wrap(text, int(width * 72 / LETTER))]
    if lines:
        drawing.suptitle("\n".join(lines), x=0.01, ha="left")
    return len(lines)


def _set_legend(drawing: Figure, entries: Sequence[Entry], width: float) -> int:
    """Write the legend below, and return how many lines it has."""
    longest = max(len(name) for _, name in entries)
    columns = max(1, min(len(entries), int(width * 72 / (LETTER * longest + 30))))
    # matplotlib leaves out names that start with "_", so that the names are written afterwards
    legend = drawing.legend(
        [artist for artist, _ in entries],
        ["x" * len(name) for _, name in entries],
        loc="outside lower center",
        ncols=columns,
        frameon=False,
    )
    for shown, (_, name) in zip(legend.get_texts(), entries, strict=True):
        shown.set_text(name)
    return -(-len(entries) // columns)
