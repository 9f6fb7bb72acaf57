"""Read files and data sets on the hub as rows. A format is one function and one line of `READERS`.

`load_sequences`, `load_definitions`, `load_texts` and `read_corpus` all read through `rows`, so that a source means the
same to all of them:

- **JSON lines**, plain or compressed, and JSON lists: a row is an object with the fields of `Row`. Other fields are
  ignored. These are the files that Chang et al. (2024) published for GPT2-XL, and those that `find` writes.
- **Token tensors** (`.pt`), as Chang et al. published them for Pythia, and data sets on the hub with a column `tokens`
  (`EleutherAI/pythia-memorized-evals:duped.6.9b`): prompts of 32 tokens; the first 5 rows are the split `dev`.
- **Token ids** as `.csv` (a sequence a line) or `.npy`: prompts of 32 tokens. A pair `NAME_prefix.npy` and
  `NAME_suffix.npy`, as in google-research/lm-extraction-benchmark, is one data set: the prompt is the prefix.
- **Plain text**: every other file, one row.
"""

import gzip
import json
import pickle
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import load_dataset
from datasets.exceptions import DatasetNotFoundError
from jaxtyping import Int
from torch import Tensor

from memloc_lens.data.row import Row

PROMPT_LEN = 32
"""Tokens in the prompt where a format cannot say: the published length."""

DEV_ROWS = 5
"""Rows at the start of a published token tensor that are the split `dev`."""


def json_lines(path: Path) -> Iterator[Row]:
    """Read an object a line; empty lines are skipped."""
    return _parse_lines(path, read_text(path))


def compressed_json_lines(path: Path) -> Iterator[Row]:
    """Read JSON lines compressed with gzip."""
    return _parse_lines(path, read_text(path, gzip.open))


def json_list(path: Path) -> Iterator[Row]:
    """Read a list of objects, or JSON lines, which are called `.json` as well."""
    text = read_text(path)
    if not text.lstrip().startswith("["):
        yield from _parse_lines(path, text)
        return
    for number, item in enumerate(_parse_json(path, 1, text), start=1):
        yield _file_row(path, "row", number, item)


def token_tensor(path: Path) -> Iterator[Row]:
    """Read a whole-number tensor [row, pos] as `torch.save` writes it, without running code in the file."""
    try:
        tensor = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise _unreadable(path, error) from error
    except (RuntimeError, EOFError, pickle.UnpicklingError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a tensor that torch.save wrote: {_first_line(error)}") from error
    for number, tokens in enumerate(_token_rows(path, tensor).tolist(), start=1):
        yield _file_row(path, "row", number, {"tokens": tokens, **_published_fields(number)})


def token_array(path: Path) -> Iterator[Row]:
    """Read a whole-number array [row, pos] as `numpy.save` writes it, or both arrays of a prefix and suffix pair."""
    prefix_file = path.with_name(path.name.replace("_suffix.", "_prefix."))
    suffix_file = path.with_name(path.name.replace("_prefix.", "_suffix."))
    tokens, prompt_len = _load_array(prefix_file), PROMPT_LEN
    if prefix_file != suffix_file:
        suffixes, prompt_len = _load_array(suffix_file), tokens.shape[1]
        if len(suffixes) != len(tokens):
            raise ValueError(
                f"{prefix_file} has {len(tokens)} rows and {suffix_file} has {len(suffixes)}; they must have the same"
            )
        tokens = torch.cat([tokens, suffixes], dim=1)
    for number, row in enumerate(tokens.tolist(), start=1):
        yield _file_row(prefix_file, "row", number, {"tokens": row, "prompt_len": prompt_len})


def token_lines(path: Path) -> Iterator[Row]:
    """Read a sequence of token ids a line, separated by commas."""
    for number, line in _numbered_lines(read_text(path)):
        try:
            tokens = [int(cell) for cell in line.split(",")]
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}: {line[:40]!r} is not a line of token ids; write whole numbers and commas, or "
                "give texts as .jsonl"
            ) from error
        yield _file_row(path, "line", number, {"tokens": tokens, "prompt_len": PROMPT_LEN})


def plain_text(path: Path) -> Iterator[Row]:
    """Read the whole file as one text."""
    yield Row(where=str(path), number=1, id=path.stem, text=read_text(path))


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".csv": token_lines,
    ".json": json_list,
    ".jsonl": json_lines,
    ".jsonl.gz": compressed_json_lines,
    ".md": plain_text,
    ".ndjson": json_lines,
    ".npy": token_array,
    ".pt": token_tensor,
    ".txt": plain_text,
}
"""The reader for a file suffix. Files with another suffix are plain text."""


def rows(source: str | Path, noun: str, hub_split: str = "train", streaming: bool = False) -> Iterator[Row]:
    """Read the rows of a file, of a folder with a prefix and suffix pair, or of a data set on the hub.

    Args:
        source: path of the file or folder, or owner/name:split on the hub.
        noun: what the caller reads, for errors.
        hub_split: split on the hub if the source names none.
        streaming: read a data set on the hub row by row, without storing it.

    Returns:
        The rows in the order of the source.

    Raises:
        ValueError: if the source does not exist or cannot be read, with the line or row and the reason.

    Example:
        >>> from memloc_lens.data.definitions import DEFINITIONS
        >>> from memloc_lens.data.readers import rows
        >>> first = next(rows(DEFINITIONS, "texts"))
        >>> first["number"], first["id"], first["split"]
        (1, 'definition-01', 'dev')
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return token_array(_prefix_file(path))
    if path.exists():
        return reader_of(path)(path)
    if is_hub_name(str(source)):
        return hub_rows(str(source), hub_split, streaming)
    raise ValueError(
        f"no {noun} at {str(source)!r}: give a file ({', '.join(READERS)}; others are read as plain text) or "
        "owner/name:split of a data set on the hub"
    )


def hub_rows(source: str, default_split: str, streaming: bool = False) -> Iterator[Row]:
    """Read a data set on the hub.

    Args:
        source: owner/name or owner/name:split.
        default_split: split if the source names none.
        streaming: read row by row, without storing the data set.

    Raises:
        ValueError: if the data set or the split cannot be loaded, with the reason.
    """
    name, _, named_split = source.partition(":")
    split = named_split or default_split
    try:
        data_set = load_dataset(name, split=split, streaming=streaming)
    except (DatasetNotFoundError, ConnectionError, OSError, ValueError) as error:
        raise ValueError(
            f"the data set {name!r} with its split {split!r} could not be loaded: {_first_line(error)}"
        ) from error
    short_name = source.partition("/")[2]
    for number, content in enumerate(data_set, start=1):
        fields = {**_published_fields(number), **content} if "tokens" in content else content
        yield _row(f"{source}, row {number}", f"{short_name}-{number}", number, fields)


def is_hub_name(source: str) -> bool:
    """Whether a source reads as owner/name or owner/name:split on the hub, and not as a path.

    Example:
        >>> from memloc_lens.data.readers import is_hub_name
        >>> is_hub_name("EleutherAI/pythia-memorized-evals:duped.6.9b"), is_hub_name("runs/sequences.jsonl")
        (True, False)
    """
    name = source.partition(":")[0].lower()
    is_path = name.startswith(("/", ".", "~")) or name.endswith(tuple(READERS))
    return name.count("/") == 1 and not is_path


def reader_of(path: Path) -> Callable[[Path], Iterator[Row]]:
    """Return the reader of a file by its suffix."""
    for suffix, reader in READERS.items():
        if path.name.lower().endswith(suffix):
            return reader
    return plain_text


def is_plain_text(source: str | Path) -> bool:
    """Whether the source is a file that is read as plain text."""
    path = Path(source).expanduser()
    return path.is_file() and reader_of(path) is plain_text


def text_lines(path: Path) -> Iterator[Row]:
    """Read a plain text file with a text a line; empty lines are skipped.

    Raises:
        ValueError: if the file cannot be read.
    """
    for number, line in _numbered_lines(read_text(path)):
        yield _file_row(path, "line", number, {"text": line.strip()})


def read_text(path: Path, open_file: Callable[..., Any] = open) -> str:
    """Read a text file in UTF-8, without a byte order mark.

    Args:
        path: of the file.
        open_file: `open`, or `gzip.open` for a compressed file.

    Raises:
        ValueError: if the file cannot be read or is not UTF-8.
    """
    try:
        with open_file(path, "rt", encoding="utf-8-sig") as file:
            return file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not a text file in UTF-8: {error.reason} at byte {error.start}; data is read from "
            f"{', '.join(READERS)} and plain text"
        ) from error


def _parse_lines(path: Path, text: str) -> Iterator[Row]:
    for number, line in _numbered_lines(text):
        yield _file_row(path, "line", number, _parse_json(path, number, line))


def _parse_json(path: Path, first_line: int, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ValueError(f"{path}, line {line}: not JSON ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or lists in lists in lists
        raise ValueError(f"{path}, line {first_line}: JSON that cannot be read ({error})") from error


def _numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    """Number the lines from 1 and leave out empty ones. Only newlines end a line: texts may hold U+2028."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line


def _file_row(path: Path, unit: str, number: int, content: object) -> Row:
    where = f"{path}, {unit} {number}"
    if not isinstance(content, dict):
        raise ValueError(f"{where}: a {type(content).__name__} where an object {{...}} was expected")
    return _row(where, f"{path.stem}-{number}", number, content)


def _row(where: str, default_id: str, number: int, content: Mapping[str, object]) -> Row:
    """Make a row; a field that is null counts as absent, because a table has every column in every row."""
    fields = {name: value for name, value in content.items() if value is not None}
    return cast(Row, {**fields, "where": where, "number": number, "id": str(fields.get("id", default_id))})


def _published_fields(number: int) -> dict[str, object]:
    """Return the prompt length and the split of a row of a published token tensor."""
    return {"prompt_len": PROMPT_LEN, "split": "dev" if number <= DEV_ROWS else "test"}


def _load_array(path: Path) -> Int[Tensor, "row pos"]:
    try:
        tensor = torch.from_numpy(np.load(path, allow_pickle=False))
    except OSError as error:
        raise _unreadable(path, error) from error
    except (ValueError, EOFError, TypeError) as error:
        raise ValueError(f"{path} is not an array of numbers that numpy.save wrote: {_first_line(error)}") from error
    return _token_rows(path, tensor)


def _token_rows(path: Path, value: object) -> Int[Tensor, "row pos"]:
    """Check that what a file holds is token ids [row, pos]."""
    if not isinstance(value, Tensor):
        found = type(value).__name__
    elif value.ndim != 2 or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        found = f"a tensor {value.dtype} {list(value.shape)}"
    else:
        return value.long()
    raise ValueError(f"{path} holds {found}; a tensor of whole numbers [row, pos] was expected")


def _prefix_file(folder: Path) -> Path:
    prefix_files = sorted(folder.glob("*_prefix.npy"))
    if len(prefix_files) != 1:
        raise ValueError(
            f"{folder} is a folder with {len(prefix_files)} pairs of *_prefix.npy and *_suffix.npy, not 1; give a file"
        )
    return prefix_files[0]


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}")
