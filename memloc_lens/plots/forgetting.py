"""How probable each token of a sequence is before and after its components are dropped."""

from pathlib import Path

import plotly.graph_objects as go

from memloc_lens.plots.style import escaped, figure, heat_map, labels, percent
from memloc_lens.runs.finished import FinishedRun, read_run
from memloc_lens.runs.schema import BEFORE, Record


def forgetting_figure(run: str | Path, sequence: str, ratio: float | None = None) -> go.Figure:
    """Draw the probability of every token of a suffix, given all true tokens before it: before, and with each method.

    Args:
        run: folder of a finished DEL run.
        sequence: id of a target.
        ratio: of the run. Default: its largest.

    Returns:
        A heat map: the first row is before any ablation, then one a method; a column a token of the suffix.

    Raises:
        ValueError: if the folder holds no finished DEL run, lacks the sequence or the ratio, or is of a version that
            did not record probabilities.

    Example:
        >>> drawn = forgetting_figure("runs/del", sequence.id)
        >>> drawn.layout.yaxis.ticktext
        ('before', 'activations', 'random')
    """
    finished = read_run(Path(run), "del")
    ratio = finished.check_ratio(ratio, max(finished.ratios, default=None))
    rows = _rows(finished, sequence, ratio)
    missing = [name for name, record in rows.items() if "probabilities" not in record]
    if missing:
        raise ValueError(f"{run} has no probabilities of tokens {_state(missing[0])}; run DEL again in a new folder")
    values = [record["probabilities"] for record in rows.values()]
    names = list(map(escaped, rows))
    hover = "%{y}, token %{x}: %{z:.3f}<extra></extra>"
    return figure(
        [heat_map(values, "probability", x0=1, y=names, zmin=0, zmax=1, hovertemplate=hover)],
        f"Forgetting of {escaped(sequence)}",
        f"probability of each token of its suffix; {percent(ratio)} dropped",
        x=dict(title="token of the suffix", showgrid=False),
        y=labels(names) | dict(title="", autorange="reversed"),
        height=210 + 28 * len(rows),
    )


def _rows(run: FinishedRun, sequence: str, ratio: float) -> dict[str, Record]:
    """Return the record before any ablation and that of each method."""
    found = {method: run.at(method, ratio) for method in run.methods}
    rows = {method: records[sequence] for method, records in found.items() if sequence in records}
    if sequence not in run.before or not rows:
        targets = ", ".join(dict.fromkeys(record["sequence"] for record in run.records))
        raise ValueError(f"{run.path} has no sequence {sequence!r}; it has {targets}")
    return {BEFORE: run.before[sequence], **rows}


def _state(row: str) -> str:
    return "before the ablation" if row == BEFORE else f"with {row}"
