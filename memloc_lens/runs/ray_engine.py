"""Run jobs on many workers with ray: processes on this machine or on the nodes of a cluster, a model each.

1. Workers take jobs one at a time. A worker gets its first job once it runs, so none waits for a node that is gone.
2. Records and scores come back as they are made, and this process alone writes them: the run folder is here only.
3. A worker that dies is replaced and its job tried again. After three tries the job has failed: the others go on, and
   the run ends with an error that names it. It has no record, so repeating the command tries it again.
4. An error that a job itself raises ends the run, as in one process.
5. Workers with nothing left to do stay as long as the engine does, for steps that follow with the same model.
"""

import logging
import os
import pickle
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from memloc_lens.checks import in_one_line
from memloc_lens.runs.jobs import Job, MakeWorker, Worker
from memloc_lens.runs.schema import Record
from memloc_lens.runs.scores import ScoreFile, kept_scores, score_files_kept_back

TRIES = 3
"""How often a job is tried whose workers die."""

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",
}
"""Switches of ray: nothing is sent home, and only what a run says is said."""


@dataclass(frozen=True)
class RayEngine:
    """An engine whose workers are actors of ray.

    Args:
        workers: how many. Default: as many as there is room for.
        gpus: that each worker takes; a part of one shares it. Workers without one take a core for each thread.
        address: of a cluster that is there, or "auto" for that of this node. Default: ray is started on this machine.
    """

    workers: int | None = None
    gpus: float = 0
    address: str | None = None
    _idle: dict[bytes, list[Any]] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Workers of the last call, by what makes them; ray ends those that nothing refers to."""

    def __call__(self, make_worker: MakeWorker, jobs: Iterable[Job]) -> Iterator[Record]:
        """Run the jobs; without any, ray is not started.

        Raises:
            ValueError: if the cluster cannot be reached or has no room, or for the jobs that failed.
        """
        jobs = iter(jobs)
        first = list(islice(jobs, 1))
        if not first:
            return
        threads = torch.get_num_threads()
        cores = 1 if self.gpus else threads
        _connect(self.address, (self.workers or 1) * cores)
        actor: Any = ray.remote(RayWorker)
        actor = actor.options(num_gpus=self.gpus, num_cpus=cores)
        work = pickle.dumps(make_worker)
        start = partial(actor.remote, work, threads, os.getcwd(), sys.path)
        idle = self._idle.pop(work, [])
        self._idle.clear()
        crew = Crew(start, self._size(cores), idle)
        try:
            yield from crew.run(chain(first, jobs))
        except BaseException:
            crew.kill()
            raise
        self._idle[work] = crew.idle

    def _size(self, cores: int) -> int:
        """Return how many workers there are to be; a cluster that is there may grow."""
        needs = {"CPU": cores, **({"GPU": self.gpus} if self.gpus else {})}
        room = sum(_room(node["Resources"], needs) for node in ray.nodes() if node["Alive"])
        if room < (self.workers or 1) and (self.address is None or not self.workers):
            raise ValueError(
                f"workers is {self.workers or 1}, and there is room for {room} that take {cores} cores and "
                f"{self.gpus:g} GPUs each; lower --workers or --gpus-per-worker, or give the --address of a larger "
                "cluster"
            )
        return self.workers or room


def _connect(address: str | None, cores: float) -> None:
    """Connect to a cluster, or start one on this machine with at least so many cores; it ends with this process."""
    if ray.is_initialized():
        return
    for switch, value in QUIET.items():
        os.environ.setdefault(switch, value)
    own: dict[str, Any] = dict(include_dashboard=False, num_cpus=max(int(cores), os.cpu_count() or 1))
    earlier, is_told = signal.getsignal(signal.SIGTERM), False
    try:
        if address:
            _reach(address)
        options = {} if address else own
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **options)
    except (OSError, OverflowError, ValueError, RuntimeError) as error:
        what = f"reached at {address}" if address else "started on this machine"
        raise ValueError(f"ray cannot be {what}: {in_one_line(error)}") from error
    except SystemExit:  # what ray makes of SIGTERM
        is_told = True
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, earlier)  # ray sets its own
    if is_told:
        signal.raise_signal(signal.SIGTERM)


def _reach(address: str) -> None:
    """Refuse a host and port where nothing answers: ray would try for a quarter of an hour.

    Raises:
        OSError: saying why.
    """
    host, _, port = address.rpartition(":")
    if port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=30).close()


def _room(resources: dict[str, float], needs: dict[str, float]) -> int:
    """Return how many workers a node has room for."""
    return min(int(resources.get(kind, 0) / amount + 1e-9) for kind, amount in needs.items())


class RayWorker:
    """A process of the cluster, which makes its worker for its first job.

    Args:
        make_worker: makes the worker, pickled.
        threads: to compute on, as in the process that began the run, since they decide how sums are rounded.
        folder: that relative paths start from, if this node has it.
        path: where modules are looked for, before the places of this node.
    """

    def __init__(self, make_worker: bytes, threads: int, folder: str, path: list[str]) -> None:
        torch.set_num_threads(threads)
        with suppress(OSError):
            os.chdir(folder)
        sys.path[:0] = path
        self._pickled = make_worker
        self._worker: Worker | None = None

    def runs(self) -> None:
        """Return once the process runs."""

    def work(self, job: Job) -> Iterator[tuple[list[ScoreFile], Record]]:
        """Do a job; yield each record with the scores that were computed for it."""
        self._worker = self._worker or self._made()
        with score_files_kept_back() as files:
            for record in self._worker(job):
                yield [*files], record
                files.clear()

    def _made(self) -> Worker:
        try:
            make_worker: MakeWorker = pickle.loads(self._pickled)
        except (ImportError, AttributeError) as error:
            here = f"{socket.gethostname()} lacks what the run needs: {in_one_line(error)}"
            raise ValueError(f"{here}; install the same packages and versions on every node") from error
        return make_worker()


@dataclass(frozen=True)
class Attempt:
    """A job, and why the workers that tried it died."""

    job: Job
    deaths: tuple[str, ...] = ()


class Crew:
    """Workers that start, are idle or at work, and the jobs that wait for one.

    Args:
        start: starts a worker.
        size: how many workers there are at most.
        idle: workers that run already.
    """

    def __init__(self, start: Callable[[], Any], size: int, idle: Iterable[Any] = ()) -> None:
        self._start, self._size = start, size
        self._starting: dict[Any, Any] = {}
        self.idle = [*idle]
        self._busy: dict[Any, tuple[Any, Attempt]] = {}
        self._waiting: list[Attempt] = []
        self._failed: list[Attempt] = []
        self._stillborn = 0

    def run(self, jobs: Iterable[Job]) -> Iterator[Record]:
        """Run the jobs.

        Raises:
            ValueError: for jobs that failed, once all others are done; or if no worker can be started.
        """
        new = map(Attempt, jobs)
        while self._hand_out(new):
            ready, _ = ray.wait([*self._starting, *self._busy], num_returns=1)
            if ready[0] in self._starting:
                self._welcome(ready[0])
            else:
                yield from self._receive(ready[0])
        if self._failed:
            raise ValueError(_named(self._failed))

    def kill(self) -> None:
        """Kill all workers, whatever they do."""
        workers = [*self._starting.values(), *self.idle, *(worker for worker, _ in self._busy.values())]
        for worker in workers if ray.is_initialized() else ():
            ray.kill(worker)

    def _hand_out(self, new: Iterator[Attempt]) -> bool:
        """Give a job to every idle worker, and start workers for those left; return whether any job is not done."""
        self._waiting += islice(new, max(0, self._size - len(self._busy) - len(self._waiting)))
        while self._waiting and self.idle:
            worker, attempt = self.idle.pop(), self._waiting.pop(0)
            self._busy[worker.work.options(num_returns="streaming").remote(attempt.job)] = worker, attempt
        while len(self._starting) < len(self._waiting):
            worker = self._start()
            self._starting[worker.runs.remote()] = worker
        return bool(self._busy or self._waiting)

    def _welcome(self, started: Any) -> None:
        """Take in a worker that runs, or did not survive its start."""
        worker = self._starting.pop(started)
        try:
            ray.get(started)
        except RayError as error:
            self._stillborn += 1
            if self._stillborn == TRIES:
                raise ValueError(f"{TRIES} workers in a row did not start: {_why_dead(error)}") from error
        else:
            self._stillborn = 0
            self.idle.append(worker)

    def _receive(self, stream: Any) -> Iterator[Record]:
        """Take the next record of a job, or notice that it is done or its worker dead."""
        worker, attempt = self._busy[stream]
        try:
            files, record = ray.get(next(stream))
        except StopIteration:
            del self._busy[stream]
            self.idle.append(worker)
        except RayTaskError as error:
            raise error.cause from error
        except RayError as error:
            del self._busy[stream]
            ray.kill(worker)  # it may live where only its answer was lost
            attempt = replace(attempt, deaths=(*attempt.deaths, _why_dead(error)))
            (self._waiting if len(attempt.deaths) < TRIES else self._failed).append(attempt)
        else:
            for file in files:
                kept_scores(file.path, partial(getattr, file, "tensors"), file.of)
            yield record


def _why_dead(error: RayError) -> str:
    """Return why a worker is dead, of all that ray says."""
    said = re.sub(r"\x1b\[\d+m", "", " ".join(str(error).split()))  # without colours
    _, known, why = said.rpartition("The actor is dead because ")
    return why[:400] if known else said[-400:]


def _named(failed: list[Attempt]) -> str:
    """Return sentences with the jobs that failed and why."""
    jobs = [f"{' '.join(map(str, attempt.job.keys[0]))}: {attempt.deaths[-1]}" for attempt in failed]
    return (
        f"{len(failed)} of the jobs failed, since {TRIES} workers died at each; what the others recorded is kept: "
        f"repeat the command to try these again. {'; '.join(jobs)}"
    )
