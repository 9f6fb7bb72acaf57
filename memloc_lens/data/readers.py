"""Read files, folders and data sets on the hub as rows. A format is one function and one line of `READERS`.

`load_sequences`, `load_definitions`, `load_texts` and `read_corpus` all read through `rows`, so that a source means the
same to all of them:

- **JSON lines** and JSON lists: a row is an object with the fields of `Row`. Other fields are ignored. These are the
  files that Chang et al. (2024) published for GPT2-XL, and those that `find` writes.
- **Tables** in CSV, TSV, Parquet or Arrow, and folders that `datasets` saved: columns are the fields of `Row`. CSV and
  TSV without names of columns are token ids, a sequence a line.
- **Arrays of token ids** of torch (`.pt`, of which the first 5 rows are the split `dev`, as Chang et al. published them
  for Pythia) and numpy (`.npy`, `.npz`). A pair `NAME_prefix.npy` and `NAME_suffix.npy`, as in
  google-research/lm-extraction-benchmark, is one data set: the prompt is the prefix.
- **Data sets on the hub** with a text or `tokens` (`EleutherAI/pythia-memorized-evals:duped.6.9b`, split as `.pt` is).
- **Plain text**: every other file, one row.

Text may be compressed: `.gz` or `.zst` after the suffix of its format.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from memloc_lens.data.column_formats import arrow, is_saved_data_set, parquet, saved_data_set
from memloc_lens.data.opening import (
    DECOMPRESSORS,
    NotText,
    check_regular,
    decompressed_name,
    exists,
    first_line,
    path_of,
)
from memloc_lens.data.row import Row, make_row
from memloc_lens.data.text_formats import comma_separated, json_lines, json_list, plain_text, tab_separated
from memloc_lens.data.token_formats import pair_of, published_split, token_array, token_arrays, token_tensor

TEXT_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".csv": comma_separated,
    ".json": json_list,
    ".jsonl": json_lines,
    ".md": plain_text,
    ".ndjson": json_lines,
    ".tsv": tab_separated,
    ".txt": plain_text,
}
"""The readers of text, which may be compressed."""

BINARY_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".arrow": arrow,
    ".feather": arrow,
    ".npy": token_array,
    ".npz": token_arrays,
    ".parquet": parquet,
    ".pt": token_tensor,
}
"""The readers of files that are read where they lie, and so cannot be compressed once more."""

READERS = TEXT_READERS | BINARY_READERS
"""The reader for a file suffix. Files with another suffix are plain text."""


def rows(source: str | Path, noun: str, hub_split: str = "train", streaming: bool = False) -> Iterator[Row]:
    """Read the rows of a file, of a folder that is a data set, or of a data set on the hub.

    Args:
        source: path of the file or folder, or owner/name:split on the hub. A folder holds a prefix and suffix pair, or
            is one that `datasets` saved.
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
    path = path_of(source)
    if exists(path):
        return _folder_rows(path) if path.is_dir() else _file_rows(path)
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
    from datasets import load_dataset

    name, _, named_split = source.partition(":")
    split = named_split or default_split
    short_name = source.partition("/")[2]
    number = 0
    try:
        for content in load_dataset(name, split=split, streaming=streaming):
            number += 1
            fields = {"split": published_split(number), **content} if "tokens" in content else content
            yield make_row(f"{source}, row {number}", f"{short_name}-{number}", number, fields)
    except Exception as error:  # the network, the hub, or files of any format
        place = f" after row {number}" if number else ""
        raise ValueError(
            f"the data set {name!r} with its split {split!r} could not be loaded{place}: {first_line(error)}"
        ) from error


def is_hub_name(source: str) -> bool:
    """Whether a source reads as owner/name or owner/name:split on the hub, and not as a path.

    Example:
        >>> from memloc_lens.data.readers import is_hub_name
        >>> is_hub_name("EleutherAI/pythia-memorized-evals:duped.6.9b"), is_hub_name("runs/sequences.jsonl")
        (True, False)
    """
    name = source.partition(":")[0].lower()
    is_path = name.startswith(("/", ".", "~")) or name.endswith((*READERS, *DECOMPRESSORS))
    return name.count("/") == 1 and not is_path


def is_local(source: str | Path) -> bool:
    """Whether a source is a file or a folder, and not a data set on the hub.

    Raises:
        ValueError: if the source is no path.
    """
    return exists(path_of(source)) or not is_hub_name(str(source))


def reader_of(path: Path) -> Callable[[Path], Iterator[Row]]:
    """Return the reader of a file by its suffix, under that of its compression."""
    name = decompressed_name(path).lower()
    return next((reader for suffix, reader in READERS.items() if name.endswith(suffix)), plain_text)


def is_plain_text(source: str | Path) -> bool:
    """Whether the source is a file that is read as plain text.

    Raises:
        ValueError: if the source is no path.
    """
    path = path_of(source)
    return exists(path) and path.is_file() and reader_of(path) is plain_text


def _file_rows(path: Path) -> Iterator[Row]:
    check_regular(path)
    reader = reader_of(path)
    if reader in BINARY_READERS.values() and decompressed_name(path) != path.name:
        raise ValueError(f"{path} is compressed, and only text can be; decompress it to {decompressed_name(path)}")
    try:
        yield from reader(path)
    except NotText as error:
        raise NotText(f"{error}; data is read from {', '.join(READERS)} and plain text") from error


def _folder_rows(folder: Path) -> Iterator[Row]:
    if is_saved_data_set(folder):
        return saved_data_set(folder)
    pairs = _pairs(folder)
    if len(pairs) != 1:
        raise ValueError(
            f"{folder} is a folder with {len(pairs)} pairs of *_prefix.npy and *_suffix.npy, not 1; give a file, or a "
            "folder that save_to_disk of datasets wrote"
        )
    return token_array(pairs[0])


def _pairs(folder: Path) -> list[Path]:
    """Return the files with prefixes, one of each pair."""
    return sorted({pair_of(file)[0] for pattern in ("*_prefix.npy", "*_suffix.npy") for file in folder.glob(pattern)})
