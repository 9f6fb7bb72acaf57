"""Protect and Contrast: any localizer with a context."""

from dataclasses import replace

import naive
import pytest
import torch

from conftest import random_sequence
from memloc_lens import Activations, Contrast, Gradient, IterativeGradient, Protect, Slimming
from memloc_lens.localizers.context import check_disjoint, mean_over_context
from memloc_lens.localizers.wrappers import relied_on
from memloc_lens.sequence import MemorizedSequence

CONTEXT = tuple(random_sequence(seed, 10, 6) for seed in (7, 8, 9))
SEQUENCES = [random_sequence(0), random_sequence(1)]


def test_what_a_context_relies_on(gpt2):
    sizes = torch.stack([naive.gradient(gpt2, one, "probability", "neuron").abs() for one in CONTEXT]).mean(dim=0)
    found = relied_on(gpt2, CONTEXT, share=0.1)
    assert {tuple(index) for index in found.nonzero().tolist()} == naive.top(sizes, 12, 0, "layer")


@pytest.mark.parametrize("localizer", [Activations(), Slimming(steps=3), Gradient(), IterativeGradient(rounds=3)])
def test_protected_components_are_never_chosen(gpt2, localizer):
    protected = relied_on(gpt2, CONTEXT, share=0.3)
    scores = Protect(localizer, CONTEXT, share=0.3)(gpt2, SEQUENCES)
    assert scores.shape == (2, *protected.shape)
    assert scores[:, protected].max() < scores[:, ~protected].min()
    if not isinstance(localizer, IterativeGradient):
        assert torch.equal(scores[:, ~protected], localizer(gpt2, SEQUENCES)[:, ~protected])


def test_iterative_gradients_go_on_without_protected_components(gpt2):
    """Barring them afterwards gives other sets: the rounds would have gone on with them switched off."""
    localizer = IterativeGradient(rounds=3, max_ratio=0.5)
    protected = relied_on(gpt2, CONTEXT, share=0.3)
    scores = Protect(localizer, CONTEXT, share=0.3)(gpt2, SEQUENCES[0])
    assert torch.equal(scores, localizer(gpt2, SEQUENCES[0], spared=protected))
    afterwards = localizer(gpt2, SEQUENCES[0]).masked_fill(protected, -2)
    assert not torch.equal(scores > 1, afterwards > 1)


@pytest.mark.parametrize("localizer", [Activations(), Gradient(), Gradient(first_layer=1)])
def test_contrast(gpt2, localizer):
    of_context = torch.stack([localizer(gpt2, one) for one in CONTEXT]).double()
    for sequence, scores in zip(SEQUENCES, Contrast(localizer, CONTEXT)(gpt2, SEQUENCES), strict=True):
        own = localizer(gpt2, sequence).double()
        for layer in range(getattr(localizer, "first_layer", 0), 3):
            deviation = (of_context[:, layer] - of_context[:, layer].mean(dim=0)).square().sum(dim=0).div(2).sqrt()
            expected = (own[layer] - of_context[:, layer].mean(dim=0)) / (deviation + 0.3 * deviation.mean())
            assert torch.allclose(scores[layer].double(), expected, atol=1e-4)
        assert scores.isfinite().all()


def test_contrast_compares_a_localizer_without_a_context_of_its_own(gpt2):
    scores = Contrast(Gradient(context=CONTEXT), CONTEXT)(gpt2, SEQUENCES)
    assert torch.equal(scores, Contrast(Gradient(), CONTEXT)(gpt2, SEQUENCES))


@pytest.mark.parametrize("wrapper", [Protect, Contrast])
def test_the_context_must_not_be_measured(gpt2, wrapper):
    with pytest.raises(ValueError, match="'random-7' of the context and 'random-7'"):
        wrapper(Activations(), CONTEXT)(gpt2, [SEQUENCES[0], CONTEXT[0]])


def test_names():
    assert Protect(Slimming()).name == "protect-slimming"
    assert Contrast(Protect(Gradient())).name == "contrast-protect-gradient"


def test_disjoint_is_up_to_15_tokens():
    measured = MemorizedSequence(list(range(40)), 8, "measured")
    check_disjoint([MemorizedSequence([99, *range(10, 25), 98], 2, "fifteen")], [measured])
    with pytest.raises(ValueError, match="share 16 consecutive tokens"):
        check_disjoint([MemorizedSequence([99, *range(10, 26), 98], 2, "sixteen")], [measured])
    short = MemorizedSequence(range(20, 25), 2, "short")
    with pytest.raises(ValueError, match=r"'long' of the context and 'short', .* share 5 consecutive tokens"):
        check_disjoint([MemorizedSequence(range(40), 8, "long")], [short])


def test_means_over_a_context_are_those_of_all_its_sequences(gpt2):
    context = [random_sequence(seed, length=7 + seed % 3) for seed in range(35)]
    localizer = replace(Activations(), reduction="mean_abs")
    expected = localizer(gpt2, context).mean(dim=0)
    assert torch.allclose(mean_over_context(context, lambda part: localizer(gpt2, part)), expected, atol=1e-6)
