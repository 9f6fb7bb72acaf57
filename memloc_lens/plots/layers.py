"""In which layers a method locates sequences."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor

from memloc_lens.benchmarks.deletion import located
from memloc_lens.benchmarks.deletion_settings import DeletionSettings
from memloc_lens.benchmarks.finished_del import dropping, target_scores
from memloc_lens.components import ComponentSet, component_of, count_of
from memloc_lens.plots.style import INK, figure, method_line, percent
from memloc_lens.runs.finished import read_run
from memloc_lens.runs.statistics import mean_interval


def layer_figure(run: str | Path, ratio: float | None = None) -> go.Figure:
    """Draw how the located components spread over the layers, one line a method.

    A run that dropped the same share of every layer has as many components in each. So as many as it dropped are taken
    here from all layers together, by the scores that it kept.

    Args:
        run: folder of a finished DEL run.
        ratio: of the run. Default: its largest.

    Returns:
        Means over targets of each layer's part of the located components, in percent, with 95% intervals. The dashed
        line is an even spread.

    Raises:
        ValueError: if the folder holds no finished DEL run, has no records at the ratio, or lacks scores.

    Example:
        >>> drawn = layer_figure("runs/del")
        >>> round(sum(drawn.data[0].y))
        100
    """
    finished = read_run(Path(run), "del")
    ratio = finished.check_ratio(ratio, max(finished.ratios, default=None))
    settings, targets = dropping(finished), finished.summary["sequences"]
    methods = [method for method in finished.methods if finished.at(method, ratio)]
    located_in = {
        method: [_highest(settings, scores, ratio).counts() for scores in target_scores(finished, method, targets)]
        for method in methods
    }
    layers = range(settings.first_layer, len(located_in[methods[0]][0]))
    plural = component_of(settings.component).plural
    again = ", taken from all layers together" if settings.scope == "layer" else ""
    return figure(
        [*(_line(method, counts, layers) for method, counts in located_in.items()), _even(layers)],
        f"Layers of the located {plural}",
        f"{percent(ratio)} of the {plural}{again}; mean of {targets} sequences, 95% intervals",
        x=dict(title="layer", dtick=-(-len(layers) // 16)),
        y=dict(title=f"located {plural} (%)", rangemode="tozero"),
    )


def _highest(settings: DeletionSettings, scores: Float[Tensor, " layer *unit"], ratio: float) -> ComponentSet:
    """Return as many components as a run dropped, from all layers together."""
    if settings.scope == "layer":
        width = scores[0].numel()
        ratio = count_of(ratio, width) / width
    return located(replace(settings, scope="global"), scores, ratio)


def _line(method: str, counts: Sequence[Sequence[int]], layers: range) -> go.Scatter:
    parts = [mean_interval([100 * of_target[layer] / sum(of_target) for of_target in counts]) for layer in layers]
    return method_line(method, layers, parts, hovertemplate="layer %{x}: %{y:.1f}%")


def _even(layers: range) -> go.Scatter:
    return go.Scatter(
        x=[layers[0], layers[-1]],
        y=[100 / len(layers)] * 2,
        name="even",
        mode="lines",
        line=dict(color=INK, dash="dash", width=1.5),
        hoverinfo="skip",
    )
