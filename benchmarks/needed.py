"""How many neurons must go until a sequence cannot be extracted: by how often it was seen, and by how long it is.

    python benchmarks/needed.py

For sequences of the embedded model that were seen equally often in training, and for suffixes of other lengths, the
smallest sets of iterative gradients and of ZeroOut, as a share of every layer but the first.
"""

import json
from dataclasses import dataclass
from statistics import fmean

import tyro

from memloc_lens import (
    Gradient,
    IterativeGradient,
    Localizer,
    MemorizedSequence,
    load_model,
    load_sequences,
    smallest_set,
)
from memloc_lens.models import EMBEDDED
from memloc_lens.products import fast_products

REPEATS = (32, 48, 64, 96, 128)
SUFFIXES = (12, 24, 48)
METHODS: tuple[Localizer, ...] = (IterativeGradient(first_layer=1), Gradient(first_layer=1))


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Args:
        sequences: Number of sequences for each number of repeats, the last of the data.
    """

    sequences: int = 6


def main(settings: Settings) -> None:
    """Print two tables in Markdown."""
    model = load_model()
    rows = [json.loads(line) for line in (EMBEDDED / "sequences.jsonl").read_text("utf-8").splitlines()]
    seen = {row["id"]: row["repeats"] for row in rows}
    groups = {
        f"{repeats} times": [one for one in load_sequences(model) if seen[one.id] == repeats][-settings.sequences :]
        for repeats in REPEATS
    }
    print("| seen | " + " | ".join(localizer.name for localizer in METHODS) + " |\n|---|---|---|")
    for name, group in groups.items():
        print(f"| {name} | {' | '.join(_needed(model, group, localizer) for localizer in METHODS)} |", flush=True)
    print("\n| tokens of the suffix | " + " | ".join(localizer.name for localizer in METHODS) + " |\n|---|---|---|")
    for length in SUFFIXES:
        cut = [MemorizedSequence(one.tokens[: 32 + length], 32, one.id) for one in groups["128 times"]]
        print(f"| {length} | {' | '.join(_needed(model, cut, localizer) for localizer in METHODS)} |", flush=True)


def _needed(model, sequences: list[MemorizedSequence], localizer: Localizer) -> str:
    """Return the mean share of a layer's neurons, its smallest and its largest value."""
    with fast_products(model.cfg.device):
        scores = localizer(model, sequences)
        found = [smallest_set(model, one, own, first_layer=1) for one, own in zip(sequences, scores, strict=True)]
    shares = [100 * (one.ratio if one else 1.0) for one in found]
    return f"{fmean(shares):.1f}% ({min(shares):.1f} to {max(shares):.1f})"


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
