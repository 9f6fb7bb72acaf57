"""Scores in half precision against scores in float32: `python benchmarks/precision.py`.

For every localizer and kind of component, on the first 32 tokens of the embedded model's first sequence: the
correlation over all components, the lowest one of a layer, and the share of the top 5% that is the same. It takes half
an hour on a CPU, which is slow in half precision.
"""

from dataclasses import replace

import torch
from torch import Tensor

from memloc_lens import COMPONENTS, MemorizedSequence, load_model, load_sequences
from memloc_lens.components import count_of
from memloc_lens.localizers import METHODS, Localizer

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def correlation(scores: Tensor, others: Tensor) -> float:
    """Return Pearson's correlation of two tensors of scores."""
    return float(torch.corrcoef(torch.stack([scores.flatten(), others.flatten()]).double())[0, 1])


def lowest_correlation(scores: Tensor, others: Tensor) -> float:
    """Return the lowest correlation of a layer."""
    return min(correlation(layer, other) for layer, other in zip(scores, others, strict=True))


def top_overlap(scores: Tensor, others: Tensor, ratio: float = 0.05) -> float:
    """Return the share of the highest scores that two tensors have in common."""
    count = count_of(ratio, scores.numel(), "nearest")
    first, second = (set(values.flatten().topk(count).indices.tolist()) for values in (scores, others))
    return len(first & second) / count


def localizers() -> list[Localizer]:
    """Return every method with every kind of component that it scores."""
    found = []
    for method in METHODS:
        for component in COMPONENTS if hasattr(method, "component") else ("neuron",):
            if (method.name, component) != ("zero-out", "weight"):
                found.append(replace(method(), component=component) if component != "neuron" else method())
    return found


def main() -> None:
    """Print the table, a row at a time."""
    models = {name: load_model(device="cpu", dtype=dtype) for name, dtype in DTYPES.items()}
    plain = load_model(device="cpu", dtype=torch.float32)
    sequence = MemorizedSequence(load_sequences(plain)[0].tokens[:32], prompt_len=16)
    print("| method | component | dtype | correlation | lowest of a layer | top 5% in common |")
    print("|---|---|---|---|---|---|")
    for localizer in reversed(localizers()):  # the quick ones first
        expected = localizer(plain, sequence)
        for name, model in models.items():
            scores = localizer(model, sequence)
            figures = [measure(scores, expected) for measure in (correlation, lowest_correlation, top_overlap)]
            component = getattr(localizer, "component", "neuron")
            print(
                f"| {localizer.name} | {component} | {name} | " + " | ".join(f"{x:.4f}" for x in figures) + " |",
                flush=True,
            )


if __name__ == "__main__":
    main()
