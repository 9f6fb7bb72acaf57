"""Open files of data: regular files only, decompressed, as UTF-8 text without a byte order mark.

A file may be larger than memory: it is read a line at a time. What has to be held at once is bounded by `LARGEST`.
"""

import gzip
import io
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

LARGEST = 2**28
"""Bytes that are held in memory at once: of a line, of a text that is one row, or of a compressed array."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class NotText(ValueError):
    """The error of a file that is not text in UTF-8."""


def _zstandard(path: Path) -> io.BufferedIOBase:
    import pyarrow as pa

    return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))


DECOMPRESSORS: dict[str, Callable[[Path], io.BufferedIOBase]] = {
    ".gz": lambda path: gzip.GzipFile(path, "rb"),
    ".zst": _zstandard,
}
"""What opens a compressed text file; its format follows from the name without this suffix."""


def decompressed_name(path: Path) -> str:
    """Return the name of a file without the suffix of its compression.

    Example:
        >>> decompressed_name(Path("corpus/part.jsonl.gz"))
        'part.jsonl'
    """
    return path.stem if path.suffix.lower() in DECOMPRESSORS else path.name


def path_of(source: object) -> Path:
    """Return the path that a source names.

    Raises:
        ValueError: if it is neither a string nor a path.
    """
    if not isinstance(source, str | Path) or not str(source) or "\0" in str(source):
        raise ValueError(f"the source is {source!r}; give the path of a file or folder, or owner/name of a data set")
    try:
        return Path(source).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{source}: {error}; write the path in full") from error


def exists(path: Path) -> bool:
    """Whether there is something at a path.

    Raises:
        ValueError: if the system does not let us look.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise unreadable(path, error) from error
    return True


def check_regular(path: Path) -> None:
    """Refuse what is not a regular file: a pipe or a device may never end.

    Raises:
        ValueError: stating what it is.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise unreadable(path, error) from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
        raise ValueError(f"{path} is {kind}; give a regular file")


@contextmanager
def parsing(path: Path, format: str) -> Iterator[None]:
    """Turn what a library raises on a file into one error: on damaged files that may be anything.

    Raises:
        ValueError: that the file cannot be read, or is not of the format.
    """
    check_regular(path)
    try:
        yield
    except OSError as error:
        raise unreadable(path, error) from error
    except Exception as error:
        raise ValueError(f"{path} is not {format}: {first_line(error)}") from error


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Read a text file line by line, numbered from 1; empty lines are left out.

    Only line feeds end a line: texts may hold U+2028, which other programs take for the end of one.

    Raises:
        ValueError: if the file cannot be read, is not UTF-8, or a line is too long.
    """
    for number, line in all_lines(path):
        if line.strip():
            yield number, line.removesuffix("\n")


def all_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Read a text file line by line, as `lines` does, with the empty ones."""
    with _opened(path) as file:
        for number in count(1):
            line = file.readline(LARGEST + 1)
            if not line:
                return
            if len(line) > LARGEST:
                raise ValueError(f"{path}, line {number} is longer than {LARGEST // 2**20} MiB; split it")
            yield number, _decoded(path, line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line, number)


def read_text(path: Path) -> str:
    """Read a whole text file, with line feeds for all ends of lines.

    Raises:
        ValueError: if the file cannot be read, is not UTF-8, or is too large.
    """
    with _opened(path) as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(
            f"{path} has more than {LARGEST // 2**20} MiB of text, and is read as a whole; split it, or write JSON "
            "lines, which are read one by one"
        )
    text = _decoded(path, content.removeprefix(BYTE_ORDER_MARK))
    return text.replace("\r\n", "\n").replace("\r", "\n")


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its name if there is none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def unreadable(path: Path, error: Exception) -> ValueError:
    """Return the error for a file that cannot be opened or read."""
    return ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or first_line(error)}")


@contextmanager
def _opened(path: Path) -> Iterator[io.BufferedIOBase]:
    check_regular(path)
    try:
        with DECOMPRESSORS.get(path.suffix.lower(), lambda path: path.open("rb"))(path) as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(path, error) from error


def _decoded(path: Path, content: bytes, line: int = 0) -> str:
    """Decode a line, or a whole file."""
    place = f" of line {line}" if line else ""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise NotText(f"{path} is not a text file in UTF-8: {error.reason} at byte {error.start}{place}") from error
    if "\0" in text:
        raise NotText(f"{path} is not a text file in UTF-8: a zero byte at character {text.index(chr(0))}{place}")
    return text
