"""Switch components off, or scale them, while a context is open.

Everything here acts in the forward pass, at every position: neurons at ``blocks.{layer}.mlp.hook_post``, just before
`W_out`; heads at ``blocks.{layer}.attn.hook_z``; single weights of `W_out` by what the MLP writes. The weights are
never touched, and closing the context removes the hooks.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from memloc_lens.checks import check_choice, check_model, check_not_compiled, check_number, described
from memloc_lens.components import HEADS, NEURONS, Component, ComponentSet, Edit, check_component
from memloc_lens.devices import device_of
from memloc_lens.isolation import isolated
from memloc_lens.library_types import HookedModel
from memloc_lens.logits import at_least_float32
from memloc_lens.sequence import MemorizedSequence, check_sequences, equal_length_batches
from memloc_lens.turns import turn

Ablation = Literal["zero", "mean", "scale"]


@contextmanager
def ablate(
    model: HookedModel,
    components: ComponentSet | Sequence[ComponentSet],
    kind: Ablation = "zero",
    *,
    over: Sequence[MemorizedSequence] | Float[Tensor, " layer *activation"] = (),
    factor: float = 0.5,
) -> Iterator[None]:
    """Ablate neurons, heads or single weights at every position: in forward passes, gradients and generation.

    Contexts nest. An exception inside leaves the model as clean as a normal exit. Meanwhile other threads cannot work
    with the model.

    Args:
        model: its weights stay as they are.
        components: the set to ablate; or a list of sets of one kind, another one for each row of the batches that
            run inside.
        kind: set the components to zero, set activations to their mean over the text `over`, or multiply by `factor`.
        over: for `"mean"` alone: sequences whose positions the mean is taken over, or the result of
            `mean_activations` for them.
        factor: for `"scale"` alone.

    Raises:
        ValueError: if the components have another model's shape, the kind is unknown, `"mean"` is asked for without
            text or for single weights, or the model is compiled.

    Example:
        >>> neurons = top_neurons(Activations()(model, sequence), ratio=0.05, first_layer=1)
        >>> with ablate(model, neurons):
        ...     tokens = model.generate(sequence.prompt, max_new_tokens=8, verbose=False)
    """
    check_not_compiled(model)
    check_model(model)
    check_choice("kind", kind, get_args(Ablation))
    check_number("factor", factor)
    sets = [components] if isinstance(components, ComponentSet) else components
    component = _common_component(model, sets)
    means = _means(model, over, component) if kind == "mean" else None
    zero = torch.zeros((), device="cpu")
    edits: dict[int, Edit] = {}
    for layer in range(model.cfg.n_layers):
        rows = [members.layer(layer).to(device_of(model.blocks[layer])) for members in sets]
        if any(row.any() for row in rows):
            members = component.aligned(rows[0] if isinstance(components, ComponentSet) else torch.stack(rows))
            if kind == "scale":
                edits[layer] = partial(_scaled, torch.where(members, factor, 1.0))
            else:
                edits[layer] = partial(_replaced, members, zero if means is None else means[layer])
    with turn(model, context=True), component.edited(model, edits), _seen_by_compiled_code(model):
        yield


def _common_component(model: HookedModel, sets: Sequence[ComponentSet]) -> Component:
    if not isinstance(sets, list | tuple) or not sets or not all(isinstance(item, ComponentSet) for item in sets):
        raise ValueError(
            f"the components are {described(sets)}; give a set such as top_neurons(scores, ratio) returns, or a list "
            "of them"
        )
    component = sets[0].component
    for item in sets:
        if item.component is not component:
            raise ValueError(f"sets of {component.plural} and {item.component.plural} cannot be ablated in one list")
        component.check_shape(model, item.shape)
    return component


@contextmanager
def mask(model: HookedModel, values: Float[Tensor, "*row layer neuron"], first_layer: int = 0) -> Iterator[None]:
    """Multiply the neurons' activations by a mask at every position; see `Component.masked` for other components.

    Args:
        model: its weights stay as they are.
        values: one factor a neuron; with a row dimension, another mask for each row of the input. Layers are counted
            from `first_layer`. Gradients reach it.
        first_layer: layers before it are left alone.

    Raises:
        ValueError: if the mask has another model's shape, or the model is compiled.

    Example:
        >>> with mask(model, torch.ones(6, 768)):
        ...     loss = model(sequence.tokens, return_type="loss")
    """
    check_not_compiled(model)
    with (
        turn(check_model(model), context=True),
        NEURONS.masked(model, values, first_layer),
        _seen_by_compiled_code(model),
    ):
        yield


@contextmanager
def _seen_by_compiled_code(model: HookedModel) -> Iterator[None]:
    """Let what `torch.compile` made of the model be compiled again, since it does not see new hooks."""
    _forget_compiled_code(model)
    try:
        yield
    finally:
        _forget_compiled_code(model)


def _forget_compiled_code(model: HookedModel) -> None:
    """Drop what `torch.compile` keeps of the model's forward pass, if anything."""
    if "torch._dynamo.eval_frame" not in sys.modules:  # it takes a second to import, and nothing compiles without it
        return
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    if _debug_get_cache_entry_list(type(model).forward.__code__):
        torch.compiler.reset()


def _means(model: HookedModel, over: Any, component: Component) -> Float[Tensor, " layer *activation"]:
    _check_has_activations(component)
    if not isinstance(over, Tensor):
        return mean_activations(model, over, component)
    expected = [*component.shape(model), *([model.cfg.d_head] if component is HEADS else [])]
    if list(over.shape) != expected:
        raise ValueError(
            f"means of shape {list(over.shape)} do not fit the {component.plural} of {model.cfg.model_name}, which "
            f"need {expected}; give what mean_activations returns for them"
        )
    return over


@torch.no_grad()
def mean_activations(
    model: HookedModel, sequences: Sequence[MemorizedSequence], component: Component = NEURONS
) -> Float[Tensor, " layer *activation"]:
    """Average the activations over all positions of the sequences.

    Returns:
        [layer, neuron]; for heads [layer, head, d_head].

    Raises:
        ValueError: if there are no sequences, or for single weights, which have no activations.

    Example:
        >>> mean_activations(model, [sequence]).shape
        torch.Size([6, 768])
    """
    model = check_model(model)
    _check_has_activations(component)
    if isinstance(sequences, list | tuple) and not sequences:
        raise ValueError("a mean ablation needs the text to take the mean over: ablate(..., 'mean', over=sequences)")
    sequences = check_sequences(model, sequences)
    names = [component.activations_at(layer) for layer in range(model.cfg.n_layers)]
    total: Tensor | float = 0.0
    with isolated(model):
        for _, batch in equal_length_batches(sequences, size=16):
            _, cache = model.run_with_cache(batch.tokens.to(model.cfg.device), return_type=None, names_filter=names)
            sums = (at_least_float32(component.read(model, cache[name])).sum(dim=(0, 1)) for name in names)
            total = total + torch.stack([values.to(model.cfg.device) for values in sums])
    assert isinstance(total, Tensor)
    return total / sum(len(sequence.tokens) for sequence in sequences)


def _check_has_activations(component: Component) -> None:
    check_component(component)
    if not component.hook_point:
        raise ValueError(f"{component.plural} have no activations to take a mean of; set them to zero, or scale them")


def _replaced(members: Tensor, value: Tensor, activations: Tensor) -> Tensor:
    return torch.where(members.to(activations.device), value.to(activations), activations)


def _scaled(factors: Tensor, activations: Tensor) -> Tensor:
    return activations * factors.to(activations)
