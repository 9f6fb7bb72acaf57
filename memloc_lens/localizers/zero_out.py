"""ZeroOut: how much the suffix loss rises when one neuron is switched off at every position.

Chang et al. (2024), sec. 4.1. Exact leave-one-out over all neurons, without a full forward pass for each:

1. One clean pass keeps each layer's activations and residual stream.
2. Zeroing neuron i of layer l subtracts the rank-one term post[:, i] (x) W_out[i] from the residual stream after
   layer l and changes nothing before it, so a batch of perturbed streams is written down directly.
3. The batch runs through the later layers only, and is unembedded at the target positions only.
4. After the last layer the unembedding is linear but for the scale of the final norm: a neuron's row of `W_out` is
   unembedded once, and the logits of all positions are written down from it.

Where a norm stands between an MLP and the residual stream (Gemma 2, OLMo 2), the term of step 2 is no longer
rank one: layer l is then run too, with the neuron masked.

With `candidates` below 1, one backward pass first estimates every rise from the gradient, and only the share of
each layer's neurons with the highest estimates is scored exactly.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformer_lens import ActivationCache, HookedTransformer
from transformer_lens.components import LayerNorm, RMSNorm

from memloc_lens.ablation import mask, post
from memloc_lens.forward import final_residual, norm_after_mlp, run_layers, target_loss
from memloc_lens.localizers.scoring import score
from memloc_lens.memory import in_chunks, rows_at_once
from memloc_lens.neurons import top_neurons
from memloc_lens.sequence import MemorizedSequence


@dataclass(frozen=True)
class ZeroOut:
    """Exact rise of the suffix loss, in nats, when a neuron alone is zeroed at every position.

    Args:
        first_layer: layers before it are not perturbed, and score 0.
        candidates: share of each layer's neurons to score; 1 scores all. The rest, which the gradient ranks lower,
            share the lowest score of their layer.
    """

    first_layer: int = 0
    candidates: float = 1.0

    def __call__(
        self, model: HookedTransformer, sequences: MemorizedSequence | Sequence[MemorizedSequence]
    ) -> Float[Tensor, "*sequence layer neuron"]:
        """Rises of the loss in nats, [layer, neuron], or [sequence, layer, neuron] for a list.

        Raises:
            ValueError: if `candidates` is outside (0, 1], or takes no neuron.
        """
        assert model.cfg.d_mlp is not None
        graph_layers = model.cfg.n_layers if self.candidates < 1 else 0
        return score(model, sequences, self._score_batch, graph_layers, rows_each=model.cfg.d_mlp)

    @torch.no_grad()
    def _score_batch(
        self, model: HookedTransformer, tokens: Int[Tensor, "batch pos"], prompt_len: int
    ) -> Float[Tensor, "batch layer neuron"]:
        residual, cache = model.run_with_cache(
            tokens,
            stop_at_layer=model.cfg.n_layers,
            names_filter=lambda name: name.endswith(("mlp.hook_post", "hook_resid_pre", "hook_resid_post")),
        )
        clean_loss = target_loss(model, residual[:, prompt_len - 1 : -1], tokens, prompt_len)
        chosen = self._candidates(model, tokens, prompt_len)
        size = rows_at_once(model, tokens.shape[1], tokens.shape[1] - prompt_len)
        scores = torch.zeros(chosen.shape, device=tokens.device)
        for layer in range(self.first_layer, model.cfg.n_layers):
            pairs = chosen[:, layer].nonzero()
            losses = in_chunks(pairs, size, partial(_losses_without, model, cache, layer, tokens, prompt_len))
            row, neuron = pairs.unbind(dim=1)
            rises = torch.cat(losses) - clean_loss[row]
            scores[:, layer] = rises.min() if self.candidates < 1 else 0.0
            scores[row, layer, neuron] = rises
        return scores

    def _candidates(
        self, model: HookedTransformer, tokens: Int[Tensor, "batch pos"], prompt_len: int
    ) -> Bool[Tensor, "batch layer neuron"]:
        if self.candidates == 1:
            shape = (len(tokens), model.cfg.n_layers, model.cfg.d_mlp)
            return torch.ones(shape, dtype=torch.bool, device=tokens.device)
        estimates = estimated_rises(model, tokens, prompt_len)
        return torch.stack([top_neurons(each, self.candidates, rounding="nearest").members for each in estimates])


def estimated_rises(
    model: HookedTransformer, tokens: Int[Tensor, "batch pos"], prompt_len: int
) -> Float[Tensor, "batch layer neuron"]:
    """The rises that ZeroOut measures, to first order: minus the gradient of the loss by a mask of ones, in nats."""
    ones = torch.ones(len(tokens), model.cfg.n_layers, model.cfg.d_mlp, device=tokens.device, requires_grad=True)
    with torch.enable_grad(), mask(model, ones):
        losses = target_loss(model, final_residual(model, tokens, prompt_len), tokens, prompt_len)
        (gradient,) = torch.autograd.grad(losses.sum(), ones)
    return -gradient


def _losses_without(
    model: HookedTransformer,
    cache: ActivationCache,
    layer: int,
    tokens: Int[Tensor, "batch pos"],
    prompt_len: int,
    pairs: Int[Tensor, "pair 2"],
) -> Float[Tensor, " pair"]:
    """The suffix losses with one neuron of `layer` zeroed; a pair is a row of the batch and the neuron."""
    row, neuron = pairs.unbind(dim=1)
    if layer == model.cfg.n_layers - 1 and _has_plain_end(model):
        return _losses_without_last(model, cache, tokens, prompt_len, row, neuron)
    residuals = _residuals_without(model, cache, layer, row, neuron)
    residuals = run_layers(model, residuals, layer + 1, prompt_len)
    return target_loss(model, residuals, tokens[row], prompt_len)


def _residuals_without(
    model: HookedTransformer,
    cache: ActivationCache,
    layer: int,
    row: Int[Tensor, " pair"],
    neuron: Int[Tensor, " pair"],
) -> Float[Tensor, "pair pos d_model"]:
    """The residual stream after `layer` of each pair's row with its neuron zeroed."""
    if norm_after_mlp(model):
        return _residuals_by_masking(model, cache, layer, row, neuron)
    activations = cache[post(layer)][row, :, neuron].unsqueeze(-1)
    weights = rearrange(model.blocks[layer].mlp.W_out[neuron], "pair d_model -> pair 1 d_model")
    return cache["resid_post", layer][row] - activations * weights


def _residuals_by_masking(
    model: HookedTransformer,
    cache: ActivationCache,
    layer: int,
    row: Int[Tensor, " pair"],
    neuron: Int[Tensor, " pair"],
) -> Float[Tensor, "pair pos d_model"]:
    def zero_one_each(activations: Float[Tensor, "pair pos d_mlp"], hook: object) -> Float[Tensor, "pair pos d_mlp"]:
        return activations.scatter(2, neuron[:, None, None].expand(-1, activations.shape[1], 1), 0.0)

    with model.hooks(fwd_hooks=[(post(layer), zero_one_each)]):
        return model(cache["resid_pre", layer][row], start_at_layer=layer, stop_at_layer=layer + 1)


def _has_plain_end(model: HookedTransformer) -> bool:
    """Whether the last MLP adds to the residual stream, of which the logits are linear but for the norm's scale."""
    return (
        isinstance(model.ln_final, LayerNorm | RMSNorm)
        and not norm_after_mlp(model)
        and model.cfg.output_logits_soft_cap <= 0
        and model.cfg.dtype in (torch.float32, torch.float64)
    )


def _losses_without_last(
    model: HookedTransformer,
    cache: ActivationCache,
    tokens: Int[Tensor, "batch pos"],
    prompt_len: int,
    row: Int[Tensor, " pair"],
    neuron: Int[Tensor, " pair"],
) -> Float[Tensor, " pair"]:
    """The suffix losses with one neuron of the last layer zeroed, without a product for each position of each pair."""
    norm, layer, targets = model.ln_final, model.cfg.n_layers - 1, slice(prompt_len - 1, -1)

    def centred(stream: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        return stream - stream.mean(dim=-1, keepdim=True) if isinstance(norm, LayerNorm) else stream

    clean, written = centred(cache["resid_post", layer][:, targets]), centred(model.blocks[layer].mlp.W_out[neuron])
    activation = cache[post(layer)][row, targets, neuron].unsqueeze(-1)
    scale = ((clean[row] - activation * written.unsqueeze(1)).square().mean(dim=-1, keepdim=True) + norm.eps).sqrt()
    clean_logits, written_logits = ((stream * norm.w) @ model.unembed.W_U for stream in (clean, written))
    constant = model.unembed.b_U + (norm.b @ model.unembed.W_U if isinstance(norm, LayerNorm) else 0)
    losses = []
    for place, gold in enumerate(tokens[:, prompt_len:].T):
        logits = torch.addcmul(clean_logits[row, place], activation[:, place], written_logits, value=-1)
        losses.append(cross_entropy(logits.div_(scale[:, place]).add_(constant), gold[row], reduction="none"))
    return torch.stack(losses).mean(dim=0).float()
