"""How many steps of fine-tuning bring a text back? A hidden text comes back sooner than a new one is learned.

A lesson is what the model is trained on, and which part of the text is watched meanwhile:

1. `itself`: the whole text; watched is its suffix.
2. `half`: the first half of the text; watched is the rest, which training does not show.
3. `related`: other texts, of the same subjects; watched is the suffix. Nothing of the text is shown.

The same lessons with text that the model has never seen tell how many steps a new text takes.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

import torch
from torch.nn.functional import cross_entropy

from memloc_lens.checks import check_model, check_number
from memloc_lens.erase.losses import token_losses, whole
from memloc_lens.erase.training import adamw_steps, in_turn, restored, trainable
from memloc_lens.forward import final_residual
from memloc_lens.library_types import HookedModel
from memloc_lens.logits import at_least_float32, target_logits
from memloc_lens.sequence import Batch, MemorizedSequence, check_sequences
from memloc_lens.smallest_set import limit_of, recitation_of


class Point(TypedDict):
    """What is left of a text after some steps: tokens before the first mistake, and mean loss in nats."""

    step: int
    prefix: int
    loss: float


class Relearned(TypedDict):
    """How a text comes back.

    Args:
        steps: number of steps after which it can be extracted; None if it cannot within `max_steps`.
        max_steps: number of steps that were tried.
        limit: tokens that greedy decoding must get right before its first mistake.
        curve: from before the first step on.
    """

    steps: int | None
    max_steps: int
    limit: int
    curve: list[Point]


class Resurfacing(TypedDict):
    """How many times as many steps a new text takes; `bound` says whether the ratio is known or only bounded."""

    ratio: float | None
    bound: Literal["exact", "at least", "at most", "unknown"]


@dataclass(frozen=True)
class Relearning:
    """Fine-tune a model on texts until a sequence can be extracted; the model is restored bit for bit afterwards.

    All weights are trained by AdamW (weight decay 0.01) at a constant learning rate, on the mean loss of all tokens of
    the texts but their first. Weights in half precision are trained in float32.

    Args:
        lr: learning rate.
        max_steps: number of steps after which it is given up.
        every: steps between two looks at the sequence.
        batch: number of texts in a step; with more texts, they take turns.
        seed: of their order. Everything else is deterministic.

    Example:
        >>> from memloc_lens import load_sequences
        >>> new = load_sequences(model, split="control")[0]
        >>> relearned = Relearning(lr=1e-3, max_steps=3)(model, new, [new])
        >>> relearned["steps"] is None, [point["step"] for point in relearned["curve"]]
        (True, [0, 1, 2, 3])
    """

    lr: float = 1e-4
    max_steps: int = 100
    every: int = 1
    batch: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("lr", self.lr, above=0)
        for name in ("max_steps", "every", "batch"):
            check_number(name, getattr(self, name), least=1, whole=True)
        check_number("seed", self.seed, least=0, whole=True)

    def __call__(self, model: HookedModel, watched: MemorizedSequence, texts: Sequence[MemorizedSequence]) -> Relearned:
        """Train on the texts until half of the watched suffix, rounded up, is recited.

        Args:
            model: trained in place and restored. An ablation that is open stays so: what is switched off cannot learn.
            watched: prompt and suffix.
            texts: to train on, at least one.

        Raises:
            ValueError: if the model cannot read a text, there is none, or a loss becomes NaN or infinite.
        """
        model = check_model(model)
        check_sequences(model, watched)
        texts = [whole(text) for text in check_sequences(model, texts)]
        if not texts:
            raise ValueError("texts is empty; give at least one text to train on")
        limit, chosen = int(limit_of("greedy", None, len(watched.suffix))), in_turn(len(texts), self.batch, self.seed)
        curve: list[Point] = []
        with restored(model), trainable(model) as parameters:

            def loss_at(step: int) -> torch.Tensor:
                return torch.cat(token_losses(model, [texts[index] for index in chosen(step)])).mean()

            for step in adamw_steps(parameters, loss_at, self.lr):
                if step % self.every == 0 or step == self.max_steps:
                    curve.append(_point(model, watched, step))
                if step == self.max_steps or curve[-1]["prefix"] >= limit:
                    break
        reached = curve[-1]["prefix"] >= limit
        return Relearned(
            steps=curve[-1]["step"] if reached else None, max_steps=self.max_steps, limit=limit, curve=curve
        )


@torch.no_grad()
def _point(model: HookedModel, watched: MemorizedSequence, step: int) -> Point:
    batch = Batch(watched.tokens[None], watched.prompt_len).to(model.cfg.device)
    logits = at_least_float32(target_logits(model, final_residual(model, batch), batch))[0]
    loss = cross_entropy(logits, batch.suffix[0].to(logits.device)).item()
    return Point(step=step, prefix=recitation_of(logits, watched).prefix, loss=loss)


Lesson = Callable[[MemorizedSequence, Sequence[MemorizedSequence]], tuple[MemorizedSequence, list[MemorizedSequence]]]
"""From a text and those related to it: what is watched, and what is trained on."""


def _itself(
    text: MemorizedSequence, related: Sequence[MemorizedSequence]
) -> tuple[MemorizedSequence, list[MemorizedSequence]]:
    return text, [text]


def _half(
    text: MemorizedSequence, related: Sequence[MemorizedSequence]
) -> tuple[MemorizedSequence, list[MemorizedSequence]]:
    half = len(text.tokens) // 2
    rest = MemorizedSequence(text.tokens, max(half, text.prompt_len), text.id, text.category)
    return rest, [MemorizedSequence(text.tokens[:half], 1, text.id, text.category)] if half > 1 else []


def _related(
    text: MemorizedSequence, related: Sequence[MemorizedSequence]
) -> tuple[MemorizedSequence, list[MemorizedSequence]]:
    return text, list(related)


LESSONS: Mapping[str, Lesson] = {"itself": _itself, "half": _half, "related": _related}
"""The lessons by name."""


def relearn(
    relearning: Relearning, model: HookedModel, text: MemorizedSequence, related: Sequence[MemorizedSequence]
) -> dict[str, Relearned]:
    """Return for each lesson how a text comes back.

    Args:
        relearning: the settings.
        model: trained in place and restored after each lesson.
        text: erased, or new to the model.
        related: texts for the lesson `related`, which is left out if there are none.

    Example:
        >>> relearned = relearn(Relearning(max_steps=1), model, sequence, [])
        >>> {name: lesson["steps"] for name, lesson in relearned.items()}
        {'itself': 0, 'half': 0}
    """
    lessons = {name: lesson(text, related) for name, lesson in LESSONS.items()}
    return {name: relearning(model, watched, texts) for name, (watched, texts) in lessons.items() if texts}


def resurfacing(erased: Sequence[Relearned], new: Sequence[Relearned]) -> Resurfacing:
    """Return how many times as many steps a new text takes as an erased one, by their medians.

    1: the erased text is as hard to learn as a new one. Much more than 1: it was only hidden. A text that can be
    extracted without any step counts as one step. The median is the lower one of two in the middle. Where a median text
    is not learned within the steps that were tried, N, its steps are more than N, and the ratio is bounded: from below
    if that is so for new texts, from above if for erased ones, and unknown if for both.

    Args:
        erased: of one lesson, one a text.
        new: of the same lesson with texts that the model has never seen.

    Raises:
        ValueError: if there are none of either.

    Example:
        >>> soon, late = ({"steps": s, "max_steps": 100, "limit": 24, "curve": []} for s in (5, None))
        >>> resurfacing([soon], [late])
        {'ratio': 20.0, 'bound': 'at least'}
    """
    if not erased or not new:
        raise ValueError(f"there are {len(erased)} erased texts and {len(new)} new ones; give at least one of each")
    ours, theirs = median_steps(erased), median_steps(new)
    if ours == theirs == math.inf:
        return Resurfacing(ratio=None, bound="unknown")
    if ours == math.inf:
        return Resurfacing(ratio=theirs / min(each["max_steps"] for each in erased), bound="at most")
    if theirs == math.inf:
        return Resurfacing(ratio=min(each["max_steps"] for each in new) / ours, bound="at least")
    return Resurfacing(ratio=theirs / ours, bound="exact")


def median_steps(relearned: Sequence[Relearned]) -> float:
    """Return the lower median of the steps, at least 1; infinity if the median text is not learned."""
    steps = (math.inf if each["steps"] is None else max(each["steps"], 1) for each in relearned)
    return statistics.median_low(steps)
