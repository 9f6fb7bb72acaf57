"""The parts of an audit: what is measured of which model, and what decides the values."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from memloc_lens.erase.relearning import Relearning, relearn
from memloc_lens.erase.state import Texts, state_of
from memloc_lens.library_types import HookedModel
from memloc_lens.runs.provenance import provenance
from memloc_lens.runs.settings import identity
from memloc_lens.sequence import MemorizedSequence

Name = tuple[str, str, str]
"""Names a part: what is measured, the model or kind of text, and the id of a sequence, if it is of one."""

Models = Mapping[str, HookedModel]
"""The models of an audit: `original`, `erased`, and `retrained` if there is one."""


@dataclass(frozen=True)
class Part:
    """Something that an audit measures.

    Args:
        of: everything that decides the values, as plain values.
        measure: returns values that JSON can hold; none of them is None.
    """

    of: Any
    measure: Callable[[], Any]

    @property
    def hash(self) -> str:
        """A hash of what decides the values, the code among it."""
        return hashlib.sha256(repr((self.of, provenance()["source_sha256"])).encode()).hexdigest()[:16]


def state_parts(
    models: Models, weights: Mapping[str, str], texts: Texts, samples: int, share: float, batch: int
) -> dict[Name, Part]:
    """Return the parts that measure the state of the original and of the erased model; see `State.plain`.

    Args:
        models: by name.
        weights: fingerprint of each.
        texts: to measure on.
        samples: number of samples for sampled extraction.
        share: of the tokens, for min-k%.
        batch: maximum number of sequences at a time.
    """
    groups = (texts.targets, texts.others, texts.controls, texts.given)
    rows = None if texts.text is None else texts.text.tolist()
    of = (list(map(_identities, groups)), rows, samples, share, batch)

    def measure(name: str) -> dict[str, Any]:
        return state_of(models[name], texts, samples, share, batch).plain()

    return {
        ("state", name, ""): Part((_device(models[name]), weights[name], of), partial(measure, name))
        for name in ("original", "erased")
    }


def relearning_parts(
    models: Models, weights: Mapping[str, str], texts: Texts, relearning: Relearning
) -> dict[Name, Part]:
    """Return the parts that measure how each text comes back: erased, new, and retrained if there is such a model.

    Args:
        models: by name.
        weights: fingerprint of each.
        texts: of which the targets and as many controls are learned.
        relearning: the settings.
    """
    kinds = {"erased": ("erased", texts.targets), "new": ("erased", texts.controls[: len(texts.targets)])}
    if "retrained" in models:
        kinds["retrained"] = ("retrained", texts.targets)
    groups, parts = texts.groups(), {}
    away = groups.get("related", []) + groups.get("unrelated", [])  # near-duplicates would give the targets away
    for kind, (name, sequences) in kinds.items():
        for text in sequences:
            related = [other for other in away if set(other.category) & set(text.category)]
            of = (_device(models[name]), weights[name], _identities([text, *related]), asdict(relearning))
            parts["relearning", kind, text.id] = Part(of, partial(_relearned, relearning, models[name], text, related))
    return parts


def _relearned(*arguments: Any) -> dict[str, dict[str, Any]]:
    """Return for each lesson how a text comes back; a lesson by which it does not has no steps, instead of None."""
    return {
        lesson: {name: value for name, value in relearned.items() if value is not None}
        for lesson, relearned in relearn(*arguments).items()
    }


def _identities(sequences: Sequence[MemorizedSequence]) -> list[list[str]]:
    return [identity(each) for each in sequences]


def _device(model: HookedModel) -> str:
    return str(model.cfg.device)
