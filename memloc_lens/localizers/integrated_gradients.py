"""Integrated gradients: how much of each true token's probability is due to a neuron's activation.

Chang et al. (2024), eq. 6, after Dai et al. (2022) and Sundararajan et al. (2017). For target position t, the
activations of layer l *at t alone* are scaled from nothing to their own value in m steps, both ends included:

    score[l, i] = mean over t of  post[l][t, i] * (1/m) * sum over a of  d p(x_{t+1} | x_<=t) / d post[l][t, i]

where the derivative is taken at `a * post[l][t]`.

Done directly, this takes one run of a prefix for every t. But a change at t alone reaches other positions only
through attention from later positions, and the probability at t depends on position t alone. So all positions go
through one run, in which every position attends to the *clean* keys and values of the positions before it and to its
own, perturbed, key and value:

1. A clean pass keeps each layer's keys, values, activations and residual stream.
2. Layer l runs from its clean input with its activations replaced by a * post[l], all steps a, and many sequences,
   in one batch.
3. In each later layer, queries come from the perturbed stream while keys and values are replaced by the clean
   ones, and the diagonal is corrected: q.(k - k_clean)/scale is added to a position's attention score for
   itself, and pattern * (v - v_clean) to what it reads.
4. One backward pass from the sum of the probabilities gives the gradients of all positions.

Where a hook of the user's, or a kind of attention that step 3 does not know, may let positions act on one another in
other ways, every prefix has its own runs after all. A `TransformerBridge` is tried: both ways must give the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch
from einops import EinopsError, einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from memloc_lens.bridge import is_bridge, run_between
from memloc_lens.checks import check_model, check_number, in_one_line
from memloc_lens.components import HEADS, NEURONS, Hook, post
from memloc_lens.devices import rows_of
from memloc_lens.forward import CleanPass, clean_pass
from memloc_lens.hooks import hooked, hooked_at
from memloc_lens.library_types import ActivationCache, HookedModel, HookPoint
from memloc_lens.localizers.scoring import score
from memloc_lens.logits import at_least_float32, target_logits, target_losses
from memloc_lens.memory import in_chunks, rows_at_once
from memloc_lens.sequence import Batch, MemorizedSequence

TRIED = 7
"""Tokens that both ways are tried on for a bridge."""

_known_bridges: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""The bridges that were tried: whether all positions can go through one run."""


@dataclass(frozen=True)
class IntegratedGradients:
    """Integrated gradients of the probability of each true token, exact, all positions in one pass. For neurons.

    Args:
        steps: Number of points of the integral, both ends included. With 1, the gradient is taken at zero.
        first_layer: Layers before it are left out, and score 0.

    Example:
        >>> IntegratedGradients(steps=5)(model, sequence).shape
        torch.Size([6, 768])
    """

    name: ClassVar[str] = "integrated-gradients"
    steps: int = 20
    first_layer: int = 0

    def __post_init__(self) -> None:
        check_number("steps", self.steps, least=1, whole=True)
        check_number("first_layer", self.first_layer, least=0, whole=True)

    def __call__(
        self, model: HookedModel, sequences: MemorizedSequence | Sequence[MemorizedSequence]
    ) -> Float[Tensor, "*sequence layer neuron"]:
        """Return signed scores in units of probability: [layer, neuron], or [sequence, layer, neuron] for a list.

        Raises:
            ValueError: if a hook of the user's acts on a prefix of a sequence in another way than on the whole.
        """
        model = check_model(model)
        graph_layers = model.cfg.n_layers - self.first_layer
        return score(
            model,
            sequences,
            self._score_batch,
            first_layer=self.first_layer,
            graph_layers=graph_layers,
            rows_each=self.steps,
        )

    def _score_batch(self, model: HookedModel, batch: Batch) -> Float[Tensor, "row layer neuron"]:
        if _attends_as_known(model):
            return self._score_together(model, batch)
        _check_prefixes_agree(model, batch.tokens)
        return self._score_by_prefixes(model, batch)

    def _score_together(self, model: HookedModel, batch: Batch) -> Float[Tensor, "row layer neuron"]:
        kept = ("mlp.hook_post", "hook_resid_pre", "attn.hook_v", _key_name(model))
        with torch.no_grad():
            names = [f"blocks.{layer}.{name}" for layer in range(model.cfg.n_layers) for name in kept]
            _, cache = model.run_with_cache(batch.tokens, return_type=None, names_filter=names)
        scores, copies = _no_scores(model, batch), self._copies(batch)
        for layer in range(self.first_layer, model.cfg.n_layers):
            size = rows_at_once(model, batch.length, batch.suffix_len, model.cfg.n_layers - layer)
            work = partial(_attributions, model, cache, layer, batch, self.steps)
            scores[:, layer] = torch.stack(in_chunks(copies, size, work)).sum(dim=0).to(scores.device)
        return scores

    def _score_by_prefixes(self, model: HookedModel, batch: Batch) -> Float[Tensor, "row layer neuron"]:
        scores, copies = _no_scores(model, batch), self._copies(batch)
        for end in range(batch.prompt_len, batch.length):
            with torch.no_grad():
                clean = clean_pass(model, batch.tokens[:, :end])
            for layer in range(self.first_layer, model.cfg.n_layers):
                size = rows_at_once(model, end, 1, model.cfg.n_layers - layer)
                work = partial(_attributions_at_the_end, model, clean, layer, batch.tokens[:, end], self.steps)
                scores[:, layer] += torch.stack(in_chunks(copies, size, work)).sum(dim=0).to(scores.device)
        return scores / batch.suffix_len / self.steps

    def _copies(self, batch: Batch) -> Int[Tensor, "copy 2"]:
        """Return for each copy its row of the batch and its point of the integral."""
        return torch.cartesian_prod(torch.arange(len(batch)), torch.arange(self.steps)).to(batch.tokens.device)


def _no_scores(model: HookedModel, batch: Batch) -> Float[Tensor, "row layer neuron"]:
    return torch.zeros(len(batch), *NEURONS.shape(model), device=batch.tokens.device, dtype=torch.float32)


def _attends_as_known(model: HookedModel) -> bool:
    """Tell whether positions act on one another through keys and values alone, as the hook points show them."""
    cfg = model.cfg
    rotary = cfg.positional_embedding_type == "rotary"  # then keys are seen after their norm
    heads = [HEADS.activations_at(layer) for layer in range(cfg.n_layers)]
    if hooked(model) or hooked_at(model, *heads):
        return False
    if is_bridge(model):
        return _bridge_attends_as_known(model)
    return (
        (rotary or (cfg.positional_embedding_type in ("standard", "alibi") and not cfg.use_qk_norm))
        and cfg.clip_qkv is None
        and not (cfg.use_logn_attn or cfg.use_dynamic_ntk_rope)
    )


def _bridge_attends_as_known(model: HookedModel) -> bool:
    """Tell whether the scores of some tokens in the last layers are the same in both ways; a bridge is tried once.

    What attention a bridge holds is known to transformers alone.
    """
    if model not in _known_bridges:
        layers = model.cfg.n_layers
        tried = IntegratedGradients(steps=2, first_layer=max(0, layers - 3))
        tokens = torch.arange(TRIED, device=model.cfg.device)[None] % model.cfg.d_vocab
        batch = Batch(tokens, prompt_len=2)
        limit = 1e-4 if model.cfg.dtype in (torch.float32, torch.float64) else 0.05
        try:
            together, by_prefixes = tried._score_together(model, batch), tried._score_by_prefixes(model, batch)
            _known_bridges[model] = bool((together - by_prefixes).norm() <= limit * by_prefixes.norm())
        except (RuntimeError, KeyError, ValueError, EinopsError):  # hook points of other shapes, or none
            _known_bridges[model] = False
    return _known_bridges[model]


@torch.no_grad()
def _check_prefixes_agree(model: HookedModel, tokens: Int[Tensor, "row pos"]) -> None:
    """Refuse hooks for which the probability of a token depends on the tokens after it."""
    name = hooked(model)
    if not name:
        return
    whole = model(tokens, return_type="logits")[:, :-1]
    try:
        prefix = model(tokens[:, :-1], return_type="logits")
        agree = bool((prefix - whole).abs().max() <= 1e-3 * whole.abs().max())
    except Exception as error:
        raise ValueError(f"{name} has a hook that fails on a prefix of the sequence: {in_one_line(error)}") from error
    if not agree:
        raise ValueError(
            f"{name} has a hook that changes a prefix of the sequence in another way than the whole, and integrated "
            "gradients are taken of prefixes; let the hook act on each position by itself, or remove it"
        )


def _attributions_at_the_end(
    model: HookedModel,
    clean: CleanPass,
    layer: int,
    true: Int[Tensor, " row"],
    steps: int,
    copies: Int[Tensor, "copy 2"],
) -> Float[Tensor, "row neuron"]:
    """Return what some copies of prefixes add to the scores of a layer: straight from the formula."""
    row, step = copies.to(clean.activations[layer].device).unbind(dim=1)
    last = clean.activations[layer][row, -1]  # [copy, neuron]
    scaled = (_fractions(steps, last)[step, None] * last).requires_grad_(True)

    def write(activations: Float[Tensor, "copy pos neuron"], hook: HookPoint) -> Float[Tensor, "copy pos neuron"]:
        return torch.cat([activations[:, :-1], scaled.unsqueeze(1)], dim=1)

    with torch.enable_grad(), model.hooks(fwd_hooks=[(post(layer), write)]):
        # a backward hook before the neurons fails if nothing there has a gradient
        stream = rows_of(clean.streams[layer], row).requires_grad_(True)
        logits = target_logits(model, run_between(model, stream, layer, model.cfg.n_layers))[:, -1]
        wanted = rows_of(true, row)[:, None].to(logits.device)
        probabilities = at_least_float32(logits).softmax(dim=-1).gather(1, wanted)
        (gradients,) = torch.autograd.grad(probabilities.sum(), scaled)
    attributions = at_least_float32(gradients) * at_least_float32(last)
    return attributions.new_zeros(len(true), attributions.shape[1]).index_add(0, row, attributions)


def _fractions(steps: int, like: Tensor) -> Float[Tensor, " step"]:
    return torch.linspace(0, 1, steps, device=like.device, dtype=torch.float32).to(like)


def _attributions(
    model: HookedModel,
    cache: ActivationCache,
    layer: int,
    batch: Batch,
    steps: int,
    copies: Int[Tensor, "copy 2"],
) -> Float[Tensor, "row neuron"]:
    """Return what some copies, each a row of the batch at a point of the integral, add to the scores of a layer."""
    clean = cache[post(layer)]  # [row, pos, neuron]
    row, step = copies.to(clean.device).unbind(dim=1)
    activations = (_fractions(steps, clean)[step, None, None] * clean[row]).requires_grad_(True)
    hooks: list[tuple[str, Hook]] = [(post(layer), lambda _, hook: activations)]
    for later in range(layer + 1, model.cfg.n_layers):
        hooks += _clean_past_hooks(model, cache, later, row)
    with torch.enable_grad(), model.hooks(fwd_hooks=hooks):
        residual = run_between(model, cache["resid_pre", layer][row], layer, model.cfg.n_layers)
        probabilities = torch.exp(-target_losses(model, residual[:, batch.targets], batch[copies[:, 0]]))
        # a probability depends on the activations of its own position only, so one sum serves all positions
        (gradients,) = torch.autograd.grad(probabilities.sum(), activations)
    attributions = einsum(
        at_least_float32(gradients[:, batch.targets]),
        at_least_float32(clean[row, batch.targets]),
        "copy pos neuron, copy pos neuron -> copy neuron",
    )
    sums = attributions.new_zeros(len(batch), attributions.shape[1]).index_add(0, row, attributions)
    return sums / batch.suffix_len / steps


def _key_name(model: HookedModel) -> str:
    """Return the hook point of keys as attention uses them: after rotation where positions are rotary.

    A bridge shows them before; the product of a position's own query and key is the same.
    """
    is_rotary = model.cfg.positional_embedding_type == "rotary" and not is_bridge(model)
    return "attn.hook_rot_k" if is_rotary else "attn.hook_k"


def _attention_scale(model: HookedModel, layer: int) -> float:
    """Return what products of queries and keys are divided by; a bridge's attention multiplies."""
    attention = model.blocks[layer].attn
    if not is_bridge(model):
        return attention.attn_scale
    return 1 / getattr(attention.original_component, "scaling", model.cfg.d_head**-0.5)


def _clean_past_hooks(
    model: HookedModel, cache: ActivationCache, layer: int, row: Int[Tensor, " copy"]
) -> list[tuple[str, Hook]]:
    """Return hooks that let every position of a layer attend to the clean past and its own perturbed self (step 3)."""
    from transformer_lens.utilities.activation_functions import apply_softcap

    scale = _attention_scale(model, layer)
    key_name = _key_name(model)
    clean_key, clean_value = (rows_of(cache[f"blocks.{layer}.{name}"], row) for name in (key_name, "attn.hook_v"))
    own: dict[str, Tensor] = {}

    def by_head(heads: Float[Tensor, "copy pos *head"]) -> Float[Tensor, "copy pos some_head d_head"]:
        return heads.unflatten(2, (-1, model.cfg.d_head)) if heads.ndim == 3 else heads  # side by side in a bridge

    def to_all_heads(heads: Float[Tensor, "copy pos *kv_head"]) -> Float[Tensor, "copy pos head d_head"]:
        heads = by_head(heads)
        return heads.repeat_interleave(model.cfg.n_heads // heads.shape[2], dim=2)

    def own_product(keys: Float[Tensor, "copy pos head d_head"]) -> Float[Tensor, "copy head pos"]:
        products = einsum(own["query"], keys, "copy pos head d, copy pos head d -> copy head pos")
        return products / scale

    def capped(scores: Tensor) -> Tensor:
        return apply_softcap(scores, model.cfg.attn_scores_soft_cap)

    def keep_query(query: Tensor, hook: HookPoint) -> None:
        own["query"] = by_head(query)

    def keep_pattern(pattern: Tensor, hook: HookPoint) -> None:
        own["attention"] = rearrange(pattern.diagonal(dim1=2, dim2=3), "copy head pos -> copy pos head 1")

    def clean_keys(key: Tensor, hook: HookPoint) -> Tensor:
        own["key_change"] = to_all_heads(key - clean_key)
        return clean_key

    def clean_values(value: Tensor, hook: HookPoint) -> Tensor:
        own["value_change"] = to_all_heads(value - clean_value)
        return clean_value

    def own_score(scores: Tensor, hook: HookPoint) -> Tensor:
        change = own_product(own["key_change"])
        if model.cfg.attn_scores_soft_cap > 0:  # Gemma 2: scores are capped before they come here
            clean = own_product(to_all_heads(clean_key))
            change = capped(clean + change) - capped(clean)
        return scores + torch.diag_embed(change)

    def own_value(read: Tensor, hook: HookPoint) -> Tensor:
        return read + (own["attention"].to(read.dtype) * own["value_change"]).reshape(read.shape)

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
