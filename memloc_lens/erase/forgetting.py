"""Ways of forgetting side by side: the figures of each, and their table."""

import math
from collections.abc import Sequence
from typing import Any, TypedDict

from rich.console import Console
from rich.table import Table

from memloc_lens.erase.damage import Utility, neg_loss, ppl_rise
from memloc_lens.erase.relearning import Relearned, Resurfacing, median_steps
from memloc_lens.runs.schema import Cells
from memloc_lens.runs.visible import plain
from memloc_lens.tables.terminal import wide_console

COLUMNS = (
    *("method", "dropped or trained", "extracted", "accuracy", "strength", "PPL, %", "others", "AUROC"),
    *("steps, erased", "steps, new", "ratio", "seconds"),
)


class Row(TypedDict):
    """What a way does.

    Args:
        what: components that were dropped, or steps of training.
        seconds: to forget; None if that is not known.
        extracted: number of sequences that any prompt variant extracts.
        left: what is recited of the sequences after their own prompts.
        perplexity: of other text; None without any.
        accuracy: of other memorized sequences, in points; None without any.
        membership: AUROC of signals that tell the sequences from texts that were never seen.
        relearned: how sequences (`erased`) and texts that were never seen (`new`) are learned, by id.
        resurfacing: how many times as many steps a new text takes.
    """

    what: str
    seconds: float | None
    extracted: int
    left: Cells
    perplexity: float | None
    accuracy: float | None
    membership: Cells
    relearned: dict[str, dict[str, Relearned]]
    resurfacing: Resurfacing


class Forgetting(TypedDict):
    """Ways of forgetting side by side; it can be written as JSON.

    Args:
        benchmark: "forgetting".
        provenance: by which code and command, and where.
        sequences: ids of the sequences that are forgotten.
        before: of the model as it came, with the number of sequences that are extracted.
        relearning: its settings.
        ways: a row for each.
    """

    benchmark: str
    provenance: dict[str, str]
    sequences: list[str]
    before: dict[str, Any]
    relearning: dict[str, Any]
    ways: dict[str, Row]


def forgetting_table(found: Forgetting) -> str:
    """Return all ways as a table in Markdown.

    Args:
        found: the result of `run`.
    """
    count, most = len(found["sequences"]), found["relearning"]["max_steps"]
    learned = max(len(row["relearned"]["new"]) for row in found["ways"].values())
    lines = [list(COLUMNS), ["---", *["---:"] * (len(COLUMNS) - 1)]]
    lines += [[way, *_cells(found, row)] for way, row in found["ways"].items()]
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines]) + (
        f"\n\n{count} sequences. Extracted: by any of the prompt variants. Accuracy and strength: of the sequences, "
        "after their own prompts. PPL: of other text. Others: accuracy of other memorized sequences, in points. AUROC: "
        f"of the loss, against texts that were never seen. Steps: of fine-tuning, until one of {learned} sequences, or "
        f"of as many new texts, can be extracted; medians, of at most {most}. Ratio: steps of the new by those of the "
        "erased."
    )


def print_forgetting(found: Forgetting, console: Console | None = None) -> None:
    """Print all ways on the terminal, or as wide as needed if there is none.

    Args:
        found: the result of a run.
        console: where to print.
    """
    table = Table(title=f"{len(found['sequences'])} sequences", title_justify="left")
    for number, heading in enumerate(COLUMNS):
        table.add_column(heading, justify="right" if number else "left")
    for way, row in found["ways"].items():
        table.add_row(plain(way), *map(plain, _cells(found, row)))
    wide_console(console).print(table)


def _cells(found: Forgetting, row: Row) -> list[str]:
    before = Utility(found["before"]["perplexity"], found["before"]["accuracy"])
    after = Utility(row["perplexity"], row["accuracy"])
    rise, fall = ppl_rise(before, after), neg_loss(before, after)
    erased, new = (_steps(list(row["relearned"][kind].values())) for kind in ("erased", "new"))
    ratio, bound = row["resurfacing"]["ratio"], row["resurfacing"]["bound"]
    return [
        row["what"],
        f"{row['extracted']}",
        f"{row['left']['accuracy']['mean']:.1f}",
        f"{row['left']['strength']['mean']:.2f}",
        "" if rise is None else f"{rise:+.2f}",
        "" if fall is None else f"{-fall:+.2f}",
        f"{row['membership']['loss']['mean']:.3f}",
        erased,
        new,
        "unknown" if ratio is None else ("" if bound == "exact" else f"{bound} ") + f"{ratio:.2g}",
        "" if row["seconds"] is None else f"{row['seconds']:.0f}",
    ]


def _steps(relearned: Sequence[Relearned]) -> str:
    median = median_steps(relearned)
    return f"over {relearned[0]['max_steps']}" if median == math.inf else f"{median:g}"
