"""Put a model on a device, or its layers on several GPUs, one part after the other.

TransformerLens' forward pass sends the residual stream to a GPU for each layer. Its own placement puts layers where
most memory is free, which may be elsewhere; here they are put where the stream goes.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memloc_lens.checks import check_number
from memloc_lens.library_types import HookedModel


def check_device(device: str | torch.device | None, n_devices: int = 1) -> torch.device:
    """Check that torch can compute on a device here, or on as many GPUs from it on.

    Args:
        device: `"cpu"`, `"cuda"`, `"cuda:1"`, `"mps"` or the like; `None`: CUDA if there is any, else the CPU.
        n_devices: number of GPUs that share the layers.

    Returns:
        The device, the first one of several.

    Raises:
        ValueError: if there is no such device, or there are fewer.

    Example:
        >>> from memloc_lens.models import check_device
        >>> check_device("cpu")
        device(type='cpu')
    """
    check_number("n_devices", n_devices, least=1, whole=True)
    known = _known_device(device)
    return known if n_devices == 1 else _first_of(known, n_devices)


def _known_device(device: object) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = _parse_device(device)
    if known.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device is {str(device)!r}, but there is no CUDA device here; leave out device, or install a build of "
            "torch for CUDA (https://pytorch.org/get-started)"
        )
    if known.type == "cuda" and (known.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {str(device)!r}; the CUDA devices here are {_cuda_devices()}")
    if known.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device is {str(device)!r}, but there is no MPS device here; leave out device")
    return known


def _parse_device(device: object) -> torch.device:
    try:
        known = torch.device(device) if isinstance(device, str | torch.device) else None
    except RuntimeError:  # torch's own message lists two dozen kinds of device
        known = None
    if known is None or known.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device is {str(device)!r}; it must be one of cpu, cuda, cuda:0 (or another number), mps")
    return known


def _first_of(device: torch.device, count: int) -> torch.device:
    """Return the first of some GPUs that follow one another."""
    if device.type != "cuda":
        raise ValueError(
            f"n_devices is {count} and the device is {device}; only CUDA devices share a model: leave out n_devices"
        )
    first, here = device.index or 0, torch.cuda.device_count()
    if first + count > here:
        raise ValueError(
            f"n_devices is {count} from cuda:{first} on, and the CUDA devices here are {_cuda_devices()}; it can be at "
            f"most {here - first}"
        )
    return torch.device("cuda", first)


def _cuda_devices() -> str:
    return ", ".join(f"cuda:{index}" for index in range(torch.cuda.device_count()))


def check_shared(fields: Mapping[str, Any], n_devices: int) -> None:
    """Refuse a model whose layers cannot be on so many GPUs.

    Args:
        fields: of its configuration, by TransformerLens' names.
        n_devices: number of GPUs.

    Raises:
        ValueError: if it has fewer layers, or something that TransformerLens keeps on one GPU.
    """
    if n_devices == 1:
        return
    if n_devices > fields["n_layers"]:
        raise ValueError(
            f"n_devices is {n_devices}, and the model has {fields['n_layers']} layers; it can be at most that"
        )
    if fields.get("positional_embedding_type") == "alibi":
        raise ValueError(
            f"n_devices is {n_devices}, and TransformerLens keeps the position biases of the model (alibi) on one "
            "device; leave out n_devices"
        )


def place(model: HookedModel, device: torch.device, n_devices: int = 1) -> HookedModel:
    """Move a model to a device, or its layers to as many GPUs from it on, and note it in the configuration.

    Args:
        model: moved in place.
        device: the first, as `check_device` returns it.
        n_devices: number of GPUs, of which each gets as many layers, or one fewer.

    Returns:
        The model.
    """
    # as a string: of a torch.device, TransformerLens keeps "cuda" in the configuration and drops the index
    model.cfg.device = str(device)
    if n_devices == 1:
        return model.to(str(device), print_details=False)
    from transformer_lens.utilities.multi_gpu import get_device_for_block_index

    model.cfg.n_devices = n_devices
    *_, last = where = [get_device_for_block_index(layer, model.cfg) for layer in range(model.cfg.n_layers)]
    for name, part in model.named_children():
        if name != "blocks":
            part.to(last if name in ("ln_final", "unembed") else device)
    for block, own in zip(model.blocks, where, strict=True):
        block.to(own)
    vars(model)["loss_fn"] = functools.partial(_loss, model.loss_fn)
    return model


def _loss(
    loss_fn: Callable[..., Tensor],
    logits: Float[Tensor, "row pos d_vocab"],
    tokens: Int[Tensor, "row pos"],
    attention_mask: Int[Tensor, "row pos"] | None = None,
    per_token: bool = False,
) -> Float[Tensor, "..."]:
    """Move the mask to the logits; TransformerLens moves the tokens alone."""
    mask = None if attention_mask is None else attention_mask.to(logits.device)
    return loss_fn(logits, tokens, mask, per_token)
