"""Do DEL and INJ rank the methods alike?

``python -m memloc_lens.benchmarks.agreement RUN_DEL RUN_INJ``

Chang et al. (2024), sec. 6, compare the two rankings by eye; here is how certain the comparison is.

1. Each method's mean on each benchmark: the accuracy in points that the target loses without the located components
   (DEL), and the recall of the ground truth (INJ).
2. Kendall's tau-b and Spearman's rho between the two, over methods, with 95% percentile intervals over resamples of
   the sequences of both runs.
3. On each benchmark, whether a method is better than the next one of its ranking: a paired one-sided permutation
   test over the sequences, the p-values multiplied by the number of tests (Bonferroni).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import tyro
from jaxtyping import Float
from numpy import ndarray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from memloc_lens.checks import check_number
from memloc_lens.runs.command_line import parser, run_command
from memloc_lens.runs.finished import FinishedRun, read_run
from memloc_lens.runs.jobs import Engine, InMemory, Job, run_jobs, serial
from memloc_lens.runs.schema import Record
from memloc_lens.runs.visible import plain

LEVEL = 0.05
RESAMPLES = 9999
BASELINES = ("random", "weight-norm")


@dataclass(frozen=True)
class AgreementSettings:
    """Which runs to compare.

    Args:
        run_del: Folder of a finished DEL run.
        run_inj: Folder of a finished INJ run.
        del_ratio: Ratio of the DEL run. Default: its largest.
        inj_ratio: Ratio of the INJ run. Default: its smallest.
        baselines: Also compare Random and WeightNorm, which do not read the sequence.
        seed: Seed of resamples and permutations.
        out: JSON file to write the result to.
    """

    run_del: tyro.conf.Positional[Path]
    run_inj: tyro.conf.Positional[Path]
    del_ratio: float | None = None
    inj_ratio: float | None = None
    baselines: bool = False
    seed: int = 0
    out: Path | None = None

    def __post_init__(self) -> None:
        check_number("seed", self.seed, least=0, whole=True)


class Rank(TypedDict):
    """A method's mean on a benchmark, its rank, and the corrected p-value of being no better than the next."""

    mean: float
    rank: int
    p: float | None


class Correlation(TypedDict):
    """A rank correlation over methods with its 95% interval over sequences."""

    mean: float
    low: float
    high: float


class Agreement(TypedDict):
    """How the two benchmarks rank the methods; of each pair, DEL comes first."""

    headings: list[str]
    sequences: list[int]
    methods: dict[str, list[Rank]]
    kendall: Correlation
    spearman: Correlation


@dataclass(frozen=True)
class Ranking:
    """How one benchmark values the methods.

    Args:
        heading: of its column.
        values: one for each method and sequence; higher is better.
    """

    heading: str
    values: Float[ndarray, "method sequence"]

    @property
    def means(self) -> Float[ndarray, " method"]:
        """Each method's mean over the sequences."""
        return self.values.mean(axis=1)

    def resampled(self, rng: np.random.Generator) -> Float[ndarray, " method"]:
        """Return the means over resampled sequences, the same for all methods."""
        count = self.values.shape[1]
        return self.values[:, rng.integers(count, size=count)].mean(axis=1)


def main() -> None:
    """Run the command line."""
    run_command(parser(AgreementSettings, "python -m memloc_lens.benchmarks.agreement", __doc__), compare, show)


def compare(settings: AgreementSettings, engine: Engine = serial) -> Agreement:
    """Compare a DEL and an INJ run.

    Args:
        settings: the two folders, and which of their ratios.
        engine: runs the job.

    Returns:
        `headings` of the two benchmarks; for each of the `methods`, best of DEL first, its mean, rank and p-value on
        either (none for the last in rank); and `kendall` and `spearman` with their intervals.

    Raises:
        ValueError: if a folder holds no such run, lacks the ratio, or the runs share fewer than three methods.
    """
    deletion, injection = read_run(settings.run_del, "del"), read_run(settings.run_inj, "inj")
    _check_same_model(deletion, injection)
    at_del = deletion.check_ratio(settings.del_ratio, max(deletion.ratios, default=None))
    at_inj = injection.check_ratio(settings.inj_ratio, min(injection.ratios, default=None))
    methods = [
        method
        for method in deletion.methods
        if method in injection.methods and (settings.baselines or method not in BASELINES)
    ]
    if len(methods) < 3:
        raise ValueError(f"the runs share the methods {', '.join(methods) or 'none'}; a comparison needs 3 or more")
    rankings = [
        Ranking(f"DEL: Self-Acc lost at {100 * at_del:g}%", -_matrix(deletion, at_del, methods, "self_acc")),
        Ranking(f"INJ: Recall@{100 * at_inj:g}%", _matrix(injection, at_inj, methods, f"recall@{at_inj:g}")),
    ]

    def worker(job: Job) -> Iterator[Record]:
        yield {"benchmarks": "del, inj", "agreement": _agreement(rankings, methods, settings.seed)}

    (record,) = run_jobs(lambda: worker, [Job((("del, inj",),))], InMemory("benchmarks"), engine)
    return record["agreement"]


def _check_same_model(deletion: FinishedRun, injection: FinishedRun) -> None:
    """Refuse runs of two models: by the fingerprints of their weights, or by their names where old runs have none."""
    names = [run.summary.get("model") for run in (deletion, injection)]
    weights = [run.config.get("weights") for run in (deletion, injection)]
    one, other = names if None in weights else weights
    if None not in (one, other) and one != other:
        raise ValueError(
            f"{deletion.path} and {injection.path} are runs of two models, {names[0]} and {names[1]}, whose weights "
            "or precision differ; give two of one model"
        )


def _agreement(rankings: list[Ranking], methods: list[str], seed: int) -> Agreement:
    from scipy.stats import kendalltau, spearmanr

    rng = np.random.default_rng(seed)
    draws = [[ranking.resampled(rng) for ranking in rankings] for _ in range(RESAMPLES)]
    rows: dict[str, list[Rank]] = {method: [] for method in methods}
    for ranking in rankings:
        order = np.argsort(-ranking.means, kind="stable")
        for rank, index in enumerate(order):
            after = order[rank + 1] if rank + 1 < len(order) else None
            p = None if after is None else _p_value(ranking.values[index], ranking.values[after], rng)
            p = None if p is None else min(1.0, p * len(rankings) * (len(methods) - 1))
            rows[methods[index]].append({"mean": float(ranking.means[index]), "rank": rank + 1, "p": p})
    return {
        "headings": [ranking.heading for ranking in rankings],
        "sequences": [ranking.values.shape[1] for ranking in rankings],
        "methods": dict(sorted(rows.items(), key=lambda row: row[1][0]["rank"])),
        "kendall": _correlation(kendalltau, rankings, draws),
        "spearman": _correlation(spearmanr, rankings, draws),
    }


def show(settings: AgreementSettings, result: Agreement) -> None:
    """Print the result, and write it to a file if one is given."""
    print_agreement(result)
    if settings.out:
        settings.out.write_text(json.dumps(result, indent=1) + "\n")


def print_agreement(result: Agreement, console: Console | None = None) -> None:
    """Print the two rankings side by side, and the correlations between them."""
    console = console or Console()
    first, second = result["headings"]
    table = Table(title=f"Do DEL and INJ rank alike? * is better than the next in rank (p < {LEVEL}, corrected)")
    for heading in ("method", first, "rank", second, "rank"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for method, cells in result["methods"].items():
        row: list[str | Text] = [plain(method)]
        for cell in cells:
            sure = cell["p"] is not None and cell["p"] < LEVEL
            row += [f"{cell['mean']:.1f}", f"{cell['rank']}{'*' if sure else ' '}"]
        table.add_row(*row)
    console.print(table)
    for value, heading in ((result["kendall"], "Kendall's tau-b"), (result["spearman"], "Spearman's rho")):
        console.print(
            f"{heading} {value['mean']:+.2f}, 95% interval {value['low']:+.2f} to {value['high']:+.2f} over sequences",
            highlight=False,
        )


def _matrix(run: FinishedRun, ratio: float, methods: list[str], metric: str) -> Float[ndarray, "method sequence"]:
    """Return a metric of the methods on the sequences that all of them have."""
    records = [run.at(method, ratio) for method in methods]
    shared = [sequence for sequence in records[0] if all(sequence in of_method for of_method in records)]
    if not shared:
        raise ValueError(f"the methods of {run.path} share no sequence at the ratio {ratio}; run them on the same ones")
    for method, of_method in zip(methods, records, strict=True):
        for sequence in shared:
            if not isinstance(of_method[sequence].get(metric), int | float):
                raise ValueError(f"{run.path} has no {metric} of {method} for {sequence}; run it again in a new folder")
    return np.array([[of_method[sequence][metric] for sequence in shared] for of_method in records], dtype=float)


def _p_value(
    better: Float[ndarray, " sequence"], worse: Float[ndarray, " sequence"], rng: np.random.Generator
) -> float:
    """Return the chance of so large a mean difference if the two were exchangeable on every sequence."""
    from scipy.stats import permutation_test

    test = permutation_test(
        (better, worse),
        lambda one, other, axis: (one - other).mean(axis=axis),
        permutation_type="samples",
        alternative="greater",
        vectorized=True,
        n_resamples=RESAMPLES,
        rng=rng,
    )
    return float(test.pvalue)


def _correlation(measure: Any, rankings: list[Ranking], draws: list[list[ndarray]]) -> Correlation:
    resampled = [measure(*draw).statistic for draw in draws]
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    mean = measure(*(ranking.means for ranking in rankings)).statistic
    return {"mean": float(mean), "low": float(low), "high": float(high)}


if __name__ == "__main__":
    main()
