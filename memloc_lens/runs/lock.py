"""One process at a time in a run folder."""

import json
import os
import socket
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

PATIENCE = 0.25  # seconds: the first process may be about to end, or to write who it is


def lock(folder: Path) -> BaseFileLock:
    """Lock a run folder, until the lock is released or the process ends, in whatever way.

    The lock is the operating system's, on `run.lock`; `lock.json` tells who holds it. A thread can lock a folder more
    than once: only others are kept out.

    Args:
        folder: of the run; it exists.

    Raises:
        ValueError: naming the host and process that use the folder.
    """
    held = FileLock(folder / "run.lock", is_singleton=True)
    try:
        held.acquire(timeout=PATIENCE)
    except Timeout as error:
        raise ValueError(
            f"{folder} is in use by {_holder(folder)}; wait for it to end, or choose another folder with --out"
        ) from error
    own = {"host": socket.gethostname(), "process": os.getpid()}
    (folder / "lock.json").write_text(json.dumps(own) + "\n")
    return held


def _holder(folder: Path) -> str:
    try:
        holder: Any = json.loads((folder / "lock.json").read_text())
        return f"process {holder['process']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
