"""Runs on workers of ray: what they find, and what becomes of a run whose workers die."""

import os
import shutil
import signal
import socket
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from ray_jobs import MakeWork, Mortal, Unsure, make_work

from conftest import records_of
from memloc_lens import NEURONS, load_model, load_sequences
from memloc_lens.benchmarks import deletion, injection
from memloc_lens.data import find
from memloc_lens.data.found import FindSettings
from memloc_lens.erase import command, localizing
from memloc_lens.erase.command import EraseSettings
from memloc_lens.runs.command_line import run_command
from memloc_lens.runs.folder import RunFolder
from memloc_lens.runs.jobs import InMemory, Job, run_jobs
from memloc_lens.runs.parallel import Parallel
from memloc_lens.runs.scores import read_scores
from memloc_lens.runs.settings import RunSettings

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("ignore:.*:FutureWarning:ray", "ignore:.*:ResourceWarning")

TWO = Parallel("ray", workers=2)


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """A cluster with room for two workers: the suite computes on one thread."""
    ray.init(
        address="local", num_cpus=2, object_store_memory=2**27, include_dashboard=False, log_to_driver=False,
        logging_level="ERROR",
    )  # fmt: skip
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def one_thread():
    own = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(own)


def scores_of(run: Path) -> dict[str, list]:
    return {file.name: read_scores(file)["scores"].tolist() for file in sorted((run / "scores").iterdir())}


def test_a_run_whose_worker_is_killed_equals_one_in_this_process(small_del, tmp_path):
    methods = ("gradient", Mortal(flag=str(tmp_path / "killed")), "activations", "weight-norm")
    settings = replace(small_del, out=tmp_path / "ray", methods=methods)
    deletion.run(replace(settings, parallel=TWO))
    assert (tmp_path / "killed").exists()
    deletion.run(replace(settings, out=tmp_path / "here"))
    assert sorted(records_of(settings.out), key=str) == sorted(records_of(tmp_path / "here"), key=str)
    assert (settings.out / "summary.json").read_text() == (tmp_path / "here" / "summary.json").read_text()
    assert scores_of(settings.out) == scores_of(tmp_path / "here")


def test_workers_of_inj_write_nothing(whole_inj, tmp_path, monkeypatch):
    from memloc_lens.runs import ray_engine

    sent = []
    monkeypatch.setattr(ray_engine, "kept_scores", lambda path, compute, of: sent.append((path, compute(), of)))
    injection.run(replace(whole_inj, out=tmp_path, parallel=TWO))
    assert sorted(records_of(tmp_path), key=str) == sorted(records_of(whole_inj.out), key=str)
    assert not (tmp_path / "scores").exists()
    assert {path.name: tensors["scores"].tolist() for path, tensors, _ in sent} == scores_of(whole_inj.out)
    assert {path.parent for path, *_ in sent} == {tmp_path / "scores"}


@pytest.mark.slow
def test_find(recited, tmp_path):
    settings = FindSettings(
        corpus=(str(recited / "data.jsonl"),), model=str(recited / "model"), device="cpu", prompt=6, suffix=8, batch=2,
        min_accuracy=0.1, min_distinct=1, max_distance=-1, dev=2,
    )  # fmt: skip
    find.run(replace(settings, out=tmp_path / "ray", parallel=Parallel("ray", workers=1)))
    find.run(replace(settings, out=tmp_path / "here"))
    assert sorted(records_of(tmp_path / "ray"), key=str) == sorted(records_of(tmp_path / "here"), key=str)
    written = [(tmp_path / name / "sequences.jsonl").read_text() for name in ("ray", "here")]
    assert written[0] == written[1] != ""


@pytest.mark.parametrize("model", ["recited", pytest.param("embedded", marks=pytest.mark.slow)])
def test_erase(model, recited, tmp_path, monkeypatch):
    """With a method that reads a context."""
    from memloc_lens.runs import ray_engine

    own = dict(text_tokens=128)
    if model == "recited":
        own = dict(model=str(recited / "model"), data=recited / "data.jsonl")
    settings = EraseSettings(
        **own, method="protect-iterative-gradient", context_sequences=1, component="neuron", limit=3, batch=2,
        negatives=1, until="accuracy", max_ppl_rise=100, max_neg_loss=100, device="cpu", quiet=True,
        out=tmp_path / "here",
    )  # fmt: skip
    here = command.run(settings)
    monkeypatch.setattr(localizing, "checked_scores", None)  # this process scores nothing any more
    on_ray = replace(settings, out=tmp_path / "ray", parallel=TWO)
    erasure = command.run(on_ray)
    assert erasure.succeeded
    assert (erasure.components, erasure.steps) == (here.components, here.steps)
    assert len(scores_of(on_ray.work)) == 2
    assert scores_of(on_ray.work) == scores_of(settings.work)
    shutil.rmtree(on_ray.out)
    monkeypatch.setattr(ray_engine, "_connect", None)  # all is kept, and ray is not started
    assert command.run(on_ray).components == here.components


def test_an_error_of_an_erasures_method_is_that_of_one_process(recited, tmp_path):
    model = load_model(recited / "model", device="cpu")
    targets = load_sequences(model, recited / "data.jsonl")[:3]
    settings = RunSettings(model=str(recited / "model"), device="cpu", parallel=Parallel("ray", workers=1))
    for out, own in ((tmp_path / "here", None), (tmp_path / "ray", settings)):
        with pytest.raises(ValueError, match=r"^unsure returned 384 NaN scores, the first for s1; components"):
            localizing.localize(out, model, targets, Unsure(of="s1"), NEURONS, batch=1, settings=own)
    assert scores_of(tmp_path / "ray") == scores_of(tmp_path / "here")
    assert list(scores_of(tmp_path / "ray")) == ["unsure-00000.safetensors"]


def test_who_does_the_work_is_no_part_of_a_run(whole_del, monkeypatch):
    from memloc_lens.runs import ray_engine

    monkeypatch.setattr(ray_engine, "_connect", None)  # nothing is missing, and ray is not started
    before = {
        path: path.read_bytes() for path in whole_del.out.rglob("*") if path.is_file() and "lock" not in path.name
    }
    deletion.run(replace(whole_del, parallel=TWO))
    assert {path: path.read_bytes() for path in before} == before


def jobs(*contents: str) -> list[Job]:
    return [Job(((f"{number}", "a"), (f"{number}", "b")), content) for number, content in enumerate(contents)]


def tries(folder: Path) -> dict[str, int]:
    return {file.name: len(file.read_text().split()) for file in sorted(folder.iterdir())}


def test_a_job_that_kills_its_worker_fails_after_three_tries_and_the_others_go_on(tmp_path):
    from memloc_lens.runs.ray_engine import RayEngine

    (work := tmp_path / "work").mkdir()
    listed = jobs("die", "", "")
    with RunFolder(tmp_path / "run", {}, ("name", "part")) as folder:
        with pytest.raises(ValueError, match=r"^1 of the jobs failed, since 3 workers died at each.* 0 a: .*process"):
            run_jobs(MakeWork(work), listed, folder, RayEngine(workers=1))
        assert tries(work) == {"0": 3, "1": 1, "2": 1}
        made = Counter(record["name"] for record in folder.records)
        assert made - Counter({"0": 1}) == {"1": 2, "2": 2}  # what was on its way when the worker died may be lost
        assert {(record["threads"], record["at"]) for record in folder.records} == {(1, os.getcwd())}
    with RunFolder(tmp_path / "run", {}, ("name", "part")) as folder:  # what failed is not taken for done
        records = run_jobs(lambda: make_work(work), [replace(job, content="") for job in listed], folder)
    assert len(records) == 6
    assert tries(work) == {"0": 4, "1": 1, "2": 1}


def test_an_error_of_a_job_ends_the_run_and_keeps_what_was_made(tmp_path):
    from memloc_lens.runs.ray_engine import RayEngine

    with RunFolder(tmp_path / "run", {}, ("name", "part")) as folder:
        (work := tmp_path / "work").mkdir()
        with pytest.raises(ValueError, match=r"^losses are NaN$"):
            run_jobs(MakeWork(work), jobs("fail", ""), folder, RayEngine(workers=1))
        assert [(record["name"], record["part"]) for record in folder.records] == [("0", "a")]
    assert tries(work) == {"0": 1}


def test_sigterm_while_ray_starts(monkeypatch, capsys):
    """Ray then has a handler of its own."""
    from memloc_lens.runs.ray_engine import RayEngine

    def init(**options):
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(9)

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(SystemExit) as end:
        run_command(lambda arguments: None, lambda _: list(RayEngine()(make_work, jobs(""))), print, [])
    assert end.value.code == 128 + signal.SIGTERM
    assert "repeat the command to resume" in capsys.readouterr().err


def test_an_address_where_nothing_answers(monkeypatch):
    from memloc_lens.runs.ray_engine import RayEngine

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"^ray cannot be reached at {address}: .*refused"):
            next(iter(RayEngine(address=address)(make_work, jobs(""))))


def test_more_workers_than_there_is_room_for():
    from memloc_lens.runs.ray_engine import RayEngine

    with pytest.raises(ValueError, match="workers is 3, and there is room for 2 that take 1 cores and 0 GPUs each"):
        next(iter(RayEngine(workers=3)(make_work, jobs(""))))
    with pytest.raises(ValueError, match="workers is 1, and there is room for 0 that take 1 cores and 0"):
        next(iter(RayEngine(gpus=0.5)(make_work, jobs(""))))


def test_steps_share_their_workers_and_the_next_work_does_not(tmp_path):
    from memloc_lens.runs.ray_engine import RayEngine

    (one := tmp_path / "one").mkdir()
    (other := tmp_path / "other").mkdir()
    engine, make_one = RayEngine(workers=1), MakeWork(one)
    for step, make_worker in (("0", make_one), ("1", make_one), ("2", MakeWork(other))):
        run_jobs(make_worker, [Job(((step, "a"),), "")], InMemory("name", "part"), engine)
    first, second, third = (file.read_text() for file in (one / "0", one / "1", other / "2"))
    assert first == second != third
    assert not is_alive(int(first))
    assert is_alive(int(third))
    del engine
    assert not is_alive(int(third))


def is_alive(pid: int) -> bool:
    """Whether a process is there for more than a moment."""
    with suppress(psutil.NoSuchProcess):
        return bool(psutil.wait_procs([psutil.Process(pid)], timeout=3)[1])
    return False
