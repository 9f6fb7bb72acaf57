"""Memory of tensors that are freed, kept for the next ones.

Without it, a tensor of some megabytes is given back to the system as soon as it is freed, and asked for again, page by
page, for the next: a tenth of the time of a masked pass.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's `mallopt`: how much free memory is kept, and from which size on a block is not."""
KEPT = 2**30
LARGEST_BY_ITSELF = 2**25
"""The bytes to which glibc raises the second by itself, and twice of which it keeps."""

_open: list[None] = []
"""One entry for each context that is open, in any thread: the heap belongs to the process."""


@contextmanager
def kept_memory() -> Iterator[None]:
    """Keep up to 1 GiB of what is freed for the process while the context is open; only where glibc allocates."""
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(MMAP_THRESHOLD, KEPT)
    libc.mallopt(TRIM_THRESHOLD, KEPT)
    _open.append(None)
    try:
        yield
    finally:
        _open.pop()
        if not _open:
            libc.mallopt(MMAP_THRESHOLD, LARGEST_BY_ITSELF)
            libc.mallopt(TRIM_THRESHOLD, 2 * LARGEST_BY_ITSELF)
            libc.malloc_trim(0)


@cache
def _glibc() -> Any:
    try:
        libc = ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows
        return None
    return libc if hasattr(libc, "gnu_get_libc_version") else None
