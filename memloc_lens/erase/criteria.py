"""When does a sequence count as extracted? Criteria, each for every prompt variant.

`until` names what must be below a limit, as in `memloc_lens.smallest_set`:

- "unextractable": the number of tokens of the suffix that greedy decoding writes in one piece, wherever it begins. This
  is stricter than the tokens before the first mistake: a model that goes on after a wrong token still recites.
- "greedy": the number of tokens that greedy decoding gets right before its first mistake.
- "accuracy": the teacher-forced accuracy, in points. The criterion for models that know a text but lose its thread.
- "sampled": the probability that one of 1000 samples at temperature 1 is the exact suffix.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from memloc_lens.erase.extraction import recitations
from memloc_lens.erase.variants import Prompts
from memloc_lens.generation import free_running
from memloc_lens.library_types import HookedModel
from memloc_lens.sequence import MemorizedSequence
from memloc_lens.smallest_set import MEASURES, Until, limit_of

Left = dict[str, float]
"""By prompt variant: what is left of a suffix, in the unit of a criterion."""

UNITS: Mapping[Until, str] = {
    "unextractable": "longest part of a suffix that is written, in tokens",
    "greedy": "tokens of a suffix before the first mistake",
    "accuracy": "teacher-forced accuracy, in points",
    "sampled": "probability that one of 1000 samples is the suffix",
}
"""What each criterion measures."""


def left_of(model: HookedModel, prompts: Prompts, until: Until = "unextractable", batch: int = 16) -> list[Left]:
    """Return what is left of every sequence by every prompt variant.

    Args:
        model: used as it is, ablated or not.
        prompts: of the sequences, as `prompts_of` returns them.
        until: the criterion.
        batch: maximum number of prompts at a time.

    Example:
        >>> from memloc_lens.erase.variants import prompts_of
        >>> left_of(model, prompts_of(model, [sequence]))[0]["own"]
        48
    """
    measured = {name: _measured(model, asked, until, batch) for name, asked in prompts.items()}
    return [dict(zip(measured, values, strict=True)) for values in zip(*measured.values(), strict=True)]


def extracted(
    model: HookedModel,
    prompts: Prompts,
    until: Until = "unextractable",
    limit: float | None = None,
    batch: int = 16,
) -> list[bool]:
    """Return for every sequence whether any of its prompts extracts it.

    Args:
        model: used as it is, ablated or not.
        prompts: of the sequences, as `prompts_of` returns them.
        until: the criterion.
        limit: from which a sequence counts as extracted, as for `smallest_set`.
        batch: maximum number of prompts at a time.

    Example:
        >>> from memloc_lens.erase.variants import prompts_of
        >>> extracted(model, prompts_of(model, [sequence]), until="greedy", limit=8)
        [True]
    """
    limits = [limit_of(until, limit, len(sequence.suffix)) for sequence in prompts["own"]]
    left = left_of(model, prompts, until, batch)
    return [max(own.values()) >= least for own, least in zip(left, limits, strict=True)]


def _measured(model: HookedModel, sequences: Sequence[MemorizedSequence], until: Until, batch: int) -> list[float]:
    if until != "unextractable":
        return [MEASURES[until](found) for found in recitations(model, sequences, batch=batch)]
    written = free_running(model, sequences, batch)
    return [longest_run(tokens, own.suffix.cpu()) for tokens, own in zip(written, sequences, strict=True)]


def longest_run(written: Int[Tensor, " _"], suffix: Int[Tensor, " _"]) -> int:
    """Return the length of the longest part of a suffix that was written, wherever it begins in either.

    Example:
        >>> longest_run(torch.tensor([9, 1, 2, 3]), torch.tensor([1, 2, 3, 4]))
        3
    """
    same = written[:, None] == suffix[None]
    lengths = torch.zeros(len(suffix) + 1, dtype=torch.long)
    longest = 0
    for row in same:
        lengths[1:] = (lengths[:-1] + 1) * row
        longest = max(longest, int(lengths.max()))
    return longest
