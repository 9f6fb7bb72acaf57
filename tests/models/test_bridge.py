"""Models as TransformerBridges, of TransformerLens 3.9 or 4: all that is measured is what transformers itself gives."""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from unittest.mock import patch

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from conftest import CONTEXT, VOCAB, assert_same_state, random_sequence, records_of, some_of, state_of
from memloc_lens import (
    COMPONENTS,
    Activations,
    Gradient,
    HardConcrete,
    IntegratedGradients,
    IterativeGradient,
    MemorizedSequence,
    Slimming,
    WeightNorm,
    ZeroOut,
    ablate,
    inject,
    load_model,
    mean_activations,
)
from memloc_lens.benchmarks import deletion, injection
from memloc_lens.bridge import is_bridge, run_between, stream_entering
from memloc_lens.erase import write_checkpoint
from memloc_lens.forward import PrefixCache, clean_pass
from memloc_lens.localizers import integrated_gradients
from memloc_lens.metrics import free_running, suffix_loss, suffix_probabilities, teacher_forced
from memloc_lens.models import accepted, check_backend, prepare

HAS_HOOKED = accepted.default_backend() == "hooked"
SHAPE = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, initializer_range=0.2)
LONG = SHAPE | dict(max_position_embeddings=CONTEXT, intermediate_size=48)
GROUPED = LONG | dict(num_key_value_heads=2)
FAMILIES = {
    "GPT2LMHeadModel": dict(
        vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_inner=48, n_positions=CONTEXT, initializer_range=0.2
    ),
    "GPTNeoXForCausalLM": LONG,
    "LlamaForCausalLM": GROUPED,
    "Gemma2ForCausalLM": GROUPED | dict(head_dim=8),
    "Qwen3ForCausalLM": GROUPED | dict(head_dim=8),
    "GPTJForCausalLM": dict(
        vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_inner=48, n_positions=CONTEXT, rotary_dim=4
    ),
    "FalconForCausalLM": SHAPE | dict(bos_token_id=0, eos_token_id=0),
}
TOGETHER = {"GPT2LMHeadModel", "GPTNeoXForCausalLM", "LlamaForCausalLM", "Gemma2ForCausalLM", "FalconForCausalLM"}
"""Families whose positions go through one run of integrated gradients; in the others every prefix has its own."""


def make(architecture: str, **changes) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    model_class = getattr(transformers, architecture)
    settings = FAMILIES.get(architecture, GROUPED) | changes
    return model_class(model_class.config_class(**settings, attn_implementation="eager")).eval().double()


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory) -> tuple[transformers.PreTrainedModel, TransformerBridge]:
    """A model of transformers, and a bridge to another copy of it."""
    path = tmp_path_factory.mktemp("family") / request.param
    make(request.param).save_pretrained(path)
    model = load_model(path, device="cpu", dtype=torch.float64, backend="bridge")
    return make(request.param), model


@pytest.fixture(scope="module")
def gpt2_bridge(tmp_path_factory) -> TransformerBridge:
    path = tmp_path_factory.mktemp("gpt2") / "gpt2"
    make("GPT2LMHeadModel").save_pretrained(path)
    return load_model(path, device="cpu", dtype=torch.float64, backend="bridge")


def down_projections(original: transformers.PreTrainedModel) -> list[nn.Module]:
    """The last matrix of each MLP, whose input are the neurons."""
    names = ("c_proj", "down_proj", "dense_4h_to_h", "fc_out")
    return [module for name, module in original.named_modules() if ".mlp." in name and name.rpartition(".")[2] in names]


@contextmanager
def changed(module: nn.Module, change: Callable[[Tensor], Tensor]):
    """Let the neurons of one MLP of transformers be changed."""
    handle = module.register_forward_pre_hook(lambda module, given: (change(given[0]), *given[1:]))
    try:
        yield
    finally:
        handle.remove()


def loss_of(original: transformers.PreTrainedModel, sequence: MemorizedSequence) -> Tensor:
    log_probs = original(sequence.tokens[None], use_cache=False).logits[0].log_softmax(-1)
    return -log_probs[sequence.prompt_len - 1 : -1].gather(1, sequence.suffix[:, None]).mean()


@torch.no_grad()
def test_zero_out_is_the_rise_of_transformers_own_loss(family, sequence):
    original, model = family
    scores, clean = ZeroOut()(model, sequence), loss_of(original, sequence)
    for layer, module in enumerate(down_projections(original)):
        for neuron in range(0, model.cfg.d_mlp, 7):
            kept = torch.arange(model.cfg.d_mlp) != neuron
            with changed(module, lambda neurons, kept=kept: neurons * kept):
                rise = loss_of(original, sequence) - clean
            assert scores[layer, neuron].item() == pytest.approx(rise.item(), abs=1e-6)


def test_integrated_gradients_are_those_of_transformers_prefixes(family, sequence):
    original, model = family
    scores = IntegratedGradients(steps=3)(model, sequence)
    assert integrated_gradients._known_bridges[model] == (type(original).__name__ in TOGETHER)
    for layer in (0, 2):
        module, expected = down_projections(original)[layer], torch.zeros(model.cfg.d_mlp, dtype=torch.float64)
        for position in range(sequence.prompt_len, len(sequence.tokens)):
            prefix, own = sequence.tokens[None, :position], []
            with torch.no_grad(), changed(module, lambda neurons, own=own: own.append(neurons[0, -1]) or neurons):
                original(prefix, use_cache=False)
            for fraction in (0.0, 0.5, 1.0):
                scaled = (fraction * own[0]).requires_grad_(True)

                def write(neurons, scaled=scaled):
                    return torch.cat([neurons[:, :-1], scaled.expand(1, 1, -1)], dim=1)

                with changed(module, write):
                    probability = original(prefix, use_cache=False).logits[0, -1].softmax(-1)[sequence.tokens[position]]
                expected += own[0] * torch.autograd.grad(probability, scaled)[0] / 3 / len(sequence.suffix)
        torch.testing.assert_close(scores[layer].double(), expected, rtol=1e-4, atol=1e-8)


def test_masks_gradients_and_activations_are_those_of_transformers(family, sequence):
    original, model = family
    modules, size = down_projections(original), model.cfg.d_mlp
    masks = torch.ones(3, size, dtype=torch.float64, requires_grad=True)
    seen: list[Tensor] = []

    def times(layer):
        return lambda neurons: seen.append(neurons) or neurons * masks[layer]

    with changed(modules[0], times(0)), changed(modules[1], times(1)), changed(modules[2], times(2)):
        loss = loss_of(original, sequence)
    gradient = torch.autograd.grad(loss, masks)[0]
    torch.testing.assert_close(Gradient(objective="loss")(model, sequence).double(), -gradient, rtol=1e-4, atol=1e-8)
    if type(original).__name__ == "GPT2LMHeadModel":
        weights = torch.stack([module.weight for module in modules])  # a Conv1D
    else:
        weights = torch.stack([module.weight.T for module in modules])
    torch.testing.assert_close(WeightNorm()(model, sequence).double(), weights.norm(dim=2), rtol=1e-5, atol=0)
    at_targets = torch.stack([neurons[0, sequence.prompt_len - 1 : -1] for neurons in seen])
    expected = at_targets.mean(dim=1).abs() * weights.norm(dim=2)
    torch.testing.assert_close(Activations()(model, sequence).double(), expected, rtol=1e-5, atol=1e-8)
    adam, values = 0.01, Slimming(steps=1, lr=0.01, penalty=1.0, stop_loss=0)(model, sequence).double()
    step = (gradient + 1 / masks.numel()).sign() * adam  # Adam's first step
    torch.testing.assert_close(values, (1 - step).clamp(0, 1), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_generation_is_transformers_own_with_and_without_an_ablation(family, sequence):
    original, model = family
    neurons = some_of(model)

    def recited():
        return original.generate(
            sequence.prompt, max_new_tokens=len(sequence.suffix), do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, sequence.prompt_len :]

    assert torch.equal(free_running(model, [sequence])[0], recited())
    with ablate(model, neurons):
        tokens = {
            use: model.generate(
                sequence.prompt, max_new_tokens=8, do_sample=False, stop_at_eos=False, use_past_kv_cache=use,
                verbose=False,
            )
            for use in (True, False)
        }  # fmt: skip
        assert torch.equal(tokens[True], tokens[False])
        ablated = free_running(model, [sequence])[0]
        losses = suffix_loss(model, [sequence])
    kept = [~neurons.members[layer] for layer in range(3)]
    modules = down_projections(original)
    with (
        changed(modules[0], lambda values: values * kept[0]),
        changed(modules[1], lambda values: values * kept[1]),
        changed(modules[2], lambda values: values * kept[2]),
    ):
        assert torch.equal(ablated, recited())
        assert losses.item() == pytest.approx(loss_of(original, sequence).item(), rel=1e-6)


METHODS = [
    ZeroOut(candidates=0.2),
    ZeroOut(first_layer=1),
    IntegratedGradients(steps=2, first_layer=2),
    HardConcrete(steps=3, first_layer=1),
    IterativeGradient(rounds=2),
    *(
        localizer(component=component, **steps)
        for component in ("head", "weight")
        for localizer, steps in ((Activations, {}), (Gradient, {}), (WeightNorm, {}), (Slimming, {"steps": 3}))
    ),
    ZeroOut(component="head"),
]


@pytest.mark.skipif(not HAS_HOOKED, reason="this TransformerLens has no HookedTransformer to compare with")
@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "LlamaForCausalLM", "Gemma2ForCausalLM"])
def test_methods_are_those_of_a_hooked_transformer(architecture, tmp_path):
    make(architecture).save_pretrained(tmp_path)
    hooked, bridge = (load_model(tmp_path, device="cpu", dtype=torch.float64, backend=b) for b in ("hooked", "bridge"))
    sequences = [random_sequence(0), random_sequence(1), random_sequence(2, length=11)]
    for localizer in METHODS:
        torch.testing.assert_close(localizer(bridge, sequences), localizer(hooked, sequences), rtol=1e-4, atol=1e-6)
    for name, component in COMPONENTS.items():
        parts = some_of(hooked, component)
        for kind in ("zero", "scale", *(["mean"] if component.hook_point else [])):
            over = {"over": sequences} if kind == "mean" else {}
            with ablate(hooked, parts, kind, **over):
                expected = suffix_loss(hooked, sequences)
            with ablate(bridge, parts, kind, **over):
                torch.testing.assert_close(suffix_loss(bridge, sequences), expected, msg=f"{name} {kind}")
        if component.hook_point:
            means = (mean_activations(model, sequences, component) for model in (bridge, hooked))
            torch.testing.assert_close(*means, rtol=1e-5, atol=1e-6)
    for component in ("neuron", "weight"):
        with inject(hooked, sequences[0], 0.1, max_steps=5, component=component) as expected_injection:
            expected = suffix_loss(hooked, sequences)
        with inject(bridge, sequences[0], 0.1, max_steps=5, component=component) as injected:
            assert injected.ground_truth == expected_injection.ground_truth
            torch.testing.assert_close(suffix_loss(bridge, sequences), expected)


def test_passes_through_some_layers_make_up_the_whole(family, sequence):
    _, model = family
    tokens = sequence.tokens[None]
    with torch.no_grad():
        last = stream_entering(model, tokens, 3)
        for layer in range(3):
            entering = stream_entering(model, tokens, layer)
            torch.testing.assert_close(run_between(model, entering, layer, 3), last)
        streams = clean_pass(model, tokens).streams
    torch.testing.assert_close(streams[-1], last)
    assert len(streams) == 4


def test_a_bridge_is_left_as_it_was_also_by_errors(gpt2_bridge, sequence):
    model = gpt2_bridge
    Activations()(model, sequence)  # transformers puts hooks of its own on its modules in the first pass
    before = state_of(model)
    for localizer in METHODS:
        localizer(model, sequence)
    teacher_forced(model, [sequence])
    with inject(model, sequence, 0.1, max_steps=2), ablate(model, some_of(model)):
        suffix_loss(model, [sequence])

    def fail(activations, hook):
        raise RuntimeError("a hook of the user's")

    with model.hooks(fwd_hooks=[("blocks.2.mlp.hook_post", fail)]), pytest.raises(RuntimeError, match="user's"):
        ZeroOut(first_layer=1)(model, sequence)
    assert_same_state(before, state_of(model))
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


def test_hooks_of_users_are_seen(gpt2_bridge, sequence):
    """A hook that zeroes neurons is an ablation of them: their rises are 0, and what is lost without them is lost."""
    model, off = gpt2_bridge, some_of(gpt2_bridge, seed=3)

    def zero(layer):
        return lambda activations, hook: activations * ~off.members[layer]

    hooks = [(f"blocks.{layer}.mlp.hook_post", zero(layer)) for layer in range(3)]
    with ablate(model, off):
        expected = ZeroOut()(model, sequence), suffix_loss(model, [sequence])
    with model.hooks(fwd_hooks=hooks):
        scores, loss = ZeroOut()(model, sequence), suffix_loss(model, [sequence])
    torch.testing.assert_close((scores, loss), expected)
    assert scores[off.members].abs().max() < 1e-6
    twice = [("blocks.1.hook_out", lambda stream, hook: 2 * stream)]
    with model.hooks(fwd_hooks=twice):
        doubled = ZeroOut()(model, sequence)
        whole = model(sequence.tokens[None], return_type="logits")[0].log_softmax(-1)
        probabilities = suffix_probabilities(model, sequence)
    assert not torch.allclose(doubled, ZeroOut()(model, sequence))
    of_suffix = whole[sequence.prompt_len - 1 : -1].gather(1, sequence.suffix[:, None])[:, 0].exp()
    torch.testing.assert_close(probabilities, of_suffix)


def test_a_prefix_cache_serves_a_bridge(gpt2_bridge, sequence):
    prefix = PrefixCache(gpt2_bridge, layer=2)
    later = replace_layers(some_of(gpt2_bridge), 2)
    for _ in range(2):
        with torch.no_grad(), ablate(gpt2_bridge, later):
            own = suffix_probabilities(gpt2_bridge, sequence, prefix)
            torch.testing.assert_close(own, suffix_probabilities(gpt2_bridge, sequence))
    doubled = [("blocks.0.hook_out", lambda stream, hook: 2 * stream)]
    with gpt2_bridge.hooks(fwd_hooks=doubled), pytest.raises(ValueError, match="has a hook, and the prefix cache"):
        suffix_probabilities(gpt2_bridge, sequence, prefix)


def replace_layers(neurons, first):
    members = neurons.members.clone()
    members[:first] = False
    return type(neurons)(members)


def test_a_users_own_bridge_works(sequence):
    original = make("LlamaForCausalLM")
    expected = ZeroOut()(own_bridge(make("LlamaForCausalLM")), sequence)
    with torch.no_grad():
        clean = loss_of(original, sequence)
        with changed(down_projections(original)[1], lambda neurons: neurons * (torch.arange(48) != 5)):
            assert (loss_of(original, sequence) - clean).item() == pytest.approx(expected[1, 5].item(), abs=1e-6)


def own_bridge(original: transformers.PreTrainedModel) -> TransformerBridge:
    """What a user makes with TransformerLens alone."""
    from memloc_lens.models.bridged import _no_tokenizer

    original.config.architectures = [type(original).__name__]
    return TransformerBridge.boot_transformers(
        "own", hf_model=original, device="cpu", dtype=torch.float64, tokenizer=_no_tokenizer()
    )


@pytest.mark.parametrize(
    ("architecture", "changes", "said"),
    [
        ("GraniteForCausalLM", {"logits_scaling": 2.0}, "layers 1 to 2, given the stream that enters them"),
        (
            "OPTForCausalLM",
            {"ffn_dim": 48, "word_embed_proj_dim": 32},
            "hook_post times W_out is not what the MLP hands on",
        ),
    ],
)
def test_bridges_of_other_kinds_are_refused(architecture, changes, said, sequence):
    model = own_bridge(make(architecture, **changes))
    for work in (ZeroOut(), Slimming(steps=1), lambda model, sequence: suffix_loss(model, [sequence])):
        with pytest.raises(ValueError, match=said):
            work(model, sequence)


def test_a_trial_that_fails_is_one_error_and_is_made_again(sequence):
    model = own_bridge(make("GPT2LMHeadModel"))

    def fail(stream, hook):
        raise RuntimeError("a hook of the user's")

    message = "^own cannot be used as a TransformerBridge: its layers do not run by themselves: a hook of the user's$"
    with model.hooks(fwd_hooks=[("blocks.1.hook_in", fail)]), pytest.raises(ValueError, match=message):
        Activations()(model, sequence)
    assert Activations()(model, sequence).shape == (3, 48)


def test_experts_are_refused(sequence):
    original = make("MixtralForCausalLM", num_local_experts=2).float()
    with pytest.raises(ValueError, match=r"experts a layer|is a TransformerBridge without"):
        ZeroOut()(own_bridge(original), sequence)


def test_backends_are_named(tmp_path):
    make("GPT2LMHeadModel").save_pretrained(tmp_path)
    assert check_backend(None) == ("hooked" if int(version("transformer-lens")[0]) < 4 else "bridge")
    assert is_bridge(load_model(tmp_path, device="cpu")) != HAS_HOOKED
    with pytest.raises(ValueError, match="backend is 'hook'; it must be one of 'hooked', 'bridge'"):
        check_backend("hook")
    with patch.object(accepted, "version", return_value="4.3.0"):
        assert check_backend(None) == "bridge"
        with pytest.raises(ValueError, match="TransformerLens 4 has no HookedTransformer"):
            load_model(tmp_path, backend="hooked")


@pytest.mark.parametrize("benchmark", ["del", "inj"])
def test_benchmarks_run_on_a_bridge_and_find_the_same(benchmark, small_del, small_inj, tmp_path):
    run, settings = (deletion.run, small_del) if benchmark == "del" else (injection.run, small_inj)
    settings = replace(settings, methods=("activations", "zero-out", "integrated-gradients"), limit=2)
    backends = ("hooked", "bridge") if HAS_HOOKED else ("bridge", None)
    for backend in backends:
        run(replace(settings, backend=backend, out=tmp_path / str(backend)))
    one, other = (records_of(tmp_path / str(backend)) for backend in backends)
    assert len(one) == len(other) > 0
    if HAS_HOOKED:
        with pytest.raises(ValueError, match="weights"):
            run(replace(settings, backend="bridge", out=tmp_path / "hooked"))
    for own, expected in zip(other, one, strict=True):
        assert own.keys() == expected.keys()
        for name, value in expected.items():
            if name != "crc32":
                assert own[name] == (pytest.approx(value, abs=1e-4) if isinstance(value, float) else value), name


@pytest.mark.parametrize("component", COMPONENTS.values(), ids=COMPONENTS)
def test_a_checkpoint_that_a_bridge_wrote_is_the_ablated_model(component, recited, tmp_path):
    model = load_model(recited / "model", device="cpu", backend="bridge")
    components = some_of(model, component)
    folder = write_checkpoint(recited / "model", tmp_path / "erased", components, model=model)
    tokens = random_sequence().tokens[None]
    with torch.no_grad(), ablate(model, components):
        expected = model(tokens, return_type="logits")
    written = transformers.AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(written(tokens).logits, expected, rtol=1e-4, atol=1e-4)


def test_half_precision_and_preparation(tmp_path, sequence):
    make("LlamaForCausalLM").save_pretrained(tmp_path)
    exact, half = (
        load_model(tmp_path, device="cpu", dtype=dtype, backend="bridge") for dtype in (torch.float32, torch.bfloat16)
    )
    Activations()(half, sequence)  # in its first pass transformers puts hooks of its own on its modules
    before = state_of(half)
    prepare(half)
    scores, expected = ZeroOut()(half, sequence), ZeroOut()(exact, sequence)
    assert_same_state(before, state_of(half))
    assert torch.corrcoef(torch.stack([scores.flatten(), expected.flatten()]))[0, 1] > 0.99
