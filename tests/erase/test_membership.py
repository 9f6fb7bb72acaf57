"""Membership signals by hand, and against scikit-learn."""

import math

import pytest
import torch
from sklearn.metrics import roc_auc_score
from tiny import tiny_model, tiny_sequence

from conftest import assert_same_state, state_of
from memloc_lens.erase.membership import _beaten, membership, min_k


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@torch.no_grad()
def naive_min_k(model, sequence, share) -> float:
    logs = []
    for position in range(1, len(sequence.tokens)):
        chances = model(sequence.tokens[None, :position])[0, -1].softmax(dim=-1)
        logs.append(math.log(chances[sequence.tokens[position]].item()))
    count = max(1, math.floor(share * len(logs)))
    return sum(sorted(logs)[:count]) / count


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 1.0])
def test_min_k_by_hand(model, share):
    sequences = [tiny_sequence(seed, length=5 + seed % 4) for seed in range(6)]
    before = state_of(model)
    expected = [naive_min_k(model, sequence, share) for sequence in sequences]
    assert min_k(model, sequences, share).tolist() == pytest.approx(expected)
    assert_same_state(before, state_of(model))


def test_auroc_is_scikit_learns(model):
    targets, controls = [tiny_sequence(seed) for seed in range(5)], [tiny_sequence(seed) for seed in range(5, 14)]
    found = membership(model, targets, controls, share=0.3)
    labels = [1] * len(targets) + [0] * len(controls)
    for name, share in (("loss", 1.0), ("min_k", 0.3)):
        signal = [naive_min_k(model, sequence, share) for sequence in [*targets, *controls]]
        assert found[name]["mean"] == pytest.approx(roc_auc_score(labels, signal))
        assert found[name]["low"] <= found[name]["mean"] <= found[name]["high"]
        assert found[name]["n"] == 5


def test_a_tie_counts_half():
    targets, controls = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([2.0, 3.0])
    assert _beaten(targets, controls) == [0.0, 0.25, 1.0]


def test_bad_input(model):
    with pytest.raises(ValueError, match="share is 0"):
        min_k(model, [tiny_sequence()], share=0.0)
    with pytest.raises(ValueError, match="1 targets and 0 controls"):
        membership(model, [tiny_sequence()], [])
