"""Compare a `HookedTransformer` with the model of transformers that it was made from."""

import math
from typing import Any

import torch

from memloc_lens.library_types import HookedTransformer
from memloc_lens.products import fast_products

LEAST_TOKENS = 48
TOKENS_BEYOND = 16
"""Tokens that are compared after the first window of attention has ended."""

PRODUCTS = 1e12
"""Multiplications that the comparison may take in each model; a large model is compared on fewer tokens."""

LIMITS = {torch.float64: 5e-5, torch.float32: 5e-5, torch.bfloat16: 0.1, torch.float16: 0.02}
"""By precision: how far log-probabilities may be apart, as a share of the largest. transformers' norms are float32."""


@torch.no_grad()
def check_same(model: HookedTransformer, original: Any) -> None:
    """Refuse a model whose log-probabilities of random tokens are not those of the original.

    Args:
        model: on the CPU.
        original: of transformers.

    Raises:
        ValueError: stating the largest difference, in nats.
    """
    cfg = model.cfg
    tokens = torch.randint(
        cfg.d_vocab, (1, _length(model)), generator=torch.Generator("cpu").manual_seed(0), device="cpu"
    )
    with fast_products(torch.device("cpu")):
        log_probs = model(tokens, return_type="logits").double().log_softmax(-1)
        expected = original(tokens, use_cache=False).logits.double().log_softmax(-1)
    difference, largest = (log_probs - expected).abs().max().item(), expected.abs().max().item()
    if not math.isfinite(difference):
        raise ValueError(
            f"the log-probabilities are not finite; the weights hold NaN or infinity, or overflow {cfg.dtype}"
        )
    if difference > LIMITS[cfg.dtype] * largest:
        raise ValueError(
            f"the HookedTransformer does not compute what {type(original).__name__} does: the log-probabilities of "
            f"{tokens.shape[1]} random tokens differ by up to {difference:.2g} nats; its configuration has a setting "
            "that is not supported"
        )


def _length(model: HookedTransformer) -> int:
    """Return how many tokens tell the models apart: more than a window of attention, as far as time allows."""
    wanted = max(LEAST_TOKENS, (model.cfg.window_size or 0) + TOKENS_BEYOND)
    affordable = int(PRODUCTS / sum(weight.numel() for weight in model.parameters()))
    return min(wanted, model.cfg.n_ctx, max(LEAST_TOKENS, affordable))
