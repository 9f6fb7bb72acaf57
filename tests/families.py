"""Every family of models with every setting that can matter, as tiny random models in folders of transformers.

    python tests/families.py

prints the table family x setting x check. A check compares with transformers or with a naive form:

- logits: log-probabilities on all positions, at most 1e-4 nats from transformers' own
- greedy: the same most probable tokens
- ablate: generation with the cache under an ablation writes what transformers writes whose weights are zeroed
- inject: an injection that is closed leaves every weight as it was
- ZeroOut, IG: the scores of the naive form, in float64
"""

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import naive
import torch
import transformers
from transformer_lens import HookedTransformer

from memloc_lens import IntegratedGradients, MemorizedSequence, ZeroOut, ablate, inject, load_model
from memloc_lens.components import Neurons
from memloc_lens.models.families import FAMILIES

VOCAB, CONTEXT = 97, 40

SMALL = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=8,
    max_position_embeddings=CONTEXT,
    seq_length=CONTEXT,
    intermediate_size=48,
    n_inner=48,
    ffn_dim=48,
    rotary_dim=4,
    word_embed_proj_dim=32,
    pad_token_id=0,
    attention_types=[[["global", "local", "global"], 1]],
)
"""Sizes under the names of every family; a configuration ignores those it does not know."""

IMAGES = dict(
    vision_config=dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    ),
    mm_tokens_per_image=4,
    **dict(zip(("image_token_index", "boi_token_index", "eoi_token_index"), (96, 95, 94), strict=True)),
)
"""A small part for images, of a model that has one."""

ROPE_THETA = dict(rope_type="default", rope_theta=300.0)
LINEAR = dict(rope_type="linear", rope_theta=10000.0, factor=4.0)
DYNAMIC = LINEAR | dict(rope_type="dynamic")
YARN = LINEAR | dict(rope_type="yarn", original_max_position_embeddings=16)
LLAMA3 = YARN | dict(rope_type="llama3", rope_theta=50.0, low_freq_factor=1.0, high_freq_factor=4.0)
FACTORS = dict(short_factor=[1.0, 1.1, 1.3, 1.5], long_factor=[2.0, 3.0, 4.0, 5.0])
LONGROPE = FACTORS | dict(rope_type="longrope", rope_theta=10000.0, original_max_position_embeddings=20, factor=2.0)
EACH_LAYER = dict(sliding_window=5, rope_parameters=dict(full_attention=YARN, sliding_attention=ROPE_THETA))
BIASED = dict(attention_bias=True, num_key_value_heads=2)

SAME: list[tuple[str, dict[str, Any]]] = [
    ("GPT2LMHeadModel", dict(n_inner=None)),
    ("GPT2LMHeadModel", dict(activation_function="relu", layer_norm_epsilon=0.01)),
    ("GPT2LMHeadModel", dict(scale_attn_weights=False, scale_attn_by_inverse_layer_idx=True)),
    ("GPT2LMHeadModel", dict(reorder_and_upcast_attn=True, tie_word_embeddings=False)),
    ("GPT2LMHeadModel", dict(add_cross_attention=True)),
    ("GPTNeoForCausalLM", dict(window_size=5)),
    ("GPTNeoForCausalLM", dict(intermediate_size=None, activation_function="gelu")),
    ("GPTJForCausalLM", dict(rotary_dim=8, n_inner=None, layer_norm_epsilon=0.01)),
    ("GPTJForCausalLM", dict(tie_word_embeddings=True)),
    ("GPTNeoXForCausalLM", dict(intermediate_size=64, hidden_act="gelu_new", layer_norm_eps=0.01)),
    ("GPTNeoXForCausalLM", dict(use_parallel_residual=False, tie_word_embeddings=True)),
    ("GPTNeoXForCausalLM", dict(rotary_pct=1.0, rotary_emb_base=300)),
    ("GPTNeoXForCausalLM", dict(rope_parameters=ROPE_THETA | dict(partial_rotary_factor=0.5))),
    ("GPTNeoXForCausalLM", dict(rope_parameters=LINEAR)),
    ("GPTNeoXForCausalLM", dict(rope_parameters=YARN, attention_bias=False)),
    ("OPTForCausalLM", dict(activation_function="gelu", tie_word_embeddings=False)),
    ("OPTForCausalLM", dict(enable_bias=False)),
    ("OPTForCausalLM", dict(layer_norm_elementwise_affine=False)),
    ("BloomForCausalLM", dict(layer_norm_epsilon=0.01, num_attention_heads=2, tie_word_embeddings=False)),
    ("LlamaForCausalLM", dict(num_key_value_heads=2, tie_word_embeddings=True)),
    ("LlamaForCausalLM", dict(head_dim=16, intermediate_size=64)),
    ("LlamaForCausalLM", dict(hidden_act="gelu_pytorch_tanh", rms_norm_eps=0.01)),
    ("LlamaForCausalLM", BIASED),
    ("LlamaForCausalLM", dict(rope_parameters=ROPE_THETA)),
    ("LlamaForCausalLM", dict(rope_parameters=None, rope_theta=300.0, rope_scaling=dict(type="linear", factor=4.0))),
    ("LlamaForCausalLM", dict(rope_parameters=LLAMA3)),
    ("LlamaForCausalLM", dict(rope_parameters=DYNAMIC)),
    ("LlamaForCausalLM", dict(rope_parameters=YARN | dict(attention_factor=1.3, beta_fast=16, beta_slow=2))),
    ("MistralForCausalLM", dict(num_key_value_heads=2, sliding_window=None, rope_parameters=LINEAR)),
    ("MistralForCausalLM", dict(num_key_value_heads=2, sliding_window=5, head_dim=16, rope_parameters=YARN)),
    ("Qwen2ForCausalLM", dict(num_key_value_heads=2, rope_parameters=YARN)),
    ("Qwen2ForCausalLM", dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)),
    ("Qwen3ForCausalLM", dict(head_dim=16, rope_parameters=ROPE_THETA, **BIASED)),
    ("Qwen3ForCausalLM", dict(use_sliding_window=True, sliding_window=5, max_window_layers=1, rope_parameters=LINEAR)),
    ("GemmaForCausalLM", dict(head_dim=16, num_key_value_heads=1)),
    ("GemmaForCausalLM", dict(hidden_act="gelu", tie_word_embeddings=False, attention_bias=True)),
    ("Gemma2ForCausalLM", dict(sliding_window=5, query_pre_attn_scalar=20, num_key_value_heads=2)),
    ("Gemma2ForCausalLM", dict(sliding_window=5, attn_logit_softcapping=2.0, final_logit_softcapping=3.0)),
    ("Gemma2ForCausalLM", dict(attn_logit_softcapping=None, final_logit_softcapping=None, query_pre_attn_scalar=8)),
    ("Gemma3ForCausalLM", dict(query_pre_attn_scalar=20, num_key_value_heads=2, **EACH_LAYER)),
    ("Gemma3ForCausalLM", dict(final_logit_softcapping=3.0, attn_logit_softcapping=2.0, sliding_window=4)),
    ("Gemma3ForConditionalGeneration", dict(num_key_value_heads=2, **EACH_LAYER)),
    ("PhiForCausalLM", dict(partial_rotary_factor=0.25, layer_norm_eps=0.01)),
    ("PhiForCausalLM", dict(rope_parameters=LINEAR, hidden_act="gelu")),
    ("Phi3ForCausalLM", dict(num_key_value_heads=2, sliding_window=5, partial_rotary_factor=0.5)),
    ("OlmoForCausalLM", dict(clip_qkv=0.3, tie_word_embeddings=True)),
    ("OlmoForCausalLM", dict(rope_parameters=ROPE_THETA, **BIASED)),
    ("Olmo2ForCausalLM", dict(rope_parameters=LINEAR, **BIASED)),
    ("Olmo3ForCausalLM", dict(num_key_value_heads=2, **EACH_LAYER)),
]
"""Settings with which a family computes what transformers does."""

SHORTER = [
    ("LlamaForCausalLM", dict(rope_parameters=LONGROPE)),
    ("Phi3ForCausalLM", dict(rope_parameters=LONGROPE, original_max_position_embeddings=20)),
]
"""Settings with which a family computes the same for texts of up to 20 tokens, which is its context then."""

REFUSED = [
    ("GPT2LMHeadModel", dict(activation_function="quick_gelu"), "activation_function='quick_gelu'"),
    ("OPTForCausalLM", dict(do_layer_norm_before=False), "do_layer_norm_before=False"),
    ("OPTForCausalLM", dict(_remove_final_layer_norm=True), "_remove_final_layer_norm=True"),
    ("OPTForCausalLM", dict(word_embed_proj_dim=16), "word_embed_proj_dim=16"),
    ("BloomForCausalLM", dict(apply_residual_connection_post_layernorm=True), "post_layernorm=True"),
    ("BloomForCausalLM", dict(hidden_size=36, num_attention_heads=6), "num_attention_heads=6"),
    ("LlamaForCausalLM", dict(mlp_bias=True), "mlp_bias=True"),
    ("GemmaForCausalLM", dict(use_bidirectional_attention=True), "use_bidirectional_attention=True"),
    ("Gemma2ForCausalLM", dict(use_bidirectional_attention=True), "use_bidirectional_attention=True"),
    ("Gemma3ForCausalLM", dict(use_bidirectional_attention=True), "use_bidirectional_attention=True"),
    ("PhiForCausalLM", dict(qk_layernorm=True), "qk_layernorm=True"),
    ("PhiForCausalLM", dict(num_key_value_heads=2), "num_key_value_heads=2"),
    ("Olmo2ForCausalLM", dict(head_dim=16), "head_dim=16"),
]
"""Settings that no `HookedTransformer` has, and the words that the error must contain."""


def config_of(architecture: str, **settings: Any) -> Any:
    config_class = getattr(transformers, architecture).config_class
    if "text_config" in config_class.sub_configs:  # a model that reads images too
        text_class = config_class.sub_configs["text_config"]
        return config_class(text_config=text_class(**copy.deepcopy(SMALL | settings)), **copy.deepcopy(IMAGES))
    return config_class(**copy.deepcopy(SMALL | settings))  # transformers writes into the dictionaries


def save_original(architecture: str, folder: Path | str, **settings: Any) -> Any:
    """A random model whose every weight matters: large matrices, norms away from 1, biases away from 0."""
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(config_of(architecture, **settings))
    from_zero = architecture.startswith("Gemma")  # its norms add 1 to their weights
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.2)
            else:
                weight.normal_(mean=float(name.endswith("weight") and not from_zero), std=0.1)
    model.eval().save_pretrained(folder)
    return model


def original_of(architecture: str, folder: Path | str, dtype: torch.dtype = torch.float32) -> Any:
    return getattr(transformers, architecture).from_pretrained(folder, dtype=dtype)


def some_tokens(length: int = CONTEXT, rows: int = 3) -> torch.Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


def logits(model: HookedTransformer, original: Any) -> float:
    """The largest difference of log-probabilities, in nats."""
    tokens = some_tokens(model.cfg.n_ctx)
    ours, theirs = model(tokens, return_type="logits"), original(tokens).logits
    return (ours.log_softmax(-1) - theirs.log_softmax(-1)).abs().max().item()


def greedy(model: HookedTransformer, original: Any) -> float:
    """The share of positions at which the most probable tokens differ."""
    tokens = some_tokens(model.cfg.n_ctx)
    ours, theirs = model(tokens, return_type="logits"), original(tokens).logits
    return (ours.argmax(-1) != theirs.argmax(-1)).float().mean().item()


def ablated(model: HookedTransformer, original: Any) -> float:
    """The number of tokens that differ, written under an ablation and by a copy with rows of the weights at zero."""
    members = torch.rand(model.cfg.n_layers, model.cfg.d_mlp, generator=torch.Generator().manual_seed(2)) < 0.3
    zeroed, tokens = copy.deepcopy(original), some_tokens(6, rows=1)
    outputs = [module for name, module in zeroed.get_decoder().named_modules() if name.endswith(OUTPUTS)]
    for layer, output in enumerate(outputs):
        transposed = isinstance(output, transformers.pytorch_utils.Conv1D)
        (output.weight if transposed else output.weight.T)[members[layer]] = 0
    with ablate(model, Neurons(members)):
        written = model.generate(tokens, max_new_tokens=8, do_sample=False, stop_at_eos=False, verbose=False)
    for _ in range(8):
        tokens = torch.cat([tokens, zeroed(tokens).logits[:, -1:].argmax(-1)], dim=1)
    assert len(outputs) == model.cfg.n_layers
    return float((written != tokens).sum())


OUTPUTS = ("mlp.c_proj", "mlp.fc_out", "mlp.dense_4h_to_h", "mlp.down_proj", "mlp.fc2", "layers.0.fc2", "layers.1.fc2",
           "layers.2.fc2")  # fmt: skip
"""The names of the modules that write what the neurons hold."""


def injected(model: HookedTransformer, original: Any) -> float:
    """The number of weights that an injection has changed, after it has been closed."""
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.enable_grad(), inject(model, _sequence(), max_steps=2):
        assert any(not torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    return float(sum(not torch.equal(before[name], weight) for name, weight in model.state_dict().items()))


def zero_out(model: HookedTransformer, original: Any) -> float:
    """The largest difference from the naive scores, as a share of the largest score."""
    return _apart(ZeroOut()(model, _sequence()), naive.zero_out(model, _sequence(), "neuron"))


def integrated_gradients(model: HookedTransformer, original: Any) -> float:
    """The largest difference from the naive scores, as a share of the largest score."""
    with torch.enable_grad():
        scores = IntegratedGradients(steps=3)(model, _sequence())
        return _apart(scores, naive.integrated_gradients(model, _sequence(), steps=3))


def _sequence() -> MemorizedSequence:
    return MemorizedSequence(some_tokens(9, rows=1)[0], 4, "s")


def _apart(scores: torch.Tensor, expected: torch.Tensor) -> float:
    return ((scores - expected).abs().max() / expected.abs().max()).item()


CHECKS: dict[str, tuple[Callable[[HookedTransformer, Any], float], float]] = {
    "logits": (logits, 1e-4),
    "greedy": (greedy, 0.0),
    "ablate": (ablated, 0.0),
    "inject": (injected, 0.0),
    "ZeroOut": (zero_out, 1e-4),
    "IG": (integrated_gradients, 1e-4),
}
"""By name: the check, and the largest value that passes."""

VARIANTS = [*((family, {}) for family in FAMILIES), *SAME, *SHORTER]


@torch.no_grad()
def check_all(architecture: str, folder: Path | str, names: Iterable[str] = CHECKS) -> dict[str, str]:
    """Return "ok" for each check, or how far it is off; and the sentence of a refusal."""
    try:
        model = load_model(folder, device="cpu", dtype=torch.float64)
    except ValueError as error:
        return dict.fromkeys(names, f"refused: {error}")
    original, found = original_of(architecture, folder, torch.float64), {}
    for name in names:
        work, limit = CHECKS[name]
        try:
            value = work(model, original)
            found[name] = "ok" if value <= limit else f"off by {value:.2g}"
        except ValueError as error:
            found[name] = f"refused: {error}"
    return found


def main() -> None:
    """Print the table."""
    warnings.filterwarnings("ignore")
    transformers.utils.logging.disable_progress_bar()
    print("family".ljust(22), *(name.ljust(8) for name in CHECKS), "settings")
    for architecture, settings, *_ in [*VARIANTS, *REFUSED]:
        with tempfile.TemporaryDirectory() as folder:
            save_original(architecture, folder, **settings)
            found = check_all(architecture, folder)
        notes = {text.split(": ", 2)[-1] for text in found.values() if text.startswith("refused")}
        cells = [text.split(":")[0].ljust(8) for text in found.values()]
        print(architecture.ljust(22), *cells, settings or "plain", *notes, flush=True)


if __name__ == "__main__":
    main()
