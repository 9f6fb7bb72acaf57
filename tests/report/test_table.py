import io

from rich.console import Console

from memloc_lens.report.table import print_table


def cell(mean: float) -> dict:
    return {"mean": mean, "low": mean - 1, "high": mean + 1, "n": 4}


def test_best_of_each_column_is_marked():
    summary = {
        "model": "m",
        "sequences": 4,
        "scope": "layer",
        "before": {"self_acc": cell(99.0), "neg_acc": cell(98.0)},
        "methods": {
            "strong": {"0.05": {"self_acc": cell(-40.0), "neg_acc": cell(-9.0)}},
            "weak": {"0.05": {"self_acc": cell(-2.0), "neg_acc": cell(-1.0)}},
        },
    }
    output = io.StringIO()
    print_table(summary, Console(file=output))
    lines = {line.split()[1]: line for line in output.getvalue().splitlines() if line.startswith("│")}
    assert "-40.0 [-41.0, -39.0]*" in lines["strong"]
    assert "-9.0 [-10.0, -8.0] " in lines["strong"]
    assert "-2.0 [-3.0, -1.0] " in lines["weak"]
    assert "-1.0 [-2.0, +0.0]*" in lines["weak"]
    assert "99.0" in lines["before"]
    assert "5% of each layer's neurons" in output.getvalue()
    assert "Ctrl-Acc" not in output.getvalue()
