import pytest
import torch

from conftest import EACH_COMPONENT, PROMPT, random_sequence, some_of
from memloc_lens import HEADS, NEURONS, WEIGHTS, ComponentSet, Neurons, ZeroOut, ablate
from memloc_lens.forward import PrefixCache, final_residual, run_layers
from memloc_lens.logits import target_logits, target_loss
from memloc_lens.metrics import perplexity, teacher_forced
from memloc_lens.sequence import Batch


def some_rows(count: int, prompt_len: int = PROMPT) -> Batch:
    return Batch(torch.stack([random_sequence(seed).tokens for seed in range(count)]), prompt_len)


def in_layers(model, component, layers: slice) -> ComponentSet:
    """Every other component of these layers."""
    members = torch.zeros(component.shape(model), dtype=torch.bool)
    members[layers, ::2] = True
    return Neurons(members) if component is NEURONS else ComponentSet(members, component)


@pytest.fixture
def runs(any_model, monkeypatch) -> list[int]:
    """The rows of each pass through the first layer, counted without a hook."""
    rows, first = [], any_model.blocks[0]
    original = first.forward

    def counted(stream, *rest, **options):
        rows.append(len(stream))
        return original(stream, *rest, **options)

    monkeypatch.setattr(first, "forward", counted)
    return rows


@EACH_COMPONENT
@torch.no_grad()
def test_a_prefix_cache_changes_nothing_and_runs_once(any_model, component, runs):
    sequences, batch = [random_sequence(seed) for seed in range(3)], some_rows(3)
    later = in_layers(any_model, component, slice(1, None))
    clean, predicted = final_residual(any_model, batch), teacher_forced(any_model, sequences)
    with ablate(any_model, later):
        ablated = final_residual(any_model, batch)
    assert not torch.allclose(clean, ablated, atol=1e-3)
    runs.clear()
    prefix = PrefixCache(any_model, layer=1)
    assert torch.allclose(final_residual(any_model, batch, prefix), clean, atol=1e-12)
    for _ in range(2):
        with ablate(any_model, later):
            assert torch.allclose(final_residual(any_model, batch, prefix), ablated, atol=1e-12)
    again = teacher_forced(any_model, sequences, prefix=prefix)
    assert all(torch.equal(one, other) for one, other in zip(predicted, again, strict=True))
    assert runs == [3]
    final_residual(any_model, batch[:2], prefix)
    assert runs == [3, 2]
    final_residual(any_model, batch)
    assert runs == [3, 2, 3]


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_metrics_with_a_prefix_are_those_without(any_model, layer):
    sequences, text = [random_sequence(seed, length) for seed, length in enumerate((9, 14, 9))], some_rows(4).tokens
    prefix = PrefixCache(any_model, layer)
    for components in (None, in_layers(any_model, HEADS, slice(layer, None))):
        with ablate(any_model, components or Neurons.from_indices(any_model, [])):
            expected = [*teacher_forced(any_model, sequences), torch.tensor(perplexity(any_model, text))]
            for _ in range(2):
                found = teacher_forced(any_model, sequences, prefix=prefix)
                assert all(torch.equal(one, other) for one, other in zip(found, expected[:-1], strict=True))
                assert perplexity(any_model, text, prefix=prefix) == pytest.approx(expected[-1].item())


@torch.no_grad()
@pytest.mark.parametrize("filled", [True, False])
@pytest.mark.parametrize(
    ("component", "name"),
    [
        (NEURONS, r"blocks\.1\.mlp\.hook_post"),
        (HEADS, r"blocks\.1\.attn\.hook_z"),
        (WEIGHTS, r"blocks\.1\.mlp"),
    ],
    ids=["neuron", "head", "weight"],
)
def test_a_prefix_refuses_ablations_before_its_layer(gpt2, component, name, filled):
    prefix, batch = PrefixCache(gpt2, layer=2), some_rows(2)
    if filled:
        final_residual(gpt2, batch, prefix)
    message = rf"^{name} has a hook, and the prefix cache holds layers before 2 without it; ablate layer 2"
    with ablate(gpt2, in_layers(gpt2, component, slice(1, 2))), pytest.raises(ValueError, match=message):
        final_residual(gpt2, batch, prefix)
    with ablate(gpt2, in_layers(gpt2, component, slice(2, 3))):
        assert torch.allclose(final_residual(gpt2, batch, prefix), final_residual(gpt2, batch), atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["hook_embed", "blocks.0.hook_resid_pre", "blocks.1.attn.hook_q", "blocks.1.ln2.hook_scale"]
)
def test_a_prefix_refuses_hooks_of_users_before_its_layer(gpt2, name):
    prefix, batch = PrefixCache(gpt2, layer=2), some_rows(2)
    final_residual(gpt2, batch, prefix)
    with (
        gpt2.hooks(fwd_hooks=[(name, lambda activations, hook: activations * 2)]),
        pytest.raises(ValueError, match=f"^{name} has a hook"),
    ):
        final_residual(gpt2, batch, prefix)
    for later in ("blocks.2.hook_resid_pre", "ln_final.hook_scale"):
        with gpt2.hooks(fwd_hooks=[(later, lambda activations, hook: activations * 2)]):
            assert torch.allclose(final_residual(gpt2, batch, prefix), final_residual(gpt2, batch), atol=1e-12)
    handle = gpt2.blocks[2].register_forward_hook(lambda block, given, output: output * 2)
    try:
        assert torch.allclose(final_residual(gpt2, batch, prefix), final_residual(gpt2, batch), atol=1e-12)
    finally:
        handle.remove()


@torch.no_grad()
def test_a_prefix_serves_one_model(gpt2, any_model):
    prefix = PrefixCache(gpt2, layer=1)
    with pytest.raises(ValueError, match="serves the model it was made for; make another PrefixCache"):
        final_residual(any_model, some_rows(2), prefix)
    with pytest.raises(ValueError, match="first_layer is 3; the model has layers 0 to 2"):
        PrefixCache(gpt2, layer=3)


def test_a_prefix_without_a_graph_is_not_used_for_gradients(gpt2, sequence):
    prefix, batch = PrefixCache(gpt2, layer=1), some_rows(2)
    with torch.no_grad():
        final_residual(gpt2, batch, prefix)
    values = torch.ones(NEURONS.shape(gpt2), dtype=torch.float64, requires_grad=True)
    gradients = []
    for given in (None, prefix):
        with NEURONS.masked(gpt2, values):
            loss = target_loss(gpt2, final_residual(gpt2, batch, given), batch).sum()
        gradients.append(torch.autograd.grad(loss, values)[0])
    assert torch.equal(*gradients)
    assert (gradients[0][0] != 0).any()


def test_localizers_do_not_read_a_prefix(gpt2, sequence):
    expected = ZeroOut(candidates=0.2)(gpt2, sequence)
    teacher_forced(gpt2, [sequence], prefix=PrefixCache(gpt2, layer=1))
    assert torch.equal(ZeroOut(candidates=0.2)(gpt2, sequence), expected)


@EACH_COMPONENT
@torch.no_grad()
@pytest.mark.parametrize("prompt_len", [1, 2, PROMPT, 13])
def test_the_last_layer_at_the_targets_alone_is_the_whole_one(any_model, component, prompt_len):
    batch = some_rows(2, prompt_len)
    with ablate(any_model, some_of(any_model, component)):
        expected = any_model(batch.tokens, return_type="logits")[:, prompt_len - 1 : -1]
        assert torch.allclose(target_logits(any_model, final_residual(any_model, batch)), expected, atol=1e-10)
        for start in range(1, any_model.cfg.n_layers + 1):
            entering = any_model(batch.tokens, stop_at_layer=start)
            residual = run_layers(any_model, entering, start, prompt_len)
            assert torch.allclose(target_logits(any_model, residual), expected, atol=1e-10)
