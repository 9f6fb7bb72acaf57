import errno
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from memloc_lens.runs import folder as folder_module
from memloc_lens.runs.folder import RunFolder
from memloc_lens.runs.provenance import provenance
from memloc_lens.runs.scores import kept_scores, score_file, score_files_kept_back

ZERO_OUT = {"callable": "memloc_lens:ZeroOut", "first_layer": 1}
CONFIG = {"model": "m", "ratios": (0.1,), "methods": {"zero-out": ZERO_OUT}}
RECORD = {"sequence": "a", "method": "zero-out", "ratio": 0.1, "self_acc": -3.0}


def config_of(path: Path) -> dict:
    return json.loads((path / "config.json").read_text())


def test_records_survive(tmp_path):
    RunFolder(tmp_path / "run", CONFIG).append(RECORD)
    again = RunFolder(tmp_path / "run", CONFIG)
    assert again.records == [RECORD]
    assert again["a", "zero-out", 0.1] == RECORD
    assert ("a", "zero-out", 0.1) in again
    assert ("a", "zero-out", 0.2) not in again


def test_another_key(tmp_path):
    RunFolder(tmp_path, {}, key=("step", "item")).append({"step": "scan", "item": 3, "found": True})
    again = RunFolder(tmp_path, {}, key=("step", "item"))
    assert ("scan", 3) in again
    assert ("scan", 4) not in again


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "n"}, "model is 'm' there and 'n' here"),
        ({"seed": 3}, "seed is None there and 3 here"),
        ({"methods": {"zero-out": ZERO_OUT | {"first_layer": 2}}}, "zero-out.first_layer is 1 there and 2 here"),
        ({"methods": {"zero-out": {"callable": "mine:ZeroOut"}}}, "zero-out.first_layer is 1 there and None here"),
    ],
)
def test_another_configuration_is_refused_and_nothing_lost(tmp_path, change, message):
    RunFolder(tmp_path, CONFIG).append(RECORD)
    before = config_of(tmp_path)
    with pytest.raises(ValueError, match=f"{message}.*--out"):
        RunFolder(tmp_path, CONFIG | change)
    assert config_of(tmp_path) == before
    assert RunFolder(tmp_path, CONFIG).records == [RECORD]


def test_methods_and_ratios_are_added(tmp_path):
    RunFolder(tmp_path, CONFIG).append(RECORD)
    random = {"callable": "memloc_lens:Random", "seed": 0}
    added = RunFolder(tmp_path, CONFIG | {"ratios": (0.01, 0.5), "methods": {"random": random}})
    assert added.records == [RECORD]
    for config in (added.config, config_of(tmp_path)):
        assert config["ratios"] == [0.01, 0.1, 0.5]
        assert config["methods"] == {"zero-out": ZERO_OUT, "random": random}
    with pytest.raises(ValueError, match=r"random\.seed is 0 there and 1 here"):
        RunFolder(tmp_path, CONFIG | {"methods": {"random": random | {"seed": 1}}})


def test_the_source_that_wrote_records_is_kept(tmp_path, monkeypatch):
    RunFolder(tmp_path, CONFIG)
    RunFolder(tmp_path, CONFIG)
    (first,) = config_of(tmp_path)["written_by"]
    assert re.fullmatch("[0-9a-f]{16}", first["source_sha256"])
    monkeypatch.setattr(folder_module, "provenance", lambda: {"memloc_lens": "9", "source_sha256": "0"})
    RunFolder(tmp_path, CONFIG)
    assert config_of(tmp_path)["written_by"] == [first, {"memloc_lens": "9", "source_sha256": "0"}]


def test_a_changed_file_is_another_source(monkeypatch):
    before = provenance.__wrapped__()
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b" " * (path.name == "checks.py"))
    assert provenance.__wrapped__()["source_sha256"] != before["source_sha256"]
    monkeypatch.setattr(Path, "read_bytes", read)
    assert provenance.__wrapped__() == before


def test_an_unreadable_configuration_is_one_error(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        RunFolder(tmp_path, CONFIG)


def test_settings_of_any_type_are_written(tmp_path):
    config = {"methods": {"mine": {"where": tmp_path / "mine.pt"}}}
    assert RunFolder(tmp_path / "run", config).config["methods"]["mine"]["where"] == str(tmp_path / "mine.pt")
    RunFolder(tmp_path / "run", config)
    with pytest.raises(ValueError, match=r"mine\.where is '.*mine\.pt' there and 'x' here"):
        RunFolder(tmp_path / "run", {"methods": {"mine": {"where": Path("x")}}})


def test_scores_are_computed_once(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {"scores": torch.arange(6.0).view(2, 3).T}

    first, second = (kept_scores(score_file(tmp_path, "zero-out", 0), compute) for _ in range(2))
    assert torch.equal(first["scores"], compute()["scores"])
    assert torch.equal(first["scores"], second["scores"])
    assert len(calls) == 2  # once by the file, once by this test
    assert score_file(tmp_path, "zero-out", 12).name == "zero-out-00012.safetensors"
    assert score_file(tmp_path, "zero-out", 0.05, 3).name == "zero-out-0.05-00003.safetensors"


def test_scores_that_a_worker_finds_are_handed_back(tmp_path):
    """Its disk may be another than that of the run."""
    kept_scores(file := score_file(tmp_path, "x"), lambda: {"scores": torch.ones(2)}, "these weights")
    with score_files_kept_back() as files:
        assert kept_scores(file, dict, "these weights")["scores"].tolist() == [1, 1]
    (found,) = files
    assert (found.path, found.tensors["scores"].tolist(), found.of) == (file, [1, 1], "these weights")


def test_scores_cut_short_are_computed_again(tmp_path):
    file = score_file(tmp_path, "x")
    kept_scores(file, lambda: {"scores": torch.zeros(100)})
    file.write_bytes(file.read_bytes()[:50])
    assert kept_scores(file, lambda: {"scores": torch.ones(2)})["scores"].tolist() == [1, 1]


def test_a_full_disk_is_one_error_and_loses_nothing(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path, CONFIG)
    folder.append(RECORD)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ValueError, match="is full; what was recorded is kept"):
        folder.append(RECORD | {"ratio": 0.2})
    assert RunFolder(tmp_path, CONFIG).records[0] == RECORD


def test_a_disk_that_is_full_for_scores_is_the_same_error(tmp_path, monkeypatch):
    file = score_file(tmp_path, "x")
    with pytest.raises(SafetensorError) as missing:  # how safetensors tells what the system said
        save_file({"scores": torch.ones(2)}, tmp_path / "missing" / "x")
    said = str(missing.value).replace(f"os error {errno.ENOENT}", f"os error {errno.ENOSPC}")
    assert said != str(missing.value)

    def full(*arguments):
        raise SafetensorError(said)

    monkeypatch.setattr("memloc_lens.runs.scores.save_file", full)
    with pytest.raises(ValueError, match="is full; what was recorded is kept"):
        kept_scores(file, lambda: {"scores": torch.ones(2)})


def test_a_folder_that_cannot_be_made_is_one_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        RunFolder(tmp_path / "file" / "run", CONFIG)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "x", [1.0], {"a": float("nan")}])
def test_a_value_that_is_no_finite_number_is_not_recorded(tmp_path, value):
    folder = RunFolder(tmp_path, CONFIG)
    with pytest.raises(ValueError, match=r"sequence a, method zero-out, ratio 0\.1: self_acc is .*, where a finite"):
        folder.append(RECORD | {"self_acc": value})
    assert not (tmp_path / "records.jsonl").exists()
