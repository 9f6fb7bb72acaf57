"""A model isolated from what surrounds a call: other threads, autocast, inference mode, another default device."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from transformer_lens import HookedTransformer

from memloc_lens.hooks import check_no_hook_on_itself
from memloc_lens.turns import turn


@contextmanager
def isolated(model: HookedTransformer) -> Iterator[None]:
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
def gradients_possible(model: HookedTransformer) -> Iterator[None]:
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
