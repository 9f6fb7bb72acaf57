"""The forward pass in parts, so that nobody computes more of it than is read."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from transformer_lens import HookedTransformer
from transformer_lens.cache.key_value_cache_entry import TransformerLensKeyValueCacheEntry
from transformer_lens.components.transformer_block import POST_NORM_ARCHITECTURES

from memloc_lens.products import fast_products

LOGITS_AT_ONCE = {True: 2**20, False: 2**28}
"""Logits that are held at a time, on a CPU and elsewhere."""


_prefix: ContextVar[tuple[int, dict[bytes, Tensor]] | None] = ContextVar("prefix", default=None)


def final_residual(
    model: HookedTransformer, tokens: Int[Tensor, "batch pos"], prompt_len: int
) -> Float[Tensor, "batch suffix d_model"]:
    """The residual stream after the last layer, before the final norm, at the target positions; see `kept_prefix`."""
    # a kept prefix has no graph, and must not keep one
    layer, kept = (None if torch.is_grad_enabled() else _prefix.get()) or (0, {})
    key = repr(tuple(tokens.shape)).encode() + tokens.cpu().numpy().tobytes()
    if key not in kept:
        kept[key] = model(tokens.to(model.cfg.device), return_type="logits", stop_at_layer=layer)
    return run_layers(model, kept[key], layer, prompt_len)


def run_layers(
    model: HookedTransformer, residual: Float[Tensor, "batch pos d_model"], start: int, prompt_len: int
) -> Float[Tensor, "batch suffix d_model"]:
    """Run the layers from `start` on; of the last one only what the target positions need.

    Other positions take part in the last layer by their keys and values alone.

    Args:
        model: whose hooks see the target positions only in the last layer's MLP.
        residual: the stream that enters layer `start`, at all positions.
        start: from 0 to the number of layers, which runs none.
        prompt_len: of the rows.
    """
    last = model.cfg.n_layers - 1
    targets = slice(prompt_len - 1, -1)
    if start > last or not _can_split_last_layer(model):
        return model(residual, start_at_layer=start, stop_at_layer=last + 1)[:, targets]
    entering = model(residual, start_at_layer=start, stop_at_layer=last)
    block, past = model.blocks[last], None
    if prompt_len > 1:
        normed = block.ln1(entering[:, : prompt_len - 1])
        _, keys, values = block.attn.calculate_qkv_matrices(normed, normed, normed)
        past = TransformerLensKeyValueCacheEntry(keys, values)
    return block(entering[:, targets], past_kv_cache_entry=past)


def _can_split_last_layer(model: HookedTransformer) -> bool:
    """Whether the last layer's keys and values are all that other positions give to the targets, as it is written."""
    cfg = model.cfg
    return (
        cfg.positional_embedding_type in ("standard", "rotary")
        and not norm_after_mlp(model)
        and not (cfg.use_attn_in or cfg.use_split_qkv_input or cfg.use_qk_norm or cfg.use_logn_attn)
        and cfg.clip_qkv is None
    )


@contextmanager
def kept_prefix(layer: int) -> Iterator[None]:
    """Let `final_residual` run the layers before `layer` once for each batch of tokens, and keep what they give.

    For one model, of which only later layers are ablated while the context is open, and for passes without gradients:
    others run whole. It keeps a residual stream for
    every batch, which goes when the context closes.
    """
    token = _prefix.set((layer, {}) if layer > 0 else None)
    try:
        yield
    finally:
        _prefix.reset(token)


def target_logits(
    model: HookedTransformer, residual: Float[Tensor, "batch suffix d_model"]
) -> Float[Tensor, "batch suffix d_vocab"]:
    """Logits of the suffix, from the final residual stream at the target positions, which predict it."""
    logits = model.unembed(model.ln_final(residual))
    cap = model.cfg.output_logits_soft_cap
    return cap * torch.tanh(logits / cap) if cap > 0 else logits


def target_losses(
    model: HookedTransformer,
    residual: Float[Tensor, "batch suffix d_model"],
    tokens: Int[Tensor, "batch pos"],
    prompt_len: int,
) -> Float[Tensor, "batch suffix"]:
    """-log p(token | all before it) of every token of the suffix, in nats, in float32.

    Logits are by far the largest tensor of a forward pass, and those that leave a processor's cache cost more than the
    product that makes them. So they are made a few at a time, and where a gradient is wanted and the weights are
    frozen, it is taken on the spot.
    """
    suffix = tokens[:, prompt_len:].to(residual.device)
    if model.cfg.output_logits_soft_cap > 0 or model.unembed.W_U.requires_grad:
        logits = target_logits(model, residual).float()
        return cross_entropy(logits.transpose(1, 2), suffix, reduction="none")
    normalized = model.ln_final(residual)
    wants_gradient = torch.is_grad_enabled() and normalized.requires_grad
    losses = _UnembeddedLoss.apply(
        normalized.flatten(0, 1), model.unembed.W_U, model.unembed.b_U, suffix.flatten(), wants_gradient
    )
    return losses.view(suffix.shape)


def target_loss(
    model: HookedTransformer,
    residual: Float[Tensor, "batch suffix d_model"],
    tokens: Int[Tensor, "batch pos"],
    prompt_len: int,
) -> Float[Tensor, " batch"]:
    """Suffix loss of each row: the mean of `target_losses`, in nats, in float32."""
    return target_losses(model, residual, tokens, prompt_len).mean(dim=1)


class _UnembeddedLoss(torch.autograd.Function):
    """-log p of the gold token from the normalized stream; keeps the gradient by it in place of the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        normalized: Float[Tensor, "target d_model"],
        weight: Float[Tensor, "d_model d_vocab"],
        bias: Float[Tensor, " d_vocab"],
        gold: Int[Tensor, " target"],
        wants_gradient: bool,
    ) -> Float[Tensor, " target"]:
        losses, gradients = [], []
        at_once = max(16, LOGITS_AT_ONCE[gold.device.type == "cpu"] // weight.shape[1] // 64 * 64)
        for part, wanted in zip(normalized.split(at_once), gold.split(at_once), strict=True):
            log_probs = linear(part, weight.T, bias).float().log_softmax(dim=-1)
            losses.append(-log_probs.gather(1, wanted[:, None])[:, 0])
            if wants_gradient:
                change = log_probs.exp_()  # softmax minus one-hot is the derivative by the logits
                change[torch.arange(len(wanted), device=wanted.device), wanted] -= 1
                gradients.append(change.to(weight.dtype) @ weight.T)
        if wants_gradient:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *by_losses: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        return (gradient * by_losses[0][:, None]).to(gradient.dtype), None, None, None, None


def norm_after_mlp(model: HookedTransformer) -> bool:
    """Whether a norm stands between an MLP and the residual stream (Gemma 2, OLMo 2), so that neurons do not add up."""
    return model.cfg.use_normalization_before_and_after or model.cfg.original_architecture in POST_NORM_ARCHITECTURES


@contextmanager
def frozen(model: HookedTransformer) -> Iterator[None]:
    """Evaluation mode and no gradients for parameters, both put back on leaving as they were."""
    modes = [(module, module.training) for module in model.modules()]
    needs = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    for parameter, _ in needs:
        parameter.requires_grad_(False)
    try:
        with fast_products(model.cfg.device):
            yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in needs:
            parameter.requires_grad_(requires_grad)
