"""The run folder: configuration, records appended as they are made, scores, and the summary.

An interrupted run resumes in its folder: records that are there are not made again. A last line that was cut short is
dropped. One process at a time uses the folder.
"""

import json
import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from memloc_lens.runs.disk import disk_errors, write_whole
from memloc_lens.runs.jobs import InMemory
from memloc_lens.runs.lock import lock
from memloc_lens.runs.provenance import provenance
from memloc_lens.runs.records import KEY, SEAL, Problem, broken_seal, read_records, read_table, sealed, why_unusable
from memloc_lens.runs.schema import Record, Summary
from memloc_lens.runs.trackers import Tracker

TABLES = ("methods", "windows", "smallest_sets")
"""Parts of a configuration that a later run may add entries to."""

LISTS = ("ratios", "sequences")
"""Parts that a later run may add items to: ratios anywhere, sequences at the end."""

PLACES = ("model", "data", "text")
"""Parts that say where the weights, the sequences and the text are; these are identified by their content."""

HISTORY = ("written_by", "extents", "threads")
"""Parts that tell how records came about: by which code, command and machine, how often the sequences grew, and on how
many threads."""

SENTENCES = {
    "weights": "the weights differ: their fingerprint",
    "windows": "the corpus is not the one that the run began with: its hash",
    "data_sha256": "the sequences or the text that damage is measured on differ: data_sha256",
}
"""How parts that are hashes are called in errors."""

MOST_THREADS = 4096


class RunFolder(InMemory):
    """The folder of one run, locked until it is closed: ``with RunFolder(...) as folder``.

    Args:
        path: created if it does not exist.
        config: everything that decides the values of records. A folder belongs to one configuration, to which later
            runs may add methods, ratios and sequences.
        key: the fields that identify a record.
        free: parts of the configuration that may differ between runs; the last one's are kept.
        problem: tells what is wrong with a record that was read, if anything.

    Raises:
        ValueError: if another process uses the folder, it belongs to another configuration, or its files cannot be
            read.
    """

    def __init__(
        self,
        path: Path,
        config: Mapping[str, Any],
        key: Sequence[str] = KEY,
        free: Collection[str] = (),
        problem: Problem | None = None,
    ) -> None:
        super().__init__(*key)
        self.path = path
        self._records = path / "records.jsonl"
        wanted: dict[str, Any] = json.loads(json.dumps(config, default=str))
        with disk_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            self._open = ExitStack()
            self._open.callback(lock(path).release)
            try:
                self.config = self._configured(wanted, free)
                self.records: list[Record] = self._recover(problem)
            except BaseException:
                self.close()
                raise
        for record in self.records:
            super().append(record)
        self._tracker: Tracker | None = None

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    def close(self) -> None:
        """Let other processes use the folder."""
        self._open.close()

    def track(self, name: str) -> None:
        """Log what is added from now on to a tracker of `TRACKERS`, until the folder is closed.

        Raises:
            ValueError: if the tracker cannot be opened.
        """
        self._tracker = self._open.enter_context(Tracker(name, self.path, self.config))

    def append(self, record: Record) -> None:
        """Add a record; it is on the disk before this returns.

        Raises:
            ValueError: if a value is NaN or infinite, or the disk cannot be written.
        """
        wrong = why_unusable(record, self._fields)
        if wrong:
            where = ", ".join(f"{name} {record.get(name)}" for name in self._fields)
            raise ValueError(f"{where}: {wrong}; the model or its precision cannot be measured there")
        with disk_errors(self.path), self._records.open("a") as file:
            file.write(json.dumps(sealed(record)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.records.append(record)
        super().append(record)
        if self._tracker:
            self._tracker(record, len(self.records))

    def write_summary(self, summary: Summary) -> None:
        """Write `summary.json`."""
        self.write("summary.json", json.dumps(summary, indent=1) + "\n")

    def write(self, name: str, text: str) -> None:
        """Write a file of the folder."""
        with disk_errors(self.path):
            write_whole(self.path / name, lambda part: part.write_text(text, "utf-8"))

    def _configured(self, wanted: dict[str, Any], free: Collection[str]) -> dict[str, Any]:
        """Return the configuration of the folder with what this run adds, after writing it."""
        earlier = read_config(self.path)
        if earlier is None and self._records.exists() and self._records.stat().st_size:
            raise ValueError(
                f"{self.path} has records and no config.json to tell what they are of; choose another folder with --out"
            )
        if earlier is not None:
            _check_same(self.path, earlier, wanted, free)
        config = _merged(earlier or {}, wanted)
        if config != earlier:
            text = json.dumps(config, indent=1) + "\n"
            write_whole(self.path / "config.json", lambda part: part.write_text(text))
        return config

    def _recover(self, problem: Problem | None) -> list[Record]:
        """Read the records, without a last line that was cut short."""
        if not self._records.is_file():
            return read_records(self._records, self._fields) if self._records.exists() else []
        content = self._records.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            write_whole(self._records, lambda part: part.write_bytes(whole))
        records = read_records(
            self._records,
            self._fields,
            lambda record: (problem and problem(record, self.config)) or broken_seal(record),
        )
        return [{name: value for name, value in record.items() if name != SEAL} for record in records]


def read_config(path: Path) -> dict[str, Any] | None:
    """Read the configuration of a run folder; none if it has none.

    Raises:
        ValueError: if it is damaged.
    """
    file = path / "config.json"
    try:
        config = read_table(file)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{error}; choose another folder with --out") from error
    kinds: dict[str, type] = dict.fromkeys(TABLES, dict) | dict.fromkeys((*LISTS, "extents", "written_by"), list)
    wrong = [name for name, kind in kinds.items() if not isinstance(config.get(name, kind()), kind)]
    wrong = wrong or [name for name, usable in _usable(config).items() if not usable]
    if wrong:
        raise ValueError(f"{file} cannot be read: its {wrong[0]} are damaged; choose another folder with --out")
    return config


def _is_pair_of_strings(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)


def _usable(config: dict[str, Any]) -> dict[str, bool]:
    """Return which parts of a configuration hold what they must."""
    extents, threads = config.get("extents", []), config.get("threads", 1)
    return {
        "methods": all(isinstance(own, dict) for own in config.get("methods", {}).values()),
        "ratios": all(isinstance(ratio, int | float) for ratio in config.get("ratios", [])),
        "sequences": all(_is_pair_of_strings(sequence) for sequence in config.get("sequences", [])),
        "extents": all(isinstance(extent, int) and extent > 0 for extent in extents)
        and extents == sorted(set(extents))
        and ("sequences" not in config or extents[-1:] == [len(config["sequences"])]),
        "threads": isinstance(threads, int) and 0 < threads <= MOST_THREADS,
    }


@contextmanager
def resuming(path: Path) -> Iterator[None]:
    """Begin a run, before anything is loaded: refuse a folder that is in use or damaged, and keep its threads.

    The number of threads decides how sums are rounded. So a resumed run computes with as many as the run began with,
    also on a machine with more or fewer cores.

    Args:
        path: of the run folder, which may not exist yet.

    Raises:
        ValueError: if another process uses the folder, or its configuration is damaged.
    """
    if not path.is_dir():
        yield
        return
    with ExitStack() as stack:
        with disk_errors(path):
            stack.callback(lock(path).release)
            stack.enter_context(same_threads(read_config(path) or {}))
        yield


@contextmanager
def same_threads(config: Mapping[str, Any]) -> Iterator[None]:
    """Compute with as many threads as the run of a configuration began with."""
    own = torch.get_num_threads()
    wanted = config.get("threads", own)
    if wanted != own:
        print(f"computing on {wanted} threads, as the run began; a new --out may use {own}", file=sys.stderr)
    torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(own)


def _merged(earlier: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Add to an earlier configuration what this run brings: methods, ratios, sequences, and who writes records now."""
    merged = {**config, "written_by": list(earlier.get("written_by", []))}
    if provenance() not in merged["written_by"]:
        merged["written_by"].append(provenance())
    for name in set(TABLES) & config.keys():
        merged[name] = {**earlier.get(name, {}), **config[name]}
    if "ratios" in config:
        merged["ratios"] = sorted({*earlier.get("ratios", []), *config["ratios"]})
    if "sequences" in config:
        merged["sequences"] = max(earlier.get("sequences", []), config["sequences"], key=len)
        extents, count = list(earlier.get("extents", [])), len(merged["sequences"])
        merged["extents"] = extents if extents[-1:] == [count] else [*extents, count]
    merged["threads"] = earlier.get("threads") or torch.get_num_threads()
    return merged


def _check_same(path: Path, earlier: dict[str, Any], config: dict[str, Any], free: Collection[str]) -> None:
    if "weights" in config and "weights" not in earlier:
        raise ValueError(
            f"{path} has no fingerprint of the weights, since an earlier version wrote it; choose another folder with "
            "--out"
        )
    parts = (earlier.keys() | config.keys()) - {*free, *HISTORY, *TABLES, *LISTS}
    differing = [
        difference
        for name in sorted(parts)
        for difference in _differences({name: earlier.get(name)}, {name: config.get(name)})
    ]
    for table in TABLES:
        there, here = earlier.get(table, {}), config.get(table, {})
        for name in sorted(there.keys() & here.keys()):
            label = table if table in SENTENCES else name
            differing += _differences({label: there[name]}, {label: here[name]})
    for number, (there, here) in enumerate(
        zip(earlier.get("sequences", []), config.get("sequences", []), strict=False), 1
    ):
        if there != here:
            differing.append(f"sequence {number} is {there!r} there and {here!r} here")
            break
    if differing:
        raise ValueError(
            f"{path} belongs to a run with another configuration: {'; '.join(differing)}. "
            "Choose another folder with --out"
        )


def _differences(earlier: dict[str, Any], config: dict[str, Any]) -> list[str]:
    there, here = dict(_flat(earlier)), dict(_flat(config))
    return [
        f"{SENTENCES.get(name, name)} is {there.get(name)!r} there and {here.get(name)!r} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]


def _flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
