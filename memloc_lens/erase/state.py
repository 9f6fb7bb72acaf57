"""What an audit measures of one model, original or erased."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from operator import attrgetter
from typing import Any

from jaxtyping import Int
from torch import Tensor

from memloc_lens.erase.extraction import extraction, recitations
from memloc_lens.erase.given import by_given
from memloc_lens.erase.membership import membership
from memloc_lens.erase.relations import Groups, by_relation
from memloc_lens.library_types import HookedModel
from memloc_lens.metrics import row_losses
from memloc_lens.runs.schema import Cells
from memloc_lens.runs.statistics import mean_interval
from memloc_lens.sequence import MemorizedSequence, check_sequences
from memloc_lens.smallest_set import Recitation


@dataclass(frozen=True)
class Texts:
    """Everything that an audit reads.

    Args:
        targets: that were erased.
        others: memorized sequences that should stay.
        controls: texts that the model has never seen.
        text: rows of plain text for the perplexity; None measures none.
        given: the targets with prompts that the user gives, as `with_prompts` returns them.
    """

    targets: Sequence[MemorizedSequence]
    others: Sequence[MemorizedSequence]
    controls: Sequence[MemorizedSequence]
    text: Int[Tensor, "row pos"] | None = None
    given: Sequence[MemorizedSequence] = ()

    def check(self, model: HookedModel) -> None:
        """Refuse texts that do not fit a model, or each other.

        Raises:
            ValueError: if there are no targets or no controls, two of either share an id, the model cannot read one,
                or a target is among the others or the controls.
        """
        for name, sequences in (("targets", self.targets), ("controls", self.controls)):
            if not check_sequences(model, sequences):
                raise ValueError(f"{name} is empty; give at least one sequence")
            ids = Counter(sequence.id for sequence in sequences)
            if ids.most_common(1)[0][1] > 1:
                raise ValueError(f"two {name} have the id {ids.most_common(1)[0][0]!r}; give each an id of its own")
        check_sequences(model, self.given)
        rest = [*check_sequences(model, self.others), *self.controls]
        erased = {tuple(target.tokens.tolist()) for target in self.targets}
        for sequence in rest:
            if tuple(sequence.tokens.tolist()) in erased:
                raise ValueError(
                    f"sequence {sequence.id!r} is a target and among the others or the controls; leave it out there"
                )

    def groups(self) -> Groups:
        """Return the others and the controls by what they have to do with the targets; each is in one group."""
        return by_relation(self.targets, self.others) | {"controls": list(self.controls)}


@dataclass(frozen=True)
class State:
    """What was measured of one model.

    Args:
        targets: for each variant of the prompt, what is recited of each target.
        rest: for each other sequence and control, in this order, what is recited after its own prompt.
        membership: AUROC of signals that tell targets from controls.
        losses: mean loss of each row of text, in nats.
    """

    targets: Mapping[str, Sequence[Recitation | None]]
    rest: Sequence[Recitation]
    membership: Cells
    losses: Sequence[float]

    def plain(self) -> dict[str, Any]:
        """Return the state in values that JSON can hold; a target without a variant has an empty table there."""
        return {
            "targets": {name: [asdict(each) if each else {} for each in found] for name, found in self.targets.items()},
            "rest": [asdict(each) for each in self.rest],
            "membership": self.membership,
            "losses": list(self.losses),
        }

    @classmethod
    def of_plain(cls, plain: Mapping[str, Any]) -> "State":
        """Return the state that `plain` was made of.

        Example:
            >>> state = State({"own": [Recitation(1, 50.0, 0.0, 0.0), None]}, [], {}, [3.5])
            >>> State.of_plain(state.plain()) == state
            True
        """
        targets = {
            name: [Recitation(**each) if each else None for each in found] for name, found in plain["targets"].items()
        }
        rest = [Recitation(**each) for each in plain["rest"]]
        return cls(targets, rest, plain["membership"], plain["losses"])


def state_of(model: HookedModel, texts: Texts, samples: int = 1000, share: float = 0.2, batch: int = 16) -> State:
    """Measure a model.

    Args:
        model: used as it is, ablated or not.
        texts: to measure on.
        samples: number of samples for sampled extraction.
        share: of the tokens, for min-k%.
        batch: maximum number of sequences at a time.

    Example:
        >>> from memloc_lens import load_sequences
        >>> texts = Texts([sequence], load_sequences(model)[1:3], load_sequences(model, split="control")[:2])
        >>> state = state_of(model, texts)
        >>> state.targets["own"][0].prefix, len(state.rest)
        (48, 4)
    """
    given = {"given": by_given(model, texts.targets, texts.given, samples, batch)} if texts.given else {}
    return State(
        extraction(model, texts.targets, samples, batch) | given,
        recitations(model, [*texts.others, *texts.controls], samples, batch),
        membership(model, texts.targets, texts.controls, share),
        [] if texts.text is None else row_losses(model, texts.text, batch).tolist(),
    )


MEASURES: Mapping[str, Callable[[Recitation], float]] = {
    "recited": lambda found: 100.0 * (found.strength == 1),
    **{field.name: attrgetter(field.name) for field in fields(Recitation)},
}
"""What is summarized of recitations: the share that is recited whole, in points, and the fields of `Recitation`."""


def cells(found: Sequence[Recitation | None]) -> Cells:
    """Return the mean of every measure with its 95% interval over sequences; no cells if there are no sequences.

    Example:
        >>> cells([Recitation(prefix=4, accuracy=50.0, probability=0.0, strength=0.25)])["prefix"]
        {'mean': 4.0, 'low': 4.0, 'high': 4.0, 'n': 1}
    """
    present = [each for each in found if each is not None]
    return {name: mean_interval([of(each) for each in present]) for name, of in MEASURES.items()} if present else {}
