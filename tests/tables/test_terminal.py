import io
import re
from dataclasses import dataclass

import pytest
from rich.console import Console

from memloc_lens.benchmarks import deletion, injection
from memloc_lens.benchmarks.deletion import DeletionSettings
from memloc_lens.benchmarks.injection import InjectionSettings
from memloc_lens.tables.markdown import deletion_tables, injection_tables
from memloc_lens.tables.terminal import print_comparison, print_tuning


def cell(mean: float) -> dict:
    return {"mean": mean, "low": mean - 1, "high": mean + 1, "n": 4}


@dataclass(frozen=True)
class Column:
    name: str
    heading: str
    better: int = 1
    form: str = "+.1f"


COLUMNS = (Column("lost", "Lost", -1), Column("kept", "Kept"), Column("silent", ""), Column("absent", "Absent"))


def rows_of(output: str) -> dict[str, str]:
    """The rows of tables by the method they are about, each with its line of intervals."""
    rows, method = {}, ""
    for line in output.splitlines():
        if line.startswith("│"):
            method = line[1:].split("│")[0].strip() or method
            rows[method] = rows.get(method, "") + line
    return rows


def shown(summary: dict, columns=COLUMNS, footer=()) -> tuple[str, dict[str, str]]:
    output = io.StringIO()
    print_comparison(summary, "heading", "share {}".format, lambda ratio: columns, footer, Console(file=output))
    return output.getvalue(), rows_of(output.getvalue())


DELETION = {
    "benchmark": "del",
    "model": "m",
    "component": "neuron",
    "sequences": 4,
    "scope": "layer",
    "before": {"lost": cell(99.0), "kept": cell(98.0), "silent": cell(97.0)},
    "methods": {
        "strong": {"0.05": {"lost": cell(-40.0), "kept": cell(-9.0), "silent": cell(0.0)}},
        "weak": {"0.05": {"lost": cell(-2.0), "kept": cell(-1.0), "silent": cell(0.0)}},
    },
    "published": {},
}


def test_best_of_each_column_is_marked():
    output, rows = shown(DELETION)
    assert "-40.0*" in rows["strong"]
    assert "[-41.0, -39.0]" in rows["strong"]
    assert "-9.0 " in rows["strong"]
    assert "-2.0 " in rows["weak"]
    assert "-1.0*" in rows["weak"]
    assert "[-2.0, +0.0]" in rows["weak"]
    assert output.startswith("\nheading\n")
    assert "share 0.05" in output


def test_columns_without_a_heading_or_values_are_left_out():
    output, rows = shown(DELETION)
    assert re.findall(r"[\d.]+", rows["before"]) == ["99.0", "98.0"]
    assert "Absent" not in output
    assert "97.0" not in output


def test_a_table_for_each_ratio_with_the_methods_that_have_it():
    methods = DELETION["methods"] | {"late": {"0.1": {"lost": cell(-70.0), "kept": cell(-3.0)}}}
    output, rows = shown(DELETION | {"methods": methods})
    assert output.index("share 0.05") < output.index("weak") < output.index("share 0.1") < output.index("late")
    assert "-70.0*" in rows["late"]  # the best of its own table
    assert "-40.0*" in rows["strong"]


def test_a_method_without_a_value_has_an_empty_cell():
    methods = DELETION["methods"] | {"blind": {"0.05": {"lost": cell(-50.0)}}}
    _, rows = shown(DELETION | {"methods": methods})
    assert "-50.0*" in rows["blind"]
    assert "-40.0 " in rows["strong"]
    assert rows["blind"].count("[") == 1


def test_published_figures_stand_beside():
    published = {"weak": {"0.05": {"lost": -34.6}, "0.1": {"lost": -57.1}}, "unknown": {"0.05": {"lost": -99.0}}}
    output, rows = shown(DELETION | {"published": published})
    assert "-34.6" in rows["published"]
    assert output.index("weak") < output.index("published")
    assert "-57.1" not in output
    assert "-99.0" not in output


def test_brackets_are_not_markup():
    methods = {"[bold]odd[/bold]": DELETION["methods"]["weak"]}
    output, _ = shown(DELETION | {"methods": methods}, footer=["the [end]"])
    assert "[bold]odd[/bold]" in output
    assert output.rstrip().endswith("the [end]")


@pytest.mark.parametrize(
    ("component", "scope", "title"),
    [("neuron", "layer", "5% of each layer's neurons"), ("head", "global", "5% of all heads")],
)
def test_del_says_what_was_dropped(capsys, component, scope, title):
    text = {"tokens": 1024, "mean": 75.8, "low": 70.1, "high": 81.2}
    summary = DELETION | {
        "component": component,
        "scope": scope,
        "text": text,
        "before": {"self_acc": cell(99.0), "ppl": cell(75.8)},
        "methods": {"strong": {"0.05": {"self_acc": cell(-40.0), "ppl": cell(9.0)}}},
    }
    deletion.show(DeletionSettings(), summary)
    output = " ".join(capsys.readouterr().out.split())
    assert f"DEL on m, 4 sequences: change when the located {component}s are dropped" in output
    assert title in output
    assert "Self-Acc" in output
    assert "Ctrl-Acc" not in output
    assert "-40.0*" in output
    assert "PPL is of 1024 tokens: 75.8 before, 95% interval 70.1 to 81.2" in output
    assert output.endswith("records, scores and summary: runs/del")


def test_inj_tells_how_injections_went_and_what_they_leak(capsys):
    metrics = {"recall@0.01": 80.0, "recall_of_ceiling": 90.0, "recall_ceiling": 92.8, "auroc": 0.7, "auroc_net": -0.2}
    made = {
        "texts": 3,
        "succeeded": 2,
        "failed": ["long-text"],
        "loss": cell(0.04),
        "steps": cell(80.0),
        "auroc_weight_norm": cell(0.9),
        "auroc_norm_change": cell(0.95),
    }
    summary = {
        "benchmark": "inj",
        "model": "m",
        "component": "weight",
        "sequences": 3,
        "injections": {"0.001": made | {"succeeded": 0, "failed": ["all-of-them"]}, "0.01": made},
        "methods": {"finder": {"0.01": {name: cell(value) for name, value in metrics.items()}}},
        "published": {},
    }
    injection.show(InjectionSettings(), summary)
    output = capsys.readouterr().out
    rows, output = rows_of(output), " ".join(output.split())
    assert "INJ on m, 3 texts: how many of the weights that a text was written into are found" in output
    assert "1% of all weights: 2 of 3 texts injected, in 80 steps on average" in output
    assert "ceiling of R@1% 92.8" in output
    assert "norms 0.900, of their change 0.950" in output
    assert "1% of all weights were too few for long-text" in output
    assert "0.1% of all weights were too few for all-of-them" in output
    assert "80.0*" in rows["finder"]
    assert "-0.200*" in rows["finder"]
    assert "R@2%" not in output


def test_tuning_marks_what_was_chosen():
    tried = {name: {"0.01": {"recall_of_ceiling": cell(mean)}} for name, mean in (("a lr=1", 50.0), ("a lr=2", 60.0))}
    tried["a lr=2"]["0.05"] = {"recall_of_ceiling": cell(70.0)}
    summary = {"benchmark": "tuning", "model": "m", "sequences": 5, "tried": tried, "chosen": {"a": "a lr=2"}}
    output = io.StringIO()
    print_tuning(summary, Console(file=output))
    rows = rows_of(output.getvalue())
    assert "60.0*" in rows["a lr=2"]
    assert "70.0*" in rows["a lr=2"]
    assert "50.0 " in rows["a lr=1"]
    assert "5 dev texts" in " ".join(output.getvalue().split())


HOSTILE = "[/]x m[a] :bomb: \x1b[31m a\nb \u202e|`<b>"
SEEN = r"[/]x m[a] :bomb: \x1b[31m a\nb \u202e|`<b>"


def test_hostile_text_is_shown_as_it_is_written(capsys, tmp_path):
    """Of ids, paths and names of models."""
    summary = DELETION | {"model": HOSTILE}
    deletion.show(DeletionSettings(out=tmp_path / HOSTILE.replace("/", "")), summary | {"methods": {}})
    made = dict(texts=4, succeeded=3, failed=[HOSTILE], steps=cell(9), loss=cell(1),
                auroc_weight_norm=cell(0.5), auroc_norm_change=cell(0.5))  # fmt: skip
    of_inj = summary | {"benchmark": "inj", "injections": {"0.05": made}, "methods": {}}
    injection.show(InjectionSettings(), of_inj)
    output = capsys.readouterr().out
    lines = " ".join(output.split())
    assert f"DEL on {SEEN}, 4 sequences" in lines
    assert f"INJ on {SEEN}, 4 texts" in lines
    assert f"5% of all neurons were too few for {SEEN}" in lines
    assert SEEN.replace("/", "") in lines.rpartition("summary: ")[0]
    assert not {"\x1b", "\u202e"} & set(output)
    titled, _ = shown(DELETION | {"methods": {HOSTILE: {"0.05": {"lost": cell(1.0)}}}}, footer=[HOSTILE])
    assert titled.count(SEEN) == 2
    for tables in (deletion_tables(summary, COLUMNS), injection_tables(of_inj, lambda ratio: COLUMNS)):
        assert r"\[/\]x m\[a\] :bomb: \\x1b\[31m a\\nb \\u202e|\`&lt;b&gt;" in tables
