"""Find near-duplicates: sequences that share more than a few 5-grams."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

GRAM = 5


def near_duplicate_groups(rows: Sequence[Sequence[int]], threshold: float = 0.05) -> Int[np.ndarray, " row"]:
    """Group rows of tokens that are near-duplicates.

    Two rows are joined if the Jaccard index of their sets of 5-grams is above the threshold. A group is all rows that
    are joined directly or through others. The work grows with the number of shared 5-grams, not with the pairs of rows.

    Args:
        rows: of token ids.
        threshold: Jaccard index, from 0 to 1.

    Returns:
        The number of the group of every row.

    Source: Chang et al. (2024), app. A.

    Example:
        >>> from memloc_lens.data.near_duplicates import near_duplicate_groups
        >>> near_duplicate_groups([range(10), range(1, 11), range(20, 30)]).tolist()
        [0, 0, 1]
    """
    contains = _gram_matrix(rows)
    sizes = contains.sum(axis=1)
    shared = (contains @ contains.T).tocoo()
    jaccard = shared.data / (sizes[shared.row] + sizes[shared.col] - shared.data)
    joined = csr_array((jaccard > threshold, (shared.row, shared.col)), shape=shared.shape)
    joined.eliminate_zeros()
    return connected_components(joined, directed=False)[1]


def _gram_matrix(rows: Sequence[Sequence[int]]) -> csr_array:
    """Return a sparse matrix [row, gram] with a 1 where the row has the 5-gram."""
    numbers: dict[tuple[int, ...], int] = {}
    row_indices, columns = [], []
    for index, row in enumerate(rows):
        grams = {tuple(row[start : start + GRAM]) for start in range(len(row) - GRAM + 1)}
        columns += [numbers.setdefault(gram, len(numbers)) for gram in grams]
        row_indices += [index] * len(grams)
    ones = np.ones(len(columns), dtype=np.int64)
    return csr_array((ones, (row_indices, columns)), shape=(len(rows), max(len(numbers), 1)))
