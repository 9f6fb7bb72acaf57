"""Smallest sets in DEL: their records by hand, and that nothing else of a run changes."""

import json
from dataclasses import replace
from statistics import fmean

import pytest

from conftest import Killed, keys_of, records_of
from memloc_lens import COMPONENTS, Activations, WeightNorm, ablate, load_model, load_sequences, smallest_set
from memloc_lens.benchmarks.deletion import DeletionSettings, run, show
from memloc_lens.benchmarks.frontier import FrontierSettings, compare
from memloc_lens.benchmarks.measurement import METRICS
from memloc_lens.benchmarks.specificity import SpecificitySettings, analyse
from memloc_lens.metrics import free_running, suffix_accuracy, teacher_forced
from memloc_lens.runs.finished import read_run
from memloc_lens.tables.markdown import deletion_tables

METHODS = {"activations": Activations, "weight-norm": WeightNorm}


@pytest.fixture(scope="module")
def plain(small_del, tmp_path_factory) -> DeletionSettings:
    """A finished run without smallest sets."""
    out = tmp_path_factory.mktemp("plain") / "run"
    settings = replace(small_del, methods=tuple(METHODS), ratios=(0.1, 0.5), out=out)
    run(settings)
    return settings


@pytest.fixture(scope="module")
def adaptive(plain, tmp_path_factory) -> DeletionSettings:
    """The same run with smallest sets."""
    settings = replace(plain, until="greedy", until_limit=5.0, out=tmp_path_factory.mktemp("adaptive") / "run")
    run(settings)
    return settings


def smallest_of(settings) -> list[dict]:
    return [r for r in records_of(settings.out) if r["ratio"] == 0 and r["method"] != "before"]


def unsealed(records) -> list[dict]:
    return [{name: value for name, value in record.items() if name != "crc32"} for record in records]


def test_records_by_hand(adaptive):
    model = load_model(adaptive.model, device="cpu")
    sequences = load_sequences(model, adaptive.data)
    before = {record["sequence"]: record for record in records_of(adaptive.out) if record["method"] == "before"}
    records = {(record["sequence"], record["method"]): record for record in smallest_of(adaptive)}
    assert len(records) == adaptive.limit * len(METHODS)
    sizes = []
    for target in sequences[: adaptive.limit]:
        for method, localizer in METHODS.items():
            scores = localizer()(model, target)
            found = smallest_set(model, target, scores, "greedy", limit=5, first_layer=1)
            record = records[target.id, method]
            assert record["neurons"] == len(found.components)
            assert record["left"] == pytest.approx(vars(found.left))
            assert record["left_with_one_fewer"] == pytest.approx(vars(found.with_one_fewer))
            assert record["reached"] == 1
            others = [sequence for sequence in sequences if sequence.id != target.id]
            with ablate(model, found.components):
                free = suffix_accuracy(free_running(model, [target]), [target]).item()
                neg = suffix_accuracy(teacher_forced(model, others), others).mean().item()
            assert record["self_free_acc"] == pytest.approx(free - before[target.id]["self_free_acc"], abs=1e-4)
            assert record["neg_acc"] == pytest.approx(neg - before[target.id]["neg_acc"], abs=1e-4)
            sizes.append(record["neurons"])
    assert len(set(sizes)) > 2


def test_the_summary_and_the_tables(adaptive, capsys):
    summary = json.loads((adaptive.out / "summary.json").read_text())
    smallest = summary["smallest_sets"]
    assert (smallest["until"], smallest["limit"], smallest["samples"]) == ("greedy", 5, 1000)
    show(adaptive, summary)
    shown, page = capsys.readouterr().out, deletion_tables(summary, METRICS)
    assert "Smallest sets of neurons, until greedy is below 5: number, and change without them" in shown
    assert "**Smallest sets of neurons, until greedy is below 5**" in page
    for method in METHODS:
        records = [record for record in smallest_of(adaptive) if record["method"] == method]
        for name in ("neurons", "self_acc", "neg_acc"):
            mean = fmean(record[name] for record in records)
            assert smallest["methods"][method][name]["mean"] == pytest.approx(mean)
        count = fmean(record["neurons"] for record in records)
        assert f"{count:.0f}" in shown
        assert f"{count:.0f}" in page.split("Smallest sets")[1]
    assert "neurons |" in page.split("Smallest sets")[1].splitlines()[2]


def test_the_rest_of_a_run_is_as_without(plain, adaptive):
    at_shares = [r for r in records_of(adaptive.out) if r["ratio"] or r["method"] == "before"]
    assert sorted(map(str, at_shares)) == sorted(map(str, records_of(plain.out)))
    summary = json.loads((adaptive.out / "summary.json").read_text())
    del summary["smallest_sets"]
    assert summary == json.loads((plain.out / "summary.json").read_text())
    finished = read_run(adaptive.out, "del")
    assert finished.ratios == [0.1, 0.5]
    with pytest.raises(ValueError, match=r"no records at the ratio 0\.0"):
        finished.check_ratio(0.0, None)
    both = [analyse(SpecificitySettings(settings.out, device="cpu")) for settings in (plain, adaptive)]
    assert both[0]["methods"] == both[1]["methods"]
    both = [compare(FrontierSettings((settings.out,)))["methods"] for settings in (plain, adaptive)]
    for method in METHODS:
        assert both[0][method]["values"]["self@2"] == both[1][method]["values"]["self@2"]
        assert both[0][method]["shares"] == both[1][method]["shares"] == 2


def test_a_killed_run_goes_on_to_the_same_records(adaptive, tmp_path, dies_after):
    settings = replace(adaptive, out=tmp_path / "run")
    for count in (4, 9, 10, 19):
        dies_after(count)
        with pytest.raises(Killed):
            run(settings)
    dies_after(0)
    run(settings)
    assert records_of(settings.out) == records_of(adaptive.out)
    assert (settings.out / "summary.json").read_text() == (adaptive.out / "summary.json").read_text()
    records = (settings.out / "records.jsonl").read_bytes()
    run(settings)
    assert (settings.out / "records.jsonl").read_bytes() == records


def test_smallest_sets_are_added_to_an_old_run(plain, adaptive, tmp_path):
    settings = replace(plain, out=tmp_path / "run", methods=("activations",), limit=2)
    config = tmp_path / "run" / "config.json"
    run(settings)
    written = json.loads(config.read_text())
    del written["smallest_sets"]  # as an earlier version wrote it
    config.write_text(json.dumps(written))
    old = (settings.out / "records.jsonl").read_bytes()
    extended = replace(settings, until="greedy", until_limit=5)
    run(extended)
    records = (settings.out / "records.jsonl").read_bytes()
    assert records.startswith(old)
    assert keys_of(records_of(settings.out)[-2:]) == [("s0", "activations", 0.0), ("s1", "activations", 0.0)]
    run(replace(extended, methods=tuple(METHODS), limit=3))
    # a run without them adds a share, and keeps those that are there
    summary = run(replace(settings, methods=tuple(METHODS), limit=3, ratios=(0.1, 0.5)))
    fresh = json.loads((adaptive.out / "summary.json").read_text())
    assert summary["methods"] == fresh["methods"]
    assert summary["smallest_sets"] == fresh["smallest_sets"]
    for change, message in (
        ({"until": "accuracy"}, "until is 'greedy' there and 'accuracy' here"),
        ({"until_limit": 4}, "limit is 5 there and 4 here"),
    ):
        with pytest.raises(ValueError, match=message):
            run(replace(extended, **change))


@pytest.mark.parametrize("component", ["head", "weight"])
def test_heads_and_weights_of_all_layers_together(small_del, tmp_path, component):
    settings = replace(
        small_del, component=component, methods=("activations",), ratios=(0.5,), limit=1, scope="global",
        until="accuracy", until_limit=90, out=tmp_path,
    )  # fmt: skip
    run(settings)
    (record,) = smallest_of(settings)
    model, kind = load_model(settings.model, device="cpu"), COMPONENTS[component]
    target = load_sequences(model, settings.data)[0]
    scores = Activations(component=component)(model, target)
    found = smallest_set(model, target, scores, "accuracy", limit=90, first_layer=1, scope="global", component=kind)
    assert record[kind.plural] == len(found.components)
    assert record["left"]["accuracy"] < 90 <= record["left_with_one_fewer"]["accuracy"]


def test_what_no_set_makes_unextractable_is_said(small_del, tmp_path, capsys):
    settings = replace(
        small_del, methods=("random",), ratios=(0.5,), limit=2, until="sampled", until_limit=1e-40, out=tmp_path
    )
    summary = run(settings)
    show(settings, summary)
    assert {(record["neurons"], record["reached"]) for record in smallest_of(settings)} == {(2 * 128, 0)}
    assert "random: 2 of 2 sequences stay extractable even without all" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"until_limit": 3}, "until_limit is 3, and no until is given"),
        ({"until": "accuracy", "until_limit": 200}, "the limit of the accuracy is 200"),
        ({"until": "greedy", "until_limit": 1.5}, "the limit in tokens is 1.5; it must be a whole number"),
        ({"until": "greedy", "until_limit": 99}, "the limit is 99 tokens and the suffix has 8"),
        ({"until": "sampled", "until_samples": 0}, "until_samples is 0"),
    ],
)
def test_bad_budgets(small_del, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        run(replace(small_del, out=tmp_path / "run", **change))
    assert not (tmp_path / "run").exists()
