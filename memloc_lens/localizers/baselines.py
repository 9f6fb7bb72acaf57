"""Two baselines that look at no activation: chance, and the weights alone."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from memloc_lens.localizers.scoring import score
from memloc_lens.sequence import MemorizedSequence


@dataclass(frozen=True)
class Random:
    """Uniform scores: another draw for every sequence, the same draw for the same seed and sequence.

    Args:
        seed: of the draw.
    """

    seed: int = 0

    def __call__(
        self, model: HookedTransformer, sequences: MemorizedSequence | Sequence[MemorizedSequence]
    ) -> Float[Tensor, "*sequence layer neuron"]:
        """Scores in [0, 1), [layer, neuron], or [sequence, layer, neuron] for a list."""
        return score(model, sequences, self._score_batch)

    def _score_batch(
        self, model: HookedTransformer, tokens: Int[Tensor, "batch pos"], prompt_len: int
    ) -> Float[Tensor, "batch layer neuron"]:
        draws = []
        for row in tokens.tolist():
            generator = torch.Generator().manual_seed(zlib.crc32(repr((self.seed, row)).encode()))
            draws.append(torch.rand(model.cfg.n_layers, model.cfg.d_mlp, generator=generator))
        return torch.stack(draws).to(tokens.device)


@dataclass(frozen=True)
class WeightNorm:
    """The norm of each neuron's row of `W_out`: what can be told with no data at all."""

    def __call__(
        self, model: HookedTransformer, sequences: MemorizedSequence | Sequence[MemorizedSequence]
    ) -> Float[Tensor, "*sequence layer neuron"]:
        """The same norms for every sequence: [layer, neuron], or [sequence, layer, neuron] for a list."""
        return score(model, sequences, self._score_batch)

    def _score_batch(
        self, model: HookedTransformer, tokens: Int[Tensor, "batch pos"], prompt_len: int
    ) -> Float[Tensor, "batch layer neuron"]:
        return output_norms(model).expand(len(tokens), -1, -1)


def output_norms(model: HookedTransformer) -> Float[Tensor, "layer neuron"]:
    """The Euclidean norm of every neuron's row of `W_out`."""
    return torch.stack([block.mlp.W_out.detach().float().norm(dim=1) for block in model.blocks])
