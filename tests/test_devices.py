"""Everything that runs a model, with tensors on one pretended GPU that do not mix with those on the CPU."""

import pytest
import torch
from pretended_gpus import CPU, PretendedGPUs, pretended
from test_surroundings import LOCALIZERS, SEQUENCES, everything
from tiny import tiny_model

from memloc_lens import top_neurons
from memloc_lens.localizers import integrated_gradients
from memloc_lens.metrics import free_running

GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch) -> PretendedGPUs:
    return pretended(monkeypatch)


def model_on(gpu: PretendedGPUs, **changes):
    model = tiny_model(dtype=torch.float32, **changes)
    with gpu:
        return model.to("cuda", print_details=False)


@pytest.mark.parametrize(
    "changes",
    [dict(positional_embedding_type="rotary", rotary_dim=4, normalization_type="RMS", gated_mlp=True,
              n_key_value_heads=1, output_logits_soft_cap=2.0),
     dict(use_normalization_before_and_after=True, normalization_type="RMS", attn_scores_soft_cap=2.0)],
    ids=["rotary", "Gemma"],
)  # fmt: skip
def test_everything_runs_on_one_device(gpu, changes):
    expected = everything(tiny_model(dtype=torch.float32, **changes), SEQUENCES)
    model = model_on(gpu, **changes)
    with gpu:
        found = everything(model, SEQUENCES)
        scores = LOCALIZERS[0](model, SEQUENCES[0])
        assert scores.device == GPU
        assert top_neurons(scores, 0.5).members.device == GPU
        predictions = free_running(model, SEQUENCES)
        assert {tokens.device for tokens in predictions} == {CPU}
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one.float(), other.float(), atol=1e-5)


def test_the_plain_ways_run_on_one_device(gpu):
    model = model_on(gpu)
    model.hook_dict["blocks.1.hook_mlp_out"].add_hook(lambda activations, hook: activations * 2)
    with gpu:
        everything(model, SEQUENCES)


def test_a_missing_move_is_found(gpu, monkeypatch):
    model = model_on(gpu)
    with gpu, pytest.raises(RuntimeError, match="expected all tensors on one device"):
        model.W_E + torch.ones(model.W_E.shape)
    fractions = integrated_gradients._fractions
    monkeypatch.setattr(integrated_gradients, "_fractions", lambda steps, like: torch.linspace(0, 1, steps))
    with gpu, pytest.raises(RuntimeError, match="expected all tensors on one device"):
        integrated_gradients.IntegratedGradients(steps=2)(model, SEQUENCES[0])
    monkeypatch.setattr(integrated_gradients, "_fractions", fractions)
    with gpu:
        integrated_gradients.IntegratedGradients(steps=2)(model, SEQUENCES[0])
