"""What methods read besides their targets is never what is measured, and is recorded."""

import json
from dataclasses import replace

import pytest

from conftest import write_lines
from memloc_lens import Activations, Gradient, Protect, load_sequences
from memloc_lens.benchmarks import deletion, injection
from memloc_lens.benchmarks.deletion import DeletionSettings
from memloc_lens.benchmarks.injection import InjectionSettings
from memloc_lens.runs.methods import context_of

METHODS = ("activations", "gradient", "protect-slimming", "contrast-protect-gradient")


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> DeletionSettings:
    return DeletionSettings(limit=2, negatives=4, methods=METHODS, out=tmp_path_factory.mktemp("context") / "run")


@pytest.fixture(scope="module")
def material(settings):
    return deletion.load_material(settings)


def test_the_default_context_of_the_embedded_model(settings, material):
    """5 dev sequences, 91 others and 8 rows of held-out text, and none of their runs of 16 tokens is measured."""
    activations, *others = deletion._with_context(settings, material).localizers()
    assert activations == Activations()
    context = others[0].context
    assert [len(context_of(method)) for method in others] == [104, 104, 3 * 104]
    assert [one.id for one in context[:5]] == [one.id for one in load_sequences(material.model, split="dev")]
    assert sum(len(one.tokens) for one in context if one.prompt_len == 1) == 1024
    measured = [one.tokens for one in (*material.targets, *material.others, *material.controls)] + [*material.text]
    runs = {tuple(tokens.tolist()[start : start + 16]) for tokens in measured for start in range(len(tokens) - 15)}
    read = [one.tokens.tolist() for one in context]
    assert not any(tuple(tokens[start : start + 16]) in runs for tokens in read for start in range(len(tokens) - 15))


@pytest.mark.parametrize("kind", ["target", "text"])
def test_a_context_that_is_measured_is_refused(settings, material, tmp_path, kind):
    model = material.model
    tokens = {
        "target": material.targets[1].tokens,
        "text": material.text[1],
    }[kind]
    file = write_lines(tmp_path / "context.jsonl", [{"text": model.tokenizer.decode(tokens)} for _ in range(2)])
    with pytest.raises(ValueError, match=r"of the context and .*, which is localized or measured, share 16"):
        deletion._with_context(replace(settings, context=file), material)


@pytest.mark.parametrize("kind", ["others", "controls"])
def test_a_context_of_a_method_s_own_is_checked_too(settings, material, kind):
    own = replace(settings, methods=(Protect(Gradient(), (getattr(material, kind)[0],)),))
    with pytest.raises(ValueError, match="of the context and"):
        deletion._with_context(own, material)


def test_as_many_sequences_as_asked_for(settings, material):
    (method,) = deletion._with_context(
        replace(settings, methods=("gradient",), context_sequences=7), material
    ).localizers()
    assert sum(one.prompt_len > 1 for one in method.context) == 7
    with pytest.raises(
        ValueError, match="context_sequences is 280, and 277 memorized sequences are neither targets nor"
    ):
        deletion._with_context(replace(settings, context_sequences=280), material)


def test_a_run_records_its_context(small_del, tmp_path):
    settings = replace(small_del, out=tmp_path, limit=1, negatives=1, ratios=(0.5,), methods=("gradient",))
    deletion.run(replace(settings, context_sequences=2))
    own = json.loads((tmp_path / "config.json").read_text())["methods"]["gradient"]
    assert own["context"]["sequences"] == 2
    with pytest.raises(ValueError, match=r"gradient\.context"):
        deletion.run(replace(settings, context_sequences=1))
    deletion.run(replace(settings, context_sequences=1, methods=("random",)))  # which reads none


def test_injected_texts_have_a_context_if_it_is_asked_for():
    settings = InjectionSettings(limit=1, methods=("gradient",))
    material = injection.load_material(settings)
    assert injection._with_context(settings, material) == settings
    (method,) = injection._with_context(replace(settings, context_sequences=9), material).localizers()
    assert sum(one.prompt_len > 1 for one in method.context) == 9
    assert sum(len(one.tokens) for one in method.context if one.prompt_len == 1) == 1024
