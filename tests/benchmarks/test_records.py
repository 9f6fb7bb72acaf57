import errno
import json

import pytest
import torch

from memloc_lens.benchmarks.records import RunFolder

CONFIG = {"model": "m", "ratios": (0.1,)}
RECORD = {"sequence": "a", "method": "zero-out", "ratio": 0.1, "self_acc": -3.0}


def test_records_survive(tmp_path):
    RunFolder(tmp_path / "run", CONFIG).append(RECORD)
    again = RunFolder(tmp_path / "run", CONFIG)
    assert again.records == [RECORD]
    assert ("a", "zero-out", 0.1) in again
    assert ("a", "zero-out", 0.2) not in again


def test_a_line_cut_short_is_dropped(tmp_path):
    folder = RunFolder(tmp_path, CONFIG)
    folder.append(RECORD)
    with (tmp_path / "records.jsonl").open("a") as file:
        file.write(json.dumps(RECORD)[:20])
    again = RunFolder(tmp_path, CONFIG)
    assert again.records == [RECORD]
    again.append(RECORD | {"ratio": 0.2})
    assert [record["ratio"] for record in RunFolder(tmp_path, CONFIG).records] == [0.1, 0.2]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    RunFolder(tmp_path, CONFIG).append(RECORD)
    with (tmp_path / "records.jsonl").open("a") as file:
        file.write("{nonsense\n")
    with pytest.raises(ValueError, match=r"records\.jsonl, line 2: not a record"):
        RunFolder(tmp_path, CONFIG)


def test_another_configuration_is_refused_and_nothing_lost(tmp_path):
    RunFolder(tmp_path, CONFIG).append(RECORD)
    with pytest.raises(ValueError, match=r"ratios is \[0.1\] there and \[0.2\] here.*--out"):
        RunFolder(tmp_path, CONFIG | {"ratios": (0.2,)})
    assert RunFolder(tmp_path, CONFIG).records == [RECORD]


def test_an_unreadable_configuration_is_one_error(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        RunFolder(tmp_path, CONFIG)


def test_scores_are_computed_once(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {"scores": torch.arange(6.0).view(2, 3).T}

    folder = RunFolder(tmp_path, CONFIG)
    first = folder.scores("zero-out-00000", compute)
    second = RunFolder(tmp_path, CONFIG).scores("zero-out-00000", compute)
    assert torch.equal(first["scores"], second["scores"])
    assert len(calls) == 1


def test_scores_cut_short_are_computed_again(tmp_path):
    folder = RunFolder(tmp_path, CONFIG)
    folder.scores("x", lambda: {"scores": torch.zeros(100)})
    file = tmp_path / "scores" / "x.safetensors"
    file.write_bytes(file.read_bytes()[:50])
    assert folder.scores("x", lambda: {"scores": torch.ones(2)})["scores"].tolist() == [1, 1]


def test_a_full_disk_is_one_error_and_loses_nothing(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path, CONFIG)
    folder.append(RECORD)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ValueError, match="is full; what was recorded is kept"):
        folder.append(RECORD | {"ratio": 0.2})
    assert RunFolder(tmp_path, CONFIG).records[0] == RECORD


def test_a_folder_that_cannot_be_made_is_one_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        RunFolder(tmp_path / "file" / "run", CONFIG)
