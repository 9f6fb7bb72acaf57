"""Two baselines that do not read the sequence: chance, and the weights alone."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from memloc_lens.checks import check_number
from memloc_lens.components import HEADS, WEIGHTS, Component, ComponentName, component_of
from memloc_lens.library_types import HookedModel
from memloc_lens.localizers.scoring import score
from memloc_lens.sequence import Batch, MemorizedSequence


@dataclass(frozen=True)
class Random:
    """Uniform random scores: another draw for every sequence, the same draw for the same seed and sequence.

    Args:
        seed: Seed of the draw.
        component: Kind of component to score.

    Example:
        >>> Random(seed=1)(model, sequence).shape
        torch.Size([6, 768])
    """

    name: ClassVar[str] = "random"
    seed: int = 0
    component: ComponentName = "neuron"

    def __post_init__(self) -> None:
        check_number("seed", self.seed, whole=True)
        component_of(self.component)

    def __call__(
        self, model: HookedModel, sequences: MemorizedSequence | Sequence[MemorizedSequence]
    ) -> Float[Tensor, "..."]:
        """Return scores in [0, 1): [layer, *unit], or [sequence, layer, *unit] for a list."""
        return score(model, sequences, self._score_batch, component_of(self.component))

    def _score_batch(self, model: HookedModel, batch: Batch) -> Float[Tensor, "row layer *unit"]:
        shape, draws = component_of(self.component).shape(model), []
        for row in batch.tokens.tolist():
            generator = torch.Generator().manual_seed(zlib.crc32(repr((self.seed, row)).encode()))
            draws.append(torch.rand(shape, generator=generator, dtype=torch.float32))
        return torch.stack(draws).to(batch.tokens.device)


@dataclass(frozen=True)
class WeightNorm:
    """The norm of the weights that a component writes with: how much the weights alone give away (leakage).

    Of a neuron its row of `W_out`, of a head its matrix `W_O`, of a single weight its absolute value.

    Args:
        component: Kind of component to score.

    Example:
        >>> WeightNorm()(model, sequence).shape
        torch.Size([6, 768])
    """

    name: ClassVar[str] = "weight-norm"
    component: ComponentName = "neuron"

    def __post_init__(self) -> None:
        component_of(self.component)

    def __call__(
        self, model: HookedModel, sequences: MemorizedSequence | Sequence[MemorizedSequence]
    ) -> Float[Tensor, "..."]:
        """Return the same norms for every sequence: [layer, *unit], or [sequence, layer, *unit] for a list."""
        return score(model, sequences, self._score_batch, component_of(self.component))

    def _score_batch(self, model: HookedModel, batch: Batch) -> Float[Tensor, "row layer *unit"]:
        norms = output_norms(model, component_of(self.component))
        return norms.expand(len(batch), *norms.shape)


def output_norms(model: HookedModel, component: Component) -> Float[Tensor, " layer *unit"]:
    """Return the Euclidean norm of the weights that each component writes to the residual stream with."""
    layers = [_norms_of(block, component).to(model.cfg.device) for block in model.blocks]
    return torch.stack(layers)


def _norms_of(block: Any, component: Component) -> Float[Tensor, "*unit"]:
    if component is HEADS:
        return block.attn.W_O.detach().float().flatten(1).norm(dim=1)
    rows = block.mlp.W_out.detach().float().contiguous()  # [neuron, d_model]; another order is another rounding
    return rows.abs() if component is WEIGHTS else rows.norm(dim=1)
