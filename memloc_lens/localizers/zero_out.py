"""ZeroOut: how much the suffix loss rises when one component is zeroed at every position.

Chang et al. (2024), sec. 4.1. Exact leave-one-out over all neurons, without a full forward pass for each:

1. One clean pass keeps each layer's activations and residual stream.
2. Zeroing neuron i of layer l subtracts the rank-one term post[:, i] (x) W_out[i] from the residual stream after
   layer l and changes nothing before it, so a batch of perturbed streams is computed directly.
3. The batch runs through the later layers only, and is unembedded at the target positions only.
4. After the last layer the unembedding is linear but for the scale of the final norm: a neuron's row of `W_out` is
   unembedded once, and the logits of all positions follow from it.

Where a norm (Gemma 2, OLMo 2) or a user's hook follows the MLP, the term of step 2 is no longer rank one: layer l then
runs too, with the neuron zeroed. Attention heads are few: for each, layer l and the later ones run with the head
zeroed.

With `candidates` below 1, one backward pass first estimates every rise from the gradient, and only the share of each
layer's components with the highest estimates is scored exactly.

The weights of a model in half precision are held in float32, too, while it runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import ClassVar

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from memloc_lens.bridge import run_between
from memloc_lens.checks import check_model, check_number
from memloc_lens.components import HEADS, NEURONS, Component, ComponentName, component_of, top_components
from memloc_lens.devices import rows_of
from memloc_lens.forward import CleanPass, at_targets, clean_pass, final_residual, neurons_add_up, run_layers
from memloc_lens.hooks import END, hooked
from memloc_lens.isolation import in_float32
from memloc_lens.library_types import HookedModel, LayerNorm
from memloc_lens.localizers.scoring import score
from memloc_lens.logits import target_loss
from memloc_lens.memory import in_chunks, rows_at_once
from memloc_lens.sequence import Batch, MemorizedSequence


@dataclass(frozen=True)
class ZeroOut:
    """Exact rise of the suffix loss, in nats, when one component alone is zeroed at every position.

    Args:
        first_layer: Layers before it are not perturbed, and score 0.
        candidates: Share of each layer's components to score, in (0, 1]. The rest, which the gradient ranks lower,
            get the lowest score of their layer.
        component: Kind of component to score: neuron or head. Single weights are too many to zero one by one.

    Example:
        >>> ZeroOut(candidates=0.01)(model, sequence).shape
        torch.Size([6, 768])
    """

    name: ClassVar[str] = "zero-out"
    first_layer: int = 0
    candidates: float = 1.0
    component: ComponentName = "neuron"

    def __post_init__(self) -> None:
        check_number("first_layer", self.first_layer, least=0, whole=True)
        check_number("candidates", self.candidates, above=0, most=1)
        if component_of(self.component) not in (NEURONS, HEADS):
            raise ValueError(f"ZeroOut has no exact form for every {self.component}; it scores neurons and heads")

    def __call__(
        self, model: HookedModel, sequences: MemorizedSequence | Sequence[MemorizedSequence]
    ) -> Float[Tensor, "..."]:
        """Return rises of the loss in nats: [layer, *unit], or [sequence, layer, *unit] for a list.

        Raises:
            ValueError: if `candidates` takes no component of a layer.
        """
        model = check_model(model)
        component = component_of(self.component)
        return score(
            model,
            sequences,
            self._score_batch,
            component,
            first_layer=self.first_layer,
            graph_layers=model.cfg.n_layers if self.candidates < 1 else 0,
            rows_each=prod(component.shape(model)[1:]),
        )

    def _score_batch(self, model: HookedModel, batch: Batch) -> Float[Tensor, "row layer unit"]:
        # a rise is a small difference of two losses: in half precision it would be noise
        with torch.no_grad(), in_float32(model):
            return self._rises(model, batch)

    def _rises(self, model: HookedModel, batch: Batch) -> Float[Tensor, "row layer unit"]:
        clean = clean_pass(model, batch.tokens)
        clean_loss = target_loss(model, at_targets(model, clean.streams[-1], batch), batch)
        losses_without = _losses_without_head if self.component == "head" else _losses_without_neuron
        chosen = self._candidates(model, batch)
        size = rows_at_once(model, batch.length, batch.suffix_len)
        scores = torch.zeros(chosen.shape, device=batch.tokens.device, dtype=torch.float32)
        for layer in range(self.first_layer, model.cfg.n_layers):
            pairs = chosen[:, layer].nonzero()  # [pair, 2]: a row of the batch, and a component
            losses = in_chunks(pairs, size, partial(losses_without, model, clean, layer, batch))
            row, unit = pairs.unbind(dim=1)
            rises = (torch.cat(losses).to(row.device) - clean_loss[row]).float()
            scores[:, layer] = rises.min() if self.candidates < 1 else 0.0
            scores[row, layer, unit] = rises
        return scores

    def _candidates(self, model: HookedModel, batch: Batch) -> Bool[Tensor, "row layer unit"]:
        component = component_of(self.component)
        if self.candidates == 1:
            shape = (len(batch), *component.shape(model))
            return torch.ones(shape, dtype=torch.bool, device=batch.tokens.device)
        estimates = estimated_rises(model, batch, component)
        top = (top_components(of_row, self.candidates, rounding="nearest", component=component) for of_row in estimates)
        return torch.stack([chosen.members for chosen in top])


def estimated_rises(
    model: HookedModel, batch: Batch, component: Component = NEURONS
) -> Float[Tensor, "row layer *unit"]:
    """Estimate the rises that ZeroOut measures, to first order: minus the gradient of the loss by a mask of ones."""
    shape = (len(batch), *component.shape(model))
    ones = torch.ones(shape, device=batch.tokens.device, dtype=torch.float32, requires_grad=True)
    with torch.enable_grad(), component.masked(model, ones):
        losses = target_loss(model, final_residual(model, batch), batch)
        (gradient,) = torch.autograd.grad(losses.sum(), ones)
    return -gradient


def _losses_without_head(
    model: HookedModel, clean: CleanPass, layer: int, batch: Batch, pairs: Int[Tensor, "pair 2"]
) -> Float[Tensor, " pair"]:
    """Return the suffix losses with one head of `layer` zeroed in each pair's row."""
    row, head = pairs.unbind(dim=1)
    kept = HEADS.aligned(head[:, None] != torch.arange(model.cfg.n_heads, device=head.device))
    with HEADS.edited(model, {layer: lambda outputs: outputs * kept.to(outputs)}):
        residuals = run_layers(model, rows_of(clean.streams[layer], row), layer, batch.prompt_len)
    return target_loss(model, residuals, batch[row])


def _losses_without_neuron(
    model: HookedModel, clean: CleanPass, layer: int, batch: Batch, pairs: Int[Tensor, "pair 2"]
) -> Float[Tensor, " pair"]:
    """Return the suffix losses with one neuron of `layer` zeroed in each pair's row."""
    row, neuron = pairs.to(clean.activations[layer].device).unbind(dim=1)
    adds_up = neurons_add_up(model, layer)
    if layer == model.cfg.n_layers - 1 and adds_up and _has_plain_end(model):
        return _losses_without_last(model, clean, batch.to(row.device), row, neuron)
    residuals_without = _residuals_without if adds_up else _residuals_by_masking
    residuals = residuals_without(model, clean, layer, row, neuron)
    residuals = run_layers(model, residuals, layer + 1, batch.prompt_len)
    return target_loss(model, residuals, batch[pairs[:, 0]])


def _residuals_without(
    model: HookedModel, clean: CleanPass, layer: int, row: Int[Tensor, " pair"], neuron: Int[Tensor, " pair"]
) -> Float[Tensor, "pair pos d_model"]:
    """Return the residual stream after `layer` of each pair's row with its neuron zeroed."""
    activations = clean.activations[layer][row, :, neuron].unsqueeze(-1)
    weights = rearrange(model.blocks[layer].mlp.W_out[neuron], "pair d_model -> pair 1 d_model")
    return torch.addcmul(clean.streams[layer + 1].index_select(0, row), activations, weights, value=-1)


def _residuals_by_masking(
    model: HookedModel, clean: CleanPass, layer: int, row: Int[Tensor, " pair"], neuron: Int[Tensor, " pair"]
) -> Float[Tensor, "pair pos d_model"]:
    """Return the same where the neurons' outputs do not simply add up: `layer` runs again without the neuron."""

    def without(activations: Float[Tensor, "pair pos neuron"]) -> Float[Tensor, "pair pos neuron"]:
        return activations.scatter(2, neuron[:, None, None].expand(-1, activations.shape[1], 1), 0.0)

    with NEURONS.edited(model, {layer: without}):
        return run_between(model, rows_of(clean.streams[layer], row), layer, layer + 1)


def _has_plain_end(model: HookedModel) -> bool:
    """Tell whether logits are linear in the residual stream but for the norm's scale."""
    return (
        model.cfg.normalization_type in ("LN", "RMS")
        and not hooked(model, *END)
        and model.cfg.output_logits_soft_cap <= 0
    )


def _losses_without_last(
    model: HookedModel,
    clean: CleanPass,
    batch: Batch,
    row: Int[Tensor, " pair"],
    neuron: Int[Tensor, " pair"],
) -> Float[Tensor, " pair"]:
    """Return the suffix losses with one neuron of the last layer zeroed, with one product a neuron, not a position."""
    norm, layer = model.ln_final, model.cfg.n_layers - 1

    def centred(stream: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        return stream - stream.mean(dim=-1, keepdim=True) if isinstance(norm, LayerNorm) else stream

    stream = centred(clean.streams[-1][:, batch.targets])  # [row, target, d_model]
    written = centred(model.blocks[layer].mlp.W_out[neuron])  # [pair, d_model]
    activation = clean.activations[layer][row, batch.targets, neuron].unsqueeze(-1)  # [pair, target, 1]
    scale = ((stream[row] - activation * written.unsqueeze(1)).square().mean(dim=-1, keepdim=True) + norm.eps).sqrt()
    clean_logits, written_logits = ((part * norm.w) @ model.unembed.W_U for part in (stream, written))
    constant = model.unembed.b_U + (norm.b @ model.unembed.W_U if isinstance(norm, LayerNorm) else 0)
    losses = []
    for index, true in enumerate(batch.suffix.T):
        logits = torch.addcmul(clean_logits[row, index], activation[:, index], written_logits, value=-1)
        losses.append(cross_entropy(logits.div_(scale[:, index]).add_(constant), true[row], reduction="none"))
    return torch.stack(losses).mean(dim=0)
