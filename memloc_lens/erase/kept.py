"""What an erasure has done so far, kept in a folder: the scores of sequences, and the steps of the choice."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, overload

from torch import Tensor

from memloc_lens.erase.choosing import Step
from memloc_lens.erase.damage import Utility
from memloc_lens.localizers.scoring import AnyLocalizer
from memloc_lens.runs.disk import disk_errors, write_whole
from memloc_lens.runs.methods import settings_of
from memloc_lens.runs.records import read_table
from memloc_lens.runs.scores import read_scores
from memloc_lens.runs.settings import identities
from memloc_lens.sequence import MemorizedSequence


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


def origin(weights: str, localizer: AnyLocalizer, sequences: Sequence[MemorizedSequence], *more: Any) -> str:
    """Return a hash of what something is computed from.

    Args:
        weights: fingerprint of the model.
        localizer: with its settings.
        sequences: to erase.
        more: in plain values.
    """
    parts = [weights, settings_of(localizer), identities(sequences), *more]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()


class KeptSteps(list[tuple[int, Step]]):
    """The steps of a choice, written to a file as they are appended, and read again if they are of the same choice.

    Args:
        file: that keeps them.
        of: what the choice is made from, as `origin` says.

    Example:
        >>> steps = KeptSteps(Path("steps.json"), of="these sequences")
        >>> steps.append((3, Step("s0", 3, Utility(None, 90.0))))
        >>> len(KeptSteps(Path("steps.json"), of="these sequences")), len(KeptSteps(Path("steps.json"), of="others"))
        (1, 0)
    """

    def __init__(self, file: Path, of: str) -> None:
        self._file, self._of = file, of
        found = read_table(file) if file.is_file() else {}
        super().__init__(map(_as_step, found["steps"]) if found.get("of") == of else ())

    def append(self, step: tuple[int, Step]) -> None:
        """Append the size of a sequence's own set and its step, and write all."""
        super().append(step)
        content = json.dumps({"of": self._of, "steps": [[own, asdict(step)] for own, step in self]})
        with disk_errors(self._file.parent):
            write_whole(self._file, lambda part: part.write_text(content, "utf-8"))


def _as_step(kept: Sequence[Any]) -> tuple[int, Step]:
    own, step = kept
    utility = step["utility"]
    return own, Step(**step | {"utility": Utility(**utility | {"accuracies": tuple(utility["accuracies"])})})
