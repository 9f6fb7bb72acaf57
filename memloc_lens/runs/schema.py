"""What the files of a run folder hold."""

from typing import Any, Literal, NotRequired, TypedDict

Record = dict[str, Any]
"""A line of `records.jsonl`: the fields that identify it, then what was measured by name."""

BEFORE, INJECTION = "before", "injection"
"""In place of a method, in the records of the state before any ablation, and in those of the injections themselves."""

Key = tuple[Any, ...]
"""The fields that identify a record: (sequence, method, ratio), or (step, item)."""


class Interval(TypedDict):
    """A mean over `n` sequences with its 95% confidence interval."""

    mean: float
    low: float
    high: float
    n: int


Cells = dict[str, Interval]
"""An interval for each metric."""

ByMethod = dict[str, dict[str, Cells]]
"""Cells for each method and ratio."""

Published = dict[str, dict[str, dict[str, float]]]
"""Published figures for each method, ratio and metric."""


class TextPerplexity(TypedDict):
    """The perplexity of the text before any ablation, with its 95% confidence interval over rows."""

    tokens: int
    mean: float
    low: float
    high: float


class SmallestSetsSummary(TypedDict):
    """The smallest sets of each method: their size and the change without them; `limit` is None for the default."""

    until: str
    limit: float | None
    samples: int
    methods: dict[str, Cells]


class DeletionSummary(TypedDict):
    """`summary.json` of DEL: for each method, ratio and metric the mean change from `before`."""

    benchmark: Literal["del"]
    model: str
    component: str
    sequences: int
    scope: str
    before: Cells
    methods: ByMethod
    published: Published
    text: NotRequired[TextPerplexity]
    smallest_sets: NotRequired[SmallestSetsSummary]


class InjectionsSummary(TypedDict):
    """How the injections of a ratio went."""

    texts: int
    succeeded: int
    failed: list[str]
    loss: Interval
    steps: Interval
    auroc_weight_norm: Interval
    auroc_norm_change: Interval


class InjectionSummary(TypedDict):
    """`summary.json` of INJ: for each method, ratio and metric the mean over texts."""

    benchmark: Literal["inj"]
    model: str
    component: str
    sequences: int
    injections: dict[str, InjectionsSummary]
    methods: ByMethod
    published: Published


class TuningSummary(TypedDict):
    """`summary.json` of INJ's ``--tune``: what each setting reached, and the setting chosen for each method."""

    benchmark: Literal["tuning"]
    model: str
    sequences: int
    tried: ByMethod
    chosen: dict[str, str]


Summary = DeletionSummary | InjectionSummary | TuningSummary
