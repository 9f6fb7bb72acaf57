from dataclasses import dataclass, field

import engines
import pytest

from memloc_lens.runs.folder import RunFolder
from memloc_lens.runs.jobs import InMemory, Job, run_jobs, serial

JOBS = [Job(((1, "a"), (1, "b")), 10), Job(((2, "a"),), 20), Job(((3, "a"), (3, "b")), 30)]
RECORDS = [{"item": item, "part": part, "value": job.content} for job in JOBS for item, part in job.keys]


@dataclass
class Works:
    """Makes workers, and remembers which keys they were asked for."""

    asked: list = field(default_factory=list)
    workers: int = 0

    def __call__(self):
        self.workers += 1
        return self.work

    def work(self, job):
        self.asked.append(job.keys)
        for item, part in job.keys:
            yield {"item": item, "part": part, "value": job.content}


@pytest.fixture(params=["in memory", "on disk"])
def kept(request, tmp_path):
    return InMemory("item", "part") if request.param == "in memory" else RunFolder(tmp_path, {}, ("item", "part"))


@pytest.mark.parametrize("engine", [serial, engines.backwards, engines.shuffled, engines.twice])
def test_records_come_back_in_the_order_of_jobs(kept, engine):
    assert run_jobs(Works(), JOBS, kept, engine) == RECORDS
    assert run_jobs(Works(), reversed(JOBS), kept, engines.forbidden) == [RECORDS[i] for i in (3, 4, 2, 0, 1)]


def test_each_record_is_written_once(tmp_path):
    folder = RunFolder(tmp_path, {}, ("item", "part"))
    run_jobs(Works(), JOBS, folder, engines.twice)
    assert folder.records == RECORDS


def test_only_what_is_missing_is_made(kept):
    for record in RECORDS[1:3]:
        kept.append(record | {"value": "earlier"})
    works = Works()
    values = [record["value"] for record in run_jobs(works, JOBS, kept)]
    assert values == [10, "earlier", "earlier", 30, 30]
    assert works.asked == [((1, "a"),), ((3, "a"), (3, "b"))]
    assert works.workers == 1


def test_nothing_is_loaded_for_nothing(kept):
    for record in RECORDS:
        kept.append(record)
    works = Works()
    assert run_jobs(works, JOBS, kept) == RECORDS
    assert works.workers == 0


def test_jobs_of_a_stream_are_taken_one_at_a_time(kept):
    works, at = Works(), []

    def stream():
        for job in JOBS:
            at.append(len(works.asked))
            yield job

    assert run_jobs(works, stream(), kept) == RECORDS
    assert at == [0, 1, 2]


def test_what_was_made_before_an_error_is_kept(kept):
    def make_worker():
        def work(job):
            yield {"item": 1, "part": "a", "value": 10}
            raise RuntimeError("torn")

        return work

    with pytest.raises(RuntimeError, match="torn"):
        run_jobs(make_worker, JOBS, kept)
    assert (1, "a") in kept
    assert run_jobs(Works(), JOBS, kept) == RECORDS


def test_a_record_that_a_worker_does_not_make_is_left_out(kept):
    assert run_jobs(lambda: lambda job: [], JOBS, kept) == []


def test_progress_counts_records(kept, capsys):
    kept.append(RECORDS[0])
    run_jobs(Works(), JOBS, kept, engines.twice, description="work", unit="part")
    assert f"work: 100%|██████████| {len(RECORDS)}/{len(RECORDS)}" in capsys.readouterr().err
