"""An audit to read: its file, its parts as tables and sentences, and the page of them in Markdown."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from memloc_lens.erase.relearning import Relearned, Resurfacing
from memloc_lens.erase.schema import Audit, Change
from memloc_lens.runs.records import read_table
from memloc_lens.runs.schema import Cells, Interval
from memloc_lens.runs.visible import markdown

AUDIT = "audit.json"

COLUMNS = {
    "recited": ("recited (%)", ".0f"),
    "prefix": ("tokens right", ".1f"),
    "accuracy": ("accuracy", ".1f"),
    "strength": ("strength", ".2f"),
    "probability": ("sampled", ".2g"),
}
"""Measures of recitations that are shown: their headings and formats."""

INTRODUCTION = (
    "An audit tells whether texts that were erased from a model come back when one tries, and what else was lost. It "
    "can show that a text is still there. It cannot show that a text is gone: only that what was tried did not bring "
    "it back. Values are means with 95% BCa bootstrap intervals over texts; of few texts they are rough, and of a "
    "single one there are none. All values, those of each text among them, are in `audit.json`."
)


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Args:
        text: of any origin; it is escaped where it is shown.
        interval: bounds of a figure.
    """

    text: str
    interval: str = ""


@dataclass(frozen=True)
class Table:
    """A table of an audit.

    Args:
        headings: one a column.
        rows: of as many cells, the first of which names the row.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]


Block = str | list[str] | dict[str, str] | Table
"""A sentence, a list of points, facts by name, or a table; sentences and points are ours, facts of any origin."""


@dataclass(frozen=True)
class Part:
    """A part of an audit.

    Args:
        title: above it.
        blocks: below it.
    """

    title: str
    blocks: Sequence[Block]


def table(headings: Sequence[str], rows: Iterable[Sequence[str | Cell]]) -> Table:
    """Return a table of texts and cells.

    Example:
        >>> table(("model", "loss"), [("erased", Cell("1.5", "1.0, 2.0"))]).rows[0][0]
        Cell(text='erased', interval='')
    """
    return Table(headings, [[each if isinstance(each, Cell) else Cell(each) for each in row] for row in rows])


def read_audit(folder: Path) -> Audit:
    """Read the audit of an erased checkpoint.

    Args:
        folder: of the checkpoint, with `audit.json`.

    Raises:
        ValueError: if the folder holds no audit, or one that is damaged or of another version.
    """
    file = folder / AUDIT
    try:
        found = read_table(file)
    except OSError as error:
        raise ValueError(
            f"{folder} holds no audit of an erasure ({error.filename}: {error.strerror}); make one: memloc audit "
            f"ORIGINAL {folder}"
        ) from error
    missing = Audit.__required_keys__ - found.keys()
    if missing:
        raise ValueError(f"{file} has no {', '.join(sorted(missing))}; make it again: memloc audit ORIGINAL {folder}")
    return cast(Audit, found)


def page(found: Audit) -> str:
    """Return an audit as Markdown: every figure with how it was measured, and what was not tried.

    Args:
        found: the result of `audit`.
    """
    first, *others = parts(found)
    lines = [f"# {first.title}", *map(_markdown, first.blocks)]
    for part in others:
        lines += [f"## {part.title}", *map(_markdown, part.blocks)]
    return "\n\n".join(lines) + "\n"


def _markdown(block: Block) -> str:
    if isinstance(block, str):
        return block
    if isinstance(block, list):
        return "\n".join(f"- {point}" for point in block)
    if isinstance(block, dict):
        return "\n".join(f"- {markdown(name)}: {markdown(value)}" for name, value in block.items())
    rows = [block.headings, ["---"] * len(block.headings), *(map(_markdown_cell, row) for row in block.rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _markdown_cell(cell: Cell) -> str:
    text = markdown(cell.text).replace("|", "\\|")
    return f"{text} [{cell.interval}]" if cell.interval else text


def parts(found: Audit) -> list[Part]:
    """Return what an audit says, part by part: every figure with how it was measured, and last what was not tried.

    Args:
        found: the result of `audit`, or as it was read.
    """
    return [part(found) for part in (_head, _extraction, _others, _relearning, _membership, _damage, _not_tried)]


def _head(found: Audit) -> Part:
    models = [(which, model["name"], model["fingerprint"]) for which, model in found["models"].items()]
    counts = [(group, str(len(ids))) for group, ids in found["texts"].items()]
    blocks: list[Block] = [
        INTRODUCTION,
        table(("model", "name", "fingerprint of the weights"), models),
        table(("texts", "number"), counts),
        {name: str(value) for name, value in found["provenance"].items()},
    ]
    return Part("Audit of an erasure", blocks)


def _extraction(found: Audit) -> Part:
    samples = found["settings"]["samples"]
    worst = [_strongest(target, states) for target, states in found["targets"].items()]
    blocks: list[Block] = [
        _before_after("prompt", found["extraction"]),
        "After the erasure, the prompt that gets most of each target:",
        table(("target", "prompt", *(heading for key, (heading, _) in COLUMNS.items() if key != "recited")), worst),
        f"Measured: {found['measured']['extraction']} Here {samples} samples.",
    ]
    return Part("Extraction of the targets", blocks)


def _others(found: Audit) -> Part:
    blocks: list[Block] = [_before_after("group", found["others"]), f"Measured: {found['measured']['others']}"]
    return Part("Extraction of other sequences", blocks)


def _strongest(target: str, states: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Sequence[str]:
    name = max(states, key=lambda name: (states[name]["after"]["prefix"], states[name]["after"]["strength"]))
    left = states[name]["after"]
    return target, name, *(f"{left[key]:{form}}" for key, (_, form) in COLUMNS.items() if key in left)


def _before_after(first: str, rows: Mapping[str, Mapping[str, Cells]]) -> Table:
    columns = [(key, heading, form, when) for key, (heading, form) in COLUMNS.items() for when in ("before", "after")]
    lines: list[Sequence[str | Cell]] = []
    for name, states in rows.items():
        values = [_interval(states[when][key], form) for key, _, form, when in columns]
        lines.append((name, str(states["after"]["prefix"]["n"]), *values))
    return table((first, "texts", *(f"{heading} {when}" for _, heading, _, when in columns)), lines)


def _relearning(found: Audit) -> Part:
    rows = []
    for lesson, result in found["relearning"].items():
        for kind, relearned in result["relearned"].items():
            ratio = _ratio(result["resurfacing"][kind]) if kind in result["resurfacing"] else ""
            rows.append((lesson, kind, *_steps(list(relearned.values())), ratio))
    settings = ", ".join(f"{name} {value:g}" for name, value in found["settings"]["relearning"].items())
    headings = ("lesson", "texts", "learned", "steps", "fewest to most", "most right", "ratio to erased")
    blocks: list[Block] = [table(headings, rows), f"Measured: {found['measured']['relearning']} Here {settings}."]
    return Part("Relearning", blocks)


def _steps(relearned: Sequence[Relearned]) -> Sequence[str]:
    """Return how many texts were learned, their median steps, the range, and the most tokens right at any step."""
    most = max(each["max_steps"] for each in relearned)
    steps = sorted(math.inf if each["steps"] is None else each["steps"] for each in relearned)
    told = (statistics.median_low(steps), steps[0], steps[-1])
    median, fewest, largest = (f"over {most}" if each == math.inf else str(each) for each in told)
    right = statistics.fmean(max(point["prefix"] for point in each["curve"]) for each in relearned)
    return f"{sum(map(math.isfinite, steps))} of {len(steps)}", median, f"{fewest} to {largest}", f"{right:.1f}"


def _ratio(value: Resurfacing) -> str:
    if value["ratio"] is None:
        return "unknown"
    return ("" if value["bound"] == "exact" else f"{value['bound']} ") + f"{value['ratio']:.2g}"


def _membership(found: Audit) -> Part:
    before, after = found["membership"]["before"], found["membership"]["after"]
    rows = [(name.replace("_", "-"), _interval(before[name], ".3f"), _interval(after[name], ".3f")) for name in before]
    share = found["settings"]["min_k_share"]
    blocks: list[Block] = [
        table(("signal", "AUROC before", "AUROC after"), rows),
        f"Measured: {found['measured']['membership']} Here k is {100 * share:g}%.",
    ]
    return Part("Membership", blocks)


def _damage(found: Audit) -> Part:
    accuracy, perplexity = found["accuracy"], found["perplexity"]
    tables = [_changes("group", "texts", "accuracy", accuracy["groups"], ".1f")]
    if accuracy["categories"]:
        tables.append(_changes("category of the others", "texts", "accuracy", accuracy["categories"], ".1f"))
    if perplexity:
        tables.append(_changes("text", "rows", "perplexity", {"plain": perplexity}, ".2f", change="change (%)"))
    return Part("Damage", [*tables, f"Measured: {found['measured']['damage']}"])


def _changes(first: str, of: str, measure: str, rows: Mapping[str, Change], form: str, change: str = "change") -> Table:
    lines: list[Sequence[str | Cell]] = [
        (name, str(each["before"]["n"]), _interval(each["before"], form), _interval(each["change"], f"+{form}"))
        for name, each in rows.items()
    ]
    return table((first, of, f"{measure} before", change), lines)


def _not_tried(found: Audit) -> Part:
    return Part("What was not tried", [list(found["not_tried"])])


def _interval(value: Interval, form: str) -> Cell:
    mean, low, high = (f"{number:{form}}" for number in (value["mean"], value["low"], value["high"]))
    return Cell(mean) if value["n"] == 1 or low == high else Cell(mean, f"{low}, {high}")
