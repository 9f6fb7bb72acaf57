"""Run a model over the windows of a corpus: teacher-forced over all, then greedily over those that `find` asks for.

Every step is a run of jobs, a job a batch. The jobs of the scan are made while the corpus is read, which may be a
stream.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Literal, TypeVar

import torch
from rapidfuzz.distance import Levenshtein
from transformer_lens import HookedTransformer

from memloc_lens.data.corpus import Window, read_corpus, windows_of
from memloc_lens.data.found import Counts, FindSettings, FoundWindow, Measured
from memloc_lens.data.readers import is_local
from memloc_lens.metrics import free_running, suffix_accuracy, teacher_forced
from memloc_lens.products import fast_products
from memloc_lens.runs.folder import RunFolder
from memloc_lens.runs.jobs import Engine, Job, Worker, run_jobs
from memloc_lens.runs.schema import Key, Record
from memloc_lens.sequence import MemorizedSequence, decode

Step = Literal["scan", "greedy", "shuffled", "foreign"]
"""A step that runs the model: teacher-forced, or greedily from the window's prompt, the same shuffled, or another's."""

Item = TypeVar("Item")

NOT_IDENTITY = ("out", "names")
"""Settings that may differ between two runs in one folder; what `names` decides is compared batch by batch."""


@dataclass(frozen=True)
class Search:
    """A run that has begun: its settings, what it has loaded, its folder, what runs its jobs, and its corpus' hash."""

    settings: FindSettings
    model: HookedTransformer
    folder: RunFolder
    engine: Engine
    corpus_sha256: str

    @property
    def corpus_key(self) -> Key:
        """The key of the record that holds the hash."""
        return ("corpus", self.settings.limit)

    def records(self, jobs: Iterable[Job], description: str) -> list[Record]:
        """Return the record of every job, made if it is missing."""
        make_worker = MakeWorker(self.settings, self.model)
        return run_jobs(make_worker, jobs, self.folder, self.engine, description, unit="batch")


def begin(settings: FindSettings, engine: Engine, corpus_sha256: str) -> Search:
    """Load the model and open the folder of the run.

    Args:
        settings: of the run.
        engine: runs the jobs.
        corpus_sha256: hash of the files of the corpus. With a limit, the windows are hashed instead.

    Raises:
        ValueError: if the model cannot be loaded or read so many tokens, or the folder belongs to other settings or to
            another corpus.
    """
    model = settings.load_model()
    if settings.length > model.cfg.n_ctx:
        raise ValueError(
            f"prompt and suffix are {settings.length} tokens, and {settings.model} reads at most {model.cfg.n_ctx}; "
            "shorten them"
        )
    own = {name: value for name, value in settings.as_json().items() if name not in NOT_IDENTITY}
    if settings.limit and all(map(is_local, settings.corpus)):
        corpus_sha256 = _digest(islice(_distinct_windows(settings, model, {"windows": 0}), settings.limit))
    folder = RunFolder(settings.out, {**own, "device": str(model.cfg.device)}, key=("step", "item"))
    search = Search(settings, model, folder, engine, corpus_sha256)
    if search.corpus_key in folder and folder[search.corpus_key]["sha256"] != corpus_sha256:
        raise _another_corpus(settings)
    return search


def scan(search: Search) -> tuple[Counts, list[FoundWindow]]:
    """Predict all windows teacher-forced.

    Returns:
        How many windows there were and how many are left, and those that are accurate, with enough distinct tokens.

    Raises:
        ValueError: if the corpus has no window, or has changed since the run began.
    """
    counts: Counts = {"windows": 0, "without exact duplicates": 0}
    records = search.records(_scan_jobs(search, counts), "teacher-forced")
    if not counts["windows"]:
        raise ValueError(
            f"the corpus has no window of {search.settings.length} tokens; give more text or shorten prompt and suffix"
        )
    passed: list[FoundWindow] = [window for record in records for window in record["passed"]]
    counts["accurate"] = sum(record["accurate"] for record in records)
    counts["with enough distinct tokens"] = len(passed)
    return counts, passed


def _scan_jobs(search: Search, counts: Counts) -> Iterator[Job]:
    """Read the corpus as it is needed, a job a batch of different windows."""
    windows = islice(_distinct_windows(search.settings, search.model, counts), search.settings.limit or None)
    for index, batch in enumerate(_batched(windows, search.settings.batch)):
        if search.corpus_key not in search.folder:
            search.folder.append({"step": "corpus", "item": search.settings.limit, "sha256": search.corpus_sha256})
        counts["without exact duplicates"] += len(batch)
        yield _job(search, "scan", index, batch)


def _distinct_windows(settings: FindSettings, model: HookedTransformer, counts: Counts) -> Iterator[Window]:
    """Pass windows on, without exact duplicates, and count them all."""
    documents = read_corpus(settings.corpus, settings.names)
    seen: set[int] = set()
    for window in windows_of(model, documents, settings.length, settings.stride or settings.length):
        counts["windows"] += 1
        fingerprint = hash(window.tokens)  # a few bytes a window: the corpus may be large
        if fingerprint not in seen:
            seen.add(fingerprint)
            yield window


def _batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Group items, `size` at a time; the last group may have fewer."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


@dataclass(frozen=True)
class Attempt:
    """A window whose suffix the model generates, and the prompt that it generates from."""

    window: FoundWindow
    prompt: list[int]

    @property
    def suffix(self) -> list[int]:
        """The tokens to come close to."""
        return self.window["tokens"][len(self.prompt) :]

    @property
    def tokens(self) -> list[int]:
        """The tokens of prompt and suffix."""
        return [*self.prompt, *self.suffix]


def generate(search: Search, step: Step, windows: list[FoundWindow], prompts: list[list[int]]) -> list[FoundWindow]:
    """Generate the suffix of each window from a prompt; return the windows with how close it is."""
    attempts = [Attempt(window, prompt) for window, prompt in zip(windows, prompts, strict=True)]
    batches = _batched(attempts, search.settings.batch)
    jobs = [_job(search, step, index, batch) for index, batch in enumerate(batches)]
    records = search.records(jobs, f"generating, {step}" if jobs else "")
    measured: list[Measured] = [values for record in records for values in record["values"]]
    return [{**window, **values} for window, values in zip(windows, measured, strict=True)]


def _job(search: Search, step: Step, index: int, batch: Sequence[Window | Attempt]) -> Job:
    """Return the job of a batch; if it has a record already, check that this was made of the same tokens."""
    key = (step, index)
    if key in search.folder and search.folder[key]["tokens_sha256"] != _digest(batch):
        raise _another_corpus(search.settings)
    return Job((key,), batch)


def _another_corpus(settings: FindSettings) -> ValueError:
    return ValueError(f"the corpus is not the one that the run in {settings.out} began with; choose another --out")


def _digest(batch: Iterable[Window | Attempt]) -> str:
    return hashlib.sha256(repr([list(item.tokens) for item in batch]).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class MakeWorker:
    """Make a worker of the search: in this process with the model that is loaded, in another one by loading it again.

    Args:
        settings: of the run.
        model: loaded from the settings; it stays in this process.
    """

    settings: FindSettings
    model: HookedTransformer | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return MakeWorker, (self.settings,)

    def __call__(self) -> Worker:
        """Return a function from jobs to records."""
        return partial(_records, self.settings, self.model or self.settings.load_model())


def _records(settings: FindSettings, model: HookedTransformer, job: Job) -> list[Record]:
    """Return the record of a batch."""
    ((step, index),) = job.keys
    record = {"step": step, "item": index, "tokens_sha256": _digest(job.content)}
    with fast_products(model.cfg.device):
        if step == "scan":
            return [record | _scanned(settings, model, job.content)]
        return [record | {"values": _generated(settings, model, step, job.content)}]


def _scanned(settings: FindSettings, model: HookedTransformer, windows: list[Window]) -> Record:
    """Predict windows teacher-forced; return how many are accurate, and those that have enough distinct tokens too."""
    sequences = [_sequence(settings, model, window) for window in windows]
    accuracies = suffix_accuracy(teacher_forced(model, sequences, settings.batch), sequences).tolist()
    accurate = [
        _found(window, accuracy)
        for window, accuracy in zip(windows, accuracies, strict=True)
        if accuracy > 100 * settings.min_accuracy - 1e-4  # accuracies are float32: 7 of 10 is a little under 70
    ]
    passed = [window for window in accurate if len(set(window["tokens"][settings.prompt :])) >= settings.min_distinct]
    return {"accurate": len(accurate), "passed": passed}


def _sequence(settings: FindSettings, model: HookedTransformer, window: Window) -> MemorizedSequence:
    sequence = MemorizedSequence(torch.tensor(window.tokens), settings.prompt)
    try:
        sequence.check_fits(model)
    except ValueError as error:
        raise ValueError(f"{window.source}: {error}") from error
    return sequence


def _found(window: Window, accuracy: float) -> FoundWindow:
    return {
        "tokens": list(window.tokens),
        "source": window.source,
        "start": window.start,
        "category": list(window.category),
        "accuracy": round(accuracy, 2),
    }


def _generated(settings: FindSettings, model: HookedTransformer, step: Step, attempts: list[Attempt]) -> list[Measured]:
    """Generate the suffix of every attempt, and measure how close it is."""
    sequences = [MemorizedSequence(torch.tensor(attempt.tokens), settings.prompt) for attempt in attempts]
    suffixes = free_running(model, sequences, settings.batch)
    return [
        _measured(model, step, suffix.tolist(), attempt.suffix)
        for suffix, attempt in zip(suffixes, attempts, strict=True)
    ]


def _measured(model: HookedTransformer, step: Step, generated: list[int], suffix: list[int]) -> Measured:
    distance = _distance(model, generated, suffix)
    if step == "greedy":
        return {"distance": distance, "distinct": len(set(generated))}
    return {"shuffled_distance": distance} if step == "shuffled" else {"foreign_distance": distance}


def _distance(model: HookedTransformer, generated: list[int], suffix: list[int]) -> int:
    """Return the Levenshtein distance of two suffixes, in characters if the model has a tokenizer, else in tokens."""
    if model.tokenizer is None:
        return Levenshtein.distance(generated, suffix)
    return Levenshtein.distance(*(decode(model, torch.tensor(tokens)) for tokens in (generated, suffix)))
