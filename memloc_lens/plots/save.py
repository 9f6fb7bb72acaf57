"""Figures of plotly as files for a paper, without a browser: matplotlib draws them."""

from pathlib import Path
from typing import Any, Literal

import plotly.graph_objects as go

from memloc_lens.checks import described

WIDTHS = {1: 3.3, 2: 6.9}
"""Inches of one and of two columns of a paper."""

FORMATS: dict[str, dict[str, None]] = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
"""What is written, with what is left out of it, so that the same figure makes the same file."""

SETTINGS: dict[Any, Any] = {
    "font.size": 7,
    "figure.titlesize": 7,
    "axes.labelsize": 7,
    "xtick.labelsize": 6,
    "ytick.labelsize": 6,
    "legend.fontsize": 6.5,
    "axes.linewidth": 0.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "memloc_lens",
    "pdf.fonttype": 42,
    "text.parse_math": False,
}
"""Text stays text, and `$` a letter."""


def save_figure(figure: go.Figure, path: str | Path, columns: Literal[1, 2] = 1) -> None:
    """Write a figure as PNG, SVG or PDF, as wide as one or two columns of a paper.

    Nothing else of matplotlib changes. PNG has 300 dots an inch; text in SVG and PDF is text.

    Args:
        figure: of this package, or any of lines, markers, bars and heat maps in one pair of axes.
        path: of the file; its suffix says what is written.
        columns: 1 for 3.3 inches, 2 for 6.9.

    Raises:
        ValueError: if the suffix is another one, or the figure is none, or has something that cannot be drawn.

    Example:
        >>> save_figure(go.Figure(go.Scatter(x=[1, 2], y=[3, 4])), "line.svg")
        >>> Path("line.svg").read_text().startswith("<?xml")
        True
    """
    import matplotlib

    from memloc_lens.plots.drawing import drawn

    if not isinstance(figure, go.Figure):
        raise ValueError(f"the figure is {described(figure)}; give a figure of plotly")
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"{str(path)!r} ends with {suffix!r}; write a file that ends with {', '.join(FORMATS)}")
    if columns not in WIDTHS:
        raise ValueError(f"columns is {columns!r}; a figure is 1 or 2 columns wide")
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # in the user's style, text may be white
        matplotlib.rcParams.update(SETTINGS)
        drawing = drawn(figure, WIDTHS[columns])
        drawing.savefig(path, format=suffix[1:], dpi=300, metadata=FORMATS[suffix])
