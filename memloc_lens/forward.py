"""The forward pass in parts, so that no more of it is computed than is read."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memloc_lens.bridge import has_forward_hooks, is_bridge, run_between, stream_entering
from memloc_lens.checks import check_first_layer, check_model
from memloc_lens.components import post
from memloc_lens.devices import device_of
from memloc_lens.heap import kept_memory
from memloc_lens.hooks import END, hooked, hooked_after_neurons
from memloc_lens.isolation import gradients_possible, isolated
from memloc_lens.library_types import HookedModel
from memloc_lens.products import fast_products
from memloc_lens.sequence import Batch


class PrefixCache:
    """The residual stream that enters a layer, kept for every batch of tokens that has been run.

    It serves passes without gradients in which nothing before the layer is ablated; others run whole.

    Args:
        model: whose layers before `layer` are clean.
        layer: the first that may be ablated.

    Example:
        >>> prefix = PrefixCache(model, layer=1)
        >>> batch = Batch(sequence.tokens[None], sequence.prompt_len)
        >>> with torch.no_grad():
        ...     residual = final_residual(model, batch, prefix)
    """

    def __init__(self, model: HookedModel, layer: int) -> None:
        model = check_model(model)
        check_first_layer(layer, model.cfg.n_layers)
        self._model, self._layer = model, layer
        self._kept: dict[tuple[tuple[int, ...], bytes], Tensor] = {}
        later = (*(f"blocks.{index}." for index in range(layer, model.cfg.n_layers)), "ln_final.", "unembed.")
        parts = model.named_modules()
        self._before = [(name, part) for name, part in parts if name and not f"{name}.".startswith(later)]

    def entering(
        self, model: HookedModel, tokens: Int[Tensor, "row pos"]
    ) -> tuple[int, Float[Tensor, "row pos d_model"]]:
        """Return the layer and the residual stream that enters it, from the cache if it is there.

        Raises:
            ValueError: if the model is another one, or a hook before the layer makes what is kept stale.
        """
        if model is not self._model:
            raise ValueError("a prefix cache serves the model it was made for; make another PrefixCache for this one")
        if self._layer == 0 or torch.is_grad_enabled():  # what is kept has no graph for a backward pass
            return 0, stream_entering(model, tokens, 0)
        for name, part in self._before:
            if has_forward_hooks(part):
                raise ValueError(
                    f"{name} has a hook, and the prefix cache holds layers before {self._layer} without it; ablate "
                    f"layer {self._layer} and later ones, or run without the cache"
                )
        key = (tuple(tokens.shape), tokens.cpu().numpy().tobytes())
        if key not in self._kept:
            self._kept[key] = stream_entering(model, tokens, self._layer)
        return self._layer, self._kept[key]


def final_residual(
    model: HookedModel, batch: Batch, prefix: PrefixCache | None = None
) -> Float[Tensor, "row target d_model"]:
    """Return the residual stream after the last layer, before the final norm, at the target positions.

    If a user's hook is on what follows, the final norm or the unembedding, all positions are returned, for it to see.

    Args:
        model: used as it is, ablated or not.
        batch: rows of equal length and prompt length.
        prefix: where the layers before the first ablated one are kept.
    """
    if prefix is None:
        layer, entering = 0, stream_entering(model, batch.tokens, 0)
    else:
        layer, entering = prefix.entering(model, batch.tokens)
    return run_layers(model, entering, layer, batch.prompt_len)


@dataclass(frozen=True)
class CleanPass:
    """What a pass leaves behind, with the hooks that were open.

    Args:
        streams: the residual stream that enters each layer, where the one before has left it, and the one that
            leaves the last.
        activations: of each layer's neurons.
    """

    streams: list[Float[Tensor, "row pos d_model"]]
    activations: list[Float[Tensor, "row pos neuron"]]


def clean_pass(model: HookedModel, tokens: Int[Tensor, "row pos"]) -> CleanPass:
    """Run the model up to the final norm, a layer at a time.

    A stream between two layers is what the one has returned: at a hook point it would have passed half of the hooks.
    """
    if is_bridge(model):
        return _clean_pass_of_bridge(model, tokens)
    streams, activations = [stream_entering(model, tokens, 0)], []
    for layer in range(model.cfg.n_layers):
        stream, cache = model.run_with_cache(
            streams[-1], start_at_layer=layer, stop_at_layer=layer + 1, names_filter=post(layer)
        )
        streams.append(stream)
        activations.append(cache[post(layer)])
    return CleanPass(streams, activations)


def _clean_pass_of_bridge(model: HookedModel, tokens: Int[Tensor, "row pos"]) -> CleanPass:
    """Run the model once; what hooks at the hook points of the streams have made of them is what enters the layers."""
    layers = range(model.cfg.n_layers)
    names = [f"blocks.{layer}.hook_in" for layer in layers] + [f"blocks.{model.cfg.n_layers - 1}.hook_out"]
    _, cache = model.run_with_cache(tokens, names_filter=[*names, *map(post, layers)])
    return CleanPass([cache[name] for name in names], [cache[post(layer)] for layer in layers])


def at_targets(
    model: HookedModel, residual: Float[Tensor, "row pos d_model"], batch: Batch
) -> Float[Tensor, "row target d_model"]:
    """Return of the final residual stream at all positions what `final_residual` returns."""
    return residual if hooked(model, *END) else residual[:, batch.targets]


def run_layers(
    model: HookedModel, residual: Float[Tensor, "row pos d_model"], start: int, prompt_len: int
) -> Float[Tensor, "row target d_model"]:
    """Run the layers from `start` on; the last one at the target positions alone.

    Other positions only give keys and values to the last layer. A layer with a user's hook runs at all positions.

    Args:
        model: used as it is, ablated or not.
        residual: the stream that enters layer `start`, at all positions.
        start: from 0 to the number of layers, which runs none.
        prompt_len: of the rows.
    """
    last = model.cfg.n_layers - 1
    targets = slice(prompt_len - 1, -1)
    if start > last or not _can_split_last_layer(model):
        whole = run_between(model, residual, start, last + 1)
        return whole if hooked(model, *END) else whole[:, targets]
    entering = run_between(model, residual, start, last)
    block, past = model.blocks[last], None
    entering = entering.to(device_of(block))
    if prompt_len > 1:
        from transformer_lens.cache.key_value_cache_entry import TransformerLensKeyValueCacheEntry

        normed = block.ln1(entering[:, : prompt_len - 1])
        _, keys, values = block.attn.calculate_qkv_matrices(normed, normed, normed)
        past = TransformerLensKeyValueCacheEntry(keys, values)
    return block(entering[:, targets], past_kv_cache_entry=past)


def _can_split_last_layer(model: HookedModel) -> bool:
    """Tell whether `run_layers` knows all that other positions give to the targets in the last layer."""
    cfg = model.cfg
    return not is_bridge(model) and (
        cfg.positional_embedding_type in ("standard", "rotary")
        and not norm_after_mlp(model)
        and not (cfg.use_attn_in or cfg.use_split_qkv_input or cfg.use_qk_norm or cfg.use_logn_attn)
        and cfg.clip_qkv is None
        and not hooked(model, f"blocks.{cfg.n_layers - 1}", *END)
    )


def neurons_add_up(model: HookedModel, layer: int) -> bool:
    """Tell whether a layer's neurons simply add their rows of `W_out` to the stream that leaves it.

    They do not where a norm follows the MLP (Gemma 2, OLMo 2), or a hook. A bridge does not tell what follows.
    """
    return not (is_bridge(model) or norm_after_mlp(model) or hooked_after_neurons(model, layer))


def norm_after_mlp(model: HookedModel) -> bool:
    """Tell whether a norm follows the MLP."""
    from transformer_lens.components.transformer_block import POST_NORM_ARCHITECTURES

    return model.cfg.use_normalization_before_and_after or model.cfg.original_architecture in POST_NORM_ARCHITECTURES


@contextmanager
def frozen(model: HookedModel) -> Iterator[None]:
    """Set evaluation mode and freeze the parameters; both are restored on leaving.

    Meanwhile other threads wait, and autocast, inference mode and a default device have no effect.

    Raises:
        ValueError: if a hook is on the model itself, it was made in inference mode, or another thread has a context
            of it open.
    """
    with (
        isolated(model),
        gradients_possible(model),
        fast_products(model.cfg.device),
        kept_memory(),
        _as_constant(model),
    ):
        yield


@contextmanager
def _as_constant(model: HookedModel) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    needs = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _ in needs:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in needs:
            parameter.requires_grad_(requires_grad)
