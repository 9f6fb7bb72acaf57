"""A fingerprint of a model's weights: two runs are of one model if every bit of it is equal."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from memloc_lens.checks import check_model

CHUNK = 2**26  # bytes that are looked at at once, so that weights on a GPU need little memory beside it
SHAPING = ("act_fn", "normalization_type", "eps", "attn_scale", "window_size", "attn_types", "rotary_base", "n_ctx")
"""Settings that change what the same weights compute."""


def fingerprint(model: HookedTransformer) -> str:
    """Return a hash (SHA-256) of every parameter, after checking that all are finite numbers.

    Parameters are hashed side by side in threads: about 1 s for 2 GB on a core, so 7 s for a model of 7 billion weights
    in half precision on one core, and less with more cores.

    Args:
        model: whose weights are read, on any device.

    Raises:
        ValueError: naming a parameter that has NaN or infinite values.

    Example:
        >>> from memloc_lens.runs.fingerprint import fingerprint
        >>> fingerprint(model) == fingerprint(model)
        True
    """
    check_model(model)
    rotary = ((name, buffer) for name, buffer in model.named_buffers() if "rotary" in name)
    named = list(chain(model.named_parameters(), rotary))
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        hashes = list(threads.map(_hash, *zip(*named, strict=True)))
    settings = [str(getattr(model.cfg, name, None)) for name in SHAPING]
    return hashlib.sha256(repr((settings, hashes)).encode()).hexdigest()


def _hash(name: str, parameter: Tensor) -> str:
    digest = hashlib.sha256(repr((name, parameter.dtype, list(parameter.shape))).encode())
    for chunk in _chunks(parameter.detach()):
        if chunk.is_floating_point() and not torch.isfinite(torch.stack(torch.aminmax(chunk))).all():
            count = int((~torch.isfinite(parameter)).sum())
            raise ValueError(
                f"the model's {name} has {count} values that are NaN or infinite; load intact weights, or take a dtype "
                "with a wider range"
            )
        digest.update(chunk.cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _chunks(parameter: Tensor) -> Iterator[Tensor]:
    if not parameter.numel():
        return
    size = max(1, CHUNK // parameter.element_size())
    if parameter.is_contiguous():
        yield from parameter.view(-1).split(size)
        return
    for row in parameter.flatten(1) if parameter.ndim > 1 else [parameter]:
        yield from row.contiguous().view(-1).split(size)
