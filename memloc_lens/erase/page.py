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
    "strength": ("strength", ".2f"),
    "probability": ("sampled", ".3f"),
}
"""Measures of recitations that are shown: their headings and formats."""
BOUNDS = {"exact": "", "at least": "> ", "at most": "< "}


def page(found: Audit) -> str:
    """Return an audit as Markdown: every figure with how it was measured, and what was not tried.

    Args:
        found: the result of `audit`.
    """
    return (
        "\n\n".join([*_head(found), *_extraction(found), *_relearning(found), *_rest(found), *_not_tried(found)]) + "\n"
    )


def _head(found: Audit) -> list[str]:
    rows = [(which, model["name"], model["fingerprint"]) for which, model in found["models"].items()]
    counts = [(group, str(len(ids))) for group, ids in found["texts"].items()]
    return [
        "# Audit of an erasure",
        "This page tells whether texts that were erased from a model come back when one tries, and what else was lost. "
        "It can show that a text is still there. It cannot show that a text is gone: only that what was tried did not "
        "bring it back. Values are means with 95% BCa bootstrap intervals over texts; of a single text there is none. "
        "All values, those of each text among them, are in `audit.json`.",
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
        _table(("target", "prompt", "tokens right", "strength", "sampled"), worst),
        f"Measured: {found['measured']['extraction']} Here {samples} samples.",
        "## Extraction of other sequences",
        _before_after("group", found["others"]),
        f"Measured: {found['measured']['others']}",
    ]


def _strongest(target: str, states: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Sequence[str]:
    name, left = max(
        ((name, state["after"]) for name, state in states.items()),
        key=lambda pair: (pair[1]["prefix"], pair[1]["strength"]),
    )
    return target, name, f"{left['prefix']:.0f}", f"{left['strength']:.2f}", f"{left['probability']:.3g}"


def _before_after(first: str, rows: Mapping[str, Mapping[str, Cells]]) -> str:
    headings = [
        first,
        "texts",
        *(f"{heading} {when}" for heading, _ in COLUMNS.values() for when in ("before", "after")),
    ]
    lines = []
    for name, states in rows.items():
        values = [
            _interval(states[when][key], form) for key, (_, form) in COLUMNS.items() for when in ("before", "after")
        ]
        lines.append((name, str(states["after"]["prefix"]["n"]), *values))
    return _table(headings, lines)


def _relearning(found: Audit) -> list[str]:
    rows = []
    for lesson, result in found["relearning"].items():
        for kind, relearned in result["relearned"].items():
            ratio = _ratio(result["resurfacing"][kind]) if kind in result["resurfacing"] else ""
            rows.append((lesson, kind, *_steps(list(relearned.values())), ratio))
    settings = ", ".join(f"{name} {value:g}" for name, value in found["settings"]["relearning"].items())
    return [
        "## Relearning",
        _table(("lesson", "texts", "learned", "steps", "fewest to most", "times the steps of erased texts"), rows),
        f"Measured: {found['measured']['relearning']} Here {settings}.",
    ]


def _steps(relearned: Sequence[Relearned]) -> tuple[str, str, str]:
    """Return how many texts were learned, their median steps, and the range."""
    most = max(each["max_steps"] for each in relearned)
    steps = sorted(math.inf if each["steps"] is None else each["steps"] for each in relearned)
    shown = [
        f"> {most}" if each == math.inf else str(each) for each in (steps[0], steps[-1], statistics.median_low(steps))
    ]
    return f"{sum(map(math.isfinite, steps))} of {len(steps)}", shown[2], f"{shown[0]} to {shown[1]}"


def _ratio(value: Resurfacing) -> str:
    return "unknown" if value["ratio"] is None else f"{BOUNDS[value['bound']]}{value['ratio']:.2g}"


def _rest(found: Audit) -> list[str]:
    signals = {
        name: (found["membership"]["before"][name], found["membership"]["after"][name]) for name in ("loss", "min_k")
    }
    share = found["settings"]["min_k_share"]
    parts = [
        "## Membership",
        _table(
            ("signal", "AUROC before", "AUROC after"),
            [(name, *(_interval(each, ".3f") for each in pair)) for name, pair in signals.items()],
        ),
        f"Measured: {found['measured']['membership']} Here k is {100 * share:g}%.",
        "## Damage",
        _changes("group", found["accuracy"]["groups"]),
    ]
    if found["accuracy"]["categories"]:
        parts.append(_changes("category of the others", found["accuracy"]["categories"]))
    if found["perplexity"]:
        before, rise = found["perplexity"]["before"], found["perplexity"]["change"]
        parts.append(
            f"Perplexity before: {_interval(before, '.2f')}; rise: {_interval(rise, '+.2f')} %, over {before['n']} rows of text."
        )
    return [*parts, f"Measured: {found['measured']['damage']}"]


def _changes(first: str, rows: Mapping[str, Change]) -> str:
    lines = [
        (name, str(each["before"]["n"]), _interval(each["before"], ".1f"), _interval(each["change"], "+.1f"))
        for name, each in rows.items()
    ]
    return _table((first, "texts", "accuracy before", "change"), lines)


def _not_tried(found: Audit) -> list[str]:
    return ["## What was not tried", "\n".join(f"- {what}" for what in found["not_tried"])]


def _interval(value: Interval, form: str) -> str:
    mean, low, high = (f"{number:{form}}" for number in (value["mean"], value["low"], value["high"]))
    return mean if value["n"] == 1 or low == high else f"{mean} [{low}, {high}]"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(text: str) -> str:
    return markdown(text).replace("|", "\\|")
