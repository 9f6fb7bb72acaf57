"""Engines of every kind for jobs: in another order, twice, none, and in a process of its own."""

import pickle
import random
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache

from memloc_lens.runs.jobs import Job, MakeWorker, Worker
from memloc_lens.runs.schema import Record


def backwards(make_worker: MakeWorker, jobs: Iterable[Job]) -> Iterator[Record]:
    """The last job first, and of each its last record first."""
    worker = make_worker()
    for job in reversed(list(jobs)):
        yield from reversed(list(worker(job)))


def shuffled(make_worker: MakeWorker, jobs: Iterable[Job]) -> Iterator[Record]:
    """Jobs in a random order by many workers, their records mixed."""
    draw, listed = random.Random(1), list(jobs)
    draw.shuffle(listed)
    records = [record for job in listed for record in make_worker()(job)]
    draw.shuffle(records)
    yield from records


def twice(make_worker: MakeWorker, jobs: Iterable[Job]) -> Iterator[Record]:
    """Every job by two workers: one was thought dead, and was not."""
    workers = make_worker(), make_worker()
    for job in jobs:
        for worker in workers:
            yield from worker(job)


def forbidden(make_worker: MakeWorker, jobs: Iterable[Job]) -> Iterator[Record]:
    """No job at all: nothing must be left to do."""
    assert list(jobs) == []
    yield from ()


@dataclass
class Elsewhere:
    """Every job in another process: only what is pickled gets there.

    Args:
        process: a pool of one process.
    """

    process: ProcessPoolExecutor

    def __call__(self, make_worker: MakeWorker, jobs: Iterable[Job]) -> Iterator[Record]:
        pickled = pickle.dumps(make_worker)
        for job in jobs:
            yield from self.process.submit(work, pickled, job).result()


def work(pickled: bytes, job: Job) -> list[Record]:
    """A job, in the other process."""
    return list(worker_of(pickled)(job))


@cache
def worker_of(pickled: bytes) -> Worker:
    """A worker, which loads its model once a process."""
    return pickle.loads(pickled)()
