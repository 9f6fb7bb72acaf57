"""An interrupted audit resumes: each of its parts is measured once, and kept in a folder.

A record says by a hash what it was measured from: the weights, the sequences, the settings and the code. What was
measured from something else stays in the folder unread, and the part is measured anew.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memloc_lens.erase.parts import Models, Name, Part
from memloc_lens.hooks import hooked_at
from memloc_lens.runs.folder import RunFolder, resuming
from memloc_lens.runs.jobs import InMemory, Job, Records, run_jobs
from memloc_lens.runs.schema import Record

FIELDS = ("part", "method", "sequence", "of")
"""The fields that identify a record: the name of its part, and a hash of what it was measured from."""

CONFIG = {"records_of": "an audit"}
"""The configuration of the folder, so that no other command's folder is taken for it."""


@contextmanager
def records_in(work: str | Path | None, models: Models) -> Iterator[Records]:
    """Open the records of an audit, for this process alone and on as many threads as the audit began with.

    Args:
        work: folder of the records, which is made; None keeps them in memory.
        models: that are audited, by name.

    Raises:
        ValueError: if another process uses the folder, it is not of an audit or damaged, or a model has a hook.
    """
    if work is None:
        yield InMemory(*FIELDS)
        return
    for name, model in models.items():
        if hooked_at(model, *(part for part, _ in model.named_modules() if part)):
            raise ValueError(
                f"the {name} model has a hook, such as an open ablation, which the fingerprint of its weights does not "
                "tell; remove it, or audit without a folder for the work"
            )
    path = Path(work).expanduser()
    with resuming(path), RunFolder(path, CONFIG, FIELDS) as folder:
        yield folder


def measured(parts: Mapping[Name, Part], records: Records) -> dict[Name, Any]:
    """Measure the parts that the records do not have, one after another, and return the values of all.

    Args:
        parts: by name.
        records: that were made before; what is measured is added.

    Example:
        >>> part, records = Part("three twos", lambda: 3 * [2]), InMemory(*FIELDS)
        >>> measured({("product", "erased", "a"): part}, records)
        {('product', 'erased', 'a'): [2, 2, 2]}
    """

    def worker(job: Job) -> Iterator[Record]:
        (key,) = job.keys
        yield dict(zip(FIELDS, key, strict=True)) | {"found": parts[job.content].measure()}

    jobs = [Job(((*name, part.hash),), name) for name, part in parts.items()]
    made = run_jobs(lambda: worker, jobs, records, description="audit", unit="part")
    return {name: record["found"] for name, record in zip(parts, made, strict=True)}
