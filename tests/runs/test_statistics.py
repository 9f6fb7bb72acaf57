import numpy as np
import pytest
from scipy.stats import norm

from memloc_lens.runs.statistics import mean_interval, summarize


def test_interval_is_near_the_normal_one_for_normal_data():
    values = np.random.default_rng(0).normal(3, 2, size=400)
    interval = mean_interval(values.tolist())
    half = norm.ppf(0.975) * values.std(ddof=1) / 20
    assert interval["mean"] == pytest.approx(values.mean())
    assert interval["low"] == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert interval["high"] == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert interval["n"] == 400


def test_interval_leans_with_skewed_data():
    values = np.random.default_rng(0).exponential(size=60)
    interval = mean_interval(values.tolist())
    assert interval["high"] - interval["mean"] > interval["mean"] - interval["low"]


@pytest.mark.parametrize("values", [[2.0], [2.0, 2.0, 2.0]])
def test_values_that_do_not_vary(values):
    assert mean_interval(values) == {"mean": 2.0, "low": 2.0, "high": 2.0, "n": len(values)}


def test_two_values_have_a_finite_interval():
    interval = mean_interval([0.0, 1.0])
    assert 0 <= interval["low"] <= 0.5 <= interval["high"] <= 1


def test_summary_leaves_out_what_nobody_has():
    records = [
        {"method": "a", "ratio": 0.1, "x": 1.0, "y": None},
        {"method": "a", "ratio": 0.1, "x": 3.0},
        {"method": "a", "ratio": 0.05, "x": 5.0},
        {"method": "b", "ratio": 0.1, "x": 7.0},
    ]
    summary = summarize(records, ["x", "y"])
    assert list(summary) == ["a", "b"]
    assert list(summary["a"]) == ["0.05", "0.1"]
    assert summary["a"]["0.1"]["x"]["mean"] == 2.0
    assert list(summary["a"]["0.1"]) == ["x"]


def test_values_that_differ_by_rounding_are_equal():
    values = [0.1 + 0.2, 0.3, 0.3, 0.4 - 0.1]
    assert len(set(values)) > 1
    interval = mean_interval(values)
    assert interval["low"] == interval["high"] == interval["mean"] == pytest.approx(0.3)
