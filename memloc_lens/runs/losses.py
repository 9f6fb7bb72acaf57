"""The losses of a model before a run changes it: what is not finite there cannot be measured."""

from collections.abc import Sequence

import torch

from memloc_lens.forward import final_residual
from memloc_lens.library_types import HookedModel
from memloc_lens.logits import target_loss
from memloc_lens.memory import rows_at_once
from memloc_lens.sequence import MemorizedSequence, equal_length_batches


@torch.no_grad()
def check_losses(model: HookedModel, sequences: Sequence[MemorizedSequence], batch: int) -> None:
    """Refuse sequences whose loss is NaN or infinite, as when half precision overflows.

    Args:
        model: as it is.
        sequences: to be measured.
        batch: maximum number of sequences at a time.

    Raises:
        ValueError: naming the sequence.
    """
    longest = max(len(sequence.tokens) for sequence in sequences)
    for indices, group in equal_length_batches(sequences, min(batch, rows_at_once(model, longest, longest))):
        on_device = group.to(model.cfg.device)
        losses = target_loss(model, final_residual(model, on_device), on_device)
        for index, loss in zip(indices, losses.tolist(), strict=True):
            if not torch.isfinite(torch.tensor(loss)):
                raise ValueError(
                    f"the loss of sequence {sequences[index].id!r} is {loss} before any ablation; take a dtype with a "
                    "wider range"
                )
