"""The table of families against transformers: random models with every setting that can matter, loaded and compared."""

import copy
import dataclasses

import pytest
import torch
import transformers
from transformer_lens.utilities.activation_functions import SUPPORTED_ACTIVATIONS
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from memloc_lens import load_model
from memloc_lens.models.families import ACTIVATIONS, FAMILIES

VOCAB, CONTEXT = 97, 40

SMALL = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=CONTEXT,
    ffn_dim=48,
    rotary_dim=4,
    word_embed_proj_dim=32,
    attention_types=[[["global", "local", "global"], 1]],
)
"""Sizes under the names of every family; a configuration ignores those it does not know."""

ROPE_THETA = dict(rope_type="default", rope_theta=300.0)
LINEAR = dict(rope_type="linear", rope_theta=10000.0, factor=4.0)
DYNAMIC = LINEAR | dict(rope_type="dynamic")
YARN = LINEAR | dict(rope_type="yarn", original_max_position_embeddings=16)
LLAMA3 = LINEAR | dict(
    rope_type="llama3",
    rope_theta=50.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)

SAME = [
    ("GPT2LMHeadModel", dict(n_inner=48)),
    ("GPT2LMHeadModel", dict(activation_function="relu", layer_norm_epsilon=0.01)),
    ("GPT2LMHeadModel", dict(scale_attn_weights=False, scale_attn_by_inverse_layer_idx=True)),
    ("GPT2LMHeadModel", dict(reorder_and_upcast_attn=True, tie_word_embeddings=False)),
    ("GPT2LMHeadModel", dict(add_cross_attention=True)),
    ("GPTNeoForCausalLM", dict(window_size=5)),
    ("GPTNeoForCausalLM", dict(intermediate_size=48, activation_function="gelu")),
    ("GPTJForCausalLM", dict(rotary_dim=8, n_inner=48, layer_norm_epsilon=0.01)),
    ("GPTJForCausalLM", dict(tie_word_embeddings=True)),
    ("GPTNeoXForCausalLM", dict(intermediate_size=48, hidden_act="gelu_new", layer_norm_eps=0.01)),
    ("GPTNeoXForCausalLM", dict(use_parallel_residual=False, tie_word_embeddings=True)),
    ("GPTNeoXForCausalLM", dict(rotary_pct=1.0, rotary_emb_base=300)),
    ("GPTNeoXForCausalLM", dict(rope_parameters=ROPE_THETA | dict(partial_rotary_factor=0.5))),
    ("GPTNeoXForCausalLM", dict(rope_parameters=LINEAR)),
    ("OPTForCausalLM", dict(activation_function="gelu", tie_word_embeddings=False)),
    ("LlamaForCausalLM", dict(num_key_value_heads=2, tie_word_embeddings=True)),
    ("LlamaForCausalLM", dict(head_dim=16, intermediate_size=48)),
    ("LlamaForCausalLM", dict(hidden_act="gelu_pytorch_tanh", rms_norm_eps=0.01)),
    ("LlamaForCausalLM", dict(rope_parameters=ROPE_THETA)),
    ("LlamaForCausalLM", dict(rope_parameters=None, rope_theta=300.0, rope_scaling=dict(type="linear", factor=4.0))),
    ("LlamaForCausalLM", dict(rope_parameters=LLAMA3)),
    ("LlamaForCausalLM", dict(rope_parameters=DYNAMIC)),
    ("MistralForCausalLM", dict(num_key_value_heads=2, sliding_window=None, rope_parameters=LINEAR)),
    ("MistralForCausalLM", dict(num_key_value_heads=2, sliding_window=5, head_dim=16)),
    ("Qwen2ForCausalLM", dict(num_key_value_heads=2, rope_parameters=ROPE_THETA)),
    ("Qwen2ForCausalLM", dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)),
    ("Qwen3ForCausalLM", dict(num_key_value_heads=2, head_dim=16, rope_parameters=ROPE_THETA)),
    ("Qwen3ForCausalLM", dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)),
    ("PhiForCausalLM", dict(partial_rotary_factor=0.25, layer_norm_eps=0.01)),
    ("PhiForCausalLM", dict(rope_parameters=LINEAR, hidden_act="gelu")),
    ("OlmoForCausalLM", dict(clip_qkv=0.3, tie_word_embeddings=True)),
    ("OlmoForCausalLM", dict(rope_parameters=ROPE_THETA)),
]
"""Settings with which a family computes what transformers does."""

REFUSED = [
    ("GPT2LMHeadModel", dict(activation_function="quick_gelu"), "activation_function='quick_gelu'"),
    ("GPTNeoXForCausalLM", dict(attention_bias=False), "attention_bias=False"),
    ("GPTNeoXForCausalLM", dict(rope_parameters=YARN), "rope_type='yarn'"),
    ("OPTForCausalLM", dict(do_layer_norm_before=False), "do_layer_norm_before=False"),
    ("OPTForCausalLM", dict(_remove_final_layer_norm=True), "_remove_final_layer_norm=True"),
    ("OPTForCausalLM", dict(word_embed_proj_dim=16), "word_embed_proj_dim=16"),
    ("OPTForCausalLM", dict(enable_bias=False), "enable_bias=False"),
    ("OPTForCausalLM", dict(layer_norm_elementwise_affine=False), "layer_norm_elementwise_affine=False"),
    ("LlamaForCausalLM", dict(attention_bias=True), "attention_bias=True"),
    ("LlamaForCausalLM", dict(mlp_bias=True), "mlp_bias=True"),
    ("LlamaForCausalLM", dict(rope_parameters=YARN), "rope_type='yarn'"),
    ("MistralForCausalLM", dict(sliding_window=5, rope_parameters=LINEAR), "rope_type='linear'"),
    ("Qwen3ForCausalLM", dict(attention_bias=True), "attention_bias=True"),
    ("PhiForCausalLM", dict(qk_layernorm=True), "qk_layernorm=True"),
    ("PhiForCausalLM", dict(num_key_value_heads=2), "num_key_value_heads=2"),
    ("OlmoForCausalLM", dict(num_key_value_heads=2), "num_key_value_heads=2"),
    ("OlmoForCausalLM", dict(attention_bias=True), "attention_bias=True"),
]
"""Settings that no `HookedTransformer` has, and the words that the error must contain."""

HARMLESS = {
    # of training only
    *("attention_dropout", "attn_pdrop", "classifier_dropout", "dropout", "embd_pdrop", "embed_dropout", "layerdrop"),
    *("hidden_dropout", "resid_dropout", "resid_pdrop", "initializer_range", "init_std", "pretraining_tp"),
    # of other heads than the language model's
    *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
    # of generation
    *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "is_decoder"),
    # the weights are read from where transformers has put them; cross-attention is not used without an encoder;
    # the order of the attention's operations
    *("tie_word_embeddings", "add_cross_attention", "reorder_and_upcast_attn"),
    # `layer_types` and `attention_layers` are made from these
    *("attention_types", "use_sliding_window", "max_window_layers"),
}
"""Settings that change nothing of what a loaded model computes."""


def config_of(architecture, **settings):
    config_class = getattr(transformers, architecture).config_class
    return config_class(**copy.deepcopy(SMALL | settings))  # transformers writes into the dictionaries


def save_original(architecture, folder, **settings):
    """A random model whose every weight matters: large matrices, norms away from 1, biases away from 0."""
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(config_of(architecture, **settings))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.2)
            else:
                weight.normal_(mean=float(name.endswith("weight")), std=0.1)
    model.eval().save_pretrained(folder)
    return model


@torch.no_grad()
def logits_of_both(architecture, folder, **settings):
    """The logits of the loaded model and those of transformers, which reads the same folder."""
    save_original(architecture, folder, **settings)
    model, original = load_model(folder, device="cpu"), getattr(transformers, architecture).from_pretrained(folder)
    assert (model.cfg.original_architecture, model.cfg.n_ctx) == (architecture, CONTEXT)
    tokens = torch.randint(VOCAB, (3, CONTEXT), generator=torch.Generator().manual_seed(1))
    return model(tokens, return_type="logits"), original(tokens).logits


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_family_computes_what_transformers_does(architecture, tmp_path):
    logits, expected = logits_of_both(architecture, tmp_path)
    assert (logits - expected).abs().max() <= 2.5e-6 * expected.abs().max()


@pytest.mark.parametrize(("architecture", "settings"), SAME, ids=str)
def test_settings_that_are_translated(architecture, settings, tmp_path):
    logits, expected = logits_of_both(architecture, tmp_path, **settings)
    assert torch.allclose(logits.log_softmax(-1), expected.log_softmax(-1), atol=1e-4)


@pytest.mark.parametrize(("architecture", "settings", "named"), REFUSED, ids=str)
def test_settings_that_are_refused(architecture, settings, named, tmp_path):
    save_original(architecture, tmp_path, **settings)
    with pytest.raises(ValueError, match=f"models with {named} are not supported"):
        load_model(tmp_path, device="cpu")


@pytest.mark.parametrize("architecture", FAMILIES)
def test_no_setting_is_overlooked(architecture):
    """Every setting of transformers' configuration is read, or is known to change nothing."""
    read = set()
    for settings in ({}, *(settings for family, settings in SAME if family == architecture)):
        config = config_of(architecture, **settings)
        own_names = config.attribute_map
        record_reads(config, read)
        FAMILIES[architecture].fields(config)
    read |= {own_names[name] for name in own_names.keys() & read}
    settings = {field.name for field in dataclasses.fields(config)}
    assert settings - {field.name for field in dataclasses.fields(PreTrainedConfig)} - read <= HARMLESS


def record_reads(config, read):
    class Recorded(type(config)):
        def __getattribute__(self, name):
            read.add(name)
            return super().__getattribute__(name)

    config.__class__ = Recorded


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_of_one_name_are_one_function(name):
    inputs = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    assert torch.allclose(ACT2FN[name](inputs), SUPPORTED_ACTIVATIONS[ACTIVATIONS[name]](inputs), atol=1e-12)


@torch.no_grad()
def test_an_architecture_outside_the_table_loads_as_transformer_lens_has_it(tmp_path):
    settings = dict(hidden_size=32, n_layer=2, n_head=4)
    original = save_original("BloomForCausalLM", tmp_path, **settings)
    assert "BloomForCausalLM" not in FAMILIES
    tokens = torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
    model = load_model(tmp_path, device="cpu")
    assert torch.allclose(model(tokens, return_type="logits"), original(tokens).logits, atol=1e-4)


def test_a_mixture_of_experts_is_refused(tmp_path):
    save_original("MixtralForCausalLM", tmp_path, num_local_experts=2, intermediate_size=16)
    with pytest.raises(ValueError, match="MixtralForCausalLM is a mixture of experts"):
        load_model(tmp_path, device="cpu")
