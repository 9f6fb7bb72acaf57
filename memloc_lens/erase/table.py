"""The table of an erasure on the terminal."""

from rich.console import Console
from rich.table import Table

from memloc_lens.erase.choosing import Erasure, Step, Target
from memloc_lens.erase.criteria import UNITS
from memloc_lens.erase.damage import neg_loss, ppl_rise
from memloc_lens.runs.visible import plain
from memloc_lens.tables.terminal import wide_console


def print_erasure(erasure: Erasure, console: Console | None = None) -> None:
    """Print a line for every sequence, what was lost when its set had been added, and the growth after that.

    Args:
        erasure: to print.
        console: where to print. Default: the terminal, or as wide as needed if there is none.

    Example:
        >>> from memloc_lens.erase import Spared, erase_sequences
        >>> print_erasure(erase_sequences(model, [sequence], Gradient(), spared=Spared(), component="neuron"))
                                  1 sequences, ... neurons
        ...
    """
    console = wide_console(console)
    kind = erasure.components.component
    count, total = len(erasure.targets), len(erasure.components)
    title = f"{count} sequences, {total} {kind.plural}: {UNITS[erasure.until]}"
    table = Table(title=plain(title), title_justify="left")
    table.add_column("sequence")
    for heading in ("counts from", "before", "after", "asked by", f"own {kind.plural}", f"{kind.plural} so far"):
        table.add_column(heading, justify="right")
    table.add_column("PPL, %", justify="right")
    table.add_column("others, points", justify="right")
    for target, step in zip(erasure.targets, erasure.steps, strict=False):
        table.add_row(plain(target.id), *_told(target), str(target.own), *_cost(erasure, step))
    for step in erasure.steps[count:]:
        table.add_row(plain(step.name), f"{step.extracted} extracted", *[""] * 4, *_cost(erasure, step), style="dim")
    console.print(table)
    for line in _footer(erasure):
        console.print(line, highlight=False)


def _told(target: Target) -> list[str]:
    worst = max(target.after, key=lambda name: target.after[name])
    values = (target.limit, max(target.before.values()), target.after[worst])
    return [*(f"{value:.3g}" for value in values), worst]


def _cost(erasure: Erasure, step: Step) -> list[str]:
    rise, fall = ppl_rise(erasure.before, step.utility), neg_loss(erasure.before, step.utility)
    return [str(step.count), "" if rise is None else f"{rise:+.2f}", "" if fall is None else f"{-fall:+.2f}"]


def _footer(erasure: Erasure) -> list[str]:
    before, budget = erasure.before, erasure.budget
    asked = len(erasure.targets[0].after)
    lines = [f"extracted: {len(erasure.extracted)} of {len(erasure.targets)}, by any of {asked} prompts"]
    if before.perplexity is None:
        lines.append("perplexity: not measured, for want of a tokenizer or text")
    else:
        lines.append(f"perplexity: {before.perplexity:.2f} before; allowed is a rise of {budget.max_ppl_rise:g}%")
    if before.accuracy is None:
        lines.append("others: not measured, for want of other memorized sequences; give some with --others")
    else:
        lines.append(f"others: {before.accuracy:.1f} points before; allowed is a loss of {budget.max_neg_loss:g}")
    for name, loss in erasure.losses.relations.items():
        lines.append(f"  {name}: {loss.after - loss.before:+.2f} points, of {loss.sequences} sequences")
    return lines
