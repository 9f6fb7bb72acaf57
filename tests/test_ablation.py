from contextlib import AbstractContextManager, ExitStack
from itertools import permutations

import naive
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from transformers import PreTrainedModel as Original

from conftest import (
    ARCHITECTURES,
    CONTEXT,
    EACH_COMPONENT,
    PROMPT,
    VOCAB,
    assert_same_state,
    make_original,
    random_sequence,
    some_of,
    state_of,
)
from memloc_lens import (
    COMPONENTS,
    HEADS,
    NEURONS,
    WEIGHTS,
    ComponentSet,
    Neurons,
    ablate,
    load_model,
    mask,
    mean_activations,
)
from memloc_lens.models import EMBEDDED

FUNCTION_FIXTURES = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None
)


def zero_in_transformers(original: Original, architecture: str, components: ComponentSet) -> None:
    """Set what the components write with to zero in the weights of transformers' own model."""
    for layer in range(original.config.num_hidden_layers):
        members = components.layer(layer)
        if components.component is HEADS:
            if architecture == "gpt2":
                inputs = original.transformer.h[layer].attn.c_proj.weight.data
            elif architecture == "neox":
                inputs = original.gpt_neox.layers[layer].attention.dense.weight.data.T
            else:
                inputs = original.model.layers[layer].self_attn.o_proj.weight.data.T
            inputs.view(len(members), -1, inputs.shape[1])[members] = 0
        elif architecture == "gpt2":
            original.transformer.h[layer].mlp.c_proj.weight.data[members] = 0
        elif architecture == "neox":
            original.gpt_neox.layers[layer].mlp.dense_4h_to_h.weight.data.T[members] = 0
        else:
            original.model.layers[layer].mlp.down_proj.weight.data.T[members] = 0


def kept(components: ComponentSet, factor: float = 0.0) -> torch.Tensor:
    """The mask that is the same as an ablation."""
    return torch.where(components.members, factor, 1.0).double()


@EACH_COMPONENT
@torch.no_grad()
def test_zero_is_the_model_of_transformers_without_these_weights(any_model, architecture, component, tmp_path):
    components = some_of(any_model, component)
    tokens = torch.stack([random_sequence(seed).tokens for seed in range(2)])
    clean = any_model(tokens, return_type="logits")
    original = make_original(architecture).double()
    zero_in_transformers(original, architecture, components)
    original.save_pretrained(tmp_path)
    without = load_model(tmp_path, device="cpu", dtype=torch.float64)
    with ablate(any_model, components):
        ablated = any_model(tokens, return_type="logits")
    assert torch.allclose(ablated, without(tokens, return_type="logits"), atol=1e-10)
    assert torch.allclose(ablated, original(tokens).logits, atol=1e-4)  # transformers rotates in float32
    assert (ablated - clean).abs().max() > 0.1
    assert torch.equal(any_model(tokens, return_type="logits"), clean)


@EACH_COMPONENT
@torch.no_grad()
@pytest.mark.parametrize("factor", [0.25, -2.0])
def test_scale_multiplies_what_is_written(any_model, sequence, component, factor):
    components = some_of(any_model, component)
    with ablate(any_model, components, "scale", factor=factor):
        scaled = any_model(sequence.tokens[None], return_type="logits")
    expected = naive.masked_logits(any_model, sequence.tokens[None], {component.name: kept(components, factor)})
    assert torch.allclose(scaled, expected, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("component", [NEURONS, HEADS], ids=lambda component: component.name)
def test_mean_writes_the_mean_at_every_position(any_model, sequence, component):
    components = some_of(any_model, component)
    others = [random_sequence(seed, length) for seed, length in ((1, 9), (2, 12), (3, 12))]
    means = naive.mean_activations(any_model, others, component.hook_point)

    def write(activations, hook):
        members = components.layer(hook.layer())
        activations[:, :, members] = means[hook.layer()][members]
        return activations

    hooks = [(component.activations_at(layer), write) for layer in range(any_model.cfg.n_layers)]
    expected = any_model.run_with_hooks(sequence.tokens[None], fwd_hooks=hooks)
    for over in (others, mean_activations(any_model, others, component)):
        with ablate(any_model, components, "mean", over=over):
            assert torch.allclose(any_model(sequence.tokens[None]), expected, atol=1e-5)  # means are in float32


@torch.no_grad()
@pytest.mark.parametrize("component", [NEURONS, HEADS], ids=lambda component: component.name)
def test_mean_activations_is_over_all_positions(any_model, component):
    sequences = [random_sequence(seed, length, prompt_len=2) for seed, length in enumerate((9, 14, 9, 5))]
    means = mean_activations(any_model, sequences, component)
    expected = naive.mean_activations(any_model, sequences, component.hook_point)
    assert means.shape == expected.shape
    assert torch.allclose(means.double(), expected, atol=1e-6)


def test_a_mean_needs_text_and_activations(gpt2, sequence):
    with pytest.raises(ValueError, match="over=sequences"):
        mean_activations(gpt2, [])
    with pytest.raises(ValueError, match="over=sequences"), ablate(gpt2, some_of(gpt2), "mean"):
        pass
    with pytest.raises(ValueError, match="weights have no activations"):
        mean_activations(gpt2, [sequence], WEIGHTS)
    for over in ([sequence], torch.zeros(WEIGHTS.shape(gpt2))):
        with (
            pytest.raises(ValueError, match="weights have no activations"),
            ablate(gpt2, some_of(gpt2, WEIGHTS), "mean", over=over),
        ):
            pass


@pytest.mark.parametrize("component", [NEURONS, HEADS], ids=lambda component: component.name)
def test_means_of_other_components_are_refused(gpt2, sequence, component):
    other = HEADS if component is NEURONS else NEURONS
    means = mean_activations(gpt2, [sequence], other)
    for over in (means, means[..., :-1], means[:-1]):
        with (
            pytest.raises(ValueError, match=r"means of shape .* do not fit"),
            ablate(gpt2, some_of(gpt2, component), "mean", over=over),
        ):
            pass


NESTED = {
    "neurons": (NEURONS, 0.0, 1),
    "neurons scaled": (NEURONS, 0.5, 2),
    "weights": (WEIGHTS, 0.0, 3),
    "overlapping weights": (WEIGHTS, 0.0, 4),
    "weights scaled": (WEIGHTS, -0.5, 5),
    "heads": (HEADS, 0.0, 6),
}


@torch.no_grad()
@pytest.mark.parametrize("names", [("neurons", "weights", "overlapping weights"),
                                   ("neurons scaled", "weights", "weights scaled"),
                                   ("weights", "heads", "neurons"),
                                   ("overlapping weights", "weights", "weights scaled")], ids=", ".join)  # fmt: skip
def test_contexts_nest_in_any_order(any_model, sequence, names):
    """Each multiplies what the others leave: the product of their masks, at every depth."""
    tokens, masks = sequence.tokens[None], {}
    for name in names:
        component, factor, seed = NESTED[name]
        masks[name] = kept(some_of(any_model, component, share=0.4, seed=seed), factor)

    def expected(open_now: tuple[str, ...]) -> torch.Tensor:
        product = {kind: torch.ones(COMPONENTS[kind].shape(any_model)) for kind in COMPONENTS}
        for name in open_now:
            kind = NESTED[name][0].name
            product[kind] = product[kind] * masks[name]
        return naive.masked_logits(any_model, tokens, product)

    def ablated(name: str) -> AbstractContextManager[None]:
        component, factor, seed = NESTED[name]
        components = some_of(any_model, component, share=0.4, seed=seed)
        return ablate(any_model, components, "scale" if factor else "zero", factor=factor)

    for order in permutations(names):
        by_depth = [expected(order[:depth]) for depth in range(4)]
        with ablated(order[0]), ablated(order[1]):
            with ablated(order[2]):
                assert torch.allclose(any_model(tokens), by_depth[3], atol=1e-10)
            assert torch.allclose(any_model(tokens), by_depth[2], atol=1e-10)
        assert torch.allclose(any_model(tokens), by_depth[0], atol=1e-10)
        assert (by_depth[3] - by_depth[2]).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("weights_first", [True, False])
def test_weights_see_the_means_of_neurons_and_hooks_of_users(gpt2, sequence, weights_first):
    """The other edits of activations are not products: weights multiply what is left, whatever it is."""
    neurons, weights = some_of(gpt2), some_of(gpt2, WEIGHTS, seed=1)
    means = mean_activations(gpt2, [random_sequence(5)])

    def double(activations, hook):
        return 2 * activations

    contexts = [
        lambda: ablate(gpt2, weights),
        lambda: ablate(gpt2, neurons, "mean", over=means),
        lambda: gpt2.hooks(fwd_hooks=[(NEURONS.activations_at(1), double)]),
    ]
    with ExitStack() as stack:
        for context in contexts if weights_first else reversed(contexts):
            stack.enter_context(context())
        ablated = gpt2(sequence.tokens[None])
    with ExitStack() as stack:
        for context in contexts[1:] if weights_first else reversed(contexts[1:]):
            stack.enter_context(context())
        expected = naive.masked_logits(gpt2, sequence.tokens[None], {"weight": kept(weights)})
    assert torch.allclose(ablated, expected, atol=1e-10)


@FUNCTION_FIXTURES
@given(
    st.lists(st.tuples(st.sampled_from(list(COMPONENTS)), st.sampled_from(["zero", "mean", "scale"])), max_size=4),
    st.booleans(),
    st.integers(0, 99),
)
def test_the_model_is_clean_afterwards_whatever_happens(gpt2, contexts, fails, seed):
    before, sequence = state_of(gpt2), random_sequence(seed)

    def nested(left: list[tuple[str, str]]) -> None:
        if left:
            component, kind = COMPONENTS[left[0][0]], left[0][1]
            kind = "zero" if component is WEIGHTS and kind == "mean" else kind
            with ablate(gpt2, some_of(gpt2, component, seed=seed + len(left)), kind, over=[sequence]):
                return nested(left[1:])
        gpt2(sequence.tokens[None], return_type=None)
        if fails:
            raise KeyboardInterrupt

    try:
        nested(contexts)
    except KeyboardInterrupt:
        assert fails
    assert_same_state(before, state_of(gpt2))


@torch.no_grad()
@pytest.mark.parametrize("place", ["mlp.hook_pre", "mlp.hook_post", "hook_mlp_out", "hook_resid_pre"])
def test_a_pass_that_fails_within_leaves_nothing(gpt2, sequence, place):
    before, weights = state_of(gpt2), some_of(gpt2, WEIGHTS)
    expected = naive.masked_logits(gpt2, sequence.tokens[None], {"weight": kept(weights)})

    def fail(activations, hook):
        raise KeyboardInterrupt

    with ablate(gpt2, weights):
        with pytest.raises(KeyboardInterrupt):
            gpt2.run_with_hooks(sequence.tokens[None], fwd_hooks=[(f"blocks.1.{place}", fail)])
        assert torch.allclose(gpt2(sequence.tokens[None]), expected, atol=1e-10)
        with pytest.raises(KeyboardInterrupt):
            gpt2.run_with_hooks(sequence.tokens[None], fwd_hooks=[(f"blocks.1.{place}", fail)])
    assert_same_state(before, state_of(gpt2))


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind in ("zero", "mean", "scale") for name in COMPONENTS if (kind, name) != ("mean", "weight")],
)
def test_a_list_ablates_another_set_in_each_row(any_model, sequence, kind, name):
    component = COMPONENTS[name]
    sets = [some_of(any_model, component, seed=seed) for seed in range(3)]
    over = [] if kind != "mean" else mean_activations(any_model, [random_sequence(7)], component)
    with ablate(any_model, sets, kind, over=over):
        together = any_model(sequence.tokens.expand(3, -1))
    for logits, components in zip(together, sets, strict=True):
        with ablate(any_model, components, kind, over=over):
            assert torch.allclose(any_model(sequence.tokens[None])[0], logits, atol=1e-10)
    assert (together[0] - together[1]).abs().max() > 0.1


@torch.no_grad()
def test_lists_of_sets_nest_too(gpt2, sequence):
    tokens = sequence.tokens.expand(2, -1)
    weights = [some_of(gpt2, WEIGHTS, seed=seed) for seed in range(2)]
    neurons, more = [some_of(gpt2, seed=seed) for seed in range(2)], some_of(gpt2, WEIGHTS, seed=9)
    for first, second, third in permutations((weights, neurons, more)):
        with ablate(gpt2, first), ablate(gpt2, second), ablate(gpt2, third):
            together = gpt2(tokens)
        for row in range(2):
            masks = {"weight": kept(weights[row] | more), "neuron": kept(neurons[row])}
            assert torch.allclose(together[row], naive.masked_logits(gpt2, tokens[:1], masks)[0], atol=1e-10)


@EACH_COMPONENT
@torch.no_grad()
def test_masks_differ_by_row(any_model, sequence, component):
    rows = torch.rand(3, *component.shape(any_model), generator=torch.Generator().manual_seed(0)).double()
    for first_layer in (0, 2):
        with component.masked(any_model, rows[:, first_layer:], first_layer):
            together = any_model(sequence.tokens.expand(3, -1))
        for logits, values in zip(together, rows.clone(), strict=True):
            values[:first_layer] = 1
            expected = naive.masked_logits(any_model, sequence.tokens[None], {component.name: values})[0]
            assert torch.allclose(logits, expected, atol=1e-10)
            with component.masked(any_model, values):
                assert torch.allclose(any_model(sequence.tokens[None])[0], expected, atol=1e-10)


@EACH_COMPONENT
def test_gradients_of_masks_are_finite_differences(any_model, component):
    """Another mask and another text a row; a few entries of each layer, in float64."""
    sequences, step = [random_sequence(seed) for seed in range(2)], 1e-5
    tokens = torch.stack([sequence.tokens for sequence in sequences])
    draw = torch.Generator().manual_seed(0)
    rows = 0.5 + torch.rand(2, *component.shape(any_model), generator=draw, dtype=torch.float64)
    values = rows.clone().requires_grad_(True)
    with component.masked(any_model, values):
        losses = any_model(tokens, return_type="loss", loss_per_token=True)[:, sequences[0].prompt_len - 1 :].mean(
            dim=1
        )
    (gradient,) = torch.autograd.grad(losses.sum(), values)
    with torch.no_grad():
        for row, sequence in enumerate(sequences):
            for layer in range(any_model.cfg.n_layers):
                index = (layer, *(int(torch.randint(size, (), generator=draw)) for size in rows.shape[2:]))
                slope = 0.0
                for sign in (1, -1):
                    moved = rows[row].clone()
                    moved[index] += sign * step
                    slope += sign * naive.suffix_loss(any_model, sequence, masks={component.name: moved}).item()
                expected = pytest.approx(slope / (2 * step), rel=1e-4, abs=1e-8)
                assert gradient[row][index].item() == expected


@EACH_COMPONENT
def test_gradients_pass_through_an_ablation(any_model, sequence, component):
    components, shape = some_of(any_model, component), component.shape(any_model)
    values = torch.ones(shape, dtype=torch.float64, requires_grad=True)
    with component.masked(any_model, values), ablate(any_model, components):
        loss = any_model(sequence.tokens[None], return_type="loss")
    (gradient,) = torch.autograd.grad(loss, values)
    others = kept(components)
    direct = torch.ones(shape, dtype=torch.float64, requires_grad=True)
    log_probs = naive.masked_logits(any_model, sequence.tokens[None], {component.name: direct * others})[0].log_softmax(
        -1
    )
    loss = -log_probs[:-1].gather(1, sequence.tokens[1:, None]).mean()
    (expected,) = torch.autograd.grad(loss, direct)
    assert torch.allclose(gradient, expected, atol=1e-10)
    assert gradient[components.members].abs().max() < 1e-15
    assert (gradient[~components.members] != 0).any()


@EACH_COMPONENT
def test_components_of_another_model_are_refused(gpt2, component):
    members = torch.ones(3, 5, 2, dtype=torch.bool)[(..., 0) if component is not WEIGHTS else ...]
    other = Neurons(members) if component is NEURONS else ComponentSet(members, component)
    with pytest.raises(ValueError, match=f"{component.plural} of shape .* do not fit"), ablate(gpt2, other):
        pass
    for values in (members.float(), torch.ones(component.shape(gpt2)[1:]), torch.ones(1, 1, *component.shape(gpt2))):
        with pytest.raises(ValueError, match="do not fit"), component.masked(gpt2, values):
            pass
    with pytest.raises(ValueError, match="do not fit"), mask(gpt2, torch.ones(3, 5)):
        pass


def test_a_mask_is_that_of_neurons(gpt2, sequence):
    values = torch.rand(NEURONS.shape(gpt2), dtype=torch.float64)
    with mask(gpt2, values[1:], first_layer=1):
        masked = gpt2(sequence.tokens[None])
    with NEURONS.masked(gpt2, values[1:], 1):
        assert torch.equal(gpt2(sequence.tokens[None]), masked)


def test_sets_of_different_kinds_are_refused_in_one_list(gpt2):
    sets = [some_of(gpt2, HEADS), some_of(gpt2)]
    with pytest.raises(ValueError, match="sets of heads and neurons cannot be ablated in one list"), ablate(gpt2, sets):
        pass


@torch.no_grad()
@pytest.mark.parametrize("component", [None, *COMPONENTS.values()], ids=lambda component: component and component.name)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generation_is_that_of_transformers(architecture, component, tmp_path):
    """Greedy with the KV cache == greedy without == transformers' greedy with the weights of the components zeroed."""
    original = make_original(architecture)
    original.save_pretrained(tmp_path)
    model = load_model(tmp_path, device="cpu")
    components = some_of(model, component or NEURONS, share=0.4 if component else 0.0, seed=2)
    zero_in_transformers(original, architecture, components)
    prompt = torch.randint(VOCAB, (4, PROMPT), generator=torch.Generator().manual_seed(7))
    assert_generates_alike(model, original, components, prompt, CONTEXT - PROMPT)


@torch.no_grad()
@EACH_COMPONENT
def test_generation_of_the_embedded_model_is_that_of_transformers(embedded, component):
    """Learned positions, with the KV cache: the tiny models have no tokenizer, and TransformerLens then needs one."""
    components = some_of(embedded, component, share=0.2)
    original = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
    zero_in_transformers(original, "gpt2", components)
    prompt = torch.randint(1, 4000, (2, PROMPT), generator=torch.Generator().manual_seed(7))
    assert_generates_alike(embedded, original, components, prompt, 20)


def assert_generates_alike(model, original, components, prompt, new_tokens) -> None:
    expected = original.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert len(expected[:, PROMPT:].unique()) > 3
    for use_past_kv_cache in (True, False):
        with ablate(model, components):
            generated = model.generate(
                prompt, max_new_tokens=new_tokens, do_sample=False, stop_at_eos=False, verbose=False,
                prepend_bos=False, use_past_kv_cache=use_past_kv_cache,
            )  # fmt: skip
        assert torch.equal(generated, expected)
