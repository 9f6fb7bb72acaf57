from dataclasses import replace

import pytest
import torch

from conftest import random_sequence
from memloc_lens import HardConcrete, Slimming, load_model
from memloc_lens.benchmarks import deletion
from memloc_lens.generation import free_running
from memloc_lens.runs.losses import check_losses
from memloc_lens.runs.settings import RunSettings


@pytest.fixture
def overflowing(recited):
    """A model with finite weights whose logits are not: the token 5 is embedded as a vector that overflows."""
    model = load_model(recited / "model", device="cpu")
    model.unembed.b_U.data[5] = 3e38
    model.unembed.W_U.data[:, 5] = 3e38
    return model


def test_losses_that_are_not_finite_are_named(overflowing, recited):
    sequences = [random_sequence(seed) for seed in range(3)]
    check_losses(load_model(recited / "model", device="cpu"), sequences, 2)
    with pytest.raises(ValueError, match=r"the loss of sequence 'random-0' is (nan|inf) before any ablation; take a"):
        check_losses(overflowing, sequences, 2)


def test_a_run_stops_there(overflowing, small_del, tmp_path, monkeypatch):
    monkeypatch.setattr(RunSettings, "load_model", lambda self: overflowing)
    with pytest.raises(ValueError, match="the loss of sequence 's0' is"):
        deletion.run(replace(small_del, out=tmp_path / "run", methods=("random",)))


@pytest.mark.parametrize("localizer", [Slimming(steps=4), HardConcrete(steps=4)])
def test_learned_masks_name_the_sequence_and_the_step(recited, monkeypatch, localizer):
    from memloc_lens.localizers import learned_masks

    model, sequences = load_model(recited / "model", device="cpu"), [random_sequence(seed) for seed in range(3)]
    measured, calls = learned_masks.target_loss, []

    def losing(*arguments):
        calls.append(1)
        losses = measured(*arguments)
        return losses * torch.tensor([1.0, float("nan") if len(calls) > 2 else 1.0, 1.0])

    monkeypatch.setattr(learned_masks, "target_loss", losing)
    with pytest.raises(ValueError, match=f"{localizer.name}, sequence 'random-1': the loss .* at step 2; lower lr"):
        localizer(model, sequences)


def test_generation_restores_the_modes(recited):
    model, sequence = load_model(recited / "model", device="cpu"), random_sequence()
    model.train()
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    free_running(model, [sequence])
    assert [module.training for module in model.modules()] == modes
    model.generate = None
    with pytest.raises(TypeError):
        free_running(model, [sequence])
    assert [module.training for module in model.modules()] == modes
