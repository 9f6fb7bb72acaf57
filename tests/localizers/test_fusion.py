"""Fusion of ranks against loops over all components, and its weights against a search by hand."""

from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import naive
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model, tiny_sequence

from conftest import assert_same_state, state_of
from memloc_lens import COMPONENTS, Activations, Contrast, Fusion, Protect, Random, WeightNorm, fit_fusion
from memloc_lens.equal_damage import lost_at
from memloc_lens.localizers import Slimming
from memloc_lens.localizers.fusion import simplex

SEQUENCES = [tiny_sequence(2), tiny_sequence(3, length=7)]
OTHERS = [tiny_sequence(4), tiny_sequence(5, length=9)]
EACH_COMPONENT = pytest.mark.parametrize("component", COMPONENTS)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def naive_ranks(scores: torch.Tensor) -> torch.Tensor:
    """Of each component: the share of the others of its layer that score lower; of equal ones half."""
    ranks = torch.zeros_like(scores)
    for layer in range(len(scores)):
        values = scores[layer].flatten().tolist()
        found = [
            (sum(other < value for other in values) + (values.count(value) - 1) / 2) / (len(values) - 1)
            for value in values
        ]
        ranks[layer] = torch.tensor(found).view_as(scores[layer])
    return ranks


@EACH_COMPONENT
def test_scores_are_weighted_ranks(model, component):
    localizers = (Activations(component=component), WeightNorm(component=component), Random(component=component))
    weights = (0.2, 0.5, 1.0)
    scores = Fusion(localizers, weights)(model, SEQUENCES)
    for sequence, found in zip(SEQUENCES, scores, strict=True):
        expected = [
            w * naive_ranks(localizer(model, sequence)) for w, localizer in zip(weights, localizers, strict=True)
        ]
        assert torch.allclose(found, sum(expected))
        assert torch.allclose(Fusion(localizers, weights)(model, sequence), found)
    assert scores.dtype == torch.float32


def fixed(values: list[list[float]], **fields):
    """A localizer with these scores for every sequence."""

    @dataclass(frozen=True)
    class Fixed:
        name: ClassVar[str] = "fixed"
        first_layer: int = fields.get("first_layer", 0)

        def __call__(self, model, sequences):
            scores = torch.tensor(values)
            return scores.expand(len(sequences), *scores.shape) if isinstance(sequences, list) else scores

    return Fixed()


def test_equal_scores_share_their_rank(model):
    scores = Fusion((fixed([[1.0, 1, 1, 1, 1, 1], [0, 3, 3, 3, -1, 7]]),), (2.0,))(model, SEQUENCES[0])
    assert torch.allclose(scores, 2 * torch.tensor([[0.5] * 6, [0.2, 0.6, 0.6, 0.6, 0, 1]]))


def test_layers_that_a_localizer_leaves_out_add_nothing(model):
    """Whatever is around it."""
    masks = Slimming(steps=3, first_layer=1)
    context = tuple(OTHERS)
    for localizer in (masks, Protect(masks, context, share=0.2), Contrast(masks, context), Fusion((masks,), (1.0,))):
        both = Fusion((localizer, Activations()), (1.0, 0.5))(model, SEQUENCES[0])
        alone = Fusion((Activations(),), (0.5,))(model, SEQUENCES[0])
        assert torch.equal(both[0], alone[0])
        assert not torch.equal(both[1], alone[1])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(-2, 9), st.floats(-5, 100)), min_size=1, max_size=5), st.floats(0, 10))
def test_lost_at(shares, points):
    """By hand: the most that is lost without more damage, plus its part of the way to the next measured damage."""
    shares = [(max(damage, 0.0), lost) for damage, lost in [(0.0, 0.0), *shares]]

    def most(limit: float) -> float:
        return max(lost for damage, lost in shares if damage <= limit)

    below = max(damage for damage, _ in shares if damage <= points)
    expected = most(points)
    if above := [damage for damage, _ in shares if damage > points]:
        expected += (most(min(above)) - most(points)) * ((points - below) / (min(above) - below))
    found = lost_at(points, [damage for damage, _ in shares[1:]], [lost for _, lost in shares[1:]])
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_the_simplex_is_whole():
    for size, grid in product((1, 2, 3), (1, 2, 4)):
        steps = [index / grid for index in range(grid + 1)]
        assert list(simplex(size, grid)) == [w for w in product(steps, repeat=size) if sum(w) == 1]


def naive_accuracy(model, sequence, masks) -> float:
    predicted = naive.masked_logits(model, sequence.tokens[None], {"neuron": masks})[0].argmax(-1)
    right = [predicted[t - 1] == sequence.tokens[t] for t in range(sequence.prompt_len, len(sequence.tokens))]
    return 100 * sum(bool(value) for value in right) / len(right)


@torch.no_grad()
def test_weights_are_the_best_of_the_grid(model):
    """Of sequences that the model recites, on which one localizer is better than the other."""
    sequences = [recited(model, tiny_sequence(seed, length=18, prompt_len=2)) for seed in range(4)]
    dev, others = sequences[:2], sequences[2:]
    localizers, ratios, ones = (Random(seed=3), Activations()), (0.2, 0.5), torch.ones(2, 6)
    values = {}
    for weights in [(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)]:
        each = []
        for sequence in dev:
            ranks = [naive_ranks(localizer(model, sequence)) for localizer in localizers]
            lost, damages = [], []
            for ratio in ratios:
                masks = ones.clone()
                for place in naive.top(weights[0] * ranks[0] + weights[1] * ranks[1], int(ratio * 6), 1, "layer"):
                    masks[place] = 0
                lost.append(naive_accuracy(model, sequence, ones) - naive_accuracy(model, sequence, masks))
                falls = [naive_accuracy(model, other, ones) - naive_accuracy(model, other, masks) for other in others]
                damages.append(sum(falls) / len(falls))
            each.append(lost_at(30.0, damages, lost))
        values[weights] = sum(each) / len(each)
    assert len(set(values.values())) == 3
    before = state_of(model)
    fitted = fit_fusion(model, dev, others, localizers, first_layer=1, ratios=ratios, points=30.0, grid=2)
    assert_same_state(before, state_of(model))
    assert fitted == Fusion(localizers, max(values, key=values.__getitem__))


def recited(model, sequence):
    """The sequence with the suffix that the model predicts."""
    tokens = sequence.tokens.clone()
    for position in range(sequence.prompt_len, len(tokens)):
        tokens[position] = model(tokens[None, :position], return_type="logits")[0, -1].argmax()
    return type(sequence)(tokens, sequence.prompt_len, sequence.id)


def test_of_equal_weightings_the_even_one_is_taken(model):
    twice = (Activations(), Activations())
    assert fit_fusion(model, SEQUENCES, OTHERS, twice, ratios=(0.5,), grid=2).weights == (0.5, 0.5)


ONE = (Activations(),)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: Fusion((), ()), "no localizer was given"),
        (lambda model: Fusion((Activations,), (1.0,)), "among the localizers is"),
        (lambda model: Fusion(ONE, (1.0, 2.0)), "2 weights for 1 localizers"),
        (lambda model: Fusion(ONE, (-1.0,)), "the weight is -1"),
        (lambda model: Fusion(ONE, (float("nan"),)), "the weight is nan"),
        (lambda model: Fusion(ONE, (0.0,)), "all weights are 0"),
        (
            lambda model: Fusion((Activations(), WeightNorm("head")), (1.0, 1.0)),
            "activations scores neurons, weight-norm",
        ),
        (lambda model: fit_fusion(model, [], OTHERS, ONE), "0 dev sequences"),
        (lambda model: fit_fusion(model, SEQUENCES, [], ONE), "0 others"),
        (lambda model: fit_fusion(model, SEQUENCES, SEQUENCES[:1], ONE), "'tiny-2' of the context"),
        (lambda model: fit_fusion(model, SEQUENCES, OTHERS, ()), "no localizer was given"),
        (lambda model: fit_fusion(model, SEQUENCES, OTHERS, ONE, first_layer=2), "first_layer is 2"),
        (lambda model: fit_fusion(model, SEQUENCES, OTHERS, ONE, ratios=()), "no ratio was given"),
        (lambda model: fit_fusion(model, SEQUENCES, OTHERS, ONE, ratios=(0.0,)), "the ratio is 0"),
        (lambda model: fit_fusion(model, SEQUENCES, OTHERS, ONE, ratios=(0.01,)), "takes none of 6 neurons"),
        (lambda model: fit_fusion(model, SEQUENCES, OTHERS, ONE, points=-1.0), "points is -1"),
        (lambda model: fit_fusion(model, SEQUENCES, OTHERS, ONE, grid=0), "grid is 0"),
    ],
)
def test_wrong_use(model, make, message):
    with pytest.raises(ValueError, match=message):
        make(model)
