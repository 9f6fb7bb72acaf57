"""A faster forward pass of a `HookedTransformer`: the same weights and hook points, the same results to rounding."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from memloc_lens.bridge import is_bridge
from memloc_lens.checks import check_model
from memloc_lens.hooks import has_hooks, own
from memloc_lens.library_types import HookedModel, HookPoint, LayerNorm
from memloc_lens.products import gelu_of_product


def prepare(model: HookedModel) -> None:
    """Speed up the forward pass of a model without changing its weights, or its results beyond rounding.

    `load_model` does this to every model; a second time changes nothing. With frozen weights on a CPU, the attention
    has no second derivative by the activations unless a hook is on its pattern.

    Args:
        model: any `HookedTransformer` that `check_model` lets pass, changed in place; a bridge stays as it is.

    Raises:
        ValueError: if it is another model.

    Example:
        >>> from memloc_lens.models import prepare
        >>> tokens = model.to_tokens("Return the number")
        >>> logits = model(tokens)
        >>> prepare(model)
        >>> torch.allclose(model(tokens), logits, atol=1e-4)
        True
    """
    model = check_model(model)
    if is_bridge(model):
        return
    _fuse_gelu(model)
    _fuse_norms(model)
    _fuse_attention(model)
    _store_as_multiplied(model)


def _fuse_gelu(model: HookedModel) -> None:
    """Replace TransformerLens' GELU, eight elementwise operations, by torch's single one, the same function.

    While no hook reads what it is taken of and there are no gradients, the product before it computes it, too.
    """
    if model.cfg.act_fn == "gelu_new":
        for block in model.blocks:
            block.mlp.act_fn = functools.partial(functional.gelu, approximate="tanh")
            if not model.cfg.gated_mlp and "forward" not in vars(block.mlp):
                vars(block.mlp)["forward"] = own(functools.partial(_fused_mlp, block.mlp, block.mlp.forward))


def _fused_mlp(
    mlp: Any, in_steps: Callable[[Tensor], Tensor], stream: Float[Tensor, "row pos d_model"]
) -> Float[Tensor, "row pos d_model"]:
    if torch.is_grad_enabled() or _any_hooks(mlp.hook_pre):
        return in_steps(stream)
    activations = gelu_of_product(mlp.b_in, stream.flatten(0, 1), mlp.W_in)
    if activations is None:
        return in_steps(stream)
    activations = mlp.hook_post(activations.unflatten(0, stream.shape[:2]))
    return torch.addmm(mlp.b_out, activations.flatten(0, 1), mlp.W_out).view(stream.shape)


def _fuse_norms(model: HookedModel) -> None:
    """Replace TransformerLens' layer norm, nine operations, by torch's single one while no hook reads between them."""
    if model.cfg.dtype in (torch.float32, torch.float64):
        for module in model.modules():
            if isinstance(module, LayerNorm) and "forward" not in vars(module):
                vars(module)["forward"] = own(functools.partial(_fused_norm, module, module.forward))


def _fused_norm(
    norm: LayerNorm, in_steps: Callable[[Tensor], Tensor], stream: Float[Tensor, "*batch d_model"]
) -> Float[Tensor, "*batch d_model"]:
    if _any_hooks(norm.hook_scale, norm.hook_normalized):
        return in_steps(stream)
    return functional.layer_norm(stream, (norm.length,), norm.w, norm.b, norm.eps)


def _any_hooks(*points: HookPoint) -> bool:
    return any(point._forward_hooks or has_hooks(point) for point in points)


def _fuse_attention(model: HookedModel) -> None:
    """Replace TransformerLens' attention, ten operations on scores, by torch's single one while no hook reads them."""
    for block in model.blocks:
        if "forward" not in vars(block.attn):
            vars(block.attn)["forward"] = own(functools.partial(_fused_attention, block.attn, block.attn.forward))


def _fused_attention(
    attention: Any,
    in_steps: Callable[..., Tensor],
    query_input: Float[Tensor, "row pos ... d_model"],
    key_input: Float[Tensor, "row pos ... d_model"],
    value_input: Float[Tensor, "row pos ... d_model"],
    past_kv_cache_entry: Any = None,
    **masks: Any,
) -> Float[Tensor, "row pos d_model"]:
    if not _is_plain(attention, query_input) or any(mask is not None for mask in masks.values()):
        return in_steps(query_input, key_input, value_input, past_kv_cache_entry, **masks)
    query, key, value = attention.calculate_qkv_matrices(query_input, key_input, value_input)
    past = 0
    if past_kv_cache_entry is not None:
        past = past_kv_cache_entry.past_keys.shape[1]
        key, value = past_kv_cache_entry.append(key, value)
    if attention.cfg.positional_embedding_type == "rotary":
        query = attention.hook_rot_q(attention.apply_rotary(query, past))
        key = attention.hook_rot_k(attention.apply_rotary(key, 0))
    seen = attention._make_causal_mask(query.shape[1], key.shape[1], past, query.device)
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    scale = 1 / attention.attn_scale
    read = functional.scaled_dot_product_attention(query, key, value, seen, scale=scale, enable_gqa=True)
    read = attention.hook_z(read.transpose(1, 2))
    weight = rearrange(attention.W_O, "head d_head d_model -> d_model (head d_head)")
    return functional.linear(read.flatten(2), weight, attention.b_O)


def _is_plain(attention: Any, stream: Tensor) -> bool:
    """Tell whether nothing but the causal mask and a softmax is between queries, keys and values and what is read."""
    cfg = attention.cfg
    return (
        stream.device.type == "cpu"
        and stream.dtype in (torch.float32, torch.float64)
        and not (torch.is_grad_enabled() and attention.W_Q.requires_grad)  # torch's has no second derivative
        and not _any_hooks(attention.hook_attn_scores, attention.hook_pattern)
        and cfg.positional_embedding_type in ("standard", "rotary")
        and cfg.original_architecture not in ("OlmoeForCausalLM", "Olmo2ForCausalLM", "Olmo3ForCausalLM")
        and cfg.clip_qkv is None
        and cfg.attn_scores_soft_cap <= 0
        and not (cfg.use_attn_result or cfg.use_logn_attn or cfg.use_attention_sinks)
    )


def _store_as_multiplied(model: HookedModel) -> None:
    """Store weights in the memory order in which TransformerLens multiplies by them; shapes and values stay.

    Its forward pass makes these orders contiguous in every call, which copies a weight that is stored differently.
    """
    grouped = "_" if model.cfg.n_key_value_heads else ""  # the prefix of shared keys' and values' names
    stored = [(model.unembed, "W_U", "d_model d_vocab -> d_vocab d_model")]
    for block in model.blocks:
        for name in ("W_Q", f"{grouped}W_K", f"{grouped}W_V"):
            stored.append((block.attn, name, "head d_model d_head -> head d_head d_model"))
        stored.append((block.attn, "W_O", "head d_head d_model -> d_model head d_head"))
        if model.cfg.gated_mlp:
            stored += [(block.mlp, name, "input output -> output input") for name in ("W_gate", "W_in", "W_out")]
    for module, name, order in stored:
        weight, (shape, storage) = getattr(module, name), order.split(" -> ")
        weight.data = rearrange(rearrange(weight.data, order).contiguous(), f"{storage} -> {shape}")
