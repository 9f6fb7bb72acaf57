"""What all localizers have in common."""

from dataclasses import replace

import pytest
import torch

from conftest import assert_same_state, random_sequence, state_of
from memloc_lens import (
    COMPONENTS,
    LOCALIZERS,
    NEURONS,
    Activations,
    Gradient,
    HardConcrete,
    IntegratedGradients,
    IterativeGradient,
    MemorizedSequence,
    Random,
    Slimming,
    WeightNorm,
    ZeroOut,
)
from memloc_lens.components import Component
from memloc_lens.localizers import METHODS

FAST = [
    HardConcrete(steps=11, lr=0.1, stop_loss=0),
    Slimming(steps=11, lr=0.02, stop_loss=0),
    ZeroOut(),
    IntegratedGradients(steps=3),
    Activations(),
    Gradient(),
    IterativeGradient(rounds=3),
    WeightNorm(),
    Random(),
]
OTHER_COMPONENTS = [
    replace(localizer, component=component, **({"steps": 4} if hasattr(localizer, "steps") else {}))
    for component in ("head", "weight")
    for localizer in FAST
    if hasattr(localizer, "component") and (component, localizer.name) != ("weight", "zero-out")
]


def component_of(localizer) -> Component:
    return COMPONENTS[getattr(localizer, "component", "neuron")]


EACH = pytest.mark.parametrize(
    "localizer", FAST + OTHER_COMPONENTS, ids=lambda localizer: f"{localizer.name}-{component_of(localizer).name}"
)


def test_all_are_tested():
    assert [type(localizer) for localizer in FAST] == list(METHODS)
    assert {localizer.name: localizer for localizer in METHODS} == LOCALIZERS


@EACH
def test_scores_of_a_list_are_those_of_its_members(any_model, localizer):
    """Whatever the batch: equal lengths go together, other lengths apart, and the order stays."""
    sequences = [
        random_sequence(0),
        random_sequence(1, length=11),
        random_sequence(2),
        random_sequence(3, prompt_len=4),
    ]
    together = localizer(any_model, sequences)
    assert together.shape == (4, *component_of(localizer).shape(any_model))
    assert together.dtype == torch.float32
    for scores, sequence in zip(together, sequences, strict=True):
        assert torch.allclose(scores, localizer(any_model, sequence), atol=1e-6)


@EACH
def test_the_model_is_left_as_found(gpt2, localizer, sequence):
    gpt2.train()
    gpt2.blocks[0].eval()
    gpt2.blocks[1].mlp.W_out.requires_grad_(False)
    gpt2.unembed.W_U.grad = torch.ones_like(gpt2.unembed.W_U)
    before = state_of(gpt2)
    try:
        localizer(gpt2, sequence)
        assert_same_state(before, state_of(gpt2))
    finally:
        gpt2.eval().requires_grad_(True)
        gpt2.unembed.W_U.grad = None


@EACH
def test_the_model_is_left_as_found_after_an_exception(gpt2, localizer, sequence, monkeypatch):
    before = state_of(gpt2)

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    for place in ("zero_out", "integrated_gradients", "learned_masks", "activations", "baselines", "gradients"):
        for name in ("target_loss", "target_losses", "target_log_odds", "output_norms", "einsum"):
            monkeypatch.setattr(f"memloc_lens.localizers.{place}.{name}", fail, raising=False)
    monkeypatch.setattr(torch, "rand", fail)
    with pytest.raises(KeyboardInterrupt):
        localizer(gpt2, sequence)
    assert_same_state(before, state_of(gpt2))


@EACH
def test_works_under_no_grad(gpt2, localizer, sequence):
    with torch.no_grad():
        assert torch.equal(localizer(gpt2, sequence), localizer(gpt2, sequence))


@pytest.mark.parametrize(
    "localizer",
    [entry for entry in FAST + OTHER_COMPONENTS if hasattr(entry, "first_layer")],
    ids=lambda localizer: f"{localizer.name}-{component_of(localizer).name}",
)
def test_first_layer_leaves_earlier_layers_at_zero(gpt2, localizer, sequence):
    scores = replace(localizer, first_layer=1)(gpt2, sequence)
    assert (scores[0] == 0).all()
    assert (scores[1:] != 0).flatten(1).any(dim=1).all()
    if isinstance(localizer, ZeroOut | IntegratedGradients):
        assert torch.allclose(scores[1:], localizer(gpt2, sequence)[1:])


@pytest.mark.parametrize("component", COMPONENTS)
def test_masks_leave_earlier_layers_alone(any_model, sequence, component):
    """No noise, no regularizer and no change of what they write: the same scores as of the layers alone."""
    seen = []
    name = NEURONS.activations_at(0)
    with any_model.hooks(fwd_hooks=[(name, lambda activations, hook: seen.append(activations.clone()))]):
        HardConcrete(steps=3, first_layer=1, stop_loss=0, component=component)(any_model, sequence)
        masked = len(seen)
        any_model(sequence.tokens[None])
    assert masked == 1  # nothing before the first masked layer runs twice
    torch.testing.assert_close(seen[0], seen[-1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("localizer", [Slimming(steps=200, lr=0.05, stop_loss=0.5, penalty=100.0),
                                       HardConcrete(steps=200, lr=0.05, stop_loss=0.5, penalty=100.0)])  # fmt: skip
def test_masks_stop_where_they_are_told(gpt2, sequence, localizer):
    stopped = localizer(gpt2, sequence)
    assert not torch.equal(stopped, replace(localizer, stop_loss=0.0)(gpt2, sequence))
    assert torch.equal(stopped, replace(localizer, steps=100)(gpt2, sequence))


def test_masks_keep_what_the_loss_needs(gpt2, sequence):
    """Neurons that write nothing are the first to go."""
    dead = [1, 4, 8]
    rows = gpt2.blocks[1].mlp.W_out.data
    kept = rows[dead].clone()
    rows[dead] = 0
    try:
        scores = Slimming(steps=30, lr=0.02, penalty=0.1, stop_loss=0)(gpt2, sequence)[1]
    finally:
        rows[dead] = kept
    assert scores[dead].max() <= scores.median()


def test_sequences_that_do_not_fit_are_refused(gpt2):
    with pytest.raises(ValueError, match="has 41 tokens, and the model reads at most 40"):
        Activations()(gpt2, random_sequence(length=41))
    with pytest.raises(ValueError, match="the model knows 0 to 96"):
        Activations()(gpt2, MemorizedSequence(torch.tensor([3, 97]), 1))
    with pytest.raises(ValueError, match="no sequence"):
        Activations()(gpt2, [])


def test_not_every_method_scores_every_component(gpt2, sequence):
    with pytest.raises(ValueError, match="ZeroOut has no exact form for every weight; it scores neurons and heads"):
        ZeroOut(component="weight")
    assert not hasattr(IntegratedGradients(), "component")
