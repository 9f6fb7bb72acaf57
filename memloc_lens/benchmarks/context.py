"""The context of a run: what its methods may read besides their targets, disjoint from all that is measured."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from jaxtyping import Int
from torch import Tensor

from memloc_lens.data import load_texts
from memloc_lens.library_types import HookedModel
from memloc_lens.localizers.context import check_disjoint
from memloc_lens.metrics import text_rows
from memloc_lens.models import EMBEDDED
from memloc_lens.runs.methods import configured, context_of
from memloc_lens.runs.settings import RunSettings
from memloc_lens.sequence import MemorizedSequence

SEQUENCES = 96
"""Default number of memorized sequences of the embedded model in a context."""
TEXT_TOKENS = 1024
"""Tokens of plain text in a context."""
HELD_OUT = EMBEDDED / "held_out.jsonl"

Settings = TypeVar("Settings", bound=RunSettings)


def with_context(
    settings: Settings,
    model: HookedModel,
    memorized: Sequence[MemorizedSequence],
    measured: Sequence[MemorizedSequence],
    text: Int[Tensor, "row pos"] | None = None,
) -> Settings:
    """Return the settings of a run with methods that know its context.

    Args:
        settings: of the run.
        model: reads the context.
        memorized: sequences to take the context from; those that are measured are left out.
        measured: targets, negatives and control sequences.
        text: rows of other text that are measured.

    Raises:
        ValueError: if there are fewer memorized sequences than asked for, the context file cannot be read, or the
            context shares text with what is measured.
    """
    rows = [] if text is None else _as_sequences(text, "text")
    context = [
        *_memorized(settings, memorized, measured),
        *_plain(settings, model, sum(len(row.tokens) for row in rows)),
    ]
    methods = tuple(configured(localizer, settings.component, context) for localizer in settings.localizers())
    read = {id(sequence): sequence for method in methods for sequence in context_of(method)}
    check_disjoint(read.values(), [*measured, *rows])
    return replace(settings, methods=methods)


def _memorized(
    settings: RunSettings, memorized: Sequence[MemorizedSequence], measured: Sequence[MemorizedSequence]
) -> list[MemorizedSequence]:
    ids = {sequence.id for sequence in measured}
    available = [sequence for sequence in memorized if sequence.id not in ids]
    wanted = settings.context_sequences
    if wanted is None:
        wanted = min(SEQUENCES, len(available)) if settings.model == EMBEDDED.name else 0
    if wanted > len(available):
        raise ValueError(
            f"context_sequences is {wanted}, and {len(available)} memorized sequences are neither targets nor "
            "measured; lower it, --limit or --negatives"
        )
    return available[:wanted]


def _plain(settings: RunSettings, model: HookedModel, measured_tokens: int) -> list[MemorizedSequence]:
    """Return rows of the context file, or of the embedded model's held-out text after what is measured of it."""
    if settings.context is not None:
        return _as_sequences(text_rows(model, load_texts(settings.context), TEXT_TOKENS, bos=settings.bos), "context")
    if settings.model != EMBEDDED.name:
        return []
    rows = text_rows(model, load_texts(HELD_OUT), measured_tokens + TEXT_TOKENS, bos=settings.bos)
    return _as_sequences(rows[measured_tokens // rows.shape[1] :], "held-out")


def _as_sequences(rows: Int[Tensor, "row pos"], name: str) -> list[MemorizedSequence]:
    """Return rows of text as sequences with a prompt of one token."""
    return [MemorizedSequence(row, 1, f"{name}-{index}") for index, row in enumerate(rows)]
