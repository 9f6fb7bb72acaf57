import itertools
import json
from collections import Counter
from dataclasses import replace
from statistics import fmean

import engines
import numpy as np
import pytest
import torch
from rich.console import Console

from conftest import VOCAB
from memloc_lens import COMPONENTS, Activations, load_model
from memloc_lens.ablation import ablate
from memloc_lens.benchmarks import specificity
from memloc_lens.benchmarks.deletion import DeletionSettings, run
from memloc_lens.benchmarks.specificity import (
    SpecificitySettings,
    _losses,
    _overlap,
    analyse,
    matrix_text,
    print_specificity,
    show,
)
from memloc_lens.components import Neurons, top_components, top_neurons
from memloc_lens.data import load_sequences
from memloc_lens.metrics import suffix_accuracy, teacher_forced
from memloc_lens.sequence import MemorizedSequence

METHODS, TARGETS = ("activations", "random"), 5


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("del")
    run(DeletionSettings(methods=METHODS, limit=TARGETS, negatives=8, controls=2, text_tokens=128, ratios=(0.05, 0.1),
                         out=out, device="cpu", batch=2))  # fmt: skip
    return out


@pytest.fixture(scope="module")
def result(finished):
    return analyse(SpecificitySettings(finished, device="cpu", shared=3, tokens=2))


def test_the_matrix_is_what_each_ablation_costs_each_sequence(finished, result, embedded):
    targets = load_sequences(embedded)[:TARGETS]
    assert result["sequences"] == [target.id for target in targets]
    scores = [finished / "scores" / f"activations-{start:05d}.safetensors" for start in (0, 2, 4)]
    assert all(file.exists() for file in scores)
    matrix = np.array(result["methods"]["activations"]["matrix"])
    before = suffix_accuracy(teacher_forced(embedded, targets), targets)
    for row in (0, 3):
        neurons = top_neurons(Activations()(embedded, targets[row]), 0.1, first_layer=1)
        with ablate(embedded, neurons):
            after = suffix_accuracy(teacher_forced(embedded, targets), targets)
        known = ~np.isnan(matrix[row])  # negatives are drawn, and some targets are not among them
        assert known[row]
        assert matrix[row][known] == pytest.approx((after - before).numpy()[known], abs=1e-3)


def test_shared_neurons_are_counted_and_fire_where_they_are_said_to(result, embedded):
    targets = load_sequences(embedded)[:TARGETS]
    sets = [top_neurons(Activations()(embedded, target), 0.1, first_layer=1) for target in targets]
    counts = Counter(index for of_target in sets for index in of_target.indices())
    shared = result["methods"]["activations"]["shared"]
    assert [each["sequences"] for each in shared] == sorted(counts.values(), reverse=True)[:3]
    for each in shared:
        layer, neuron = each["index"]
        assert each["sequences"] == counts[layer, neuron]
        _, cache = embedded.run_with_cache(torch.stack([target.tokens for target in targets]))
        strongest = cache[f"blocks.{layer}.mlp.hook_post"][:, :, neuron].abs().max().item()
        assert len(each["fires_on"]) == 2
        assert abs(each["fires_on"][0]["activation"]) == pytest.approx(strongest, abs=2e-3)
        assert each["fires_on"][0]["text"].endswith("]")


@pytest.mark.parametrize("component", ["head", "weight"])
def test_heads_and_weights(small_del, tmp_path, component):
    """All by hand: the matrix from ablations, the overlap and what is shared from sets of index tuples."""
    ratio, kind = {"head": 0.5, "weight": 0.1}[component], COMPONENTS[component]
    settings = replace(
        small_del, component=component, methods=("activations",), ratios=(ratio,), out=tmp_path / "run", limit=4
    )
    run(settings)
    result = analyse(SpecificitySettings(settings.out, device="cpu", shared=4))
    assert (result["component"], result["ratio"]) == (component, ratio)
    assert result["categories"] == [["c0"], ["c1"], ["c0"], ["c1"]]
    model = load_model(settings.model, device="cpu")
    targets = load_sequences(model, settings.data)[: settings.limit]
    before = suffix_accuracy(teacher_forced(model, targets), targets)
    sets, matrix = [], []
    for target in targets:
        scores = Activations(component=component)(model, target)
        chosen = top_components(scores, ratio, first_layer=1, component=kind)
        with ablate(model, chosen):
            matrix.append((suffix_accuracy(teacher_forced(model, targets), targets) - before).tolist())
        sets.append(set(chosen.indices()))
    found = result["methods"]["activations"]
    assert np.array(found["matrix"]) == pytest.approx(np.array(matrix), abs=1e-3)
    assert found["self"] == pytest.approx(fmean(matrix[index][index] for index in range(len(targets))), abs=1e-3)
    pairs = list(itertools.combinations(range(len(targets)), 2))
    overlaps = {(i, j): 100 * len(sets[i] & sets[j]) / len(sets[i] | sets[j]) for i, j in pairs}
    related = [value for (i, j), value in overlaps.items() if (i - j) % 2 == 0]
    unrelated = [value for (i, j), value in overlaps.items() if (i - j) % 2]
    assert found["overlap"]["related"] == pytest.approx(fmean(related))
    assert found["overlap"]["unrelated"] == pytest.approx(fmean(unrelated))
    counts = Counter(index for each in sets for index in each)
    assert [each["sequences"] for each in found["shared"]] == sorted(counts.values(), reverse=True)[:4]
    for each in found["shared"]:
        assert each["sequences"] == counts[tuple(each["index"])]
        assert each["fires_on"] == []
    with (tmp_path / "out").open("w") as file:
        print_specificity(result, console=Console(file=file, width=160))
    text = (tmp_path / "out").read_text()
    layer, *unit = found["shared"][0]["index"]
    assert f"layer {layer}, {component} {', '.join(map(str, unit))}: {found['shared'][0]['sequences']} of 4" in text
    assert f"{100 * ratio:g}% of {component}s dropped" in text


def sequences(*categories):
    return [MemorizedSequence(torch.arange(3), 1, str(n), category) for n, category in enumerate(categories)]


def test_means_of_a_matrix_written_by_hand():
    targets = sequences(("a",), ("a", "b"), ("c",))
    matrix = np.array([[-50.0, -20.0, 0.0], [-10.0, -40.0, -2.0], [-5.0, -30.0, -30.0]])
    losses = _losses(matrix, targets)
    assert losses["self"] == -40
    assert losses["related"] == -15
    assert losses["unrelated"] == pytest.approx(-37 / 4)
    assert losses["target_loses_more"] == pytest.approx(100 * 5.5 / 6)
    alone = _losses(np.array([[-1.0]]), targets[:1])
    assert (alone["self"], alone["related"], alone["unrelated"], alone["target_loses_more"]) == (-1, None, None, None)


def test_overlap_written_by_hand_and_by_chance():
    first, second, third = (torch.zeros(2, 8, dtype=torch.bool) for _ in range(3))
    first[1, :4], second[1, 2:6], third[1, 4:] = True, True, True
    overlap = _overlap([Neurons(each) for each in (first, second, third)], sequences(("a",), ("a",), ()))
    assert overlap["related"] == pytest.approx(100 / 3)
    assert overlap["unrelated"] == pytest.approx(100 * (0 + 1 / 3) / 2)
    assert overlap["chance"] == pytest.approx(100 / 3)


def test_random_neurons_overlap_by_chance(result):
    overlap = result["methods"]["random"]["overlap"]
    values = [value for kind in ("related", "unrelated") if (value := overlap[kind]) is not None]
    assert sum(values) / len(values) == pytest.approx(overlap["chance"], abs=2)


def test_printing(result, tmp_path):
    with (tmp_path / "out").open("w") as file:
        print_specificity(result, "random", Console(file=file, width=160))
    text = (tmp_path / "out").read_text()
    assert "random: accuracy lost" in text
    assert all(id in text for id in result["sequences"])
    assert matrix_text([[-50.0, 0.2], [3.0, float("nan")]]).splitlines()[1:] == ["   1  50   0", "   2  +3   ."]


def test_the_method_that_costs_most_is_printed_and_all_are_written(finished, result, tmp_path, capsys):
    settings = SpecificitySettings(finished, out=tmp_path / "result.json")
    show(settings, result)
    shown = capsys.readouterr().out
    costly = min(METHODS, key=lambda method: result["methods"][method]["self"])
    assert f"{costly}: accuracy lost" in shown
    written = json.loads((tmp_path / "result.json").read_text())
    assert written["methods"]["random"]["overlap"] == result["methods"]["random"]["overlap"]
    assert list(written["methods"]) == list(METHODS)


def test_an_engine_does_the_work(small_del, whole_del):
    settings = SpecificitySettings(whole_del.out, device="cpu", ratio=0.1)
    backwards, forwards = analyse(settings, engines.backwards), analyse(settings)
    assert json.dumps(backwards) == json.dumps(forwards)
    assert list(forwards["methods"]) == list(json.loads((whole_del.out / "summary.json").read_text())["methods"])
    assert all(0 <= token < VOCAB for method in forwards["methods"].values() for token in (len(method["matrix"]),))


def test_bad_runs(finished, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="holds no finished run"):
        analyse(SpecificitySettings(tmp_path))
    with pytest.raises(ValueError, match=r"no records at the ratio 0\.2; it has 0\.05, 0\.1"):
        analyse(SpecificitySettings(finished, ratio=0.2))
    with pytest.raises(ValueError, match="no method 'slimming'; it has activations, random"):
        analyse(SpecificitySettings(finished, method="slimming"))
    for change in ({"shared": -1}, {"tokens": -1}, {"device": "banana"}):
        with pytest.raises(ValueError, match=f"{next(iter(change))} is"):
            SpecificitySettings(finished, **change)
    for name in ("config.json", "records.jsonl"):
        (tmp_path / name).write_text((finished / name).read_text())
    (tmp_path / "summary.json").write_text(json.dumps({"benchmark": "inj", "methods": {}}))
    with pytest.raises(ValueError, match="a run of inj; give one of del"):
        analyse(SpecificitySettings(tmp_path))
    summary = (finished / "summary.json").read_text()
    (tmp_path / "summary.json").write_text(summary)
    with pytest.raises(ValueError, match="holds no scores"):
        analyse(SpecificitySettings(tmp_path, device="cpu"))
    monkeypatch.setattr("sys.argv", ["specificity", str(tmp_path), "--device", "cpu"])
    with pytest.raises(SystemExit, match=r"error: .*holds no scores"):
        specificity.main()
