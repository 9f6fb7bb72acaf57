"""Sets of components, kept as bits, with one algebra for every kind."""

from collections.abc import Iterable
from numbers import Integral
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from jaxtyping import Bool
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from memloc_lens.checks import check_model, check_tensor
from memloc_lens.components.kinds import NEURONS, Component, check_component, component_of
from memloc_lens.components.strip import binned, strip, units_of_column
from memloc_lens.library_types import HookedModel
from memloc_lens.markup import escaped

SomeSet = TypeVar("SomeSet", bound="ComponentSet")


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

    def _repr_html_(self) -> str:
        """Return a strip of the layers for notebooks: marks where members are, and counts."""
        width = int(np.prod(self.shape[1:]))
        layers = [binned(np.unpackbits(bits, count=width).view(bool)) for bits in self._bits]
        told, each = repr(self).strip("<>"), units_of_column(width)
        note = f"; a column is {each} {self.component.plural}" if each > 1 else ""
        return f"<div>{escaped(told + note)}</div>{strip(layers, self.counts(), told)}"

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
    def from_indices(cls, model: HookedModel, indices: Iterable[tuple[int, int]]) -> "Neurons":
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
    model: HookedModel, indices: Iterable[tuple[int, ...]], component: Component = NEURONS
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
