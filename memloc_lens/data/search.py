"""Run a model over the windows of a corpus: teacher-forced over all, then greedily over those that `find` asks for.

Every step is a run of jobs, a job a batch. The jobs of the scan are made while the corpus is read, which may be a
stream.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, Literal, TypeVar

import torch
from rapidfuzz.distance import Levenshtein

from memloc_lens.bridge import is_bridge
from memloc_lens.data.corpus import Window, read_corpus, windows_of
from memloc_lens.data.found import Counts, FindSettings, FoundWindow, Measured
from memloc_lens.data.readers import is_local
from memloc_lens.library_types import HookedModel
from memloc_lens.metrics import free_running, suffix_accuracy, teacher_forced
from memloc_lens.products import fast_products
from memloc_lens.runs.fingerprint import fingerprint
from memloc_lens.runs.folder import RunFolder, same_threads
from memloc_lens.runs.jobs import Engine, Job, Worker, kept_open, run_jobs
from memloc_lens.runs.losses import check_losses
from memloc_lens.runs.records import lacks
from memloc_lens.runs.schema import Record
from memloc_lens.runs.settings import check_weights, device_elsewhere
from memloc_lens.sequence import MemorizedSequence, begins_with_bos, decode

Step = Literal["scan", "greedy", "shuffled", "foreign"]
"""A step that runs the model: teacher-forced, or greedily from the window's prompt, the same shuffled, or another's."""

Item = TypeVar("Item")

WINDOW = {"tokens": list, "source": str, "start": int, "category": list, "accuracy": int | float}
"""What a record of the scan has of each window that passed."""

MEASURED = {
    "greedy": {"distance": int, "distinct": int},
    "shuffled": {"shuffled_distance": int},
    "foreign": {"foreign_distance": int},
}
"""What a record of another step has of each window."""

NOT_IDENTITY = ("out", "n_devices", "backend", "names", "limit", "quiet", "parallel")
"""Settings that may differ between two runs in one folder; the windows that they lead to are compared."""


@dataclass(frozen=True)
class Search:
    """A run that has begun: its settings, what it has loaded, its folder, and what runs its jobs."""

    settings: FindSettings
    model: HookedModel
    folder: RunFolder
    engine: Engine

    def records(self, jobs: Iterable[Job], description: str) -> list[Record]:
        """Return the record of every job, made if it is missing."""
        make_worker = MakeWorker(self.settings, self.folder.config, self.model)
        return run_jobs(make_worker, jobs, self.folder, self.engine, description, unit="batch")


def begin(settings: FindSettings, engine: Engine | None, documents: str) -> Search:
    """Load the model and open the folder of the run.

    Args:
        settings: of the run.
        engine: runs the jobs. Default: that of the settings.
        documents: a hash of all local documents, which identifies the corpus of a search without a limit.

    Raises:
        ValueError: if the model cannot be loaded or read so many tokens, or the folder belongs to other settings.
    """
    model = settings.load_model()
    if settings.length + begins_with_bos(model, settings.bos) > model.cfg.n_ctx:
        raise ValueError(
            f"prompt and suffix are {settings.length} tokens, and {settings.model} reads at most {model.cfg.n_ctx}; "
            "shorten them"
        )
    if all(map(is_local, settings.corpus)) and not any(_distinct_windows(settings, model, {"windows": 0})):
        raise _no_window(settings)  # before the folder belongs to such a corpus
    own = {name: value for name, value in settings.as_json().items() if name not in NOT_IDENTITY}
    config = {
        **own,
        "device": str(model.cfg.device),
        **({"backend": "bridge"} if is_bridge(model) else {}),
        "weights": fingerprint(model),
        "begins_with_bos": begins_with_bos(model, settings.bos),
        "windows": {str(settings.limit): _first_windows(settings, model) if settings.limit else documents},
    }
    folder = RunFolder(settings.out, config, ("step", "tokens_sha256"), ("model",), _problem)
    return Search(settings, model, folder, engine or settings.parallel.engine_for(model.cfg.device, settings.n_devices))


def _first_windows(settings: FindSettings, model: HookedModel) -> str:
    """Return a hash of the local windows up to the limit.

    It is taken before the search, so that a corpus which changes while a run is interrupted is noticed.
    """
    local = replace(settings, corpus=tuple(filter(is_local, settings.corpus)))
    windows = islice(_distinct_windows(local, model, {"windows": 0}), settings.limit)
    return digest_of((window.source, window.start, window.category, window.tokens) for window in windows)


def digest_of(contents: Iterable[object]) -> str:
    """Return a hash of what contents print as."""
    digest = hashlib.sha256()
    for content in contents:
        digest.update(repr(content).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _problem(record: Record, config: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a record, None if nothing is."""
    name, wanted = ("passed", WINDOW) if record["step"] == "scan" else ("values", MEASURED.get(record["step"], {}))
    if not all_like(record.get(name), wanted):
        return f"no whole record: its {name!r} is missing or damaged"
    return lacks(record, ["accurate"] if record["step"] == "scan" else [], {})


def all_like(rows: Any, wanted: Mapping[str, Any]) -> bool:
    """Return whether rows all have the fields that are wanted, each of its type."""
    return isinstance(rows, list) and all(
        isinstance(row, dict)
        and row.keys() == wanted.keys()
        and all(isinstance(row[name], kind) for name, kind in wanted.items())
        and all(isinstance(token, int) for token in row.get("tokens", []))
        and all(isinstance(subject, str) for subject in row.get("category", []))
        for row in rows
    )


def _no_window(settings: FindSettings) -> ValueError:
    return ValueError(
        f"the corpus has no window of {settings.length} tokens; give more text or shorten prompt and suffix"
    )


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
        raise _no_window(search.settings)
    passed: list[FoundWindow] = [window for record in records for window in record["passed"]]
    counts["accurate"] = sum(record["accurate"] for record in records)
    counts["with enough distinct tokens"] = len(passed)
    return counts, passed


def _scan_jobs(search: Search, counts: Counts) -> Iterator[Job]:
    """Read the corpus as it is needed, a job a batch of different windows."""
    windows = islice(_distinct_windows(search.settings, search.model, counts), search.settings.limit or None)
    for index, batch in enumerate(_batched(windows, search.settings.batch)):
        counts["without exact duplicates"] += len(batch)
        yield Job((("scan", _digest(batch)),), Batch(index, batch))


def _distinct_windows(settings: FindSettings, model: HookedModel, counts: Counts) -> Iterator[Window]:
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
    batches = enumerate(_batched(attempts, search.settings.batch))
    jobs = [Job(((step, _digest(batch)),), Batch(index, batch)) for index, batch in batches]
    records = search.records(jobs, f"generating, {step}" if jobs else "")
    measured: list[Measured] = [values for record in records for values in record["values"]]
    if len(measured) != len(windows):
        raise ValueError(
            f"{search.folder.path / 'records.jsonl'} has {len(measured)} results of step {step} for {len(windows)} "
            "windows; remove the lines of the step to have them made again"
        )
    return [{**window, **values} for window, values in zip(windows, measured, strict=True)]


@dataclass(frozen=True)
class Batch:
    """Windows or attempts that run together, and their place among the batches of their step."""

    item: int
    content: Sequence[Window | Attempt]


def _digest(batch: Sequence[Window | Attempt]) -> str:
    """Return a hash of the tokens of a batch, which identifies its record: a longer search makes other batches."""
    return hashlib.sha256(repr([list(item.tokens) for item in batch]).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class MakeWorker:
    """Make a worker of the search: in this process with the model that is loaded, in another one by loading it again.

    Args:
        settings: of the run.
        config: of its folder.
        model: loaded from the settings; it stays in this process.
    """

    settings: FindSettings
    config: Mapping[str, Any]
    model: HookedModel | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return MakeWorker, (self.settings, self.config)

    def __call__(self) -> Worker:
        """Return a function from jobs to records."""
        if self.model:
            return partial(_records, self.settings, self.model)
        model = replace(self.settings, device=device_elsewhere(self.config)).load_model()
        check_weights(model, self.config)
        return kept_open(partial(_records, self.settings, model), same_threads(self.config))


def _records(settings: FindSettings, model: HookedModel, job: Job) -> list[Record]:
    """Return the record of a batch."""
    ((step, tokens_sha256),) = job.keys
    batch: Batch = job.content
    record = {"step": step, "item": batch.item, "tokens_sha256": tokens_sha256}
    with fast_products(model.cfg.device):
        if step == "scan":
            return [record | _scanned(settings, model, batch.content, first=batch.item == 0)]
        return [record | {"values": _generated(settings, model, step, batch.content)}]


def _scanned(settings: FindSettings, model: HookedModel, windows: Sequence[Any], first: bool) -> Record:
    """Predict windows teacher-forced; return how many are accurate, and those that have enough distinct tokens too."""
    sequences = [_sequence(settings, model, window) for window in windows]
    if first:
        check_losses(model, sequences, settings.batch)
    accuracies = suffix_accuracy(teacher_forced(model, sequences, settings.batch), sequences).tolist()
    accurate = [
        _found(window, accuracy)
        for window, accuracy in zip(windows, accuracies, strict=True)
        if accuracy > 100 * settings.min_accuracy - 1e-4  # accuracies are float32: 7 of 10 is a little under 70
    ]
    passed = [window for window in accurate if len(set(window["tokens"][settings.prompt :])) >= settings.min_distinct]
    return {"accurate": len(accurate), "passed": passed}


def _sequence(settings: FindSettings, model: HookedModel, window: Window) -> MemorizedSequence:
    sequence = _after_bos(
        settings, model, MemorizedSequence(torch.tensor(window.tokens), settings.prompt, window.source)
    )
    try:
        sequence.check_fits(model)
    except ValueError as error:
        raise ValueError(f"{window.source}: {error}") from error
    return sequence


def _after_bos(settings: FindSettings, model: HookedModel, sequence: MemorizedSequence) -> MemorizedSequence:
    return sequence.after_bos(model) if begins_with_bos(model, settings.bos) else sequence


def _found(window: Window, accuracy: float) -> FoundWindow:
    return {
        "tokens": list(window.tokens),
        "source": window.source,
        "start": window.start,
        "category": list(window.category),
        "accuracy": round(accuracy, 2),
    }


def _generated(settings: FindSettings, model: HookedModel, step: Step, attempts: Sequence[Any]) -> list[Measured]:
    """Generate the suffix of every attempt, and measure how close it is."""
    sequences = [
        _after_bos(settings, model, MemorizedSequence(torch.tensor(attempt.tokens), settings.prompt))
        for attempt in attempts
    ]
    suffixes = free_running(model, sequences, settings.batch)
    return [
        _measured(model, step, suffix.tolist(), attempt.suffix)
        for suffix, attempt in zip(suffixes, attempts, strict=True)
    ]


def _measured(model: HookedModel, step: Step, generated: list[int], suffix: list[int]) -> Measured:
    distance = _distance(model, generated, suffix)
    if step == "greedy":
        return {"distance": distance, "distinct": len(set(generated))}
    return {"shuffled_distance": distance} if step == "shuffled" else {"foreign_distance": distance}


def _distance(model: HookedModel, generated: list[int], suffix: list[int]) -> int:
    """Return the Levenshtein distance of two suffixes, in characters if the model has a tokenizer, else in tokens."""
    if model.tokenizer is None:
        return Levenshtein.distance(generated, suffix)
    return Levenshtein.distance(*(decode(model, torch.tensor(tokens)) for tokens in (generated, suffix)))
