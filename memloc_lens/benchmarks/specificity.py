"""Are located components specific to one sequence, to its category, or to memorized text in general?

``python -m memloc_lens.benchmarks.specificity RUN_DEL``

Chang et al. (2024), sec. 6, find that the neurons located for one sequence cost related sequences accuracy too. From
the records and scores of a DEL run, for each method:

1. The confusion matrix: how dropping each target's components changes the accuracy of every sequence.
2. How often the target loses more than another sequence: 100 for components of the target alone, 50 by chance.
3. The overlap (Jaccard) of the components of two sequences, of the same category and of different ones.
4. The components that most sequences share; for neurons, with the tokens on which they fire most.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import TypedDict

import numpy as np
import torch
import tyro
from jaxtyping import Float
from numpy import ndarray
from rich.console import Console
from rich.table import Table

from memloc_lens.benchmarks.finished_del import load_same_model, located_sets, targets_of
from memloc_lens.checks import check_number
from memloc_lens.components import NEURONS, ComponentSet, post
from memloc_lens.library_types import HookedModel
from memloc_lens.models import check_device
from memloc_lens.runs.command_line import parser, run_command
from memloc_lens.runs.finished import FinishedRun, read_run
from memloc_lens.runs.jobs import Engine, InMemory, Job, run_jobs, serial
from memloc_lens.runs.quiet import may_be_quiet
from memloc_lens.runs.schema import Record
from memloc_lens.runs.visible import plain, visible
from memloc_lens.sequence import MemorizedSequence, decode
from memloc_lens.tables.terminal import wide_console

CONTEXT = 4  # tokens shown before one on which a neuron fires


@dataclass(frozen=True)
class SpecificitySettings:
    """What to analyse.

    Args:
        run: Folder of a finished DEL run.
        ratio: Ratio of the run. Default: its largest.
        method: Method whose confusion matrix and shared components are printed. Default: the one with the largest
            loss of accuracy on the targets.
        shared: Number of components to list, those that most sequences share.
        tokens: Number of tokens to show for each neuron, those on which it fires most.
        device: Device of the model. Default: CUDA if there is one, else the CPU.
        n_devices: Number of GPUs that share the layers of the model, from the device on.
        quiet: Show no progress bars, neither of the run nor of the libraries.
        out: JSON file to write all methods' results to.
    """

    run: tyro.conf.Positional[Path]
    ratio: float | None = None
    method: str | None = None
    shared: int = 5
    tokens: int = 6
    device: str | None = None
    n_devices: int = 1
    quiet: bool = False
    out: Path | None = None

    def __post_init__(self) -> None:
        check_device(self.device, self.n_devices)
        check_number("shared", self.shared, least=0, whole=True)
        check_number("tokens", self.tokens, least=0, whole=True)


class Firing(TypedDict):
    """A token on which a neuron fires, in its context."""

    activation: float
    text: str


class Shared(TypedDict):
    """A component that several sequences share."""

    index: list[int]
    sequences: int
    fires_on: list[Firing]


class Losses(TypedDict):
    """Mean accuracy changes of a confusion matrix, and how often the target loses more, in points."""

    self: float
    related: float | None
    unrelated: float | None
    target_loses_more: float | None


class MethodSpecificity(Losses):
    """The specificity of a method: its confusion matrix, and overlaps of component sets in points."""

    matrix: list[list[float]]
    overlap: dict[str, float | None]
    shared: list[Shared]


class Specificity(TypedDict):
    """The specificity of every method of a run at a ratio."""

    run: str
    ratio: float
    component: str
    sequences: list[str]
    categories: list[list[str]]
    methods: dict[str, MethodSpecificity]


def main() -> None:
    """Run the command line."""
    run_command(parser(SpecificitySettings, "python -m memloc_lens.benchmarks.specificity", __doc__), analyse, show)


@may_be_quiet
def analyse(settings: SpecificitySettings, engine: Engine = serial) -> Specificity:
    """Measure the specificity of every method of a DEL run at one ratio.

    Returns:
        `sequences`, the targets' ids, and for each of the `methods` the `matrix` of accuracy changes in points (rows
        are targets, columns sequences), its means `self`, `related` (another of the target's category) and `unrelated`,
        `target_loses_more` in points, the `overlap` of component sets, and the most `shared` components.

    Raises:
        ValueError: if the folder holds no such run, or lacks the ratio or the method.
    """
    run = read_run(settings.run, "del")
    ratio = run.check_ratio(settings.ratio, max(run.ratios, default=None))
    if settings.method is not None:
        run.check_method(settings.method)
    if any("acc_changes" not in record for record in run.records):
        raise ValueError(f"the records of {settings.run} do not tell sequences apart; run DEL again")
    model = load_same_model(run, settings.device, settings.n_devices)
    targets = targets_of(run, model, ratio)

    def worker(job: Job) -> Iterator[Record]:
        for (method,) in job.keys:
            yield {"method": method, "specificity": _of_method(settings, run, model, targets, method, ratio)}

    jobs = [Job(((method,),)) for method in run.methods]
    records = run_jobs(lambda: worker, jobs, InMemory("method"), engine, "specificity", "method")
    return {
        "run": str(settings.run),
        "ratio": ratio,
        "component": run.config["component"],
        "sequences": [target.id for target in targets],
        "categories": [list(target.category) for target in targets],
        "methods": {record["method"]: record["specificity"] for record in records},
    }


def _of_method(
    settings: SpecificitySettings,
    run: FinishedRun,
    model: HookedModel,
    targets: list[MemorizedSequence],
    method: str,
    ratio: float,
) -> MethodSpecificity:
    records = run.at(method, ratio)
    matrix = np.array(
        [[records[row.id]["acc_changes"].get(column.id, np.nan) for column in targets] for row in targets]
    )
    sets = located_sets(run, method, ratio, len(targets))
    return {
        "matrix": matrix.tolist(),
        **_losses(matrix, targets),
        "overlap": _overlap(sets, targets),
        "shared": _shared(model, sets, targets, settings),
    }


def _related(one: MemorizedSequence, other: MemorizedSequence) -> bool:
    return bool(set(one.category) & set(other.category))


def _losses(matrix: Float[ndarray, "target sequence"], targets: list[MemorizedSequence]) -> Losses:
    """Return means of the matrix on and off its diagonal, and how often the diagonal is lower, in points."""
    own = np.diag(matrix)[:, None]
    apart = ~np.eye(len(targets), dtype=bool) & ~np.isnan(matrix)
    related = np.array([[_related(row, column) for column in targets] for row in targets]) & apart
    wins = ((own < matrix) + 0.5 * (own == matrix))[apart]
    return {
        "self": float(own.mean()),
        "related": float(matrix[related].mean()) if related.any() else None,
        "unrelated": float(matrix[apart & ~related].mean()) if (apart & ~related).any() else None,
        "target_loses_more": 100 * float(wins.mean()) if apart.any() else None,
    }


def _overlap(sets: list[ComponentSet], targets: list[MemorizedSequence]) -> dict[str, float | None]:
    """Return the mean Jaccard index of two sequences' sets, in points: of one category, of two, and by chance."""
    related: list[float] = []
    unrelated: list[float] = []
    for one, other in combinations(range(len(targets)), 2):
        overlaps = related if _related(targets[one], targets[other]) else unrelated
        overlaps.append(100 * sets[one].overlap(sets[other]))
    width = math.prod(sets[0].shape[1:])
    both = sum(count**2 / width for count in sets[0].counts())  # expected in two random sets as large
    return {
        "related": fmean(related) if related else None,
        "unrelated": fmean(unrelated) if unrelated else None,
        "chance": 100 * both / (2 * len(sets[0]) - both),
    }


def _shared(
    model: HookedModel,
    sets: list[ComponentSet],
    targets: list[MemorizedSequence],
    settings: SpecificitySettings,
) -> list[Shared]:
    """Return the components of most sequences, neurons with the tokens of these on which they fire most."""
    shared = Counter(index for located_set in sets for index in located_set.indices()).most_common(settings.shared)
    fires: dict[tuple[int, ...], list[Firing]] = {}
    if sets[0].component is NEURONS and model.tokenizer is not None:
        fires = _firing(model, [index for index, _ in shared], targets, settings.tokens)
    return [{"index": list(index), "sequences": count, "fires_on": fires.get(index, [])} for index, count in shared]


@torch.no_grad()
def _firing(
    model: HookedModel, neurons: list[tuple[int, ...]], targets: list[MemorizedSequence], tokens: int
) -> dict[tuple[int, ...], list[Firing]]:
    names = {post(layer) for layer, _ in neurons}
    found: dict[tuple[int, ...], list[Firing]] = {neuron: [] for neuron in neurons}
    for sequence in targets:
        _, cache = model.run_with_cache(
            sequence.tokens[None].to(model.cfg.device), return_type=None, names_filter=lambda name: name in names
        )
        for layer, neuron in neurons:
            for position, value in enumerate(cache[post(layer)][0, :, neuron].tolist()):
                text = _in_context(model, sequence, position)
                found[layer, neuron].append({"activation": round(value, 3), "text": text})
    return {
        neuron: sorted(firing, key=lambda fires: -abs(fires["activation"]))[:tokens] for neuron, firing in found.items()
    }


def _in_context(model: HookedModel, sequence: MemorizedSequence, position: int) -> str:
    """Return a token with those before it, marked as in ``of the [Software]``."""
    before = decode(model, sequence.tokens[max(0, position - CONTEXT) : position])
    return f"{before}[{decode(model, sequence.tokens[position : position + 1])}]"


def show(settings: SpecificitySettings, result: Specificity) -> None:
    """Print the result, and write it to a file if one is given."""
    print_specificity(result, settings.method)
    if settings.out:
        settings.out.write_text(json.dumps(result, indent=1) + "\n")


def print_specificity(result: Specificity, method: str | None = None, console: Console | None = None) -> None:
    """Print the methods side by side, then the confusion matrix and the shared components of one."""
    console = wide_console(console)
    methods, plural = result["methods"], f"{result['component']}s"
    table = Table(
        title=f"{100 * result['ratio']:g}% of {plural} dropped: change of accuracy (points), and overlap of the "
        f"{plural} (Jaccard, points)",
        title_justify="left",
    )
    table.add_column("method")
    for heading in ("target", "its category", "others", "target loses more", "overlap in category", "across",
                    "by chance"):  # fmt: skip
        table.add_column(heading, justify="right")
    for name, row in methods.items():
        values = (row["self"], row["related"], row["unrelated"], row["target_loses_more"])
        overlaps = (row["overlap"][kind] for kind in ("related", "unrelated", "chance"))
        table.add_row(plain(name), *("" if value is None else f"{value:.1f}" for value in (*values, *overlaps)))
    console.print(table)
    chosen = method or min(methods, key=lambda name: methods[name]["self"])
    say = partial(console.print, highlight=False, markup=False, emoji=False)
    say(f"\n{chosen}: accuracy lost (points); rows are targets, columns sequences")
    say(matrix_text(methods[chosen]["matrix"]))
    for number, id in enumerate(result["sequences"], start=1):
        say(visible(f"{number:3} {id} {' '.join(result['categories'][number - 1])}"))
    say(f"\n{chosen}: the {plural} of most sequences" + (", and where they fire most" if plural == "neurons" else ""))
    for shared in methods[chosen]["shared"]:
        layer, *unit = shared["index"]
        say(
            f"layer {layer}, {result['component']} {', '.join(map(str, unit))}: {shared['sequences']} of "
            f"{len(result['sequences'])}"
        )
        for fires in shared["fires_on"]:
            say(f"  {fires['activation']:+8.2f}  {fires['text']!r}")


def matrix_text(matrix: list[list[float]]) -> str:
    """Format a matrix of accuracy changes as whole points lost, in columns; a gain has a plus, a loss no sign."""
    heads = "    " + "".join(f"{column:4}" for column in range(1, len(matrix[0]) + 1))
    rows = (
        f"{row:4}" + "".join(f"{_lost(value):>4}" for value in values) for row, values in enumerate(matrix, start=1)
    )
    return "\n".join((heads, *rows))


def _lost(change: float) -> str:
    if math.isnan(change):
        return "."
    points = round(change)
    return f"+{points}" if points > 0 else str(-points)


if __name__ == "__main__":
    main()
