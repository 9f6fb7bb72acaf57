"""How erased texts come back, step by step of fine-tuning, beside how new texts are learned."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import plotly.graph_objects as go

from memloc_lens.erase.page import read_audit
from memloc_lens.erase.relearning import Relearned
from memloc_lens.plots.style import COLOURS, INK, escaped, figure

TITLES: Mapping[str, str] = {
    "itself": "Relearning from the text itself",
    "half": "Relearning from the first half of the text",
    "related": "Relearning from related texts",
}
"""The titles of lessons."""

LOOKS: Mapping[str, tuple[str, str]] = {
    "erased": (COLOURS[6], "solid"),
    "new": (COLOURS[5], "dot"),
    "retrained": (COLOURS[2], "dashdot"),
}
"""The kinds of texts in the order of the legend, with the colour and the dash of their lines."""


def relearning_figure(folder: str | Path, lesson: str = "itself") -> go.Figure:
    """Draw how much of the watched suffixes is right before the first mistake against the steps of fine-tuning.

    Texts have suffixes of different lengths, so that the tokens that are right are given in percent of the limit: half
    of the suffix, rounded up, at which a text counts as learned. Its curve stops there; in the mean its last value
    counts from then on.

    Args:
        folder: of an erased checkpoint with an audit.
        lesson: what is trained on: `itself`, the `half` of the text that is not watched, or `related` texts.

    Returns:
        A mean line for each kind of text: `erased`, `new` ones, and the erased ones in a model that was `retrained`
        without them. Thin lines are single texts, and the dashed one is the limit.

    Raises:
        ValueError: if the folder holds no audit, or the audit lacks the lesson.

    Example:
        >>> drawn = relearning_figure("runs/erased")
        >>> [line.name for line in drawn.data[:3]]
        ['erased, 1 text', 'new, 1 text', 'limit: half of the suffix']
    """
    lessons = read_audit(Path(folder))["relearning"]
    if lesson not in lessons:
        raise ValueError(f"the audit of {folder} has no lesson {lesson!r}; it has {', '.join(lessons)}")
    relearned = lessons[lesson]["relearned"]
    kinds = {kind: relearned[kind] for kind in LOOKS if kind in relearned}
    last = max(point["step"] for texts in kinds.values() for each in texts.values() for point in each["curve"])
    means = [_mean(kind, list(texts.values()), last) for kind, texts in kinds.items()]
    single = [_single(kind, id, each) for kind, texts in kinds.items() for id, each in sorted(texts.items())]
    return figure(
        [*means, _limit(last), *single],
        TITLES.get(lesson, escaped(lesson)),
        "means over texts; thin: single ones, whose last value counts once they are learned",
        x=dict(title="steps of fine-tuning"),
        y=dict(title="tokens right (% of the limit)", rangemode="tozero"),
    )


def _mean(kind: str, texts: Sequence[Relearned], last: int) -> go.Scatter:
    """Return the mean line of a kind, from the first step to the last of any kind."""
    colour, dash = LOOKS[kind]
    steps = sorted({last, *(point["step"] for each in texts for point in each["curve"])})
    return go.Scatter(
        x=steps,
        y=[fmean(_reached(each, step) for each in texts) for step in steps],
        name=f"{kind}, {len(texts)} {'text' if len(texts) == 1 else 'texts'}",
        mode="lines",
        line=dict(color=colour, dash=dash, width=4),
        zorder=1,
        hovertemplate="%{y:.0f}% of the limit after %{x} steps",
    )


def _reached(relearned: Relearned, step: int) -> float:
    """Return the tokens that are right after some steps, or when the curve stopped, in percent of the limit."""
    (*_, point) = sorted((each for each in relearned["curve"] if each["step"] <= step), key=lambda each: each["step"])
    return 100 * point["prefix"] / relearned["limit"]


def _single(kind: str, id: str, relearned: Relearned) -> go.Scatter:
    colour, dash = LOOKS[kind]
    return go.Scatter(
        x=[point["step"] for point in relearned["curve"]],
        y=[100 * point["prefix"] / relearned["limit"] for point in relearned["curve"]],
        text=[f"{point['prefix']} tokens" for point in relearned["curve"]],
        name=f"{kind}: {escaped(id)}",
        showlegend=False,
        mode="lines+markers",
        opacity=0.35,
        line=dict(color=colour, dash=dash, width=1),
        marker=dict(color=colour, size=3),
        hovertemplate="%{text} right after %{x} steps",
    )


def _limit(last: int) -> go.Scatter:
    return go.Scatter(
        x=[0, last],
        y=[100, 100],
        name="limit: half of the suffix",
        mode="lines",
        line=dict(color=INK, dash="dash", width=1.5),
        hoverinfo="skip",
    )
