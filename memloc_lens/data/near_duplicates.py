"""Near-duplicates: sequences that share more than a few 5-grams."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

GRAM = 5


def near_duplicate_groups(rows: Sequence[Sequence[int]], threshold: float = 0.05) -> Int[np.ndarray, " row"]:
    """For each row of tokens the number of its group; rows are joined by the Jaccard index of their 5-grams.

    Two rows are joined if the share of their 5-grams that both have is above the threshold, and a group is all that
    joins reach, directly or through others (Chang et al., 2024, app. A). Work grows with the 5-grams shared, not
    with the pairs of rows.

    Example:
        >>> near_duplicate_groups([range(10), range(1, 11), range(20, 30)]).tolist()
        [0, 0, 1]
    """
    numbers: dict[tuple[int, ...], int] = {}
    grams = [
        sorted(
            {numbers.setdefault(tuple(row[start : start + GRAM]), len(numbers)) for start in range(len(row) - GRAM + 1)}
        )
        for row in rows
    ]
    sizes = np.array([len(each) for each in grams], dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    columns = np.concatenate([np.array(each, dtype=np.int64) for each in grams]) if grams else np.zeros(0, np.int64)
    has = csr_array((np.ones(len(columns), dtype=np.int64), columns, starts), shape=(len(rows), max(len(numbers), 1)))
    shared = (has @ has.T).tocoo()
    jaccard = shared.data / (sizes[shared.row] + sizes[shared.col] - shared.data)
    joined = csr_array((jaccard > threshold, (shared.row, shared.col)), shape=shared.shape)
    joined.eliminate_zeros()
    return connected_components(joined, directed=False)[1]
