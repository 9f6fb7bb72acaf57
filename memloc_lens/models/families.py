"""The table of model families: how an architecture of transformers becomes a `HookedTransformer`.

A family is a function that translates transformers' configuration into fields of a `HookedTransformerConfig`, and
TransformerLens' function that converts the weights. To add one, write the first function and a line in `FAMILIES`.

A setting that is not translated would make a model that loads silently and computes something else. So the function
translates every setting that matters, or refuses the model with `_require`; `tests/models/test_families.py` compares
every family with transformers and fails at a setting that is neither.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformer_lens import HookedTransformerConfig
from transformer_lens.pretrained import weight_conversions
from transformers import PreTrainedConfig, PreTrainedModel

Fields = dict[str, Any]
"""Fields of a `HookedTransformerConfig`."""

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_fast": "gelu_fast",
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
}
"""transformers' names of activation functions, and TransformerLens' names of the same functions."""


@dataclass(frozen=True)
class Family:
    """How one architecture of transformers becomes a `HookedTransformer`.

    Args:
        fields: makes the fields of a `HookedTransformerConfig` from transformers' configuration. It raises a
            `ValueError` that names the setting if a `HookedTransformer` would compute something else.
        weights: makes the state dict of the `HookedTransformer` from transformers' model, without processing.

    Example:
        >>> from memloc_lens.models.families import FAMILIES
        >>> from transformers import LlamaConfig
        >>> fields = FAMILIES["LlamaForCausalLM"].fields(LlamaConfig(intermediate_size=1536))
        >>> fields["d_mlp"], fields["gated_mlp"]
        (1536, True)
    """

    fields: Callable[[PreTrainedConfig], Fields]
    weights: Callable[[PreTrainedModel, HookedTransformerConfig], dict[str, Tensor]]


def _gpt2(config: PreTrainedConfig) -> Fields:
    return _shape(config) | dict(
        d_mlp=config.n_inner or 4 * config.hidden_size,
        eps=config.layer_norm_epsilon,
        act_fn=_activation(config, "activation_function"),
        use_attn_scale=config.scale_attn_weights,
        scale_attn_by_inverse_layer_idx=config.scale_attn_by_inverse_layer_idx,
    )


def _gpt_neo(config: PreTrainedConfig) -> Fields:
    return _shape(config) | dict(
        d_mlp=config.intermediate_size or 4 * config.hidden_size,
        eps=config.layer_norm_epsilon,
        act_fn=_activation(config, "activation_function"),
        use_attn_scale=False,
        use_local_attn=True,
        window_size=config.window_size,
        attn_types=config.attention_layers,
    )


def _gptj(config: PreTrainedConfig) -> Fields:
    return _shape(config) | dict(
        d_mlp=config.n_inner or 4 * config.hidden_size,
        eps=config.layer_norm_epsilon,
        act_fn=_activation(config, "activation_function"),
        parallel_attn_mlp=True,
        positional_embedding_type="rotary",
        rotary_dim=config.rotary_dim,
        rotary_adjacent_pairs=True,
    )


def _gpt_neox(config: PreTrainedConfig) -> Fields:
    _require(config, attention_bias=True)
    rotated = config.rope_parameters["partial_rotary_factor"]
    return (_shape(config) | _rotary(config, rotated)) | dict(
        d_mlp=config.intermediate_size,
        eps=config.layer_norm_eps,
        act_fn=_activation(config, "hidden_act"),
        parallel_attn_mlp=config.use_parallel_residual,
    )


def _opt(config: PreTrainedConfig) -> Fields:
    _require(
        config,
        do_layer_norm_before=True,
        _remove_final_layer_norm=False,
        word_embed_proj_dim=config.hidden_size,
        enable_bias=True,
        layer_norm_elementwise_affine=True,
    )
    return _shape(config) | dict(d_mlp=config.ffn_dim, eps=1e-5, act_fn=_activation(config, "activation_function"))


def _llama(config: PreTrainedConfig) -> Fields:
    _require(config, attention_bias=False, mlp_bias=False)
    return _gated(config) | dict(n_key_value_heads=_shared_heads(config))


def _mistral(config: PreTrainedConfig) -> Fields:
    windowed = "full" if config.sliding_window is None else "sliding"
    return _gated(config) | _windows(config, [f"{windowed}_attention"] * config.num_hidden_layers)


def _qwen2(config: PreTrainedConfig) -> Fields:
    return _gated(config) | _windows(config, config.layer_types)


def _qwen3(config: PreTrainedConfig) -> Fields:
    _require(config, attention_bias=False)
    windows = _windows(config, config.layer_types)
    return (_gated(config) | windows) | dict(use_qk_norm=True, n_key_value_heads=_shared_heads(config))


def _phi(config: PreTrainedConfig) -> Fields:
    _require(config, qk_layernorm=False, num_key_value_heads=config.num_attention_heads)
    rotated = config.rope_parameters["partial_rotary_factor"]
    return (_shape(config) | _rotary(config, rotated)) | dict(
        d_mlp=config.intermediate_size,
        eps=config.layer_norm_eps,
        act_fn=_activation(config, "hidden_act"),
        parallel_attn_mlp=True,
    )


def _olmo(config: PreTrainedConfig) -> Fields:
    _require(config, attention_bias=False, num_key_value_heads=config.num_attention_heads)
    return (_shape(config) | _rotary(config)) | dict(
        d_mlp=config.intermediate_size,
        gated_mlp=True,
        eps=1e-5,
        act_fn=_activation(config, "hidden_act"),
        clip_qkv=config.clip_qkv,
    )


FAMILIES: dict[str, Family] = {
    "GPT2LMHeadModel": Family(_gpt2, weight_conversions.convert_gpt2_weights),
    "GPTNeoForCausalLM": Family(_gpt_neo, weight_conversions.convert_neo_weights),
    "GPTJForCausalLM": Family(_gptj, weight_conversions.convert_gptj_weights),
    "GPTNeoXForCausalLM": Family(_gpt_neox, weight_conversions.convert_neox_weights),
    "OPTForCausalLM": Family(_opt, weight_conversions.convert_opt_weights),
    "LlamaForCausalLM": Family(_llama, weight_conversions.convert_llama_weights),
    "MistralForCausalLM": Family(_mistral, weight_conversions.convert_mistral_weights),
    "Qwen2ForCausalLM": Family(_qwen2, weight_conversions.convert_qwen2_weights),
    "Qwen3ForCausalLM": Family(_qwen3, weight_conversions.convert_qwen3_weights),
    "PhiForCausalLM": Family(_phi, weight_conversions.convert_phi_weights),
    "OlmoForCausalLM": Family(_olmo, weight_conversions.convert_olmo_weights),
}
"""The families, by the name of transformers' class."""


def _shape(config: PreTrainedConfig) -> Fields:
    """Return the sizes, which transformers calls the same in every family, and layer norms."""
    return dict(
        d_model=config.hidden_size,
        d_head=_head_size(config),
        n_heads=config.num_attention_heads,
        n_layers=config.num_hidden_layers,
        n_ctx=config.max_position_embeddings,
        d_vocab=config.vocab_size,
        normalization_type="LN",
    )


def _gated(config: PreTrainedConfig) -> Fields:
    """Return the fields of Llama and its successors: RMS norms, rotary positions, a gated MLP."""
    return (_shape(config) | _rotary(config)) | dict(
        n_key_value_heads=config.num_key_value_heads,
        d_mlp=config.intermediate_size,
        gated_mlp=True,
        eps=config.rms_norm_eps,
        act_fn=_activation(config, "hidden_act"),
        normalization_type="RMS",
        final_rms=True,
    )


def _rotary(config: PreTrainedConfig, rotated: float = 1.0) -> Fields:
    """Return the fields of rotary position embeddings over the fraction `rotated` of a head."""
    return _rope_scaling(config) | dict(
        positional_embedding_type="rotary",
        rotary_dim=int(rotated * _head_size(config)),
        rotary_base=config.rope_parameters["rope_theta"],
    )


def _rope_scaling(config: PreTrainedConfig) -> Fields:
    rope = config.rope_parameters
    match rope["rope_type"]:
        case "default" | "dynamic":  # dynamic scaling starts after `n_ctx` tokens, where a HookedTransformer ends
            return {}
        case "linear" if not getattr(config, "sliding_window", None):  # TransformerLens does not scale in windows
            return dict(rotary_scaling_factor=rope["factor"])
        case "llama3":
            return dict(
                use_NTK_by_parts_rope=True,
                NTK_by_parts_factor=rope["factor"],
                NTK_by_parts_low_freq_factor=rope["low_freq_factor"],
                NTK_by_parts_high_freq_factor=rope["high_freq_factor"],
                NTK_original_ctx_len=rope["original_max_position_embeddings"],
            )
    supported = "'default', 'dynamic', 'llama3', or 'linear' without sliding_window"
    raise ValueError(_unsupported(config, "rope_type", rope["rope_type"], supported))


def _windows(config: PreTrainedConfig, layer_types: list[str]) -> Fields:
    """Return the fields of attention to the last `sliding_window` tokens, in the layers that have it."""
    if "sliding_attention" not in layer_types:
        return {}
    local = ["local" if layer_type == "sliding_attention" else "global" for layer_type in layer_types]
    return dict(use_local_attn=True, window_size=config.sliding_window, attn_types=local)


def _head_size(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _shared_heads(config: PreTrainedConfig) -> int | None:
    """Return the number of heads of keys and values, or None if no two heads share them."""
    return None if config.num_key_value_heads == config.num_attention_heads else config.num_key_value_heads


def _activation(config: PreTrainedConfig, setting: str) -> str:
    name = getattr(config, setting)
    if name not in ACTIVATIONS:
        raise ValueError(_unsupported(config, setting, name, " or ".join(map(repr, ACTIVATIONS))))
    return ACTIVATIONS[name]


def _require(config: PreTrainedConfig, **supported: Any) -> None:
    """Raise a `ValueError` at the first setting whose value is not the supported one."""
    for setting, value in supported.items():
        if getattr(config, setting, value) != value:
            raise ValueError(_unsupported(config, setting, getattr(config, setting), repr(value)))


def _unsupported(config: PreTrainedConfig, setting: str, value: Any, supported: str) -> str:
    return (
        f"{config.model_type} models with {setting}={value!r} are not supported, because no HookedTransformer computes "
        f"the same; supported is {setting}={supported}"
    )
