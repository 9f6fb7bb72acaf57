"""The run folder: configuration, records appended as they are made, scores, and the summary.

An interrupted run resumes in its folder: records that are there are not made again. A last line that was cut short is
dropped.
"""

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from memloc_lens.runs.jobs import InMemory
from memloc_lens.runs.schema import Record, Summary

GROWING = ("methods", "ratios")
"""Parts of a configuration that a later run in the same folder may add to."""


class RunFolder(InMemory):
    """The folder of one run.

    Args:
        path: created if it does not exist.
        config: everything that decides the values of records. A folder belongs to one configuration, to which later
            runs may add methods and ratios.
        key: the fields that identify a record.

    Raises:
        ValueError: if the folder belongs to another configuration, or its records cannot be read.
    """

    def __init__(
        self, path: Path, config: Mapping[str, Any], key: Sequence[str] = ("sequence", "method", "ratio")
    ) -> None:
        super().__init__(*key)
        self.path = path
        self._records = path / "records.jsonl"
        wanted: dict[str, Any] = json.loads(json.dumps(config, default=str))
        with _disk_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            earlier = _read_config(path)
            _check_same(path, earlier or wanted, wanted)
            self.config = _merged(earlier or {}, wanted)
            if self.config != earlier:
                text = json.dumps(self.config, indent=1) + "\n"
                _write_whole(path / "config.json", lambda part: part.write_text(text))
            self.records: list[Record] = self._recover()
        for record in self.records:
            super().append(record)

    def append(self, record: Record) -> None:
        """Add a record; it is on the disk before this returns."""
        with _disk_errors(self.path), self._records.open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.records.append(record)
        super().append(record)

    def write_summary(self, summary: Summary) -> None:
        """Write `summary.json`."""
        self.write("summary.json", json.dumps(summary, indent=1) + "\n")

    def write(self, name: str, text: str) -> None:
        """Write a file of the folder."""
        with _disk_errors(self.path):
            _write_whole(self.path / name, lambda part: part.write_text(text, "utf-8"))

    def _recover(self) -> list[Record]:
        if not self._records.exists():
            return []
        content = self._records.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            _write_whole(self._records, lambda part: part.write_bytes(whole))
        return read_records(self._records)


def read_records(file: Path) -> list[Record]:
    """Read the records of a run.

    Raises:
        ValueError: naming the line that is not a record.
    """
    records = []
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: not a record; remove the line to have it made again") from error
    return records


def score_file(folder: Path, method: str, *parts: float | int) -> Path:
    """Return where a run keeps the scores of a method: of the batch that starts at a target, or of an injection."""
    name = "-".join([method, *(f"{part:05d}" if isinstance(part, int) else f"{part:g}" for part in parts)])
    return folder / "scores" / f"{name}.safetensors"


def kept_scores(file: Path, compute: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the tensors of a score file, computed and written first if it is missing or damaged."""
    try:
        return load_file(file)
    except (FileNotFoundError, SafetensorError):
        tensors = {key: tensor.cpu().contiguous() for key, tensor in compute().items()}
    with _disk_errors(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        _write_whole(file, lambda part: save_file(tensors, part))
    return tensors


@cache
def source() -> dict[str, str]:
    """Return the version of the package and a hash of its source, for the configuration."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(str(file.relative_to(package)).encode() + file.read_bytes())
    return {"memloc_lens": version("memloc-lens"), "source_sha256": digest.hexdigest()[:16]}


def _read_config(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads((path / "config.json").read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path / 'config.json'} cannot be read: {error}; choose another folder with --out") from error


def _merged(earlier: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Add methods, ratios and the source that writes records now to an earlier configuration."""
    merged = {**config, "written_by": list(earlier.get("written_by", []))}
    if source() not in merged["written_by"]:
        merged["written_by"].append(source())
    if "methods" in config:
        merged["methods"] = {**earlier.get("methods", {}), **config["methods"]}
    if "ratios" in config:
        merged["ratios"] = sorted({*earlier.get("ratios", []), *config["ratios"]})
    return merged


def _check_same(path: Path, earlier: dict[str, Any], config: dict[str, Any]) -> None:
    there, here = dict(_flat(earlier)), dict(_flat(config))
    shared_methods = [f"methods.{name}." for name in earlier.get("methods", {}) if name in config.get("methods", {})]
    differing = [
        f"{name.removeprefix('methods.')} is {there.get(name)!r} there and {here.get(name)!r} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
        and (name.split(".")[0] not in (*GROWING, "written_by") or name.startswith(tuple(shared_methods)))
    ]
    if differing:
        raise ValueError(
            f"{path} belongs to a run with another configuration: {'; '.join(differing)}. "
            "Choose another folder with --out"
        )


def _flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file so that it is there whole or not at all."""
    part = path.with_name(path.name + ".part")
    write(part)
    part.replace(path)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ValueError(
                f"the disk of {path} is full; what was recorded is kept: free some space and run the same command again"
            ) from error
        raise ValueError(f"the run folder {path} cannot be written: {error.strerror or error}") from error
    except SafetensorError as error:
        raise ValueError(
            f"the run folder {path} cannot be written: {error}; what was recorded is kept: repair it and run the same "
            "command again"
        ) from error
