"""A run that is extended in its folder keeps its records byte for byte, and makes those that are missing."""

import json
from dataclasses import replace
from pathlib import Path

import engines
import pytest
import torch

from conftest import Killed, keys_of, records_of
from memloc_lens import load_model
from memloc_lens.benchmarks import deletion, finished_del, injection
from memloc_lens.benchmarks.agreement import AgreementSettings, compare
from memloc_lens.benchmarks.deletion import DeletionSettings
from memloc_lens.benchmarks.injection import InjectionSettings
from memloc_lens.benchmarks.specificity import SpecificitySettings, analyse
from memloc_lens.data import find
from memloc_lens.data.found import FindSettings
from memloc_lens.runs.scores import score_file
from memloc_lens.runs.settings import RunSettings


@pytest.fixture(autouse=True)
def loaded_once(small_del, monkeypatch):
    """Load the model once: what is tested is not how it is loaded."""
    model = load_model(small_del.model, device="cpu")
    monkeypatch.setattr(RunSettings, "load_model", lambda self: model)
    return model


@pytest.fixture
def del_of_two(small_del, tmp_path) -> DeletionSettings:
    settings = replace(small_del, out=tmp_path / "del", methods=("random",), ratios=(0.5,), limit=2, batch=16)
    deletion.run(settings)
    return settings


@pytest.fixture
def inj_of_one(small_inj, tmp_path) -> InjectionSettings:
    settings = replace(small_inj, out=tmp_path / "inj", methods=("random",), ratios=(0.2,), limit=1)
    injection.run(settings)
    return settings


def test_a_del_run_grows(del_of_two, tmp_path):
    out = del_of_two.out
    old, scores = (out / "records.jsonl").read_bytes(), score_file(out, "random", 0).read_bytes()
    larger = replace(del_of_two, limit=5, methods=("random", "activations"), ratios=(0.1, 0.5))
    summary = deletion.run(larger)
    assert (out / "records.jsonl").read_bytes().startswith(old)
    assert score_file(out, "random", 0).read_bytes() == scores
    fresh = replace(larger, out=tmp_path / "fresh")
    assert deletion.run(fresh) == summary
    assert sorted(map(str, records_of(out))) == sorted(map(str, records_of(fresh.out)))
    config = json.loads((out / "config.json").read_text())
    assert config["extents"] == [2, 5]
    assert [id for id, _ in config["sequences"]] == [f"s{index}" for index in range(5)]
    grown = (out / "records.jsonl").read_bytes()
    assert deletion.run(larger, engines.forbidden) == summary
    assert analyse(SpecificitySettings(out, device="cpu", ratio=0.1))["sequences"] == [f"s{i}" for i in range(5)]
    of_first = deletion.run(replace(larger, limit=2), engines.forbidden)
    assert of_first["sequences"] == of_first["methods"]["activations"]["0.1"]["self_acc"]["n"] == 2
    assert (out / "records.jsonl").read_bytes() == grown
    assert analyse(SpecificitySettings(out, device="cpu", ratio=0.1))["sequences"] == ["s0", "s1"]


def test_a_new_method_keeps_the_batches_of_a_larger_run(del_of_two):
    """A run of fewer sequences than the folder has localizes the batch whole, and records its own."""
    deletion.run(replace(del_of_two, limit=1, methods=("activations",)))
    found = [key for key in keys_of(records_of(del_of_two.out)) if key[1] == "activations"]
    assert found == [("s0", "activations", 0.5)]
    file = score_file(del_of_two.out, "activations", 0)
    before = file.read_bytes()
    deletion.run(replace(del_of_two, methods=("activations",)))
    assert file.read_bytes() == before


def test_a_table_says_which_methods_are_not_complete(del_of_two, capsys):
    larger = replace(del_of_two, limit=3, methods=("activations",))
    deletion.show(larger, deletion.run(larger))
    assert "random: 2 of 3 sequences only" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"has 2 of 3 sequences of random at the ratio 0\.5; name the method"):
        analyse(SpecificitySettings(larger.out, device="cpu"))


def test_sequences_of_a_grown_run_are_those_of_the_data(del_of_two, tmp_path):
    lines = del_of_two.data.read_text().splitlines(keepends=True)
    (tmp_path / "data.jsonl").write_text("".join([lines[1], lines[0], *lines[2:]]))
    with pytest.raises(ValueError, match=r"sequence 1 is \['s0', .* there and \['s1', .* here"):
        deletion.run(replace(del_of_two, data=tmp_path / "data.jsonl", limit=4))
    (tmp_path / "data.jsonl").write_text("".join(lines))
    deletion.run(replace(del_of_two, data=tmp_path / "data.jsonl"), engines.forbidden)  # the same at another place
    (tmp_path / "data.jsonl").write_text("".join([*lines[:4], *lines[5:]]))
    with pytest.raises(ValueError, match="the sequences or the text that damage is measured on differ"):
        deletion.run(replace(del_of_two, data=tmp_path / "data.jsonl"))


def test_an_inj_run_grows(inj_of_one, tmp_path):
    old = (inj_of_one.out / "records.jsonl").read_bytes()
    larger = replace(inj_of_one, limit=2, methods=("random", "weight-norm"), ratios=(0.2, 0.01))
    summary = injection.run(larger)
    assert (inj_of_one.out / "records.jsonl").read_bytes().startswith(old)
    fresh = replace(larger, out=tmp_path / "fresh")
    assert injection.run(fresh) == summary
    assert sorted(map(str, records_of(larger.out))) == sorted(map(str, records_of(fresh.out)))


@pytest.fixture
def search(small_del, tmp_path) -> FindSettings:
    return FindSettings(
        corpus=(str(small_del.data),),
        model=small_del.model,
        out=tmp_path / "found",
        prompt=6,
        suffix=8,
        min_distinct=1,
        min_accuracy=0.1,
        max_distance=-1,
        batch=3,
        limit=4,
        device="cpu",
    )


def test_a_search_grows(search, tmp_path):
    find.run(search)
    old = (search.out / "records.jsonl").read_bytes()
    for limit in (6, 0):
        report = find.run(replace(search, limit=limit))
        assert (search.out / "records.jsonl").read_bytes().startswith(old)
        fresh = replace(search, limit=limit, out=tmp_path / f"fresh-{limit}")
        assert find.run(fresh)["counts"] == report["counts"]
        assert (search.out / "sequences.jsonl").read_text() == (fresh.out / "sequences.jsonl").read_text()
    again = (search.out / "records.jsonl").read_bytes()
    find.run(search)
    assert (search.out / "records.jsonl").read_bytes() == again


@pytest.mark.parametrize("limit", [0, 7])
def test_a_corpus_that_changes_where_an_interrupted_search_has_not_been(search, tmp_path, dies_after, limit):
    corpus = tmp_path / "corpus.jsonl"
    content = Path(search.corpus[0]).read_text().splitlines(keepends=True)
    corpus.write_text("".join(content))
    settings = replace(search, corpus=(str(corpus),), batch=1, limit=limit)
    dies_after(2)
    with pytest.raises(Killed):
        find.run(settings)
    dies_after(0)
    corpus.write_text("".join([*content[:2], *(line.replace("[", "[3, ", 1) for line in content[2:])]))
    with pytest.raises(ValueError, match="the corpus is not the one that the run began with"):
        find.run(settings)


def retrained(model):
    model.blocks[1].mlp.W_out.data[3, 4] += 1e-6


def test_a_model_that_was_retrained_in_place_is_noticed(del_of_two, inj_of_one, search, loaded_once, monkeypatch):
    find.run(search)
    retrained(loaded_once)
    for module, settings in ((deletion, del_of_two), (injection, inj_of_one)):
        with pytest.raises(ValueError, match="the weights differ: their fingerprint is"):
            module.run(replace(settings, limit=3))
    for module, name in ((finished_del, "load_model"), (FindSettings, "load_model")):
        monkeypatch.setattr(module, name, lambda *_, **__: loaded_once)
    with pytest.raises(ValueError, match="the weights differ: their fingerprint is"):
        find.run(search)
    with pytest.raises(ValueError, match=r"the weights of .* differ from those that .* is a run of"):
        analyse(SpecificitySettings(del_of_two.out, device="cpu"))


def test_runs_of_two_models_are_not_compared(del_of_two, inj_of_one, loaded_once, tmp_path):
    runs = AgreementSettings(del_of_two.out, inj_of_one.out, baselines=True)
    with pytest.raises(ValueError, match="the runs share the methods random; a comparison needs 3"):
        compare(runs)
    retrained(loaded_once)
    injection.run(replace(inj_of_one, out=tmp_path / "other"))
    with pytest.raises(ValueError, match=r"are runs of two models, .* whose weights or precision differ; give"):
        compare(replace(runs, run_inj=tmp_path / "other"))


def test_a_folder_of_an_earlier_version_is_refused(del_of_two):
    config = json.loads((del_of_two.out / "config.json").read_text())
    for name in ("weights", "sequences", "extents", "threads"):
        del config[name]
    (del_of_two.out / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has no fingerprint of the weights, since an earlier version wrote it"):
        deletion.run(del_of_two)
    assert analyse(SpecificitySettings(del_of_two.out, device="cpu"))["sequences"] == ["s0", "s1"]


def test_a_resumed_run_computes_on_as_many_threads(del_of_two, monkeypatch, capsys):
    (began,) = {json.loads((del_of_two.out / "config.json").read_text())["threads"]}
    assert began == torch.get_num_threads()
    seen = []

    class Watching:
        name = "watching"

        def __call__(self, model, sequences):
            seen.append(torch.get_num_threads())
            return torch.rand(len(sequences), model.cfg.n_layers, model.cfg.d_mlp)

    torch.set_num_threads(began + 1)
    try:
        deletion.run(replace(del_of_two, methods=(Watching(),)))
        assert seen == [began]
        assert torch.get_num_threads() == began + 1
        assert f"computing on {began} threads, as the run began" in capsys.readouterr().err
    finally:
        torch.set_num_threads(began)
