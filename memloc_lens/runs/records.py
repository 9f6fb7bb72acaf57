"""Read the records of a run: every line is whole, holds finite numbers where they belong, and counts once."""

import json
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from memloc_lens.runs.schema import Record

KEY = ("sequence", "method", "ratio")
"""The fields that identify a record of a benchmark; all others of it are numbers, numbers by id, or lists of them."""

LISTS = ("probabilities", "written")
"""Fields with a number for every token of a suffix."""

SEAL = "crc32"
"""The field of a record with its checksum."""

Problem = Callable[[Record, Mapping[str, Any]], str | None]
"""Tells what is wrong with a record of a run with a configuration, if anything."""


def read_records(
    file: Path, key: Sequence[str] = KEY, problem: Callable[[Record], str | None] = lambda record: None
) -> list[Record]:
    """Read the records of a run. A record that was written twice counts once.

    Args:
        file: `records.jsonl` of a run folder.
        key: the fields that identify a record.
        problem: what else a record must satisfy.

    Raises:
        ValueError: naming the line that cannot be used, why, and what to do.
    """
    records: dict[tuple[Any, ...], tuple[int, Record]] = {}
    for number, line in enumerate(whole_file(file).splitlines(), start=1):
        record = _parsed(line)
        wrong = why_unusable(record, key) or problem(record)
        if wrong:
            raise ValueError(f"{file}, line {number}: {wrong}; remove the line to have it made again")
        first, earlier = records.setdefault(tuple(record[name] for name in key), (number, record))
        if untimed(earlier) != untimed(record):
            raise ValueError(
                f"{file}, line {number}: repeats the record of line {first} with other values; remove both lines to "
                "have it made again"
            )
    return [record for _, record in records.values()]


def whole_file(file: Path) -> bytes:
    """Read a file.

    Raises:
        ValueError: if a folder, a pipe or a device is in its place.
        OSError: if it cannot be read.
    """
    if file.exists() and not file.is_file():
        raise ValueError(f"{file} is not a regular file; remove it")
    return file.read_bytes()


def read_table(file: Path) -> dict[str, Any]:
    """Read a JSON file that holds names and values.

    Raises:
        ValueError: if it holds something else.
        OSError: if it cannot be read.
    """
    content = _parsed(whole_file(file))
    if not isinstance(content, dict):
        raise ValueError(f"{file} cannot be read: it does not hold names and values in JSON")
    return content


def why_unusable(record: Any, key: Sequence[str]) -> str | None:
    """Return why a record cannot be counted, None if it can."""
    if not isinstance(record, dict):
        return "not a record"
    for name in key:
        if name not in record:
            return f"not a record: it has no {name!r}"
        wanted = {"ratio": int | float, "item": int}.get(name, str | int)
        if not isinstance(record[name], wanted) or isinstance(record[name], bool):
            return f"not a record: its {name!r} is {record[name]!r}"
    for name, value in record.items():
        if not _is_finite(value) or (name not in key and "ratio" in key and not _is_number(value, name in LISTS)):
            return f"{name} is {str(value)[:40]!s}, where a finite number belongs"
    return None


def untimed(record: Record) -> Record:
    """Return a record without the seconds that it took."""
    return {name: value for name, value in record.items() if not name.endswith("_seconds")}


def sealed(record: Record) -> Record:
    """Return a record with a checksum of all but its seconds, so that a value that changed on the disk is noticed."""
    return record | {SEAL: _checksum(record)}


def broken_seal(record: Record) -> str | None:
    """Return what is wrong if a record has a checksum, and it is not that of the record."""
    if SEAL not in record or record[SEAL] == _checksum({name: record[name] for name in record if name != SEAL}):
        return None
    return "its values are not those that were written"


def _checksum(record: Record) -> int:
    return zlib.crc32(json.dumps(untimed(record)).encode())


def foreign(record: Record, config: Mapping[str, Any]) -> str | None:
    """Return which method or ratio of a record its run does not have; None if it has both."""
    if record["method"] not in config["methods"]:
        return f"not a record of this run, which has no method {record['method']!r}"
    adaptive = [0.0] if config.get("smallest_sets") else []
    if record["ratio"] not in [*config["ratios"], *adaptive]:
        return f"not a record of this run, which has no ratio {record['ratio']}"
    return None


def lacks(record: Record, numbers: Sequence[str], tables: dict[str, Sequence[str]]) -> str | None:
    """Return which numbers, or numbers by id, a record lacks; None if it has all."""
    missing = [name for name in numbers if not isinstance(record.get(name), int | float)]
    for name, ids in tables.items():
        table = record.get(name)
        missing += [name] if not isinstance(table, dict) else [f"{name} of {id!r}" for id in ids if id not in table]
    if not missing:
        return None
    return f"no whole record: it has no {', '.join(missing[:3])}{' and more' * (len(missing) > 3)}"


def _parsed(line: bytes) -> Any:
    """Return what a line of JSON holds, None if it is not JSON."""
    try:
        return json.loads(line.decode())
    except (ValueError, RecursionError):
        return None


def _is_finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list):
        return all(map(_is_finite, value))
    return value is not None and (not isinstance(value, float) or math.isfinite(value))


def _is_number(value: Any, listed: bool) -> bool:
    if isinstance(value, list) != listed:
        return False
    values = value.values() if isinstance(value, dict) else value if listed else [value]
    return all(isinstance(number, int | float) for number in values)
