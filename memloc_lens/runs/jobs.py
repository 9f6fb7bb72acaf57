"""A run is a list of jobs: each makes some records, in any order, on any machine.

    records = run_jobs(make_worker, jobs, folder)

1. A job knows the keys of the records it makes; those that the folder has are not made again.
2. An engine hands the jobs to workers. The default, `serial`, runs one worker in this process; another engine may run
   many elsewhere, which is why `make_worker` and the jobs can be pickled.
3. Records are written as they arrive, and returned in the order of the jobs: summaries do not depend on who was first.
"""

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from tqdm.auto import tqdm

from memloc_lens.runs.schema import Key, Record


@dataclass(frozen=True)
class Job:
    """Some work that makes records.

    Args:
        keys: of the records that the job makes; a worker gets those that are missing.
        content: what a worker needs to know, in plain values.
    """

    keys: tuple[Key, ...]
    content: Any = None


@runtime_checkable
class Records(Protocol):
    """Where records are kept: a `RunFolder`, or `InMemory` for what is computed anew each time."""

    def __contains__(self, key: Key) -> bool: ...
    def __getitem__(self, key: Key) -> Record: ...
    def key(self, record: Record) -> Key: ...  # noqa: D102
    def append(self, record: Record) -> None: ...  # noqa: D102


class InMemory:
    """Records that are not written to disk.

    Args:
        fields: that identify a record.
    """

    def __init__(self, *fields: str) -> None:
        self._fields = fields
        self._by_key: dict[Key, Record] = {}

    def __contains__(self, key: Key) -> bool:
        return key in self._by_key

    def __getitem__(self, key: Key) -> Record:
        return self._by_key[key]

    def key(self, record: Record) -> Key:
        """Return the fields that identify a record."""
        return tuple(record[field] for field in self._fields)

    def append(self, record: Record) -> None:
        """Add a record."""
        self._by_key[self.key(record)] = record


Worker = Callable[[Job], Iterable[Record]]
MakeWorker = Callable[[], Worker]
Engine = Callable[[MakeWorker, Iterable[Job]], Iterator[Record]]


def kept_open(worker: Worker, *contexts: AbstractContextManager[None]) -> Worker:
    """Return the worker with contexts that stay open as long as it lives: for a process that runs nothing else."""
    stack = ExitStack()
    for context in contexts:
        stack.enter_context(context)

    def work(job: Job, stack: ExitStack = stack) -> Iterable[Record]:
        return worker(job)

    return work


def serial(make_worker: MakeWorker, jobs: Iterable[Job]) -> Iterator[Record]:
    """Run the jobs one after another in this process; the worker is made for the first one."""
    worker: Worker | None = None
    for job in jobs:
        worker = worker or make_worker()
        yield from worker(job)


def run_jobs(
    make_worker: MakeWorker,
    jobs: Iterable[Job],
    folder: Records,
    engine: Engine = serial,
    description: str = "",
    unit: str = "record",
) -> list[Record]:
    """Make every record that is missing, and return all of them in the order of the jobs.

    Args:
        make_worker: makes what turns a job into records.
        jobs: taken one at a time, so that they may come from a stream.
        folder: where records are kept.
        engine: runs the workers.
        description: label of the progress bar.
        unit: what the progress bar counts.
    """
    keys: list[Key] = []
    total = sum(len(job.keys) for job in jobs) if isinstance(jobs, Sized) else None  # type: ignore[attr-defined]
    with tqdm(total=total, desc=description, unit=unit, smoothing=0.1, disable=not description) as progress:

        def missing() -> Iterator[Job]:
            for job in jobs:
                keys.extend(job.keys)
                left = tuple(key for key in job.keys if key not in folder)
                progress.update(len(job.keys) - len(left))
                if left:
                    yield replace(job, keys=left)

        for record in engine(make_worker, missing()):
            if folder.key(record) not in folder:  # a job that was tried twice makes its records twice
                folder.append(record)
                progress.update()
                progress.set_postfix_str(str(record.get("method", "")))
    return [folder[key] for key in keys if key in folder]
