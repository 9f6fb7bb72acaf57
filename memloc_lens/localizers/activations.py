"""Activations: components that are active on the suffix, times the norm of what they write.

Chang et al. (2024), eq. 8, after Geva et al. (2022): the score of a neuron is the size of its activation at the
target positions times the norm of its row of `W_out`, that is the norm of what it writes to the residual stream. The
paper writes the mean of absolute activations; the released code, and so the published figures, take the absolute
value of the mean. A head and a single weight are scored by the norm of what they write, too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from memloc_lens.checks import check_choice
from memloc_lens.components import HEADS, NEURONS, ComponentName, component_of
from memloc_lens.library_types import HookedModel
from memloc_lens.localizers.baselines import output_norms
from memloc_lens.localizers.scoring import score
from memloc_lens.sequence import Batch, MemorizedSequence

Reduction = Literal["abs_mean", "mean_abs"]


@dataclass(frozen=True)
class Activations:
    """Activation at the target positions times the norm of the weights it is written with. One forward pass.

    Args:
        reduction: Over the target positions: the absolute value of the mean (abs_mean, the released code), or the
            mean of the absolute values (mean_abs, the paper's eq. 8).
        component: Kind of component to score.

    Example:
        >>> Activations(reduction="mean_abs")(model, sequence).shape
        torch.Size([6, 768])
    """

    name: ClassVar[str] = "activations"
    reduction: Reduction = "abs_mean"
    component: ComponentName = "neuron"

    def __post_init__(self) -> None:
        check_choice("reduction", self.reduction, get_args(Reduction))
        component_of(self.component)

    def __call__(
        self, model: HookedModel, sequences: MemorizedSequence | Sequence[MemorizedSequence]
    ) -> Float[Tensor, "..."]:
        """Return scores of at least 0: [layer, *unit], or [sequence, layer, *unit] for a list."""
        return score(model, sequences, self._score_batch, component_of(self.component))

    @torch.no_grad()
    def _score_batch(self, model: HookedModel, batch: Batch) -> Float[Tensor, "row layer *unit"]:
        component = component_of(self.component)
        source = HEADS if component is HEADS else NEURONS  # a weight of W_out multiplies its neuron's activation
        names = [source.activations_at(layer) for layer in range(model.cfg.n_layers)]
        _, cache = model.run_with_cache(batch.tokens, return_type=None, names_filter=names)
        # [row, layer, target, neuron], or [row, layer, target, head, d_head]
        read = (source.read(model, cache[name])[:, batch.targets].float() for name in names)
        activations = torch.stack([values.to(batch.tokens.device) for values in read], dim=1)
        if component is HEADS:
            return self._written_by_heads(model, activations)
        reduced = activations.mean(dim=2).abs() if self.reduction == "abs_mean" else activations.abs().mean(dim=2)
        norms = output_norms(model, component)
        return reduced * norms if component is NEURONS else reduced.unsqueeze(-1) * norms

    def _written_by_heads(
        self, model: HookedModel, activations: Float[Tensor, "row layer target head d_head"]
    ) -> Float[Tensor, "row layer head"]:
        if self.reduction == "abs_mean":
            activations = activations.mean(dim=2, keepdim=True)
        weights = torch.stack([block.attn.W_O.float().to(activations.device) for block in model.blocks])
        written = einsum(
            activations,
            weights,
            "row layer target head d_head, layer head d_head d_model -> row layer target head d_model",
        )
        return written.norm(dim=-1).mean(dim=2)
