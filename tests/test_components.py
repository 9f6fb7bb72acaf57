import subprocess
import sys
from fractions import Fraction

import naive
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.torch import save_file

from conftest import EACH_COMPONENT, some_of
from memloc_lens import (
    COMPONENTS,
    HEADS,
    NEURONS,
    WEIGHTS,
    ComponentSet,
    Neurons,
    set_from_indices,
    top_components,
    top_neurons,
)
from memloc_lens.components import component_of, count_of

SHAPES = {"neuron": (3, 5), "head": (3, 4), "weight": (3, 5, 2)}
"""Small ones, whose bits do not fill whole bytes."""


def members_of(component) -> st.SearchStrategy:
    return arrays(bool, SHAPES[component.name]).map(torch.from_numpy)


def set_of(members: torch.Tensor, component) -> ComponentSet:
    return Neurons(members) if component is NEURONS else ComponentSet(members, component)


def python_set(members: torch.Tensor) -> set[tuple[int, ...]]:
    return set(map(tuple, members.nonzero().tolist()))


@EACH_COMPONENT
@given(data=st.data())
def test_set_operations_are_those_of_python_sets(component, data):
    tensors = [data.draw(members_of(component)) for _ in range(2)]
    (one, other), (first, second) = (set_of(tensor, component) for tensor in tensors), map(python_set, tensors)
    for ours, expected in ((one | other, first | second), (one & other, first & second), (one - other, first - second)):
        assert type(ours) is type(one)
        assert set(ours.indices()) == python_set(ours.members) == expected
        assert len(ours) == len(expected)
        assert ours.component is component
    assert one.indices() == sorted(first)
    assert one.counts() == [sum(index[0] == layer for index in first) for layer in range(3)]
    assert (one == other) == (first == second)
    assert one.overlap(other) == (len(first & second) / len(first | second) if first | second else 0)


@EACH_COMPONENT
@given(data=st.data())
def test_members_come_back_whole_and_by_layer(component, data):
    members = data.draw(members_of(component))
    chosen = set_of(members, component)
    assert torch.equal(chosen.members, members)
    assert all(torch.equal(chosen.layer(layer), members[layer]) for layer in range(3))
    assert chosen.per_layer() == [row.flatten().nonzero().flatten().tolist() for row in members]
    assert ComponentSet.from_layers(iter(members), component) == chosen


@EACH_COMPONENT
@given(data=st.data())
def test_save_and_load(tmp_path_factory, component, data):
    chosen = set_of(data.draw(members_of(component)), component)
    path = tmp_path_factory.mktemp("sets") / "set.safetensors"
    chosen.save(path)
    loaded = ComponentSet.load(path)
    assert loaded == chosen
    assert type(loaded) is type(chosen)
    assert torch.equal(loaded.members, chosen.members)


@pytest.mark.parametrize("component", [HEADS, WEIGHTS], ids=lambda component: component.name)
def test_sets_of_other_components_are_not_loaded_as_neurons(tmp_path, component):
    ComponentSet(torch.ones(SHAPES[component.name], dtype=torch.bool), component).save(tmp_path / "set")
    with pytest.raises(ValueError, match=rf"holds {component.plural}, not neurons; use ComponentSet\.load"):
        Neurons.load(tmp_path / "set")


def test_loading_something_else_is_one_clear_error(tmp_path):
    (tmp_path / "text").write_text("not a set")
    save_file({"members": torch.zeros(3)}, tmp_path / "tensors")
    save_file({"bits": torch.zeros(3)}, tmp_path / "unknown", metadata={"component": "layer"})
    for name in ("text", "tensors", "unknown", "missing"):
        for kind in (Neurons, ComponentSet):
            with pytest.raises(ValueError, match=rf"{name}' holds no set of components written by save"):
                kind.load(tmp_path / name)


@EACH_COMPONENT
def test_indices_there_and_back(gpt2, component):
    chosen = some_of(gpt2, component, share=0.1)
    assert set_from_indices(gpt2, chosen.indices(), component) == chosen
    assert type(set_from_indices(gpt2, [], component)) is type(chosen)
    if component is NEURONS:
        assert Neurons.from_indices(gpt2, iter(chosen.indices())) == chosen


@EACH_COMPONENT
def test_components_that_do_not_exist_are_refused(gpt2, component):
    shape = component.shape(gpt2)
    last = tuple(size - 1 for size in shape)
    assert set_from_indices(gpt2, [last], component).indices() == [last]
    outside = [(*last[:place], part, *last[place + 1 :]) for place, size in enumerate(shape) for part in (-1, size)]
    for index in (*outside, last[:-1], (*last, 0), ()):
        with pytest.raises(ValueError, match=rf"{component.name} \(.*\) does not exist; .* of shape \[3, "):
            set_from_indices(gpt2, [last, index], component)


@EACH_COMPONENT
def test_a_set_is_shown_in_a_few_words(component):
    members = torch.zeros(SHAPES[component.name], dtype=torch.bool)
    total = members.numel()
    assert repr(set_of(members, component)) == f"<0 of {total} {component.plural}>"
    members[1] = True
    assert repr(set_of(members, component)) == f"<{total // 3} of {total} {component.plural} in layers 1 to 1>"
    members[2, 0] = True
    assert repr(set_of(members, component)).endswith("in layers 1 to 2>")


@EACH_COMPONENT
def test_what_is_no_set_is_refused(component):
    axes = component.axes.replace(" ", ", ")
    for members in (torch.ones(SHAPES[component.name]), torch.ones(3, 5, 2, 2, dtype=torch.bool)):
        with pytest.raises(Exception, match=rf"a Boolean tensor \[{axes}\] was expected|Bool"):
            ComponentSet(members, component)


def test_sets_that_do_not_mix():
    def ones(*shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=torch.bool)

    neurons, heads = Neurons(ones(2, 3)), ComponentSet(ones(2, 3), HEADS)
    for other, message in ((heads, r"neurons \[2, 3\] and heads \[2, 3\]"), (Neurons(ones(2, 4)), r"\[2, 4\]")):
        assert neurons != other
        for mix in (neurons.__or__, neurons.__and__, neurons.__sub__, neurons.overlap):
            with pytest.raises(ValueError, match=f"sets of different kind or shape do not mix: .*{message}"):
                mix(other)


def test_components_have_names():
    assert {component_of(name) for name in COMPONENTS} == {NEURONS, HEADS, WEIGHTS}
    with pytest.raises(ValueError, match="component is 'layer'; it must be one of 'neuron', 'head', 'weight'"):
        component_of("layer")


@EACH_COMPONENT
@settings(deadline=None)
@given(data=st.data())
def test_top_components_are_those_of_a_full_sort(component, data):
    """With many ties, of which the first are taken."""
    elements = st.sampled_from([-2.0, 0.0, 0.5, 1.0, float("inf")])
    scores = torch.from_numpy(data.draw(arrays("float32", SHAPES[component.name], elements=elements)))
    scope, rounding = data.draw(st.sampled_from(["layer", "global"])), data.draw(st.sampled_from(["down", "nearest"]))
    first_layer, percent = data.draw(st.integers(0, 2)), data.draw(st.integers(25, 100))
    total = scores[first_layer:].numel() if scope == "global" else scores[0].numel()
    exact = Fraction(percent * total, 100)
    count, ratio = int(exact) if rounding == "down" else round(exact), percent / 100
    chosen = top_components(scores, ratio, first_layer, scope, rounding, component)
    assert set(chosen.indices()) == naive.top(scores, count, first_layer, scope)
    assert type(chosen) is (Neurons if component is NEURONS else ComponentSet)
    if component is NEURONS:
        assert top_neurons(scores, ratio, first_layer, scope, rounding) == chosen


@given(arrays("float32", (3, 20), elements=st.floats(-5, 5, width=32)), st.integers(5, 100), st.integers(0, 2))
def test_top_neurons_beat_all_others(array, percent, first_layer):
    scores = torch.from_numpy(array)
    by_layer, together = (top_neurons(scores, percent / 100, first_layer, scope) for scope in ("layer", "global"))
    for layer in range(3):
        chosen = by_layer.members[layer]
        assert chosen.sum() == (0 if layer < first_layer else percent * 20 // 100)
        if chosen.any() and not chosen.all():
            assert scores[layer][chosen].min() >= scores[layer][~chosen].max()
    assert len(together) == percent * 20 * (3 - first_layer) // 100
    assert not together.members[:first_layer].any()
    chosen, rest = scores[together.members], scores[first_layer:][~together.members[first_layer:]]
    if len(rest):
        assert chosen.min() >= rest.max()


def test_equal_scores_are_taken_in_order():
    assert top_neurons(torch.zeros(1, 10), 0.3).per_layer() == [[0, 1, 2]]
    assert top_neurons(torch.zeros(3, 4), 0.5, scope="global").per_layer() == [[0, 1, 2, 3], [0, 1], []]


@pytest.mark.parametrize(("rounding", "count"), [("down", 7), ("nearest", 8)])
def test_rounding(rounding, count):
    assert len(top_neurons(torch.rand(1, 768), 0.01, rounding=rounding)) == count == count_of(0.01, 768, rounding)


def test_a_whole_product_is_whole():
    assert len(top_neurons(torch.rand(1, 100), 0.29)) == 29


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.01, float("nan")])
def test_ratios_outside_are_refused(ratio):
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        top_neurons(torch.rand(2, 10), ratio)


@EACH_COMPONENT
def test_a_ratio_that_takes_none_is_refused(component):
    scores = torch.rand(2, 768, 2)[(..., 0) if component is not WEIGHTS else ...]
    total, smallest = (1536, "0.00065") if component is WEIGHTS else (768, "0.0013")
    message = f"takes none of {total} {component.plural}; the smallest that takes one is {smallest}"
    with pytest.raises(ValueError, match=message):
        top_components(scores, 0.0001, component=component)


@EACH_COMPONENT
def test_scores_that_are_not_numbers_are_refused(component):
    scores = torch.rand(SHAPES[component.name])
    scores[1, 3] = torch.nan
    message = rf"{scores[1, 3].numel()} of {scores.numel()} scores are NaN; {component.plural} cannot"
    with pytest.raises(ValueError, match=message):
        top_components(scores, 0.5, component=component)


def test_a_first_layer_past_the_end_is_refused():
    with pytest.raises(ValueError, match="layers 0 to 1"):
        top_neurons(torch.rand(2, 10), 0.5, first_layer=2)


PEAK_OF_A_LARGE_CHOICE = """
import resource, sys
import torch
from memloc_lens import WEIGHTS, ComponentSet, top_components

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
layers, neurons, d_model = 40, 1000, 500
scores = torch.rand(layers, neurons, d_model)
top_components(scores[:2, :10], 0.01, component=WEIGHTS)
before = peak()
for scope in ("layer", "global"):
    chosen = top_components(scores, 0.01, scope=scope, component=WEIGHTS)
    assert len(chosen) == scores.numel() // 100
    assert len(chosen | chosen) == len(chosen & chosen) == len(chosen)
    assert ComponentSet(chosen.members, WEIGHTS) == chosen
print((peak() - before) / (scores.numel() * scores.element_size()))
"""


@pytest.mark.slow
def test_sets_of_twenty_million_weights_take_less_memory_than_their_scores():
    pytest.importorskip("resource")
    command = [sys.executable, "-c", PEAK_OF_A_LARGE_CHOICE]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(finished.stdout) < 1
