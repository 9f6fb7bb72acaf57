"""Fusion: a weighted sum of the ranks that several localizers give.

Ranks make scores of any unit comparable. The weights are fitted on dev sequences, which are measured nowhere else.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from memloc_lens.ablation import ablate
from memloc_lens.checks import check_first_layer, check_model, check_number, described
from memloc_lens.components import Component, ComponentName, component_of, top_components
from memloc_lens.equal_damage import lost_at
from memloc_lens.library_types import HookedModel
from memloc_lens.localizers.context import check_disjoint
from memloc_lens.localizers.scoring import AnyLocalizer, name_of
from memloc_lens.metrics import suffix_accuracy, teacher_forced
from memloc_lens.sequence import MemorizedSequence, check_sequences

RATIOS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2)
"""Shares of every layer at which forgetting and damage are measured."""


@dataclass(frozen=True)
class Fusion:
    """The weighted sum of the ranks of several localizers.

    A rank is that of a component inside its layer, from 0 for the lowest score to 1 for the highest; equal scores share
    their mean rank. Layers before the `first_layer` of a localizer add 0.

    Args:
        localizers: At least one, all of the same kind of component.
        weights: One for each localizer, at least 0 and not all 0.

    Example:
        >>> fusion = Fusion((Activations(), WeightNorm()), (0.75, 0.25))
        >>> fusion(model, sequence).shape
        torch.Size([6, 768])
    """

    name: ClassVar[str] = "fusion"
    localizers: tuple[AnyLocalizer, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        _check_localizers(self.localizers)
        if len(self.weights) != len(self.localizers):
            raise ValueError(f"{len(self.weights)} weights for {len(self.localizers)} localizers; give each one")
        for weight in self.weights:
            check_number("the weight", weight, least=0)
        if not any(self.weights):
            raise ValueError("all weights are 0; give at least one localizer a weight above 0")

    @property
    def component(self) -> ComponentName:
        """The kind of component that all of them score."""
        return _check_localizers(self.localizers).name

    @property
    def first_layer(self) -> int:
        """The first layer that any of them scores."""
        return min(_setting(localizer, "first_layer", 0) for localizer in self.localizers)

    def __call__(
        self, model: HookedModel, sequences: MemorizedSequence | Sequence[MemorizedSequence]
    ) -> Float[Tensor, "..."]:
        """Return scores from 0 to the sum of the weights: [layer, *unit], or [sequence, layer, *unit] for a list."""
        ranks = [rank_scores(localizer, model, sequences) for localizer in self.localizers]
        return _weighted(ranks, self.weights)


def fit_fusion(
    model: HookedModel,
    dev: Sequence[MemorizedSequence],
    others: Sequence[MemorizedSequence],
    localizers: Sequence[AnyLocalizer],
    *,
    first_layer: int = 0,
    ratios: Sequence[float] = RATIOS,
    points: float = 2.0,
    grid: int = 4,
) -> Fusion:
    """Fit the weights of a fusion: those of a grid that forget most of the dev sequences at a fixed damage.

    For each weighting, dev sequence and ratio, the top share of every layer is dropped, and the accuracy that is lost
    is measured on the sequence (Self-Acc) and on the others (Neg-Acc). What counts is the mean over the dev sequences
    of Self-Acc lost at `points` of Neg-Acc lost (`lost_at`). Of equally good weightings, the most even one is taken.

    Args:
        model: left exactly as found.
        dev: sequences that nothing else is measured on.
        others: memorized sequences to measure the damage on, disjoint from `dev`.
        localizers: to fuse. Give them `first_layer` where they have it.
        first_layer: first layer to drop from.
        ratios: shares of every layer.
        points: of Neg-Acc lost.
        grid: weights are multiples of 1 / grid that sum to 1.

    Raises:
        ValueError: if a list is empty, the two share text, or a number is outside its limits.

    Example:
        >>> dev, test = load_sequences(model, split="dev"), load_sequences(model)
        >>> methods = (Activations(), WeightNorm())
        >>> fit_fusion(model, dev[:1], test[:1], methods, first_layer=1, ratios=(0.05,), grid=1).weights
        (1.0, 0.0)
    """
    model, localizers = check_model(model), tuple(localizers)
    dev, others = check_sequences(model, dev), check_sequences(model, others)
    if not dev or not others:
        raise ValueError(f"{len(dev)} dev sequences and {len(others)} others were given; give at least one of each")
    check_disjoint(dev, others)
    check_first_layer(first_layer, model.cfg.n_layers)
    check_number("points", points, least=0)
    check_number("grid", grid, least=1, whole=True)
    if not ratios:
        raise ValueError("no ratio was given; give at least one share of every layer")
    for ratio in ratios:
        check_number("the ratio", ratio, above=0, most=1)
    component = _check_localizers(localizers)
    ranks = [rank_scores(localizer, model, dev) for localizer in localizers]
    before = [_accuracies(model, sequence, others) for sequence in dev]

    def forgotten(weights: tuple[float, ...]) -> float:
        values = []
        for sequence, (own, other), scores in zip(dev, before, _weighted(ranks, weights), strict=True):
            lost, damages = [], []
            for ratio in ratios:
                with ablate(model, top_components(scores, ratio, first_layer, component=component)):
                    own_after, other_after = _accuracies(model, sequence, others)
                lost.append(own - own_after)
                damages.append(other - other_after)
            values.append(lost_at(points, damages, lost))
        return fmean(values)

    def preference(weights: tuple[float, ...]) -> tuple[float, float]:
        return forgotten(weights), -sum(weight**2 for weight in weights)

    return Fusion(localizers, max(simplex(len(localizers), grid), key=preference))


def simplex(size: int, grid: int) -> Iterator[tuple[float, ...]]:
    """Yield all weightings that sum to 1 and are multiples of 1 / grid.

    Example:
        >>> from memloc_lens.localizers.fusion import simplex
        >>> list(simplex(2, grid=2))
        [(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)]
    """

    def counts(size: int, left: int) -> Iterator[tuple[int, ...]]:
        if size == 1:
            yield (left,)
            return
        for first in range(left + 1):
            for rest in counts(size - 1, left - first):
                yield (first, *rest)

    for weighting in counts(size, grid):
        yield tuple(count / grid for count in weighting)


def rank_scores(
    localizer: AnyLocalizer, model: HookedModel, sequences: MemorizedSequence | Sequence[MemorizedSequence]
) -> Float[Tensor, "..."]:
    """Return the ranks of a localizer's scores inside each layer, from 0 to 1.

    Args:
        localizer: any.
        model: that it scores.
        sequences: one, or a list.
    """
    from scipy.stats import rankdata

    scores = localizer(model, sequences)
    units = len(component_of(_setting(localizer, "component", "neuron")).axes.split()) - 1
    flat = scores.flatten(-units).cpu().numpy()
    ranks = (rankdata(flat, axis=-1) - 1) / max(flat.shape[-1] - 1, 1)
    scaled = torch.from_numpy(ranks).float().to(scores.device)
    scaled[..., : _setting(localizer, "first_layer", 0), :] = 0
    return scaled.view_as(scores)


def _setting(localizer: AnyLocalizer, name: str, default: Any) -> Any:
    """Return a setting of a localizer, or of the one that it wraps."""
    if hasattr(localizer, name):
        return getattr(localizer, name)
    return _setting(localizer.localizer, name, default) if hasattr(localizer, "localizer") else default


def _weighted(ranks: Sequence[Float[Tensor, "..."]], weights: Sequence[float]) -> Float[Tensor, "..."]:
    return torch.stack([weight * each for weight, each in zip(weights, ranks, strict=True)]).sum(dim=0)


def _accuracies(
    model: HookedModel, sequence: MemorizedSequence, others: Sequence[MemorizedSequence]
) -> tuple[float, float]:
    """Return the accuracy on the sequence, and the mean of those on the others, in points."""
    measured = [sequence, *others]
    accuracies = suffix_accuracy(teacher_forced(model, measured), measured).tolist()
    return accuracies[0], fmean(accuracies[1:])


def _check_localizers(localizers: Sequence[AnyLocalizer]) -> Component:
    """Refuse what cannot be fused, and return the kind of component of all.

    Raises:
        ValueError: if there is none, one is not callable, or they score different kinds.
    """
    wrong = [item for item in localizers if not callable(item) or isinstance(item, type)]
    if wrong or not localizers:
        given = f"among the localizers is {described(wrong[0])}" if wrong else "no localizer was given"
        raise ValueError(f"{given}; give instances, as Activations()")
    kinds = {name_of(item): _setting(item, "component", "neuron") for item in localizers}
    if len(set(kinds.values())) > 1:
        named = ", ".join(f"{name} scores {kind}s" for name, kind in kinds.items())
        raise ValueError(f"{named}; fuse localizers of one kind of component")
    return component_of(next(iter(kinds.values())))
