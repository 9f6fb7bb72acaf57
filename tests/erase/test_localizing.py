"""Scores of the sequences of an erasure, a file a batch."""

import pickle
from dataclasses import dataclass

import pytest
import torch

from conftest import random_sequence
from memloc_lens import NEURONS, Gradient
from memloc_lens.erase.localizing import MakeWorker, localize
from memloc_lens.runs.settings import RunSettings


@dataclass(frozen=True)
class Watched(Gradient):
    """Gradients that tell whom they are asked for."""

    def __call__(self, model, sequences):
        asked.append([own.id for own in sequences])
        return super().__call__(model, sequences)


asked: list[list[str]] = []


def test_what_is_missing_or_of_something_else_is_scored(gpt2, tmp_path):
    sequences = [random_sequence(seed) for seed in range(5)]
    first, second, third = batches = [sequences[:2], sequences[2:4], sequences[4:]]
    ids = [[own.id for own in part] for part in batches]
    expected = torch.cat([Gradient()(gpt2, part).float() for part in batches])
    asked.clear()

    def located(given):
        return torch.stack(list(localize(tmp_path, gpt2, given, Watched(), NEURONS, batch=2)))

    assert torch.equal(located(sequences), expected)
    assert asked == ids
    files = sorted((tmp_path / "scores").iterdir())
    assert len(files) == 3
    assert torch.equal(located(sequences), expected)
    assert asked == ids
    files[1].write_bytes(files[1].read_bytes()[:-9])
    files[2].unlink()
    assert torch.equal(located(sequences), expected)
    assert asked == [*ids, *ids[1:]]
    others = located([*second, *first, *third])  # of two files the sequences are others
    assert torch.equal(others, expected[[2, 3, 0, 1, 4]])
    assert asked == [*ids, *ids[1:], ids[1], ids[0]]


def test_a_worker_elsewhere_refuses_another_model(recited):
    settings = RunSettings(model=str(recited / "model"), device="cpu")
    make_worker = MakeWorker(settings, Gradient(), "neuron", {"device": "cpu", "weights": "of another model"})
    with pytest.raises(ValueError, match=r"has other weights on .*; put the same files at the same path on every node"):
        pickle.loads(pickle.dumps(make_worker))()
