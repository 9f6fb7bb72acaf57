"""Is a sequence still extracted, by its own prompt or by others?

Each variant of a prompt is followed by the true suffix, so that one teacher-forced pass tells what greedy decoding and
sampling give: see `Recitation`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from memloc_lens.checks import check_model, check_number
from memloc_lens.erase.variants import VARIANTS
from memloc_lens.forward import final_residual
from memloc_lens.generation import rows_for
from memloc_lens.isolation import isolated
from memloc_lens.library_types import HookedModel
from memloc_lens.logits import at_least_float32, target_logits
from memloc_lens.sequence import MemorizedSequence, check_sequences, equal_length_batches
from memloc_lens.smallest_set import Recitation, recitation_of


@torch.no_grad()
def recitations(
    model: HookedModel, sequences: Sequence[MemorizedSequence], samples: int = 1000, batch: int = 16
) -> list[Recitation]:
    """Return what the model recites of each sequence after its prompt.

    Args:
        model: used as it is, ablated or not.
        sequences: of any lengths.
        samples: number of samples at temperature 1 of which one is to be the exact suffix.
        batch: maximum number of sequences at a time.

    Raises:
        ValueError: if the model cannot read a sequence, or a loss is NaN.

    Example:
        >>> (recitation,) = recitations(model, [sequence])
        >>> recitation.prefix, recitation.strength
        (48, 1.0)
    """
    model = check_model(model)
    sequences = check_sequences(model, sequences)
    check_number("samples", samples, least=1, whole=True)
    found: dict[int, Recitation] = {}
    with isolated(model):
        for indices, group in equal_length_batches(sequences, rows_for(model, sequences, batch)):
            logits: Tensor = target_logits(model, final_residual(model, group), group)
            for index, row in zip(indices, logits, strict=True):
                found[index] = recitation_of(at_least_float32(row), sequences[index], samples)
    return [found[index] for index in range(len(sequences))]


def extraction(
    model: HookedModel, sequences: Sequence[MemorizedSequence], samples: int = 1000, batch: int = 16
) -> dict[str, list[Recitation | None]]:
    """Return for each variant of the prompt what the model recites of each sequence; None where it has no such variant.

    Args:
        model: used as it is, ablated or not.
        sequences: of any lengths.
        samples: number of samples at temperature 1 of which one is to be the exact suffix.
        batch: maximum number of sequences at a time.

    Raises:
        ValueError: if the model cannot read a sequence, or a loss is NaN.

    Example:
        >>> found = extraction(model, [sequence])
        >>> list(found)
        ['own', 'shifted', 'later', 'cut', 'perturbed', 'typos', 'upper', 'lower', 'surrounded']
        >>> found["own"][0].prefix
        48
    """
    sequences = check_sequences(model, sequences)
    found: dict[str, list[Recitation | None]] = {}
    for name, vary in VARIANTS.items():
        varied = [vary(model, sequence) for sequence in sequences]
        left = iter(recitations(model, [each for each in varied if each], samples, batch))
        found[name] = [next(left) if each else None for each in varied]
    return found
