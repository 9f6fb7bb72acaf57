"""State dicts of `HookedTransformer`s made from transformers' modules, without folding, centring or scaling.

TransformerLens converts the older families, whose modules have names of their own. Llama and its successors share the
names, and one function reads them all, with every bias and norm that a model has.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from memloc_lens.library_types import HookedTransformerConfig

State = dict[str, Tensor]
Convert = Callable[[Any, HookedTransformerConfig], State]


def by_transformer_lens(name: str) -> Convert:
    """Return a function of TransformerLens by its name; TransformerLens 4, which makes bridges alone, has none."""

    def convert(original: Any, cfg: HookedTransformerConfig) -> State:
        from transformer_lens.pretrained import weight_conversions

        return getattr(weight_conversions, name)(original, cfg)

    return convert


def of_llama(original: Any, cfg: HookedTransformerConfig) -> State:
    """Return the state of Llama, and of models with modules of the same names."""
    return _state(original, cfg, {"ln1": "input_layernorm", "ln2": "post_attention_layernorm"})


def of_phi3(original: Any, cfg: HookedTransformerConfig) -> State:
    """Return the state of Phi-3, in which one matrix makes queries, keys and values, and one makes gate and input."""
    # the parts are views beside the whole, which the original goes on to use
    for layer in original.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        keys = attention.config.num_key_value_heads * attention.head_dim
        queries = attention.config.num_attention_heads * attention.head_dim
        parts = attention.qkv_proj.weight.split([queries, keys, keys])
        attention.q_proj, attention.k_proj, attention.v_proj = map(_linear, parts)
        mlp.gate_proj, mlp.up_proj = map(_linear, mlp.gate_up_proj.weight.chunk(2))
    return of_llama(original, cfg)


def of_gemma(original: Any, cfg: HookedTransformerConfig) -> State:
    """Return the state of Gemma, which scales embeddings, and adds 1 to the weights of its norms."""
    return _of_gemma(original, cfg, {"ln1": "input_layernorm", "ln2": "post_attention_layernorm"})


def of_gemma2(original: Any, cfg: HookedTransformerConfig) -> State:
    """Return the state of Gemma 2 and 3, with norms before and after attention and MLP."""
    norms = {
        "ln1": "input_layernorm",
        "ln1_post": "post_attention_layernorm",
        "ln2": "pre_feedforward_layernorm",
        "ln2_post": "post_feedforward_layernorm",
    }
    return _of_gemma(original, cfg, norms)


def of_olmo(original: Any, cfg: HookedTransformerConfig) -> State:
    """Return the state of OLMo, whose norms have no weights."""
    norms = ["ln_final", *(f"blocks.{layer}.{name}" for layer in range(cfg.n_layers) for name in ("ln1", "ln2"))]
    ones, zeros = torch.ones(cfg.d_model, dtype=cfg.dtype), torch.zeros(cfg.d_model, dtype=cfg.dtype)
    return of_llama(original, cfg) | {
        f"{norm}.{name}": value for norm in norms for name, value in (("w", ones), ("b", zeros))
    }


def of_olmo2(original: Any, cfg: HookedTransformerConfig) -> State:
    """Return the state of OLMo 2 and 3, with norms after attention and MLP."""
    return _state(original, cfg, {"ln1": "post_attention_layernorm", "ln2": "post_feedforward_layernorm"})


def of_bloom(original: Any, cfg: HookedTransformerConfig) -> State:
    """Return the state of BLOOM; a `HookedTransformer` has position embeddings that it does not use."""
    return by_transformer_lens("convert_bloom_weights")(original, cfg) | {
        "pos_embed.W_pos": torch.zeros(cfg.n_ctx, cfg.d_model, dtype=cfg.dtype)
    }


def with_all_biases(convert: Convert) -> Convert:
    """Give a model that has none the biases of zero, and the norms of one, that TransformerLens' function reads."""

    def converted(original: Any, cfg: HookedTransformerConfig) -> State:
        for name, module in original.named_modules():
            if isinstance(module, nn.Linear | nn.LayerNorm) and module.bias is None and ".layers." in name:
                size = module.out_features if isinstance(module, nn.Linear) else module.normalized_shape[0]
                module.bias = nn.Parameter(torch.zeros(size, dtype=original.dtype))
            if isinstance(module, nn.LayerNorm) and module.weight is None:
                module.weight = nn.Parameter(torch.ones(module.normalized_shape, dtype=original.dtype))
                module.bias = nn.Parameter(torch.zeros(module.normalized_shape, dtype=original.dtype))
        return convert(original, cfg)

    return converted


def _of_gemma(original: Any, cfg: HookedTransformerConfig, norms: Mapping[str, str]) -> State:
    state = _state(original, cfg, norms)
    scale = torch.tensor(cfg.d_model**0.5, dtype=original.dtype)
    added = {name: weight + 1 for name, weight in state.items() if "ln" in name or "_norm" in name}
    return state | added | {"embed.W_E": state["embed.W_E"] * scale}


def _state(original: Any, cfg: HookedTransformerConfig, norms: Mapping[str, str]) -> State:
    """Return the state, given which norm of transformers is which of the `HookedTransformer`."""
    model = original.get_decoder()
    state = {"embed.W_E": model.embed_tokens.weight, "unembed.W_U": original.lm_head.weight.T}
    state |= _norm("ln_final", model.norm)
    for index, layer in enumerate(model.layers):
        parts = _attention(layer.self_attn, cfg) | _gated_mlp(layer.mlp)
        for ours, theirs in norms.items():
            parts |= _norm(ours, getattr(layer, theirs))
        state |= {f"blocks.{index}.{name}": weight for name, weight in parts.items()}
    return state


def _attention(attention: Any, cfg: HookedTransformerConfig) -> State:
    shared = "_" if cfg.n_key_value_heads else ""  # the prefix of keys and values that several heads share
    state: State = {}
    for name, projection in (
        ("{}_Q", attention.q_proj),
        (shared + "{}_K", attention.k_proj),
        (shared + "{}_V", attention.v_proj),
    ):
        state["attn." + name.format("W")] = rearrange(
            projection.weight, "(head d_head) d_model -> head d_model d_head", d_head=cfg.d_head
        )
        if projection.bias is not None:
            state["attn." + name.format("b")] = rearrange(
                projection.bias, "(head d_head) -> head d_head", d_head=cfg.d_head
            )
    state["attn.W_O"] = rearrange(
        attention.o_proj.weight, "d_model (head d_head) -> head d_head d_model", d_head=cfg.d_head
    )
    if attention.o_proj.bias is not None:
        state["attn.b_O"] = attention.o_proj.bias
    for name in ("q_norm", "k_norm"):
        if hasattr(attention, name):
            state[f"attn.{name}.w"] = getattr(attention, name).weight
    return state


def _gated_mlp(mlp: Any) -> State:
    return {
        "mlp.W_gate": mlp.gate_proj.weight.T,
        "mlp.W_in": mlp.up_proj.weight.T,
        "mlp.W_out": mlp.down_proj.weight.T,
    }


def _norm(name: str, norm: Any) -> State:
    """Return the weight and the bias of a norm, if it has them."""
    found = {f"{name}.w": getattr(norm, "weight", None), f"{name}.b": getattr(norm, "bias", None)}
    return {key: weight for key, weight in found.items() if weight is not None}


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear
