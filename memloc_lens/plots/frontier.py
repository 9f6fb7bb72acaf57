"""What is forgotten against the damage to all else."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import plotly.graph_objects as go

from memloc_lens.benchmarks.frontier import FrontierSettings, damages, grids_of, perplexity_before
from memloc_lens.checks import check_choice
from memloc_lens.plots.style import error_bars, escaped, figure, method_line, percent, style_of
from memloc_lens.runs.finished import FinishedRun, read_run
from memloc_lens.runs.schema import Record
from memloc_lens.runs.statistics import mean_interval

Damage = Literal["neg_acc", "ppl"]
HEADINGS: dict[str, str] = {
    "neg_acc": "Neg-Acc lost (points)",
    "ppl": "rise of the perplexity (%)",
}


def folders(runs: str | Path | Sequence[str | Path]) -> tuple[Path, ...]:
    """Return the folders of one or more runs.

    Raises:
        ValueError: if there are none, or one is named twice.
    """
    each = [runs] if isinstance(runs, str | Path) else runs
    return FrontierSettings(tuple(map(Path, each))).runs


def frontier_figure(runs: str | Path | Sequence[str | Path], damage: Damage = "neg_acc") -> go.Figure:
    """Draw what the targets lose against the damage, one line a method, one point a share.

    Args:
        runs: folders of finished DEL runs of one model on the same targets and negatives, or one folder.
        damage: what the other memorized sequences lose, in points; or the rise of the perplexity, in percent of what it
            was.

    Returns:
        Means over targets with 95% intervals. Published figures are open markers; they have no damage in perplexity.

    Raises:
        ValueError: if a folder holds no finished DEL run, runs do not fit together, or one has not measured the damage.

    Example:
        >>> drawn = frontier_figure("runs/del")
        >>> [line.name for line in drawn.data]
        ['activations', 'random']
    """
    check_choice("damage", damage, get_args(Damage))
    finished = [read_run(folder, "del") for folder in folders(runs)]
    grids = grids_of(finished)
    perplexity = perplexity_before(finished[0])
    traces = [_line(method, of_targets, damage, perplexity) for method, of_targets in grids.items()]
    published = list(_published(finished, grids)) if damage == "neg_acc" else []
    shares = sorted({record["ratio"] for of_targets in grids.values() for record in of_targets[0]})
    return figure(
        traces + published,
        "Forgetting against damage",
        f"mean of {len(next(iter(grids.values())))} sequences, 95% intervals; {_in_words(shares)}"
        + "; open: published" * bool(published),
        x=dict(title=HEADINGS[damage]),
        y=dict(title="Self-Acc lost (points)"),
    )


def _line(method: str, grids: Sequence[Sequence[Record]], damage: Damage, perplexity: float | None) -> go.Scatter:
    grids = [sorted(grid, key=lambda record: record["ratio"]) for grid in grids]
    measured = [damages(grid, perplexity).get(damage) for grid in grids]
    known = [each for each in measured if each is not None]
    if len(known) < len(grids):
        raise ValueError(
            f"the runs of {method} have not measured {damage}; draw another damage, or run DEL with a text"
        )
    x = [mean_interval(at_share) for at_share in zip(*known, strict=True)]
    y = [mean_interval([-record["self_acc"] for record in at_share]) for at_share in zip(*grids, strict=True)]
    return method_line(
        method,
        [point["mean"] for point in x],
        y,
        error_x=error_bars(x, style_of(method).colour),
        text=[percent(record["ratio"]) for record in grids[0]],
        hovertemplate="%{text} dropped: %{y:.1f} lost, damage %{x:.2f}",
    )


def _published(runs: Sequence[FinishedRun], drawn: Mapping[str, object]) -> Iterator[go.Scatter]:
    """Yield the published figures of each method; one that has no line of its own is named in the legend."""
    methods = {method: figures for run in runs for method, figures in run.summary.get("published", {}).items()}
    for method, figures in methods.items():
        colour, symbol, _ = style_of(method)
        points = {share: cell for share, cell in figures.items() if {"self_acc", "neg_acc"} <= cell.keys()}
        if points:
            yield go.Scatter(
                x=[-cell["neg_acc"] for cell in points.values()],
                y=[-cell["self_acc"] for cell in points.values()],
                text=[percent(float(share)) for share in points],
                name=f"{escaped(method)}, published",
                showlegend=method not in drawn,
                mode="markers",
                marker=dict(color=colour, symbol=f"{symbol}-open", size=9, line=dict(width=1.5)),
                hovertemplate="%{text} dropped: %{y:.1f} lost, damage %{x:.2f}",
            )


def _in_words(shares: Sequence[float]) -> str:
    if len(shares) <= 4:
        return f"shares of {', '.join(map(percent, shares))}"
    return f"{len(shares)} shares of {percent(shares[0])} to {percent(shares[-1])}"
