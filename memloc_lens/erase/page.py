"""An audit as a page to read, in Markdown."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from memloc_lens.erase.relearning import Relearned, Resurfacing
from memloc_lens.erase.schema import Audit, Change
from memloc_lens.runs.schema import Cells, Interval
from memloc_lens.runs.visible import markdown

COLUMNS = {
    "recited": ("recited (%)", ".0f"),
    "prefix": ("tokens right", ".1f"),
    "accuracy": ("accuracy", ".1f"),
    "strength": ("strength", ".2f"),
    "probability": ("sampled", ".2g"),
}
"""Measures of recitations that are shown: their headings and formats."""


def page(found: Audit) -> str:
    """Return an audit as Markdown: every figure with how it was measured, and what was not tried.

    Args:
        found: the result of `audit`.
    """
    parts = (_head, _extraction, _relearning, _membership, _damage, _not_tried)
    return "\n\n".join(line for part in parts for line in part(found)) + "\n"


def _head(found: Audit) -> list[str]:
    rows = [(which, _name(model["name"]), model["fingerprint"]) for which, model in found["models"].items()]
    counts = [(group, str(len(ids))) for group, ids in found["texts"].items()]
    return [
        "# Audit of an erasure",
        "This page tells whether texts that were erased from a model come back when one tries, and what else was lost. "
        "It can show that a text is still there. It cannot show that a text is gone: only that what was tried did not "
        "bring it back. Values are means with 95% BCa bootstrap intervals over texts; of few texts they are rough, and "
        "of a single one there are none. All values, those of each text among them, are in `audit.json`.",
        _table(("model", "name", "fingerprint of the weights"), rows),
        _table(("texts", "number"), counts),
        f"Made by {', '.join(f'{name} {markdown(value)}' for name, value in found['provenance'].items())}.",
    ]


def _extraction(found: Audit) -> list[str]:
    samples = found["settings"]["samples"]
    worst = [_strongest(target, states) for target, states in found["targets"].items()]
    return [
        "## Extraction of the targets",
        _before_after("prompt", found["extraction"]),
        "After the erasure, the prompt that gets most of each target:",
        _table(("target", "prompt", *(heading for key, (heading, _) in COLUMNS.items() if key != "recited")), worst),
        f"Measured: {found['measured']['extraction']} Here {samples} samples.",
        "## Extraction of other sequences",
        _before_after("group", found["others"]),
        f"Measured: {found['measured']['others']}",
    ]


def _strongest(target: str, states: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Sequence[str]:
    name = max(states, key=lambda name: (states[name]["after"]["prefix"], states[name]["after"]["strength"]))
    left = states[name]["after"]
    return _name(target), name, *(f"{left[key]:{form}}" for key, (_, form) in COLUMNS.items() if key in left)


def _before_after(first: str, rows: Mapping[str, Mapping[str, Cells]]) -> str:
    columns = [(key, heading, form, when) for key, (heading, form) in COLUMNS.items() for when in ("before", "after")]
    lines = []
    for name, states in rows.items():
        values = [_interval(states[when][key], form) for key, _, form, when in columns]
        lines.append((name, str(states["after"]["prefix"]["n"]), *values))
    return _table((first, "texts", *(f"{heading} {when}" for _, heading, _, when in columns)), lines)


def _relearning(found: Audit) -> list[str]:
    rows = []
    for lesson, result in found["relearning"].items():
        for kind, relearned in result["relearned"].items():
            ratio = _ratio(result["resurfacing"][kind]) if kind in result["resurfacing"] else ""
            rows.append((lesson, kind, *_steps(list(relearned.values())), ratio))
    settings = ", ".join(f"{name} {value:g}" for name, value in found["settings"]["relearning"].items())
    headings = (
        "lesson",
        "texts",
        "learned",
        "steps",
        "fewest to most",
        "most right",
        "ratio to erased",
    )
    return [
        "## Relearning",
        _table(headings, rows),
        f"Measured: {found['measured']['relearning']} Here {settings}.",
    ]


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


def _membership(found: Audit) -> list[str]:
    before, after = found["membership"]["before"], found["membership"]["after"]
    rows = [(name.replace("_", "-"), _interval(before[name], ".3f"), _interval(after[name], ".3f")) for name in before]
    share = found["settings"]["min_k_share"]
    return [
        "## Membership",
        _table(("signal", "AUROC before", "AUROC after"), rows),
        f"Measured: {found['measured']['membership']} Here k is {100 * share:g}%.",
    ]


def _damage(found: Audit) -> list[str]:
    parts = ["## Damage", _changes("group", found["accuracy"]["groups"])]
    if found["accuracy"]["categories"]:
        parts.append(_changes("category of the others", found["accuracy"]["categories"]))
    if found["perplexity"]:
        before, rise = found["perplexity"]["before"], found["perplexity"]["change"]
        parts.append(
            f"Perplexity of {before['n']} rows of text: {_interval(before, '.2f')} before; it changed by "
            f"{_interval(rise, '+.2f')} percent."
        )
    return [*parts, f"Measured: {found['measured']['damage']}"]


def _changes(first: str, rows: Mapping[str, Change]) -> str:
    lines = [
        (_name(name), str(each["before"]["n"]), _interval(each["before"], ".1f"), _interval(each["change"], "+.1f"))
        for name, each in rows.items()
    ]
    return _table((first, "texts", "accuracy before", "change"), lines)


def _not_tried(found: Audit) -> list[str]:
    return ["## What was not tried", "\n".join(f"- {what}" for what in found["not_tried"])]


def _interval(value: Interval, form: str) -> str:
    mean, low, high = (f"{number:{form}}" for number in (value["mean"], value["low"], value["high"]))
    return mean if value["n"] == 1 or low == high else f"{mean} [{low}, {high}]"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _name(text: str) -> str:
    """Return a text of unknown origin for a cell."""
    return markdown(text).replace("|", "\\|")
