"""What all localizers share: the step from sequences to batches, and back to scores."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from memloc_lens.forward import frozen
from memloc_lens.sequence import MemorizedSequence, equal_length_batches

ScoreBatch = Callable[[HookedTransformer, Int[Tensor, "batch pos"], int], Float[Tensor, "batch layer neuron"]]


def score(
    model: HookedTransformer,
    sequences: MemorizedSequence | Sequence[MemorizedSequence],
    score_batch: ScoreBatch,
    batch: int = 16,
) -> Float[Tensor, "*sequence layer neuron"]:
    """Score one sequence, or many: sequences of equal length go through `score_batch` together.

    Args:
        model: left exactly as found.
        sequences: one sequence gives [layer, neuron], a list gives [sequence, layer, neuron].
        score_batch: takes the model, equally long rows of tokens and their prompt length.
        batch: sequences at a time.

    Raises:
        ValueError: if the list is empty, or the model cannot read a sequence.
    """
    many = [sequences] if isinstance(sequences, MemorizedSequence) else list(sequences)
    if not many:
        raise ValueError("no sequence to localize was given")
    for sequence in many:
        sequence.check_fits(model)
    device = torch.device(model.cfg.device)
    scores = torch.zeros(len(many), model.cfg.n_layers, model.cfg.d_mlp, device=device)
    with frozen(model):
        for places, tokens, prompt_len in equal_length_batches(many, batch):
            scores[places] = score_batch(model, tokens.to(device), prompt_len).float()
    return scores[0] if isinstance(sequences, MemorizedSequence) else scores
