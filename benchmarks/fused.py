"""DEL for a fusion of methods whose weights are fitted on the dev sequences of the embedded model.

    python benchmarks/fused.py --out runs/fused

Damage is measured on memorized sequences that DEL does not measure, while the weights are chosen.
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from memloc_lens import Gradient, IterativeGradient, ZeroOut, fit_fusion, load_sequences
from memloc_lens.benchmarks.context import with_context
from memloc_lens.benchmarks.deletion import DeletionSettings, load_material, run, show
from memloc_lens.products import fast_products

OTHERS = 12


@dataclass(frozen=True)
class Settings:
    """What to run.

    Args:
        out: Folder of the DEL run.
        limit: Number of targets.
        ratios: Shares of every layer's neurons to drop.
        controls: Number of control sequences.
    """

    out: Path = Path("runs/fused")
    limit: int = 16
    ratios: tuple[float, ...] = (0.02, 0.05, 0.1, 0.15, 0.2)
    controls: int = 8


def main(settings: Settings) -> None:
    """Fit the weights, print them, and run DEL."""
    methods = (IterativeGradient(), ZeroOut(candidates=0.1), Gradient())
    shared = dict(limit=settings.limit, ratios=settings.ratios, controls=settings.controls, out=settings.out)
    wanted = DeletionSettings(methods=methods, **shared)
    material = load_material(wanted)
    measured = [*material.targets, *material.others, *material.controls]
    ids = {sequence.id for sequence in measured}
    free = [sequence for sequence in material.memorized if sequence.id not in ids]
    others, context = free[:OTHERS], free[OTHERS:]
    dev = load_sequences(material.model, split="dev")
    known = with_context(wanted, material.model, context[::-1], measured, material.text)
    with fast_products(material.model.cfg.device):
        fusion = fit_fusion(material.model, dev, others, known.localizers(), first_layer=wanted.first_layer)
    print("weights:", dict(zip([method.name for method in methods], fusion.weights, strict=True)), flush=True)
    final = DeletionSettings(methods=(fusion,), **shared)
    show(final, run(final))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
