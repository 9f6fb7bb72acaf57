"""Score the sequences of an erasure, a job a batch: in this process, or by workers elsewhere with a model of their own.

Scores are kept in files. Each says what it was computed from, so that batches that are scored already are left out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from memloc_lens.components import Component, ComponentName, component_of
from memloc_lens.erase.kept import KeptScores, origin
from memloc_lens.library_types import HookedModel
from memloc_lens.localizers.scoring import AnyLocalizer, name_of
from memloc_lens.products import fast_products
from memloc_lens.runs.fingerprint import fingerprint
from memloc_lens.runs.jobs import Engine, InMemory, Job, Worker, kept_open, run_jobs, serial
from memloc_lens.runs.methods import checked_scores
from memloc_lens.runs.schema import Record
from memloc_lens.runs.scores import is_kept, kept_scores, score_file
from memloc_lens.runs.settings import RunSettings, check_weights, device_elsewhere
from memloc_lens.sequence import MemorizedSequence

HELD = 2**27
"""Scores that are held at a time."""

KEY = ("sequence", "file", "row")
"""What a record tells: where the scores of a sequence are."""


@dataclass(frozen=True)
class Batch:
    """Sequences that are scored together, the file for their scores, and what these are computed from."""

    sequences: Sequence[MemorizedSequence]
    file: Path
    of: str


def localize(
    folder: Path,
    model: HookedModel,
    sequences: Sequence[MemorizedSequence],
    localizer: AnyLocalizer,
    component: Component,
    batch: int,
    settings: RunSettings | None = None,
) -> KeptScores:
    """Score sequences a batch at a time, or read what was scored before.

    A file says what it was computed from: other weights, settings or sequences are scored anew.

    Args:
        folder: where scores are kept, under `scores`.
        model: that has memorized the sequences.
        sequences: to score.
        localizer: that scores them.
        component: kind that it scores.
        batch: maximum number of sequences at a time.
        settings: whose engine does the work, and with which workers elsewhere load the model. Default: this process
            does it.

    Raises:
        ValueError: if scores cannot be used, the engine cannot be started, or its workers load another model.

    Example:
        >>> scores = localize(Path("work"), model, [sequence], Activations(), NEURONS, batch=16)
        >>> torch.equal(scores[0], Activations()(model, sequence))
        True
    """

    def here() -> Worker:
        return partial(_scored, localizer, component, model)

    config = {"device": str(model.cfg.device), "weights": fingerprint(model)}
    size = max(1, min(batch, HELD // prod(component.shape(model))))  # a method may read its context once a batch
    jobs = list(_jobs(folder, sequences, localizer, config["weights"], size))
    known = InMemory(*KEY)
    for record in chain.from_iterable(_places(job) for job in jobs if is_kept(job.content.file, job.content.of)):
        known.append(record)
    engine: Engine = serial
    make_worker = here
    if settings and settings.parallel.engine != "serial":
        make_worker = MakeWorker(settings, localizer, component.name, config)
        engine = settings.parallel.engine_for(model.cfg.device, settings.n_devices)
    records = run_jobs(make_worker, jobs, known, engine, "localize", unit="sequence")
    return KeptScores([(record["file"], record["row"]) for record in records])


def _jobs(
    folder: Path, sequences: Sequence[MemorizedSequence], localizer: AnyLocalizer, weights: str, size: int
) -> Iterator[Job]:
    for start in range(0, len(sequences), size):
        part, file = sequences[start : start + size], score_file(folder, name_of(localizer), start)
        keys = tuple((own.id, file, row) for row, own in enumerate(part))
        yield Job(keys, Batch(part, file, origin(weights, localizer, part)))


@dataclass(frozen=True)
class MakeWorker:
    """Make a worker in another process, which loads the model again.

    Args:
        settings: that say how.
        localizer: scores sequences.
        component: kind that it scores.
        config: device and weights of the model.
    """

    settings: RunSettings
    localizer: AnyLocalizer
    component: ComponentName
    config: dict[str, Any]

    def __call__(self) -> Worker:
        """Return a function from jobs to records.

        Raises:
            ValueError: if the model has other weights.
        """
        model = replace(self.settings, device=device_elsewhere(self.config)).load_model()
        check_weights(model, self.config)
        worker = partial(_scored, self.localizer, component_of(self.component), model)
        return kept_open(worker, self.settings.memory_budget(model), fast_products(model.cfg.device))


def _scored(localizer: AnyLocalizer, component: Component, model: HookedModel, job: Job) -> list[Record]:
    """Score a batch, and return where the scores of each sequence are."""
    batch: Batch = job.content

    def compute() -> dict[str, Tensor]:
        return {"scores": checked_scores(localizer, model, batch.sequences, component)}

    kept_scores(batch.file, compute, batch.of)
    return _places(job)


def _places(job: Job) -> list[Record]:
    return [dict(zip(KEY, key, strict=True)) for key in job.keys]
