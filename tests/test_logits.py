"""Logits of the suffix, and the losses that are taken of them a few at a time."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from conftest import PROMPT, random_sequence
from memloc_lens.forward import final_residual, frozen
from memloc_lens.logits import target_logits, target_loss, target_losses
from memloc_lens.sequence import Batch


@pytest.mark.parametrize("at_once", [1, 200, 2**20])
def test_the_loss_and_its_gradient_are_those_of_cross_entropy(any_model, monkeypatch, at_once):
    monkeypatch.setattr("memloc_lens.logits.CPU_LOGITS_AT_ONCE", at_once)
    batch = Batch(torch.stack([random_sequence(seed).tokens for seed in range(3)]), PROMPT)
    residual = final_residual(any_model, batch).detach().requires_grad_(True)
    weights = torch.tensor([1.0, -2.0, 0.5])
    logits = target_logits(any_model, residual)
    each = cross_entropy(logits.transpose(1, 2), batch.suffix, reduction="none")
    (gradient,) = torch.autograd.grad((each.mean(dim=1) * weights).sum(), residual)
    with frozen(any_model):
        losses = target_loss(any_model, residual, batch)
        (fast,) = torch.autograd.grad((losses * weights).sum(), residual)
        with torch.no_grad():
            assert torch.equal(target_loss(any_model, residual, batch), losses)
            assert torch.allclose(target_losses(any_model, residual, batch).double(), each, atol=1e-5)
    assert torch.allclose(losses.double(), each.mean(dim=1), atol=1e-5)
    assert torch.allclose(fast, gradient, atol=1e-6)
    assert torch.allclose(target_loss(any_model, residual, batch).double(), each.mean(dim=1), atol=1e-5)
