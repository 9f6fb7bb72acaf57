"""Agreement with the scores that the released code of Chang et al. (2024) gives on two small checkpoints."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import spearmanr

from memloc_lens import (
    Activations,
    HardConcrete,
    IntegratedGradients,
    MemorizedSequence,
    Slimming,
    ZeroOut,
    ablate,
    load_model,
    top_neurons,
)
from memloc_lens.metrics import suffix_loss, teacher_forced
from memloc_lens.models.accepted import default_backend

BACKENDS = ("hooked", "bridge") if default_backend() == "hooked" else ("bridge",)
CASES = [(name, backend) for name in ("gpt2-a", "neox-a") for backend in BACKENDS]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def golden(request):
    name, backend = request.param
    folder = Path(__file__).parent / "golden" / name
    expected = load_file(folder / "expected.safetensors")
    settings = json.loads((folder / "settings.json").read_text())
    sequence = MemorizedSequence(expected["input_ids"][0], settings["prompt_len"])
    return load_model(folder, device="cpu", backend=backend), sequence, expected, settings


def relative(scores: torch.Tensor, expected: torch.Tensor) -> float:
    return ((scores - expected).norm() / expected.norm()).item()


def test_log_probabilities(golden):
    model, sequence, expected, _ = golden
    log_probs = model(sequence.tokens[None], return_type="logits")[0].log_softmax(-1)
    assert (log_probs - expected["log_probs"]).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["activations", "integrated_gradients", "zero_out", "slimming"])
def test_scores(golden, name):
    model, sequence, expected, settings = golden
    slim = settings["slimming"]
    localizer = {
        "activations": Activations(),
        "integrated_gradients": IntegratedGradients(steps=settings["ig_steps"]),
        "zero_out": ZeroOut(),
        "slimming": Slimming(
            steps=slim["epochs"], lr=slim["lr"], penalty=slim["l1"], stop_loss=0, first_layer=slim["first_layer"]
        ),
    }[name]
    assert relative(localizer(model, sequence), expected[name]) < 1e-3


def test_hard_concrete_ranks_alike(golden):
    model, sequence, expected, settings = golden
    hard = settings["hard_concrete"]
    localizer = HardConcrete(
        steps=hard["epochs"], lr=hard["lr"], penalty=hard["l0"], init=hard["init"], temperature=hard["temperature"],
        stop_loss=0, first_layer=hard["first_layer"], seed=hard["seed"],
    )  # fmt: skip
    scores = localizer(model, sequence)
    assert spearmanr(scores.flatten(), expected["hard_concrete"].flatten()).statistic >= 0.95


def test_dropping_the_same_neurons_has_the_same_effect(golden):
    model, sequence, expected, settings = golden
    assert torch.equal(teacher_forced(model, [sequence])[0], expected["teacher_forced_argmax"])
    assert suffix_loss(model, [sequence]).item() == pytest.approx(expected["suffix_loss"].item(), rel=1e-3)
    dropped = settings["dropped"]
    scores = IntegratedGradients(steps=settings["ig_steps"])(model, sequence)
    with ablate(model, top_neurons(scores, dropped["ratio"], dropped["first_layer"])):
        assert torch.equal(teacher_forced(model, [sequence])[0], expected["dropped_argmax"])
        assert suffix_loss(model, [sequence]).item() == pytest.approx(expected["dropped_suffix_loss"].item(), rel=1e-3)
