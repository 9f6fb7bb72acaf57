"""Scores of sequences, kept in a folder: localizing is the long part of an erasure, and is not done twice."""

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import overload

from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens import HookedTransformer

from memloc_lens.components import Component
from memloc_lens.localizers.scoring import AnyLocalizer, name_of
from memloc_lens.runs.fingerprint import fingerprint
from memloc_lens.runs.methods import checked_scores, settings_of
from memloc_lens.runs.scores import kept_scores, read_scores, score_file
from memloc_lens.runs.settings import identities
from memloc_lens.sequence import MemorizedSequence

HELD = 2**27
"""Scores that are held at a time."""


class KeptScores(Sequence[Tensor]):
    """The scores of sequences, [layer, *unit] each, read from the disk when they are asked for.

    Args:
        places: of each sequence the file, and its row there.
    """

    def __init__(self, places: Sequence[tuple[Path, int]]) -> None:
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        """Return the scores of a sequence, or those of some."""
        if isinstance(index, slice):
            return KeptScores(self._places[index])
        file, row = self._places[index]
        return read_scores(file)["scores"][row]


def localize(
    folder: Path,
    model: HookedTransformer,
    sequences: Sequence[MemorizedSequence],
    localizer: AnyLocalizer,
    component: Component,
    batch: int,
) -> KeptScores:
    """Score sequences a batch at a time, or read what was scored before.

    A file says what it was computed from: other weights, settings or sequences are scored anew.

    Args:
        folder: where scores are kept, under `scores`.
        model: that has memorized the sequences.
        sequences: to score.
        localizer: that scores them.
        component: kind that it scores.
        batch: maximum number of sequences at a time.

    Example:
        >>> scores = localize(Path("work"), model, [sequence], Activations(), NEURONS, batch=16)
        >>> torch.equal(scores[0], Activations()(model, sequence))
        True
    """
    weights, method = fingerprint(model), settings_of(localizer)
    batch = max(1, min(batch, HELD // prod(component.shape(model))))  # a method may read its context once a batch
    places: list[tuple[Path, int]] = []
    with tqdm(total=len(sequences), desc="localize", unit="sequence") as progress:
        for start in range(0, len(sequences), batch):
            part = sequences[start : start + batch]
            file = score_file(folder, name_of(localizer), start)
            of = hashlib.sha256(json.dumps([weights, method, identities(part)], default=str).encode()).hexdigest()
            kept_scores(file, partial(_scored, localizer, model, part, component), of)
            places += [(file, row) for row in range(len(part))]
            progress.update(len(part))
    return KeptScores(places)


def _scored(
    localizer: AnyLocalizer, model: HookedTransformer, part: Sequence[MemorizedSequence], component: Component
) -> dict[str, Tensor]:
    return {"scores": checked_scores(localizer, model, part, component)}
