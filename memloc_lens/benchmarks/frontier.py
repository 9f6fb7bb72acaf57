"""How much does a method make a model forget at a given damage, and which method is better at equal damage?

``python -m memloc_lens.benchmarks.frontier RUN...``

Two methods at the same share differ in forgetting and in damage. From DEL runs over a grid of shares, for each method
and target:

1. Its curve: what the target loses (Self-Acc, in points) against the damage, one point a share, from (0, 0) on. The
   damage is what the other memorized sequences lose (Neg-Acc, in points), or the rise of the perplexity in percent of
   what it was. A gain counts as no damage.
2. Read from the curve: the most that is lost up to a damage (running maximum over the shares sorted by damage),
   interpolated linearly between shares. Beyond the largest damage of the grid it stays at the last value.
3. Means over targets with 95% intervals, and paired differences from a reference method.
4. A method dominates another if it forgets more at every damage: the paired intervals are all above zero.

The same for greedy decoding (Free-Acc).
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, TypedDict, cast

import numpy as np
import tyro
from rich.console import Console

from memloc_lens.equal_damage import area, curve
from memloc_lens.runs.command_line import parser, run_command
from memloc_lens.runs.finished import FinishedRun, read_run
from memloc_lens.runs.records import lacks
from memloc_lens.runs.schema import Cells, Record
from memloc_lens.runs.statistics import mean_interval
from memloc_lens.tables.markdown import comparison_table
from memloc_lens.tables.terminal import print_comparison

LOST = {"self": "self_acc", "free": "self_free_acc"}
LEVELS = {"neg_acc": (1, 2, 5), "ppl": (2, 5)}
"""The damages at which curves are read: points of Neg-Acc, percents of the perplexity."""

AREA = 5
"""Points of Neg-Acc up to which the area is taken."""

MAIN = "self@2"
FIVE = ("hard-concrete", "slimming", "zero-out", "integrated-gradients", "activations")
"""The methods of Chang et al. (2024): the best of them is the default reference."""

DROPPED = ("component", "first_layer", "scope", "ablation")
"""Settings of a run that make another method of one with the same name."""

Values = dict[str, list[float]]
"""One value a target for each figure."""


@dataclass(frozen=True)
class FrontierSettings:
    """Which runs to read.

    Args:
        runs: Folders of finished DEL runs of one model on the same targets and negatives, of any methods and ratios.
        reference: Method to compare the others with. Default: the best of the paper's five at 2 points of Neg-Acc; the
            best of all if the runs have none of them.
        out: JSON file to write the result to.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    reference: str | None = None
    out: Path | None = None

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("no run was given; give the folders of finished DEL runs")
        if len(set(self.runs)) < len(self.runs):
            raise ValueError(f"runs are {' '.join(map(str, self.runs))}; name each once")


class MethodFrontier(TypedDict):
    """The figures of a method.

    Args:
        shares: number of shares in its grid.
        values: mean of each figure with its interval.
        beyond: number of targets whose grid ends before the damage, so that the figure is the curve's last value.
        differences: paired, from the reference.
        better: number of targets with a better figure than the reference's.
        dominates: the methods that forget less at every damage.
    """

    shares: int
    values: Cells
    beyond: dict[str, int]
    differences: Cells
    better: dict[str, int]
    dominates: list[str]


class Frontier(TypedDict):
    """The frontier of every method, the best at 2 points of Neg-Acc first."""

    benchmark: Literal["frontier"]
    runs: list[str]
    reference: str
    sequences: list[str]
    methods: dict[str, MethodFrontier]


def main() -> None:
    """Run the command line."""
    run_command(parser(FrontierSettings, "python -m memloc_lens.benchmarks.frontier", __doc__), compare, show)


def compare(settings: FrontierSettings) -> Frontier:
    """Compare methods at equal damage, from the records of DEL runs.

    Args:
        settings: the runs and the reference.

    Returns:
        The `methods`, best at 2 points first. Figures are `self@2`, Self-Acc lost at 2 points of Neg-Acc; `self_area`,
        its mean over 0 to 5 points; `self@ppl2%`, Self-Acc lost where the perplexity has risen by 2%; the same of
        Free-Acc under `free`; and `seconds` to localize a sequence.

    Raises:
        ValueError: if a folder holds no finished DEL run, runs differ in model, targets or negatives, a method lacks
            targets, or no method is called like the reference.
    """
    runs = [read_run(folder, "del") for folder in settings.runs]
    perplexity = perplexity_before(runs[0])
    grids = grids_of(runs)
    values: dict[str, Values] = {}
    for method, of_targets in grids.items():
        each = [figures(grid, perplexity) for grid in of_targets]
        values[method] = {name: [of_target[name] for of_target in each] for name in each[0]}
    reference = _reference(settings.reference, values)
    order = sorted(values, key=lambda method: -fmean(values[method][MAIN]))
    dominated = [pair for pair in permutations(order, 2) if _dominates(*(values[method] for method in pair))]
    return {
        "benchmark": "frontier",
        "runs": [str(run.path) for run in runs],
        "reference": reference,
        "sequences": _same_targets(runs),
        "methods": {
            method: {
                "shares": len(grids[method][0]),
                "values": {name: mean_interval(each) for name, each in values[method].items()},
                "beyond": _beyond(grids[method], perplexity),
                "differences": _differences(values[method], values[reference]),
                "better": _better(values[method], values[reference]),
                "dominates": [other for one, other in dominated if one == method],
            }
            for method in order
        },
    }


def perplexity_before(run: FinishedRun) -> float | None:
    """Return the perplexity of the text before any ablation, None if the run did not measure it."""
    return run.summary.get("before", {}).get("ppl", {}).get("mean")


def grids_of(runs: Sequence[FinishedRun]) -> dict[str, list[list[Record]]]:
    """Return for each method and target its records, one a share; runs with the same settings of a method are one grid.

    Raises:
        ValueError: if runs differ in model, targets or negatives, or a method lacks targets.
    """
    targets = _same_targets(runs)
    return {method: _grids(method, records, targets) for method, records in _by_method(runs).items()}


def _same_targets(runs: Sequence[FinishedRun]) -> list[str]:
    """Return the targets' ids, after checking that all runs share them, the model, and what damage is measured on."""
    described = [
        {
            "model": run.config.get("weights", run.config.get("model")),
            "negatives, controls or text": run.config.get("data_sha256"),
            "targets": run.config.get("sequences", [])[: run.summary.get("sequences")],
        }
        for run in runs
    ]
    for run, of_run in zip(runs, described, strict=True):
        differing = [part for part, value in of_run.items() if value != described[0][part]]
        if differing:
            raise ValueError(
                f"{runs[0].path} and {run.path} differ in their {' and '.join(differing)}; give runs of one model on "
                "the same sequences"
            )
    ids = [id for id, _ in described[0]["targets"]]
    if not ids:
        raise ValueError(f"{runs[0].path / 'config.json'} does not tell its sequences; run DEL again in a new folder")
    return ids


def _by_method(runs: Sequence[FinishedRun]) -> dict[str, list[Record]]:
    """Return the records of each method; runs with the same settings of a method are one grid."""
    found: dict[tuple[str, str], tuple[FinishedRun, list[Record]]] = {}
    for run in runs:
        dropped = [run.config.get(name) for name in DROPPED]
        for method in run.methods:
            own = json.dumps([dropped, run.config["methods"].get(method)])
            _, records = found.setdefault((method, own), (run, []))
            records += [record for record in run.records if record["method"] == method]
    names = [method for method, _ in found]
    return {
        method if names.count(method) == 1 else f"{method} ({run.path})": records
        for (method, _), (run, records) in found.items()
    }


def _grids(method: str, records: Sequence[Record], targets: Sequence[str]) -> list[list[Record]]:
    """Return for each target its records, one a share."""
    by_target: dict[str, dict[float, Record]] = {target: {} for target in targets}
    for record in records:
        wrong = lacks(record, ["self_acc", "neg_acc", "localize_seconds"], {})
        if wrong:
            raise ValueError(f"{method} of {record['sequence']!r} at ratio {record['ratio']}: {wrong}; run DEL again")
        by_target[record["sequence"]].setdefault(record["ratio"], record)
    shares = {record["ratio"] for record in records}
    for target, grid in by_target.items():
        if grid.keys() != shares:
            missing = min(shares - grid.keys())
            raise ValueError(f"{method} lacks {target!r} at ratio {missing}; name it in a run of DEL to complete it")
    return [list(grid.values()) for grid in by_target.values()]


def figures(grid: Sequence[Record], perplexity: float | None) -> dict[str, float]:
    """Return the figures of a target: what is lost at each damage, the area, and the seconds.

    Args:
        grid: records of DEL, one a share.
        perplexity: before any ablation, if it was measured.
    """
    found: dict[str, float] = {}
    for name, lost in LOST.items():
        for damage, each in damages(grid, perplexity).items():
            if not all(lost in record for record in grid):
                continue
            drawn = curve(each, [-record[lost] for record in grid])
            found |= {_name(name, damage, at): float(np.interp(at, *drawn)) for at in LEVELS[damage]}
            if damage == "neg_acc":
                found[f"{name}_area"] = area(drawn, AREA)
    return found | {"seconds": fmean(record["localize_seconds"] for record in grid)}


def _name(lost: str, damage: str, at: float) -> str:
    return f"{lost}@ppl{at}%" if damage == "ppl" else f"{lost}@{at}"


def damages(grid: Sequence[Record], perplexity: float | None) -> dict[str, list[float]]:
    """Return the damage of each share: points of Neg-Acc lost, and the rise of the perplexity in percent."""
    scales = {"neg_acc": -1.0} | ({"ppl": 100 / perplexity} if perplexity else {})
    return {
        metric: [scale * record[metric] for record in grid]
        for metric, scale in scales.items()
        if all(metric in record for record in grid)
    }


def _beyond(grids: Sequence[Sequence[Record]], perplexity: float | None) -> dict[str, int]:
    ends = [{damage: max(each) for damage, each in damages(grid, perplexity).items()} for grid in grids]
    return {
        _name("self", damage, at): sum(end[damage] < at for end in ends) for damage in ends[0] for at in LEVELS[damage]
    }


def _reference(wanted: str | None, values: dict[str, Values]) -> str:
    if wanted not in (None, *values):
        raise ValueError(f"no method is called {wanted!r}; the runs have {', '.join(values)}")
    published = [method for method in values if method.split(" (")[0] in FIVE]
    return wanted or max(published or values, key=lambda method: fmean(values[method][MAIN]))


def _differences(one: Values, other: Values) -> Cells:
    return {
        name: mean_interval([here - there for here, there in zip(one[name], other[name], strict=True)])
        for name in one.keys() & other.keys()
    }


def _better(one: Values, other: Values) -> dict[str, int]:
    """Count the targets for which one method's figure is better; fewer seconds are."""
    return {
        name: sum(
            (here < there) if name == "seconds" else (here > there)
            for here, there in zip(one[name], other[name], strict=True)
        )
        for name in one.keys() & other.keys()
    }


def _dominates(one: Values, other: Values) -> bool:
    """Tell whether one method loses more of the target at every damage, by paired intervals."""
    levels = [name for name in one.keys() & other.keys() if name.startswith("self@")]
    pairs = [[here - there for here, there in zip(one[name], other[name], strict=True)] for name in levels]
    return all(fmean(pair) > 0 for pair in pairs) and all(mean_interval(pair)["low"] > 0 for pair in pairs)


def show(settings: FrontierSettings, result: Frontier) -> None:
    """Print the result, and write it to a file if one is given."""
    print_frontier(result)
    if settings.out:
        settings.out.write_text(json.dumps(result, indent=1) + "\n")


@dataclass(frozen=True)
class _Column:
    name: str
    heading: str
    better: int
    form: str


def _heading(name: str) -> str:
    return name.replace("self", "S").replace("free", "F").replace("ppl", "PPL+")


def _columns(lost: str, form: str) -> list[_Column]:
    names = [_name(lost, damage, at) for damage, levels in LEVELS.items() for at in levels]
    names.insert(len(LEVELS["neg_acc"]), f"{lost}_area")
    return [_Column(name, _heading(name), 1, form) for name in names]


def frontier_table(result: Frontier) -> str:
    """Return the figures of all methods as a table in Markdown, with the paired differences at 2 points of Neg-Acc.

    Args:
        result: of `compare`.
    """
    reference = result["reference"]
    rows = {
        method: found["values"] | ({} if method == reference else {"difference": found["differences"][MAIN]})
        for method, found in result["methods"].items()
    }
    columns = [
        *_columns("self", ".1f"),
        _Column("difference", f"S@2 less that of {reference}", 1, "+.1f"),
        _Column("seconds", "seconds", -1, ".2f"),
    ]
    return (
        f"{len(result['sequences'])} sequences at equal damage. S@x is Self-Acc lost at x points of Neg-Acc lost, "
        "S@PPL+x% where the perplexity has risen by x%, S_area the mean over 0 to 5 points; seconds are those to "
        "localize a sequence. Means with 95% confidence intervals; bold is the best of a column.\n\n"
        f"{comparison_table(rows, columns)}"
    )


def print_frontier(result: Frontier, console: Console | None = None) -> None:
    """Print the figures of all methods, their differences from the reference, and which method dominates which."""
    seconds = _Column("seconds", "seconds", -1, ".2f")
    columns = {
        "Self-Acc lost (points)": [*_columns("self", ".1f"), seconds],
        "Free-Acc lost (points)": _columns("free", ".1f"),
        f"Self-Acc lost more than by {result['reference']}, paired": _columns("self", "+.1f"),
    }
    absolute, free, paired = columns
    tables = {
        method: {absolute: found["values"], free: found["values"]}
        | ({} if method == result["reference"] else {paired: found["differences"]})
        for method, found in result["methods"].items()
    }
    if not any(column.name in cells[free] for cells in tables.values() for column in columns[free]):
        tables = {method: {title: cells[title] for title in cells if title != free} for method, cells in tables.items()}
    print_comparison(
        cast(Any, {"benchmark": "frontier", "methods": tables}),
        f"{len(result['sequences'])} sequences at equal damage: S@2 is Self-Acc lost at 2 points of Neg-Acc, "
        "S@PPL+2% where the perplexity has risen by 2%, S_area the mean over 0 to 5 points",
        str,
        columns.__getitem__,
        _lines(result),
        console,
    )


def _lines(result: Frontier) -> Iterator[str]:
    count = len(result["sequences"])
    for method, found in result["methods"].items():
        if method != result["reference"]:
            yield f"{method}: better than {result['reference']} at 2 points for {found['better'][MAIN]} of {count}"
        if found["dominates"]:
            yield f"{method} dominates {', '.join(found['dominates'])}"
        ends = [f"{_heading(name)} for {short}" for name, short in found["beyond"].items() if short]
        if ends:
            yield f"{method}: its {found['shares']} shares end before {', '.join(ends)} of {count}; last value taken"


if __name__ == "__main__":
    main()
