"""Pictures of runs, erasures, sequences and scores."""

from memloc_lens.plots.cost import cost_figure
from memloc_lens.plots.forgetting import forgetting_figure
from memloc_lens.plots.frontier import frontier_figure
from memloc_lens.plots.layers import layer_figure
from memloc_lens.plots.pairs import confusion_figure, overlap_figure
from memloc_lens.plots.recall import recall_figure
from memloc_lens.plots.relearning import relearning_figure
from memloc_lens.plots.save import save_figure
from memloc_lens.plots.scores import score_map

__all__ = [
    "confusion_figure",
    "cost_figure",
    "forgetting_figure",
    "frontier_figure",
    "layer_figure",
    "overlap_figure",
    "recall_figure",
    "relearning_figure",
    "save_figure",
    "score_map",
]
