"""How many of the injected components are found in a share of every layer."""

from pathlib import Path
from statistics import fmean

import plotly.graph_objects as go

from memloc_lens.components import ComponentSet, component_of
from memloc_lens.metrics import recall_ceiling
from memloc_lens.plots.style import INK, figure, method_line, percent
from memloc_lens.runs.finished import FinishedRun, read_run
from memloc_lens.runs.statistics import mean_interval

RECALL = "recall@"


def recall_figure(run: str | Path, ratio: float | None = None) -> go.Figure:
    """Draw the recall of the injected components against the share of every layer that is taken, one line a method.

    Args:
        run: folder of a finished INJ run.
        ratio: of the injections. Default: the smallest of the run.

    Returns:
        Means over texts with 95% intervals. The dashed line is the recall of perfect scores, from the ground truths
        kept with the scores.

    Raises:
        ValueError: if the folder holds no finished INJ run, has no records at the ratio, or lacks scores.

    Example:
        >>> drawn = recall_figure("runs/inj")
        >>> [line.name for line in drawn.data]
        ['activations', 'random', 'ceiling']
    """
    finished = read_run(Path(run), "inj")
    ratio = finished.check_ratio(ratio, min(finished.ratios, default=None))
    plural = component_of(finished.config.get("component", "neuron")).plural
    shares = _shares(finished, ratio)
    traces = [_line(finished, method, ratio, shares) for method in finished.methods if finished.at(method, ratio)]
    texts = len({record["sequence"] for record in finished.records if record["ratio"] == ratio})
    return figure(
        [*traces, _ceiling(finished, ratio, shares)],
        f"Recall of the {plural} that a text was injected into",
        f"{percent(ratio)} of all {plural}, mean of {texts} texts, 95% intervals",
        x=dict(title="share of each layer taken (%)", type="log", dtick=1),
        y=dict(title="recall (points)", rangemode="tozero"),
    )


def _shares(run: FinishedRun, ratio: float) -> list[float]:
    """Return the shares at which every record has a recall, ascending."""
    records = [record for record in run.records if record["ratio"] == ratio]
    names = set.intersection(*({name for name in record if name.startswith(RECALL)} for record in records))
    return sorted(float(name.removeprefix(RECALL)) for name in names)


def _line(run: FinishedRun, method: str, ratio: float, shares: list[float]) -> go.Scatter:
    records = run.at(method, ratio).values()
    return method_line(
        method,
        [100 * share for share in shares],
        [mean_interval([record[f"{RECALL}{share:g}"] for record in records]) for share in shares],
        hovertemplate="%{y:.1f} found in %{x:g}%",
    )


def _ceiling(run: FinishedRun, ratio: float, shares: list[float]) -> go.Scatter:
    """Return the mean recall of perfect scores: some layers hold more of the ground truth than their share."""
    method = next(method for method in run.methods if run.at(method, ratio))
    places = [index for index, (id, _) in enumerate(run.config["sequences"]) if id in run.at(method, ratio)]
    component = component_of(run.config["component"])
    truths = [ComponentSet(run.scores(method, ratio, place)["gold"], component) for place in places]
    return go.Scatter(
        x=[100 * share for share in shares],
        y=[fmean(recall_ceiling(truth, share) for truth in truths) for share in shares],
        name="ceiling",
        mode="lines",
        line=dict(color=INK, dash="dash", width=1.5),
        hovertemplate="at most %{y:.1f} in %{x:g}%",
    )
