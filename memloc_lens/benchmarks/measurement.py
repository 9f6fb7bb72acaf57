"""What DEL measures: what the model recalls of targets and of everything else, and its perplexity on a text."""

import math
import statistics
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from memloc_lens.benchmarks.statistics import mean_interval
from memloc_lens.metrics import perplexity, row_losses, suffix_accuracy, teacher_forced, text_distance
from memloc_lens.sequence import MemorizedSequence

GROUPS = ("neg", "neg_related", "neg_unrelated", "control")
METRICS = (
    *(f"{group}_{measure}" for group in ("self", "self_free", *GROUPS) for measure in ("acc", "dist")),
    "ppl",
)  # fmt: skip


@dataclass(frozen=True)
class Material:
    """Everything a run reads: the model, the sequences it measures on, and the text."""

    model: HookedTransformer
    targets: list[MemorizedSequence]
    others: list[MemorizedSequence]
    controls: list[MemorizedSequence]
    text: Int[Tensor, "row pos"] | None
    means: Float[Tensor, "layer neuron"] | None
    """Mean activations over the text, where dropped neurons are set to them."""
    batch: int
    """Sequences at a time, at the most."""

    def negatives(self, target: MemorizedSequence) -> list[MemorizedSequence]:
        """The other memorized sequences without the target itself."""
        return [sequence for sequence in self.others if sequence.id != target.id]


Recall = dict[str, dict[str, float]]
"""For each sequence's id, the accuracy ("acc", points) and distance ("dist", characters) of its suffix."""


@dataclass(frozen=True)
class State:
    """What the model recalls, ablated or not: teacher-forced, free-running, and its perplexity on the text."""

    forced: Recall
    free: Recall
    perplexity: float | None


def forced_recall(material: Material, targets: list[MemorizedSequence]) -> Recall:
    """Teacher-forced recall of targets and of all others, under whatever is ablated.

    The others go in the same batches whatever the targets, and targets one by one, so that prefixes serve again.
    """
    model, others = material.model, material.others + material.controls
    forced = recall_of(model, others, teacher_forced(model, others, material.batch))
    for target in targets:
        if target.id not in forced:
            forced |= recall_of(model, [target], teacher_forced(model, [target]))
    return forced


def perplexity_now(material: Material) -> float | None:
    """The perplexity of the text, under whatever is ablated; none without a text."""
    return None if material.text is None else perplexity(material.model, material.text, material.batch)


def text_interval(material: Material) -> dict[str, Any]:
    """The perplexity of the text with its 95% interval over rows: how much so many tokens tell."""
    assert material.text is not None
    interval = mean_interval(row_losses(material.model, material.text, material.batch).tolist())
    return {"tokens": material.text.numel()} | {end: math.exp(interval[end]) for end in ("mean", "low", "high")}


def recall_of(
    model: HookedTransformer, sequences: list[MemorizedSequence], predictions: list[Int[Tensor, " suffix"]]
) -> Recall:
    """Accuracy and distance of each sequence's predicted suffix; no distance without a tokenizer to write it with."""
    values = {"acc": suffix_accuracy(predictions, sequences).tolist()}
    if model.tokenizer is not None:
        values["dist"] = text_distance(model, predictions, sequences).tolist()
    return {
        sequence.id: {measure: value[place] for measure, value in values.items()}
        for place, sequence in enumerate(sequences)
    }


def metrics_of(material: Material, target: MemorizedSequence, state: State) -> dict[str, float]:
    """Every metric of a target in a state; a group without members has none."""
    negatives = material.negatives(target)
    categories_known = all(sequence.category for sequence in [target, *negatives])
    related = [sequence for sequence in negatives if set(sequence.category) & set(target.category)]
    groups = {"self": [target], "neg": negatives, "control": material.controls}
    if categories_known:
        groups |= {"neg_related": related, "neg_unrelated": [other for other in negatives if other not in related]}
    metrics = {
        f"{group}_{measure}": statistics.fmean(state.forced[member.id][measure] for member in members)
        for group, members in groups.items()
        if members
        for measure in state.forced[target.id]
    }
    metrics |= {f"self_free_{measure}": value for measure, value in state.free[target.id].items()}
    if state.perplexity is not None:
        metrics["ppl"] = state.perplexity
    return {metric: metrics[metric] for metric in METRICS if metric in metrics}
