import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from memloc_lens import Neurons, top_neurons

SETS = arrays(bool, (3, 5)).map(lambda members: Neurons(torch.from_numpy(members)))
SCORES = arrays("float32", (3, 20), elements=st.floats(-5, 5, width=32)).map(torch.from_numpy)


def pairs(neurons: Neurons) -> set[tuple[int, int]]:
    return {(layer, neuron) for layer, members in enumerate(neurons.per_layer()) for neuron in members}


@given(SETS, SETS)
def test_set_operations_are_those_of_python_sets(one, other):
    assert pairs(one | other) == pairs(one) | pairs(other)
    assert pairs(one & other) == pairs(one) & pairs(other)
    assert pairs(one - other) == pairs(one) - pairs(other)
    assert len(one) == len(pairs(one))
    assert (one == other) == (pairs(one) == pairs(other))
    either = pairs(one) | pairs(other)
    assert one.overlap(other) == (len(pairs(one) & pairs(other)) / len(either) if either else 0)


@given(SETS)
def test_save_and_load(tmp_path_factory, neurons):
    path = tmp_path_factory.mktemp("neurons") / "set.safetensors"
    neurons.save(path)
    assert Neurons.load(path) == neurons


def test_loading_something_else_is_one_clear_error(tmp_path):
    (tmp_path / "set").write_text("not neurons")
    with pytest.raises(ValueError, match="holds no set of neurons"):
        Neurons.load(tmp_path / "set")


@given(SCORES, st.floats(0.05, 1), st.integers(0, 2))
def test_top_neurons_beat_all_others_of_their_layer(scores, ratio, first_layer):
    neurons = top_neurons(scores, ratio, first_layer)
    for layer in range(3):
        chosen = neurons.members[layer]
        assert chosen.sum() == (0 if layer < first_layer else int(ratio * 20 + 1e-9))
        if chosen.any() and not chosen.all():
            assert scores[layer][chosen].min() >= scores[layer][~chosen].max()


@given(SCORES, st.floats(0.05, 1), st.integers(0, 2))
def test_global_top_neurons_beat_all_others(scores, ratio, first_layer):
    neurons = top_neurons(scores, ratio, first_layer, scope="global")
    assert len(neurons) == int(ratio * 20 * (3 - first_layer) + 1e-9)
    assert not neurons.members[:first_layer].any()
    chosen, rest = scores[neurons.members], scores[first_layer:][~neurons.members[first_layer:]]
    if len(rest):
        assert chosen.min() >= rest.max()


def test_equal_scores_are_taken_in_order():
    assert top_neurons(torch.zeros(1, 10), 0.3).per_layer() == [[0, 1, 2]]


@pytest.mark.parametrize(("rounding", "count"), [("down", 7), ("nearest", 8)])
def test_rounding(rounding, count):
    assert len(top_neurons(torch.rand(1, 768), 0.01, rounding=rounding)) == count


def test_a_whole_product_is_whole():
    assert len(top_neurons(torch.rand(1, 100), 0.29)) == 29


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.01, float("nan")])
def test_ratios_outside_are_refused(ratio):
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        top_neurons(torch.rand(2, 10), ratio)


def test_a_ratio_that_takes_none_is_refused():
    with pytest.raises(ValueError, match=r"takes none of 768 neurons; the smallest that takes one is 0\.0013"):
        top_neurons(torch.rand(2, 768), 0.001)


def test_scores_that_are_not_numbers_are_refused():
    scores = torch.rand(2, 10)
    scores[1, 3] = torch.nan
    with pytest.raises(ValueError, match="1 of 20 scores are NaN"):
        top_neurons(scores, 0.5)


def test_a_first_layer_past_the_end_is_refused():
    with pytest.raises(ValueError, match="layers 0 to 1"):
        top_neurons(torch.rand(2, 10), 0.5, first_layer=2)


def test_sets_of_different_models_do_not_mix():
    with pytest.raises(ValueError, match="different shape"):
        Neurons(torch.ones(2, 3, dtype=torch.bool)) | Neurons(torch.ones(2, 4, dtype=torch.bool))
