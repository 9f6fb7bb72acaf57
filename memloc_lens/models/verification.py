"""Compare a model with the model of transformers that it was made from."""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memloc_lens.library_types import HookedModel
from memloc_lens.products import fast_products

LEAST_TOKENS = 48
TOKENS_BEYOND = 16
"""Tokens that are compared after the first window of attention has ended."""

PRODUCTS = 1e12
"""Multiplications that the comparison may take in each model; a large model is compared on fewer tokens."""

LIMITS = {torch.float64: 5e-5, torch.float32: 5e-5, torch.bfloat16: 0.1, torch.float16: 0.02}
"""By precision: how far log-probabilities may be apart, as a share of the largest. transformers' norms are float32."""


@torch.no_grad()
def check_same(model: HookedModel, original: Any) -> None:
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
    _check_close(log_probs, expected, cfg.dtype, f"HookedTransformer does not compute what {type(original).__name__}")


@torch.no_grad()
def sample_of(original: Any) -> tuple[Int[Tensor, "1 pos"], Float[Tensor, "1 pos d_vocab"]]:
    """Return random tokens, and the log-probabilities that a model of transformers gives at each."""
    config = original.config.get_text_config()
    length = min(LEAST_TOKENS, getattr(config, "max_position_embeddings", None) or LEAST_TOKENS)
    tokens = torch.randint(
        config.vocab_size, (1, length), generator=torch.Generator("cpu").manual_seed(0), device="cpu"
    )
    return tokens, original(tokens, use_cache=False).logits.double().log_softmax(-1)


@torch.no_grad()
def check_bridge_same(
    model: HookedModel, tokens: Int[Tensor, "1 pos"], expected: Float[Tensor, "1 pos d_vocab"]
) -> None:
    """Refuse a bridge whose log-probabilities are not those that its model gave before, as `sample_of` returns them.

    Raises:
        ValueError: stating the largest difference, in nats.
    """
    log_probs = model(tokens, return_type="logits").double().log_softmax(-1)
    _check_close(log_probs, expected, model.cfg.dtype, "TransformerBridge does not compute what its own model")


def _check_close(
    log_probs: Float[Tensor, "1 pos d_vocab"], expected: Float[Tensor, "1 pos d_vocab"], dtype: torch.dtype, what: str
) -> None:
    difference, largest = (log_probs - expected).abs().max().item(), expected.abs().max().item()
    if not math.isfinite(difference):
        raise ValueError(f"the log-probabilities are not finite; the weights hold NaN or infinity, or overflow {dtype}")
    if difference > LIMITS[dtype] * largest:
        raise ValueError(
            f"the {what} does: the log-probabilities of {expected.shape[1]} random tokens differ by up to "
            f"{difference:.2g} nats; its configuration has a setting that is not supported"
        )


def _length(model: HookedModel) -> int:
    """Return how many tokens tell the models apart: more than a window of attention, as far as time allows."""
    wanted = max(LEAST_TOKENS, (model.cfg.window_size or 0) + TOKENS_BEYOND)
    affordable = int(PRODUCTS / sum(weight.numel() for weight in model.parameters()))
    return min(wanted, model.cfg.n_ctx, max(LEAST_TOKENS, affordable))
