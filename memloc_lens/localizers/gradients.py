"""Gradients by a mask: how much the target's probability falls, to first order, when a component is dropped.

With m a mask over the components, applied at every position, and p_t(m) the probability of target token t, the saliency
of component i is s_i = d f / d m_i, where f is the mean over t of

    log_odds      softplus(lo_t + 2),  lo_t = log p_t - log(1 - p_t)
    probability   p_t
    loss          log p_t

A token that is lost already weighs little in the first two, and asks for no more components.

* Gradient is s at a mask of ones: attribution patching to zero (Syed et al., 2023), for all positions together.
* IterativeGradient goes on. In every round the components with the highest s are locked at 0, and s is taken again
  under the new mask, until a share of them is locked: after Iterative SNIP (de Jorge et al., 2021), which prunes what
  matters least, where this drops what matters most. The sets of the rounds are nested.

A context, other text to spare, gives a prior on spread. RMS_i is the root mean square of d lo_t / d m_i over the
sequences and positions of the context, and every saliency becomes

    s_i - prior * RMS_i^2 / mean of RMS

The sum of squares over positions is estimated: it is the mean square of d (sum over t of +-lo_t) / d m_i over random
signs.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import prod
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from memloc_lens.checks import check_choice, check_model, check_number
from memloc_lens.components import WEIGHTS, ComponentName, Scope, component_of, count_of
from memloc_lens.library_types import HookedModel
from memloc_lens.localizers.context import Context, check_context, check_disjoint, mean_over_context
from memloc_lens.localizers.masking import check_gradients_pass, mask_shape, masked_residual, with_unmasked_layers
from memloc_lens.localizers.scoring import ScoreBatch, score
from memloc_lens.logits import target_log_odds
from memloc_lens.sequence import Batch, MemorizedSequence, check_sequences

Objective = Literal["log_odds", "probability", "loss"]
Schedule = Literal["geometric", "linear"]

SHIFT = 2.0
"""A token whose log-odds are below minus this is lost."""
DRAWS = 2
"""Draws of random signs."""

OBJECTIVES: dict[str, Callable[[Tensor], Tensor]] = {
    "log_odds": lambda log_odds: softplus(log_odds + SHIFT),
    "probability": torch.sigmoid,
    "loss": logsigmoid,
}
"""What is differentiated, from the log-odds of a target."""


@dataclass(frozen=True)
class Gradient:
    """Derivative of the targets' log-odds by a mask of ones. One forward and one backward pass.

    Args:
        objective: What is differentiated: log_odds, probability or loss.
        prior: Weight of the spread of the gradient over the context; without a context there is none.
        first_layer: Layers before it are not masked, and score 0.
        component: Kind of component to score.
        context: Sequences to spare, disjoint from the targets.

    Example:
        >>> Gradient(context=load_sequences(model)[100:104])(model, sequence).shape
        torch.Size([6, 768])
    """

    name: ClassVar[str] = "gradient"
    objective: Objective = "log_odds"
    prior: float = 0.03
    first_layer: int = 0
    component: ComponentName = "neuron"
    context: Context = ()

    def __post_init__(self) -> None:
        _check(self)

    def __call__(
        self, model: HookedModel, sequences: MemorizedSequence | Sequence[MemorizedSequence]
    ) -> Float[Tensor, "..."]:
        """Return signed scores in the objective's units: [layer, *unit], or [sequence, layer, *unit] for a list.

        Raises:
            ValueError: if the context shares text with a sequence.
        """
        penalty = _penalty(self, model, sequences)

        def score_batch(model: HookedModel, batch: Batch) -> Float[Tensor, "row layer *unit"]:
            return with_unmasked_layers(
                _saliency(self, model, batch)(_ones(self, model, batch)) - penalty, self.first_layer
            )

        return _score(self, model, sequences, score_batch)


@dataclass(frozen=True)
class IterativeGradient:
    """Gradients round after round, each time with the components that are chosen already switched off.

    Args:
        rounds: Number of forward and backward passes.
        objective: What is differentiated: log_odds, probability or loss.
        max_ratio: Share of the components to lock; the rest is ranked by the last round.
        schedule: Lock a growing number of components in every round (geometric), or as many (linear).
        scope: Lock the share of every layer, or of all layers together.
        prior: Weight of the spread of the gradient over the context; without a context there is none.
        first_layer: Layers before it are not masked, and score 0.
        component: Kind of component to score.
        context: Sequences to spare, disjoint from the targets.

    Example:
        >>> IterativeGradient(rounds=4)(model, sequence).shape
        torch.Size([6, 768])
    """

    name: ClassVar[str] = "iterative-gradient"
    rounds: int = 20
    objective: Objective = "log_odds"
    max_ratio: float = 0.2
    schedule: Schedule = "geometric"
    scope: Scope = "layer"
    prior: float = 0.03
    first_layer: int = 0
    component: ComponentName = "neuron"
    context: Context = ()

    def __post_init__(self) -> None:
        _check(self)
        check_number("rounds", self.rounds, least=1, whole=True)
        check_number("max_ratio", self.max_ratio, above=0, most=1)
        check_choice("schedule", self.schedule, get_args(Schedule))
        check_choice("scope", self.scope, get_args(Scope))

    def __call__(
        self,
        model: HookedModel,
        sequences: MemorizedSequence | Sequence[MemorizedSequence],
        spared: Bool[Tensor, " layer *unit"] | None = None,
    ) -> Float[Tensor, "..."]:
        """Rank the components by the order in which they are locked.

        Args:
            model: left exactly as found.
            sequences: one, or a list.
            spared: components that are never locked; they score -2.

        Returns:
            [layer, *unit], or [sequence, layer, *unit] for a list: from 2 down to above 1 in the order of locking;
            of the others their last saliency over its largest absolute value, from -1 to 1.

        Raises:
            ValueError: if the context shares text with a sequence, or what is not spared is less than `max_ratio`.
        """
        model = check_model(model)
        penalty = _penalty(self, model, sequences)
        shape = mask_shape(model, component_of(self.component), self.first_layer, 1)
        barred = torch.zeros(shape, dtype=torch.bool, device=model.cfg.device)
        if spared is not None:
            barred = barred | spared[self.first_layer :].to(barred.device)
        pooled = barred.flatten(2) if self.scope == "layer" else barred.flatten(1).unsqueeze(1)
        counts = round_counts(self._most(model, pooled), self.rounds, self.schedule)

        def score_batch(model: HookedModel, batch: Batch) -> Float[Tensor, "row layer *unit"]:
            return self._ranked(model, batch, penalty, pooled, counts)

        return _score(self, model, sequences, score_batch)

    def _most(self, model: HookedModel, barred: Bool[Tensor, "1 pool unit"]) -> int:
        plural = component_of(self.component).plural
        most, left = count_of(self.max_ratio, barred.shape[2], "nearest", plural), int((~barred).sum(dim=2).min())
        if most > left:
            raise ValueError(
                f"max_ratio is {self.max_ratio}, {most} {plural}, and {left} are not spared; "
                "lower max_ratio, or spare fewer"
            )
        return most

    def _ranked(
        self,
        model: HookedModel,
        batch: Batch,
        penalty: Tensor,
        barred: Bool[Tensor, "1 pool unit"],
        counts: list[int],
    ) -> Float[Tensor, "row layer *unit"]:
        saliency, mask = _saliency(self, model, batch), _ones(self, model, batch)
        open_ = mask.view(len(batch), *barred.shape[1:])
        scores = torch.zeros_like(open_)
        for start, stop in pairwise([0, *counts]):
            latest = (saliency(mask) - penalty).view_as(open_)
            best = latest.masked_fill(barred | (open_ == 0), -torch.inf).topk(stop - start, dim=2).indices
            places = 2 - torch.arange(start, stop, device=mask.device) / counts[-1]
            scores.scatter_(2, best, places.expand_as(best))
            open_.scatter_(2, best, 0.0)
        last = latest / latest.abs().amax(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(latest.dtype).tiny)
        scores = torch.where(open_ == 0, scores, last).masked_fill(barred, -2.0)
        return with_unmasked_layers(scores.view_as(mask), self.first_layer)


def round_counts(most: int, rounds: int, schedule: Schedule = "geometric") -> list[int]:
    """Return how many components are locked after each round: at least one more each time, until `most` are.

    Args:
        most: number after the last round.
        rounds: maximum number of rounds.
        schedule: rounds of equal size (linear), or the round-th power of the rounds-th root of `most` (geometric).

    Example:
        >>> from memloc_lens.localizers.gradients import round_counts
        >>> round_counts(64, 4), round_counts(64, 4, "linear")
        ([3, 8, 23, 64], [16, 32, 48, 64])
    """
    counts = [0]
    for round_ in range(1, rounds + 1):
        wanted = round(most * round_ / rounds if schedule == "linear" else most ** (round_ / rounds))
        counts.append(min(most, max(counts[-1] + 1, wanted)))
    return sorted(set(counts[1:]))


Settings = Gradient | IterativeGradient


def _check(settings: Settings) -> None:
    check_choice("objective", settings.objective, get_args(Objective))
    check_number("prior", settings.prior, least=0)
    check_number("first_layer", settings.first_layer, least=0, whole=True)
    component_of(settings.component)
    check_context(settings.context)


def _score(
    settings: Settings,
    model: HookedModel,
    sequences: MemorizedSequence | Sequence[MemorizedSequence],
    score_batch: ScoreBatch,
) -> Float[Tensor, "..."]:
    model, component = check_model(model), component_of(settings.component)
    check_gradients_pass(model, component, settings.first_layer)
    return score(
        model,
        sequences,
        score_batch,
        component,
        first_layer=settings.first_layer,
        graph_layers=model.cfg.n_layers - settings.first_layer,
        parameters=prod(component.shape(model)) if component is WEIGHTS else 0,
    )


def _ones(settings: Settings, model: HookedModel, batch: Batch) -> Float[Tensor, "row masked *unit"]:
    shape = mask_shape(model, component_of(settings.component), settings.first_layer, len(batch))
    return torch.ones(shape, device=batch.tokens.device, dtype=torch.float32)


def _saliency(
    settings: Settings, model: HookedModel, batch: Batch
) -> Callable[[Float[Tensor, "row masked *unit"]], Float[Tensor, "row masked *unit"]]:
    """Return a function from masks to the derivatives of the objective by them."""
    masked = masked_residual(model, batch, settings.first_layer, component_of(settings.component))
    of_log_odds = OBJECTIVES[settings.objective]

    def saliency(mask: Float[Tensor, "row masked *unit"]) -> Float[Tensor, "row masked *unit"]:
        mask = mask.detach().clone().requires_grad_(True)
        with torch.enable_grad():
            values = of_log_odds(target_log_odds(model, masked(mask), batch)).mean(dim=1)
            (gradient,) = torch.autograd.grad(values.sum(), mask)
        return gradient

    return saliency


def _penalty(
    settings: Settings, model: HookedModel, sequences: MemorizedSequence | Sequence[MemorizedSequence]
) -> Float[Tensor, "*masked_unit"]:
    """Return what the prior takes off the saliencies of the masked layers."""
    if not settings.context or settings.prior == 0:
        return torch.zeros((), device=check_model(model).cfg.device)
    check_disjoint(settings.context, check_sequences(model, sequences))
    squares = mean_over_context(
        settings.context, lambda part: _score(settings, model, part, partial(_squares, settings))
    )[settings.first_layer :]
    return settings.prior * squares / squares.sqrt().mean()


def _squares(settings: Settings, model: HookedModel, batch: Batch) -> Float[Tensor, "row layer *unit"]:
    """Return the mean over the targets of the squared derivatives of their log-odds."""
    masked = masked_residual(model, batch, settings.first_layer, component_of(settings.component))
    ones = _ones(settings, model, batch).requires_grad_(True)
    squares = torch.zeros_like(ones)
    with torch.enable_grad():
        log_odds = target_log_odds(model, masked(ones), batch)
        for draw in range(DRAWS):
            signed = (_signs(batch, draw).to(log_odds) * log_odds).sum()
            (gradient,) = torch.autograd.grad(signed, ones, retain_graph=draw + 1 < DRAWS)
            squares += gradient.square() / (DRAWS * batch.suffix_len)
    return with_unmasked_layers(squares.detach(), settings.first_layer)


def _signs(batch: Batch, draw: int) -> Float[Tensor, "row suffix"]:
    """Return a random sign for every target: those of a sequence are the same in any batch."""
    rows = []
    for tokens in batch.tokens.tolist():
        generator = torch.Generator().manual_seed(zlib.crc32(repr((draw, tokens)).encode()))
        rows.append(torch.randint(2, (batch.suffix_len,), generator=generator) * 2.0 - 1)
    return torch.stack(rows)
