"""Kinds of model components.

A kind of component is a value of `Component`: a shape, and a way to edit every component of a layer in the forward
pass, which gives it a differentiable mask and an ablation:

* `NEURONS`  MLP neurons, [layer, neuron], the activations at `mlp.hook_post`;
* `HEADS`    attention heads, [layer, head], their outputs at `attn.hook_z`;
* `WEIGHTS`  single weights of `W_out`, [layer, neuron, d_model].

Scores, sets and masks of a kind have its shape. Another kind is one more entry of `COMPONENTS`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal
from weakref import WeakKeyDictionary

from jaxtyping import Float
from torch import Tensor, nn

from memloc_lens.bridge import per_head
from memloc_lens.checks import check_choice, check_first_layer, check_model, check_tensor, described
from memloc_lens.hooks import own
from memloc_lens.library_types import HookedModel, HookPoint

Edit = Callable[[Tensor], Tensor]
"""What to make of a layer's activations, or of its weights."""

Hook = Callable[[Tensor, HookPoint], Tensor | None]

ComponentName = Literal["neuron", "head", "weight"]


@dataclass(frozen=True)
class Component:
    """A kind of component: what it is called, how many there are, and how those of a layer are edited.

    Args:
        name: on the command line and in records.
        axes: names of the dimensions of its scores.
        shape: the sizes of these dimensions in a model.
        aligned: reshapes a layer's values, [unit] or [row, unit], so that they broadcast against what is edited.
        edited: opens a context in which the forward pass uses edited layers.
        hook_point: where a layer's activations of the components are; empty for those that have none.
    """

    name: ComponentName
    axes: str
    shape: Callable[[HookedModel], tuple[int, ...]]
    aligned: Callable[[Tensor], Tensor]
    edited: Callable[[HookedModel, Mapping[int, Edit]], AbstractContextManager[None]]
    hook_point: str = ""

    def activations_at(self, layer: int) -> str:
        """Return the full name of a layer's hook point."""
        return f"blocks.{layer}.{self.hook_point}"

    def read(self, model: HookedModel, cached: Float[Tensor, "row pos *unit"]) -> Float[Tensor, "row pos *unit"]:
        """Return what was cached at the hook point as [row, pos, neuron], or [row, pos, head, d_head]."""
        return per_head(model, cached) if self.name == "head" else cached

    @property
    def plural(self) -> str:
        """The name for several of them."""
        return f"{self.name}s"

    def masked(
        self, model: HookedModel, mask: Float[Tensor, "..."], first_layer: int = 0
    ) -> AbstractContextManager[None]:
        """Multiply every component by a mask, at all positions, while the context is open.

        Args:
            model: its weights stay as they are.
            mask: one factor a component, [layer, *unit]; or [row, layer, *unit], another mask for each row of the
                input. Its layers are counted from `first_layer`. Gradients reach it.
            first_layer: layers before it are left alone.

        Raises:
            ValueError: if the mask has another model's shape.

        Example:
            >>> with NEURONS.masked(model, torch.zeros(6, 768)):
            ...     loss = model(sequence.tokens, return_type="loss")
        """
        check_tensor("the mask", mask, self.axes)
        self.check_shape(model, mask.shape, first_layer)
        layers = mask.unbind(dim=-len(self.axes.split()))
        return self.edited(
            model, {first_layer + index: partial(_times, self.aligned(values)) for index, values in enumerate(layers)}
        )

    def check_shape(self, model: HookedModel, shape: Sequence[int], first_layer: int = 0) -> None:
        """Refuse a shape, of one row or of many, that is not the model's.

        Raises:
            ValueError: stating both shapes.
        """
        check_model(model)
        check_first_layer(first_layer, model.cfg.n_layers)
        layers, *unit = self.shape(model)
        expected = [layers - first_layer, *unit]
        found = list(shape)
        if found[-len(expected) :] != expected or len(found) > len(expected) + 1:
            raise ValueError(
                f"{self.plural} of shape {found} [{self.axes.replace(' ', ', ')}] do not fit {model.cfg.model_name}, "
                f"which has {expected}"
            )


def _times(factors: Tensor, values: Tensor) -> Tensor:
    return values * factors.to(values)


def _edited_activations(hook_point: str, model: HookedModel, edits: Mapping[int, Edit]) -> AbstractContextManager[None]:
    def hook_of(edit: Edit) -> Hook:
        return own(lambda activations, hook: edit(activations))

    return model.hooks(fwd_hooks=[(f"blocks.{layer}.{hook_point}", hook_of(edit)) for layer, edit in edits.items()])


def _edited_heads(model: HookedModel, edits: Mapping[int, Edit]) -> AbstractContextManager[None]:
    def by_head(edit: Edit) -> Edit:
        return lambda read: edit(read) if read.ndim == 4 else edit(per_head(model, read)).flatten(2)

    return _edited_activations("attn.hook_z", model, {layer: by_head(edit) for layer, edit in edits.items()})


_open_edits: WeakKeyDictionary[nn.Module, tuple[Edit, ...]] = WeakKeyDictionary()
"""The edits of single weights that are open now, for each MLP: an inner context edits what the outer ones leave."""


@contextmanager
def _edited_weights(model: HookedModel, edits: Mapping[int, Edit]) -> Iterator[None]:
    """Let the MLPs write as if their `W_out` had been edited; the weights themselves are not touched.

    The output [row, pos, d_model] gains activations [row, pos, neuron] times the change [neuron, d_model] of `W_out`;
    if every row has an edit of its own, times [row, neuron, d_model].
    """
    with ExitStack() as stack:
        for layer, edit in edits.items():
            stack.enter_context(_edited_output(model.blocks[layer].mlp, edit))
        yield


@contextmanager
def _edited_output(mlp: nn.Module, edit: Edit) -> Iterator[None]:
    outer = _open_edits.get(mlp, ())
    seen: list[Tensor] = []
    watching = ExitStack()

    @own
    def watch(module: Any, arguments: Any) -> None:
        # registered anew at every pass, so that it comes after all other hooks and sees what W_out is multiplied by
        watching.close()
        handle = module.hook_post.register_forward_hook(own(lambda point, given, output: seen.append(output)))
        watching.callback(handle.remove)
        watching.callback(seen.clear)

    @own
    def add_change(module: Any, arguments: Any, output: Tensor) -> Tensor:
        weight = module.W_out
        for change in outer:
            weight = change(weight)
        changed = output + seen[-1] @ (edit(weight) - weight)
        watching.close()
        return changed

    # a user's hook on the MLP's output comes after what the MLP itself writes
    handles = [mlp.register_forward_pre_hook(watch), mlp.register_forward_hook(add_change, prepend=True)]
    _open_edits[mlp] = (*outer, edit)
    try:
        yield
    finally:
        _open_edits[mlp] = outer
        watching.close()  # of a pass that failed
        for handle in handles:
            handle.remove()


def _neurons(model: HookedModel) -> tuple[int, int]:
    assert model.cfg.d_mlp is not None
    return model.cfg.n_layers, model.cfg.d_mlp


def _over_positions(values: Tensor) -> Tensor:
    """Reshape [unit] or [row, unit] for activations [row, pos, unit]."""
    return values.unsqueeze(-2)


def _over_positions_and_head_dimensions(values: Tensor) -> Tensor:
    """Reshape [head] or [row, head] for activations [row, pos, head, d_head]."""
    return values.unsqueeze(-2).unsqueeze(-1)


def _as_they_are(values: Tensor) -> Tensor:
    return values


NEURONS = Component(
    "neuron",
    "layer neuron",
    _neurons,
    _over_positions,
    partial(_edited_activations, "mlp.hook_post"),
    "mlp.hook_post",
)
"""MLP neurons: the activations that `W_out` multiplies; of gated MLPs act(gate) * up."""

HEADS = Component(
    "head",
    "layer head",
    lambda model: (model.cfg.n_layers, model.cfg.n_heads),
    _over_positions_and_head_dimensions,
    _edited_heads,
    "attn.hook_z",
)
"""Attention heads: what each reads from the values, before `W_O`."""

WEIGHTS = Component(
    "weight",
    "layer neuron d_model",
    lambda model: (*_neurons(model), model.cfg.d_model),
    _as_they_are,
    _edited_weights,
)
"""Single weights of `W_out`."""

post = NEURONS.activations_at

COMPONENTS: dict[str, Component] = {kind.name: kind for kind in (NEURONS, HEADS, WEIGHTS)}
"""The kinds of components by name."""


def component_of(name: str) -> Component:
    """Return a kind of component by its name.

    Raises:
        ValueError: if there is none of this name.
    """
    check_choice("component", name, COMPONENTS)
    return COMPONENTS[name]


def check_component(component: object) -> None:
    """Refuse what is not a kind of component.

    Raises:
        ValueError: naming the kinds there are.
    """
    if not isinstance(component, Component):
        names = ", ".join(f"{kind.plural.upper()} for {name!r}" for name, kind in COMPONENTS.items())
        raise ValueError(f"component is {described(component)}; give one of {names}")
