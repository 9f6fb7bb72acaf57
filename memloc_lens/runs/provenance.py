"""How records came about: by which code and command, and on what machine."""

import hashlib
import os
import platform
import re
import shlex
import subprocess
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

PACKAGE = Path(__file__).parents[1]


@cache
def provenance() -> dict[str, str]:
    """Return the version of the package, a hash of its source, the commit if there is one, the command, the machine.

    Example:
        >>> sorted(provenance())[-3:]
        ['machine', 'memloc_lens', 'source_sha256']
    """
    return {
        "memloc_lens": version("memloc-lens"),
        "source_sha256": _source(),
        **({"commit": commit} if (commit := _commit()) else {}),
        "command": _command(),
        "machine": _machine(),
    }


def _source() -> str:
    digest = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*.py")):
        digest.update(str(file.relative_to(PACKAGE)).encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _commit() -> str:
    """Return the commit of the checkout that the package is run from, with a plus if it was changed; else nothing."""
    try:
        if not _git("ls-files", "__init__.py"):  # installed inside a checkout of something else
            return ""
        return _git("rev-parse", "--short", "HEAD") + "+" * bool(_git("status", "--porcelain", "--", "."))
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(PACKAGE), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def _command() -> str:
    """Return the command line of the process, if it is one of ours."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    program = f"python -m {spec.name.removesuffix('.__main__')}" if spec else Path(sys.argv[0]).name
    if not re.match(r"(python -m )?memloc(_lens)?\b", program):
        return "from Python"
    return f"{program} {shlex.join(sys.argv[1:])}".strip()


def _machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{os.cpu_count()} cores ({platform.machine()}), {device}"
