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

from memloc_lens.checks import check_model, check_number
from memloc_lens.erase.criteria import extracted
from memloc_lens.erase.extraction import recitations
from memloc_lens.erase.losses import token_losses, whole
from memloc_lens.erase.training import adamw_steps, in_turn, restored, trainable
from memloc_lens.erase.variants import Prompts, prompts_of
from memloc_lens.library_types import HookedModel
from memloc_lens.sequence import MemorizedSequence, check_sequences
from memloc_lens.smallest_set import Recitation, Until, check_until

BATCH = 8
"""Texts to retain in a step."""


@dataclass(frozen=True)
class Unlearning:
    """How a model is trained to forget.

    Args:
        lr: learning rate of AdamW; a larger one takes fewer steps, and costs more.
        max_steps: maximum number of steps.
        weight: of the loss of the texts to retain.
        seed: of their order. Everything else is deterministic.
        until: what must be below the limit with every prompt: see `memloc_lens.erase.criteria`.
        limit: in tokens, in points, or a probability. Default: half of the suffix, rounded up; 50 points; 0.1.
    """

    lr: float = 3e-5
    max_steps: int = 100
    weight: float = 1.0
    seed: int = 0
    until: Until = "unextractable"
    limit: float | None = None

    def __post_init__(self) -> None:
        check_number("lr", self.lr, above=0)
        check_number("max_steps", self.max_steps, least=1, whole=True)
        check_number("weight", self.weight, least=0)
        check_number("seed", self.seed, least=0, whole=True)
        check_until(self.until, self.limit)


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
    model: HookedModel,
    targets: Sequence[MemorizedSequence],
    retain: Sequence[MemorizedSequence],
    settings: Unlearning = Unlearning(),
) -> Iterator[Unlearned]:
    """Unlearn targets by raising their loss, while the context is open; see the module for the formula.

    On leaving, also by an exception or Ctrl-C, every parameter is restored bit for bit. Meanwhile other threads cannot
    work with the model.

    Args:
        model: all its weights change, in place.
        targets: to be made unextractable.
        retain: texts whose loss is kept low; nothing of them should be measured later.
        settings: of the training.

    Raises:
        ValueError: if there are no targets or no texts, the model cannot read one, or the loss becomes NaN or infinite.

    Example:
        >>> from memloc_lens import load_sequences
        >>> settings = Unlearning(max_steps=1, until="greedy")
        >>> with gradient_ascent(model, [sequence], load_sequences(model)[10:18], settings) as unlearned:
        ...     unlearned.steps, unlearned.left[0].prefix <= 48
        (1, True)
    """

    def forget(losses: list[Float[Tensor, " _"]]) -> Float[Tensor, ""]:
        return -torch.stack([each.mean() for each in losses]).mean()

    with _unlearned(model, targets, retain, lambda _: forget, settings) as unlearned:
        yield unlearned


@contextmanager
def npo(
    model: HookedModel,
    targets: Sequence[MemorizedSequence],
    retain: Sequence[MemorizedSequence],
    settings: Unlearning = Unlearning(),
    beta: float = 0.1,
) -> Iterator[Unlearned]:
    """Unlearn targets by negative preference optimization, while the context is open; see the module for the formula.

    Args:
        model: as for `gradient_ascent`, as everything else.
        targets: to be made unextractable.
        retain: texts whose loss is kept low.
        settings: of the training.
        beta: inverse temperature; towards 0, NPO becomes gradient ascent.

    Raises:
        ValueError: as for `gradient_ascent`.

    Example:
        >>> from memloc_lens import load_sequences
        >>> settings = Unlearning(max_steps=1, until="greedy")
        >>> with npo(model, [sequence], load_sequences(model)[10:18], settings) as unlearned:
        ...     unlearned.steps
        1
    """
    check_number("beta", beta, above=0)

    def forget_from(reference: list[Float[Tensor, " _"]]) -> Forget:
        before = torch.stack([-each.sum() for each in reference]).detach()
        return lambda losses: npo_loss(torch.stack([-each.sum() for each in losses]), before, beta)

    with _unlearned(model, targets, retain, forget_from, settings) as unlearned:
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
    model: HookedModel,
    targets: Sequence[MemorizedSequence],
    retain: Sequence[MemorizedSequence],
    forget_from: Callable[[list[Float[Tensor, " _"]]], Forget],
    settings: Unlearning,
) -> Iterator[Unlearned]:
    model = check_model(model)
    targets, texts = check_sequences(model, targets), [whole(text) for text in check_sequences(model, retain)]
    if not targets or not texts:
        raise ValueError(
            f"there are {len(targets)} targets and {len(texts)} texts to retain; give at least one of each"
        )
    with restored(model):
        steps = _train(model, targets, texts, forget_from, settings)
        left = recitations(model, targets)  # in the model's own precision
        yield Unlearned(steps, not _any_extracted(model, prompts_of(model, targets), settings), left)


def _train(
    model: HookedModel,
    targets: list[MemorizedSequence],
    texts: list[MemorizedSequence],
    forget_from: Callable[[list[Float[Tensor, " _"]]], Forget],
    settings: Unlearning,
) -> int:
    """Train in place, and return the number of steps."""
    chosen, prompts = in_turn(len(texts), BATCH, settings.seed), prompts_of(model, targets)
    with trainable(model) as parameters:
        with torch.no_grad():
            forget = forget_from(token_losses(model, targets))

        def loss_at(step: int) -> Tensor:
            retained = torch.cat(token_losses(model, [texts[index] for index in chosen(step)])).mean()
            return forget(token_losses(model, targets)) + settings.weight * retained

        for step in adamw_steps(parameters, loss_at, settings.lr):
            if step == settings.max_steps or not _any_extracted(model, prompts, settings):
                break
    return step


def _any_extracted(model: HookedModel, prompts: Prompts, settings: Unlearning) -> bool:
    """Ask with the targets' own prompts first, and without generating: while one is extracted, no more is asked."""
    quick: Until = "greedy" if settings.until == "unextractable" else settings.until
    return any(extracted(model, {"own": prompts["own"]}, quick, settings.limit)) or any(
        extracted(model, prompts, settings.until, settings.limit)
    )
