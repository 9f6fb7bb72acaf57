"""The table of model families: how an architecture of transformers becomes a `HookedTransformer`.

A family is a function that translates transformers' configuration into fields of a `HookedTransformerConfig`, and a
function that converts the weights. To add one, write the first function and a line in `FAMILIES`.

A setting that is not translated would make a model that loads silently and computes something else. So the function
translates every setting that matters, or refuses the model with `_require`; `tests/models/test_families.py` compares
every family with transformers and fails at a setting that is neither. Rotary embeddings need no translation:
`rotary.py` takes transformers' own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from memloc_lens.library_types import HookedTransformerConfig
from memloc_lens.models import weights
from memloc_lens.models.weights import by_transformer_lens

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

WITHOUT_LIMIT = 2048
"""The context, in tokens, of a model whose configuration names none: BLOOM was trained on this many."""


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
    weights: Callable[[Any, HookedTransformerConfig], dict[str, Tensor]]


def family_of(config: PreTrainedConfig, architecture: str) -> Family:
    """Return the family of an architecture.

    Args:
        config: of a model in transformers.
        architecture: the name of the model's class.

    Raises:
        ValueError: if the architecture is not in the table, naming those that are.

    Example:
        >>> from memloc_lens.models.families import family_of
        >>> from transformers import LlamaConfig
        >>> family_of(LlamaConfig(), "LlamaForCausalLM").fields(LlamaConfig())["act_fn"]
        'silu'
    """
    if architecture in FAMILIES:
        return FAMILIES[architecture]
    supported = ", ".join(sorted(name.removesuffix("ForCausalLM").removesuffix("LMHeadModel") for name in FAMILIES))
    if any(getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts")):
        raise ValueError(
            f"{architecture} is a mixture of experts, with more than one MLP a layer and so no single row of neurons; "
            f"supported architectures are {supported}"
        )
    raise ValueError(f"{architecture} is not supported; supported architectures are {supported}")


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
    return (_shape(config) | _rotary(config, config.hidden_size // config.num_attention_heads)) | dict(
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
    )
    return _shape(config) | dict(d_mlp=config.ffn_dim, eps=1e-5, act_fn=_activation(config, "activation_function"))


def _bloom(config: PreTrainedConfig) -> Fields:
    _require(config, apply_residual_connection_post_layernorm=False)
    if config.num_attention_heads & (config.num_attention_heads - 1):  # other slopes follow another rule
        raise ValueError(
            _unsupported(config, "num_attention_heads", config.num_attention_heads, "1, 2, 4 or another power of 2")
        )
    return _shape(config) | dict(
        d_mlp=4 * config.hidden_size,
        eps=config.layer_norm_epsilon,
        act_fn="gelu_fast",
        positional_embedding_type="alibi",
        post_embedding_ln=True,
    )


def _llama(config: PreTrainedConfig) -> Fields:
    _require(config, mlp_bias=False)
    return _gated(config)


def _mistral(config: PreTrainedConfig) -> Fields:
    windowed = "full" if config.sliding_window is None else "sliding"
    return _gated(config) | _windows(config, [f"{windowed}_attention"] * config.num_hidden_layers)


def _qwen2(config: PreTrainedConfig) -> Fields:
    return _gated(config) | _windows(config, config.layer_types)


def _qwen3(config: PreTrainedConfig) -> Fields:
    return _gated(config) | _windows(config, config.layer_types) | dict(use_qk_norm=True)


def _gemma(config: PreTrainedConfig) -> Fields:
    _require(config, use_bidirectional_attention=False)
    return _gated(config)


def _gemma2(config: PreTrainedConfig) -> Fields:
    _require(config, use_bidirectional_attention=False)
    return (_gated(config) | _windows(config, config.layer_types)) | dict(
        attn_scale=config.query_pre_attn_scalar**0.5,
        attn_scores_soft_cap=config.attn_logit_softcapping or -1.0,
        output_logits_soft_cap=config.final_logit_softcapping or -1.0,
        use_normalization_before_and_after=True,
    )


def _gemma3(config: PreTrainedConfig) -> Fields:
    return _gemma2(config) | dict(use_qk_norm=True, attn_scores_soft_cap=-1.0)  # transformers reads no cap here


def _gemma3_with_images(config: PreTrainedConfig) -> Fields:
    return _gemma3(config.get_text_config())


def _phi(config: PreTrainedConfig) -> Fields:
    _require(config, qk_layernorm=False, num_key_value_heads=config.num_attention_heads)
    return (_shape(config) | _rotary(config, _head_size(config))) | dict(
        d_head=_head_size(config),
        d_mlp=config.intermediate_size,
        eps=config.layer_norm_eps,
        act_fn=_activation(config, "hidden_act"),
        parallel_attn_mlp=True,
    )


def _olmo(config: PreTrainedConfig) -> Fields:
    return _gated(config, eps=1e-5) | dict(normalization_type="LN", final_rms=False, clip_qkv=config.clip_qkv)


def _olmo2(config: PreTrainedConfig) -> Fields:
    size = config.hidden_size // config.num_attention_heads
    _require(config, head_dim=size)  # its norms of queries are as wide as the model
    return _gated(config) | _windows(config, getattr(config, "layer_types", None) or ())


FAMILIES: dict[str, Family] = {
    "GPT2LMHeadModel": Family(_gpt2, by_transformer_lens("convert_gpt2_weights")),
    "GPTNeoForCausalLM": Family(_gpt_neo, by_transformer_lens("convert_neo_weights")),
    "GPTJForCausalLM": Family(_gptj, by_transformer_lens("convert_gptj_weights")),
    "GPTNeoXForCausalLM": Family(_gpt_neox, weights.with_all_biases(by_transformer_lens("convert_neox_weights"))),
    "OPTForCausalLM": Family(_opt, weights.with_all_biases(by_transformer_lens("convert_opt_weights"))),
    "BloomForCausalLM": Family(_bloom, weights.of_bloom),
    "LlamaForCausalLM": Family(_llama, weights.of_llama),
    "MistralForCausalLM": Family(_mistral, weights.of_llama),
    "Qwen2ForCausalLM": Family(_qwen2, weights.of_llama),
    "Qwen3ForCausalLM": Family(_qwen3, weights.of_llama),
    "GemmaForCausalLM": Family(_gemma, weights.of_gemma),
    "Gemma2ForCausalLM": Family(_gemma2, weights.of_gemma2),
    "Gemma3ForCausalLM": Family(_gemma3, weights.of_gemma2),
    "Gemma3ForConditionalGeneration": Family(_gemma3_with_images, weights.of_gemma2),
    "PhiForCausalLM": Family(_phi, by_transformer_lens("convert_phi_weights")),
    "Phi3ForCausalLM": Family(_mistral, weights.of_phi3),
    "OlmoForCausalLM": Family(_olmo, weights.of_olmo),
    "Olmo2ForCausalLM": Family(_olmo2, weights.of_olmo2),
    "Olmo3ForCausalLM": Family(_olmo2, weights.of_olmo2),
}
"""The families, by the name of transformers' class."""


def _shape(config: PreTrainedConfig) -> Fields:
    """Return the sizes, which transformers calls the same in every family, and layer norms."""
    return dict(
        d_model=config.hidden_size,
        d_head=config.hidden_size // config.num_attention_heads,
        n_heads=config.num_attention_heads,
        n_layers=config.num_hidden_layers,
        n_ctx=_context(config),
        d_vocab=config.vocab_size,
        normalization_type="LN",
    )


def _context(config: PreTrainedConfig) -> int:
    """Return how many tokens the model reads."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # the frequencies of a longer text differ in all its positions
        return rope["original_max_position_embeddings"]
    return getattr(config, "max_position_embeddings", None) or getattr(config, "seq_length", None) or WITHOUT_LIMIT


def _gated(config: PreTrainedConfig, eps: float | None = None) -> Fields:
    """Return the fields of Llama and its successors: RMS norms, rotary positions, a gated MLP."""
    shared = config.num_key_value_heads != config.num_attention_heads
    return (_shape(config) | _rotary(config, _head_size(config))) | dict(
        d_head=_head_size(config),
        n_key_value_heads=config.num_key_value_heads if shared else None,
        d_mlp=config.intermediate_size,
        gated_mlp=True,
        eps=config.rms_norm_eps if eps is None else eps,
        act_fn=_activation(config, "hidden_activation" if hasattr(config, "hidden_activation") else "hidden_act"),
        normalization_type="RMS",
        final_rms=True,
    )


def _rotary(config: PreTrainedConfig, head_size: int) -> Fields:
    """Return the fields of rotary position embeddings, over a fraction of a head."""
    rotated = config.rope_parameters.get("partial_rotary_factor", 1.0)
    return dict(positional_embedding_type="rotary", rotary_dim=int(rotated * head_size))


def _windows(config: PreTrainedConfig, layer_types: Sequence[str]) -> Fields:
    """Return the fields of attention to the last `sliding_window` tokens, in the layers that have it."""
    if "sliding_attention" not in layer_types:
        return {}
    local = ["local" if layer_type == "sliding_attention" else "global" for layer_type in layer_types]
    return dict(use_local_attn=True, window_size=config.sliding_window, attn_types=local)


def _head_size(config: PreTrainedConfig) -> int:
    """Return the size of a head in the families where it need not be a share of the model's."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _activation(config: PreTrainedConfig, setting: str) -> str:
    name = getattr(config, setting)
    if name not in ACTIVATIONS:
        raise ValueError(_unsupported(config, setting, name, " or ".join(map(repr, ACTIVATIONS))))
    return ACTIVATIONS[name]


def _require(config: PreTrainedConfig, **supported: Any) -> None:
    """Raise a `ValueError` at the first setting whose value is not the supported one."""
    for setting, value in supported.items():
        given = getattr(config, setting, value)
        if given != value and not (given is None and value is False):
            raise ValueError(_unsupported(config, setting, given, repr(value)))


def _unsupported(config: PreTrainedConfig, setting: str, value: Any, supported: str) -> str:
    return (
        f"{config.model_type} models with {setting}={value!r} are not supported, because no HookedTransformer computes "
        f"the same; supported is {setting}={supported}"
    )
