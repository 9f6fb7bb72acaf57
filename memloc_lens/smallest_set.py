"""The smallest set of components without which a sequence cannot be extracted: a budget for each sequence.

The scores of a localizer order the components, so that their top k, for k from 0 on, are nested sets. `smallest_set`
searches for the k at which extraction stops.

1. One forward pass tells what is left of the sequence without a set: see `Recitation`.
2. k is doubled until the sequence cannot be extracted; bisection then narrows k down.

Extraction need not be monotone in k: dropping more can bring a token back. So the result is a boundary, with the top k
it cannot be extracted and with the top k - 1 it can, both measured. A smaller set may do it as well; only a scan of
all k could tell. Doubling from below makes it likely that the boundary is the first.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from memloc_lens.ablation import Ablation, ablate, mean_activations
from memloc_lens.bridge import stream_entering
from memloc_lens.checks import check_choice, check_model, check_number
from memloc_lens.components import NEURONS, Component, ComponentSet, Scope, top_components
from memloc_lens.forward import run_layers
from memloc_lens.isolation import isolated
from memloc_lens.library_types import HookedModel
from memloc_lens.logits import at_least_float32, target_logits
from memloc_lens.sequence import Batch, MemorizedSequence, check_sequences

Until = Literal["unextractable", "greedy", "accuracy", "sampled"]


@dataclass(frozen=True)
class Recitation:
    """What a model recites of a suffix; one forward pass over the true text gives all of it.

    Args:
        prefix: number of tokens that greedy decoding gets right before its first mistake. Up to there it reads what
            teacher forcing reads, so that the first mistake of both is the same.
        accuracy: share of the tokens that are predicted right when teacher-forced, in points.
        probability: that at least one of n samples at temperature 1 is the exact suffix: 1 - (1 - p)^n, where p is the
            product of the probabilities of its tokens. Hayes et al. (2025), "Measuring memorization in language models
            via probabilistic extraction".
        strength: share of the suffix that greedy decoding recites to its end once the tokens before it are given: of n
            tokens, 1 - k/n for the fewest k that must be given. From k on, teacher forcing makes no mistake. 1: the
            prompt is enough; 0: the last token is not predicted. Dorna et al. (2025), "OpenUnlearning".
    """

    prefix: int
    accuracy: float
    probability: float
    strength: float


MEASURES: dict[str, Callable[[Recitation], float]] = {
    "unextractable": lambda left: left.prefix,
    "greedy": lambda left: left.prefix,
    "accuracy": lambda left: left.accuracy,
    "sampled": lambda left: left.probability,
}
"""What each `until` compares with its limit: the sequence can be extracted if it is at least the limit."""


@dataclass(frozen=True)
class SmallestSet:
    """A boundary of extraction among the nested sets.

    Args:
        components: without which the sequence cannot be extracted.
        ratio: their share of each layer from the first on, or of all these layers together.
        left: what the model recites without them.
        with_one_fewer: what it recites without one component fewer (of every layer, or of all together), where the
            sequence can be extracted. None for the empty set: the sequence cannot be extracted to begin with.
    """

    components: ComponentSet
    ratio: float
    left: Recitation
    with_one_fewer: Recitation | None


def smallest_set(
    model: HookedModel,
    sequence: MemorizedSequence,
    scores: Float[Tensor, " layer *unit"],
    until: Until = "unextractable",
    *,
    limit: float | None = None,
    samples: int = 1000,
    first_layer: int = 0,
    scope: Scope = "layer",
    component: Component = NEURONS,
    kind: Ablation = "zero",
    over: Sequence[MemorizedSequence] | Float[Tensor, " layer *activation"] = (),
) -> SmallestSet | None:
    """Return the fewest components without which a sequence cannot be extracted, by bisection over nested sets.

    Args:
        model: used as it is; its weights stay as they are.
        sequence: that is to become unextractable.
        scores: of the sequence, one a component: higher ones are dropped first.
        until: what must be below the limit: "greedy", or "unextractable", the number of tokens that greedy decoding
            gets right before its first mistake; "accuracy", the teacher-forced accuracy in points; "sampled", the
            probability that one of `samples` samples is the exact suffix.
        limit: in tokens, in points, or a probability. Default: half of the suffix, rounded up, since what breaks off
            later still gives most of it away; 50 points; 0.1.
        samples: number of samples for "sampled".
        first_layer: layers before it are left alone.
        scope: take the top k of every layer, or of all layers together.
        component: kind of the components.
        kind: of the ablation, as for `ablate`.
        over: for the ablation "mean", as for `ablate`.

    Returns:
        The set, its share, and what is left without it and with one component fewer. A sequence that cannot be
        extracted to begin with has the empty set. None if it can be extracted even without the largest set. See the
        module for what bisection finds where extraction is not monotone.

    Raises:
        ValueError: if the scores are not those of one sequence, a setting is out of range, or a loss is NaN.

    Example:
        >>> scores = Activations()(model, sequence)
        >>> found = smallest_set(model, sequence, scores, until="greedy", limit=8, first_layer=1)
        >>> found.left.prefix < 8 <= found.with_one_fewer.prefix
        True
        >>> found.components == top_neurons(scores, found.ratio, first_layer=1)
        True
    """
    model = check_model(model)
    if isinstance(sequence, list | tuple):
        raise ValueError(f"{len(sequence)} sequences were given; give one, with its scores")
    check_sequences(model, sequence)
    limit = limit_of(until, limit, len(sequence.suffix))
    check_number("samples", samples, least=1, whole=True)
    everything = top_components(scores, 1.0, first_layer, scope, component=component)  # checks them all
    component.check_shape(model, everything.shape)
    if kind == "mean" and not isinstance(over, Tensor):
        over = mean_activations(model, over, component)
    layers, *unit = everything.shape
    largest = math.prod(unit) * (1 if scope == "layer" else layers - first_layer)
    recite = _reciter(model, sequence, first_layer, samples)
    tried: dict[int, tuple[ComponentSet, Recitation]] = {}

    def extractable(count: int) -> bool:
        chosen = everything - everything
        if count:
            chosen = top_components(scores, count / largest, first_layer, scope, "nearest", component)
        with ablate(model, chosen, kind, over=over):
            tried[count] = chosen, recite()
        return MEASURES[until](tried[count][1]) >= limit

    count = _boundary(extractable, largest)
    if count is None:
        return None
    return SmallestSet(tried[count][0], count / largest, tried[count][1], tried[count - 1][1] if count else None)


def _boundary(extractable: Callable[[int], bool], largest: int) -> int | None:
    """Return a count that is not extractable, whose predecessor is; 0 if 0 is not, None if the largest is."""
    if not extractable(0):
        return 0
    below, above = 0, 1
    while extractable(above):
        if above == largest:
            return None
        below, above = above, min(2 * above, largest)
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if extractable(middle) else (below, middle)
    return above


def _reciter(
    model: HookedModel, sequence: MemorizedSequence, first_layer: int, samples: int
) -> Callable[[], Recitation]:
    """Return a function that tells what the model recites now; layers before the first run once."""
    batch = Batch(sequence.tokens[None], sequence.prompt_len).to(model.cfg.device)
    with torch.no_grad(), isolated(model):
        entering = stream_entering(model, batch.tokens, first_layer)

    @torch.no_grad()
    def recite() -> Recitation:
        with isolated(model):
            residual = run_layers(model, entering, first_layer, batch.prompt_len)
            logits = at_least_float32(target_logits(model, residual, batch))[0]
        return recitation_of(logits, sequence, samples)

    return recite


def recitation_of(
    logits: Float[Tensor, "suffix d_vocab"], sequence: MemorizedSequence, samples: int = 1000
) -> Recitation:
    """Return what a model recites of a sequence, from the logits of a pass over its true text.

    Args:
        logits: at the target positions.
        sequence: prompt and suffix.
        samples: number of samples for the probability.

    Raises:
        ValueError: if the loss is NaN.

    Example:
        >>> logits = model(sequence.tokens)[0, sequence.prompt_len - 1 : -1]
        >>> recitation_of(logits, sequence).prefix
        48
    """
    suffix = sequence.suffix.to(logits.device)
    right = logits.argmax(dim=-1) == suffix
    loss = cross_entropy(logits, suffix, reduction="none").double().sum().item()
    if math.isnan(loss):
        raise ValueError(f"the loss of sequence {sequence.id!r} is nan; take a dtype with a wider range")
    return Recitation(
        prefix=int(right.long().cumprod(dim=0).sum()),
        accuracy=100 * right.double().mean().item(),
        probability=_of_any(math.exp(-loss), samples),
        strength=right.flip(0).long().cumprod(dim=0).double().mean().item(),
    )


def _of_any(probability: float, samples: int) -> float:
    """Return 1 - (1 - p)^n without loss of precision where p is small."""
    return 1.0 if probability >= 1 else -math.expm1(samples * math.log1p(-probability))


def limit_of(until: Until, limit: float | None, suffix_len: int) -> float:
    """Return the limit of `smallest_set` for a suffix, which may be the default.

    Raises:
        ValueError: if the limit cannot be one of `until`, or is longer than the suffix.

    Example:
        >>> limit_of("greedy", None, suffix_len=48), limit_of("accuracy", None, suffix_len=48)
        (24, 50.0)
    """
    check_until(until, limit)
    if until == "accuracy":
        return 50.0 if limit is None else limit
    if until == "sampled":
        return 0.1 if limit is None else limit
    if limit is not None and limit > suffix_len:
        raise ValueError(f"the limit is {limit} tokens and the suffix has {suffix_len}; it must be at most that")
    return (suffix_len + 1) // 2 if limit is None else limit


def check_until(until: object, limit: float | None) -> None:
    """Refuse what is no criterion of `smallest_set`, or a limit that cannot be one of it.

    Raises:
        ValueError: naming the criteria, or stating the limits of the limit.
    """
    check_choice("until", until, get_args(Until))
    if limit is None:
        return
    if until == "accuracy":
        check_number("the limit of the accuracy", limit, above=0, most=100)
    elif until == "sampled":
        check_number("the limit of the probability", limit, above=0, most=1)
    else:
        is_whole = isinstance(limit, float) and limit.is_integer()  # as a command line reads it
        check_number("the limit in tokens", int(limit) if is_whole else limit, least=1, whole=True)
