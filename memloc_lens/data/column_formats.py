"""Read tables in columns: Parquet, Arrow, and data sets that `datasets` saved in a folder.

Only the columns that are fields of `Row` are read, a batch of rows at a time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from memloc_lens.data.opening import exists, first_line, parsing
from memloc_lens.data.row import CONTENT_FIELDS, FIELDS, Row, file_row
from memloc_lens.library_types import RecordBatch

BATCH = 256
"""Rows of a Parquet file that are decoded at a time."""


def parquet(path: Path) -> Iterator[Row]:
    """Read a Parquet file."""
    import pyarrow.parquet as pq

    format = "a Parquet file"
    with parsing(path, format):
        file = pq.ParquetFile(str(path), memory_map=True, page_checksum_verification=True)
        names = file.schema_arrow.names
    columns = _columns(path, names)
    return _batch_rows(path, format, columns, file.iter_batches(BATCH, columns=columns))


def arrow(path: Path) -> Iterator[Row]:
    """Read an Arrow file, which is what Feather is now, or an Arrow stream, which is what `datasets` writes."""
    import pyarrow as pa

    format = "an Arrow file or stream"
    with parsing(path, format):
        source = pa.memory_map(str(path))
        is_file = source.read_at(6, 0) == b"ARROW1"
        reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
        names = reader.schema.names
    batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else iter(reader)
    return _batch_rows(path, format, _columns(path, names), batches)


def is_saved_data_set(folder: Path) -> bool:
    """Whether `save_to_disk` of a data set wrote the folder."""
    return any(exists(folder / name) for name in ("state.json", "dataset_dict.json"))


def saved_data_set(folder: Path) -> Iterator[Row]:
    """Read the folder of a data set."""
    from datasets import Dataset, load_from_disk

    try:
        data_set = load_from_disk(str(folder))
    except Exception as error:  # the files in the folder may be damaged in any way
        raise ValueError(f"{folder} is not a data set that save_to_disk wrote: {first_line(error)}") from error
    if not isinstance(data_set, Dataset):
        raise ValueError(
            f"{folder} holds several splits; give one of {', '.join(str(folder / name) for name in data_set)}"
        )
    table = data_set.select_columns(_columns(folder, data_set.column_names)).with_format("arrow")
    batches = (batch for part in table.iter(BATCH) for batch in part.to_batches())
    return _batch_rows(folder, "a data set that save_to_disk wrote", table.column_names, batches)


def _columns(path: Path, names: list[str]) -> list[str]:
    """Return the columns that are read."""
    columns = [name for name in names if name in FIELDS]
    if CONTENT_FIELDS.isdisjoint(columns):
        raise ValueError(
            f"{path} has no column {', '.join(sorted(CONTENT_FIELDS))}; it has {', '.join(names)[:200] or 'none'}"
        )
    if len(set(columns)) < len(columns):
        repeated = next(name for name in columns if columns.count(name) > 1)
        raise ValueError(f"{path} has two columns named {repeated!r}; rename one")
    return columns


def _batch_rows(path: Path, format: str, columns: list[str], batches: Iterator[RecordBatch]) -> Iterator[Row]:
    number = 0
    while True:
        with _batch_errors(path, format, number):
            batch = next(batches, None)
            if batch is None:
                return
            batch.validate(full=True)  # reading damaged offsets would end the process
        for index in range(batch.num_rows):
            number += 1
            fields = {name: batch.column(name)[index].as_py() for name in columns}
            yield file_row(path, "row", number, fields)


@contextmanager
def _batch_errors(path: Path, format: str, rows: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # pyarrow raises its own kinds
        raise ValueError(f"{path} is not {format}: after row {rows}, {first_line(error)}") from error
