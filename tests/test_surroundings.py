"""What is set around a call, or done by other threads, changes neither results nor the model."""

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator

import jaxtyping
import pytest
import torch
from tiny import tiny_model, tiny_sequence
from transformer_lens import HookedTransformer

from conftest import assert_same_state, state_of
from memloc_lens import (
    HEADS,
    WEIGHTS,
    Activations,
    HardConcrete,
    IntegratedGradients,
    MemorizedSequence,
    Random,
    Slimming,
    WeightNorm,
    ZeroOut,
    ablate,
    inject,
    mask,
    mean_activations,
    top_components,
    top_neurons,
)
from memloc_lens.checks import check_model
from memloc_lens.metrics import free_running, perplexity, suffix_accuracy, suffix_loss, teacher_forced

SEQUENCES = [tiny_sequence(1, length=7), tiny_sequence(2, length=6)]
LOCALIZERS = (
    Activations(),
    WeightNorm(),
    Random(),
    ZeroOut(),
    ZeroOut(component="head"),
    ZeroOut(candidates=0.5),
    IntegratedGradients(steps=2),
    *(Slimming(steps=1, component=component) for component in ("neuron", "head", "weight")),
    HardConcrete(steps=1),
)


def everything(model: HookedTransformer, sequences: list[MemorizedSequence]) -> list[torch.Tensor]:
    """What each function of the package that runs a model returns."""
    found = [localizer(model, sequences) for localizer in LOCALIZERS]
    found += [suffix_loss(model, sequences), *teacher_forced(model, sequences)]
    found += [suffix_accuracy(teacher_forced(model, sequences), sequences)]
    found += [torch.tensor(perplexity(model, sequences[0].tokens[None]), device="cpu")]
    found += [mean_activations(model, sequences), mean_activations(model, sequences, HEADS)]
    scores = torch.arange(96, dtype=torch.float32, device="cpu").view(2, 6, 8)
    for kind in ("zero", "mean", "scale"):
        over = {"over": sequences} if kind == "mean" else {}
        for components in (top_neurons(scores[:, :, 0], 0.5), top_components(scores[:, :2, 0], 0.5, component=HEADS)):
            with ablate(model, components, kind, **over):
                found.append(suffix_loss(model, sequences))
    with ablate(model, top_components(scores, 0.1, component=WEIGHTS)):
        found.append(suffix_loss(model, sequences))
    with mask(model, torch.full((2, 6), 0.5, dtype=torch.float32, device="cpu")):
        found.append(suffix_loss(model, sequences))
    for options in ({}, {"keep_norms": True}, {"component": "weight", "ratio": 0.2}):
        with inject(model, sequences[0], **({"ratio": 0.5, "max_steps": 3} | options)) as injected:
            found += [torch.tensor(injected.loss, device="cpu"), injected.ground_truth.members, injected.norm_change]
    return [tensor.detach() for tensor in found]


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SURROUNDINGS: dict[str, Callable] = {
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float64 by default": lambda: default_dtype(torch.float64),
    "another device by default": lambda: torch.device("meta"),
}


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return tiny_model(dtype=torch.float32, output_logits_soft_cap=3.0)


@pytest.fixture(scope="module")
def expected(model) -> list[torch.Tensor]:
    return everything(model, SEQUENCES)


@pytest.mark.parametrize("surroundings", SURROUNDINGS.values(), ids=SURROUNDINGS)
def test_same_values(model, expected, surroundings):
    model.train(surroundings is torch.no_grad)
    before = state_of(model)
    with surroundings():
        found = everything(model, SEQUENCES)
    assert_same_state(before, state_of(model))
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype or (one.numel() == 1 and one.dtype == torch.float64)
        assert torch.allclose(one.float(), other.float(), atol=1e-6)


@pytest.mark.parametrize("surroundings", SURROUNDINGS.values(), ids=SURROUNDINGS)
def test_same_tokens(model, surroundings):
    model.eval()
    expected = free_running(model, SEQUENCES)
    with surroundings():
        found = free_running(model, SEQUENCES)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_sequences_made_in_inference_mode(model, expected):
    with torch.inference_mode():
        made = [MemorizedSequence(s.tokens.clone(), s.prompt_len, s.id) for s in SEQUENCES]
    for one, other in zip(everything(model, made), expected, strict=True):
        assert torch.allclose(one.float(), other.float(), atol=1e-6)


def test_a_model_made_in_inference_mode_is_refused():
    with torch.inference_mode():
        model = tiny_model()
    for work in (lambda: Slimming()(model, SEQUENCES), lambda: inject(model, SEQUENCES[0], ratio=0.5).__enter__()):
        with pytest.raises(ValueError, match=r"the model was made inside torch\.inference_mode\(\)"):
            work()
    assert suffix_loss(model, SEQUENCES).shape == (2,)


def in_threads(works: list[Callable]) -> tuple[dict[int, object], list[Exception]]:
    found: dict[int, object] = {}
    errors: list[Exception] = []

    def run(index: int) -> None:
        try:
            found[index] = works[index]()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    return found, errors


def test_threads_take_turns(model):
    """Localizers and metrics of one model wait for one another; all results are right."""
    before = state_of(model)
    works = [lambda s=s, localizer=localizer: localizer(model, s) for s in SEQUENCES for localizer in LOCALIZERS]
    works += [lambda s=s: suffix_loss(model, [s]) for s in SEQUENCES * 3]
    expected = [work() for work in works]
    found, errors = in_threads(works)
    assert not errors
    assert all(torch.equal(found[index], one) for index, one in enumerate(expected))
    assert_same_state(before, state_of(model))


def test_threads_with_contexts_are_right_or_refused(model):
    neurons = [top_neurons(torch.rand(2, 6), 0.5) for _ in range(6)]
    before = state_of(model)

    def ablated(index: int) -> torch.Tensor:
        with ablate(model, neurons[index]):
            return suffix_loss(model, SEQUENCES)

    def injected() -> torch.Tensor:
        with inject(model, SEQUENCES[0], ratio=0.5, max_steps=2):
            return suffix_loss(model, SEQUENCES)

    works = [*(lambda index=index: ablated(index) for index in range(6)), injected, injected]
    expected = [work() for work in works]
    for _ in range(3):
        found, errors = in_threads(works)
        assert all(torch.equal(one, expected[index]) for index, one in found.items())
        assert found
        assert all(isinstance(error, ValueError) and "another thread has" in str(error) for error in errors)
        assert_same_state(before, state_of(model))


def test_an_open_context_refuses_other_threads_and_copies_are_free(model):
    other = copy.deepcopy(model)
    neurons = top_neurons(torch.rand(2, 6), 0.5)
    for context in (
        lambda: ablate(model, neurons),
        lambda: mask(model, torch.ones(2, 6)),
        lambda: inject(model, SEQUENCES[0], ratio=0.5, max_steps=1),
    ):
        with context(), ablate(model, neurons):
            works = [
                lambda: Activations()(model, SEQUENCES),
                lambda: suffix_loss(model, SEQUENCES),
                lambda: ablate(model, neurons).__enter__(),
                lambda: inject(model, SEQUENCES[0], ratio=0.5).__enter__(),
            ]
            found, errors = in_threads(works)
            assert not found
            assert len(errors) == len(works)
            assert all(isinstance(error, ValueError) for error in errors)
            found, errors = in_threads([lambda: suffix_loss(other, SEQUENCES)])
            assert not errors
        found, errors = in_threads([lambda: suffix_loss(model, SEQUENCES)])
        assert not errors


def test_a_context_may_be_closed_by_another_thread(model):
    context = ablate(model, top_neurons(torch.rand(2, 6), 0.5))
    in_threads([context.__enter__])
    with pytest.raises(ValueError, match="another thread has an ablation"):
        suffix_loss(model, SEQUENCES)
    context.__exit__(None, None, None)
    suffix_loss(model, SEQUENCES)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without the suite's type checker, for arguments of other types than the annotations promise."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("unchecked")
def test_localizers_and_metrics_run_the_model_inside_a_compiled_one(model):
    compiled = torch.compile(model, backend="eager")
    assert check_model(compiled) is model
    for work in (ZeroOut(), Slimming(steps=2), suffix_loss, mean_activations):
        assert torch.equal(work(compiled, SEQUENCES), work(model, SEQUENCES))
    for context, given in ((ablate, top_neurons(torch.rand(2, 6), 0.5)), (mask, torch.ones(2, 6))):
        with pytest.raises(ValueError, match="the model is compiled, and compiled code does not see the hooks"):
            context(compiled, given).__enter__()


def test_compiled_code_is_made_again_for_an_ablation(model, monkeypatch):
    forgotten = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: forgotten.append(True))
    neurons = top_neurons(torch.rand(2, 6), 0.5)
    for cached, expected in (([], 0), ([object()], 2)):
        monkeypatch.setattr("torch._dynamo.eval_frame._debug_get_cache_entry_list", lambda code, cached=cached: cached)
        with ablate(model, neurons):
            assert len(forgotten) == expected / 2
        assert len(forgotten) == expected


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda model: model.compile(backend="eager"), "the model"),
        (lambda model: setattr(model, "forward", torch.compile(model.forward, backend="eager")), "the model"),
        (lambda model: model.blocks[1].compile(backend="eager"), r"blocks\.1"),
        (lambda model: setattr(model.blocks[0], "mlp", torch.compile(model.blocks[0].mlp, backend="eager")),
         r"blocks\.0\.mlp"),
    ],
)  # fmt: skip
def test_models_compiled_in_place_are_refused(change, name):
    model = tiny_model()
    change(model)
    with pytest.raises(ValueError, match=rf"^{name} was compiled in place"):
        check_model(model)


def test_wrapped_and_mixed_models_are_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"DataParallel; give a HookedTransformer, the one in its \.module"):
        check_model(torch.nn.DataParallel(model))
    model.half()
    with pytest.raises(ValueError, match=r"the weights are torch\.float16 and model\.cfg\.dtype is torch\.float64"):
        check_model(model)
