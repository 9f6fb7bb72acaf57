"""Rotary position embeddings of a `HookedTransformer`, computed by transformers' own module.

transformers has a dozen ways to scale them, some of them different from layer to layer. TransformerLens knows a few.
"""

import functools
import inspect
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from memloc_lens.library_types import HookedModel


def use_rotary_of(original: Any, model: HookedModel) -> None:
    """Make a model compute its rotary position embeddings as transformers' model does.

    TransformerLens computes as many positions as are read, and more of them when a longer text comes.

    Args:
        original: a model of transformers. If its positions are not rotary, or computed within its attention, nothing
            changes.
        model: of the same shape, changed in place.
    """
    rotary = getattr(original.get_decoder(), "rotary_emb", None)
    if rotary is None:
        return
    by_layer_type = "layer_type" in inspect.signature(inspect.unwrap(rotary.forward)).parameters
    for index, block in enumerate(model.blocks):
        options = {"layer_type": original.config.get_text_config().layer_types[index]} if by_layer_type else {}
        attention = block.attn
        vars(attention)["calculate_sin_cos_rotary"] = functools.partial(_sin_cos, rotary, options)
        attention._extend_rotary_embeddings(len(attention.rotary_sin))


def _sin_cos(
    rotary: Any, options: dict[str, str], rotary_dim: int, n_ctx: int, base: float, dtype: torch.dtype
) -> tuple[Float[Tensor, "pos rotary_dim"], Float[Tensor, "pos rotary_dim"]]:
    """Return what TransformerLens' method of this name does."""
    cos, sin = rotary(torch.empty(0, dtype=dtype, device="cpu"), torch.arange(n_ctx, device="cpu")[None], **options)
    return sin[0], cos[0]
