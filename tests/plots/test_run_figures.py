"""Figures of runs against numbers worked out from the files of the run."""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from safetensors.numpy import load_file

from conftest import records_of, write_lines
from memloc_lens.plots import (
    confusion_figure,
    cost_figure,
    forgetting_figure,
    frontier_figure,
    layer_figure,
    overlap_figure,
    recall_figure,
)
from memloc_lens.runs.methods import name_of
from memloc_lens.runs.statistics import mean_interval

TARGETS, LAYERS, WIDTH = ("s0", "s1", "s2"), 3, 128
BATCHES = {"s0": (0, 0), "s1": (0, 1), "s2": (2, 0)}
"""The first index of each target's batch, and its row there."""


@pytest.fixture(scope="module")
def run(whole_del) -> Path:
    return whole_del.out


@pytest.fixture(scope="module")
def records(run) -> dict[tuple, dict]:
    lines = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
    return {(record["method"], record["ratio"], record["sequence"]): record for record in lines}


@pytest.fixture
def changed(run, tmp_path):
    """A function that copies the run and changes its files: the records, `summary.json` and `config.json`."""

    def change(record=lambda record: record, **tables) -> Path:
        copy = Path(shutil.copytree(run, tmp_path / "changed"))
        lines = [json.loads(line) for line in (copy / "records.jsonl").read_text().splitlines()]
        write_lines(copy / "records.jsonl", [record({k: v for k, v in line.items() if k != "crc32"}) for line in lines])
        for name, edit in tables.items():
            table = json.loads((copy / f"{name}.json").read_text())
            edit(table)
            (copy / f"{name}.json").write_text(json.dumps(table))
        return copy

    return change


def scores_of(run: Path, method: str, target: str) -> np.ndarray:
    start, row = BATCHES[target]
    return load_file(run / "scores" / f"{method}-{start:05d}.safetensors")["scores"][row]


def line_of(figure, name: str):
    (line,) = [trace for trace in figure.data if trace.name == name]
    return line


def assert_interval(bars, place: int, mean: float, values: list[float]) -> None:
    wanted = mean_interval(values)
    assert mean == pytest.approx(fmean(values))
    assert mean + bars.array[place] == pytest.approx(wanted["high"])
    assert mean - bars.arrayminus[place] == pytest.approx(wanted["low"])


def test_frontier(whole_del, run, records):
    figure = frontier_figure(str(run))
    assert [trace.name for trace in figure.data] == [name_of(method) for method in whole_del.localizers()]
    for trace in figure.data:
        for place, ratio in enumerate((0.1, 0.5)):
            cell = [records[trace.name, ratio, target] for target in TARGETS]
            assert_interval(trace.error_x, place, trace.x[place], [-record["neg_acc"] for record in cell])
            assert_interval(trace.error_y, place, trace.y[place], [-record["self_acc"] for record in cell])
    assert max(max(trace.y) for trace in figure.data) > 10
    assert "3 sequences" in figure.layout.title.subtitle.text
    assert "10%, 50%" in figure.layout.title.subtitle.text


def test_frontier_against_perplexity(changed, records):
    def rise(record):
        return record["ratio"] * 40 + int(record["sequence"][1])

    copy = changed(
        lambda record: record | {"ppl": rise(record)}, summary=lambda table: table["before"].update(ppl={"mean": 80.0})
    )
    line = line_of(frontier_figure([copy], "ppl"), "random")
    assert line.x == pytest.approx([100 * (4 + 1) / 80, 100 * (20 + 1) / 80])


def test_frontier_with_published_figures(changed):
    figures = {
        "random": {"0.1": {"self_acc": -3.0, "neg_acc": -1.5}, "0.5": {"self_acc": -9.0, "neg_acc": -4.0}},
        "of-a-paper": {"0.1": {"self_acc": -30.0, "neg_acc": -0.5}, "0.5": {"self_acc": -1.0}},
        "without": {"0.1": {"self_dist": 3.0}},
    }
    figure = frontier_figure([changed(summary=lambda table: table.update(published=figures))])
    known, other = figure.data[-2:]
    assert (known.name, known.x, known.y, known.showlegend) == ("random, published", (1.5, 4.0), (3.0, 9.0), False)
    assert (other.name, other.x, other.y, other.showlegend) == ("of-a-paper, published", (0.5,), (30.0,), True)
    assert known.marker.symbol == line_of(figure, "random").marker.symbol + "-open"
    assert known.marker.color == line_of(figure, "random").marker.color
    assert "open: published" in figure.layout.title.subtitle.text


def test_what_frontiers_refuse(run, whole_inj):
    with pytest.raises(ValueError, match="hard-concrete have not measured ppl; draw another"):
        frontier_figure([run], "ppl")
    with pytest.raises(ValueError, match="no run was given"):
        frontier_figure([])
    with pytest.raises(ValueError, match="name each once"):
        frontier_figure([run, str(run)])
    with pytest.raises(ValueError, match="is a run of inj; give one of del"):
        frontier_figure(whole_inj.out)


def test_recall(whole_inj):
    figure = recall_figure(whole_inj.out)
    records = [record for record in records_of(whole_inj.out) if record["ratio"] == 0.2]
    assert [trace.name for trace in figure.data[:-1]] == [name_of(method) for method in whole_inj.localizers()]
    shares = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.5, 1.0)
    for trace in figure.data[:-1]:
        assert trace.x == pytest.approx([100 * share for share in shares])
        for place, share in enumerate(shares):
            values = [record[f"recall@{share:g}"] for record in records if record["method"] == trace.name]
            assert_interval(trace.error_y, place, trace.y[place], values)
    ceiling = figure.data[-1]
    assert (ceiling.name, ceiling.line.dash, ceiling.y[-1]) == ("ceiling", "dash", 100)
    truths = [load_file(whole_inj.out / "scores" / f"random-0.2-{index:05d}.safetensors")["gold"] for index in (0, 1)]
    for place, share in enumerate(shares):
        taken = round(share * WIDTH)
        found = [100 * sum(min(layer.sum(), taken) for layer in truth) / truth.sum() for truth in truths]
        assert ceiling.y[place] == pytest.approx(fmean(found))
        assert all(ceiling.y[place] >= trace.y[place] - 1e-6 for trace in figure.data)
    assert figure.layout.xaxis.type == "log"


def test_recall_where_nothing_was_injected(whole_inj):
    with pytest.raises(ValueError, match=r"has no records at the ratio 0\.01; it has 0\.2"):
        recall_figure(whole_inj.out, 0.01)


def highest(scores: np.ndarray, count: int) -> list[tuple[int, int]]:
    """The places of the highest scores behind layer 0, by sorting; ties would make the answer open."""
    places = [(layer, neuron) for layer in range(1, LAYERS) for neuron in range(WIDTH)]
    places.sort(key=lambda place: -scores[place])
    assert scores[places[count - 1]] > scores[places[count]]
    return places[:count]


@pytest.mark.parametrize("ratio", [0.1, 0.5])
def test_layers_from_all_layers_together(run, ratio):
    figure = layer_figure(run, ratio)
    count = 2 * int(ratio * WIDTH)
    for method in ("activations", "gradient", "random"):
        line = line_of(figure, method)
        chosen = [highest(scores_of(run, method, target), count) for target in TARGETS]
        assert tuple(line.x) == (1, 2)
        for place, layer in enumerate((1, 2)):
            parts = [100 * sum(at == layer for at, _ in of_target) / count for of_target in chosen]
            assert_interval(line.error_y, place, line.y[place], parts)
    assert line_of(figure, "activations").y[0] != 50
    assert line_of(figure, "even").y == (50, 50)
    assert "taken from all layers together" in figure.layout.title.subtitle.text


def test_layers_of_a_run_over_all_layers(changed, run):
    """Scores that a configuration without weights has are not bound to its scope."""

    def over_all(config):
        config["scope"] = "global"
        del config["weights"]

    figure = layer_figure(changed(config=over_all), 0.1)
    chosen = highest(scores_of(run, "activations", "s0"), int(0.1 * 2 * WIDTH))
    assert len(chosen) == 25
    assert "together" not in figure.layout.title.subtitle.text
    others = [highest(scores_of(run, "activations", target), 25) for target in TARGETS[1:]]
    first = [sum(layer == 1 for layer, _ in each) / 25 for each in (chosen, *others)]
    assert line_of(figure, "activations").y[0] == pytest.approx(100 * fmean(first))


def test_layers_without_scores(changed):
    copy = changed()
    (copy / "scores" / "random-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"random-00002\.safetensors holds no scores"):
        layer_figure(copy)


def test_layers_of_a_run_that_does_not_tell_its_scope(changed):
    with pytest.raises(ValueError, match=r"config\.json has no scope; run DEL again"):
        layer_figure(changed(config=lambda config: config.pop("scope")))


def test_confusion(run, records):
    (trace,) = confusion_figure(run, "gradient", 0.1).data
    assert trace.y == TARGETS
    assert trace.x == ("s0", "s1", "s2", "s3", "s4", "s5")
    for row, target in enumerate(TARGETS):
        changes = records["gradient", 0.1, target]["acc_changes"]
        assert trace.z[row] == pytest.approx([-changes[id] for id in trace.x])


def test_confusion_by_default_and_where_something_was_not_measured(changed, records):
    lost = {}
    for (method, ratio, _), record in records.items():
        if ratio == 0.5:
            lost[method] = lost.get(method, 0) - record["self_acc"]
    most = max(lost, key=lost.get)

    def without_s4(record):
        changes = {id: value for id, value in record.get("acc_changes", {}).items() if id != "s4"}
        return record if record["sequence"] != "s1" or not changes else record | {"acc_changes": changes}

    figure = confusion_figure(changed(without_s4))
    assert most in figure.layout.title.text
    assert figure.layout.title.subtitle.text.startswith("50%")
    (trace,) = figure.data
    places = [(row, column) for row in range(3) for column in range(6) if trace.z[row][column] is None]
    assert places == [(1, trace.x.index("s4"))]


def test_what_confusions_refuse(run, changed):
    with pytest.raises(ValueError, match="has no method 'other'; it has hard-concrete"):
        confusion_figure(run, "other")
    with pytest.raises(ValueError, match=r"no records at the ratio 0\.2"):
        confusion_figure(run, ratio=0.2)
    old = changed(lambda record: {name: value for name, value in record.items() if name != "acc_changes"})
    with pytest.raises(ValueError, match="do not tell sequences apart; run DEL again"):
        confusion_figure(old)


def test_overlap(whole_del, run):
    (trace,) = overlap_figure(run, 0.1).data
    names = [name_of(method) for method in whole_del.localizers()]
    assert list(trace.x) == list(trace.y) == names
    z = np.array(trace.z)
    assert np.allclose(z, z.T)
    assert np.allclose(np.diag(z), 100)

    def chosen(method: str, target: str) -> set[tuple[int, int]]:
        scores = scores_of(run, method, target)
        return {(layer, int(unit)) for layer in (1, 2) for unit in np.argsort(-scores[layer], kind="stable")[:12]}

    for one, other in (("activations", "gradient"), ("random", "zero-out")):
        pairs = [(chosen(one, target), chosen(other, target)) for target in TARGETS]
        wanted = fmean(100 * len(here & there) / len(here | there) for here, there in pairs)
        assert 0 < wanted < 100
        found = z[names.index(one), names.index(other)]
        assert found == pytest.approx(wanted)
        assert trace.text[names.index(one)][names.index(other)] == f"{wanted:.0f}"


def test_forgetting(whole_del, run, records):
    figure = forgetting_figure(run, "s1", 0.5)
    (trace,) = figure.data
    assert trace.y == ("before", *(name_of(method) for method in whole_del.localizers()))
    assert list(trace.z[0]) == list(records["before", 0.0, "s1"]["probabilities"])
    for row, method in enumerate(trace.y[1:], start=1):
        assert list(trace.z[row]) == list(records[method, 0.5, "s1"]["probabilities"])
    assert len(trace.z[0]) == 8
    assert (trace.zmin, trace.zmax, trace.x0) == (0, 1, 1)
    assert figure.layout.yaxis.autorange == "reversed"


def test_what_forgetting_refuses(run, changed):
    with pytest.raises(ValueError, match="has no sequence 's4'; it has s0, s1, s2"):
        forgetting_figure(run, "s4")
    old = changed(lambda record: {name: value for name, value in record.items() if name != "probabilities"})
    with pytest.raises(ValueError, match="no probabilities of tokens before the ablation; run DEL again in a new fold"):
        forgetting_figure(old, "s0")


def most_lost(points: list[tuple[float, float]], at: float) -> float:
    """The most that is lost up to a damage, from a fine walk along the straight lines between running maxima."""
    best, corners = 0.0, [(0.0, 0.0)]
    for damage, lost in sorted((max(damage, 0.0), lost) for damage, lost in points):
        best = max(best, lost)
        corners.append((damage, best))
    reached = [height for damage, height in corners if damage <= at]
    for (left, low), (right, high) in pairwise(corners):
        reached += [
            low + (high - low) * step / 1000 for step in range(1001) if left + (right - left) * step / 1000 <= at
        ]
    return max(reached)


def test_cost(run, records):
    figure = cost_figure([run])
    assert figure.layout.xaxis.type == "log"
    for trace in figure.data:
        cells = [[records[trace.name, ratio, target] for ratio in (0.1, 0.5)] for target in TARGETS]
        lost = [most_lost([(-r["neg_acc"], -r["self_acc"]) for r in cell], 2) for cell in cells]
        assert trace.y[0] == pytest.approx(fmean(lost), abs=0.05)
        assert trace.x[0] == pytest.approx(max(0.001, fmean(r["localize_seconds"] for cell in cells for r in cell)))
        assert trace.x[0] - trace.error_x.arrayminus[0] >= 0.001 - 1e-12


def test_methods_look_the_same_in_every_figure(run, whole_inj):
    figures = [frontier_figure([run]), cost_figure([run]), layer_figure(run), recall_figure(whole_inj.out)]
    looks = [
        {
            trace.name: (trace.marker.color, trace.marker.symbol)
            for trace in each.data
            if trace.name not in ("even", "ceiling")
        }
        for each in figures
    ]
    assert all(look == looks[0] for look in looks)
    assert len(set(looks[0].values())) == len(looks[0]) == 9
    for each in figures:
        assert each.layout.paper_bgcolor == each.layout.plot_bgcolor == "rgba(0, 0, 0, 0)"


HOSTILE = "<b>$a_1$ %{x}\x1b[31m " + "long" * 10


def test_names_are_shown_as_they_are_written(changed):
    def renamed(text: str) -> str:
        return text.replace('"s0"', json.dumps(HOSTILE))

    copy = changed()
    for name in ("records.jsonl", "config.json"):
        (copy / name).write_text(renamed((copy / name).read_text()))
    safe = "&lt;b&gt;&#36;a_1&#36; %{x}\\x1b[31m " + "long" * 10
    figure = forgetting_figure(copy, HOSTILE)
    assert safe in figure.layout.title.text
    figure = confusion_figure(copy)
    assert figure.data[0].x[0] == figure.data[0].y[0] == safe
    assert figure.layout.xaxis.ticktext[0] == "&lt;b&gt;&#36;a_1&#36; %{x}\\x1b[31m l…"
    assert HOSTILE[:5] not in figure.to_json()
