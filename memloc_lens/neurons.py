"""A set of MLP neurons, and how one is chosen from scores."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Neurons:
    """A set of neurons of one model, with set operations.

    Args:
        members: True where a neuron belongs to the set.

    Example:
        >>> first = Neurons(torch.tensor([[True, False], [True, True]]))
        >>> second = Neurons(torch.tensor([[True, True], [False, False]]))
        >>> len(first | second), len(first & second), len(first - second), first.overlap(second)
        (4, 1, 2, 0.25)
    """

    members: Bool[Tensor, "layer neuron"]

    def __len__(self) -> int:
        return int(self.members.sum())

    def __or__(self, other: "Neurons") -> "Neurons":
        return Neurons(self.members | self._same_shape(other))

    def __and__(self, other: "Neurons") -> "Neurons":
        return Neurons(self.members & self._same_shape(other))

    def __sub__(self, other: "Neurons") -> "Neurons":
        return Neurons(self.members & ~self._same_shape(other))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Neurons) and torch.equal(self.members.cpu(), other.members.cpu())

    __hash__ = None  # type: ignore[assignment]  # equal sets may lie on different devices

    def overlap(self, other: "Neurons") -> float:
        """Neurons in both sets over neurons in either (Jaccard); 0 for two empty sets."""
        return len(self & other) / max(len(self | other), 1)

    def per_layer(self) -> list[list[int]]:
        """The indices of the members, layer by layer."""
        return [layer.nonzero().flatten().tolist() for layer in self.members]

    def save(self, path: str | Path) -> None:
        """Write the set to a safetensors file."""
        save_file({"members": self.members.cpu().contiguous()}, path)

    @classmethod
    def load(cls, path: str | Path) -> "Neurons":
        """Read a set written by `save`.

        Raises:
            ValueError: if the file holds no set of neurons.
        """
        try:
            return cls(load_file(path)["members"])
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{str(path)!r} holds no set of neurons written by Neurons.save: {error}") from error

    def _same_shape(self, other: "Neurons") -> Bool[Tensor, "layer neuron"]:
        if self.members.shape != other.members.shape:
            raise ValueError(
                f"neurons of models of different shape [layer, neuron]: {list(self.members.shape)} and "
                f"{list(other.members.shape)}"
            )
        return other.members.to(self.members.device)


def top_neurons(
    scores: Float[Tensor, "layer neuron"],
    ratio: float,
    first_layer: int = 0,
    scope: Literal["layer", "global"] = "layer",
    rounding: Literal["down", "nearest"] = "down",
) -> Neurons:
    """The highest-scoring share of the neurons.

    Args:
        scores: one score a neuron, higher is more responsible; equal scores are taken in order of index.
        ratio: share of the neurons to take, in (0, 1].
        first_layer: layers before it are left out. DEL leaves out layer 0, INJ nothing.
        scope: the share of every layer, or of all layers together.
        rounding: of the number of neurons; the paper's DEL rounds down, its INJ to the nearest.

    Raises:
        ValueError: if the ratio is outside (0, 1] or takes no neuron, if `first_layer` leaves no layer, or if
            a score is not a number.
    """
    layers = len(scores)
    if not 0 <= first_layer < layers:
        raise ValueError(f"first_layer is {first_layer}; the scores have layers 0 to {layers - 1}")
    if scores.isnan().any():
        raise ValueError(
            f"{int(scores.isnan().sum())} of {scores.numel()} scores are NaN; neurons cannot be ranked by them"
        )
    eligible = scores[first_layer:]
    ranked = eligible if scope == "layer" else eligible.reshape(1, -1)
    count = neurons_taken(ratio, ranked.shape[1], rounding)
    best = ranked.argsort(dim=1, descending=True, stable=True)[:, :count]
    members = torch.zeros_like(scores, dtype=torch.bool)
    members[first_layer:] = torch.zeros_like(ranked, dtype=torch.bool).scatter(1, best, True).view_as(eligible)
    return Neurons(members)


def neurons_taken(ratio: float, width: int, rounding: Literal["down", "nearest"] = "down") -> int:
    """How many of `width` neurons a ratio takes.

    Raises:
        ValueError: if the ratio is outside (0, 1], or takes none.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"the ratio is {ratio}; it must be above 0 and at most 1")
    # a product that is whole up to rounding error, as 0.29 * 100, counts as whole
    exact = round(ratio * width, 9)
    count = int(exact) if rounding == "down" else round(exact)
    if count == 0:
        raise ValueError(
            f"a ratio of {ratio} takes none of {width} neurons; the smallest that takes one is {1 / width:.2g}"
        )
    return count
