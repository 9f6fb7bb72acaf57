"""What trackers get, read back from the files that they write."""

import json
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record as WandbRecord

from conftest import Killed, records_of
from memloc_lens.benchmarks import deletion, injection
from memloc_lens.runs.folder import RunFolder
from memloc_lens.runs.trackers import TRACKERS

BLOCK, HEADER = 2**15, 7
RECORD = {"sequence": "a", "method": "random", "ratio": 0.1, "self_acc": -3.0}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def wandb_histories(out: Path) -> list[list[dict]]:
    """The rows that each process logged to Weights & Biases, first process first."""
    return [
        [
            {item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            for record in map(WandbRecord.FromString, log_entries(file.read_bytes()))
            if record.WhichOneof("record_type") == "history"
        ]
        for file in sorted((out / "wandb").glob("offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime_ns)
    ]


def log_entries(content: bytes) -> list[bytes]:
    """The entries of a file in the log format of LevelDB: parts with a header, in blocks."""
    entries, at = [b""], HEADER
    while at + HEADER <= len(content):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        length, part = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        entries[-1] += content[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if part in (1, 4):  # whole, or the last part
            entries.append(b"")
    return entries[:-1]


def in_wandb(out: Path) -> dict[int, dict[str, float]]:
    """What Weights & Biases has by step; no step is there twice."""
    rows = [row for history in wandb_histories(out) for row in history]
    assert len({row["_step"] for row in rows}) == len(rows)
    return {row["_step"]: {name: row[name] for name in row if not name.startswith("_")} for row in rows}


def in_tensorboard(out: Path) -> dict[int, dict[str, float]]:
    """What TensorBoard has by step; nothing is there twice."""
    events, steps = EventAccumulator(str(out / "tensorboard")).Reload(), {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            assert name not in steps.setdefault(event.step, {})
            steps[event.step][name] = event.value
    return steps


READ = {"wandb": in_wandb, "tensorboard": in_tensorboard}


def expected(out: Path) -> dict[int, dict[str, float]]:
    """The numbers of the lines of records.jsonl, but for times, by the number of the line."""
    about = {"sequence", "method", "ratio", "crc32"}
    return {
        number: {
            f"{record['method']}/{record['ratio']}/{name}": pytest.approx(float(value))
            for name, value in record.items()
            if name not in about and not isinstance(value, list | dict)
        }
        for number, record in enumerate(records_of(out), 1)
    }


def untimed(steps: dict[int, dict[str, float]]) -> dict[int, dict[str, float]]:
    return {
        step: {name: value for name, value in row.items() if not name.endswith("_seconds")}
        for step, row in steps.items()
    }


@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_resumed_run_logs_every_record_once(tracker, small_del, tmp_path, dies_after):
    settings = replace(small_del, out=tmp_path / "run", tracker=tracker, methods=("random", "weight-norm"))
    dies_after(8)
    with pytest.raises(Killed):
        deletion.run(settings)
    dies_after(0)
    deletion.run(settings)
    deletion.run(settings)  # nothing is left to do, and nothing to log
    logged = untimed(READ[tracker](settings.out))
    assert len(logged) == 3 + 3 * 2 * 2  # the state before, methods and ratios
    assert logged == expected(settings.out)
    assert logged[1].keys() >= {"before/0.0/self_acc", "before/0.0/self_free_acc"}


def test_a_record_is_on_the_disk_before_it_is_logged(tmp_path, monkeypatch):
    lines = []

    @contextmanager
    def tracker(folder, config):
        yield lambda numbers, count: lines.append((count, (folder / "records.jsonl").read_bytes().count(b"\n")))

    monkeypatch.setitem(TRACKERS, "watch", tracker)
    with RunFolder(tmp_path, {}) as folder:
        folder.append(RECORD)
        folder.track("watch")
        for ratio in (0.2, 0.3):
            folder.append(RECORD | {"ratio": ratio})
    assert lines == [(2, 2), (3, 3)]


@pytest.mark.parametrize("tracker", TRACKERS)
def test_injections_are_logged(tracker, small_inj, tmp_path):
    settings = replace(small_inj, out=tmp_path / "run", tracker=tracker, methods=("random",))
    injection.run(settings)
    logged = READ[tracker](settings.out)
    assert untimed(logged) == expected(settings.out)
    assert {row.get("injection/0.2/succeeded") for row in logged.values()} == {1.0, None}


def test_a_tracker_does_not_identify_a_run(small_del, tmp_path):
    settings = replace(small_del, out=tmp_path / "run", methods=("random",))
    deletion.run(settings)
    deletion.run(replace(settings, tracker="tensorboard"))
    assert "tracker" not in json.loads((settings.out / "config.json").read_text())
    assert in_tensorboard(settings.out) == {}


def failing(at: str):
    """A tracker that fails while it is opened, or in logging its second record, or while it is closed."""
    counts = []

    @contextmanager
    def tracker(folder, config):
        if at == "opening":
            raise ConnectionError("no\nnetwork")

        def log(numbers, count):
            counts.append(count)
            if at == "logging" and count == 2:
                raise ConnectionError("no\nnetwork \x1b[31m")

        yield log
        if at == "closing":
            raise ConnectionError("no\nnetwork")

    return tracker, counts


@pytest.mark.parametrize(("at", "logged"), [("logging", [1, 2]), ("closing", [1, 2, 3])])
def test_a_failing_tracker_costs_no_record(at, logged, tmp_path, monkeypatch, capsys):
    tracker, counts = failing(at)
    monkeypatch.setitem(TRACKERS, "torn", tracker)
    with RunFolder(tmp_path / "run", {}) as folder:
        folder.track("torn")
        for ratio in (0.1, 0.2, 0.3):
            folder.append(RECORD | {"ratio": ratio})
    assert [record["ratio"] for record in RunFolder(tmp_path / "run", {}).records] == [0.1, 0.2, 0.3]
    assert counts == logged
    shown = capsys.readouterr().err
    assert shown.count("the tracker torn failed, and the run goes on without it: no network") == 1
    assert "\x1b" not in shown


def test_a_tracker_that_cannot_be_opened_is_one_error(small_del, tmp_path, monkeypatch):
    monkeypatch.setitem(TRACKERS, "json", failing("opening")[0])
    settings = replace(small_del, out=tmp_path / "run", tracker="json", methods=("random",))
    with pytest.raises(ValueError, match="the tracker json cannot be opened: no network; run without it"):
        deletion.run(settings)
    assert not (tmp_path / "run" / "records.jsonl").exists()
    deletion.run(replace(settings, tracker=None))  # the folder is free


def test_wrong_trackers_are_refused(monkeypatch, small_del):
    with pytest.raises(ValueError, match="tracker is 'paper'; it must be one of 'wandb', 'tensorboard'"):
        replace(small_del, tracker="paper")
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(
        ValueError, match="tracker is 'tensorboard', and its library is not installed: pip install tensorboard"
    ):
        replace(small_del, tracker="tensorboard")
