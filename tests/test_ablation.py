import pytest
import torch
from conftest import CONTEXT, PROMPT, VOCAB, assert_same_state, make_original, random_sequence, state_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memloc_lens import Neurons, ablate, mask, mean_activations

FUNCTION_FIXTURES = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None
)


def some_neurons(model, share: float = 0.3, seed: int = 0) -> Neurons:
    draw = torch.rand(model.cfg.n_layers, model.cfg.d_mlp, generator=torch.Generator().manual_seed(seed))
    return Neurons(draw < share)


def logits_with_rows_zeroed(model, neurons: Neurons, tokens: torch.Tensor) -> torch.Tensor:
    """The same ablation by hand: a neuron whose row of W_out is zero writes nothing."""
    kept = [block.mlp.W_out.data.clone() for block in model.blocks]
    for block, members in zip(model.blocks, neurons.members, strict=True):
        block.mlp.W_out.data[members] = 0
    logits = model(tokens, return_type="logits")
    for block, rows in zip(model.blocks, kept, strict=True):
        block.mlp.W_out.data = rows
    return logits


@torch.no_grad()
def test_zero_is_the_model_without_the_rows(any_model, sequence):
    neurons = some_neurons(any_model)
    tokens = torch.stack([sequence.tokens, random_sequence(1).tokens])
    clean = any_model(tokens, return_type="logits")
    with ablate(any_model, neurons):
        ablated = any_model(tokens, return_type="logits")
    assert torch.allclose(ablated, logits_with_rows_zeroed(any_model, neurons, tokens), atol=1e-10)
    assert not torch.allclose(ablated, clean, atol=1e-3)
    assert torch.equal(any_model(tokens, return_type="logits"), clean)


@torch.no_grad()
def test_scale_and_mean_do_what_they_say(gpt2, sequence):
    neurons = some_neurons(gpt2)
    name = "blocks.0.mlp.hook_post"  # nothing before it is changed, so its input is the clean one
    members = neurons.members[0]
    _, cache = gpt2.run_with_cache(sequence.tokens[None], names_filter=name)
    others = [random_sequence(seed, length) for seed, length in ((1, 9), (2, 12), (3, 12))]
    expected_mean = torch.cat([gpt2.run_with_cache(other.tokens[None])[1][name][0] for other in others]).mean(dim=0)

    def seen(**options) -> torch.Tensor:
        kept = []
        with (
            ablate(gpt2, neurons, **options),
            gpt2.hooks(fwd_hooks=[(name, lambda value, hook: kept.append(value.clone()))]),
        ):
            gpt2(sequence.tokens[None])
        return kept[0]

    scaled, averaged = seen(kind="scale", factor=0.25), seen(kind="mean", over=others)
    assert torch.allclose(scaled[..., members], 0.25 * cache[name][..., members])
    assert torch.allclose(averaged[..., members], expected_mean[members].expand_as(averaged[..., members]))
    for value in (scaled, averaged):
        assert torch.equal(value[..., ~members], cache[name][..., ~members])


def test_mean_activations_is_over_all_positions(gpt2):
    with pytest.raises(ValueError, match="over=sequences"):
        mean_activations(gpt2, [])


@torch.no_grad()
def test_contexts_nest(gpt2, sequence):
    first, second = some_neurons(gpt2, seed=1), some_neurons(gpt2, seed=2)
    with ablate(gpt2, first | second):
        together = gpt2(sequence.tokens[None])
    with ablate(gpt2, first):
        alone = gpt2(sequence.tokens[None])
        with ablate(gpt2, second):
            assert torch.equal(gpt2(sequence.tokens[None]), together)
        assert torch.equal(gpt2(sequence.tokens[None]), alone)


@FUNCTION_FIXTURES
@given(st.lists(st.sampled_from(["zero", "mean", "scale"]), max_size=4), st.booleans(), st.integers(0, 99))
def test_the_model_is_clean_afterwards_whatever_happens(gpt2, kinds, fails, seed):
    before = state_of(gpt2)
    sequence = random_sequence(seed)

    def nested(left: list[str]) -> None:
        if left:
            with ablate(gpt2, some_neurons(gpt2, seed=seed + len(left)), left[0], over=[sequence]):
                return nested(left[1:])
        gpt2(sequence.tokens[None], return_type=None)
        if fails:
            raise KeyboardInterrupt

    try:
        nested(kinds)
    except KeyboardInterrupt:
        assert fails
    assert_same_state(before, state_of(gpt2))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["zero", "mean", "scale"])
def test_a_list_ablates_another_set_in_each_row(gpt2, sequence, kind):
    sets = [some_neurons(gpt2, seed=seed) for seed in range(3)]
    over = mean_activations(gpt2, [random_sequence(7)])
    with ablate(gpt2, sets, kind, over=over):
        together = gpt2(sequence.tokens.expand(3, -1))
    for logits, neurons in zip(together, sets, strict=True):
        with ablate(gpt2, neurons, kind, over=[random_sequence(7)]):
            assert torch.allclose(gpt2(sequence.tokens[None])[0], logits, atol=1e-12)


@torch.no_grad()
def test_masks_differ_by_row(gpt2, sequence):
    sets = [some_neurons(gpt2, seed=seed) for seed in range(3)]
    rows = torch.stack([(~neurons.members).double() for neurons in sets])
    with mask(gpt2, rows):
        together = gpt2(sequence.tokens.expand(3, -1))
    for logits, neurons in zip(together, sets, strict=True):
        with ablate(gpt2, neurons):
            assert torch.allclose(gpt2(sequence.tokens[None])[0], logits, atol=1e-12)


def test_gradients_reach_a_mask_and_pass_through_an_ablation(gpt2, sequence):
    values = torch.ones(gpt2.cfg.n_layers, gpt2.cfg.d_mlp, dtype=torch.float64, requires_grad=True)
    neurons = some_neurons(gpt2)
    with mask(gpt2, values), ablate(gpt2, neurons):
        loss = gpt2(sequence.tokens[None], return_type="loss")
    (gradient,) = torch.autograd.grad(loss, values)
    assert (gradient[neurons.members] == 0).all()
    assert (gradient[~neurons.members] != 0).any()


def test_neurons_of_another_model_are_refused(gpt2):
    with pytest.raises(ValueError, match="do not fit"), ablate(gpt2, Neurons(torch.ones(3, 5, dtype=torch.bool))):
        pass
    with pytest.raises(ValueError, match="do not fit"), mask(gpt2, torch.ones(3, 5)):
        pass


def output_rows(original, architecture: str, layer: int) -> torch.Tensor:
    """The weights of transformers' own model that are a layer's W_out, [neuron, d_model]."""
    if architecture == "gpt2":
        return original.transformer.h[layer].mlp.c_proj.weight
    if architecture == "neox":
        return original.gpt_neox.layers[layer].mlp.dense_4h_to_h.weight.T
    return original.model.layers[layer].mlp.down_proj.weight.T


@torch.no_grad()
@pytest.mark.parametrize("ablated", [False, True])
@pytest.mark.parametrize("architecture", ["gpt2", "neox", "llama", "llama-tied"])
def test_generation_is_that_of_transformers(architecture, ablated, tmp_path):
    """Greedy with the KV cache == greedy without == transformers' greedy with the rows of W_out zeroed."""
    from memloc_lens import load_model

    original = make_original(architecture)
    original.save_pretrained(tmp_path)
    model = load_model(tmp_path, device="cpu")
    neurons = some_neurons(model, share=0.4 if ablated else 0.0)
    for layer, members in enumerate(neurons.members):
        output_rows(original, architecture, layer)[members] = 0
    prompt = torch.randint(VOCAB, (4, PROMPT), generator=torch.Generator().manual_seed(7))
    expected = original.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=CONTEXT - PROMPT, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert len(expected[:, PROMPT:].unique()) > 3
    for use_past_kv_cache in (True, False):
        with ablate(model, neurons):
            generated = model.generate(
                prompt, max_new_tokens=CONTEXT - PROMPT, do_sample=False, stop_at_eos=False, verbose=False,
                use_past_kv_cache=use_past_kv_cache,
            )  # fmt: skip
        assert torch.equal(generated, expected)
