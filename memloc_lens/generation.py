"""Greedy generation of suffixes, under any ablation that is open."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Int
from torch import Tensor

from memloc_lens.checks import check_model
from memloc_lens.isolation import isolated
from memloc_lens.library_types import HookedModel
from memloc_lens.memory import rows_at_once
from memloc_lens.models import generates_with_cache
from memloc_lens.sequence import MemorizedSequence, check_sequences, equal_length_batches

Predictions = list[Int[Tensor, " _"]]
"""For each sequence the suffix that the model predicts, on the CPU."""


@contextmanager
def same_modes(model: HookedModel) -> Iterator[None]:
    """Restore on leaving which modules are in training mode: `model.generate` leaves evaluation mode behind."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def free_running(model: HookedModel, sequences: Sequence[MemorizedSequence], batch: int = 16) -> Predictions:
    """Return the greedy continuation of each prompt, as long as the true suffix.

    Args:
        model: used as it is, ablated or not.
        sequences: of any lengths.
        batch: maximum number of sequences at a time.

    Example:
        >>> torch.equal(free_running(model, [sequence])[0], sequence.suffix)
        True
    """
    model = check_model(model)
    sequences = check_sequences(model, sequences)
    predictions: Predictions = [torch.empty(0, dtype=torch.long, device="cpu")] * len(sequences)
    with isolated(model), same_modes(model):
        for indices, group in equal_length_batches(sequences, rows_for(model, sequences, batch)):
            generated = model.generate(
                group.tokens[:, : group.prompt_len].to(model.cfg.device),
                max_new_tokens=group.suffix_len,
                do_sample=False,
                stop_at_eos=False,
                use_past_kv_cache=generates_with_cache(model),
                prepend_bos=False,
                verbose=False,
            )
            for index, predicted in zip(indices, generated[:, group.prompt_len :].cpu(), strict=True):
                predictions[index] = predicted
    return predictions


def rows_for(model: HookedModel, sequences: Sequence[MemorizedSequence], batch: int) -> int:
    """Return how many of the sequences run at a time: as many as memory has room for, at most `batch`."""
    length = max((len(sequence.tokens) for sequence in sequences), default=1)
    return min(batch, rows_at_once(model, length, length))
