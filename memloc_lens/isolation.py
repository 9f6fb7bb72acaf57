"""A model isolated from what surrounds a call: other threads, autocast, inference mode, another default device."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from memloc_lens.hooks import check_no_hook_on_itself
from memloc_lens.library_types import HookedModel
from memloc_lens.turns import turn


@contextmanager
def isolated(model: HookedModel) -> Iterator[None]:
    """Compute with a model as if nothing were set around the call, while other threads wait.

    Args:
        model: no hook may be on it itself; its parts may have any.

    Raises:
        ValueError: if it has one, or another thread has a context of the model open.
    """
    check_no_hook_on_itself(model)
    with ExitStack() as stack:
        stack.enter_context(turn(model))
        for device in {"cpu", torch.device(model.cfg.device or "cpu").type}:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


@contextmanager
def gradients_possible(model: HookedModel) -> Iterator[None]:
    """Leave `torch.inference_mode`, in which no tensor can have a gradient, while the context is open.

    Raises:
        ValueError: if the model was made in it.
    """
    if any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError(
            "the model was made inside torch.inference_mode(), where weights can have no gradients; load it outside"
        )
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def in_float32(model: HookedModel) -> Iterator[None]:
    """Hold the weights of a model in half precision in float32, too, and compute with those, while the context is open.

    That takes 4 bytes more for each parameter. A model in float32 or float64 stays as it is.
    """
    lower = model.cfg.dtype
    if lower in (torch.float32, torch.float64):
        yield
        return
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.dtype == lower]
    originals = [tensor.data for tensor in tensors]
    try:
        model.cfg.dtype = torch.float32
        for tensor in tensors:
            tensor.data = tensor.data.float()
        yield
    finally:
        model.cfg.dtype = lower
        for tensor, original in zip(tensors, originals, strict=True):
            tensor.data = original
