"""Choose components by their scores."""

from collections.abc import Iterator
from typing import Literal, cast, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from memloc_lens.checks import check_choice, check_first_layer, check_number, check_tensor
from memloc_lens.components.kinds import NEURONS, Component, check_component
from memloc_lens.components.sets import ComponentSet, Neurons

Scope = Literal["layer", "global"]
Rounding = Literal["down", "nearest"]


def top_neurons(
    scores: Float[Tensor, "layer neuron"],
    ratio: float,
    first_layer: int = 0,
    scope: Scope = "layer",
    rounding: Rounding = "down",
) -> Neurons:
    """Return the share of the neurons with the highest scores.

    Args:
        scores: one a neuron, higher is more responsible. Of equal scores, those with the lower index go first.
        ratio: share of the neurons to take, in (0, 1].
        first_layer: layers before it are left out. DEL leaves out layer 0, INJ none.
        scope: take the share of every layer, or of all layers together.
        rounding: of the number of neurons. DEL in the paper rounds down, INJ to the nearest.

    Raises:
        ValueError: if the scores are not one number for each neuron of one sequence, the ratio is outside (0, 1] or
            takes no neuron, `first_layer` leaves no layer, or `scope` or `rounding` is not one of these words.

    Example:
        >>> top_neurons(torch.tensor([[0.1, 0.9, 0.5, 0.7]]), ratio=0.5).indices()
        [(0, 1), (0, 3)]
    """
    return cast(Neurons, top_components(scores, ratio, first_layer, scope, rounding, NEURONS))


def top_components(
    scores: Float[Tensor, " layer *unit"],
    ratio: float,
    first_layer: int = 0,
    scope: Scope = "layer",
    rounding: Rounding = "down",
    component: Component = NEURONS,
) -> ComponentSet:
    """Return the share of the components of a kind with the highest scores, as `top_neurons` does for neurons.

    Layers are ranked one after another, so that only the scores themselves and those chosen are held.
    """
    check_component(component)
    axes = component.axes.replace(" ", ", ")
    check_tensor("scores", scores, axes)
    if scores.ndim != len(component.axes.split()):
        raise ValueError(
            f"scores have the shape {list(scores.shape)}; those of one sequence are [{axes}]: choose from the scores "
            "of a list one sequence at a time"
        )
    check_choice("scope", scope, get_args(Scope))
    check_first_layer(first_layer, len(scores))
    eligible = scores[first_layer:].flatten(1)  # [layer, unit]
    missing = sum(int(row.isnan().sum()) for row in eligible)
    if missing:
        raise ValueError(f"{missing} of {scores.numel()} scores are NaN; {component.plural} cannot be ranked by them")
    together = 1 if scope == "layer" else len(eligible)
    count = count_of(ratio, eligible.shape[1] * together, rounding, component.plural)
    chosen = (_highest(eligible[start : start + together], count) for start in range(0, len(eligible), together))
    before = (torch.zeros_like(scores[layer], dtype=torch.bool) for layer in range(first_layer))
    after = (row.view(scores.shape[1:]) for rows in chosen for row in rows)
    return ComponentSet.from_layers((row for rows in (before, after) for row in rows), component)


def _highest(rows: Float[Tensor, "row unit"], count: int) -> Iterator[Bool[Tensor, " unit"]]:
    """Mark the `count` highest values of the rows together, row by row; of equal values the first."""
    best = rows.new_empty(0)
    for row in rows:
        both = torch.cat([best, row])
        best = both.topk(min(count, len(both))).values
    threshold = best[-1]
    left = count - sum(int((row > threshold).sum()) for row in rows)
    for row in rows:
        ties = (row == threshold).nonzero().flatten()[:left]
        left -= len(ties)
        yield (row > threshold).index_fill(0, ties, True)


def count_of(ratio: float, total: int, rounding: Rounding = "down", plural: str = "neurons") -> int:
    """Return how many of `total` components a ratio takes.

    Raises:
        ValueError: if the ratio is outside (0, 1] or takes none, or the rounding is unknown.

    Example:
        >>> count_of(0.01, 768), count_of(0.01, 768, "nearest")
        (7, 8)
    """
    check_choice("rounding", rounding, get_args(Rounding))
    check_number("the ratio", ratio, above=0, most=1)
    # a product that is whole up to rounding error, as 0.29 * 100, counts as whole
    exact = round(ratio * total, 9)
    count = int(exact) if rounding == "down" else round(exact)
    if count == 0:
        raise ValueError(
            f"a ratio of {ratio} takes none of {total} {plural}; the smallest that takes one is {1 / total:.2g}"
        )
    return count
