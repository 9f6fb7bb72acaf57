"""What the page tells about an erased checkpoint: what was erased and at what cost, and what its audit found."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memloc_lens.erase.checkpoint import ERASURE
from memloc_lens.erase.page import AUDIT, Part, Table, parts, read_audit, table
from memloc_lens.report.page import ErasureSection
from memloc_lens.report.pictures import relearning_pictures
from memloc_lens.runs.records import read_table

UTILITY = {
    "perplexity": ("perplexity of other text", "max_ppl_rise", "+{:g}%"),
    "accuracy": ("accuracy of other sequences", "max_neg_loss", "-{:g} points"),
}
"""What an erasure may cost: what it is called, and how much of it the budget allows."""


def is_erased(folder: Path) -> bool:
    """Return whether a folder is an erased checkpoint, audited or not.

    Example:
        >>> is_erased(Path("runs/erased")), is_erased(Path("runs/del"))
        (True, False)
    """
    return any((folder / name).is_file() for name in (ERASURE, AUDIT))


def erasure_section(folder: Path) -> ErasureSection:
    """Return what the page tells about an erased checkpoint.

    Args:
        folder: with `audit.json`, and `erasure.json` if the checkpoint was made by `memloc erase`.

    Raises:
        ValueError: if the folder holds no audit, or a file is damaged.

    Example:
        >>> [part.title for part in erasure_section(Path("runs/erased")).parts[:2]]
        ['What was erased', 'Audit of an erasure']
    """
    found = read_audit(folder)
    with _readable(folder / AUDIT, "audit the checkpoint again"):
        told, drawn = parts(found), relearning_pictures(folder, found["relearning"])
    return ErasureSection(folder.name, [_erased(folder), *told], drawn)


@contextmanager
def _readable(file: Path, fix: str) -> Iterator[None]:
    """Turn whatever a file with other content than expected leads to into one error."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is damaged: {error!r}; {fix}") from error


def _erased(folder: Path) -> Part:
    if not (folder / ERASURE).is_file():
        return Part("What was erased", [f"`{ERASURE}` is not in the folder, so that only the audit is told."])
    told = read_table(folder / ERASURE)
    with _readable(folder / ERASURE, "remove it, or write the folder again"):
        return Part("What was erased", [dict(_facts(told)), *_measured(told)])


def _facts(told: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    share = f"{told['count']} of {told['of']} ({100 * told['count'] / told['of']:.2g}%)"
    yield f"{told['component']}s set to zero", share
    if "sequences" in told:
        yield "sequences", str(len(told["sequences"]))
        yield "model", str(told["model"]["name"])
        yield "method", _method(told["method"])
        yield "when", str(told["when"])
        yield from ((name, str(value)) for name, value in told["by"].items())


def _method(settings: Mapping[str, Any]) -> str:
    """Return the name of a localizer's class, with that of the one it wraps."""
    name = str(settings["callable"]).rpartition(":")[2]
    return f"{name} of {_method(settings['localizer'])}" if "localizer" in settings else name


def _measured(told: Mapping[str, Any]) -> Iterator[Table]:
    """Yield what was lost, and the longest part of each suffix that is written in one piece, as measured then."""
    if "targets" not in told:
        return
    costs = [
        (name, f"{told['before'][key]:.2f}", f"{told['after'][key]:.2f}", allowed.format(told["budget"][limit]))
        for key, (name, limit, allowed) in UTILITY.items()
        if told["before"][key] is not None
    ]
    if costs:
        yield table(("cost", "before", "after", "allowed"), costs)
    headings = ("sequence", "tokens in one piece before", "after", "asked by", "extracted from")
    yield table(headings, map(_target, told["targets"]))


def _target(target: Mapping[str, Any]) -> tuple[str, ...]:
    after = target["after"]
    worst = max(after, key=lambda name: after[name])
    return target["id"], str(max(target["before"].values())), str(after[worst]), worst, str(target["limit"])
