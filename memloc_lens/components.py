"""Kinds of model components, sets of them, and how a set is chosen from scores.

A kind of component is a value of `Component`: a shape, and a way to edit every component of a layer in the forward
pass, which gives it a differentiable mask and an ablation:

* `NEURONS`  MLP neurons, [layer, neuron], the activations at `mlp.hook_post`;
* `HEADS`    attention heads, [layer, head], their outputs at `attn.hook_z`;
* `WEIGHTS`  single weights of `W_out`, [layer, neuron, d_model].

Scores, sets and masks of a kind have its shape. Another kind is one more entry of `COMPONENTS`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint

from memloc_lens.checks import check_choice, check_first_layer, check_model, check_number, check_tensor, described

Edit = Callable[[Tensor], Tensor]
"""What to make of a layer's activations, or of its weights."""

Hook = Callable[[Tensor, HookPoint], Tensor | None]

ComponentName = Literal["neuron", "head", "weight"]
Scope = Literal["layer", "global"]
Rounding = Literal["down", "nearest"]
SomeSet = TypeVar("SomeSet", bound="ComponentSet")


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
    shape: Callable[[HookedTransformer], tuple[int, ...]]
    aligned: Callable[[Tensor], Tensor]
    edited: Callable[[HookedTransformer, Mapping[int, Edit]], AbstractContextManager[None]]
    hook_point: str = ""

    def activations_at(self, layer: int) -> str:
        """Return the full name of a layer's hook point."""
        return f"blocks.{layer}.{self.hook_point}"

    @property
    def plural(self) -> str:
        """The name for several of them."""
        return f"{self.name}s"

    def masked(
        self, model: HookedTransformer, mask: Float[Tensor, "..."], first_layer: int = 0
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

    def check_shape(self, model: HookedTransformer, shape: Sequence[int], first_layer: int = 0) -> None:
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


def _edited_activations(
    hook_point: str, model: HookedTransformer, edits: Mapping[int, Edit]
) -> AbstractContextManager[None]:
    def hook_of(edit: Edit) -> Hook:
        return lambda activations, hook: edit(activations)

    return model.hooks(fwd_hooks=[(f"blocks.{layer}.{hook_point}", hook_of(edit)) for layer, edit in edits.items()])


_open_edits: WeakKeyDictionary[nn.Module, tuple[Edit, ...]] = WeakKeyDictionary()
"""The edits of single weights that are open now, for each MLP: an inner context edits what the outer ones leave."""


@contextmanager
def _edited_weights(model: HookedTransformer, edits: Mapping[int, Edit]) -> Iterator[None]:
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

    def watch(module: Any, arguments: Any) -> None:
        # registered anew at every pass, so that it comes after all other hooks and sees what W_out is multiplied by
        watching.close()
        handle = module.hook_post.register_forward_hook(lambda point, given, output: seen.append(output))
        watching.callback(handle.remove)
        watching.callback(seen.clear)

    def add_change(module: Any, arguments: Any, output: Tensor) -> Tensor:
        weight = module.W_out
        for change in outer:
            weight = change(weight)
        changed = output + seen[-1] @ (edit(weight) - weight)
        watching.close()
        return changed

    handles = [mlp.register_forward_pre_hook(watch), mlp.register_forward_hook(add_change)]
    _open_edits[mlp] = (*outer, edit)
    try:
        yield
    finally:
        _open_edits[mlp] = outer
        watching.close()  # of a pass that failed
        for handle in handles:
            handle.remove()


def _neurons(model: HookedTransformer) -> tuple[int, int]:
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
    partial(_edited_activations, "attn.hook_z"),
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


class ComponentSet:
    """A set of components of one kind in one model, with set operations.

    Members are kept as bits, a row of bytes a layer: GPT2-XL has 491 million single weights.

    Args:
        members: True where a component belongs to the set, [layer, *unit].
        component: kind of the members.

    Raises:
        ValueError: if `members` is not a Boolean tensor of the kind's dimensions.

    Example:
        >>> first = ComponentSet(torch.tensor([[True, False], [True, True]]), HEADS)
        >>> second = ComponentSet(torch.tensor([[True, True], [False, False]]), HEADS)
        >>> len(first | second), len(first & second), len(first - second), first.overlap(second)
        (4, 1, 2, 0.25)
    """

    def __init__(self, members: Bool[Tensor, " layer *unit"], component: Component = NEURONS) -> None:
        check_component(component)
        axes = component.axes.replace(" ", ", ")
        check_tensor("members", members, axes)
        if members.dtype != torch.bool or members.ndim != len(component.axes.split()):
            raise ValueError(
                f"members are {members.dtype} of shape {list(members.shape)}; a Boolean tensor [{axes}] was expected"
            )
        bits = [np.packbits(layer.flatten().cpu().numpy()) for layer in members]
        self._fill(component, tuple(members.shape), np.stack(bits), members.device)

    def _fill(self, component: Component, shape: tuple[int, ...], bits: np.ndarray, device: torch.device) -> None:
        self.component, self.shape, self._bits, self._device = component, shape, bits, device

    @classmethod
    def _of(
        cls, component: Component, shape: tuple[int, ...], bits: np.ndarray, device: torch.device
    ) -> "ComponentSet":
        new = object.__new__(Neurons if component is NEURONS else ComponentSet)
        new._fill(component, shape, bits, device)
        return new

    @classmethod
    def from_layers(cls, layers: Iterable[Bool[Tensor, "*unit"]], component: Component = NEURONS) -> "ComponentSet":
        """Make a set from the members of one layer after another, so that few are held unpacked."""
        bits: list[np.ndarray] = []
        shape: tuple[int, ...] = ()
        device = torch.device("cpu")
        for layer in layers:
            bits.append(np.packbits(layer.flatten().cpu().numpy()))
            shape, device = tuple(layer.shape), layer.device
        return cls._of(component, (len(bits), *shape), np.stack(bits), device)

    @property
    def members(self) -> Bool[Tensor, " layer *unit"]:
        """True where a component belongs to the set."""
        return torch.stack([self.layer(index) for index in range(self.shape[0])])

    def layer(self, index: int) -> Bool[Tensor, "*unit"]:
        """Return the members of one layer."""
        unit = self.shape[1:]
        bits = np.unpackbits(self._bits[index], count=int(np.prod(unit)))
        return torch.from_numpy(bits.view(bool)).view(unit).to(self._device)

    def counts(self) -> list[int]:
        """Return the number of members in each layer."""
        return np.bitwise_count(self._bits).sum(axis=1, dtype=np.int64).tolist()

    def per_layer(self) -> list[list[int]]:
        """Return the indices of the members, layer by layer; of single weights, neuron * d_model + dimension."""
        return [self.layer(index).flatten().nonzero().flatten().tolist() for index in range(self.shape[0])]

    def indices(self) -> list[tuple[int, ...]]:
        """Return the members as index tuples, (layer, neuron) for neurons; `from_indices` is the way back."""
        return [(index, *row) for index in range(self.shape[0]) for row in self.layer(index).nonzero().tolist()]

    def __len__(self) -> int:
        return int(np.bitwise_count(self._bits).sum(dtype=np.int64))

    def __or__(self: SomeSet, other: "ComponentSet") -> SomeSet:
        return self._like(self._bits | self._bits_of(other))

    def __and__(self: SomeSet, other: "ComponentSet") -> SomeSet:
        return self._like(self._bits & self._bits_of(other))

    def __sub__(self: SomeSet, other: "ComponentSet") -> SomeSet:
        return self._like(self._bits & ~self._bits_of(other))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, ComponentSet)
            and (self.component, self.shape) == (other.component, other.shape)
            and np.array_equal(self._bits, other._bits)
        )

    __hash__ = None  # type: ignore[assignment]  # sets can be large; compare them with ==

    def __repr__(self) -> str:
        counts = self.counts()
        layers = [index for index, count in enumerate(counts) if count]
        where = f" in layers {layers[0]} to {layers[-1]}" if layers else ""
        return f"<{sum(counts)} of {int(np.prod(self.shape))} {self.component.plural}{where}>"

    def overlap(self, other: "ComponentSet") -> float:
        """Return the number of components in both sets over those in either (Jaccard index); 0 for two empty sets."""
        return len(self & other) / max(len(self | other), 1)

    def save(self, path: str | Path) -> None:
        """Write the set to a safetensors file."""
        tensors = {"bits": torch.from_numpy(self._bits), "shape": torch.tensor(self.shape)}
        save_file(tensors, path, metadata={"component": self.component.name})

    @classmethod
    def load(cls, path: str | Path) -> "ComponentSet":
        """Read a set written by `save`.

        Raises:
            ValueError: if the file holds no set of this kind.
        """
        try:
            with safe_open(path, "pt") as file:
                component = component_of((file.metadata() or {}).get("component", ""))
                bits, shape = file.get_tensor("bits").numpy(), tuple(file.get_tensor("shape").tolist())
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{str(path)!r} holds no set of components written by save: {error}") from error
        return cls._of(component, shape, bits, torch.device("cpu"))

    def _like(self, bits: np.ndarray) -> Any:
        return self._of(self.component, self.shape, bits, self._device)

    def _bits_of(self, other: "ComponentSet") -> np.ndarray:
        if not isinstance(other, ComponentSet):
            raise ValueError(f"the other set is of type {type(other).__name__}; give one of the same kind")
        if (self.component, self.shape) != (other.component, other.shape):
            raise ValueError(
                f"sets of different kind or shape do not mix: {self.component.plural} {list(self.shape)} and "
                f"{other.component.plural} {list(other.shape)}"
            )
        return other._bits


class Neurons(ComponentSet):
    """A set of MLP neurons of one model, with set operations.

    Args:
        members: True where a neuron belongs to the set, [layer, neuron].

    Raises:
        ValueError: if `members` is not a Boolean matrix.

    Example:
        >>> neurons = Neurons.from_indices(model, [(1, 5), (3, 700)])
        >>> neurons
        <2 of 4608 neurons in layers 1 to 3>
        >>> neurons.indices()
        [(1, 5), (3, 700)]
    """

    def __init__(self, members: Bool[Tensor, "layer neuron"]) -> None:
        super().__init__(members, NEURONS)

    @classmethod
    def from_indices(cls, model: HookedTransformer, indices: Iterable[tuple[int, int]]) -> "Neurons":
        """Make a set from (layer, neuron) pairs.

        Raises:
            ValueError: if the model has no such neuron.
        """
        return cast(Neurons, set_from_indices(model, indices, NEURONS))

    @classmethod
    def load(cls, path: str | Path) -> "Neurons":
        """Read a set written by `save`.

        Raises:
            ValueError: if the file holds no set of neurons.
        """
        loaded = super().load(path)
        if not isinstance(loaded, Neurons):
            raise ValueError(f"{str(path)!r} holds {loaded.component.plural}, not neurons; use ComponentSet.load")
        return loaded


def set_from_indices(
    model: HookedTransformer, indices: Iterable[tuple[int, ...]], component: Component = NEURONS
) -> ComponentSet:
    """Make a set from index tuples such as (layer, head).

    Raises:
        ValueError: if the model has no such component.

    Example:
        >>> set_from_indices(model, [(0, 3)], HEADS)
        <1 of 36 heads in layers 0 to 0>
    """
    check_model(model)
    check_component(component)
    shape = component.shape(model)
    members = torch.zeros(shape, dtype=torch.bool, device=model.cfg.device)
    for index in indices:
        if not _is_index(index, shape):
            raise ValueError(
                f"{component.name} {index!r} does not exist; {model.cfg.model_name} has {component.plural} of "
                f"shape {list(shape)} [{component.axes.replace(' ', ', ')}]"
            )
        members[tuple(index)] = True
    return Neurons(members) if component is NEURONS else ComponentSet(members, component)


def _is_index(index: object, shape: tuple[int, ...]) -> bool:
    return (
        isinstance(index, tuple | list)
        and len(index) == len(shape)
        and all(isinstance(part, Integral) and 0 <= int(part) < size for part, size in zip(index, shape, strict=True))
    )


def top_neurons(
    scores: Float[Tensor, "layer neuron"],
    ratio: float,
    first_layer: int = 0,
    scope: Scope = "layer",
    rounding: Rounding = "down",
) -> Neurons:
    """Return the share of the neurons with the highest scores.

    Args:
        scores: one a neuron, higher is more responsible. Of equal scores, those with the lower index go first.
        ratio: share of the neurons to take, in (0, 1].
        first_layer: layers before it are left out. DEL leaves out layer 0, INJ none.
        scope: take the share of every layer, or of all layers together.
        rounding: of the number of neurons. DEL in the paper rounds down, INJ to the nearest.

    Raises:
        ValueError: if the scores are not one number for each neuron of one sequence, the ratio is outside (0, 1] or
            takes no neuron, `first_layer` leaves no layer, or `scope` or `rounding` is not one of these words.

    Example:
        >>> top_neurons(torch.tensor([[0.1, 0.9, 0.5, 0.7]]), ratio=0.5).indices()
        [(0, 1), (0, 3)]
    """
    return cast(Neurons, top_components(scores, ratio, first_layer, scope, rounding, NEURONS))


def top_components(
    scores: Float[Tensor, " layer *unit"],
    ratio: float,
    first_layer: int = 0,
    scope: Scope = "layer",
    rounding: Rounding = "down",
    component: Component = NEURONS,
) -> ComponentSet:
    """Return the share of the components of a kind with the highest scores, as `top_neurons` does for neurons.

    Layers are ranked one after another, so that only the scores themselves and those chosen are held.
    """
    check_component(component)
    axes = component.axes.replace(" ", ", ")
    check_tensor("scores", scores, axes)
    if scores.ndim != len(component.axes.split()):
        raise ValueError(
            f"scores have the shape {list(scores.shape)}; those of one sequence are [{axes}]: choose from the scores "
            "of a list one sequence at a time"
        )
    check_choice("scope", scope, get_args(Scope))
    check_first_layer(first_layer, len(scores))
    eligible = scores[first_layer:].flatten(1)  # [layer, unit]
    missing = sum(int(row.isnan().sum()) for row in eligible)
    if missing:
        raise ValueError(f"{missing} of {scores.numel()} scores are NaN; {component.plural} cannot be ranked by them")
    together = 1 if scope == "layer" else len(eligible)
    count = count_of(ratio, eligible.shape[1] * together, rounding, component.plural)
    chosen = (_highest(eligible[start : start + together], count) for start in range(0, len(eligible), together))
    before = (torch.zeros_like(scores[layer], dtype=torch.bool) for layer in range(first_layer))
    after = (row.view(scores.shape[1:]) for rows in chosen for row in rows)
    return ComponentSet.from_layers((row for rows in (before, after) for row in rows), component)


def _highest(rows: Float[Tensor, "row unit"], count: int) -> Iterator[Bool[Tensor, " unit"]]:
    """Mark the `count` highest values of the rows together, row by row; of equal values the first."""
    best = rows.new_empty(0)
    for row in rows:
        both = torch.cat([best, row])
        best = both.topk(min(count, len(both))).values
    threshold = best[-1]
    left = count - sum(int((row > threshold).sum()) for row in rows)
    for row in rows:
        ties = (row == threshold).nonzero().flatten()[:left]
        left -= len(ties)
        yield (row > threshold).index_fill(0, ties, True)


def count_of(ratio: float, total: int, rounding: Rounding = "down", plural: str = "neurons") -> int:
    """Return how many of `total` components a ratio takes.

    Raises:
        ValueError: if the ratio is outside (0, 1] or takes none, or the rounding is unknown.

    Example:
        >>> count_of(0.01, 768), count_of(0.01, 768, "nearest")
        (7, 8)
    """
    check_choice("rounding", rounding, get_args(Rounding))
    check_number("the ratio", ratio, above=0, most=1)
    # a product that is whole up to rounding error, as 0.29 * 100, counts as whole
    exact = round(ratio * total, 9)
    count = int(exact) if rounding == "down" else round(exact)
    if count == 0:
        raise ValueError(
            f"a ratio of {ratio} takes none of {total} {plural}; the smallest that takes one is {1 / total:.2g}"
        )
    return count
