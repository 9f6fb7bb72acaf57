import torch
from conftest import random_sequence

from memloc_lens import Neurons, ablate
from memloc_lens.forward import final_residual, kept_prefix
from memloc_lens.metrics import teacher_forced


def test_a_kept_prefix_changes_nothing_and_runs_once(any_model):
    sequences = [random_sequence(seed) for seed in range(3)]
    tokens = torch.stack([sequence.tokens for sequence in sequences])
    members = torch.zeros(any_model.cfg.n_layers, any_model.cfg.d_mlp, dtype=torch.bool)
    members[1:, ::2] = True
    clean, predicted = final_residual(any_model, tokens), teacher_forced(any_model, sequences)
    with ablate(any_model, Neurons(members)):
        ablated = final_residual(any_model, tokens)
    runs = []
    count = [("blocks.0.mlp.hook_post", lambda activations, hook: runs.append(len(activations)))]
    with any_model.hooks(fwd_hooks=count), kept_prefix(1):
        assert torch.allclose(final_residual(any_model, tokens), clean, atol=1e-12)
        for _ in range(2):
            with ablate(any_model, Neurons(members)):
                assert torch.allclose(final_residual(any_model, tokens), ablated, atol=1e-12)
        again = teacher_forced(any_model, sequences)
        assert all(torch.equal(one, other) for one, other in zip(predicted, again, strict=True))
        assert runs == [3]
        final_residual(any_model, tokens[:2])
        assert runs == [3, 2]
    with any_model.hooks(fwd_hooks=count):
        final_residual(any_model, tokens)
    assert runs == [3, 2, 3]
    assert not torch.allclose(clean, ablated)
