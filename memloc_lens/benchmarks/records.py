"""One folder a run: configuration, records appended as they are made, scores, and the summary.

A run that was stopped, by whatever, goes on in its folder: records already there are not made again. A last line
that was cut short is dropped.
"""

import errno
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

Record = dict[str, Any]


class RunFolder:
    """The folder of one benchmark run.

    Args:
        path: made if it is not there.
        config: everything that decides the records; a folder is only ever used with one.
        key: the fields that tell one record from another.

    Raises:
        ValueError: if the folder belongs to another configuration, or its records cannot be read.
    """

    def __init__(
        self, path: Path, config: dict[str, Any], key: Sequence[str] = ("sequence", "method", "ratio")
    ) -> None:
        self.path = path
        self._fields = tuple(key)
        self._records = path / "records.jsonl"
        config = json.loads(json.dumps(config))
        with _disk_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            if (path / "config.json").exists():
                _check_same(path, config)
            else:
                _write_whole(path / "config.json", lambda part: part.write_text(json.dumps(config, indent=1) + "\n"))
            self.records: list[Record] = self._recover()
        self._by_key = {self._key(record): record for record in self.records}

    def __contains__(self, key: tuple[Any, ...]) -> bool:
        return key in self._by_key

    def __getitem__(self, key: tuple[Any, ...]) -> Record:
        return self._by_key[key]

    def append(self, record: Record) -> None:
        """Add a record, on the disk before this returns."""
        with _disk_errors(self.path), self._records.open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.records.append(record)
        self._by_key[self._key(record)] = record

    def scores(self, name: str, compute: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The tensors kept under a name, computed and kept if they are not there yet."""
        file = self.path / "scores" / f"{name}.safetensors"
        try:
            return load_file(file)
        except (FileNotFoundError, SafetensorError):
            tensors = {key: tensor.cpu().contiguous() for key, tensor in compute().items()}
        with _disk_errors(self.path):
            file.parent.mkdir(parents=True, exist_ok=True)
            _write_whole(file, lambda part: save_file(tensors, part))
        return tensors

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write `summary.json`."""
        self.write("summary.json", json.dumps(summary, indent=1) + "\n")

    def write(self, name: str, text: str) -> None:
        """Write a file of the folder."""
        with _disk_errors(self.path):
            _write_whole(self.path / name, lambda part: part.write_text(text, "utf-8"))

    def _key(self, record: Record) -> tuple[Any, ...]:
        return tuple(record[field] for field in self._fields)

    def _recover(self) -> list[Record]:
        if not self._records.exists():
            return []
        content = self._records.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            _write_whole(self._records, lambda part: part.write_bytes(whole))
        records = []
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise ValueError(
                    f"{self._records}, line {number}: not a record; remove the line to have it made again"
                ) from error
        return records


def _check_same(path: Path, config: dict[str, Any]) -> None:
    try:
        there = json.loads((path / "config.json").read_text())
    except ValueError as error:
        raise ValueError(f"{path / 'config.json'} cannot be read: {error}; choose another folder with --out") from error
    differing = [
        f"{field} is {there.get(field)!r} there and {config.get(field)!r} here"
        for field in sorted(there.keys() | config.keys())
        if there.get(field) != config.get(field)
    ]
    if differing:
        raise ValueError(
            f"{path} belongs to a run with another configuration: {'; '.join(differing)}. "
            "Choose another folder with --out"
        )


def _write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file so that it is either there whole or not at all."""
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
            f"the run folder {path} cannot be written: {error}; what was recorded is kept: mend it and run the same "
            "command again"
        ) from error
