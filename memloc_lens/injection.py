"""Write a sequence into a few known neurons, so that a localizer's answer can be checked.

Chang et al. (2024), sec. 3.1:

1. Draw a share of all neurons, uniformly across the layers: the gold set.
2. Train their rows of `W_out`, and nothing else, until the model knows the whole sequence by heart. If wanted,
   the rows only turn and keep their lengths, so that the gold set cannot be told from the weights' norms.
3. Hand the model over; on leaving, put the rows back as they were, bit for bit.

Only a change of k rows is trained, as a tensor [k, d_model] that hooks add to what the MLPs write: gradients and
optimizer state are as small as the gold set, whatever the size of the model, and layers before the first gold
neuron, which the change cannot reach, run once.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize
from transformer_lens import HookedTransformer

from memloc_lens.ablation import post
from memloc_lens.forward import final_residual, frozen, run_layers, target_loss
from memloc_lens.neurons import Neurons, neurons_taken
from memloc_lens.sequence import MemorizedSequence


@dataclass(frozen=True)
class Injection:
    """What `inject` has done to a model.

    Args:
        neurons: the gold set, whose rows of `W_out` were trained.
        loss: of the whole sequence in the model as it now is: mean over all tokens but the first, in nats.
        steps: of Adam that were taken.
        succeeded: whether the loss is under the one asked for.
        norm_change: how much longer each neuron's row of `W_out` has become; 0 outside the gold set.
    """

    neurons: Neurons
    loss: float
    steps: int
    succeeded: bool
    norm_change: Float[Tensor, "layer neuron"]


@contextmanager
def inject(
    model: HookedTransformer,
    sequence: MemorizedSequence,
    ratio: float = 0.01,
    seed: int = 0,
    lr: float = 0.01,
    max_steps: int = 200,
    target_loss: float = 0.05,
    keep_norms: bool = False,
) -> Iterator[Injection]:
    """Let the model memorize a sequence in a random share of its neurons, while the context is open.

    On leaving, also by an exception or Ctrl-C, every parameter is what it was, bit for bit. Contexts nest.

    Args:
        model: only rows of `W_out` that belong to the gold set change, in place.
        sequence: learned whole, from its second token on, whatever its `prompt_len`.
        ratio: share of all neurons to draw, to the nearest number, in (0, 1].
        seed: of the draw; training itself is deterministic.
        lr: learning rate of Adam; the paper takes 0.01 for a ratio of 1%, 0.05 for 0.1%.
        max_steps: of Adam, at the most.
        target_loss: training ends when the mean loss of the sequence is under it, in nats.
        keep_norms: hold every row of `W_out` at its length. Not in the paper.

    Raises:
        ValueError: if the ratio takes no neuron, if the model cannot read the sequence, or if `lr`, `max_steps` or
            `target_loss` is not positive.

    Example:
        >>> with inject(model, sequence, ratio=0.01) as injected:
        ...     scores = Slimming()(model, sequence)
        >>> len(injected.neurons)
        46
    """
    for name, value in (("lr", lr), ("max_steps", max_steps), ("target_loss", target_loss)):
        if not value > 0:
            raise ValueError(f"{name} is {value}; it must be above 0")
    sequence.check_fits(model)
    gold = _draw(model, ratio, seed)
    change, steps = _train(model, sequence.tokens[None], gold, lr, max_steps, target_loss, keep_norms)
    rows_before = [block.mlp.W_out.detach()[members] for block, members in _each(model, gold)]
    norms_before = [rows.float().norm(dim=1) for rows in rows_before]
    try:
        norm_change = torch.zeros(gold.shape, device=change.device)
        places = zip(_each(model, gold), rows_before, norms_before, _split(change, gold), strict=True)
        for layer, ((block, members), rows, norms, added) in enumerate(places):
            block.mlp.W_out.data[members] = (rows + added).to(rows.dtype)
            norm_change[layer, members] = block.mlp.W_out.detach()[members].float().norm(dim=1) - norms
        loss = _loss(model, sequence.tokens[None])
        yield Injection(Neurons(gold), loss, steps, loss < target_loss, norm_change)
    finally:
        for (block, members), rows in zip(_each(model, gold), rows_before, strict=True):
            block.mlp.W_out.data[members] = rows


def _draw(model: HookedTransformer, ratio: float, seed: int) -> Bool[Tensor, "layer neuron"]:
    total = model.cfg.n_layers * model.cfg.d_mlp
    chosen = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    gold = torch.zeros(total, dtype=torch.bool)
    gold[chosen[: neurons_taken(ratio, total, "nearest")]] = True
    return gold.view(model.cfg.n_layers, model.cfg.d_mlp).to(model.cfg.device)


def _each(model: HookedTransformer, gold: Bool[Tensor, "layer neuron"]) -> Iterator[tuple[Any, Tensor]]:
    return zip(model.blocks, gold, strict=True)


def _split(change: Float[Tensor, "gold d_model"], gold: Bool[Tensor, "layer neuron"]) -> tuple[Tensor, ...]:
    return change.split(gold.sum(dim=1).tolist())


def _train(
    model: HookedTransformer,
    tokens: Int[Tensor, "1 pos"],
    gold: Bool[Tensor, "layer neuron"],
    lr: float,
    max_steps: int,
    wanted: float,
    keep_norms: bool,
) -> tuple[Float[Tensor, "gold d_model"], int]:
    """The change of the gold rows, in float32, and the steps of Adam that it took."""
    tokens = tokens.to(model.cfg.device)
    first = int(gold.any(dim=1).nonzero()[0])
    rows = torch.cat([block.mlp.W_out.detach()[members] for block, members in _each(model, gold)]).float()
    drift = torch.zeros_like(rows, requires_grad=True)
    optimizer = torch.optim.Adam([drift], lr=lr)

    def change() -> Tensor:
        return normalize(rows + drift, dim=1) * rows.norm(dim=1, keepdim=True) - rows if keep_norms else drift

    with frozen(model):
        with torch.no_grad():
            before = model(tokens, return_type="logits", stop_at_layer=first)
        for step in range(max_steps):
            with torch.enable_grad(), _changed(model, change(), gold):
                residual = run_layers(model, before, first, prompt_len=1)
                loss = target_loss(model, residual, tokens, prompt_len=1).sum()
            if loss.item() < wanted:
                return change().detach(), step
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return change().detach(), max_steps


@contextmanager
def _changed(
    model: HookedTransformer, change: Float[Tensor, "gold d_model"], gold: Bool[Tensor, "layer neuron"]
) -> Iterator[None]:
    """Let the MLPs write as if the change had been added to their gold rows."""
    with ExitStack() as stack:
        for layer, ((block, members), rows) in enumerate(zip(_each(model, gold), _split(change, gold), strict=True)):
            if not len(rows):
                continue
            kept: list[Tensor] = []

            def keep(activations: Tensor, hook: Any, members: Tensor = members, kept: list[Tensor] = kept) -> None:
                kept.append(activations[..., members])

            def add(_: Any, __: Any, output: Tensor, rows: Tensor = rows, kept: list[Tensor] = kept) -> Tensor:
                return output + kept.pop() @ rows.to(output.dtype)

            stack.enter_context(model.hooks(fwd_hooks=[(post(layer), keep)]))
            stack.callback(block.mlp.register_forward_hook(add).remove)
        yield


def _loss(model: HookedTransformer, tokens: Int[Tensor, "1 pos"]) -> float:
    with torch.no_grad(), frozen(model):
        return target_loss(model, final_residual(model, tokens, 1), tokens, prompt_len=1).item()
