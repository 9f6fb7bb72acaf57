"""The formulas of the speed benchmark compute the same as the localizers, and both can be measured."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from memloc_lens import HardConcrete, IntegratedGradients, Slimming, ZeroOut

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import speed

BENCHMARKS = Path(speed.__file__).parent

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
        wanted = speed.Measurement(shape, localizer, 2, "cpu", "float64", 0, 1, is_naive=is_naive, scores=path)
        measured = speed.measure(wanted)
        assert measured["seconds"] > 0
        assert measured["peak_bytes"] > 0
        scores.append(load_file(path)["scores"].double())
    assert (scores[0] - scores[1]).norm() < 1e-4 * scores[1].norm()


def test_flops_are_counted():
    wanted = speed.Measurement(TINY, ZeroOut(), 1, "cpu", "float32", 0, 1, count=True)
    fast = speed.measure(wanted)["flops"]
    slow = speed.measure(speed.replace(wanted, is_naive=True))["flops"]
    assert 0 < fast < slow
    assert speed.product_rate("cpu", torch.float32, size=64) > 0


def test_the_run_writes_its_results(tmp_path, monkeypatch):
    """With the fields that the published results have."""
    monkeypatch.setattr(speed, "SHAPES", {"small": speed.replace(TINY, width=32, neurons=200)})
    monkeypatch.setattr(speed, "in_own_process", speed.measure)
    monkeypatch.setattr(speed, "product_rate", lambda device, dtype: 1e9)
    settings = speed.SpeedSettings(
        methods=("zero-out", "slimming"), sequences=2, steps=2, memory="64GiB", scaling=False, out=tmp_path / "out.json"
    )
    result = speed.run(settings)
    speed.show(settings, result)
    assert json.loads(settings.out.read_text()) == result
    published = json.loads((BENCHMARKS / "results" / "speed-cpu.json").read_text())
    assert result["settings"].keys() == published["settings"].keys()
    assert result["machine"].keys() == published["machine"].keys()
    for name, row in result["localizers"].items():
        assert row.keys() == published["localizers"][name].keys()
        assert row["difference"] < 1e-3
    assert result["candidates"].keys() == published["candidates"].keys()


def test_bad_settings():
    with pytest.raises(ValueError, match="sequences is 0; it must be a whole number at least 1"):
        speed.SpeedSettings(sequences=0)
    with pytest.raises(
        ValueError, match="the method is 'random'; it must be one of 'integrated-gradients', 'zero-out'"
    ):
        speed.SpeedSettings(methods=("random",))
