"""Score files of a run: each says what it belongs to, so that one that is damaged or swapped is noticed."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from memloc_lens.runs.disk import disk_errors, write_whole
from memloc_lens.runs.folder import HISTORY, LISTS, PLACES, TABLES

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class ScoreFile:
    """Scores on their way to a file: where it is, its tensors, and what they are computed from."""

    path: Path
    tensors: Tensors
    of: str


_kept_back: list[list[ScoreFile]] = []
"""What the open contexts of `score_files_kept_back` have collected, outermost first."""


@contextmanager
def score_files_kept_back() -> Iterator[list[ScoreFile]]:
    """Collect score files in a list while the context is open, instead of writing them: a worker elsewhere hands them
    to the process that has the run folder.

    Example:
        >>> with score_files_kept_back() as files:
        ...     kept = kept_scores(Path("scores/a.safetensors"), lambda: {"scores": torch.ones(2)})
        >>> files[0].path.exists()
        False
    """
    _kept_back.append([])
    try:
        yield _kept_back[-1]
    finally:
        _kept_back.pop()


def score_file(folder: Path, method: str, *parts: float | int) -> Path:
    """Return where a run keeps the scores of a method: of the batch that starts at a target, or of an injection."""
    name = "-".join([method, *(f"{part:05d}" if isinstance(part, int) else f"{part:g}" for part in parts)])
    return folder / "scores" / f"{name}.safetensors"


def origin(config: Mapping[str, Any], method: str, start: int, stop: int) -> str:
    """Return a hash of what scores are computed from: the weights, the settings, the method, and the sequences.

    Args:
        config: of the run.
        method: name of the method.
        start: index of the first sequence.
        stop: index after the last sequence.
    """
    free = {*PLACES, *HISTORY, *LISTS, *TABLES}
    shared = {name: value for name, value in sorted(config.items()) if name not in free}
    own = (config["methods"].get(method), config["sequences"][start:stop])
    return hashlib.sha256(json.dumps([shared, own]).encode()).hexdigest()


def kept_scores(file: Path, compute: Callable[[], Tensors], of: str = "") -> Tensors:
    """Return the tensors of a score file, computed and written first if it is missing, damaged, or of something else.

    Args:
        file: from `score_file`.
        compute: makes the tensors.
        of: what they are computed from, as `origin` says.
    """
    found = _found(file, of)
    tensors = found or {key: tensor.cpu().contiguous() for key, tensor in compute().items()}
    if _kept_back:  # also what was found: it may be on a disk of this machine's own
        _kept_back[-1].append(ScoreFile(file, tensors, of))
    elif not found:
        belongs = {"file": file.name, "of": of, "sha256": _sha256(tensors)}
        with disk_errors(file.parent):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, lambda part: save_file(tensors, part, belongs))
    return tensors


def is_kept(file: Path, of: str) -> bool:
    """Tell whether a score file is there, whole, and of what it should be computed from.

    Example:
        >>> is_kept(Path("scores/a.safetensors"), of="these weights")
        False
    """
    return _found(file, of) is not None


def _found(file: Path, of: str) -> Tensors | None:
    try:
        return read_scores(file, of)
    except (OSError, ValueError):
        return None


def read_scores(file: Path, of: str | None = None) -> Tensors:
    """Read the tensors of a score file.

    Args:
        file: from `score_file`.
        of: what they must have been computed from. Default: anything.

    Raises:
        ValueError: if the file is damaged, or holds the scores of something else.
        OSError: if it cannot be read.
    """
    if file.exists() and not file.is_file():
        raise ValueError("not a regular file")
    try:
        with safe_open(file, "pt") as content:
            belongs = content.metadata() or {}
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 (it is no dict)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    if belongs.get("sha256") != _sha256(tensors):
        raise ValueError("its content is not what was written")
    if belongs["file"] != file.name or of not in (None, belongs["of"]):
        raise ValueError(f"they belong to {belongs['file']} of another run or sequence")
    return tensors


def _sha256(tensors: Tensors) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, tensor.dtype, list(tensor.shape))).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
