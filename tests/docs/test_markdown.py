"""Tables of a summary in Markdown, from summaries written by hand."""

import pytest

from memloc_lens.benchmarks.injection import metrics_at
from memloc_lens.benchmarks.measurement import METRICS
from memloc_lens.tables.markdown import deletion_tables, injection_tables


def interval(mean: float, low: float, high: float) -> dict:
    return {"mean": mean, "low": low, "high": high, "n": 3}


@pytest.fixture
def deletion() -> dict:
    return {
        "benchmark": "del",
        "model": "embedded",
        "component": "head",
        "sequences": 3,
        "scope": "layer",
        "before": {"self_acc": interval(100, 100, 100), "ppl": interval(75.8, 75.8, 75.8)},
        "methods": {
            "zero-out": {
                "0.34": {"self_acc": interval(-60, -70, -50), "ppl": interval(9, 8, 10)},
                "0.17": {"self_acc": interval(-40.04, -50, -30), "ppl": interval(0.26, -0.5, 1)},
            },
            "my|own": {"0.17": {"self_acc": interval(-20, -30, -10), "ppl": interval(0.1, 0, 0.2)}},
        },
        "published": {"zero-out": {"0.17": {"self_acc": -34.6}}},
        "text": {"tokens": 1024, "mean": 75.8, "low": 56.1, "high": 108.0},
    }


def test_deletion(deletion):
    text = deletion_tables(deletion, METRICS)
    small, large = text.index("**17% of each layer's heads**"), text.index("**34% of each layer's heads**")
    assert small < large
    assert "located heads are dropped" in text
    assert text[small:large].splitlines()[2:] == [
        "| method | Self-Acc | PPL |",
        "|---|---|---|",
        "| before | 100.0 | 75.8 |",
        "| zero-out | **-40.0** [-50.0, -30.0] | +0.3 [-0.5, +1.0] |",
        "| zero-out, published | -34.6 |  |",
        "| my\\|own | -20.0 [-30.0, -10.0] | **+0.1** [+0.0, +0.2] |",
        "",
    ]
    assert "my" not in text[large:]
    assert text.endswith("75.8 before, 95% confidence interval 56.1 to 108.0 over rows of the text.")


def test_deletion_without_text_and_over_all_layers(deletion):
    del deletion["text"]
    deletion["scope"] = "global"
    text = deletion_tables(deletion, METRICS)
    assert "of all heads**" in text
    assert "PPL is of" not in text


def test_injection():
    cells = {
        "recall@0.01": interval(80, 70, 90),
        "auroc": interval(0.98765, 0.9, 1.0),
        "recall_ceiling": interval(91, 90, 92),
    }
    made = {
        "texts": 4,
        "succeeded": 3,
        "failed": ["text-4"],
        "loss": interval(0.05, 0.04, 0.06),
        "steps": interval(92.6, 90, 95),
        "auroc_weight_norm": interval(0.9996, 0.9, 1),
        "auroc_norm_change": interval(1, 1, 1),
    }
    summary = {
        "benchmark": "inj",
        "model": "embedded",
        "component": "weight",
        "sequences": 4,
        "injections": {"0.01": made, "0.001": made | {"succeeded": 0}},
        "methods": {"slimming": {"0.01": cells}},
        "published": {},
    }
    text = injection_tables(summary, metrics_at)
    assert "**0.1% of all weights**: 0 of 4 texts injected" in text
    assert "**1% of all weights**: 3 of 4 texts injected, in 93 steps on average." in text
    assert "norms of the weights 1.000, of their change 1.000. Failed and not scored: text-4." in text
    assert text.splitlines()[-3:] == [
        "| method | R@1% | AUROC |",
        "|---|---|---|",
        "| slimming | **80.0** [70.0, 90.0] | **0.988** [0.900, 1.000] |",
    ]
