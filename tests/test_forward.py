import pytest
import torch
from conftest import PROMPT, random_sequence
from torch.nn.functional import cross_entropy

from memloc_lens import Neurons, ZeroOut, ablate, forward
from memloc_lens.forward import final_residual, kept_prefix, run_layers, target_logits, target_loss
from memloc_lens.metrics import teacher_forced


@torch.no_grad()
def test_a_kept_prefix_changes_nothing_and_runs_once(any_model):
    sequences = [random_sequence(seed) for seed in range(3)]
    tokens = torch.stack([sequence.tokens for sequence in sequences])
    members = torch.zeros(any_model.cfg.n_layers, any_model.cfg.d_mlp, dtype=torch.bool)
    members[1:, ::2] = True
    clean, predicted = final_residual(any_model, tokens, PROMPT), teacher_forced(any_model, sequences)
    with ablate(any_model, Neurons(members)):
        ablated = final_residual(any_model, tokens, PROMPT)
    runs = []
    count = [("blocks.0.mlp.hook_post", lambda activations, hook: runs.append(len(activations)))]
    with any_model.hooks(fwd_hooks=count), kept_prefix(1):
        assert torch.allclose(final_residual(any_model, tokens, PROMPT), clean, atol=1e-12)
        for _ in range(2):
            with ablate(any_model, Neurons(members)):
                assert torch.allclose(final_residual(any_model, tokens, PROMPT), ablated, atol=1e-12)
        again = teacher_forced(any_model, sequences)
        assert all(torch.equal(one, other) for one, other in zip(predicted, again, strict=True))
        assert runs == [3]
        final_residual(any_model, tokens[:2], PROMPT)
        assert runs == [3, 2]
    with any_model.hooks(fwd_hooks=count):
        final_residual(any_model, tokens, PROMPT)
    assert runs == [3, 2, 3]
    assert not torch.allclose(clean, ablated)


@torch.no_grad()
@pytest.mark.parametrize("prompt_len", [1, 2, PROMPT, 13])
def test_the_last_layer_at_the_targets_alone_is_the_whole_one(any_model, prompt_len):
    tokens = torch.stack([random_sequence(seed).tokens for seed in range(2)])
    members = torch.rand(any_model.cfg.n_layers, any_model.cfg.d_mlp, generator=torch.Generator().manual_seed(0)) < 0.3
    with ablate(any_model, Neurons(members)):
        expected = any_model(tokens, return_type="logits")[:, prompt_len - 1 : -1]
        assert torch.allclose(
            target_logits(any_model, final_residual(any_model, tokens, prompt_len)), expected, atol=1e-10
        )
        for start in range(1, any_model.cfg.n_layers + 1):
            entering = any_model(tokens, stop_at_layer=start)
            residual = run_layers(any_model, entering, start, prompt_len)
            assert torch.allclose(target_logits(any_model, residual), expected, atol=1e-10)


@pytest.mark.parametrize("at_once", [1, 200, 2**20])
def test_the_loss_and_its_gradient_are_those_of_cross_entropy(any_model, monkeypatch, at_once):
    monkeypatch.setattr(forward, "LOGITS_AT_ONCE", {True: at_once, False: at_once})
    tokens = torch.stack([random_sequence(seed).tokens for seed in range(3)])
    residual = final_residual(any_model, tokens, PROMPT).detach().requires_grad_(True)
    weights = torch.tensor([1.0, -2.0, 0.5])
    logits = target_logits(any_model, residual)
    expected = cross_entropy(logits.transpose(1, 2), tokens[:, PROMPT:], reduction="none").mean(dim=1)
    (gradient,) = torch.autograd.grad((expected * weights).sum(), residual)
    with forward.frozen(any_model):
        losses = target_loss(any_model, residual, tokens, PROMPT)
        (fast,) = torch.autograd.grad((losses * weights).sum(), residual)
        with torch.no_grad():
            assert torch.equal(target_loss(any_model, residual, tokens, PROMPT), losses)
    assert torch.allclose(losses.double(), expected, atol=1e-5)
    assert torch.allclose(fast, gradient, atol=1e-6)
    assert torch.allclose(target_loss(any_model, residual, tokens, PROMPT).double(), expected, atol=1e-5)


def test_a_prefix_without_a_graph_is_not_used_for_gradients(gpt2):
    sequence = random_sequence()
    expected = ZeroOut(candidates=0.2)(gpt2, sequence)
    with kept_prefix(1):
        teacher_forced(gpt2, [sequence])
        for _ in range(2):
            assert torch.equal(ZeroOut(candidates=0.2)(gpt2, sequence), expected)
