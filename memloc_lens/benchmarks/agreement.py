"""Do DEL and INJ rank the methods alike?

``python -m memloc_lens.benchmarks.agreement RUN_DEL RUN_INJ``

Chang et al. (2024), sec. 6, compare the two rankings by eye; here is how sure one can be of them.

1. Each method's mean on each benchmark: points of accuracy that its neurons cost the memorized sequence (DEL), and
   its recall of the gold neurons (INJ).
2. Kendall's tau-b and Spearman's rho between the two, over methods, with 95% percentile intervals over resamples of
   the sequences of both runs.
3. On each benchmark, whether a method is better than the next one of its ranking: a paired one-sided permutation
   test over the sequences, the p-values multiplied by the number of tests (Bonferroni).
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from jaxtyping import Float
from numpy import ndarray
from rich.console import Console
from rich.table import Table
from scipy.stats import kendalltau, permutation_test, spearmanr

LEVEL = 0.05
RESAMPLES = 9999


@dataclass(frozen=True)
class Settings:
    """Which runs to compare.

    Args:
        run_del: folder of a finished DEL run.
        run_inj: folder of a finished INJ run.
        del_ratio: of the DEL run; left out: its largest.
        inj_ratio: of the INJ run; left out: its smallest.
        baselines: compare Random and WeightNorm too, which look at no activation.
        seed: of resamples and permutations.
        out: a JSON file to write the result to.
    """

    run_del: tyro.conf.Positional[Path]
    run_inj: tyro.conf.Positional[Path]
    del_ratio: float | None = None
    inj_ratio: float | None = None
    baselines: bool = False
    seed: int = 0
    out: Path | None = None


@dataclass(frozen=True)
class Ranking:
    """What one benchmark says of the methods.

    Args:
        heading: of its column.
        values: for each method one a sequence; higher is better.
    """

    heading: str
    values: Float[ndarray, "method sequence"]

    @property
    def means(self) -> Float[ndarray, " method"]:
        """Each method's mean over the sequences."""
        return self.values.mean(axis=1)

    def resampled(self, rng: np.random.Generator) -> Float[ndarray, " method"]:
        """The means over sequences drawn anew, the same for all methods."""
        count = self.values.shape[1]
        return self.values[:, rng.integers(count, size=count)].mean(axis=1)


def main() -> None:
    """The command line."""
    settings = tyro.cli(Settings, prog="python -m memloc_lens.benchmarks.agreement", description=__doc__)
    try:
        result = compare(settings)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print_agreement(result)
    if settings.out:
        settings.out.write_text(json.dumps(result, indent=1) + "\n")


def compare(settings: Settings) -> dict[str, Any]:
    """Compare a DEL and an INJ run.

    Args:
        settings: the two folders, and which of their ratios.

    Returns:
        `headings` of the two benchmarks; for each of the `methods`, best of DEL first, its `mean`, `rank` and `p`
        on either, p being the corrected p-value of being no better than the next in rank (none for the last);
        and `kendall` and `spearman` with their intervals.

    Raises:
        ValueError: if a folder holds no such run, lacks the ratio, or the runs share fewer than three methods.
    """
    deletion, at_del = _records(settings.run_del, "del", settings.del_ratio, largest=True)
    insertion, at_inj = _records(settings.run_inj, "inj", settings.inj_ratio, largest=False)
    methods = [method for method in deletion if method in insertion]
    if not settings.baselines:
        methods = [method for method in methods if method not in ("random", "weight-norm")]
    if len(methods) < 3:
        raise ValueError(f"the runs share the methods {', '.join(methods) or 'none'}; a comparison needs 3 or more")
    rankings = [
        Ranking(f"DEL: Self-Acc lost at {100 * at_del:g}%", -_matrix(deletion, methods, "self_acc")),
        Ranking(f"INJ: Recall@{100 * at_inj:g}%", _matrix(insertion, methods, f"recall@{at_inj:g}")),
    ]
    rng = np.random.default_rng(settings.seed)
    draws = [[ranking.resampled(rng) for ranking in rankings] for _ in range(RESAMPLES)]
    rows: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
    for ranking in rankings:
        order = np.argsort(-ranking.means, kind="stable")
        for rank, place in enumerate(order):
            after = order[rank + 1] if rank + 1 < len(order) else None
            p = None if after is None else _p_value(ranking.values[place], ranking.values[after], rng)
            p = None if p is None else min(1.0, p * 2 * (len(methods) - 1))
            rows[methods[place]].append({"mean": float(ranking.means[place]), "rank": rank + 1, "p": p})
    return {
        "headings": [ranking.heading for ranking in rankings],
        "sequences": [ranking.values.shape[1] for ranking in rankings],
        "methods": dict(sorted(rows.items(), key=lambda row: row[1][0]["rank"])),
        "kendall": _correlation(kendalltau, rankings, draws),
        "spearman": _correlation(spearmanr, rankings, draws),
    }


def print_agreement(result: dict[str, Any], console: Console | None = None) -> None:
    """Print the two rankings side by side, and how well they agree."""
    console = console or Console()
    first, second = result["headings"]
    table = Table(title=f"Do they rank alike? * is better than the next in rank (p < {LEVEL}, corrected)")
    for heading in ("method", first, "rank", second, "rank"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for method, cells in result["methods"].items():
        row = [method]
        for cell in cells:
            sure = cell["p"] is not None and cell["p"] < LEVEL
            row += [f"{cell['mean']:.1f}", f"{cell['rank']}{'*' if sure else ' '}"]
        table.add_row(*row)
    console.print(table)
    for name, heading in (("kendall", "Kendall's tau-b"), ("spearman", "Spearman's rho")):
        value = result[name]
        console.print(
            f"{heading} {value['mean']:+.2f}, 95% interval {value['low']:+.2f} to {value['high']:+.2f} over sequences",
            highlight=False,
        )


def _records(
    folder: Path, benchmark: str, ratio: float | None, largest: bool
) -> tuple[dict[str, dict[str, Any]], float]:
    """`{method: {sequence: record}}` of a run at one ratio, and the ratio."""
    try:
        summary = json.loads((folder / "summary.json").read_text())
        lines = (folder / "records.jsonl").read_text().splitlines()
    except OSError as error:
        raise ValueError(f"{folder} holds no finished run: {error.filename}: {error.strerror}") from error
    if summary["benchmark"] != benchmark:
        raise ValueError(f"{folder} is a run of {summary['benchmark']}; the first is of del, the second of inj")
    records = [record for record in map(json.loads, lines) if record["method"] in summary["methods"]]
    ratios = sorted({record["ratio"] for record in records})
    if not ratios or (ratio is not None and ratio not in ratios):
        raise ValueError(
            f"{folder} has no records at the ratio {ratio}; it has {', '.join(map(str, ratios)) or 'none'}"
        )
    chosen = ratio if ratio is not None else ratios[-1 if largest else 0]
    methods: dict[str, dict[str, Any]] = {}
    for record in records:
        if record["ratio"] == chosen:
            methods.setdefault(record["method"], {})[record["sequence"]] = record
    return methods, chosen


def _matrix(records: dict[str, dict[str, Any]], methods: list[str], metric: str) -> Float[ndarray, "method sequence"]:
    """A metric of the methods on the sequences that all of them have."""
    shared = [sequence for sequence in records[methods[0]] if all(sequence in records[method] for method in methods)]
    return np.array([[records[method][sequence][metric] for sequence in shared] for method in methods], dtype=float)


def _p_value(
    better: Float[ndarray, " sequence"], worse: Float[ndarray, " sequence"], rng: np.random.Generator
) -> float:
    """Of the mean difference being this large if the two were exchangeable on every sequence."""
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


def _correlation(measure: Any, rankings: list[Ranking], draws: list[list[ndarray]]) -> dict[str, float]:
    resampled = [measure(*draw).statistic for draw in draws]
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    mean = measure(*(ranking.means for ranking in rankings)).statistic
    return {"mean": float(mean), "low": float(low), "high": float(high)}


if __name__ == "__main__":
    main()
