"""The loss of every token of a suffix or of a whole text, with a gradient where one is wanted."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from memloc_lens.forward import final_residual
from memloc_lens.generation import rows_for
from memloc_lens.library_types import HookedModel
from memloc_lens.logits import target_losses
from memloc_lens.sequence import MemorizedSequence, equal_length_batches


def whole(sequence: MemorizedSequence) -> MemorizedSequence:
    """Return the same text with its first token as prompt, so that all others are learned or measured."""
    return MemorizedSequence(sequence.tokens, 1, sequence.id, sequence.category)


def token_losses(
    model: HookedModel, sequences: Sequence[MemorizedSequence], batch: int = 16
) -> list[Float[Tensor, " _"]]:
    """Return -log p(token | all before it) of every token of each suffix, in nats.

    Args:
        model: used as it is, ablated or not; gradients reach its parameters.
        sequences: of any lengths.
        batch: maximum number of sequences at a time.

    Example:
        >>> with torch.no_grad():
        ...     (losses,) = token_losses(model, [sequence])
        >>> losses.shape, bool(losses.mean() < 0.5)
        (torch.Size([48]), True)
    """
    found: dict[int, Tensor] = {}
    for indices, group in equal_length_batches(sequences, rows_for(model, sequences, batch)):
        losses = target_losses(model, final_residual(model, group), group)
        found |= dict(zip(indices, losses, strict=True))
    return [found[index] for index in range(len(sequences))]
