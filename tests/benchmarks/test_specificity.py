import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from memloc_lens import Activations
from memloc_lens.ablation import ablate
from memloc_lens.benchmarks.deletion import Settings as Deletion
from memloc_lens.benchmarks.deletion import run
from memloc_lens.benchmarks.specificity import Settings, _losses, _overlap, analyse, matrix_text, print_specificity
from memloc_lens.data import load_sequences
from memloc_lens.metrics import suffix_accuracy, teacher_forced
from memloc_lens.neurons import Neurons, top_neurons
from memloc_lens.sequence import MemorizedSequence

METHODS = ("activations", "random")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("del")
    run(Deletion(methods=METHODS, limit=5, negatives=0, controls=2, text_tokens=128, ratios=(0.05, 0.1), out=out,
                 device="cpu", batch=2))  # fmt: skip
    return out


@pytest.fixture(scope="module")
def result(finished):
    return analyse(Settings(finished, device="cpu", shared=3, tokens=2))


def test_the_matrix_is_what_each_ablation_costs_each_sequence(finished, result, embedded):
    targets = load_sequences(embedded)[:5]
    assert result["sequences"] == [target.id for target in targets]
    scores = [finished / "scores" / f"activations-{start:05d}.safetensors" for start in (0, 2, 4)]
    assert all(file.exists() for file in scores)
    matrix = np.array(result["methods"]["activations"]["matrix"])
    before = suffix_accuracy(teacher_forced(embedded, targets), targets)
    for row in (0, 3):
        neurons = top_neurons(Activations()(embedded, targets[row]), 0.1, first_layer=1)
        with ablate(embedded, neurons):
            after = suffix_accuracy(teacher_forced(embedded, targets), targets)
        assert matrix[row] == pytest.approx((after - before).numpy(), abs=1e-3)


def test_shared_neurons_are_counted_and_fire_where_they_are_said_to(result, embedded):
    targets = load_sequences(embedded)[:5]
    for neuron in result["methods"]["activations"]["shared"]:
        layer, place = neuron["layer"], neuron["neuron"]
        assert layer >= 1
        assert 1 <= neuron["sequences"] <= 5
        _, cache = embedded.run_with_cache(torch.stack([target.tokens for target in targets]))
        strongest = cache[f"blocks.{layer}.mlp.hook_post"][:, :, place].abs().max().item()
        assert abs(neuron["fires_on"][0]["activation"]) == pytest.approx(strongest, abs=2e-3)
        assert neuron["fires_on"][0]["text"].endswith("]")


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


def test_bad_runs(finished, tmp_path):
    with pytest.raises(ValueError, match="holds no finished run"):
        analyse(Settings(tmp_path))
    with pytest.raises(ValueError, match=r"no records at the ratio 0.2; it has 0.05, 0.1"):
        analyse(Settings(finished, ratio=0.2))
    with pytest.raises(ValueError, match="no method 'slimming'; it has activations, random"):
        analyse(Settings(finished, method="slimming"))
    for name in ("config.json", "records.jsonl"):
        (tmp_path / name).write_text((finished / name).read_text())
    (tmp_path / "summary.json").write_text(json.dumps({"benchmark": "inj"}))
    with pytest.raises(ValueError, match="a run of inj; give one of del"):
        analyse(Settings(tmp_path))
    summary = (finished / "summary.json").read_text()
    (tmp_path / "summary.json").write_text(summary)
    with pytest.raises(ValueError, match="holds no scores"):
        analyse(replace(Settings(tmp_path), device="cpu"))
