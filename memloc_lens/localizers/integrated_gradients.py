"""Integrated gradients: how the probability of each next token builds up along a neuron's activation.

Chang et al. (2024), eq. 6, after Dai et al. (2022) and Sundararajan et al. (2017). For target position t, the
activations of layer l *at t alone* are scaled from nothing to their own value in m steps, both ends included:

    score[l, i] = mean over t of  post[l][t, i] * (1/m) * sum over a of  d p(x_{t+1} | x_<=t) / d post[l][t, i]

where the derivative is taken at a * post[l][t].

Written down directly that is one run of a prefix for every t. But what is changed at t alone reaches other
positions only through attention from later positions, and the probability at t reads position t alone. So all
positions go through one run, if every position attends to the *clean* keys and values of those before it and
to its own, perturbed, key and value:

1. A clean pass keeps each layer's keys, values, activations and residual stream.
2. Layer l runs from its clean input with its activations replaced by a * post[l], all steps a, and many sequences,
   in one batch.
3. In each later layer, queries come from the perturbed stream while keys and values are replaced by the clean
   ones, and the diagonal is put right: q.(k - k_clean)/scale is added to a position's attention score for
   itself, and pattern * (v - v_clean) to what it reads.
4. One backward pass from the sum of the probabilities gives the gradients of all positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import ActivationCache, HookedTransformer
from transformer_lens.hook_points import HookPoint

from memloc_lens.ablation import Hook, post
from memloc_lens.forward import target_losses
from memloc_lens.localizers.scoring import score
from memloc_lens.memory import in_chunks, rows_at_once
from memloc_lens.sequence import MemorizedSequence


@dataclass(frozen=True)
class IntegratedGradients:
    """Integrated gradients of the probability of each gold token, exact, all positions in one pass.

    Args:
        steps: m, the points of the integral, both ends included; 1 takes the gradient at the zero end.
        first_layer: layers before it are left out, and score 0.
    """

    steps: int = 20
    first_layer: int = 0

    def __call__(
        self, model: HookedTransformer, sequences: MemorizedSequence | Sequence[MemorizedSequence]
    ) -> Float[Tensor, "*sequence layer neuron"]:
        """Signed scores in units of probability, [layer, neuron], or [sequence, layer, neuron] for a list.

        Raises:
            ValueError: if the model caps its attention scores (Gemma 2), where step 3 does not hold.
        """
        if model.cfg.attn_scores_soft_cap > 0:
            raise ValueError(f"integrated gradients do not support the capped attention of {model.cfg.model_name}")
        return score(model, sequences, self._score_batch, model.cfg.n_layers - self.first_layer, self.steps)

    def _score_batch(
        self, model: HookedTransformer, tokens: Int[Tensor, "batch pos"], prompt_len: int
    ) -> Float[Tensor, "batch layer neuron"]:
        kept = ("mlp.hook_post", "hook_resid_pre", "attn.hook_v", _key_name(model))
        with torch.no_grad():
            _, cache = model.run_with_cache(tokens, return_type=None, names_filter=lambda name: name.endswith(kept))
        scores = torch.zeros(len(tokens), model.cfg.n_layers, model.cfg.d_mlp, device=tokens.device)
        copies = torch.cartesian_prod(torch.arange(len(tokens)), torch.arange(self.steps)).to(tokens.device)
        for layer in range(self.first_layer, model.cfg.n_layers):
            size = rows_at_once(model, tokens.shape[1], tokens.shape[1] - prompt_len, model.cfg.n_layers - layer)
            work = partial(_attributions, model, cache, layer, tokens, prompt_len, self.steps)
            scores[:, layer] = torch.stack(in_chunks(copies, size, work)).sum(dim=0)
        return scores


def _attributions(
    model: HookedTransformer,
    cache: ActivationCache,
    layer: int,
    tokens: Int[Tensor, "batch pos"],
    prompt_len: int,
    steps: int,
    copies: Int[Tensor, "copy 2"],
) -> Float[Tensor, "batch d_mlp"]:
    """What some copies, each a row of the batch at a point of the integral, add to the scores of a layer."""
    row, step = copies.unbind(dim=1)
    clean = cache[post(layer)]
    fractions = torch.linspace(0, 1, steps, device=clean.device).to(clean)[step]
    activations = (fractions[:, None, None] * clean[row]).requires_grad_(True)
    hooks: list[tuple[str, Hook]] = [(post(layer), lambda _, hook: activations)]
    for later in range(layer + 1, model.cfg.n_layers):
        hooks += _clean_past_hooks(model, cache, later, row)
    with torch.enable_grad(), model.hooks(fwd_hooks=hooks):
        residual = model(cache["resid_pre", layer][row], start_at_layer=layer, stop_at_layer=model.cfg.n_layers)
        gold = torch.exp(-target_losses(model, residual[:, prompt_len - 1 : -1], tokens[row], prompt_len))
        (gradients,) = torch.autograd.grad(gold.sum(), activations)
    targets = slice(prompt_len - 1, -1)
    each = einsum(
        gradients[:, targets].float(), clean[row, targets].float(), "copy pos neuron, copy pos neuron -> copy neuron"
    )
    sums = torch.zeros(len(tokens), each.shape[1], device=each.device).index_add(0, row, each)
    return sums / (tokens.shape[1] - prompt_len) / steps


def _key_name(model: HookedTransformer) -> str:
    """The hook point of keys as attention uses them: after rotation where positions are rotary."""
    return "attn.hook_rot_k" if model.cfg.positional_embedding_type == "rotary" else "attn.hook_k"


def _clean_past_hooks(
    model: HookedTransformer, cache: ActivationCache, layer: int, row: Int[Tensor, " copy"]
) -> list[tuple[str, Hook]]:
    """Hooks that let every position of a layer see the clean past and its own perturbed self (step 3)."""
    attention = model.blocks[layer].attn
    key_name = _key_name(model)
    clean_key, clean_value = cache[f"blocks.{layer}.{key_name}"][row], cache[f"blocks.{layer}.attn.hook_v"][row]
    own: dict[str, Tensor] = {}

    def to_all_heads(heads: Float[Tensor, "copy pos kv_head d_head"]) -> Float[Tensor, "copy pos head d_head"]:
        return heads.repeat_interleave(model.cfg.n_heads // heads.shape[2], dim=2)

    def keep_query(query: Tensor, hook: HookPoint) -> None:
        own["query"] = query

    def keep_pattern(pattern: Tensor, hook: HookPoint) -> None:
        own["attention"] = rearrange(pattern.diagonal(dim1=2, dim2=3), "copy head pos -> copy pos head 1")

    def clean_keys(key: Tensor, hook: HookPoint) -> Tensor:
        own["key_change"] = to_all_heads(key - clean_key)
        return clean_key

    def clean_values(value: Tensor, hook: HookPoint) -> Tensor:
        own["value_change"] = to_all_heads(value - clean_value)
        return clean_value

    def own_score(scores: Tensor, hook: HookPoint) -> Tensor:
        change = einsum(own["query"], own["key_change"], "copy pos head d, copy pos head d -> copy head pos")
        return scores + torch.diag_embed(change / attention.attn_scale)

    def own_value(read: Tensor, hook: HookPoint) -> Tensor:
        return read + own["attention"].to(read.dtype) * own["value_change"]

    query_name = key_name.replace("_k", "_q")
    hooks: dict[str, Hook] = {
        query_name: keep_query,
        key_name: clean_keys,
        "attn.hook_v": clean_values,
        "attn.hook_attn_scores": own_score,
        "attn.hook_pattern": keep_pattern,
        "attn.hook_z": own_value,
    }
    return [(f"blocks.{layer}.{name}", hook) for name, hook in hooks.items()]
