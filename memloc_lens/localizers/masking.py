"""The forward pass under a mask over components that is differentiated: only what the mask changes is run."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from memloc_lens.bridge import stream_entering
from memloc_lens.components import HEADS, NEURONS, Component, post
from memloc_lens.forward import neurons_add_up, run_layers
from memloc_lens.hooks import check_no_backward_hooks, hooked
from memloc_lens.library_types import HookedModel
from memloc_lens.sequence import Batch


def check_gradients_pass(model: HookedModel, component: Component, first_layer: int) -> None:
    """Refuse backward hooks of the user's where the gradients of a mask pass.

    Raises:
        ValueError: naming the hook point.
    """
    source = HEADS if component is HEADS else NEURONS  # a weight of W_out multiplies its neuron's activation
    check_no_backward_hooks(model, map(source.activations_at, range(first_layer, model.cfg.n_layers)))


def masked_residual(
    model: HookedModel, batch: Batch, first_layer: int, component: Component
) -> Callable[[Float[Tensor, "row layer *unit"]], Float[Tensor, "row target d_model"]]:
    """Return a function from masks to the final residual stream at the targets, which runs only what masks change.

    Up to the neurons of the first masked layer everything is as in the clean pass, which runs once; masking these
    adds the change of their activations times `W_out` to the stream. A batch of one row takes any number of masks.
    """
    if component is not NEURONS or not neurons_add_up(model, first_layer):
        with torch.no_grad():
            before = stream_entering(model, batch.tokens, first_layer)
        # a user's backward hook before the first mask fails if nothing there has a gradient
        before.requires_grad_(bool(hooked(model, f"blocks.{first_layer}")))

        def run_all(values: Float[Tensor, "row layer *unit"]) -> Float[Tensor, "row target d_model"]:
            with component.masked(model, values, first_layer):
                return run_layers(model, before.expand(len(values), -1, -1), first_layer, batch.prompt_len)

        return run_all

    with torch.no_grad():
        name = post(first_layer)
        clean, cache = model.run_with_cache(batch.tokens, stop_at_layer=first_layer + 1, names_filter=name)
    activations = cache[name]  # [row, pos, neuron]
    weights = model.blocks[first_layer].mlp.W_out

    def run_later(values: Float[Tensor, "row layer neuron"]) -> Float[Tensor, "row target d_model"]:
        change = activations * (values[:, 0] - 1).to(activations).unsqueeze(1)
        entering = clean + change @ weights
        if first_layer + 1 == model.cfg.n_layers:
            return run_layers(model, entering, first_layer + 1, batch.prompt_len)
        with component.masked(model, values[:, 1:], first_layer + 1):
            return run_layers(model, entering, first_layer + 1, batch.prompt_len)

    return run_later


def mask_shape(model: HookedModel, component: Component, first_layer: int, rows: int) -> tuple[int, ...]:
    """Return the shape of a mask for each row, over the layers from `first_layer` on."""
    layers, *unit = component.shape(model)
    return rows, layers - first_layer, *unit


def with_unmasked_layers(
    scores: Float[Tensor, "row masked *unit"], first_layer: int
) -> Float[Tensor, "row layer *unit"]:
    """Return the scores of the masked layers with zeros for those before them."""
    unmasked = scores.new_zeros(len(scores), first_layer, *scores.shape[2:])
    return torch.cat([unmasked, scores], dim=1)
