"""Unlearning by training the whole model, to stand beside sets of components: gradient ascent and NPO.

With L(s) the mean loss of the suffix of s, and R the mean loss of a batch of the texts to retain, over all tokens but
their first, each step of AdamW lowers

1. gradient ascent: -mean L(target) + w R
2. NPO: -2/beta mean log sigmoid(-beta log(p(suffix) / p_ref(suffix))) + w R, where p is the probability of a target's
   whole suffix after its prompt, and p_ref that of the model before the first step. Zhang et al. (2024), "Negative
   preference optimization". Before the first step the first part is 2/beta log 2; its gradient is that of gradient
   ascent on the sum of the losses, and fades as a target becomes improbable.

Training ends when no target is extracted by any prompt variant, as for sets of components.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformer_lens import HookedTransformer

from memloc_lens.checks import check_model, check_number
from memloc_lens.erase.criteria import left_of
from memloc_lens.erase.extraction import recitations
from memloc_lens.erase.losses import token_losses, whole
from memloc_lens.erase.training import adamw_steps, in_turn, restored, trainable
from memloc_lens.erase.variants import Prompts, prompts_of
from memloc_lens.sequence import MemorizedSequence, check_sequences
from memloc_lens.smallest_set import Recitation, limit_of

BATCH = 8
"""Texts to retain in a step."""

Forget = Callable[[list[Float[Tensor, " _"]]], Float[Tensor, ""]]
"""The loss of forgetting, from the losses of the tokens of every target."""


@dataclass(frozen=True)
class Unlearned:
    """The result of unlearning by training.

    Args:
        steps: number of steps taken.
        succeeded: whether no target is extracted by any prompt variant.
        left: what is recited of each target.
    """

    steps: int
    succeeded: bool
    left: list[Recitation]


@contextmanager
def gradient_ascent(
    model: HookedTransformer,
    targets: Sequence[MemorizedSequence],
    retain: Sequence[MemorizedSequence],
    lr: float = 3e-5,
    max_steps: int = 100,
    weight: float = 1.0,
    seed: int = 0,
) -> Iterator[Unlearned]:
    """Unlearn targets by raising their loss, while the context is open; see the module for the formula.

    On leaving, also by an exception or Ctrl-C, every parameter is restored bit for bit. Meanwhile other threads cannot
    work with the model.

    Args:
        model: all its weights change, in place.
        targets: to be made unextractable: half of each suffix, rounded up, is the limit of what may be recited.
        retain: texts whose loss is kept low; nothing of them should be measured later.
        lr: learning rate of AdamW; a larger one takes fewer steps, and costs more.
        max_steps: maximum number of steps.
        weight: of the loss of the texts to retain.
        seed: of their order. Everything else is deterministic.

    Raises:
        ValueError: if there are no targets or no texts, the model cannot read one, a setting is out of range, or the
            loss becomes NaN or infinite.

    Example:
        >>> from memloc_lens import load_sequences
        >>> with gradient_ascent(model, [sequence], load_sequences(model)[10:18], max_steps=1) as unlearned:
        ...     unlearned.steps, unlearned.left[0].prefix <= 48
        (1, True)
    """

    def forget(losses: list[Float[Tensor, " _"]]) -> Float[Tensor, ""]:
        return -torch.stack([each.mean() for each in losses]).mean()

    with _unlearned(model, targets, retain, lambda _: forget, lr, max_steps, weight, seed) as unlearned:
        yield unlearned


@contextmanager
def npo(
    model: HookedTransformer,
    targets: Sequence[MemorizedSequence],
    retain: Sequence[MemorizedSequence],
    lr: float = 3e-5,
    max_steps: int = 100,
    weight: float = 1.0,
    seed: int = 0,
    beta: float = 0.1,
) -> Iterator[Unlearned]:
    """Unlearn targets by negative preference optimization, while the context is open; see the module for the formula.

    Args:
        model: as for `gradient_ascent`, as everything else.
        targets: to be made unextractable.
        retain: texts whose loss is kept low.
        lr: learning rate of AdamW.
        max_steps: maximum number of steps.
        weight: of the loss of the texts to retain.
        seed: of their order.
        beta: inverse temperature; towards 0, NPO becomes gradient ascent.

    Raises:
        ValueError: as for `gradient_ascent`.

    Example:
        >>> from memloc_lens import load_sequences
        >>> with npo(model, [sequence], load_sequences(model)[10:18], max_steps=1) as unlearned:
        ...     unlearned.steps
        1
    """
    check_number("beta", beta, above=0)

    def forget_from(reference: list[Float[Tensor, " _"]]) -> Forget:
        before = torch.stack([-each.sum() for each in reference]).detach()
        return lambda losses: npo_loss(torch.stack([-each.sum() for each in losses]), before, beta)

    with _unlearned(model, targets, retain, forget_from, lr, max_steps, weight, seed) as unlearned:
        yield unlearned


def npo_loss(
    log_probs: Float[Tensor, " target"], reference: Float[Tensor, " target"], beta: float = 0.1
) -> Float[Tensor, ""]:
    """Return -2/beta mean log sigmoid(-beta (log p - log p_ref)).

    Args:
        log_probs: of each target's whole suffix.
        reference: the same of the model before the first step.
        beta: inverse temperature.

    Example:
        >>> round(npo_loss(torch.tensor([-3.0]), torch.tensor([-3.0])).item(), 3)  # 20 log 2
        13.863
    """
    return -2 / beta * logsigmoid(-beta * (log_probs - reference)).mean()


@contextmanager
def _unlearned(
    model: HookedTransformer,
    targets: Sequence[MemorizedSequence],
    retain: Sequence[MemorizedSequence],
    forget_from: Callable[[list[Float[Tensor, " _"]]], Forget],
    lr: float,
    max_steps: int,
    weight: float,
    seed: int,
) -> Iterator[Unlearned]:
    model = check_model(model)
    targets, texts = check_sequences(model, targets), [whole(text) for text in check_sequences(model, retain)]
    if not targets or not texts:
        raise ValueError(
            f"there are {len(targets)} targets and {len(texts)} texts to retain; give at least one of each"
        )
    check_number("lr", lr, above=0)
    check_number("max_steps", max_steps, least=1, whole=True)
    check_number("weight", weight, least=0)
    check_number("seed", seed, least=0, whole=True)
    with restored(model):
        steps = _train(model, targets, texts, forget_from, lr, max_steps, weight, seed)
        left = recitations(model, targets)  # in the model's own precision
        yield Unlearned(steps, not _any_extracted(model, targets, prompts_of(model, targets)), left)


def _train(
    model: HookedTransformer,
    targets: list[MemorizedSequence],
    texts: list[MemorizedSequence],
    forget_from: Callable[[list[Float[Tensor, " _"]]], Forget],
    lr: float,
    max_steps: int,
    weight: float,
    seed: int,
) -> int:
    """Train in place, and return the number of steps."""
    chosen, prompts = in_turn(len(texts), BATCH, seed), prompts_of(model, targets)
    with trainable(model) as parameters:
        with torch.no_grad():
            forget = forget_from(token_losses(model, targets))

        def loss_at(step: int) -> Tensor:
            retained = torch.cat(token_losses(model, [texts[index] for index in chosen(step)])).mean()
            return forget(token_losses(model, targets)) + weight * retained

        for step in adamw_steps(parameters, loss_at, lr):
            if step == max_steps or not _any_extracted(model, targets, prompts):
                break
    return step


def _any_extracted(model: HookedTransformer, targets: list[MemorizedSequence], prompts: Prompts) -> bool:
    """Ask with the targets' own prompts first, which takes one pass, and generate only if none of them extracts."""
    limits = [limit_of("unextractable", None, len(target.suffix)) for target in targets]
    if any(each.prefix >= limit for each, limit in zip(recitations(model, targets), limits, strict=True)):
        return True
    return any(max(left.values()) >= limit for left, limit in zip(left_of(model, prompts), limits, strict=True))
