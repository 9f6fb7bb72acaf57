"""A picture of the scores of one sequence."""

import math

import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from memloc_lens.checks import check_tensor
from memloc_lens.plots.style import figure, heat_map

COLUMNS = 400
"""The most columns that a page shows apart."""


def score_map(scores: Float[Tensor, "layer neuron"]) -> go.Figure:
    """Draw the scores of a localizer, a row a layer.

    Args:
        scores: of one sequence, for every neuron or head.

    Returns:
        A heat map. Where a layer has more than 400 neurons, neighbours share a column, which shows the highest of them.

    Raises:
        ValueError: if the scores are no matrix.

    Example:
        >>> drawn = score_map(Activations()(model, sequence))
        >>> len(drawn.data[0].z) == model.cfg.n_layers
        True
    """
    check_tensor("scores", scores, "layer, neuron")
    if scores.ndim != 2 or not scores.numel():
        raise ValueError(
            f"scores have the shape {list(scores.shape)}; those of one sequence are [layer, neuron]: draw them one "
            "sequence at a time"
        )
    layers, width = scores.shape
    together = math.ceil(width / COLUMNS)
    binned = highest(scores.detach().float().cpu(), together)
    values = [[value if math.isfinite(value) else None for value in row] for row in binned.tolist()]
    shared = f"; a column is the highest of {together} neighbours" if together > 1 else ""
    return figure(
        [heat_map(values, "score", x0=(together - 1) / 2, dx=together, hovertemplate=_hover(together))],
        "Scores",
        f"{layers} layers of {width}{shared}",
        x=dict(title="index in the layer", showgrid=False),
        y=dict(title="layer", showgrid=False, dtick=math.ceil(layers / 16)),
        height=min(230 + 24 * layers, 700),
    )


def highest(scores: Float[Tensor, "layer neuron"], together: int) -> Float[Tensor, "layer column"]:
    """Return the highest of so many neighbours at a time; the last column may have fewer."""
    missing = -scores.shape[1] % together
    return pad(scores, (0, missing), value=-math.inf).unflatten(1, (-1, together)).amax(dim=2)


def _hover(together: int) -> str:
    return f"layer %{{y}}, {'index' if together == 1 else 'around'} %{{x}}: %{{z:.4g}}<extra></extra>"
