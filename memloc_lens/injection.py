"""Write a sequence into a few known neurons or weights, so that the answer of a localizer can be checked.

Chang et al. (2024), sec. 3.1:

1. Draw a share of all neurons (or of all weights of `W_out`), uniformly across the layers: the ground truth.
2. Train their rows of `W_out` (or the weights themselves), and nothing else, until the model has memorized the whole
   sequence. Optionally, rows only turn and keep their lengths, so that the norms of the weights do not give the ground
   truth away.
3. Hand the model over; on leaving, restore the weights bit for bit.

Only the change is trained, as a tensor [row, d_model] or [weight] that hooks add to what the MLPs write: gradients and
optimizer state are as small as the ground truth, whatever the size of the model, and layers before the first changed
one run once.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

from memloc_lens.bridge import stream_entering
from memloc_lens.checks import check_choice, check_model, check_number
from memloc_lens.components import (
    NEURONS,
    Component,
    ComponentName,
    ComponentSet,
    Neurons,
    component_of,
    count_of,
    post,
)
from memloc_lens.devices import device_of
from memloc_lens.forward import final_residual, frozen, run_layers
from memloc_lens.hooks import check_no_backward_hooks, own
from memloc_lens.isolation import gradients_possible
from memloc_lens.library_types import HookedModel
from memloc_lens.logits import target_loss
from memloc_lens.sequence import Batch, MemorizedSequence, check_sequences
from memloc_lens.turns import turn


@dataclass(frozen=True)
class Injection:
    """The result of `inject`.

    Args:
        ground_truth: components whose weights were trained.
        loss: of the whole sequence in the changed model: mean over all tokens but the first, in nats.
        steps: number of Adam steps taken.
        succeeded: whether the loss is under the one asked for.
        norm_change: how much longer each neuron's row of `W_out`, or larger each weight, has become.
    """

    ground_truth: ComponentSet
    loss: float
    steps: int
    succeeded: bool
    norm_change: Float[Tensor, " layer *unit"]

    @property
    def neurons(self) -> ComponentSet:
        """The ground truth."""
        return self.ground_truth


@contextmanager
def inject(
    model: HookedModel,
    sequence: MemorizedSequence,
    ratio: float = 0.01,
    seed: int = 0,
    lr: float = 0.01,
    max_steps: int = 200,
    target_loss: float = 0.05,
    keep_norms: bool = False,
    component: ComponentName = "neuron",
) -> Iterator[Injection]:
    """Let the model memorize a sequence in a random share of its neurons or weights, while the context is open.

    On leaving, also by an exception or Ctrl-C, every parameter is restored bit for bit. Contexts nest. Meanwhile other
    threads cannot work with the model.

    Args:
        model: only the weights of the ground truth change, in place.
        sequence: learned whole, from its second token on, whatever its `prompt_len`.
        ratio: share of all components to draw, to the nearest number, in (0, 1].
        seed: of the draw. Training itself is deterministic.
        lr: learning rate of Adam. The paper takes 0.01 for a ratio of 1%, 0.05 for 0.1%.
        max_steps: maximum number of Adam steps.
        target_loss: training ends when the mean loss of the sequence is under it, in nats.
        keep_norms: keep the length of every row of `W_out`. For neurons only. Not in the paper.
        component: kind of the ground truth: "neuron", or "weight" for single weights of `W_out`.

    Raises:
        ValueError: if the ratio takes no component, the model cannot read the sequence, a setting is out of range, or
            the loss becomes NaN or infinite, or `W_out` is not a parameter.

    Example:
        >>> with inject(model, sequence, ratio=0.01) as injected:
        ...     scores = Activations()(model, sequence)
        >>> injected.neurons
        <46 of 4608 neurons in layers 0 to 5>
    """
    model = check_model(model)
    for name, value in (("lr", lr), ("target_loss", target_loss)):
        check_number(name, value, above=0)
    check_number("max_steps", max_steps, least=1, whole=True)
    check_choice("component", component, ("neuron", "weight"))
    if keep_norms and component != "neuron":
        raise ValueError("keep_norms keeps the lengths of rows of W_out; it needs component='neuron'")
    check_sequences(model, [sequence])
    _check_weights_are_parameters(model)
    check_no_backward_hooks(model, map(post, range(model.cfg.n_layers)))
    with turn(model, context=True):
        with gradients_possible(model):
            whole = Batch(sequence.tokens[None].to(model.cfg.device).clone(), prompt_len=1)
            gold = _draw(model, component_of(component), ratio, seed)
        try:
            change, steps = _train(model, whole, gold, lr, max_steps, target_loss, keep_norms)
        except FloatingPointError as error:
            raise ValueError(f"injection of {sequence.id!r} at the ratio {ratio:g}: {error}; lower lr") from error
        before = [block.mlp.W_out.detach()[members] for block, members in _layers(model, gold)]
        try:
            norm_change = torch.zeros(gold.shape, device=change.device, dtype=torch.float32)
            parts = zip(_layers(model, gold), before, _split(change, gold), strict=True)
            for layer, ((block, members), weights, added) in enumerate(parts):
                block.mlp.W_out.data[members] = (weights + added.to(weights.device)).to(weights.dtype)
                longer = _norms(block.mlp.W_out.detach()[members]) - _norms(weights)
                norm_change[layer, gold[layer]] = longer.to(norm_change.device)
            loss = _loss(model, whole)
            ground_truth = Neurons(gold) if component == "neuron" else ComponentSet(gold, component_of(component))
            yield Injection(ground_truth, loss, steps, loss < target_loss, norm_change)
        finally:
            for (block, members), weights in zip(_layers(model, gold), before, strict=True):
                block.mlp.W_out.data[members] = weights


def _check_weights_are_parameters(model: HookedModel) -> None:
    """Refuse a `W_out` that is computed from other parameters, which a change in place would not reach."""
    for layer, block in enumerate(model.blocks):
        stored = {parameter.untyped_storage().data_ptr() for parameter in block.mlp.parameters()}
        if block.mlp.W_out.untyped_storage().data_ptr() not in stored:
            raise ValueError(
                f"blocks.{layer}.mlp.W_out is parametrized, and an injection changes it in place; remove the "
                "parametrization (torch.nn.utils.parametrize.remove_parametrizations)"
            )


def _draw(model: HookedModel, component: Component, ratio: float, seed: int) -> Bool[Tensor, " layer *unit"]:
    shape = component.shape(model)
    total = int(np.prod(shape))
    count = count_of(ratio, total, "nearest", component.plural)
    if component is NEURONS:
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(total, generator=generator, device="cpu")[:count]
    else:  # a permutation of all weights of a large model would not fit into memory
        chosen = torch.from_numpy(np.random.default_rng(seed).choice(total, count, replace=False, shuffle=False))
    gold = torch.zeros(total, dtype=torch.bool, device="cpu")
    gold[chosen] = True
    return gold.view(shape).to(model.cfg.device)


def _layers(model: HookedModel, gold: Bool[Tensor, " layer *unit"]) -> Iterator[tuple[Any, Tensor]]:
    return ((block, members.to(device_of(block))) for block, members in zip(model.blocks, gold, strict=True))


def _split(change: Float[Tensor, " gold *d_model"], gold: Bool[Tensor, " layer *unit"]) -> tuple[Tensor, ...]:
    return change.split(gold.flatten(1).sum(dim=1).tolist())


def _norms(weights: Float[Tensor, " gold *d_model"]) -> Float[Tensor, " gold"]:
    """Return the lengths of rows [gold, d_model], or the sizes of single weights [gold]."""
    return weights.float().norm(dim=1) if weights.ndim == 2 else weights.float().abs()


def _train(
    model: HookedModel,
    whole: Batch,
    gold: Bool[Tensor, " layer *unit"],
    lr: float,
    max_steps: int,
    wanted: float,
    keep_norms: bool,
) -> tuple[Float[Tensor, " gold *d_model"], int]:
    """Return the change of the weights, in float32, and the number of Adam steps that it took."""
    first = int(gold.flatten(1).any(dim=1).nonzero()[0])
    with frozen(model):
        chosen = (block.mlp.W_out.detach()[members] for block, members in _layers(model, gold))
        weights = torch.cat([values.to(gold.device) for values in chosen]).float()
        drift = torch.zeros_like(weights, requires_grad=True)
        optimizer = torch.optim.Adam([drift], lr=lr)

        def change() -> Tensor:
            if not keep_norms:
                return drift
            return normalize(weights + drift, dim=1) * weights.norm(dim=1, keepdim=True) - weights

        with torch.no_grad():
            before = stream_entering(model, whole.tokens, first)
        for step in range(max_steps):
            with torch.enable_grad(), _changed(model, change(), gold):
                residual = run_layers(model, before, first, whole.prompt_len)
                loss = target_loss(model, residual, whole).sum()
            if not math.isfinite(loss.item()):
                raise FloatingPointError(f"the loss is {loss.item()} at step {step}")
            if loss.item() < wanted:
                return change().detach(), step
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return change().detach(), max_steps


@contextmanager
def _changed(
    model: HookedModel, change: Float[Tensor, " gold *d_model"], gold: Bool[Tensor, " layer *unit"]
) -> Iterator[None]:
    """Let the MLPs write as if the change had been added to the weights of the ground truth."""
    with ExitStack() as stack:
        for layer, ((block, members), part) in enumerate(zip(_layers(model, gold), _split(change, gold), strict=True)):
            if not len(part):
                continue
            seen: list[Tensor] = []

            @own
            def keep(activations: Tensor, hook: Any, seen: list[Tensor] = seen) -> None:
                seen.append(activations)

            @own
            def add(
                _: Any,
                __: Any,
                output: Tensor,
                members: Tensor = members,
                part: Tensor = part,
                seen: list[Tensor] = seen,
            ) -> Tensor:
                return output + _written(seen.pop(), members, part.to(output))

            stack.enter_context(model.hooks(fwd_hooks=[(post(layer), keep)]))
            # a user's hook on the MLP's output comes after what the MLP itself writes
            stack.callback(block.mlp.register_forward_hook(add, prepend=True).remove)
        yield


def _written(
    activations: Float[Tensor, "row pos neuron"], members: Bool[Tensor, " neuron *d_model"], change: Tensor
) -> Float[Tensor, "row pos d_model"]:
    """Return what a change of rows [gold, d_model], or of single weights [gold], adds to the output of an MLP."""
    if members.ndim == 1:
        return activations[..., members] @ change
    return activations @ change.new_zeros(members.shape).masked_scatter(members, change)


def _loss(model: HookedModel, whole: Batch) -> float:
    with torch.no_grad(), frozen(model):
        return target_loss(model, final_residual(model, whole), whole).item()
