"""Every localizer against its formula, on every architecture, and against captum, at float64."""

from dataclasses import replace

import naive
import pytest
import torch
from captum.attr import IntegratedGradients as CaptumIntegratedGradients

from conftest import random_sequence
from memloc_lens import (
    COMPONENTS,
    Activations,
    HardConcrete,
    IntegratedGradients,
    Random,
    Slimming,
    WeightNorm,
    ZeroOut,
    top_components,
)
from memloc_lens.forward import clean_pass
from memloc_lens.localizers.zero_out import _residuals_by_masking, _residuals_without, estimated_rises
from memloc_lens.sequence import Batch


def close(scores: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> bool:
    return bool((scores - expected).norm() < tolerance * expected.norm())


EACH = pytest.mark.parametrize("component", COMPONENTS)


@pytest.mark.parametrize("component", ["neuron", "head"])
def test_zero_out(any_model, sequence, component):
    expected = naive.zero_out(any_model, sequence, component)
    assert close(ZeroOut(component=component)(any_model, sequence), expected)


@EACH
@pytest.mark.parametrize("reduction", ["abs_mean", "mean_abs"])
def test_activations(any_model, sequence, reduction, component):
    expected = naive.activations(any_model, sequence, reduction, component)
    assert close(Activations(reduction, component)(any_model, sequence), expected)


def test_integrated_gradients(any_model, sequence):
    scores = IntegratedGradients(steps=5)(any_model, sequence)
    assert close(scores, naive.integrated_gradients(any_model, sequence, steps=5))


def test_gradients_of_a_lone_step_are_taken_at_zero(any_model, sequence):
    scores = IntegratedGradients(steps=1)(any_model, sequence)
    assert close(scores, naive.integrated_gradients(any_model, sequence, steps=1))
    assert not close(scores, naive.integrated_gradients(any_model, sequence, 1, fractions=[1]), tolerance=0.1)


def test_integrated_gradients_by_captum(gpt2):
    """Captum integrates the activations of the last position; with one target the two must agree in the limit."""
    sequence = random_sequence(length=9, prompt_len=8)
    prefix, layer, steps = sequence.tokens[None, :-1], 1, 500

    def gold_probability(values: torch.Tensor) -> torch.Tensor:
        def write(activations, hook):
            return torch.cat([activations[:, :-1], values[:, None]], dim=1)

        logits = gpt2.run_with_hooks(
            prefix.expand(len(values), -1), return_type="logits", fwd_hooks=[(naive.hook_name(layer), write)]
        )
        return logits[:, -1].softmax(-1)[:, sequence.tokens[-1]]

    clean = naive.post_activations(gpt2, sequence)[layer, -2:-1]
    expected = CaptumIntegratedGradients(gold_probability).attribute(
        clean, n_steps=steps, method="riemann_trapezoid", internal_batch_size=100
    )
    assert close(IntegratedGradients(steps)(gpt2, sequence)[layer], expected[0], tolerance=1e-2)


def test_integrated_gradients_add_up_to_the_probability_gained(gpt2):
    """Completeness (Sundararajan et al., 2017): with many steps the scores of a layer sum to p(full) - p(zeroed)."""
    sequence = random_sequence(length=9, prompt_len=8)
    layer = 2

    def probability(scale: float) -> torch.Tensor:
        def hook(activations, hook):
            activations[:, -2] *= scale
            return activations

        logits = gpt2.run_with_hooks(
            sequence.tokens[None], return_type="logits", fwd_hooks=[(naive.hook_name(layer), hook)]
        )
        return logits[0, -2].softmax(-1)[sequence.tokens[-1]]

    total = IntegratedGradients(steps=2000)(gpt2, sequence)[layer].sum()
    assert total.item() == pytest.approx((probability(1.0) - probability(0.0)).item(), rel=1e-2)


def test_zero_out_is_the_derivative_for_a_small_weight(gpt2, sequence):
    """Finite differences: scaling a neuron by 1 - h changes the loss by about h times its first-order term."""
    post = naive.post_activations(gpt2, sequence)[0, :, 3].requires_grad_(True)

    def write(activations, hook):
        return torch.cat([activations[..., :3], post[None, :, None], activations[..., 4:]], dim=-1)

    loss = naive.suffix_loss(gpt2, sequence, [(naive.hook_name(0), write)])
    (gradient,) = torch.autograd.grad(loss, post)
    h = 1e-5

    def shrink(activations, hook):
        activations[..., 3] *= 1 - h
        return activations

    change = naive.suffix_loss(gpt2, sequence, [(naive.hook_name(0), shrink)]) - loss
    assert change.item() == pytest.approx((-h * gradient * post).sum().item(), rel=1e-3)


@EACH
def test_slimming(any_model, sequence, component):
    settings = dict(steps=12, lr=0.05, penalty=3.0, component=component)
    scores = Slimming(**settings, stop_loss=0)(any_model, sequence)
    assert close(scores, naive.slimming(any_model, sequence, **settings))
    assert scores.std() > 0.001


@EACH
def test_hard_concrete(any_model, sequence, component):
    settings = dict(steps=12, lr=0.05, penalty=3.0, init=0.7, temperature=0.5, seed=3, component=component)
    scores = HardConcrete(**settings, stop_loss=0)(any_model, sequence)
    assert close(scores, naive.hard_concrete(any_model, sequence, **settings))
    assert scores.std() > 0.001


@EACH
def test_weight_norm(any_model, sequence, component):
    assert close(WeightNorm(component)(any_model, sequence), naive.weight_norms(any_model, component))


@EACH
def test_random_is_uniform_and_seeded(any_model, sequence, component):
    scores = Random(seed=1, component=component)(any_model, sequence)
    assert scores.shape == naive.shape_of(any_model, component)
    assert torch.equal(scores, Random(seed=1, component=component)(any_model, sequence))
    assert not torch.equal(scores, Random(seed=2, component=component)(any_model, sequence))
    assert not torch.equal(scores, Random(seed=1, component=component)(any_model, random_sequence(seed=5)))
    assert scores.mean().item() == pytest.approx(0.5, abs=5 / (12 * scores.numel()) ** 0.5)
    assert 0 <= scores.min() < scores.max() < 1


def test_zero_out_by_masking_is_the_rank_one_form(gpt2, sequence):
    """The form for models with a norm after the MLP must agree where both hold."""
    other = random_sequence(1)
    clean = clean_pass(gpt2, torch.stack([sequence.tokens, other.tokens]))
    row, neuron = torch.tensor([0, 1, 1]), torch.tensor([0, 5, 9])
    by_rank_one = _residuals_without(gpt2, clean, 1, row, neuron)
    assert torch.allclose(_residuals_by_masking(gpt2, clean, 1, row, neuron), by_rank_one, atol=1e-12)


@pytest.mark.parametrize("first_layer", [0, 1, 2])
@pytest.mark.parametrize("localizer", [Slimming(steps=12, lr=0.02, stop_loss=0), HardConcrete(steps=12, stop_loss=0)])
def test_masks_of_a_model_with_a_norm_after_the_mlp(gpt2, sequence, localizer, first_layer, monkeypatch):
    """The form that runs the first masked layer again must agree where both hold."""
    localizer = replace(localizer, first_layer=first_layer)
    scores = localizer(gpt2, sequence)
    monkeypatch.setattr("memloc_lens.forward.norm_after_mlp", lambda model: True)
    assert torch.allclose(localizer(gpt2, sequence), scores, atol=1e-6)


@EACH
def test_estimated_rises_are_slopes_of_the_loss(any_model, sequence, component):
    """Central differences of the loss by the mask of one component."""
    batch = Batch(sequence.tokens[None], sequence.prompt_len)
    estimates = estimated_rises(any_model, batch, COMPONENTS[component])[0]
    for layer, unit in ((0, 3), (1, 2), (2, 1)):
        place = (layer, unit, 5)[: estimates.ndim]

        def loss(factor: float, place: tuple[int, ...] = place) -> float:
            masks = torch.ones(estimates.shape, dtype=torch.float64)
            masks[place] = factor
            return naive.suffix_loss(any_model, sequence, masks={component: masks}).item()

        slope = (loss(1 - 1e-4) - loss(1 + 1e-4)) / 2e-4
        assert estimates[place].item() == pytest.approx(slope, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize(("component", "share"), [("neuron", 0.25), ("head", 0.5)])
def test_candidates_are_scored_exactly_and_the_rest_below(any_model, sequence, component, share):
    exact = ZeroOut(component=component)(any_model, sequence)
    some = ZeroOut(candidates=share, component=component)(any_model, sequence)
    batch = Batch(sequence.tokens[None], sequence.prompt_len)
    estimates = estimated_rises(any_model, batch, COMPONENTS[component])[0]
    chosen = top_components(estimates, share, rounding="nearest", component=COMPONENTS[component]).members
    assert 0 < chosen.sum() < chosen.numel()
    assert torch.allclose(some[chosen], exact[chosen], atol=1e-6)
    for layer, members in zip(some, chosen, strict=True):
        assert (layer[~members] == layer[members].min()).all()
