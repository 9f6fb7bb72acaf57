"""What all localizers share: the step from sequences to batches, and back to scores."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from memloc_lens.forward import frozen
from memloc_lens.memory import in_chunks, rows_at_once
from memloc_lens.sequence import MemorizedSequence, equal_length_batches

ScoreBatch = Callable[[HookedTransformer, Int[Tensor, "batch pos"], int], Float[Tensor, "batch layer neuron"]]


def score(
    model: HookedTransformer,
    sequences: MemorizedSequence | Sequence[MemorizedSequence],
    score_batch: ScoreBatch,
    graph_layers: int = 0,
    rows_each: int = 1,
) -> Float[Tensor, "*sequence layer neuron"]:
    """Score one sequence, or many: sequences of equal length go through `score_batch` together.

    Args:
        model: left exactly as found.
        sequences: one sequence gives [layer, neuron], a list gives [sequence, layer, neuron].
        score_batch: takes the model, equally long rows of tokens and their prompt length.
        graph_layers: layers that it runs with a graph for a backward pass.
        rows_each: copies of a sequence that it runs at once.

    Raises:
        ValueError: if the list is empty, or the model cannot read a sequence.
    """
    many = [sequences] if isinstance(sequences, MemorizedSequence) else list(sequences)
    if not many:
        raise ValueError("no sequence to localize was given")
    for sequence in many:
        sequence.check_fits(model)
    device = torch.device(model.cfg.device)

    def score_group(tokens: Int[Tensor, "group pos"], prompt_len: int) -> Float[Tensor, "group layer neuron"]:
        length = tokens.shape[1]
        size = max(1, rows_at_once(model, length, length - prompt_len, graph_layers) // rows_each)
        return torch.cat(in_chunks(tokens, size, lambda some: score_batch(model, some.to(device), prompt_len)))

    scores = torch.zeros(len(many), model.cfg.n_layers, model.cfg.d_mlp, device=device)
    with frozen(model):
        for places, tokens, prompt_len in equal_length_batches(many, len(many)):
            scores[places] = score_group(tokens, prompt_len).float()
    return scores[0] if isinstance(sequences, MemorizedSequence) else scores
