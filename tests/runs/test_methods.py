from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch

from conftest import random_sequence
from memloc_lens import (
    HEADS,
    LOCALIZERS,
    NEURONS,
    WEIGHTS,
    Activations,
    Contrast,
    Gradient,
    HardConcrete,
    IntegratedGradients,
    Protect,
    Random,
    Slimming,
    WeightNorm,
    ZeroOut,
)
from memloc_lens.runs.methods import checked_scores, configured, default_methods, name_of, resolve, settings_of


@dataclass(frozen=True)
class MyOwnMethod:
    strength: float = 1.0
    where: Path = Path("here")

    def __call__(self, model, sequences):
        return self.strength * torch.rand(len(sequences), *NEURONS.shape(model))


@dataclass(frozen=True)
class Layered(MyOwnMethod):
    name = "by-layer"
    first_layer: int = 0
    component: str = "neuron"


class Plain:
    def __call__(self, model, sequences):
        return torch.rand(len(sequences), *NEURONS.shape(model))


def my_function(model, sequences):
    return torch.rand(len(sequences), *NEURONS.shape(model))


@pytest.mark.parametrize(
    ("localizer", "name"),
    [
        (HardConcrete(), "hard-concrete"),
        (MyOwnMethod(), "my-own-method"),
        (Layered(), "by-layer"),
        (Plain(), "plain"),
        (my_function, "my-function"),
        (partial(my_function), "partial"),
    ],
)
def test_names(localizer, name):
    assert name_of(localizer) == name


def test_settings_are_the_fields_and_where_the_code_is():
    here = __name__
    assert settings_of(MyOwnMethod(2.0)) == {
        "callable": f"{here}:MyOwnMethod",
        "strength": 2.0,
        "where": Path("here"),
    }
    assert settings_of(Plain()) == {"callable": f"{here}:Plain"}
    assert settings_of(my_function) == {"callable": f"{here}:my_function"}
    assert settings_of(Random(seed=3)) == {
        "callable": "memloc_lens.localizers.baselines:Random",
        "seed": 3,
        "component": "neuron",
    }


def test_names_stand_for_localizers(module):
    presets = {"slimming": Slimming(steps=3)}
    for name, kind in LOCALIZERS.items():
        assert resolve(name) == kind()
    assert resolve("slimming", presets) == presets["slimming"]
    assert resolve("protect-slimming", presets) == Protect(presets["slimming"])
    assert resolve("contrast-protect-zero-out") == Contrast(Protect(ZeroOut()))
    assert resolve(Slimming(steps=9), presets) == Slimming(steps=9)
    assert resolve(my_function) is my_function
    module("found", "def of_module(model, sequences): ...\nclass OfModule:\n    __call__ = of_module")
    assert resolve("found:of_module").__name__ == "of_module"
    assert type(resolve("found:OfModule")).__name__ == "OfModule"


@pytest.mark.parametrize(
    ("content", "method", "message"),
    [
        ("raise RuntimeError('torn')", "bad:Mine", "method 'bad:Mine' cannot be used: RuntimeError: torn"),
        ("def (", "bad:Mine", r"cannot be used: SyntaxError: invalid syntax \(bad.py, line 1\)"),
        ("import nowhere", "bad:Mine", "cannot be used: ModuleNotFoundError: No module named 'nowhere'"),
        ("", "bad:Mine", "cannot be used: AttributeError: module 'bad' has no attribute 'Mine'"),
        ("", "worse:Mine", "cannot be used: ModuleNotFoundError: No module named 'worse'"),
        ("", ":Mine", "method ':Mine' cannot be used"),
        ("Mine = 3", "bad:Mine", "method 'bad:Mine' is not callable"),
        ("class Mine: pass", "bad:Mine", "method 'bad:Mine' is not callable"),
        (
            "class Mine:\n    def __init__(self, strength): ...",
            "bad:Mine",
            "cannot be used: TypeError: .*__init__.* missing 1 required positional argument: 'strength'",
        ),
        ("class Random:\n    __call__ = print", "bad:Random", "is called 'random', as one of the package; rename it"),
        ("def zero_out(): ...", "bad:zero_out", "is called 'zero-out', as one of the package; rename it"),
        ("def before(): ...", "bad:before", "is called 'before'; name it with letters.*and not before or injection"),
        ("def injection(): ...", "bad:injection", "is called 'injection'; name it"),
        ("class Mine:\n    name = 'a/b c'\n    __call__ = print", "bad:Mine", "is called 'a/b c'; name it"),
        ("mine = lambda: 0", "bad:mine", "is called '<lambda>'; name it with letters"),
        ("", "guess", "no method is called 'guess'; there are hard-concrete, .*, and your own as package.module:Class"),
    ],
)
def test_what_cannot_be_used(module, content, method, message):
    module("bad", content)
    with pytest.raises(ValueError, match=message) as caught:
        resolve(method)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("localizer", "message"),
    [
        (HardConcrete, "is not a localizer; give an instance as HardConcrete"),
        (type("Random", (Plain,), {})(), "is called 'random', as one of the package"),
        (type("Before", (Plain,), {})(), "is called 'before'; name it"),
        (lambda model, sequences: None, "is called '<lambda>'; name it"),
    ],
)
def test_localizers_that_cannot_be_used(localizer, message):
    with pytest.raises(ValueError, match=message):
        resolve(localizer)


def test_the_settings_of_wrappers_and_contexts_are_plain():
    settings = settings_of(Protect(Gradient(), (random_sequence(1), random_sequence(2))))
    assert settings["localizer"]["callable"] == "memloc_lens.localizers.gradients:Gradient"
    assert settings["context"]["sequences"] == 2
    assert settings["context"] != settings_of(Gradient(context=(random_sequence(2), random_sequence(1))))["context"]


def test_a_run_configures_what_is_wrapped():
    context, own = (random_sequence(1),), (random_sequence(2),)
    found = configured(Protect(Gradient(context=own)), "head", context, first_layer=2)
    assert found == Protect(Gradient(first_layer=2, component="head", context=own), context)
    with pytest.raises(ValueError, match="integrated-gradients scores neurons only"):
        configured(Contrast(IntegratedGradients()), "head")


def test_a_run_configures_what_a_method_has_a_field_for():
    assert configured(HardConcrete(steps=3), "head", first_layer=2) == HardConcrete(
        steps=3, first_layer=2, component="head"
    )
    assert configured(Activations(), "weight", first_layer=2) == Activations(component="weight")
    assert configured(IntegratedGradients(), "neuron", first_layer=2) == IntegratedGradients(first_layer=2)
    assert configured(Layered(), "head", first_layer=2) == Layered(first_layer=2, component="head")
    assert configured(MyOwnMethod(), "neuron", first_layer=2) == MyOwnMethod()
    assert configured(my_function, "weight", first_layer=2) is my_function
    for localizer, component in ((IntegratedGradients(), "head"), (MyOwnMethod(), "weight")):
        with pytest.raises(ValueError, match=f"{name_of(localizer)} scores neurons only, not {component}s"):
            configured(localizer, component)
    with pytest.raises(ValueError, match="no exact form for every weight"):
        configured(ZeroOut(), "weight")


@pytest.mark.parametrize(
    ("component", "missing"),
    [("neuron", ()), ("head", (IntegratedGradients,)), ("weight", (IntegratedGradients, ZeroOut))],
)
def test_default_methods_are_those_that_score_the_component(component, missing):
    found = default_methods(component, {"slimming": Slimming(steps=3)})
    assert [type(localizer) for localizer in found] == [kind for kind in LOCALIZERS.values() if kind not in missing]
    assert next(each for each in found if isinstance(each, Slimming)).steps == 3


@pytest.mark.parametrize("component", [NEURONS, HEADS, WEIGHTS], ids=lambda component: component.name)
def test_good_scores_pass(gpt2, component):
    sequences = [random_sequence(seed) for seed in range(2)]
    localizer = replace(WeightNorm(), component=component.name)
    scores = checked_scores(localizer, gpt2, sequences, component)
    assert torch.equal(scores, localizer(gpt2, sequences))
    whole = checked_scores(lambda model, rows: localizer(model, rows).long(), gpt2, sequences, component)
    assert torch.equal(whole, localizer(gpt2, sequences).long().float())
    learned = torch.zeros(2, *component.shape(gpt2), requires_grad=True)
    assert not checked_scores(lambda model, rows: 2 * learned, gpt2, sequences, component).requires_grad


def test_bad_scores_are_refused_by_method(gpt2):
    sequences = [random_sequence(seed) for seed in range(2)]
    good = torch.rand(2, 3, 128)
    with_nan = good.clone()
    with_nan[1, 2, 5:7] = torch.nan
    for scores, message in (
        (good[0], r"mine returned \[3, 128\] for 2 sequences; \[2, 3, 128\] \[sequence, layer, neuron\] was expected"),
        (good[:, :, :4], r"mine returned \[2, 3, 4\] for 2 sequences"),
        (good.tolist(), "mine returned list for 2 sequences"),
        (None, "mine returned NoneType for 2 sequences"),
        (good.to("meta"), "mine returned scores on meta, and the model is on cpu; move them there"),
        (with_nan, "mine returned 2 NaN scores, the first for random-1; components cannot be ranked by them"),
        (good / (good != good[1, 0, 0]), "mine returned 1 infinite scores, the first for random-1; components cannot"),
    ):

        def mine(model, rows, scores=scores):
            return scores

        with pytest.raises(ValueError, match=message):
            checked_scores(mine, gpt2, sequences, NEURONS)
