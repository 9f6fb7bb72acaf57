"""Frontiers against curves that are read by hand, and what runs must share."""

import json
import random
import shutil
import sys
from dataclasses import replace
from statistics import fmean

import pytest

from conftest import records_of
from memloc_lens import Activations
from memloc_lens.benchmarks import deletion, frontier
from memloc_lens.benchmarks.frontier import FrontierSettings, compare, figures
from memloc_lens.runs.statistics import mean_interval

RATIOS = (0.05, 0.1, 0.3)


def most_lost(points: list[tuple[float, float]], at: float) -> float:
    """The most that is lost up to a damage, by hand: the height left of it, and the way to the one right of it."""
    points = [(0.0, 0.0)] + [(max(damage, 0.0), lost) for damage, lost in points]
    height = max(lost for damage, lost in points if damage <= at)
    start = max(damage for damage, _ in points if damage <= at)
    right = [damage for damage, _ in points if damage > at]
    if not right:
        return height
    top = max(height, *(lost for damage, lost in points if damage == min(right)))
    return height + (top - height) * (at - start) / (min(right) - start)


def naive_figures(grid: list[dict], perplexity: float | None) -> dict[str, float]:
    found = {}
    for name, metric in (("self", "self_acc"), ("free", "self_free_acc")):
        points = [(-record["neg_acc"], -record[metric]) for record in grid]
        for at in (1, 2, 5):
            found[f"{name}@{at}"] = most_lost(points, at)
        steps = 4000
        found[f"{name}_area"] = fmean(most_lost(points, 5 * (step + 0.5) / steps) for step in range(steps))
        for at in (2, 5) if perplexity else ():
            found[f"{name}@ppl{at}%"] = most_lost([(100 * r["ppl"] / perplexity, -r[metric]) for r in grid], at)
    return found | {"seconds": fmean(record["localize_seconds"] for record in grid)}


@pytest.mark.parametrize("seed", range(12))
def test_figures_of_random_grids(seed):
    draw = random.Random(seed)
    grid = [
        {
            "self_acc": -draw.choice([0.0, 10.0, draw.uniform(0, 100)]),
            "self_free_acc": -draw.uniform(-5, 100),
            "neg_acc": -draw.choice([0.0, 2.0, draw.uniform(-1, 8)]),
            "ppl": draw.uniform(-1, 5),
            "localize_seconds": draw.random(),
        }
        for _ in range(draw.randint(1, 9))
    ]
    assert figures(grid, 50.0) == pytest.approx(naive_figures(grid, 50.0), abs=0.2)
    exact = {name: value for name, value in naive_figures(grid, 50.0).items() if "area" not in name}
    assert {name: figures(grid, 50.0)[name] for name in exact} == pytest.approx(exact, abs=1e-9)


def test_a_figure_beyond_the_grid_is_the_last_value():
    grid = [{"self_acc": -30.0, "neg_acc": -1.0, "localize_seconds": 1.0}]
    found = figures(grid, None)
    assert (found["self@1"], found["self@2"], found["self@5"]) == (30, 30, 30)
    assert found["self_area"] == pytest.approx((15 + 4 * 30) / 5)
    assert "free@1" not in found
    assert "self@ppl2%" not in found


@pytest.fixture(scope="module")
def runs(small_del, tmp_path_factory):
    """Two runs: two methods and two shares; another method, and one of them at a further share."""
    out = tmp_path_factory.mktemp("frontier")
    first = replace(small_del, methods=("activations", "random"), ratios=RATIOS[:2], out=out / "first", limit=4)
    second = replace(first, methods=("weight-norm", "random"), ratios=RATIOS[1:], out=out / "second")
    for settings in (first, second):
        deletion.run(settings)
    return first, second


@pytest.fixture(scope="module")
def result(runs):
    return compare(FrontierSettings(tuple(settings.out for settings in runs)))


def grids(runs, method) -> list[list[dict]]:
    records = {}
    for settings in runs:  # a share that both runs have counts once
        for line in (settings.out / "records.jsonl").read_text().splitlines():
            record = json.loads(line)
            if record["method"] == method:
                records.setdefault(record["sequence"], {}).setdefault(record["ratio"], record)
    return [list(records[target].values()) for target in ("s0", "s1", "s2", "s3")]


def test_runs_are_joined_and_compared_by_hand(runs, result):
    assert result["sequences"] == ["s0", "s1", "s2", "s3"]
    assert {method: found["shares"] for method, found in result["methods"].items()} == {
        "activations": 2, "random": 3, "weight-norm": 2,
    }  # fmt: skip
    values = {
        method: [naive_figures(grid, None) for grid in grids(runs, method)] for method in ("activations", "random")
    }
    assert result["reference"] == "activations"
    for method, of_targets in values.items():
        found = result["methods"][method]
        assert found["values"]["self@2"] == pytest.approx(mean_interval([each["self@2"] for each in of_targets]))
        assert found["values"]["free_area"]["mean"] == pytest.approx(
            fmean(each["free_area"] for each in of_targets), abs=0.2
        )
        pairs = list(zip(of_targets, values["activations"], strict=True))
        for name in ("self@1", "self@5", "free@2"):
            differences = [one[name] - other[name] for one, other in pairs]
            assert found["differences"][name] == pytest.approx(mean_interval(differences))
            assert found["better"][name] == sum(difference > 0 for difference in differences)
    ends = [max(-record["neg_acc"] for record in grid) for grid in grids(runs, "random")]
    assert result["methods"]["random"]["beyond"] == {f"self@{at}": sum(end < at for end in ends) for at in (1, 2, 5)}
    means = [found["values"]["self@2"]["mean"] for found in result["methods"].values()]
    assert means == sorted(means, reverse=True)
    assert max(means) > 0


def test_what_dominates():
    one = {"self@1": [1.0, 2.0, 3.0, 2.0], "self@2": [5.0, 6.0, 5.0, 6.0], "seconds": [9.0] * 4}
    less = {"self@1": [0.0, 1.0, 1.0, 1.0], "self@2": [3.0, 3.0, 4.0, 4.0], "seconds": [1.0] * 4}
    crossing = {"self@1": [2.0, 3.0, 4.0, 4.0], "self@2": [3.0, 3.0, 4.0, 4.0], "seconds": [1.0] * 4}
    assert frontier._dominates(one, less)
    assert not frontier._dominates(less, one)
    assert not frontier._dominates(one, crossing)
    assert not frontier._dominates(crossing, one)
    assert not frontier._dominates(one, one)
    assert frontier._better(one, less) == {"self@1": 4, "self@2": 4, "seconds": 0}


def test_one_method_with_other_settings_is_two(runs, tmp_path):
    other = replace(runs[0], methods=(Activations("mean_abs"),), out=tmp_path / "other")
    deletion.run(other)
    found = compare(FrontierSettings((runs[0].out, other.out)))["methods"]
    assert set(found) == {f"activations ({runs[0].out})", f"activations ({other.out})", "random"}


def test_the_command_prints_and_writes(runs, tmp_path, monkeypatch, capsys):
    out = tmp_path / "frontier.json"
    folders = [str(settings.out) for settings in runs]
    monkeypatch.setattr(sys, "argv", ["frontier", *folders, "--reference", "random", "--out", str(out)])
    frontier.main()
    shown = capsys.readouterr().out
    written = json.loads(out.read_text())
    assert written["reference"] == "random"
    better = written["methods"]["activations"]["better"]["self@2"]
    assert f"activations: better than random at 2 points for {better} of 4" in " ".join(shown.split())
    assert f"{written['methods']['activations']['values']['self@2']['mean']:.1f}" in shown
    assert "Self-Acc lost more than by random" in " ".join(shown.split())


def edited(run, tmp_path, file, change):
    copy = tmp_path / "copy"
    shutil.copytree(run.out, copy)
    content = json.loads((copy / file).read_text())
    change(content)
    (copy / file).write_text(json.dumps(content))
    return copy


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("model", lambda config: config.update(weights="other")),
        ("negatives, controls or text", lambda config: config.update(data_sha256="other")),
        ("targets", lambda config: config["sequences"][0].__setitem__(1, "other")),
    ],
)
def test_runs_that_differ_are_refused(runs, tmp_path, part, change):
    copy = edited(runs[1], tmp_path, "config.json", change)
    with pytest.raises(ValueError, match=f"differ in their {part}; give runs of one model"):
        compare(FrontierSettings((runs[0].out, copy)))


def test_bad_runs(runs, tmp_path, small_inj):
    with pytest.raises(ValueError, match="no run was given"):
        FrontierSettings(())
    with pytest.raises(ValueError, match="name each once"):
        FrontierSettings((runs[0].out, runs[0].out))
    with pytest.raises(ValueError, match="holds no finished run"):
        compare(FrontierSettings((tmp_path,)))
    with pytest.raises(ValueError, match="no method is called 'zero-out'; the runs have activations, random"):
        compare(FrontierSettings((runs[0].out,), reference="zero-out"))
    shorter = replace(runs[0], methods=("random",), ratios=(0.1,), limit=2, out=tmp_path / "grown")
    deletion.run(replace(shorter, methods=("random", "weight-norm")))
    with pytest.raises(ValueError, match="differ in their targets"):
        compare(FrontierSettings((runs[0].out, shorter.out)))
    deletion.run(replace(shorter, limit=4))
    with pytest.raises(ValueError, match=r"weight-norm lacks 's2' at ratio 0\.1; name it in a run of DEL"):
        compare(FrontierSettings((shorter.out,)))
    lines = records_of(shorter.out)
    for line in lines:
        del line["neg_acc"]
    (shorter.out / "records.jsonl").write_text("".join(json.dumps(line | {"crc32": 1}) + "\n" for line in lines))
    with pytest.raises(ValueError, match="values are not those that were written"):
        compare(FrontierSettings((shorter.out,)))
    unsealed = [{name: value for name, value in line.items() if name != "crc32"} for line in lines]
    (shorter.out / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in unsealed))
    with pytest.raises(ValueError, match=r"random of 's0' at ratio 0\.1: no whole record: it has no neg_acc"):
        compare(FrontierSettings((shorter.out,)))
