"""Ways of forgetting that can be put side by side: sets of components, training of the whole model, training anew.

A way is a function of what is to be forgotten that gives, while its context is open, a model that has forgotten it. A
new one is a function and a line in `WAYS`.

1. Sets: `choose` adds smallest sets until no sequence is extracted by any prompt, whatever it costs; their weights are
   set to zero, so that they can learn again.
2. Random neurons: in every layer as many as iterative gradients drop.
3. Training: gradient ascent and NPO (`memloc_lens.erase.baselines`), which retain the context.
4. `retrained`: a model that was trained without the sequences.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from memloc_lens.components import HEADS, ComponentName, ComponentSet, component_of
from memloc_lens.erase.baselines import Unlearning, gradient_ascent, npo
from memloc_lens.erase.choosing import choose
from memloc_lens.erase.damage import Budget, Spared
from memloc_lens.erase.erasing import PRESETS
from memloc_lens.erase.localizing import localize
from memloc_lens.erase.training import restored
from memloc_lens.library_types import HookedModel
from memloc_lens.runs.methods import configured, resolve
from memloc_lens.sequence import MemorizedSequence
from memloc_lens.smallest_set import Until

ITERATIVE = "protect-iterative-gradient"
"""The method that erasing uses."""
ANY = Budget(max_ppl_rise=1e9, max_neg_loss=100)
"""A budget that allows everything."""


@dataclass(frozen=True)
class Task:
    """What is to be forgotten, and how.

    Args:
        model: that has memorized the sequences; ways that change it restore it.
        targets: to be forgotten.
        context: other text, that some ways read or retain; disjoint from all that is measured.
        until: the criterion of extraction.
        limit: of the criterion.
        first_layer: layers before it are left alone.
        work: folder that keeps scores.
        retrained: a model that was trained without the targets, if there is one.
        batch: maximum number of sequences at a time.
        seed: of what is drawn.
        sets: components that were chosen so far, by way.
    """

    model: HookedModel
    targets: Sequence[MemorizedSequence]
    context: Sequence[MemorizedSequence]
    work: Path
    until: Until = "unextractable"
    limit: float | None = None
    first_layer: int = 1
    retrained: HookedModel | None = None
    batch: int = 16
    seed: int = 0
    sets: dict[str, ComponentSet] = field(default_factory=dict)


@dataclass(frozen=True)
class Forgotten:
    """A model that was made to forget.

    Args:
        model: while the context is open.
        what: components that were dropped, or steps of training.
        seconds: that it took, localization included; None if that is not known.
    """

    model: HookedModel
    what: str
    seconds: float | None


Way = Callable[[Task], AbstractContextManager[Forgotten]]


@contextmanager
def zeroed(model: HookedModel, components: ComponentSet) -> Iterator[None]:
    """Set the weights by which components write to zero, and restore every parameter on leaving.

    Unlike components that `ablate` switches off, they can be trained again.

    Example:
        >>> neurons = top_neurons(Activations()(model, sequence), 0.1)
        >>> with zeroed(model, neurons), torch.no_grad():
        ...     changed = model(sequence.tokens)
        >>> with ablate(model, neurons), torch.no_grad():
        ...     torch.allclose(model(sequence.tokens), changed, atol=1e-4)
        True
    """
    with restored(model):
        for layer, block in enumerate(model.blocks):
            writing = block.attn.W_O if components.component is HEADS else block.mlp.W_out
            writing.data[components.layer(layer).to(writing.device)] = 0
        yield


def chosen(task: Task, method: str, component: ComponentName) -> ComponentSet:
    """Return the set without which no sequence is extracted, whatever it costs."""
    kind = component_of(component)
    localizer = resolve(method, PRESETS.get(component))
    localizer = configured(localizer, component, task.context, first_layer=task.first_layer, scope="global")
    erasure = choose(
        task.model,
        task.targets,
        localize(task.work, task.model, task.targets, localizer, kind, task.batch),
        Spared(),
        ANY,
        until=task.until,
        limit=task.limit,
        first_layer=task.first_layer,
        scope="global",
        component=kind,
        batch=task.batch,
        progress=True,
    )
    return erasure.components


@contextmanager
def by_set(task: Task, method: str, component: ComponentName) -> Iterator[Forgotten]:
    """Forget by a chosen set of components."""
    started = time.perf_counter()
    components = task.sets[f"{method} {component}"] = chosen(task, method, component)
    with zeroed(task.model, components):
        yield _dropped(task, components, time.perf_counter() - started)


@contextmanager
def at_random(task: Task) -> Iterator[Forgotten]:
    """Drop in every layer as many neurons at random as iterative gradients chose."""
    located = task.sets.get(f"{ITERATIVE} neuron") or chosen(task, ITERATIVE, "neuron")
    started = time.perf_counter()
    draw = torch.Generator().manual_seed(task.seed)
    order = torch.stack([torch.randperm(located.shape[1], generator=draw, device="cpu") for _ in located.members])
    components = ComponentSet(order < torch.tensor(located.counts(), device="cpu")[:, None], located.component)
    with zeroed(task.model, components):
        yield _dropped(task, components, time.perf_counter() - started)


def _dropped(task: Task, components: ComponentSet, seconds: float) -> Forgotten:
    return Forgotten(task.model, f"{len(components)} {components.component.plural}", seconds)


@contextmanager
def by_training(task: Task, unlearn: Callable[..., AbstractContextManager]) -> Iterator[Forgotten]:
    """Forget by training the whole model until no target is extracted.

    Raises:
        ValueError: if there is no context to retain.
    """
    if not task.context:
        raise ValueError("training needs texts to retain, and the context is empty; give --context")
    started = time.perf_counter()
    settings = Unlearning(seed=task.seed, until=task.until, limit=task.limit)
    with unlearn(task.model, task.targets, task.context, settings) as unlearned:
        yield Forgotten(task.model, f"{unlearned.steps} steps", time.perf_counter() - started)


@contextmanager
def anew(task: Task) -> Iterator[Forgotten]:
    """Give the model that was trained without the targets.

    Raises:
        ValueError: if there is none.
    """
    if task.retrained is None:
        raise ValueError("no model was trained without the targets; give it as --retrained, or leave the way out")
    yield Forgotten(task.retrained, "all weights", None)


WAYS: Mapping[str, Way] = {
    "iterative-weights": partial(by_set, method=ITERATIVE, component="weight"),
    "iterative-neurons": partial(by_set, method=ITERATIVE, component="neuron"),
    "drop-mask": partial(by_set, method="drop-mask", component="neuron"),
    "hard-concrete": partial(by_set, method="hard-concrete", component="neuron"),
    "random-neurons": at_random,
    "gradient-ascent": partial(by_training, unlearn=gradient_ascent),
    "npo": partial(by_training, unlearn=npo),
    "retrained": anew,
}
"""The ways by name."""
