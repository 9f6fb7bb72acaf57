"""The speed benchmark's own formulas are what the localizers compute; its process measures them."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from memloc_lens import HardConcrete, IntegratedGradients, Slimming, ZeroOut

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import speed

TINY = speed.Shape(layers=2, width=16, heads=2, neurons=32, vocabulary=50, tokens=12, prompt=4)


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize(
    "localizer",
    [IntegratedGradients(steps=3), ZeroOut(), Slimming(steps=4, stop_loss=0), HardConcrete(steps=4, stop_loss=0)],
    ids=lambda localizer: type(localizer).__name__,
)
def test_formulas_and_localizers_agree(tmp_path, localizer, rotary):
    scores = []
    for is_naive in (False, True):
        path = str(tmp_path / f"{is_naive}.safetensors")
        shape = speed.replace(TINY, rotary=rotary)
        job = speed.Job(shape, localizer, 2, "cpu", "float64", 0, 1, is_naive=is_naive, scores=path)
        measured = speed.measure(job)
        assert measured["seconds"] > 0
        assert measured["peak_bytes"] > 0
        scores.append(load_file(path)["scores"].double())
    assert (scores[0] - scores[1]).norm() < 1e-4 * scores[1].norm()


def test_flops_are_counted():
    job = speed.Job(TINY, ZeroOut(), 1, "cpu", "float32", 0, 1)
    fast = speed.measure(speed.replace(job, count=True))["flops"]
    slow = speed.measure(speed.replace(job, count=True, is_naive=True))["flops"]
    assert 0 < fast < slow
    assert speed.product_rate("cpu", torch.float32, size=64) > 0
