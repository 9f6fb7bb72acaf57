"""What an erasure may cost: perplexity of other text, and accuracy of other memorized sequences."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from jaxtyping import Int
from torch import Tensor

from memloc_lens.checks import check_number
from memloc_lens.erase.relations import Groups, by_category, by_relation
from memloc_lens.forward import PrefixCache
from memloc_lens.library_types import HookedModel
from memloc_lens.localizers.context import check_disjoint
from memloc_lens.metrics import perplexity, suffix_accuracy, teacher_forced
from memloc_lens.sequence import MemorizedSequence


@dataclass(frozen=True)
class Utility:
    """How well a model does what it should go on doing.

    Args:
        perplexity: of text that it has not memorized; None without a text.
        accuracy: mean teacher-forced accuracy of other memorized sequences, in points; None without any.
        accuracies: of each of them, of which `accuracy` is the mean.
    """

    perplexity: float | None
    accuracy: float | None
    accuracies: tuple[float, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Budget:
    """How much an erasure may cost.

    Args:
        max_ppl_rise: of the perplexity, in percent.
        max_neg_loss: of the mean accuracy of other memorized sequences, in points.

    Example:
        >>> Budget(max_ppl_rise=2, max_neg_loss=2).allows(Utility(10.0, 99.0), Utility(10.1, 98.0))
        True
    """

    max_ppl_rise: float = 2.0
    max_neg_loss: float = 2.0

    def __post_init__(self) -> None:
        check_number("max_ppl_rise", self.max_ppl_rise, least=0)
        check_number("max_neg_loss", self.max_neg_loss, least=0)

    def allows(self, before: Utility, after: Utility) -> bool:
        """Return whether what was lost is within the budget; what was not measured is."""
        rise, loss = ppl_rise(before, after), neg_loss(before, after)
        return (rise is None or rise <= self.max_ppl_rise) and (loss is None or loss <= self.max_neg_loss)


def ppl_rise(before: Utility, after: Utility) -> float | None:
    """Return the rise of the perplexity in percent, None if it was not measured.

    Example:
        >>> ppl_rise(Utility(8.0, None), Utility(10.0, None))
        25.0
    """
    if before.perplexity is None or after.perplexity is None:
        return None
    return 100 * (after.perplexity / before.perplexity - 1)


def neg_loss(before: Utility, after: Utility) -> float | None:
    """Return the fall of the accuracy of others in points, None if it was not measured."""
    return None if before.accuracy is None or after.accuracy is None else before.accuracy - after.accuracy


@dataclass(frozen=True)
class Loss:
    """What a group of other memorized sequences has lost.

    Args:
        sequences: number of them.
        before: their mean accuracy in the whole model, in points.
        after: the same without what is erased.
    """

    sequences: int
    before: float
    after: float


@dataclass(frozen=True)
class Losses:
    """What other memorized sequences have lost, by group.

    Args:
        relations: near-duplicates of the targets, related and unrelated ones.
        categories: a sequence of several categories counts in each.
    """

    relations: dict[str, Loss]
    categories: dict[str, Loss]


@dataclass(frozen=True)
class Spared:
    """What an erasure should leave as it is, and is measured on; it must be disjoint from what is erased.

    Args:
        text: rows of text that the model has not memorized.
        others: other memorized sequences.
    """

    text: Int[Tensor, "row pos"] | None = None
    others: Sequence[MemorizedSequence] = ()

    def utility(self, model: HookedModel, batch: int = 16, prefix: PrefixCache | None = None) -> Utility:
        """Measure a model, under any ablation that is open.

        Args:
            model: used as it is.
            batch: maximum number of rows at a time.
            prefix: of the layers before the first ablated one.
        """
        ppl = None if self.text is None else perplexity(model, self.text, batch, prefix)
        if not self.others:
            return Utility(ppl, None)
        predictions = teacher_forced(model, list(self.others), batch, prefix)
        accuracies = suffix_accuracy(predictions, self.others)
        return Utility(ppl, accuracies.mean().item(), tuple(accuracies.tolist()))

    def losses(self, targets: Sequence[MemorizedSequence], before: Utility, after: Utility) -> Losses:
        """Return what the others have lost, by what they have to do with the targets and by category.

        Args:
            targets: that are erased.
            before: utility of the whole model, as `utility` returns it.
            after: utility without what is erased.

        Example:
            >>> spared = Spared(others=load_sequences(model)[1:7])
            >>> before = spared.utility(model)
            >>> spared.losses([sequence], before, before).relations["related"]
            Loss(sequences=1, before=100.0, after=100.0)
        """
        place = {other: index for index, other in enumerate(self.others)}

        def mean(group: Sequence[MemorizedSequence], utility: Utility) -> float:
            return fmean(utility.accuracies[place[other]] for other in group)

        def lost(groups: Groups) -> dict[str, Loss]:
            return {name: Loss(len(group), mean(group, before), mean(group, after)) for name, group in groups.items()}

        return Losses(lost(by_relation(targets, self.others)), lost(by_category(self.others)))

    def check_disjoint(self, sequences: Sequence[MemorizedSequence], context: Iterable[MemorizedSequence] = ()) -> None:
        """Refuse sequences to erase that share text with what is measured, and a context that shares text with either.

        Raises:
            ValueError: naming two texts with 16 consecutive tokens in common.
        """
        rows = [] if self.text is None else [MemorizedSequence(row, 1, f"text-{i}") for i, row in enumerate(self.text)]
        check_disjoint([*self.others, *rows], sequences)
        check_disjoint(context, [*sequences, *self.others, *rows])
