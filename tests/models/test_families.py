"""The table of families against transformers: random models with every setting that can matter, loaded and compared."""

import dataclasses

import pytest
import torch
import transformers
from families import CHECKS, CONTEXT, REFUSED, SAME, SHORTER, check_all, config_of, logits, original_of, save_original
from transformer_lens.utilities.activation_functions import SUPPORTED_ACTIVATIONS
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from memloc_lens import load_model
from memloc_lens.models.families import ACTIVATIONS, FAMILIES

HARMLESS = {
    # of training only
    *("attention_dropout", "attn_pdrop", "classifier_dropout", "dropout", "embd_pdrop", "embed_dropout", "layerdrop"),
    *("hidden_dropout", "resid_dropout", "resid_pdrop", "initializer_range", "init_std", "pretraining_tp"),
    # of other heads than the language model's
    *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
    # of generation
    *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "is_decoder"),
    # the weights are read from where transformers has put them, and so are biases and norms; cross-attention is not
    # used without an encoder; the order of the attention's operations
    *("tie_word_embeddings", "add_cross_attention", "reorder_and_upcast_attn", "attention_bias", "enable_bias"),
    *("layer_norm_elementwise_affine", "slow_but_exact"),
    # `layer_types` and `attention_layers` are made from these
    *("attention_types", "use_sliding_window", "max_window_layers"),
    # of images
    *("vision_config", "mm_tokens_per_image", "image_token_index", "boi_token_index", "eoi_token_index"),
    # rotary embeddings are those of transformers, whatever they are made from
    "original_max_position_embeddings",
}
"""Settings that change nothing of what a loaded model computes."""


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_family_is_right_in_every_check(architecture, tmp_path):
    save_original(architecture, tmp_path)
    assert check_all(architecture, tmp_path) == dict.fromkeys(CHECKS, "ok")
    assert load_model(tmp_path, device="cpu").cfg.n_ctx == CONTEXT


@torch.no_grad()
@pytest.mark.parametrize(("architecture", "settings"), [*SAME, *SHORTER], ids=str)
def test_settings_that_are_translated(architecture, settings, tmp_path):
    save_original(architecture, tmp_path, **settings)
    model = load_model(tmp_path, device="cpu")
    assert logits(model, original_of(architecture, tmp_path)) < 1e-4
    assert model.cfg.n_ctx == (CONTEXT if (architecture, settings) in SAME else 20)


@pytest.mark.parametrize(("architecture", "settings", "named"), REFUSED, ids=str)
def test_settings_that_are_refused(architecture, settings, named, tmp_path):
    save_original(architecture, tmp_path, **settings)
    with pytest.raises(ValueError, match=f"models with .*{named} are not supported"):
        load_model(tmp_path, device="cpu")


@pytest.mark.parametrize("architecture", FAMILIES)
def test_no_setting_is_overlooked(architecture):
    """Every setting of transformers' configuration is read, or is known to change nothing."""
    read = set()
    for settings in ({}, *(settings for family, settings in SAME if family == architecture)):
        config = config_of(architecture, **settings)
        own_names = config.attribute_map
        record_reads(config.get_text_config(), read)
        record_reads(config, read)
        FAMILIES[architecture].fields(config)
    read |= {own_names[name] for name in own_names.keys() & read}
    settings = {field.name for part in (config, config.get_text_config()) for field in dataclasses.fields(part)}
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


@pytest.mark.parametrize("architecture", ["MixtralForCausalLM", "OlmoeForCausalLM", "GptOssForCausalLM"])
def test_a_mixture_of_experts_is_refused(architecture, tmp_path):
    config_of(architecture, num_local_experts=2, num_experts=2).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()  # the configuration is enough: weights may be large
    with pytest.raises(
        ValueError, match=f"{architecture} is a mixture of experts.*; supported architectures are Bloom"
    ):
        load_model(tmp_path, device="cpu")


@pytest.mark.parametrize("architecture", ["FalconForCausalLM", "XGLMForCausalLM", "MambaForCausalLM"])
def test_another_architecture_is_refused(architecture, tmp_path):
    getattr(transformers, architecture).config_class().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=f"{architecture} is not supported; supported architectures are .*, Qwen3"):
        load_model(tmp_path, device="cpu")
