"""From the final residual stream to the logits of the suffix, and what is made of them without keeping them."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import linear

from memloc_lens.hooks import END, hooked
from memloc_lens.library_types import HookedModel
from memloc_lens.sequence import Batch

CPU_LOGITS_AT_ONCE, GPU_LOGITS_AT_ONCE = 2**21, 2**28
"""Logits that are held at a time: on a CPU they should stay in its caches."""


OfLogits = Callable[
    [Float[Tensor, "target d_vocab"], Int[Tensor, " target"]],
    tuple[Float[Tensor, " target"], Callable[[], Float[Tensor, "target d_vocab"]]],
]
"""A value of each true token, and a function that makes its derivative by the logits of what it has kept."""


def target_logits(
    model: HookedModel, residual: Float[Tensor, "row target d_model"], batch: Batch | None = None
) -> Float[Tensor, "row suffix d_vocab"]:
    """Return the logits of the suffix, from the final residual stream.

    Args:
        model: whose final norm and unembedding are used.
        residual: as `final_residual` returns it.
        batch: the rows that it belongs to; may be left out if no user's hook is on the final norm or the unembedding.
    """
    logits = model.unembed(_normalized(model, residual))
    if batch is not None and logits.shape[1] == batch.length:
        logits = logits[:, batch.targets]
    cap = model.cfg.output_logits_soft_cap
    return cap * torch.tanh(logits / cap) if cap > 0 else logits


def _normalized(model: HookedModel, residual: Float[Tensor, "row target d_model"]) -> Tensor:
    return residual if model.cfg.normalization_type is None else model.ln_final(residual)


def at_least_float32(values: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """Return float64 as it is, and anything else in float32."""
    return values if values.dtype == torch.float64 else values.float()


def target_losses(
    model: HookedModel, residual: Float[Tensor, "row target d_model"], batch: Batch
) -> Float[Tensor, "row suffix"]:
    """Return -log p(token | all before it) of every token of the suffix, in nats.

    Of a model in float64 they are in float64, otherwise in float32; they are on `model.cfg.device`.

    Logits are by far the largest tensor of a forward pass. Writing them to memory and reading them back costs more
    than the matrix product that makes them. So a few are made at a time, and if a gradient is wanted and the weights
    are frozen, it is taken before they are dropped.

    Args:
        model: whose unembedding is used.
        residual: the final residual stream, as `final_residual` returns it.
        batch: the rows that it belongs to.
    """
    return _of_targets(model, residual, batch, _loss)


def target_loss(
    model: HookedModel, residual: Float[Tensor, "row target d_model"], batch: Batch
) -> Float[Tensor, " row"]:
    """Return the suffix loss of each row: the mean of `target_losses`, in nats, in their precision."""
    return target_losses(model, residual, batch).mean(dim=1)


def _of_targets(
    model: HookedModel, residual: Float[Tensor, "row target d_model"], batch: Batch, of_logits: OfLogits
) -> Float[Tensor, "row suffix"]:
    suffix = batch.suffix.to(residual.device)
    if model.cfg.output_logits_soft_cap > 0 or model.unembed.W_U.requires_grad or hooked(model, *END):
        logits = at_least_float32(target_logits(model, residual, batch))
        return of_logits(logits.flatten(0, 1), suffix.flatten())[0].view(suffix.shape).to(model.cfg.device)
    normalized = _normalized(model, residual)
    wants_gradient = torch.is_grad_enabled() and normalized.requires_grad
    values = _OfLogits.apply(
        normalized.flatten(0, 1), model.unembed.W_U, model.unembed.b_U, suffix.flatten(), of_logits, wants_gradient
    )
    return values.view(suffix.shape).to(model.cfg.device)


def target_log_odds(
    model: HookedModel, residual: Float[Tensor, "row target d_model"], batch: Batch
) -> Float[Tensor, "row suffix"]:
    """Return log p - log(1 - p) of every token of the suffix: its logit less the log-sum-exp of all others.

    They tell p = 1 - 1e-12 from 1, which a probability in float32 does not. Precision and memory are those of
    `target_losses`.

    Args:
        model: whose unembedding is used.
        residual: the final residual stream, as `final_residual` returns it.
        batch: the rows that it belongs to.
    """
    return _of_targets(model, residual, batch, _log_odds)


class _OfLogits(torch.autograd.Function):
    """A value of every token from the normalized stream; keeps the gradient with respect to it, not the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        normalized: Float[Tensor, "target d_model"],
        weight: Float[Tensor, "d_model d_vocab"],
        bias: Float[Tensor, " d_vocab"],
        true: Int[Tensor, " target"],
        of_logits: OfLogits,
        wants_gradient: bool,
    ) -> Float[Tensor, " target"]:
        values, gradients = [], []
        logits_at_once = CPU_LOGITS_AT_ONCE if true.device.type == "cpu" else GPU_LOGITS_AT_ONCE
        at_once = max(16, logits_at_once // weight.shape[1] // 64 * 64)
        for part, wanted in zip(normalized.split(at_once), true.split(at_once), strict=True):
            value, gradient = of_logits(at_least_float32(linear(part, weight.T, bias)), wanted)
            values.append(value)
            if wants_gradient:
                gradients.append(gradient().to(weight.dtype) @ weight.T)
        if wants_gradient:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, *by_values: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        return (gradient * by_values[0][:, None]).to(gradient.dtype), None, None, None, None, None


def _loss(
    logits: Float[Tensor, "target d_vocab"], true: Int[Tensor, " target"]
) -> tuple[Float[Tensor, " target"], Callable[[], Float[Tensor, "target d_vocab"]]]:
    log_probs = logits.log_softmax(dim=-1)

    def gradient() -> Float[Tensor, "target d_vocab"]:  # softmax minus one-hot
        change = log_probs.exp_()
        change[torch.arange(len(true), device=true.device), true] -= 1
        return change

    return -log_probs.gather(1, true[:, None])[:, 0], gradient


def _log_odds(
    logits: Float[Tensor, "target d_vocab"], true: Int[Tensor, " target"]
) -> tuple[Float[Tensor, " target"], Callable[[], Float[Tensor, "target d_vocab"]]]:
    own = logits.gather(1, true[:, None])[:, 0]
    others = logits.scatter(1, true[:, None], -torch.inf)
    total = others.logsumexp(dim=-1)

    def gradient() -> Float[Tensor, "target d_vocab"]:  # one-hot minus the softmax of the others
        return others.sub_(total[:, None]).exp_().neg_().scatter_(1, true[:, None], 1.0)

    return own - total, gradient
