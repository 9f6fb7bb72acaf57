"""Activations: neurons that are active on the suffix, weighed by what they write.

Chang et al. (2024), eq. 8, after Geva et al. (2022): the score of a neuron is the size of its activation at the
target positions times the norm of its row of `W_out`. The paper writes the mean of absolute activations; the
released code, and so the published figures, take the absolute value of the mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from memloc_lens.ablation import post
from memloc_lens.localizers.baselines import output_norms
from memloc_lens.localizers.scoring import score
from memloc_lens.sequence import MemorizedSequence


@dataclass(frozen=True)
class Activations:
    """Activation on the suffix times the norm of the neuron's row of `W_out`: one forward pass.

    Args:
        reduction: `"abs_mean"`, the absolute value of the mean activation (the released code), or `"mean_abs"`,
            the mean of its absolute value (the paper's eq. 8).
    """

    reduction: Literal["abs_mean", "mean_abs"] = "abs_mean"

    def __call__(
        self, model: HookedTransformer, sequences: MemorizedSequence | Sequence[MemorizedSequence]
    ) -> Float[Tensor, "*sequence layer neuron"]:
        """Scores of at least 0, [layer, neuron], or [sequence, layer, neuron] for a list."""
        return score(model, sequences, self._score_batch)

    @torch.no_grad()
    def _score_batch(
        self, model: HookedTransformer, tokens: Int[Tensor, "batch pos"], prompt_len: int
    ) -> Float[Tensor, "batch layer neuron"]:
        names = [post(layer) for layer in range(model.cfg.n_layers)]
        _, cache = model.run_with_cache(tokens, return_type=None, names_filter=names)
        at_targets = [cache[name][:, prompt_len - 1 : -1].float() for name in names]
        activations = torch.stack(at_targets, dim=1)
        reduced = activations.mean(dim=2).abs() if self.reduction == "abs_mean" else activations.abs().mean(dim=2)
        return reduced * output_norms(model)
