"""Learned masks: train a mask over the components to keep the sequence while most of the mask is driven to zero.

Chang et al. (2024), sec. 4.1. A mask with an entry for each component multiplies the activations (or the weights) at
every position; Adam lowers suffix loss + penalty * regularizer, with the model's weights frozen. The entries that stay
open belong to the components that the sequence needs.

* Slimming (Liu et al., 2017): the mask itself is trained, from 1, and multiplies clipped to [0, 1]; the
  regularizer is the mean of its absolute values before clipping; the score is the mask clipped to [0, 1].
* Hard Concrete (Louizos et al., 2018): each entry is a random variable on [0, 1] with mass at both ends. With
  s = sigmoid((logit(u) + log_alpha) / temperature), u uniform, the mask is s stretched to [-0.1, 1.1] and
  clipped; the regularizer is the mean probability of being above 0; the score is sigmoid(log_alpha).

The masks of many sequences train side by side in one batch. Adam works entry by entry and every sequence has a loss of
its own, so they do not influence one another; a sequence that reaches its stop keeps the mask it had then. Nothing
before the first masked layer changes between steps: it runs once, in a clean pass.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from memloc_lens.checks import check_model, check_number
from memloc_lens.components import WEIGHTS, Component, ComponentName, component_of
from memloc_lens.library_types import HookedModel
from memloc_lens.localizers.masking import check_gradients_pass, mask_shape, masked_residual, with_unmasked_layers
from memloc_lens.localizers.scoring import score
from memloc_lens.logits import target_loss
from memloc_lens.sequence import Batch, MemorizedSequence

STRETCH = 0.1  # of the concrete distribution beyond 0 and 1 (Louizos et al., 2018)
STOP_EVERY = 10  # steps between two checks of the stop


@runtime_checkable
class MaskSettings(Protocol):
    """What the settings of every trained mask have."""

    name: ClassVar[str]

    @property
    def first_layer(self) -> int:
        """Layers before it are not masked."""
        ...

    @property
    def component(self) -> ComponentName:
        """Kind of component to mask."""
        ...


@dataclass(frozen=True)
class Slimming:
    """A mask trained from 1 under an L1 penalty, clipped to [0, 1].

    Args:
        steps: Maximum number of Adam steps.
        lr: Learning rate of Adam.
        penalty: Weight of the mean absolute mask against the suffix loss in nats. A model with more components needs
            a larger one, because it weighs a mean.
        stop_loss: Training ends when the mean absolute mask falls under this value.
        first_layer: Layers before it are not masked, and score 0.
        component: Kind of component to mask.

    Example:
        >>> Slimming(steps=2)(model, sequence).shape
        torch.Size([6, 768])
    """

    name: ClassVar[str] = "slimming"
    steps: int = 60
    lr: float = 1e-2
    penalty: float = 100.0
    stop_loss: float = 0.1
    first_layer: int = 0
    component: ComponentName = "neuron"

    def __post_init__(self) -> None:
        _check_training(self)

    def __call__(
        self, model: HookedModel, sequences: MemorizedSequence | Sequence[MemorizedSequence]
    ) -> Float[Tensor, "..."]:
        """Return scores in [0, 1]: [layer, *unit], or [sequence, layer, *unit] for a list."""
        return score_masks(self, model, sequences, self._score_batch)

    def _score_batch(self, model: HookedModel, batch: Batch) -> Float[Tensor, "row layer *unit"]:
        shape = _shape(self, model, batch)
        values = torch.ones(shape, device=batch.tokens.device, dtype=torch.float32, requires_grad=True)

        def mask_and_regularizer() -> tuple[Tensor, Tensor]:
            return values.clamp(0, 1), values.abs().flatten(1).mean(dim=1)

        trained = _train(self, values, mask_and_regularizer, model, batch)
        return with_unmasked_layers(trained.clamp(0, 1), self.first_layer)


@dataclass(frozen=True)
class HardConcrete:
    """A mask of hard concrete gates under an expected-L0 penalty; the score is sigmoid(log_alpha).

    Args:
        steps: Maximum number of Adam steps.
        lr: Learning rate of Adam.
        penalty: Weight of the mean probability of an open gate against the suffix loss in nats. A model with more
            components needs a larger one, because it weighs a mean.
        init: Value of the mask without noise at the start, in (0, 1].
        temperature: Temperature of the gates; a lower one is closer to 0 or 1.
        stop_loss: Training ends when the mean probability of an open gate falls under this value.
        first_layer: Layers before it are not masked, and score 0.
        seed: Seed of the noise of the gates. All sequences share the noise, so that none depends on its batch.
        component: Kind of component to mask.

    Example:
        >>> HardConcrete(steps=2)(model, sequence).shape
        torch.Size([6, 768])
    """

    name: ClassVar[str] = "hard-concrete"
    steps: int = 200
    lr: float = 1e-2
    penalty: float = 100.0
    init: float = 0.9
    temperature: float = 0.33
    stop_loss: float = 0.1
    first_layer: int = 0
    seed: int = 0
    component: ComponentName = "neuron"

    def __post_init__(self) -> None:
        _check_training(self)
        check_number("init", self.init, above=0, most=1)
        check_number("temperature", self.temperature, above=0)
        check_number("seed", self.seed, whole=True)

    def __call__(
        self, model: HookedModel, sequences: MemorizedSequence | Sequence[MemorizedSequence]
    ) -> Float[Tensor, "..."]:
        """Return scores in (0, 1): [layer, *unit], or [sequence, layer, *unit] for a list."""
        return score_masks(self, model, sequences, self._score_batch)

    def _score_batch(self, model: HookedModel, batch: Batch) -> Float[Tensor, "row layer *unit"]:
        generator = torch.Generator().manual_seed(self.seed)
        start = torch.logit(torch.tensor((self.init + STRETCH) / (1 + 2 * STRETCH), dtype=torch.float32))
        shape, device = (
            mask_shape(model, component_of(self.component), self.first_layer, len(batch)),
            batch.tokens.device,
        )
        log_alpha = start.repeat(*shape).to(device).requires_grad_(True)
        closed = self.temperature * torch.log(torch.tensor(STRETCH / (1 + STRETCH), dtype=torch.float32)).item()

        def mask_and_regularizer() -> tuple[Tensor, Tensor]:
            uniform = torch.rand(shape[1:], generator=generator, dtype=torch.float32)
            noise = uniform.clamp(1e-4, 1 - 1e-4).logit().to(device)
            gates = torch.sigmoid((noise + log_alpha) / self.temperature)
            open_probability = torch.sigmoid(log_alpha - closed)
            return (gates * (1 + 2 * STRETCH) - STRETCH).clamp(0, 1), open_probability.flatten(1).mean(dim=1)

        trained = _train(self, log_alpha, mask_and_regularizer, model, batch)
        return with_unmasked_layers(trained.sigmoid(), self.first_layer)


def _check_training(settings: Slimming | HardConcrete) -> None:
    check_number("steps", settings.steps, least=1, whole=True)
    check_number("lr", settings.lr, above=0)
    check_number("penalty", settings.penalty, least=0)
    check_number("stop_loss", settings.stop_loss, least=0)
    check_number("first_layer", settings.first_layer, least=0, whole=True)
    component_of(settings.component)


def score_masks(
    settings: MaskSettings,
    model: HookedModel,
    sequences: MemorizedSequence | Sequence[MemorizedSequence],
    score_batch: Callable[[HookedModel, Batch], Tensor],
) -> Float[Tensor, "..."]:
    """Score sequences by masks that `score_batch` trains for the rows of a batch.

    Raises:
        ValueError: if a loss is not finite, naming the sequence; or as `score` does.
    """
    model = check_model(model)
    component = component_of(settings.component)
    check_gradients_pass(model, component, settings.first_layer)
    try:
        return score(
            model,
            sequences,
            score_batch,
            component,
            first_layer=settings.first_layer,
            graph_layers=model.cfg.n_layers - settings.first_layer,
            parameters=mask_parameters(model, component),
        )
    except LossNotFinite as error:
        listed = [sequences] if isinstance(sequences, MemorizedSequence) else sequences
        id = next(sequence.id for sequence in listed if torch.equal(sequence.tokens, error.tokens))
        raise ValueError(
            f"{settings.name}, sequence {id!r}: the loss is NaN or infinite at step {error.step}; lower lr, or take a "
            "dtype with a wider range"
        ) from error


def mask_parameters(model: HookedModel, component: Component) -> int:
    """Return how many entries of a mask count in a budget: next to activations, the few of neurons and heads do not."""
    return prod(component.shape(model)) if component is WEIGHTS else 0


@dataclass
class LossNotFinite(Exception):
    """The loss of the sequence with these tokens, at a step."""

    tokens: Tensor
    step: int


def _train(
    settings: Slimming | HardConcrete,
    parameters: Float[Tensor, "row layer *unit"],
    mask_and_regularizer: Callable[[], tuple[Tensor, Tensor]],
    model: HookedModel,
    batch: Batch,
) -> Float[Tensor, "row layer *unit"]:
    """Run Adam on the parameters until every sequence has reached its stop, or for the maximum number of steps."""
    optimizer = torch.optim.Adam([parameters], lr=settings.lr)
    masked = masked_residual(model, batch, settings.first_layer, component_of(settings.component))
    result = parameters.detach().clone()
    running = torch.ones(len(batch), dtype=torch.bool, device=batch.tokens.device)
    diverged = torch.full((len(batch),), -1, device=batch.tokens.device)  # the step, without waiting for the device
    for step in range(settings.steps):
        with torch.enable_grad():
            values, regularizer = mask_and_regularizer()
            if step % STOP_EVERY == 0:
                running &= regularizer.detach() >= settings.stop_loss
                if not running.any():
                    break
            losses = target_loss(model, masked(values), batch)
            objective = (losses + settings.penalty * regularizer).sum()
        diverged = torch.where((diverged < 0) & running & ~losses.detach().isfinite(), step, diverged)
        optimizer.zero_grad()
        objective.backward()
        optimizer.step()
        still = running.view(-1, *[1] * (parameters.ndim - 1))
        result = torch.where(still, parameters.detach(), result)
    if (diverged >= 0).any():
        row = int((diverged >= 0).nonzero()[0])
        raise LossNotFinite(batch.tokens[row].cpu(), int(diverged[row]))
    return result


def _shape(settings: Slimming | HardConcrete, model: HookedModel, batch: Batch) -> tuple[int, ...]:
    return mask_shape(model, component_of(settings.component), settings.first_layer, len(batch))
