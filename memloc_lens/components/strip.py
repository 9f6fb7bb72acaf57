"""A set of components as a picture for notebooks: a row a layer, with marks where components are."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from memloc_lens.markup import escaped

COLUMNS = 400  # at most: what a screen can tell apart, and a page can hold of many layers
WIDTH, HEIGHT, ROW, LEFT, RIGHT = 480, 10, 13, 28, 60  # pixels: of a row, from row to row, and of labels beside it


def strip(layers: Sequence[Bool[np.ndarray, " column"]], counts: Sequence[int], about: str) -> str:
    """Draw the layers as SVG in the colour of the text around it, so that it is seen on light and on dark pages.

    Args:
        layers: True where a column has a component, as `binned` returns it.
        counts: number of components in each layer.
        about: what the picture shows, its text alternative.

    Returns:
        SVG whose text alternative also tells the counts.
    """
    columns = max(len(layer) for layer in layers)
    told = escaped(f"{about}; by layer: {', '.join(map(str, counts))}")
    rows = [
        f'<g transform="translate(0 {ROW * index})"><text x="{LEFT - 4}" y="9" text-anchor="end">{index}</text>'
        f'<rect x="{LEFT}" width="{WIDTH}" height="{HEIGHT}" fill-opacity=".12"/>'
        f'<path transform="translate({LEFT} 0) scale({WIDTH / columns:.6g} {HEIGHT})" d="{_marks(layer)}"/>'
        f'<text x="{LEFT + WIDTH + 4}" y="9">{count}</text></g>'
        for index, (layer, count) in enumerate(zip(layers, counts, strict=True))
    ]
    width, height = LEFT + WIDTH + RIGHT, ROW * len(layers)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{told}" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" fill="currentColor" font-size="10" style="max-width:100%;height:auto">'
        f"<title>{told}</title>{''.join(rows)}</svg>"
    )


def binned(members: Bool[np.ndarray, " unit"]) -> Bool[np.ndarray, " column"]:
    """Return the members of a layer in at most `COLUMNS` columns, True where a column has one.

    Example:
        >>> import numpy as np
        >>> binned(np.arange(1000) == 998).nonzero()[0].tolist()
        [332]
    """
    units = units_of_column(len(members))
    filled = np.pad(members, (0, -len(members) % units))
    return np.logical_or.reduce(filled.reshape(-1, units), axis=1)


def units_of_column(width: int) -> int:
    """Return how many units of a layer share a column.

    Example:
        >>> units_of_column(400), units_of_column(768)
        (1, 2)
    """
    return -(-width // COLUMNS)


def _marks(layer: Bool[np.ndarray, " column"]) -> str:
    """Return a path of a rectangle for each run of columns that have components."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], layer, [False]]).astype(np.int8)))
    return "".join(f"M{start} 0h{stop - start}v1h-{stop - start}z" for start, stop in edges.reshape(-1, 2))
