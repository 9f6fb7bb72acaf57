"""DEL with an adaptive budget: for each target the smallest set of a method, in place of a fixed share.

A record of a smallest set has the ratio `SMALLEST`, the metrics of DEL at that point, and what is left of the target.
The summary has them apart from the shares, so that whoever compares methods at a share never meets them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from jaxtyping import Float
from torch import Tensor

from memloc_lens.benchmarks.measurement import Material
from memloc_lens.checks import check_number
from memloc_lens.components import Component, ComponentSet, top_components
from memloc_lens.runs.schema import DeletionSummary, Record, SmallestSetsSummary
from memloc_lens.runs.statistics import summarize
from memloc_lens.sequence import MemorizedSequence
from memloc_lens.smallest_set import check_until, limit_of, smallest_set
from memloc_lens.tables.terminal import Column, CountColumn, print_comparison, smallest_sets_heading

SMALLEST = 0.0
"""In place of a ratio in the records of smallest sets."""


@dataclass(frozen=True)
class Budget:
    """Until when to drop components, and from where; the fields are arguments of `smallest_set`."""

    until: Any
    limit: float | None
    samples: int
    first_layer: int
    scope: Any
    component: Component
    kind: Any

    def check(self, targets: Sequence[MemorizedSequence]) -> None:
        """Refuse a limit that a target cannot have.

        Raises:
            ValueError: stating the limit and what it can be.
        """
        for target in targets:
            limit_of(self.until, self.limit, len(target.suffix))

    def located(
        self, material: Material, target: MemorizedSequence, scores: Float[Tensor, " layer *unit"]
    ) -> tuple[ComponentSet, Record]:
        """Return the smallest set of a target, and what its record has beside the metrics.

        Returns:
            The largest set, and 0 for `reached`, if even that leaves the target extractable.
        """
        over = () if material.means is None else material.means
        found = smallest_set(material.model, target, scores, over=over, **vars(self))
        if found is None:
            everything = top_components(scores, 1.0, self.first_layer, self.scope, component=self.component)
            return everything, {"reached": 0}
        left = {"left": vars(found.left)}
        if found.with_one_fewer:
            left["left_with_one_fewer"] = vars(found.with_one_fewer)
        return found.components, {"reached": 1, **left}


def check_budget(until: str | None, limit: float | None, samples: int) -> None:
    """Refuse settings of the budget that cannot be used.

    Raises:
        ValueError: stating the setting and its limits.
    """
    check_number("until_samples", samples, least=1, whole=True)
    if until is not None:
        check_until(until, limit)
    elif limit is not None:
        raise ValueError(f"until_limit is {limit}, and no until is given that it limits; add one, such as greedy")


def summarized(records: Sequence[Record], count: str, metrics: Sequence[str], table: Mapping[str, Any]) -> Any:
    """Return the part of a summary that is about smallest sets; none without records of them.

    Args:
        records: of the methods, in the order of sequences.
        count: name of the field with the number of components.
        metrics: of DEL.
        table: what the run's configuration says of the budget.
    """
    smallest = [record for record in records if record["ratio"] == SMALLEST]
    if not smallest:
        return {}
    of_methods = summarize(smallest, [count, "reached", *metrics])
    methods = {method: cells[str(SMALLEST)] for method, cells in of_methods.items()}
    return {"smallest_sets": cast(SmallestSetsSummary, {**table, "methods": methods})}


def print_smallest(summary: DeletionSummary, metrics: Sequence[Column]) -> None:
    """Print the table of smallest sets."""
    smallest = summary["smallest_sets"]
    tables = {method: {"": cells} for method, cells in smallest["methods"].items()}
    print_comparison(
        cast(DeletionSummary, {**summary, "methods": tables, "published": {}}),
        f"{smallest_sets_heading(summary)}: number, and change without them",
        lambda _: "damage at that point",
        lambda _: [CountColumn(f"{summary['component']}s"), *metrics],
        _unreached(smallest),
    )


def _unreached(smallest: SmallestSetsSummary) -> Iterator[str]:
    for method, cells in smallest["methods"].items():
        reached = cells["reached"]
        if reached["mean"] < 1:
            failed = round((1 - reached["mean"]) * reached["n"])
            yield f"{method}: {failed} of {reached['n']} sequences stay extractable even without all"
