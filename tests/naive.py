"""Every localizer once more, written straight from its formula: slow, with plain loops and full forward passes.

A component is masked by multiplying the weights that it writes with, where the package edits activations and outputs.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.func import functional_call

from memloc_lens import MemorizedSequence
from memloc_lens.library_types import HookedModel

WRITES_WITH = {"neuron": "mlp.W_out", "head": "attn.W_O", "weight": "mlp.W_out"}


def hook_name(layer: int) -> str:
    return f"blocks.{layer}.mlp.hook_post"


def shape_of(model: HookedModel, component: str) -> tuple[int, ...]:
    cfg = model.cfg
    units = {"neuron": (cfg.d_mlp,), "head": (cfg.n_heads,), "weight": (cfg.d_mlp, cfg.d_model)}
    return cfg.n_layers, *units[component]


def masked_logits(model: HookedModel, tokens: Tensor, masks: Mapping[str, Sequence[Tensor]]) -> Tensor:
    """The logits with the weights of every component multiplied by its mask, one mask a layer for each kind."""
    weights: dict[str, Tensor] = {}
    for component, by_layer in masks.items():
        for layer, mask in enumerate(by_layer):
            name = f"blocks.{layer}.{WRITES_WITH[component]}"
            weight = weights.get(name, model.get_parameter(name))
            weights[name] = weight * mask.to(weight).view(*mask.shape, *[1] * (weight.ndim - mask.ndim))
    return functional_call(model, weights, (tokens,), {"return_type": "logits"})


def suffix_loss(
    model: HookedModel,
    sequence: MemorizedSequence,
    hooks: list | None = None,
    masks: Mapping[str, Sequence[Tensor]] | None = None,
) -> Tensor:
    with model.hooks(fwd_hooks=hooks or []):
        log_probs = masked_logits(model, sequence.tokens[None], masks or {})[0].log_softmax(-1)
    losses = [-log_probs[t - 1, sequence.tokens[t]] for t in range(sequence.prompt_len, len(sequence.tokens))]
    return torch.stack(losses).mean()


def post_activations(model: HookedModel, sequence: MemorizedSequence) -> Tensor:
    _, cache = model.run_with_cache(sequence.tokens[None])
    return torch.stack([cache[hook_name(layer)][0] for layer in range(model.cfg.n_layers)]).detach()


@torch.no_grad()
def mean_activations(model: HookedModel, sequences: Sequence[MemorizedSequence], name: str) -> Tensor:
    """The mean over every position of every sequence of what passes the hook points of a name, a layer at a time."""
    means = []
    for layer in range(model.cfg.n_layers):
        seen = []
        for sequence in sequences:
            _, cache = model.run_with_cache(sequence.tokens[None])
            seen += list(cache[f"blocks.{layer}.{name}"][0])
        means.append(sum(seen) / len(seen))
    return torch.stack(means)


@torch.no_grad()
def zero_out(model: HookedModel, sequence: MemorizedSequence, component: str = "neuron") -> Tensor:
    clean = suffix_loss(model, sequence)
    shape = shape_of(model, component)
    scores = torch.zeros(shape, dtype=clean.dtype)
    for layer in range(shape[0]):
        for unit in range(shape[1]):
            masks = torch.ones(shape)
            masks[layer, unit] = 0
            scores[layer, unit] = suffix_loss(model, sequence, masks={component: masks}) - clean
    return scores


@torch.no_grad()
def activations(model: HookedModel, sequence: MemorizedSequence, reduction: str, component: str) -> Tensor:
    _, cache = model.run_with_cache(sequence.tokens[None])
    targets = range(sequence.prompt_len, len(sequence.tokens))
    scores = torch.zeros(shape_of(model, component), dtype=torch.float64)
    for layer, block in enumerate(model.blocks):
        for head in range(model.cfg.n_heads if component == "head" else 0):
            written = [cache["z", layer][0, t - 1, head] @ block.attn.W_O[head] for t in targets]
            if reduction == "abs_mean":
                scores[layer, head] = torch.stack(written).mean(dim=0).norm()
            else:
                scores[layer, head] = torch.stack([vector.norm() for vector in written]).mean()
        for neuron in range(0 if component == "head" else model.cfg.d_mlp):
            values = torch.stack([cache["post", layer][0, t - 1, neuron] for t in targets])
            size = values.mean().abs() if reduction == "abs_mean" else values.abs().mean()
            row = block.mlp.W_out[neuron]
            scores[layer, neuron] = size * (row.norm() if component == "neuron" else row.abs())
    return scores


@torch.no_grad()
def weight_norms(model: HookedModel, component: str) -> Tensor:
    shape = shape_of(model, component)
    scores = torch.zeros(shape)
    for layer in range(shape[0]):
        weight = model.get_parameter(f"blocks.{layer}.{WRITES_WITH[component]}")
        for unit in range(shape[1]):
            squares = weight[unit] ** 2
            scores[layer, unit] = squares.sqrt() if component == "weight" else squares.sum().sqrt()
    return scores


def integrated_gradients(
    model: HookedModel, sequence: MemorizedSequence, steps: int, fractions: Sequence[float] = ()
) -> Tensor:
    """One prefix a target position, and one run of it for each layer and point of the integral."""
    fractions = fractions or [step / max(steps - 1, 1) for step in range(steps)]
    post = post_activations(model, sequence)
    scores = torch.zeros(post.shape[0], post.shape[2], dtype=post.dtype)
    targets = range(sequence.prompt_len, len(sequence.tokens))
    for t in targets:
        for layer in range(post.shape[0]):
            for fraction in fractions:
                value = (fraction * post[layer, t - 1]).requires_grad_(True)

                def scale(activations, hook, value=value):
                    return torch.cat([activations[:, :-1], value[None, None]], dim=1)

                logits = model.run_with_hooks(
                    sequence.tokens[None, :t], return_type="logits", fwd_hooks=[(hook_name(layer), scale)]
                )
                probability = logits[0, -1].softmax(-1)[sequence.tokens[t]]
                (gradient,) = torch.autograd.grad(probability, value)
                scores[layer] += post[layer, t - 1] * gradient / len(fractions) / len(targets)
    return scores


def log_odds(model: HookedModel, sequence: MemorizedSequence, masks: Mapping[str, Sequence[Tensor]]) -> Tensor:
    """log p - log(1 - p) of every target: its logit less the log-sum-exp of the logits of all other tokens."""
    logits = masked_logits(model, sequence.tokens[None], masks)[0]
    values = []
    for t in range(sequence.prompt_len, len(sequence.tokens)):
        others = torch.cat([logits[t - 1, : sequence.tokens[t]], logits[t - 1, sequence.tokens[t] + 1 :]])
        values.append(logits[t - 1, sequence.tokens[t]] - others.logsumexp(0))
    return torch.stack(values)


def gradient(
    model: HookedModel, sequence: MemorizedSequence, objective: str, component: str, mask: Tensor | None = None
) -> Tensor:
    """The derivative of the mean over targets of what is asked for, by a mask of ones or another."""
    start = torch.ones(shape_of(model, component), dtype=torch.float64) if mask is None else mask
    mask = start.clone().requires_grad_(True)
    log_probs = masked_logits(model, sequence.tokens[None], {component: list(mask)})[0].log_softmax(-1)
    of_targets = torch.stack([log_probs[t - 1, sequence.tokens[t]] for t in range(sequence.prompt_len, len(log_probs))])
    values = {
        "log_odds": torch.log(1 + torch.exp(log_odds(model, sequence, {component: list(mask)}) + 2)),
        "probability": of_targets.exp(),
        "loss": of_targets,
    }[objective]
    return torch.autograd.grad(values.mean(), mask)[0]


def prior(model: HookedModel, context: Sequence[MemorizedSequence], weight: float, component: str) -> Tensor:
    """weight * RMS^2 / mean RMS, with a gradient for every position of every sequence of the context."""
    squares = []
    for sequence in context:
        mask = torch.ones(shape_of(model, component), dtype=torch.float64, requires_grad=True)
        values = log_odds(model, sequence, {component: list(mask)})
        of_sequence = [torch.autograd.grad(value, mask, retain_graph=True)[0] ** 2 for value in values]
        squares.append(torch.stack(of_sequence).mean(dim=0))
    rms = torch.stack(squares).mean(dim=0).sqrt()
    return weight * rms**2 / rms.mean()


def iterative_gradient(
    model: HookedModel, sequence: MemorizedSequence, rounds: int, objective: str, max_ratio: float,
    schedule: str, scope: str, first_layer: int = 0, component: str = "neuron",
) -> list[list[tuple[int, ...]]]:  # fmt: skip
    """What is locked after each round, in the order of locking."""
    mask = torch.ones(shape_of(model, component), dtype=torch.float64)
    layers = range(first_layer, len(mask))
    pools = [list(layers)] if scope == "global" else [[layer] for layer in layers]
    most = round(max_ratio * mask[0].numel() * len(pools[0]))
    locked: list[tuple[int, ...]] = []
    after, count = [], 0
    for r in range(1, rounds + 1):
        wanted = round(most * r / rounds) if schedule == "linear" else round(most ** (r / rounds))
        before, count = count, min(most, max(count + 1, wanted))
        scores = gradient(model, sequence, objective, component, mask)
        chosen = []
        for pool in pools:
            units = [index for index in mask.nonzero().tolist() if index[0] in pool]
            units.sort(key=lambda index: -scores[tuple(index)].item())
            chosen += [tuple(index) for index in units[: count - before]]
        for index in chosen:
            mask[index] = 0
        locked += chosen
        after.append(list(locked))
    return after


def slimming(
    model: HookedModel, sequence: MemorizedSequence, steps: int, lr: float, penalty: float, component: str
) -> Tensor:
    """Adam written out, and one mask tensor a layer."""
    shape = shape_of(model, component)

    def objective(values: list[Tensor]) -> Tensor:
        masks = {component: [value.clamp(0, 1) for value in values]}
        return suffix_loss(model, sequence, masks=masks) + penalty * torch.stack(values).abs().mean()

    return torch.stack(adam([torch.ones(shape[1:]) for _ in range(shape[0])], objective, steps, lr)).clamp(0, 1)


def hard_concrete(
    model: HookedModel, sequence: MemorizedSequence, steps: int, lr: float, penalty: float, init: float,
    temperature: float, seed: int, component: str,
) -> Tensor:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    start = torch.log(torch.tensor((init + 0.1) / 1.2) / (1 - torch.tensor((init + 0.1) / 1.2)))
    shape = shape_of(model, component)

    def objective(values: list[Tensor]) -> Tensor:
        noise = torch.rand(shape, generator=generator).clamp(1e-4, 1 - 1e-4)
        gates = []
        for layer, alpha in enumerate(values):
            s = torch.sigmoid((noise[layer].log() - (1 - noise[layer]).log() + alpha) / temperature)
            gates.append(torch.clamp(1.2 * s - 0.1, 0, 1))
        open_probability = torch.sigmoid(torch.stack(values) - temperature * torch.log(torch.tensor(0.1 / 1.1)))
        return suffix_loss(model, sequence, masks={component: gates}) + penalty * open_probability.mean()

    return torch.stack(
        adam([torch.full(shape[1:], start.item()) for _ in range(shape[0])], objective, steps, lr)
    ).sigmoid()


def adam(values: list[Tensor], objective, steps: int, lr: float) -> list[Tensor]:
    """Kingma & Ba (2015), algorithm 1."""
    first = [torch.zeros_like(value) for value in values]
    second = [torch.zeros_like(value) for value in values]
    for step in range(1, steps + 1):
        leaves = [value.detach().requires_grad_(True) for value in values]
        gradients = torch.autograd.grad(objective(leaves).sum(), leaves)
        values = []
        for place, (leaf, gradient) in enumerate(zip(leaves, gradients, strict=True)):
            first[place] = 0.9 * first[place] + 0.1 * gradient
            second[place] = 0.999 * second[place] + 0.001 * gradient**2
            unbiased_first, unbiased_second = first[place] / (1 - 0.9**step), second[place] / (1 - 0.999**step)
            values.append(leaf.detach() - lr * unbiased_first / (unbiased_second.sqrt() + 1e-8))
    return values


def top(scores: Tensor, count: int, first_layer: int, scope: str) -> set[tuple[int, ...]]:
    """The indices of the highest scores: a full sort, of equal scores the lower index first."""
    flat = [
        (-value, layer, unit)
        for layer in range(first_layer, len(scores))
        for unit, value in enumerate(scores[layer].flatten().tolist())
    ]
    groups = [flat] if scope == "global" else [[entry for entry in flat if entry[1] == x] for x in range(len(scores))]
    chosen = [entry for group in groups for entry in sorted(group)[:count]]
    return {(layer, *(int(part) for part in torch.unravel_index(torch.tensor(unit), scores.shape[1:])))
            for _, layer, unit in chosen}  # fmt: skip
