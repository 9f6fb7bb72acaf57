import math

import pytest
import torch

from memloc_lens.plots import score_map
from memloc_lens.plots.scores import COLUMNS


@pytest.mark.parametrize("width", [1, 36, 400, 401, 768, 1601])
def test_a_column_shows_the_highest_of_its_neighbours(width):
    scores = torch.randn(3, width, generator=torch.Generator().manual_seed(width))
    (trace,) = score_map(scores).data
    columns = len(trace.z[0])
    assert width / columns <= math.ceil(width / COLUMNS)
    assert columns <= COLUMNS
    for layer in range(3):
        for column in range(columns):
            centre = trace.x0 + column * trace.dx
            start, stop = math.ceil(centre - trace.dx / 2), math.ceil(centre + trace.dx / 2)
            assert trace.z[layer][column] == max(scores[layer].tolist()[start:stop])


def test_scores_that_are_no_numbers_are_empty_cells():
    scores = torch.tensor([[1.0, math.nan, math.inf, -math.inf]])
    (trace,) = score_map(scores.double().requires_grad_()).data
    assert list(trace.z[0]) == [1.0, None, None, None]
