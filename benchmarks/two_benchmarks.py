"""Why do iterative gradients win DEL and lose INJ? What they choose first, and what after the text is lost.

    python benchmarks/two_benchmarks.py

A text is injected into 5% of the neurons with the norms kept. For growing shares of every layer, the neurons that a
method puts there are dropped: how many of those that the share has added are ground truth (precision, in points), and
what is left of the text (teacher-forced accuracy, in points). The last row drops the ground truth itself.
"""

from dataclasses import dataclass
from statistics import fmean

import torch
import tyro

from memloc_lens import (
    Gradient,
    IterativeGradient,
    Localizer,
    Neurons,
    ZeroOut,
    ablate,
    inject,
    load_definitions,
    load_model,
    top_neurons,
)
from memloc_lens.metrics import suffix_accuracy, teacher_forced
from memloc_lens.products import fast_products

SHARES = (0.005, 0.01, 0.02, 0.05)
METHODS: dict[str, Localizer] = {
    "gradient": Gradient(),
    "iterative-gradient": IterativeGradient(),
    "iterative-gradient, loss": IterativeGradient(objective="loss"),
    "zero-out": ZeroOut(),
}


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Args:
        texts: Number of texts, the first of the test split.
        ratio: Share of all neurons that a text is injected into.
    """

    texts: int = 4
    ratio: float = 0.05


def main(settings: Settings) -> None:
    """Print a table in Markdown."""
    model = load_model()
    found: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in METHODS}
    whole = []
    with fast_products(model.cfg.device):
        for seed, text in enumerate(load_definitions(model)[: settings.texts]):
            with inject(model, text, settings.ratio, seed=seed, keep_norms=True) as injected:
                gold = injected.ground_truth
                for name, localizer in METHODS.items():
                    found[name].append(_along(model, text, localizer(model, text), gold))
                with ablate(model, gold):
                    whole.append(_accuracy(model, text))
    heads = [f"{100 * share:g}%: precision of what is added, accuracy left" for share in SHARES]
    print(f"| | {' | '.join(heads)} |\n|---|{'---|' * len(SHARES)}")
    for name, texts in found.items():
        means = [(fmean(p for p, _ in at), fmean(a for _, a in at)) for at in zip(*texts, strict=True)]
        print(f"| {name} | {' | '.join(f'{precision:.0f}, {left:.0f}' for precision, left in means)} |")
    print(f"\nwithout the ground truth: {fmean(whole):.0f}")


def _along(model, text, scores: torch.Tensor, gold: Neurons) -> list[tuple[float, float]]:
    found, before = [], gold - gold
    for share in SHARES:
        chosen = top_neurons(scores, share, rounding="nearest")
        added = chosen - before
        with ablate(model, chosen):
            found.append((100 * len(added & gold) / len(added), _accuracy(model, text)))
        before = chosen
    return found


def _accuracy(model, text) -> float:
    return suffix_accuracy(teacher_forced(model, [text]), [text]).item()


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
