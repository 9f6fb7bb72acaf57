"""A faster forward pass of a `HookedTransformer`: the same weights, the same hook points, the same results."""

import functools
from collections.abc import Callable

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

from memloc_lens.bridge import is_bridge
from memloc_lens.checks import check_model
from memloc_lens.hooks import has_hooks, own
from memloc_lens.library_types import HookedModel, LayerNorm


def prepare(model: HookedModel) -> None:
    """Speed up the forward pass of a model without changing its weights or its results.

    `load_model` does this to every model; a second time changes nothing.

    Args:
        model: any `HookedTransformer` that `check_model` lets pass, changed in place; a bridge stays as it is.

    Raises:
        ValueError: if it is another model.

    Example:
        >>> from memloc_lens.models import prepare
        >>> tokens = model.to_tokens("Return the number")
        >>> logits = model(tokens)
        >>> prepare(model)
        >>> bool((model(tokens) == logits).all())
        True
    """
    model = check_model(model)
    if is_bridge(model):
        return
    _fuse_gelu(model)
    _fuse_norms(model)
    _store_as_multiplied(model)


def _fuse_gelu(model: HookedModel) -> None:
    """Replace TransformerLens' GELU, eight elementwise operations, by torch's single one, the same function."""
    if model.cfg.act_fn == "gelu_new":
        for block in model.blocks:
            block.mlp.act_fn = functools.partial(gelu, approximate="tanh")


def _fuse_norms(model: HookedModel) -> None:
    """Replace TransformerLens' layer norm, nine operations, by torch's single one while no hook reads between them."""
    if model.cfg.dtype in (torch.float32, torch.float64):
        for module in model.modules():
            if isinstance(module, LayerNorm) and "forward" not in vars(module):
                vars(module)["forward"] = own(functools.partial(_fused_norm, module, module.forward))


def _fused_norm(
    norm: LayerNorm, in_steps: Callable[[Tensor], Tensor], stream: Float[Tensor, "*batch d_model"]
) -> Float[Tensor, "*batch d_model"]:
    if any(point._forward_hooks or has_hooks(point) for point in (norm.hook_scale, norm.hook_normalized)):
        return in_steps(stream)
    return layer_norm(stream, (norm.length,), norm.w, norm.b, norm.eps)


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
