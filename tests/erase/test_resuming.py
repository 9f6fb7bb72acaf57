"""A killed audit resumes: what was measured is not measured again, and nothing stale is read."""

import copy
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from scipy.stats import bootstrap
from tiny import tiny_model, tiny_sequence

from conftest import Killed, assert_same_state, state_of
from memloc_lens import ComponentSet, MemorizedSequence, ablate
from memloc_lens.erase import parts
from memloc_lens.erase.audit import audit
from memloc_lens.erase.relearning import Relearning, relearn

QUICK = Relearning(lr=1e-4, max_steps=1)
ALL = ["state", "state", "t3", "t4", "c20", "c21"]


def named(seed: int, id: str, category: str) -> MemorizedSequence:
    sequence = tiny_sequence(seed, length=12, prompt_len=4)
    return MemorizedSequence(sequence.tokens, sequence.prompt_len, id, category)


def learned(relearning, model, text, related):
    """In place of training: values that the model, the text, the related texts and the settings decide."""
    curve = [{"step": 0, "prefix": 0, "loss": model(each.tokens[None], return_type="loss").item()}
             for each in (text, *related)]  # fmt: skip
    steps = None if text.id in ("t3", "c20") else 1
    return {"itself": {"steps": steps, "max_steps": relearning.max_steps, "limit": 4, "curve": curve}}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Without what takes most of the time of a tiny audit."""
    monkeypatch.setattr("scipy.stats.bootstrap", partial(bootstrap, n_resamples=9))
    monkeypatch.setattr(parts, "relearn", learned)


@pytest.fixture
def given():
    original = tiny_model()
    erased = copy.deepcopy(original)
    erased.blocks[1].mlp.W_out.data[:3] = 0
    return dict(
        original=original,
        erased=erased,
        targets=[named(3, "t3", "one"), named(4, "t4", "two")],
        others=[named(10, "o10", "one"), named(11, "o11", "three")],
        controls=[named(seed, f"c{seed}", "one") for seed in (20, 21, 22)],
        text=torch.randint(31, (3, 12), generator=torch.Generator().manual_seed(5)),
        relearning=QUICK,
        quiet=True,
    )


@pytest.fixture
def made(monkeypatch, quick) -> list[str]:
    """What is measured from now on: a state, or the id of a text that is learned."""
    made: list[str] = []

    def watched(name, measure, place):
        def watching(*arguments):
            found = measure(*arguments)
            made.append(name or arguments[place].id)
            return found

        return watching

    monkeypatch.setattr(parts, "state_of", watched("state", parts.state_of, 0))
    monkeypatch.setattr(parts, "relearn", watched("", parts.relearn, 2))
    return made


def test_a_killed_audit_resumes(given, made, tmp_path, dies_after):
    whole = audit(**given)
    assert made == ALL
    for death in range(1, len(ALL)):
        made.clear()
        work = tmp_path / str(death)
        dies_after(death)
        with pytest.raises(Killed):
            audit(**given, work=work)
        assert made == ALL[:death]
        made.clear()
        dies_after(0)
        assert json.dumps(audit(**given, work=work)) == json.dumps(whole)
        assert made == ALL[death:]
    made.clear()
    assert audit(**given, work=str(work)) == whole
    assert made == []


def test_a_killed_audit_that_trains_resumes(given, tmp_path, dies_after, monkeypatch):
    monkeypatch.setattr(parts, "relearn", relearn)
    whole = audit(**given)
    before = state_of(given["erased"])
    dies_after(4)
    with pytest.raises(Killed):
        audit(**given, work=tmp_path)
    dies_after(0)
    assert json.dumps(audit(**given, work=tmp_path)) == json.dumps(whole)
    assert_same_state(before, state_of(given["erased"]))
    assert any(told["steps"] is None for told in whole["relearning"]["itself"]["relearned"]["erased"].values())


def test_an_error_in_a_part_keeps_those_before(given, made, tmp_path, monkeypatch):
    working = parts.relearn

    def broken(relearning, model, text, related):
        if text.id == "c20":
            raise ValueError("the loss is nan")
        return working(relearning, model, text, related)

    monkeypatch.setattr(parts, "relearn", broken)
    with pytest.raises(ValueError, match="the loss is nan"):
        audit(**given, work=tmp_path)
    assert made == ALL[:4]
    monkeypatch.setattr(parts, "relearn", working)
    made.clear()
    audit(**given, work=tmp_path)
    assert made == ALL[4:]


def test_a_line_that_was_cut_short_is_measured_again(given, made, tmp_path):
    whole = audit(**given, work=tmp_path)
    file = tmp_path / "records.jsonl"
    file.write_bytes(file.read_bytes()[:-40])
    made.clear()
    assert audit(**given, work=tmp_path) == whole
    assert made == ["c21"]


def zero_a_weight(given):
    given["erased"].blocks[0].mlp.W_out.data[0, 0] = 0


def swap_controls(given):
    given["controls"] = given["controls"][::-1]


def change(**values):
    return partial(dict.update, **values)


RENAMED = named(3, "t3", "other")
LEARNED = ALL[2:]


@pytest.mark.parametrize(("edit", "expected"), [
    (zero_a_weight, ["state", *LEARNED]),  # the original's state stays
    (change(relearning=Relearning(lr=1e-4, max_steps=3)), LEARNED),
    (change(samples=7), ["state", "state"]),
    (change(share=0.5), ["state", "state"]),
    (change(batch=1), ["state", "state"]),
    (change(text=None), ["state", "state"]),
    (change(others=[named(11, "o11", "three")]), ["state", "state", "t3", "c20", "c21"]),  # t3's related text is gone
    (swap_controls, ["state", "state", "c22"]),
    (change(targets=[RENAMED, named(4, "t4", "two")]), ["state", "state", "t3"]),
])  # fmt: skip
def test_nothing_stale_is_read(given, made, tmp_path, edit, expected):
    first = audit(**given, work=tmp_path)
    edited = dict(given)
    edit(edited)
    made.clear()
    found = audit(**edited, work=tmp_path)
    assert made == expected
    assert found == audit(**edited)
    assert found != first


def test_the_code_counts(given, made, tmp_path, monkeypatch):
    audit(**given, work=tmp_path)
    made.clear()
    monkeypatch.setattr(parts, "provenance", lambda: {"source_sha256": "another version"})
    audit(**given, work=tmp_path)
    assert made == ALL


def test_a_retrained_model_adds_its_parts(given, made, tmp_path):
    audit(**given, work=tmp_path)
    made.clear()
    audit(**given, retrained=given["original"], work=tmp_path)
    assert made == ["t3", "t4"]


def test_the_folder_is_for_one_process(given, made, tmp_path):
    with FileLock(tmp_path / "run.lock"), pytest.raises(ValueError, match=r"is in use by another process"):
        audit(**given, work=tmp_path)
    assert made == []


def test_a_folder_of_something_else_is_refused(given, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model": "embedded"}))
    with pytest.raises(ValueError, match="belongs to a run with another configuration"):
        audit(**given, work=tmp_path)


def test_a_hook_is_refused_with_a_folder_alone(given, tmp_path):
    members = torch.zeros(2, 6, dtype=torch.bool)
    members[0, 0] = True
    with ablate(given["erased"], ComponentSet(members)):
        with pytest.raises(ValueError, match="the erased model has a hook, such as an open ablation"):
            audit(**given, work=tmp_path / "work")
        audit(**given)
    assert not Path(tmp_path / "work").exists()
