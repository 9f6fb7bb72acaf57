import io

from rich.console import Console

from memloc_lens.report.table import print_table


def cell(mean: float) -> dict:
    return {"mean": mean, "low": mean - 1, "high": mean + 1, "n": 4}


def shown(summary: dict) -> tuple[str, dict[str, str]]:
    """The whole output, and its rows by the method they are about, each with its line of intervals."""
    output = io.StringIO()
    print_table(summary, Console(file=output))
    rows, method = {}, ""
    for line in output.getvalue().splitlines():
        if line.startswith("│"):
            method = line[1:].split("│")[0].strip() or method
            rows[method] = rows.get(method, "") + line
    return output.getvalue(), rows


DELETION = {
    "benchmark": "del",
    "model": "m",
    "sequences": 4,
    "scope": "layer",
    "before": {"self_acc": cell(99.0), "neg_acc": cell(98.0)},
    "methods": {
        "strong": {"0.05": {"self_acc": cell(-40.0), "neg_acc": cell(-9.0)}},
        "weak": {"0.05": {"self_acc": cell(-2.0), "neg_acc": cell(-1.0)}},
    },
}


def test_best_of_each_column_is_marked():
    output, rows = shown(DELETION)
    assert "-40.0*" in rows["strong"]
    assert "[-41.0, -39.0]" in rows["strong"]
    assert "-9.0 " in rows["strong"]
    assert "-2.0 " in rows["weak"]
    assert "-1.0*" in rows["weak"]
    assert "[-2.0, +0.0]" in rows["weak"]
    assert "99.0" in rows["before"]
    assert "5% of each layer's neurons" in output
    assert "Ctrl-Acc" not in output


def test_published_figures_stand_beside():
    published = {"weak": {"0.05": {"self_acc": -34.6}, "0.1": {"self_acc": -57.1}}}
    output, rows = shown(DELETION | {"published": published})
    assert "-34.6" in rows["published"]
    assert "-57.1" not in output


def test_injections_and_their_leaks_are_told():
    metrics = {"recall@0.01": 80.0, "recall_of_ceiling": 90.0, "recall_ceiling": 92.8, "auroc": 0.7, "auroc_net": -0.2}
    summary = {
        "benchmark": "inj",
        "model": "m",
        "sequences": 3,
        "injections": {
            "0.01": {
                "texts": 3,
                "succeeded": 2,
                "failed": ["long-text"],
                "steps": cell(80.0),
                "auroc_weight_norm": cell(0.9),
                "auroc_norm_change": cell(0.95),
            }
        },
        "methods": {"finder": {"0.01": {name: cell(value) for name, value in metrics.items()}}},
    }
    output, rows = shown(summary)
    output = " ".join(output.split())
    assert "1% of all neurons: 2 of 3 texts injected" in output
    assert "ceiling of R@1% 92.8" in output
    assert "norms 0.900, of their change 0.950" in output
    assert "1% of all neurons were too few for long-text" in output
    assert "80.0*" in rows["finder"]
    assert "-0.200*" in rows["finder"]


def test_tuning_marks_what_was_chosen():
    tried = {name: {"0.01": {"recall_of_ceiling": cell(mean)}} for name, mean in (("a lr=1", 50.0), ("a lr=2", 60.0))}
    _, rows = shown(
        {"benchmark": "tuning", "model": "m", "sequences": 5, "tried": tried, "chosen": {"a": "a lr=2"}},
    )
    assert "60.0*" in rows["a lr=2"]
    assert "50.0 " in rows["a lr=1"]


def test_how_well_the_text_tells_a_perplexity():
    text = {"tokens": 1024, "mean": 75.8, "low": 70.1, "high": 81.2}
    output, _ = shown(DELETION | {"text": text})
    assert "PPL is of 1024 tokens: 75.8 before, 95% interval 70.1 to 81.2" in " ".join(output.split())
