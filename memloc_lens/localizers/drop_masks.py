"""Drop masks: train which components to switch off, so that the sequence is lost and other text is not.

Learned masks of Chang et al. (2024) find what the sequence needs to be kept. DEL asks the opposite question, and the
masks here are trained on it: a fixed share of every layer is off in every step, chosen by a trained parameter
(top-k forward, straight through backward), and a *context*, text that should survive, is part of the objective.

* `DropMask` minimizes the mean over target positions of -log(1 - p), p the probability of the true token, plus
  penalty * the mean rise of the loss of the context. Lost tokens add next to nothing, so that the rest are worked on.
* `BalancedSubnet` (Sakarvadia et al., 2025) maximizes the loss of the sequence less the loss of the context.

The masks of many sequences train side by side in one batch and do not influence one another: the sequences of the
context that are drawn in a step are the same for all, and each runs once under every mask. What comes before the first
masked layer runs once, for the context too.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from memloc_lens.checks import check_choice, check_model, check_number
from memloc_lens.components import ComponentName, component_of, count_of
from memloc_lens.library_types import HookedModel
from memloc_lens.localizers.context import Context, check_context, check_disjoint
from memloc_lens.localizers.gradients import IterativeGradient
from memloc_lens.localizers.learned_masks import (
    LossNotFinite,
    mask_parameters,
    score_masks,
)
from memloc_lens.localizers.masking import mask_shape, masked_residual, with_unmasked_layers
from memloc_lens.logits import target_log_odds, target_loss
from memloc_lens.memory import rows_at_once
from memloc_lens.sequence import Batch, MemorizedSequence, check_sequences

Start = Literal["scratch", "iterative-gradient"]

NOISE = 0.01  # deviation of the parameters at the start from scratch: it only decides the first drop set
SPREAD = 2.0  # between the first and the last of a ranking at the start, with the edge of the drop set at 0


@dataclass(frozen=True)
class DropMask:
    """A mask trained to drop a fixed share of every layer, so that the sequence is lost and the context is kept.

    Args:
        steps: Number of Adam steps.
        lr: Learning rate of Adam. From scratch take about 0.1.
        penalty: Weight of the mean rise of the context's suffix losses, in nats; a loss that falls counts as 0.
        ratio: Share of every layer that is dropped in training, rounded down. Its top share is the trained set; other
            shares follow the trained ranking, but were not trained for.
        retained: Number of sequences of the context that are drawn for a step, the same for all targets.
        start: Start from the ranking of `IterativeGradient` with the same context, or from noise ("scratch").
        context: Sequences that should survive: plain text, other memorized sequences. Disjoint from all that is
            measured. Without any, only the target counts.
        first_layer: Layers before it are not masked, and score 0.
        component: Kind of component to mask.
        seed: Seed of the noise and of the draws.

    Example:
        >>> DropMask(steps=2)(model, sequence).shape
        torch.Size([6, 768])
    """

    name: ClassVar[str] = "drop-mask"
    steps: int = 40
    lr: float = 0.01
    penalty: float = 1.0
    ratio: float = 0.1
    retained: int = 4
    start: Start = "iterative-gradient"
    context: Context = ()
    first_layer: int = 0
    component: ComponentName = "neuron"
    seed: int = 0

    def __post_init__(self) -> None:
        _check_settings(self)
        check_number("penalty", self.penalty, least=0)
        check_choice("start", self.start, get_args(Start))

    def __call__(
        self, model: HookedModel, sequences: MemorizedSequence | Sequence[MemorizedSequence]
    ) -> Float[Tensor, "..."]:
        """Return the trained parameter, higher is dropped first: [layer, *unit], or [sequence, layer, *unit]."""
        count, context = _count(self, model), _Context(self, model, sequences)

        def score_batch(model: HookedModel, batch: Batch) -> Float[Tensor, "row layer *unit"]:
            parameter = self._start(model, batch).requires_grad_(True)

            def kept() -> Float[Tensor, "row layer *unit"]:
                surrogate = parameter.sigmoid()
                return 1 - _highest(parameter.detach(), count) + (surrogate.detach() - surrogate)

            def objective(residual: Float[Tensor, "row target d_model"]) -> Float[Tensor, " row"]:
                return softplus(target_log_odds(model, residual, batch)).mean(dim=1)

            def price(losses: Float[Tensor, " row"], clean: float) -> Float[Tensor, " row"]:
                return self.penalty * (losses - clean).relu()

            optimizer = torch.optim.Adam([parameter], lr=self.lr)
            _train(self, model, batch, optimizer, kept, objective, context, price)
            return with_unmasked_layers(parameter.detach(), self.first_layer)

        return score_masks(self, model, sequences, score_batch)

    def _start(self, model: HookedModel, batch: Batch) -> Float[Tensor, "row layer *unit"]:
        shape = mask_shape(model, component_of(self.component), self.first_layer, len(batch))
        if self.start == "iterative-gradient":
            iterative = IterativeGradient(
                max_ratio=self.ratio, first_layer=self.first_layer, component=self.component, context=self.context
            )
            scores = iterative(model, [MemorizedSequence(tokens, batch.prompt_len) for tokens in batch.tokens])
            flat = scores[:, self.first_layer :].flatten(2)
            ranks = flat.argsort(dim=-1, stable=True).argsort(dim=-1) / max(flat.shape[-1] - 1, 1)  # from 0 to 1
            return (SPREAD * (ranks - (1 - self.ratio))).view(shape)
        generator = torch.Generator().manual_seed(self.seed)
        noise = NOISE * torch.randn(shape[1:], generator=generator, dtype=torch.float32)
        return noise.repeat(len(batch), *[1] * noise.ndim).to(batch.tokens.device)


@dataclass(frozen=True)
class BalancedSubnet:
    """BalancedSubnet of Sakarvadia et al. (ICLR 2025): a subnet without the sequence, balanced by clean text.

    Each component has a score; those with the lowest absolute scores in each layer are off. SGD with momentum lowers
    -(loss of the sequence) + (mean loss of the clean text drawn for the step). As in the released code, scores start
    Kaiming-uniform and `ratio` is a share of every weight matrix, rounded down. Differences:

    * the paper masks both matrices of every MLP; the component `"weight"` of this package is `W_out` alone;
    * the paper finds one mask for all memorized sequences at once; here each sequence has its own;
    * `"neuron"` and `"head"` are this package's: a score for each, with as many inputs as a layer has components.

    Args:
        steps: Number of SGD steps.
        lr: Learning rate.
        momentum: Of SGD.
        weight_decay: Of SGD, on the scores.
        ratio: Share of every layer that is off in training. Other shares follow the trained ranking.
        retained: Number of sequences of the context that are drawn for a step, the same for all targets.
        context: The clean text. Disjoint from all that is measured.
        first_layer: Layers before it are not masked, and score 0.
        component: Kind of component to mask.
        seed: Seed of the first scores and of the draws.

    Example:
        >>> BalancedSubnet(steps=2, context=tuple(load_sequences(model)[1:9]))(model, sequence).shape
        torch.Size([6, 768])
    """

    name: ClassVar[str] = "balanced-subnet"
    steps: int = 40
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    ratio: float = 0.1
    retained: int = 4
    context: Context = ()
    first_layer: int = 0
    component: ComponentName = "neuron"
    seed: int = 0

    def __post_init__(self) -> None:
        _check_settings(self)
        check_number("momentum", self.momentum, least=0, below=1)
        check_number("weight_decay", self.weight_decay, least=0)

    def __call__(
        self, model: HookedModel, sequences: MemorizedSequence | Sequence[MemorizedSequence]
    ) -> Float[Tensor, "..."]:
        """Return minus the absolute trained scores: [layer, *unit], or [sequence, layer, *unit] for a list.

        Raises:
            ValueError: if there is no context; or as every localizer.
        """
        if not self.context:
            raise ValueError(
                "balanced-subnet has no context, and without clean text its loss has no lower bound; give --context "
                "FILE, or context= in Python"
            )
        count, context = _count(self, model), _Context(self, model, sequences)

        def score_batch(model: HookedModel, batch: Batch) -> Float[Tensor, "row layer *unit"]:
            scores = self._start(model, batch).requires_grad_(True)

            def kept() -> Float[Tensor, "row layer *unit"]:
                size = scores.abs()
                return 1 - _highest(-size.detach(), count) + (size - size.detach())

            def objective(residual: Float[Tensor, "row target d_model"]) -> Float[Tensor, " row"]:
                return -target_loss(model, residual, batch)

            optimizer = torch.optim.SGD([scores], self.lr, self.momentum, weight_decay=self.weight_decay)
            _train(self, model, batch, optimizer, kept, objective, context, lambda losses, clean: losses)
            return with_unmasked_layers(-scores.detach().abs(), self.first_layer)

        return score_masks(self, model, sequences, score_batch)

    def _start(self, model: HookedModel, batch: Batch) -> Float[Tensor, "row layer *unit"]:
        _, layers, *unit = mask_shape(model, component_of(self.component), self.first_layer, len(batch))
        generator = torch.Generator().manual_seed(self.seed)
        scores = torch.empty(layers, math.prod(unit[:-1]), unit[-1], dtype=torch.float32, device="cpu")
        for layer in scores:
            torch.nn.init.kaiming_uniform_(layer, a=math.sqrt(5), generator=generator)
        return scores.view(layers, *unit).repeat(len(batch), *[1] * (1 + len(unit))).to(batch.tokens.device)


def _check_settings(settings: DropMask | BalancedSubnet) -> None:
    check_number("steps", settings.steps, least=1, whole=True)
    check_number("lr", settings.lr, above=0)
    check_number("ratio", settings.ratio, above=0, most=1)
    check_number("retained", settings.retained, least=1, whole=True)
    check_number("first_layer", settings.first_layer, least=0, whole=True)
    check_number("seed", settings.seed, whole=True)
    component_of(settings.component)
    check_context(settings.context)


def _count(settings: DropMask | BalancedSubnet, model: HookedModel) -> int:
    """Return how many components of every layer are dropped, as `top_components` counts them."""
    component = component_of(settings.component)
    return count_of(settings.ratio, math.prod(component.shape(check_model(model))[1:]), plural=component.plural)


def _highest(values: Float[Tensor, "row layer *unit"], count: int) -> Float[Tensor, "row layer *unit"]:
    """Mark the `count` highest values of every layer with 1, the others with 0; of equal values the first."""
    flat = values.flatten(2)
    first = flat.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(flat).scatter(-1, first, 1).view_as(values)


class _Context:
    """The context in the training of one call: what a sequence needs in every step is computed when it is first drawn.

    Args:
        settings: of the localizer.
        model: that the sequences must fit.
        targets: that share no text with it.

    Raises:
        ValueError: if the model cannot read a sequence, or it shares text with a target.
    """

    def __init__(
        self,
        settings: DropMask | BalancedSubnet,
        model: HookedModel,
        targets: MemorizedSequence | Sequence[MemorizedSequence],
    ) -> None:
        self._sequences = check_sequences(model, list(settings.context))
        check_disjoint(self._sequences, check_sequences(model, targets))
        self._settings = settings
        self._prepared: dict[int, tuple[Callable[[Tensor], Tensor], float]] = {}

    def draws(self) -> Iterator[list[int]]:
        """Yield the sequences of each step; each call draws the same."""
        generator = torch.Generator().manual_seed(self._settings.seed)
        while True:
            order = torch.randperm(len(self._sequences), generator=generator, device="cpu")
            yield order[: self._settings.retained].tolist()

    def losses(
        self, model: HookedModel, index: int, kept: Float[Tensor, "row layer *unit"]
    ) -> Iterator[tuple[Float[Tensor, " row"], float]]:
        """Yield the suffix losses of a sequence under each mask, as many at a time as fit, and its clean loss."""
        sequence, component = self._sequences[index], component_of(self._settings.component)
        alone = Batch(sequence.tokens[None].to(model.cfg.device), sequence.prompt_len)
        if index not in self._prepared:
            masked = masked_residual(model, alone, self._settings.first_layer, component)
            with torch.no_grad():
                clean = target_loss(model, masked(torch.ones_like(kept[:1])), alone)
            self._prepared[index] = masked, clean.item()
        masked, clean_loss = self._prepared[index]
        graph_layers = model.cfg.n_layers - self._settings.first_layer
        parameters = mask_parameters(model, component)
        size = rows_at_once(model, alone.length, alone.suffix_len, graph_layers, parameters)
        for masks in kept.split(size):
            yield target_loss(model, masked(masks), alone[[0] * len(masks)]), clean_loss


def _train(
    settings: DropMask | BalancedSubnet,
    model: HookedModel,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    kept: Callable[[], Float[Tensor, "row layer *unit"]],
    objective: Callable[[Tensor], Float[Tensor, " row"]],
    context: _Context,
    price: Callable[[Float[Tensor, " row"], float], Float[Tensor, " row"]],
) -> None:
    """Lower the objective of each row plus the mean price of the context that is drawn for the step.

    Gradients with respect to the masks are summed over passes, so that the graph of only one is held.

    Args:
        settings: of the localizer.
        model: frozen.
        batch: the targets.
        optimizer: of the parameters behind the masks.
        kept: makes the masks of the parameters.
        objective: of each row, from its final residual stream.
        context: that is drawn from.
        price: of the losses of a sequence of the context under each mask, given its clean loss.
    """
    masked = masked_residual(model, batch, settings.first_layer, component_of(settings.component))
    diverged = torch.full((len(batch),), -1, device=batch.tokens.device)  # the step, without waiting for the device
    for step, drawn in zip(range(settings.steps), context.draws(), strict=False):
        with torch.enable_grad():
            masks = kept()
            leaf = masks.detach().requires_grad_(True)
            own = objective(masked(leaf))
            own.sum().backward()
            for index in drawn:
                for losses, clean in context.losses(model, index, leaf):
                    (price(losses, clean).sum() / len(drawn)).backward()
            by_masks = leaf.grad
            assert by_masks is not None
            optimizer.zero_grad()
            masks.backward(by_masks)
        optimizer.step()
        finite = own.detach().isfinite() & by_masks.flatten(1).isfinite().all(dim=1)
        diverged = torch.where((diverged < 0) & ~finite, step, diverged)
    if (diverged >= 0).any():
        row = int((diverged >= 0).nonzero()[0])
        raise LossNotFinite(batch.tokens[row].cpu(), int(diverged[row]))
