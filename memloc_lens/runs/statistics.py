"""Records -> means with 95% confidence intervals, for each method, ratio and metric."""

import math
from collections.abc import Sequence

import numpy as np

from memloc_lens.runs.schema import ByMethod, Interval, Record


def mean_interval(values: Sequence[float], seed: int = 0) -> Interval:
    """Return the mean with its 95% BCa bootstrap interval (Efron, 1987).

    Args:
        values: one a sequence, at least one. If all are equal up to rounding, the interval is the mean.
        seed: of the 9,999 resamples.

    Returns:
        `mean`, `low`, `high` and `n`. The interval of a single value is the value itself.

    Example:
        >>> mean_interval([3.0, 3.0])
        {'mean': 3.0, 'low': 3.0, 'high': 3.0, 'n': 2}
    """
    from scipy.stats import bootstrap

    data = np.asarray(values, dtype=float)
    mean = float(data.mean())
    if np.ptp(data) <= 1e-12 * np.abs(data).max():  # equal, up to rounding: no resample differs
        return {"mean": mean, "low": mean, "high": mean, "n": len(data)}
    interval = bootstrap((data,), np.mean, method="BCa", rng=np.random.default_rng(seed)).confidence_interval
    low, high = float(interval.low), float(interval.high)
    # with two or three values the acceleration can be undefined
    return {
        "mean": mean,
        "low": low if math.isfinite(low) else float(data.min()),
        "high": high if math.isfinite(high) else float(data.max()),
        "n": len(data),
    }


def summarize(records: Sequence[Record], metrics: Sequence[str]) -> ByMethod:
    """Return the interval of every metric for each method and ratio; a metric that no record has is left out.

    Args:
        records: in the order of sequences, on which the bootstrap intervals depend.
        metrics: names of the fields to summarize.
    """
    methods: ByMethod = {}
    for method in dict.fromkeys(record["method"] for record in records):
        methods[method] = {}
        of_method = [record for record in records if record["method"] == method]
        for ratio in sorted({record["ratio"] for record in of_method}):
            cell = [record for record in of_method if record["ratio"] == ratio]
            present = {metric: [r[metric] for r in cell if r.get(metric) is not None] for metric in metrics}
            methods[method][str(ratio)] = {
                metric: mean_interval(values) for metric, values in present.items() if values
            }
    return methods
