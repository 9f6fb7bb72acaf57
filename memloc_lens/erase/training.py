"""Train all weights of a model in place, and restore them bit for bit."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter

from memloc_lens.isolation import gradients_possible, in_float32, isolated
from memloc_lens.library_types import HookedModel
from memloc_lens.products import fast_products
from memloc_lens.turns import turn

WEIGHT_DECAY = 0.01
"""Of AdamW; the default of torch."""


@contextmanager
def restored(model: HookedModel) -> Iterator[None]:
    """Restore every parameter bit for bit on leaving, also by an exception or Ctrl-C.

    Meanwhile other threads cannot work with the model. A copy of all parameters is held.

    Example:
        >>> before = model.W_E[0, 0].item()
        >>> with restored(model):
        ...     model.W_E.data[0, 0] = 7.0
        >>> model.W_E[0, 0].item() == before
        True
    """
    with turn(model, context=True):
        kept = [parameter.detach().clone() for parameter in model.parameters()]
        try:
            yield
        finally:
            for parameter, before in zip(model.parameters(), kept, strict=True):
                parameter.data.copy_(before)


@contextmanager
def trainable(model: HookedModel) -> Iterator[list[Parameter]]:
    """Give every parameter, in float32 at least, while the context is open, and let it have a gradient.

    What is trained in half precision is rounded to it on leaving. Gradients that were there come back.

    Example:
        >>> with restored(model), trainable(model) as parameters:
        ...     model(sequence.tokens, return_type="loss").backward()
        ...     all(parameter.grad is not None for parameter in parameters)
        True
    """
    with isolated(model), gradients_possible(model), fast_products(model.cfg.device), _as_variables(model):
        with in_float32(model), torch.enable_grad():
            parameters = list(model.parameters())
            yield parameters
            trained = [parameter.detach() for parameter in parameters]
        for parameter, values in zip(model.parameters(), trained, strict=True):
            if parameter.dtype != values.dtype:
                parameter.data.copy_(values)


@contextmanager
def _as_variables(model: HookedModel) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    kept = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _, _ in kept:
            parameter.grad = None
            parameter.requires_grad_(True)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad, gradient in kept:
            parameter.grad = None
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient


def adamw_steps(parameters: Sequence[Parameter], loss_at: Callable[[int], Tensor], lr: float) -> Iterator[int]:
    """Take steps of AdamW for ever, and give the number of them that have been taken: 0, 1, ...

    Args:
        parameters: that change in place.
        loss_at: returns the loss of a step, counted from 0.
        lr: learning rate.

    Raises:
        ValueError: if a loss is NaN or infinite.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> for step in adamw_steps([weight], lambda step: weight.square().sum(), lr=0.1):
        ...     if weight.item() < 0.5:
        ...         break
        >>> step
        6
    """
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=WEIGHT_DECAY, fused=True)
    step = 0
    while True:
        loss = loss_at(step)  # before the step is given, so that nobody reads a model that training has broken
        if not math.isfinite(loss.item()):
            raise ValueError(f"the loss is {loss.item()} at step {step} with the learning rate {lr:g}; lower lr")
        yield step
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1


def in_turn(count: int, batch: int, seed: int) -> Callable[[int], list[int]]:
    """Return a function that gives the indices of each step: all of them once an epoch, in an order of its own.

    Args:
        count: number of texts.
        batch: maximum number of texts in a step.
        seed: of the orders.

    Example:
        >>> at = in_turn(5, batch=2, seed=0)
        >>> sorted(at(0) + at(1) + at(2))
        [0, 1, 2, 3, 4]
    """
    an_epoch = math.ceil(count / batch)

    def at(step: int) -> list[int]:
        epoch, part = divmod(step, an_epoch)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch), device="cpu").tolist()
        return order[part * batch : (part + 1) * batch]

    return at
