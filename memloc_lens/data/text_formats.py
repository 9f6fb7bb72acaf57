"""Read text formats: JSON lines and lists, tables in CSV or TSV, token ids in lines, plain text."""

import csv
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from memloc_lens.data.opening import LARGEST, all_lines, lines, read_text
from memloc_lens.data.row import CONTENT_FIELDS, Row, file_row


def json_lines(path: Path) -> Iterator[Row]:
    """Read an object a line."""
    for number, line in lines(path):
        yield file_row(path, "line", number, _parse_json(path, number, line))


def json_list(path: Path) -> Iterator[Row]:
    """Read a list of objects, or JSON lines, which are called `.json` as well."""
    _, first = next(lines(path), (0, ""))
    if not first.lstrip().startswith("["):
        yield from json_lines(path)
        return
    for number, item in enumerate(_parse_json(path, 1, read_text(path)), start=1):
        yield file_row(path, "row", number, item)


def comma_separated(path: Path) -> Iterator[Row]:
    """Read a table in CSV: with a line of column names, or token ids alone, a sequence a line."""
    return _separated(path, ",")


def tab_separated(path: Path) -> Iterator[Row]:
    """Read a table as `comma_separated` does, with tabs."""
    return _separated(path, "\t")


def plain_text(path: Path) -> Iterator[Row]:
    """Read the whole file as one text."""
    row = file_row(path, "line", 1, {"text": read_text(path)})
    yield {**row, "where": str(path), "id": path.stem}


def text_lines(path: Path) -> Iterator[Row]:
    """Read a plain text file with a text a line; empty lines are skipped.

    Raises:
        ValueError: if the file cannot be read.
    """
    for number, line in lines(path):
        yield file_row(path, "line", number, {"text": line.strip()})


def _distinct_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"an object has the field {next(name for name in names if names.count(name) > 1)!r} twice")
    return fields


JSON = json.JSONDecoder(object_pairs_hook=_distinct_fields)


def _parse_json(path: Path, start: int, text: str) -> Any:
    """Parse text that starts at a line of a file."""
    try:
        return JSON.decode(text)
    except json.JSONDecodeError as error:
        line = start + error.lineno - 1
        raise ValueError(f"{path}, line {line}: not JSON ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or lists in lists in lists
        raise ValueError(f"{path}, line {start}: JSON that cannot be read ({error})") from error


def _separated(path: Path, delimiter: str) -> Iterator[Row]:
    _, first = next(lines(path), (0, ""))
    names = [name.strip() for cells in csv.reader([first], delimiter=delimiter) for name in cells]
    is_table = not CONTENT_FIELDS.isdisjoint(names)
    return _table_rows(path, delimiter) if is_table else _token_lines(path, delimiter)


def _token_lines(path: Path, delimiter: str) -> Iterator[Row]:
    for number, line in lines(path):
        try:
            tokens = _token_ids(line.split(delimiter))
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}: {line.strip()[:40]!r} is not a line of token ids; write whole numbers, or "
                f"name columns in the first line: {', '.join(sorted(CONTENT_FIELDS))}, prompt_len, id, category, split"
            ) from error
        yield file_row(path, "line", number, {"tokens": tokens})


def _table_rows(path: Path, delimiter: str) -> Iterator[Row]:
    """Read rows under names of columns. An empty cell is an absent field."""
    names: list[str] = []
    for number, cells in _records(path, delimiter):
        if not names:
            names = [cell.strip() for cell in cells]
            if len(set(names)) < len(names):
                repeated = next(name for name in names if names.count(name) > 1)
                raise ValueError(f"{path}, line {number}: two columns are named {repeated!r}; rename one")
            continue
        if len(cells) != len(names):
            raise ValueError(f"{path}, line {number}: {len(cells)} cells, and {len(names)} columns have names")
        fields: dict[str, object] = {name: cell for name, cell in zip(names, cells, strict=True) if cell}
        yield file_row(path, "line", number, {**fields, **_numbers(fields)})


def _records(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Read the cells of a table, with the line on which each row starts: a cell in quotes may hold line feeds."""
    csv.field_size_limit(LARGEST)
    records = csv.reader((line for _, line in all_lines(path)), delimiter=delimiter, strict=True)
    while True:
        start = records.line_num + 1
        try:
            cells = next(records, None)
        except csv.Error as error:
            raise ValueError(f"{path}, line {start}: not a table ({error})") from error
        if cells is None:
            return
        if cells:
            yield start, cells


def _numbers(fields: dict[str, object]) -> dict[str, object]:
    """Return the fields that are numbers as such; a cell that is no number stays, to be refused with its row."""
    numbers: dict[str, object] = {}
    for name in ("tokens", "prompt_len"):
        cell = str(fields.get(name, ""))
        try:
            ids = _token_ids(re.split(r"[,\s]+", cell.strip().removeprefix("[").removesuffix("]").strip()))
        except ValueError:
            continue
        numbers[name] = ids if name == "tokens" else ids[0] if len(ids) == 1 else cell
    return numbers


def _token_ids(cells: Iterable[str]) -> list[int]:
    """Read whole numbers; Python's own `int` would take 1_000 as well."""
    stripped = [cell.strip() for cell in cells]
    if not all(cell.isascii() and cell.isdigit() for cell in stripped):
        raise ValueError("not whole numbers")
    return [int(cell) for cell in stripped]
