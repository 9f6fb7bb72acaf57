"""Choose one set of components without which none of many sequences can be extracted.

1. Sequence after sequence, with the union of the sets so far switched off: the smallest set of what is still
   extractable is added (`memloc_lens.smallest_set`).
2. The model is asked for every sequence with every prompt variant (`VARIANTS`). By default a sequence is extracted if
   greedy decoding writes half of its suffix, rounded up, in one piece; see `memloc_lens.erase.criteria` for others. The
   sets of those that still are grow along their nested sets, until none is extracted or more is lost than the budget
   allows.

What is lost is measured after every step, so that a set that costs too much comes with the way there.
"""

import math
from collections.abc import MutableSequence, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from operator import or_

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from memloc_lens.ablation import ablate
from memloc_lens.checks import check_model
from memloc_lens.components import NEURONS, Component, ComponentSet, Scope, top_components
from memloc_lens.erase.criteria import UNITS, Left, left_of
from memloc_lens.erase.damage import Budget, Losses, Spared, Utility, neg_loss, ppl_rise
from memloc_lens.erase.variants import prompts_of
from memloc_lens.forward import PrefixCache
from memloc_lens.library_types import HookedModel
from memloc_lens.sequence import MemorizedSequence, check_sequences
from memloc_lens.smallest_set import Until, limit_of, smallest_set

GROWTH = 1.25
"""Factor by which the set of a sequence grows that is still extracted."""


@dataclass(frozen=True)
class Target:
    """What became of a sequence.

    Args:
        id: of the sequence.
        own: number of components in its own set.
        limit: from which it counts as extracted, in the unit of the criterion.
        before: what the whole model gives of it, by prompt.
        after: what is left without the components.
    """

    id: str
    own: int
    limit: float
    before: Left
    after: Left

    def extracted(self, by: Left) -> list[str]:
        """Return the variants that extract it."""
        return [name for name, left in by.items() if left >= self.limit]


@dataclass(frozen=True)
class Step:
    """A point on the way: what is lost with so many components.

    Args:
        name: the sequence whose set was added, or the round of growth.
        count: number of components.
        utility: of the model without them.
        extracted: number of sequences that a variant still extracts; None where that was not asked.
    """

    name: str
    count: int
    utility: Utility
    extracted: int | None = None


@dataclass(frozen=True)
class Erasure:
    """A set of components to erase, and what it does.

    Args:
        components: the set.
        targets: a line for every sequence.
        before: utility of the whole model.
        steps: the way to the set; the last one is the set.
        budget: that was given.
        losses: of the other sequences, by group.
        until: the criterion of extraction.
    """

    components: ComponentSet
    targets: list[Target]
    before: Utility
    steps: list[Step]
    budget: Budget
    losses: Losses
    until: Until = "unextractable"

    @property
    def after(self) -> Utility:
        """The utility without the components."""
        return self.steps[-1].utility

    @property
    def ppl_rise(self) -> float | None:
        """The rise of the perplexity in percent."""
        return ppl_rise(self.before, self.after)

    @property
    def neg_loss(self) -> float | None:
        """The fall of the accuracy of other memorized sequences in points."""
        return neg_loss(self.before, self.after)

    @property
    def within_budget(self) -> bool:
        """Whether no more is lost than the budget allows."""
        return self.budget.allows(self.before, self.after)

    @property
    def extracted(self) -> list[str]:
        """The sequences that a variant still extracts."""
        return [target.id for target in self.targets if target.extracted(target.after)]

    @property
    def succeeded(self) -> bool:
        """Whether no sequence is extracted, and no more is lost than the budget allows."""
        return self.within_budget and not self.extracted


@torch.no_grad()
def choose(
    model: HookedModel,
    sequences: Sequence[MemorizedSequence],
    scores: Sequence[Float[Tensor, " layer *unit"]] | Float[Tensor, "sequence layer *unit"],
    spared: Spared,
    budget: Budget = Budget(),  # noqa: B008 (it is frozen)
    *,
    until: Until = "unextractable",
    limit: float | None = None,
    first_layer: int = 0,
    scope: Scope = "layer",
    component: Component = NEURONS,
    batch: int = 16,
    kept: MutableSequence[tuple[int, Step]] | None = None,
    progress: bool = False,
) -> Erasure:
    """Return one set of components without which no sequence can be extracted, and what is lost with it.

    Args:
        model: used as it is; its weights stay as they are.
        sequences: to erase.
        scores: of each sequence, as a localizer returns them.
        spared: what should stay as it is; disjoint from the sequences and from what the localizer has read.
        budget: how much may be lost.
        until: what must be below the limit with every prompt: see `memloc_lens.erase.criteria`.
        limit: in tokens, in points, or a probability. Default: half of the suffix, rounded up; 50 points; 0.1.
        first_layer: layers before it are left alone.
        scope: take the highest scores of every layer, or of all layers together.
        component: kind of the components.
        batch: maximum number of rows at a time.
        kept: the number of components of each sequence's own set, and its step, from an earlier call with the same
            arguments that was interrupted; what is missing is appended.
        progress: show a progress bar.

    Returns:
        The set, also if it costs more than the budget allows or a sequence is still extracted: see
        `Erasure.succeeded`.

    Raises:
        ValueError: if there is no sequence, or not one score tensor for each of the model's shape.

    Example:
        >>> sequences = load_sequences(model)[:2]
        >>> scores = IterativeGradient(first_layer=1)(model, sequences)
        >>> erasure = choose(model, sequences, scores, Spared(others=load_sequences(model)[100:104]), first_layer=1)
        >>> erasure.extracted
        []
    """
    model = check_model(model)
    sequences = check_sequences(model, sequences)
    if not sequences or len(scores) != len(sequences):
        raise ValueError(f"{len(sequences)} sequences and {len(scores)} scores were given; give as many of both")
    limits = [limit_of(until, limit, len(sequence.suffix)) for sequence in sequences]
    search = _Search(model, sequences, scores, until, first_layer, scope, component, batch)
    measure = partial(spared.utility, model, batch, search.prefix)
    given, before = search.left(), measure()
    kept = [] if kept is None else kept
    for index in tqdm(range(len(sequences)), desc="choose", unit="sequence", disable=not progress):
        if index < len(kept):
            search.take(index, kept[index][0])
            continue
        search.add(index, limit)
        with ablate(model, search.union):
            kept.append((search.counts[index], Step(sequences[index].id, len(search.union), measure())))
    steps = [step for _, step in kept]
    while True:
        with ablate(model, search.union):
            left = search.left()
        extracted = [index for index, own in enumerate(left) if max(own.values()) >= limits[index]]
        steps[-1] = replace(steps[-1], extracted=len(extracted))
        if not budget.allows(before, steps[-1].utility) or not search.grow(extracted):
            break
        with ablate(model, search.union):
            steps.append(Step(f"growth {len(steps) + 1 - len(sequences)}", len(search.union), measure()))
    cells = zip(sequences, search.sets, limits, given, left, strict=True)
    targets = [Target(own.id, len(chosen), most, *told) for own, chosen, most, *told in cells]
    losses = spared.losses(sequences, before, steps[-1].utility)
    return Erasure(search.union, targets, before, steps, budget, losses, until)


def check_extracted(
    model: HookedModel,
    sequences: Sequence[MemorizedSequence],
    until: Until = "unextractable",
    limit: float | None = None,
    batch: int = 16,
) -> None:
    """Refuse sequences of which none can be extracted: there is nothing to erase.

    Args:
        model: used as it is.
        sequences: to erase.
        until: as for `choose`.
        limit: as for `choose`.
        batch: maximum number of prompts at a time.

    Raises:
        ValueError: with the most that is left of one.
    """
    most = [max(left.values()) for left in left_of(model, prompts_of(model, sequences), until, batch)]
    limits = [limit_of(until, limit, len(own.suffix)) for own in sequences]
    if sequences and all(left < least for left, least in zip(most, limits, strict=True)):
        raise ValueError(
            f"none of the {len(most)} sequences can be extracted: by any prompt, the {UNITS[until]}, is at most "
            f"{max(most):.4g}, and extracted is what has {min(limits):g}; there is nothing to erase, unless less "
            "counts (--until-limit) or something else does (--until accuracy)"
        )


class _Search:
    """The search of `choose`: of each sequence its nested sets, and how far along them it is."""

    def __init__(
        self,
        model: HookedModel,
        sequences: list[MemorizedSequence],
        scores: Sequence[Tensor] | Tensor,
        until: Until,
        first_layer: int,
        scope: Scope,
        component: Component,
        batch: int,
    ) -> None:
        self.model, self.sequences, self.scores, self.until = model, sequences, scores, until
        self.first_layer, self.scope, self.component, self.batch = first_layer, scope, component, batch
        nothing = ComponentSet(torch.zeros(component.shape(model), dtype=torch.bool), component)
        self.sets, self.counts = [nothing] * len(sequences), [0] * len(sequences)
        layers, *unit = nothing.shape
        self.width = math.prod(unit) * (1 if scope == "layer" else layers - first_layer)
        self.prefix = PrefixCache(model, first_layer)
        self.prompts = prompts_of(model, sequences)

    @property
    def union(self) -> ComponentSet:
        """The components of all sets."""
        return reduce(or_, self.sets)

    def add(self, index: int, limit: float | None) -> None:
        """Take the smallest set of a sequence, with the union of the others switched off."""
        with ablate(self.model, self.union):
            found = smallest_set(
                self.model,
                self.sequences[index],
                self.scores[index],
                self.until,
                limit=limit,
                first_layer=self.first_layer,
                scope=self.scope,
                component=self.component,
            )
        self.take(index, round(found.ratio * self.width) if found else 1)

    def grow(self, indices: Sequence[int]) -> bool:
        """Let the sets of some sequences grow, and return whether any did."""
        before = list(self.counts)
        for index in indices:
            self.take(index, min(self.width, max(self.counts[index] + 1, math.ceil(GROWTH * self.counts[index]))))
        return self.counts != before

    def take(self, index: int, count: int) -> None:
        """Let a sequence have its first `count` components."""
        self.counts[index] = count
        if count:
            self.sets[index] = top_components(
                self.scores[index], count / self.width, self.first_layer, self.scope, "nearest", self.component
            )

    def left(self) -> list[Left]:
        """Return what is left of every sequence, asked in every way, under the ablation that is open."""
        return left_of(self.model, self.prompts, self.until, self.batch)
