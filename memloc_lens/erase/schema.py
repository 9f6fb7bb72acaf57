"""The parts of an audit, as they are written to `audit.json`."""

from typing import Any, TypedDict

from memloc_lens.erase.relearning import Relearned, Resurfacing
from memloc_lens.runs.schema import Cells, Interval


class Change(TypedDict):
    """A mean before, and the paired change, with 95% intervals over sequences or rows of text."""

    before: Interval
    change: Interval


class LessonResult(TypedDict):
    """How erased and new texts come back by a lesson.

    Args:
        relearned: for each kind of text, `erased`, `new`, or `retrained`, how each comes back.
        resurfacing: for `new` and `retrained`, how many times as many steps they take as the erased ones.
    """

    relearned: dict[str, dict[str, Relearned]]
    resurfacing: dict[str, Resurfacing]


class Audit(TypedDict):
    """The result of an audit; it can be written as JSON.

    Args:
        models: name and fingerprint of the weights of the original and the erased model.
        provenance: by which code and command, and where.
        settings: number of samples, share of min-k%, and those of relearning.
        texts: ids of the targets, of those that prompts were given for, and by group of all others; and of those that
            were left out.
        extraction: for each variant of the prompts of the targets, before and after.
        targets: for each target and variant, what is recited before and after.
        others: of each group, by their own prompts, before and after.
        relearning: for each lesson.
        membership: AUROC of signals, before and after.
        accuracy: of each group, and of each category of the others, in points.
        perplexity: before, and the rise in percent; None without text.
        measured: how the figures of each part were measured.
        not_tried: what else may bring a text back.
    """

    models: dict[str, dict[str, str]]
    provenance: dict[str, str]
    settings: dict[str, Any]
    texts: dict[str, list[str]]
    extraction: dict[str, dict[str, Cells]]
    targets: dict[str, dict[str, dict[str, dict[str, float]]]]
    others: dict[str, dict[str, Cells]]
    relearning: dict[str, LessonResult]
    membership: dict[str, Cells]
    accuracy: dict[str, dict[str, Change]]
    perplexity: Change | None
    measured: dict[str, str]
    not_tried: list[str]
