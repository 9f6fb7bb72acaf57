"""Gradients by a mask, one and many rounds: against their formulas, by finite differences, and against golden sets."""

import json
from dataclasses import replace
from pathlib import Path

import naive
import pytest
import torch
from safetensors.torch import load_file

from conftest import random_sequence
from memloc_lens import COMPONENTS, Gradient, IterativeGradient, MemorizedSequence, load_model, memory_budget
from memloc_lens.localizers import gradients
from memloc_lens.localizers.gradients import round_counts

GOLDEN = [Path(__file__).parents[1] / "golden" / name for name in ("gpt2-a", "neox-a")]
OBJECTIVES = pytest.mark.parametrize("objective", ["log_odds", "probability", "loss"])
CONTEXT = (random_sequence(7, 10, 6), random_sequence(8, 10, 6), random_sequence(9, 9, 6))


def close(scores: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((scores - expected).norm() < 1e-4 * expected.norm())


@OBJECTIVES
def test_gradient(any_model, sequence, objective):
    assert close(Gradient(objective)(any_model, sequence), naive.gradient(any_model, sequence, objective, "neuron"))


@pytest.mark.parametrize("component", ["head", "weight"])
def test_gradient_of_other_components(any_model, sequence, component):
    expected = naive.gradient(any_model, sequence, "log_odds", component)
    assert close(Gradient(component=component)(any_model, sequence), expected)


@pytest.mark.parametrize("component", COMPONENTS)
def test_gradient_with_a_prior(gpt2, sequence, component, monkeypatch):
    """With every pattern of signs once, the estimate of the squares is exact."""
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 4)
    monkeypatch.setattr(gradients, "DRAWS", len(signs))
    monkeypatch.setattr(gradients, "_signs", lambda batch, draw: signs[draw, : batch.suffix_len].expand(len(batch), -1))
    expected = naive.gradient(gpt2, sequence, "log_odds", component) - naive.prior(gpt2, CONTEXT, 0.5, component)
    assert close(Gradient(prior=0.5, component=component, context=CONTEXT)(gpt2, sequence), expected)


def test_the_prior_is_near_its_exact_value(gpt2, sequence, monkeypatch):
    monkeypatch.setattr(gradients, "DRAWS", 100)
    estimate = Gradient()(gpt2, sequence) - Gradient(prior=1.0, context=CONTEXT)(gpt2, sequence)
    exact = naive.prior(gpt2, CONTEXT, 1.0, "neuron")
    assert (estimate - exact).norm() < 0.2 * exact.norm()


@pytest.mark.parametrize(("objective", "schedule", "scope"), [
    ("log_odds", "linear", "layer"), ("probability", "geometric", "layer"), ("loss", "linear", "global"),
])  # fmt: skip
def test_iterative_gradient(any_model, sequence, objective, schedule, scope):
    scores = IterativeGradient(4, objective, 0.3, schedule, scope, first_layer=1)(any_model, sequence)
    rounds = naive.iterative_gradient(any_model, sequence, 4, objective, 0.3, schedule, scope, first_layer=1)
    for locked in rounds:
        per_layer = len(locked) // (1 if scope == "global" else any_model.cfg.n_layers - 1)
        assert naive.top(scores, per_layer, 1, scope) == set(locked)


@pytest.mark.parametrize("component", ["head", "weight"])
def test_iterative_gradient_of_other_components(gpt2, sequence, component):
    scores = IterativeGradient(3, max_ratio=0.5, schedule="linear", component=component)(gpt2, sequence)
    expected = naive.iterative_gradient(gpt2, sequence, 3, "log_odds", 0.5, "linear", "layer", component=component)
    assert naive.top(scores, len(expected[-1]), 0, "global") == set(expected[-1])


@pytest.fixture(scope="module", params=GOLDEN, ids=lambda folder: folder.name)
def golden(request):
    prompt_len = json.loads((request.param / "settings.json").read_text())["prompt_len"]
    tokens = load_file(request.param / "expected.safetensors")["input_ids"][0]
    expected = load_file(request.param / "beyond.safetensors")
    return load_model(request.param, device="cpu"), MemorizedSequence(tokens, prompt_len), expected


def test_golden_gradient(golden):
    model, sequence, expected = golden
    assert close(Gradient("probability")(model, sequence), expected["gradient"])


def test_golden_sets(golden):
    model, sequence, expected = golden
    sets = expected["sets"]  # [round, layer, neuron]
    scores = IterativeGradient(len(sets), "probability", 0.25, "geometric", first_layer=1)(model, sequence)
    for members in sets:
        for layer in (1, 2):
            count = int(members[layer].sum())
            assert members[layer, scores[layer].topk(count).indices].float().mean() >= 0.95


def test_one_round_ranks_as_the_gradient(gpt2, sequence):
    scores = IterativeGradient(1, max_ratio=0.2)(gpt2, sequence)
    assert torch.equal(scores.argsort(dim=1), Gradient()(gpt2, sequence).argsort(dim=1))


def test_spared_components_are_never_locked(gpt2, sequence):
    localizer = IterativeGradient(3, max_ratio=0.5)
    spared = localizer(gpt2, sequence) > 1.7
    assert spared.any(dim=1).all()
    scores = localizer(gpt2, sequence, spared=spared)
    assert (scores[spared] == -2).all()
    assert ((scores > 1).sum(dim=1) == (localizer(gpt2, sequence) > 1).sum(dim=1)).all()
    with pytest.raises(ValueError, match=r"max_ratio is 1.0, 128 neurons, and \d+ are not spared"):
        replace(localizer, max_ratio=1.0)(gpt2, sequence, spared=spared)


def test_scores_do_not_depend_on_the_memory(gpt2):
    sequences = [random_sequence(seed) for seed in range(4)]
    localizer = IterativeGradient(3, context=CONTEXT)
    expected = localizer(gpt2, sequences)
    with memory_budget("64GiB"):
        assert torch.allclose(localizer(gpt2, sequences), expected, atol=1e-6)
    assert torch.allclose(torch.stack([localizer(gpt2, one) for one in sequences]), expected, atol=1e-6)


@pytest.mark.parametrize(("most", "rounds", "schedule", "expected"), [
    (64, 6, "geometric", [2, 4, 8, 16, 32, 64]),
    (5, 9, "linear", [1, 2, 3, 4, 5]),
    (5, 9, "geometric", [1, 2, 3, 4, 5]),
    (10, 3, "linear", [3, 7, 10]),
    (7, 1, "geometric", [7]),
])  # fmt: skip
def test_round_counts(most, rounds, schedule, expected):
    assert round_counts(most, rounds, schedule) == expected


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Gradient(prior=-1.0), "prior is -1.0"),
    (lambda: IterativeGradient(rounds=0), "rounds is 0"),
    (lambda: IterativeGradient(max_ratio=1.5), "max_ratio is 1.5"),
])  # fmt: skip
def test_wrong_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_context_must_not_share_text_with_a_target(gpt2):
    target = random_sequence(0, length=30)
    sharing = MemorizedSequence(torch.cat([torch.tensor([5, 6]), target.tokens[8:28]]), 2, id="sharing")
    for localizer in (Gradient(context=(sharing,)), IterativeGradient(context=(*CONTEXT, sharing))):
        with pytest.raises(
            ValueError, match=r"'sharing' of the context and 'random-0', .* share 16 consecutive tokens"
        ):
            localizer(gpt2, target)
