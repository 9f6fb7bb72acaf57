"""What DEL measures, as one table: a metric is an entry of `METRICS`, measured, summarized and printed from there."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from memloc_lens.benchmarks.prompts import PROMPTS
from memloc_lens.forward import PrefixCache
from memloc_lens.generation import Predictions, free_running
from memloc_lens.library_types import HookedModel
from memloc_lens.metrics import (
    perplexity,
    row_losses,
    suffix_accuracy,
    suffix_probabilities,
    teacher_forced,
    text_distance,
)
from memloc_lens.runs.schema import Record, TextPerplexity
from memloc_lens.runs.statistics import mean_interval
from memloc_lens.sequence import MemorizedSequence


@dataclass(frozen=True)
class Material:
    """Everything that a run reads: the model, the sequences that it measures on, and the text."""

    model: HookedModel
    memorized: list[MemorizedSequence]
    """All that the data has; the targets are the first of them."""
    targets: list[MemorizedSequence]
    others: list[MemorizedSequence]
    controls: list[MemorizedSequence]
    text: Int[Tensor, "row pos"] | None
    means: Float[Tensor, " layer *activation"] | None
    """Mean activations over the text, where dropped components are set to them."""
    batch: int
    """Maximum number of sequences at a time."""
    prefix: PrefixCache
    """Of the layers that no ablation of the run changes."""
    prompts: bool = False
    """Whether targets are also generated from other prompts."""

    def negatives(self, target: MemorizedSequence) -> list[MemorizedSequence]:
        """Return the other memorized sequences, without the target itself."""
        return [sequence for sequence in self.others if sequence.id != target.id]


class Match(NamedTuple):
    """How well a suffix is recited: accuracy in points, distance in characters if the model has a tokenizer."""

    acc: float
    dist: float | None


OWN = "own"


class Recited(NamedTuple):
    """What greedy decoding writes after a target's prompt, and its match by prompt: its own, and those of `PROMPTS`."""

    written: list[int]
    matches: dict[str, Match]


def recited(material: Material, targets: Sequence[MemorizedSequence], batch: int) -> list[Recited]:
    """Return what is recited of each target, generated side by side; each kind of prompt has batches of its own."""
    model = material.model
    by_prompt = {OWN: list(targets)}
    for name, vary in PROMPTS.items() if material.prompts else ():
        by_prompt[name] = [vary(model, target) for target in targets]
    found = [Recited([], {}) for _ in targets]
    for name, sequences in by_prompt.items():
        generated = free_running(model, sequences, batch)
        # row by row: with an ablation of its own for each row, a target may have several
        for own, sequence, suffix in zip(found, sequences, generated, strict=True):
            own.matches[name] = matches(model, [sequence], [suffix])[sequence.id]
            if name == OWN:
                own.written.extend(suffix.tolist())
    return found


class State:
    """What the model recites while an ablation is open, or before any; measured when it is asked for.

    Args:
        material: of the run.
        free: free-running matches of targets, where they have been measured already.
    """

    def __init__(self, material: Material, free: dict[str, Recited] | None = None) -> None:
        self.material, self._free = material, free or {}
        self._alone: dict[str, Match] = {}

    @cached_property
    def _others(self) -> dict[str, Match]:
        # in the same batches whatever the target, so that the prefix cache serves them again
        material, others = self.material, self.material.others + self.material.controls
        predictions = teacher_forced(material.model, others, material.batch, material.prefix)
        return matches(material.model, others, predictions)

    def forced(self, sequence: MemorizedSequence) -> Match:
        """Return the teacher-forced match of a sequence."""
        if sequence.id in self._others:
            return self._others[sequence.id]
        if sequence.id not in self._alone:
            predictions = teacher_forced(self.material.model, [sequence], prefix=self.material.prefix)
            self._alone |= matches(self.material.model, [sequence], predictions)
        return self._alone[sequence.id]

    def free(self, target: MemorizedSequence) -> Match:
        """Return the match of the greedy continuation of a target's prompt."""
        return self._recited(target).matches[OWN]

    def written(self, target: MemorizedSequence) -> list[int]:
        """Return the tokens of the greedy continuation of a target's prompt."""
        return self._recited(target).written

    def probabilities(self, target: MemorizedSequence) -> list[float]:
        """Return the probability of every token of a target's suffix, given all true tokens before it."""
        return suffix_probabilities(self.material.model, target, self.material.prefix).tolist()

    def other_prompt(self, target: MemorizedSequence, name: str) -> float | None:
        """Return the accuracy of the greedy continuation of another prompt of a target, None if it is not asked for."""
        found = self._recited(target).matches.get(name)
        return found.acc if found else None

    def _recited(self, target: MemorizedSequence) -> Recited:
        if target.id not in self._free:
            (self._free[target.id],) = recited(self.material, [target], batch=1)
        return self._free[target.id]

    def negatives(self, target: MemorizedSequence) -> list[Match]:
        """Return the matches of all other memorized sequences."""
        return [self.forced(sequence) for sequence in self.material.negatives(target)]

    def related(self, target: MemorizedSequence, wanted: bool) -> list[Match]:
        """Return the matches of those that share a category with the target, or of those that share none."""
        negatives = self.material.negatives(target)
        if not all(sequence.category for sequence in [target, *negatives]):
            return []
        return [self.forced(other) for other in negatives if bool(set(other.category) & set(target.category)) == wanted]

    def controls(self) -> list[Match]:
        """Return the matches of the control sequences."""
        return [self.forced(sequence) for sequence in self.material.controls]

    @cached_property
    def perplexity(self) -> float | None:
        """The perplexity of the text; none without a text."""
        material = self.material
        if material.text is None:
            return None
        return perplexity(material.model, material.text, material.batch, material.prefix)


def matches(model: HookedModel, sequences: Sequence[MemorizedSequence], predictions: Predictions) -> dict[str, Match]:
    """Return the match of each sequence's predicted suffix, by the id of the sequence."""
    accuracies: list[float] = suffix_accuracy(predictions, sequences).tolist()
    distances: Sequence[float | None] = [None] * len(sequences)
    if model.tokenizer is not None:
        distances = text_distance(model, predictions, sequences).tolist()
    return {
        sequence.id: Match(accuracy, distance)
        for sequence, accuracy, distance in zip(sequences, accuracies, distances, strict=True)
    }


@dataclass(frozen=True)
class Metric:
    """A metric of DEL, recorded as the change from before the ablation.

    Args:
        name: in records and summaries.
        heading: of its column in tables; a metric without a heading is recorded only.
        unit: of its values.
        better: 1 if a higher change is better, -1 if a lower one is.
        form: format of the printed value.
        measure: its value for a target in a state; None where there is nothing to measure.
    """

    name: str
    heading: str
    unit: Literal["points", "characters", ""]
    better: Literal[1, -1]
    form: str
    measure: Callable[[State, MemorizedSequence], float | None]


def _acc(found: Sequence[Match]) -> float | None:
    return statistics.fmean(match.acc for match in found) if found else None


def _dist(found: Sequence[Match]) -> float | None:
    distances = [match.dist for match in found if match.dist is not None]
    return statistics.fmean(distances) if distances else None


METRICS = (
    Metric("self_acc", "Self-Acc", "points", -1, "+.1f", lambda s, target: s.forced(target).acc),
    Metric("self_dist", "Self-Dist", "characters", 1, "+.1f", lambda s, target: s.forced(target).dist),
    Metric("self_free_acc", "Free-Acc", "points", -1, "+.1f", lambda s, target: s.free(target).acc),
    Metric("self_free_dist", "", "characters", 1, "+.1f", lambda s, target: s.free(target).dist),
    Metric("neg_acc", "Neg-Acc", "points", 1, "+.1f", lambda s, target: _acc(s.negatives(target))),
    Metric("neg_dist", "Neg-Dist", "characters", -1, "+.1f", lambda s, target: _dist(s.negatives(target))),
    Metric("neg_related_acc", "", "points", 1, "+.1f", lambda s, target: _acc(s.related(target, True))),
    Metric("neg_related_dist", "", "characters", -1, "+.1f", lambda s, target: _dist(s.related(target, True))),
    Metric("neg_unrelated_acc", "", "points", 1, "+.1f", lambda s, target: _acc(s.related(target, False))),
    Metric("neg_unrelated_dist", "", "characters", -1, "+.1f", lambda s, target: _dist(s.related(target, False))),
    Metric("control_acc", "Ctrl-Acc", "points", 1, "+.1f", lambda s, target: _acc(s.controls())),
    Metric("control_dist", "", "characters", -1, "+.1f", lambda s, target: _dist(s.controls())),
    Metric("ppl", "PPL", "", -1, "+.1f", lambda s, target: s.perplexity),
)
"""The metrics of DEL: of the target (self), of other memorized sequences (neg), of controls, and of other text."""


PROMPT_METRICS = (
    Metric("self_cut_acc", "", "points", -1, "+.1f", lambda s, target: s.other_prompt(target, "cut")),
    Metric("self_perturbed_acc", "", "points", -1, "+.1f", lambda s, target: s.other_prompt(target, "perturbed")),
)
"""Of the target when it is generated from other prompts: recorded if a run asks for them."""


def measure(state: State, target: MemorizedSequence) -> dict[str, float]:
    """Return every metric of a target that there is something to measure for."""
    metrics = (*METRICS, *PROMPT_METRICS) if state.material.prompts else METRICS
    values = {metric.name: metric.measure(state, target) for metric in metrics}
    return {name: value for name, value in values.items() if value is not None}


def sample(state: State, target: MemorizedSequence) -> Record:
    """Return what a reader may want to see of a target: lists of a number for every token of its suffix."""
    return {
        "probabilities": [round(value, 4) for value in state.probabilities(target)],
        "written": state.written(target),
    }


def text_interval(material: Material) -> TextPerplexity:
    """Return the perplexity of the text with its 95% confidence interval over rows."""
    assert material.text is not None
    interval = mean_interval(row_losses(material.model, material.text, material.batch, material.prefix).tolist())
    return {
        "tokens": material.text.numel(),
        "mean": math.exp(interval["mean"]),
        "low": math.exp(interval["low"]),
        "high": math.exp(interval["high"]),
    }
