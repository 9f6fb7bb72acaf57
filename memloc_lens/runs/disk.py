"""Write files whole or not at all; what a disk refuses is one error."""

import errno
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file so that it is there whole or not at all."""
    part = path.with_name(path.name + ".part")
    write(part)
    part.replace(path)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn errors of the disk into a `ValueError` that says what to do."""
    try:
        yield
    except OSError as error:
        where = error.filename2 or error.filename
        where = "" if where is None or str(where) == str(path) else where
        reason = ": ".join(map(str, filter(None, (where, error.strerror or error))))
        raise _told(path, error.errno, reason) from error
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        reason = f"{error}; what was recorded is kept: repair it and run the same command again"
        raise _told(path, int(number[1]) if number else None, reason) from error


def _told(path: Path, number: int | None, reason: str) -> ValueError:
    if number in (errno.ENOSPC, errno.EDQUOT):
        return ValueError(
            f"the disk of {path} is full; what was recorded is kept: free some space and run the same command again"
        )
    return ValueError(f"the run folder {path} cannot be written: {reason}")
