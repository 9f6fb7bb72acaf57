"""Two wrappers of any localizer, which use a context to tell what is specific to a sequence from what all text needs.

* Protect: components on which the context rests are never chosen. Those are the share of every layer with the largest
  mean absolute gradient over the context.
* Contrast: the score less its mean over the context, over its standard deviation plus a floor: what stands out for the
  sequence, and not what scores high for any text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Annotated

import torch
import tyro
from jaxtyping import Bool, Float
from torch import Tensor

from memloc_lens.checks import check_model, check_number
from memloc_lens.components import ComponentName, component_of, top_components
from memloc_lens.library_types import HookedModel
from memloc_lens.localizers.context import Context, check_context, check_disjoint, mean_over_context
from memloc_lens.localizers.gradients import Gradient, IterativeGradient
from memloc_lens.localizers.scoring import AnyLocalizer, name_of
from memloc_lens.sequence import MemorizedSequence, check_sequences

FLOOR = 0.3
"""Of the deviation, as a share of its mean over a layer."""


@dataclass(frozen=True)
class Protect:
    """A localizer that never chooses what the context rests on.

    Iterative gradients go on without these components in every round. The scores of other localizers are as without
    protection, but those of protected components are below all others.

    Args:
        localizer: Any localizer.
        context: Sequences to spare, disjoint from the targets.
        share: Share of every layer's components to protect, in (0, 1).

    Example:
        >>> context = tuple(load_sequences(model)[100:104])
        >>> Protect(IterativeGradient(rounds=4), context)(model, sequence).shape
        torch.Size([6, 768])
    """

    localizer: Annotated[AnyLocalizer, tyro.conf.Suppress]
    context: Context = ()
    share: float = 0.05

    def __post_init__(self) -> None:
        check_number("share", self.share, above=0, below=1)
        check_context(self.context)

    @property
    def name(self) -> str:
        """The name of the localizer with this wrapper's before it."""
        return f"protect-{name_of(self.localizer)}"

    def __call__(
        self, model: HookedModel, sequences: MemorizedSequence | Sequence[MemorizedSequence]
    ) -> Float[Tensor, "..."]:
        """Return scores: [layer, *unit], or [sequence, layer, *unit] for a list.

        Raises:
            ValueError: if there is no context, or it shares text with a sequence.
        """
        _check_context_of(self, check_model(model), sequences)
        spared = relied_on(model, self.context, self.share, getattr(self.localizer, "component", "neuron"))
        if isinstance(self.localizer, IterativeGradient):
            return self.localizer(model, sequences, spared=spared)
        scores = self.localizer(model, sequences)
        return torch.where(spared, scores.amin() - 1, scores)


@dataclass(frozen=True)
class Contrast:
    """A localizer whose scores are compared with those for a context.

    Args:
        localizer: Any localizer.
        context: Sequences to compare with, at least two, disjoint from the targets.

    Example:
        >>> context = tuple(load_sequences(model)[100:104])
        >>> Contrast(Gradient(), context)(model, sequence).shape
        torch.Size([6, 768])
    """

    localizer: Annotated[AnyLocalizer, tyro.conf.Suppress]
    context: Context = ()

    def __post_init__(self) -> None:
        check_context(self.context)

    @property
    def name(self) -> str:
        """The name of the localizer with this wrapper's before it."""
        return f"contrast-{name_of(self.localizer)}"

    def __call__(
        self, model: HookedModel, sequences: MemorizedSequence | Sequence[MemorizedSequence]
    ) -> Float[Tensor, "..."]:
        """Return standard scores: [layer, *unit], or [sequence, layer, *unit] for a list.

        Raises:
            ValueError: if the context has fewer than two sequences, or shares text with a sequence.
        """
        _check_context_of(self, check_model(model), sequences, least=2)
        localizer = _without_context(self.localizer)
        of_context = localizer(model, list(self.context))
        deviation, mean = torch.std_mean(of_context, dim=0)
        floor = FLOOR * deviation.flatten(1).mean(dim=1).view(-1, *[1] * (deviation.ndim - 1))
        scores = (localizer(model, sequences) - mean) / (deviation + floor)
        return torch.where(deviation + floor == 0, 0.0, scores)  # a layer that is left out


def relied_on(
    model: HookedModel, context: Sequence[MemorizedSequence], share: float, component: ComponentName = "neuron"
) -> Bool[Tensor, " layer *unit"]:
    """Return the share of every layer's components with the largest mean absolute gradient over a context.

    Args:
        model: left exactly as found.
        context: at least one sequence.
        share: of every layer's components, in (0, 1).
        component: kind of component.

    Example:
        >>> from memloc_lens.localizers.wrappers import relied_on
        >>> int(relied_on(model, [sequence], share=0.05).sum())
        228
    """
    gradient = Gradient("probability", component=component)
    sizes = mean_over_context(context, lambda part: gradient(model, part).abs())
    return top_components(sizes, share, component=component_of(component)).members


def _without_context(localizer: AnyLocalizer) -> AnyLocalizer:
    """Return a localizer that can score the context itself: a prior from it would be the same for all sequences."""
    has = is_dataclass(localizer) and any(entry.name == "context" for entry in fields(localizer))
    return replace(localizer, context=()) if has else localizer  # type: ignore[type-var]


def _check_context_of(
    wrapper: Protect | Contrast,
    model: HookedModel,
    sequences: MemorizedSequence | Sequence[MemorizedSequence],
    least: int = 1,
) -> None:
    if len(wrapper.context) < least:
        raise ValueError(
            f"{wrapper.name} has a context of {len(wrapper.context)} sequences and needs at least {least}; give some "
            "that are not measured, on the command line with --context or --context-sequences"
        )
    check_disjoint(wrapper.context, check_sequences(model, sequences))
