"""A fingerprint of a model's weights: two runs are of one model if every bit of it is equal."""

import hashlib
from functools import cache
from itertools import chain

import torch
from jaxtyping import Int
from torch import Tensor

from memloc_lens.checks import check_model
from memloc_lens.library_types import HookedModel

CHUNK = 2**22  # bytes that are looked at at once, so that little memory is needed beside the model
SHAPING = ("act_fn", "normalization_type", "eps", "attn_scale", "window_size", "attn_types", "rotary_base", "n_ctx")
"""Settings that change what the same weights compute."""


def fingerprint(model: HookedModel) -> str:
    """Return a hash of every parameter, after checking that all are finite numbers.

    Each chunk of a parameter, as 64-bit words, is summed with odd random factors, modulo 2^64: a change of a single
    weight always changes the sum, and other changes leave it equal with a chance of 2^-64. The sums and the names are
    hashed with SHA-256. This reads the weights once, on their device and at the speed of its memory.

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
    digest = hashlib.sha256(str([str(getattr(model.cfg, name, None)) for name in SHAPING]).encode())
    for name, parameter in chain(model.named_parameters(), rotary):
        digest.update(repr((name, parameter.dtype, list(parameter.shape))).encode())
        digest.update(str(_sums(name, parameter.detach(), _factors(parameter.device))).encode())
    return digest.hexdigest()


@cache
def _factors(device: torch.device) -> Int[Tensor, " word"]:
    """Return an odd random factor for each word of a chunk."""
    drawn = torch.randint(-(2**63), 2**63 - 1, (CHUNK // 8,), generator=torch.Generator().manual_seed(0))
    return (drawn | 1).to(device)


def _sums(name: str, parameter: Tensor, factors: Int[Tensor, " word"]) -> list[int]:
    """Return the sum of every chunk of a parameter."""
    sums = []
    for values in parameter.reshape(-1).split(CHUNK // parameter.element_size()) if parameter.numel() else ():
        if values.is_floating_point() and not torch.isfinite(torch.stack(torch.aminmax(values))).all():
            count = int((~torch.isfinite(parameter)).sum())
            raise ValueError(
                f"the model's {name} has {count} values that are NaN or infinite; load intact weights, or take a dtype "
                "with a wider range"
            )
        words = _words(values)
        sums.append((words * factors[: len(words)]).sum())
    return torch.stack(sums).tolist() if sums else []


def _words(values: Tensor) -> Int[Tensor, " word"]:
    """Return values as 64-bit words, the last one filled up with zeros."""
    content = values.view(torch.uint8)
    missing = -len(content) % 8
    if missing or content.storage_offset() % 8:
        content = torch.cat([content, content.new_zeros(missing)])
    return content.view(torch.int64)
