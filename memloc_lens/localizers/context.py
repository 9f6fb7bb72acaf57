"""A context: other text that a method may read, to tell what is specific to its target from what all text needs.

It is a list of sequences, memorized or not. It must be disjoint from the targets and from all that is measured.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Annotated

import torch
import tyro
from jaxtyping import Float
from torch import Tensor

from memloc_lens.checks import described
from memloc_lens.sequence import MemorizedSequence

Context = Annotated[Sequence[MemorizedSequence], tyro.conf.Suppress]
"""A field of a localizer that a benchmark fills."""

RUN = 16
"""Two texts with so many consecutive tokens in common are not disjoint."""

AT_ONCE = 16
"""Sequences of a context that are scored at a time."""


def check_context(context: object) -> None:
    """Refuse what is not a tuple or list of sequences.

    Raises:
        ValueError: naming what was given.
    """
    listed = context if isinstance(context, list | tuple) else [context]
    wrong = [item for item in listed if not isinstance(item, MemorizedSequence)]
    if wrong:
        raise ValueError(f"the context has {described(wrong[0])}; give a list of MemorizedSequences")


def check_disjoint(context: Iterable[MemorizedSequence], measured: Iterable[MemorizedSequence]) -> None:
    """Refuse a context that shares text with what is localized or measured.

    Args:
        context: of a method.
        measured: targets, negatives, control sequences, and rows of other text.

    Raises:
        ValueError: naming two sequences with 16 consecutive tokens in common, or all of them if one is shorter.

    Example:
        >>> from memloc_lens.localizers.context import check_disjoint
        >>> check_disjoint(load_sequences(model, split="dev"), [sequence])
    """
    runs = {run: sequence for sequence in measured for run in _runs(sequence)}
    lengths = {len(run) for run in runs}
    for sequence in context:
        for length in lengths | {RUN}:
            shared = next((run for run in _runs(sequence, length) if run in runs), None)
            if shared is not None:
                raise ValueError(
                    f"{sequence.id!r} of the context and {runs[shared].id!r}, which is localized or measured, share "
                    f"{len(shared)} consecutive tokens; take it out of the context"
                )


def shares_text(sequence: MemorizedSequence, others: Iterable[MemorizedSequence]) -> bool:
    """Tell whether `check_disjoint` would refuse a sequence beside others.

    Example:
        >>> from memloc_lens.localizers.context import shares_text
        >>> shares_text(sequence, [sequence]), shares_text(sequence, load_sequences(model, split="dev"))
        (True, False)
    """
    try:
        check_disjoint([sequence], others)
    except ValueError:
        return True
    return False


def _runs(sequence: MemorizedSequence, length: int = RUN) -> Iterable[tuple[int, ...]]:
    tokens = sequence.tokens.tolist()
    return zip(*(tokens[start:] for start in range(min(length, len(tokens)))), strict=False)


def mean_over_context(
    context: Sequence[MemorizedSequence],
    scores_of: Callable[[list[MemorizedSequence]], Float[Tensor, "sequence layer *unit"]],
) -> Float[Tensor, " layer *unit"]:
    """Return the mean over the sequences of their scores, of which only a few are held at a time.

    Args:
        context: at least one sequence.
        scores_of: makes scores of a list of sequences.
    """
    parts = [list(context[start : start + AT_ONCE]) for start in range(0, len(context), AT_ONCE)]
    total = torch.stack([scores_of(part).sum(dim=0) for part in parts]).sum(dim=0)
    return total / len(context)
