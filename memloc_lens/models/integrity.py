"""Compare the files of the embedded model with the hashes that they were released with.

The list has the form of `sha256sum`, which checks it too: ``cd memloc_lens/models && sha256sum -c embedded.sha256``.
"""

import hashlib
import re
from pathlib import Path

LINE = re.compile(r"^([0-9a-f]{64})  (\S+)$", re.MULTILINE)


def check_files(hashes: Path) -> None:
    """Refuse files that are not the ones of a list of hashes.

    Args:
        hashes: a file of lines of a SHA-256, two blanks, and the path of a file relative to the folder of the list.

    Raises:
        ValueError: naming the first file that is missing or has another hash, or the list if it lists nothing.

    Example:
        >>> from memloc_lens.models import EMBEDDED
        >>> check_files(EMBEDDED.with_suffix(".sha256"))
    """
    listed = LINE.findall(hashes.read_text("utf-8")) if hashes.is_file() else []
    if not listed:
        raise _damaged(hashes.name, "it is missing or lists nothing")
    for expected, name in listed:
        file = hashes.parent / name
        if not file.is_file():
            raise _damaged(name, "it is missing")
        if (found := _sha256(file)) != expected:
            raise _damaged(name, f"its SHA-256 is {found[:12]}…, not {expected[:12]}…")


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _damaged(name: str, what: str) -> ValueError:
    return ValueError(
        f"{name} of memloc-lens is damaged: {what}; install the package again (pip install --force-reinstall "
        "--no-deps), or in a clone of its repository run git checkout -- memloc_lens/models"
    )
