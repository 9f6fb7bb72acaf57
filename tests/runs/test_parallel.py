"""The settings that say who does the jobs of a run."""

from dataclasses import replace

import pytest

from memloc_lens.benchmarks.deletion import DeletionSettings
from memloc_lens.benchmarks.injection import InjectionSettings
from memloc_lens.erase.command import EraseSettings
from memloc_lens.runs import parallel
from memloc_lens.runs.command_line import parse, parser
from memloc_lens.runs.jobs import serial
from memloc_lens.runs.parallel import Parallel


@pytest.fixture(autouse=True)
def ray_is_found(monkeypatch):
    monkeypatch.setattr(parallel, "find_spec", lambda name: object())


def test_options(tmp_path):
    parsed = parse(DeletionSettings, "del", "", "--engine ray --workers 4 --gpus-per-worker 0.5 --address auto".split())
    assert parsed.parallel == Parallel("ray", 4, 0.5, "auto")
    (file := tmp_path / "run.toml").write_text('engine = "ray"\nworkers = 4\n')
    assert parse(InjectionSettings, "inj", "", ["--config", str(file)]).parallel == Parallel("ray", 4)
    assert parse(DeletionSettings, "del", "", []).parallel.engine_for(None) is serial
    read = parser(EraseSettings, "erase", "")
    assert read("--engine ray --workers 4 --gpus-per-worker 0.5 --address auto".split()).parallel == parsed.parallel
    assert read([]).parallel == Parallel()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(engine="ray", workers=0), "workers is 0"),
        (dict(engine="ray", gpus_per_worker=-1), "gpus_per_worker is -1"),
        (dict(workers=2), "engine is 'serial', which has one worker, this process; use --engine ray for others"),
        (dict(address="auto"), "engine is 'serial'"),
    ],
)
def test_wrong_settings(wrong, message):
    with pytest.raises(ValueError, match=message):
        Parallel(**wrong)


def test_without_ray(monkeypatch):
    monkeypatch.setattr(parallel, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r'^engine is \'ray\', and it is not installed: pip install "memloc_lens\[ray\]"$'
    ):
        Parallel("ray")


def test_tune_runs_in_one_process(small_inj):
    with pytest.raises(ValueError, match="engine is 'ray', and tune runs in one process"):
        replace(small_inj, tune=True, parallel=Parallel("ray"))


@pytest.mark.parametrize(
    ("device", "asked", "gpus"), [("cuda:1", None, 1), ("cuda", 0.5, 0.5), ("cpu", None, 0), (None, None, 0)]
)
def test_gpus_of_a_worker(device, asked, gpus):
    pytest.importorskip("ray")

    assert Parallel("ray", gpus_per_worker=asked).engine_for(device).gpus == gpus
