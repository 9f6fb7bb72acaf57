"""ZeroOut: how much the suffix loss rises when one neuron is switched off at every position.

Chang et al. (2024), sec. 4.1. Exact leave-one-out over all neurons, without a full forward pass for each:

1. One clean pass keeps each layer's activations and residual stream.
2. Zeroing neuron i of layer l subtracts the rank-one term post[:, i] (x) W_out[i] from the residual stream after
   layer l and changes nothing before it, so a batch of perturbed streams is written down directly.
3. The batch runs through the later layers only, and is unembedded at the target positions only.

Where a norm stands between an MLP and the residual stream (Gemma 2, OLMo 2), the term of step 2 is no longer
rank one: layer l is then run too, with the neuron masked.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import ActivationCache, HookedTransformer
from transformer_lens.components.transformer_block import POST_NORM_ARCHITECTURES

from memloc_lens.ablation import post
from memloc_lens.forward import target_loss
from memloc_lens.localizers.scoring import score
from memloc_lens.sequence import MemorizedSequence


@dataclass(frozen=True)
class ZeroOut:
    """Exact rise of the suffix loss, in nats, when a neuron alone is zeroed at every position.

    Args:
        first_layer: layers before it are not perturbed, and score 0.
        chunk: perturbed copies of the sequence that are run at once; decides memory, not results.
    """

    first_layer: int = 0
    chunk: int = 32

    def __call__(
        self, model: HookedTransformer, sequences: MemorizedSequence | Sequence[MemorizedSequence]
    ) -> Float[Tensor, "*sequence layer neuron"]:
        """Rises of the loss in nats, [layer, neuron], or [sequence, layer, neuron] for a list."""
        return score(model, sequences, self._score_batch, batch=1)

    @torch.no_grad()
    def _score_batch(
        self, model: HookedTransformer, tokens: Int[Tensor, "1 pos"], prompt_len: int
    ) -> Float[Tensor, "1 layer neuron"]:
        residual, cache = model.run_with_cache(
            tokens,
            stop_at_layer=model.cfg.n_layers,
            names_filter=lambda name: name.endswith(("mlp.hook_post", "hook_resid_pre", "hook_resid_post")),
        )
        clean_loss = target_loss(model, residual, tokens, prompt_len)
        scores = torch.zeros(1, model.cfg.n_layers, model.cfg.d_mlp, device=tokens.device)
        for layer in range(self.first_layer, model.cfg.n_layers):
            for neurons in torch.arange(model.cfg.d_mlp, device=tokens.device).split(self.chunk):
                residuals = _residuals_without(model, cache, layer, neurons)
                residuals = model(residuals, start_at_layer=layer + 1, stop_at_layer=model.cfg.n_layers)
                losses = target_loss(model, residuals, tokens.expand(len(neurons), -1), prompt_len)
                scores[0, layer, neurons] = losses - clean_loss
        return scores


def _residuals_without(
    model: HookedTransformer, cache: ActivationCache, layer: int, neurons: Int[Tensor, " neuron"]
) -> Float[Tensor, "neuron pos d_model"]:
    """The residual stream after `layer` with each of its `neurons` zeroed in turn."""
    if model.cfg.use_normalization_before_and_after or model.cfg.original_architecture in POST_NORM_ARCHITECTURES:
        return _residuals_by_masking(model, cache, layer, neurons)
    activations = rearrange(cache[post(layer)][0, :, neurons], "pos neuron -> neuron pos 1").contiguous()
    rows = rearrange(model.blocks[layer].mlp.W_out[neurons], "neuron d_model -> neuron 1 d_model")
    return cache["resid_post", layer] - activations * rows


def _residuals_by_masking(
    model: HookedTransformer, cache: ActivationCache, layer: int, neurons: Int[Tensor, " neuron"]
) -> Float[Tensor, "neuron pos d_model"]:
    def zero_one_each(
        activations: Float[Tensor, "neuron pos d_mlp"], hook: object
    ) -> Float[Tensor, "neuron pos d_mlp"]:
        return activations.scatter(2, neurons[:, None, None].expand(-1, activations.shape[1], 1), 0.0)

    before = cache["resid_pre", layer].expand(len(neurons), -1, -1)
    with model.hooks(fwd_hooks=[(post(layer), zero_one_each)]):
        return model(before, start_at_layer=layer, stop_at_layer=layer + 1)
