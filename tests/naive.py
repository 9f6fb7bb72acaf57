"""Every localizer once more, written straight from its formula: slow, with plain loops and full forward passes."""

import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from memloc_lens import MemorizedSequence


def hook_name(layer: int) -> str:
    return f"blocks.{layer}.mlp.hook_post"


def suffix_loss(model: HookedTransformer, sequence: MemorizedSequence, hooks: list | None = None) -> Tensor:
    log_probs = model.run_with_hooks(sequence.tokens[None], return_type="logits", fwd_hooks=hooks or []).log_softmax(
        -1
    )[0]
    losses = [-log_probs[t - 1, sequence.tokens[t]] for t in range(sequence.prompt_len, len(sequence.tokens))]
    return torch.stack(losses).mean()


def post_activations(model: HookedTransformer, sequence: MemorizedSequence) -> Tensor:
    _, cache = model.run_with_cache(sequence.tokens[None])
    return torch.stack([cache[hook_name(layer)][0] for layer in range(model.cfg.n_layers)]).detach()


@torch.no_grad()
def zero_out(model: HookedTransformer, sequence: MemorizedSequence) -> Tensor:
    clean = suffix_loss(model, sequence)
    scores = torch.zeros(model.cfg.n_layers, model.cfg.d_mlp, dtype=clean.dtype)
    for layer in range(model.cfg.n_layers):
        for neuron in range(model.cfg.d_mlp):

            def zero(activations, hook, neuron=neuron):
                activations[:, :, neuron] = 0
                return activations

            scores[layer, neuron] = suffix_loss(model, sequence, [(hook_name(layer), zero)]) - clean
    return scores


@torch.no_grad()
def activations(model: HookedTransformer, sequence: MemorizedSequence, reduction: str) -> Tensor:
    post = post_activations(model, sequence)
    scores = torch.zeros(post.shape[0], post.shape[2], dtype=post.dtype)
    for layer in range(post.shape[0]):
        for neuron in range(post.shape[2]):
            values = [post[layer, t - 1, neuron] for t in range(sequence.prompt_len, len(sequence.tokens))]
            mean = torch.stack(values).mean().abs() if reduction == "abs_mean" else torch.stack(values).abs().mean()
            scores[layer, neuron] = mean * model.blocks[layer].mlp.W_out[neuron].norm()
    return scores


def integrated_gradients(model: HookedTransformer, sequence: MemorizedSequence, steps: int) -> Tensor:
    """One prefix a target position, and one run of it for each layer and step."""
    post = post_activations(model, sequence)
    scores = torch.zeros(post.shape[0], post.shape[2], dtype=post.dtype)
    targets = range(sequence.prompt_len, len(sequence.tokens))
    for t in targets:
        for layer in range(post.shape[0]):
            for fraction in torch.linspace(0, 1, steps, dtype=post.dtype):
                value = (fraction * post[layer, t - 1]).requires_grad_(True)

                def scale(activations, hook, value=value):
                    return torch.cat([activations[:, :-1], value[None, None]], dim=1)

                logits = model.run_with_hooks(
                    sequence.tokens[None, :t], return_type="logits", fwd_hooks=[(hook_name(layer), scale)]
                )
                probability = logits[0, -1].softmax(-1)[sequence.tokens[t]]
                (gradient,) = torch.autograd.grad(probability, value)
                scores[layer] += post[layer, t - 1] * gradient / steps / len(targets)
    return scores


def slimming(model: HookedTransformer, sequence: MemorizedSequence, steps: int, lr: float, penalty: float) -> Tensor:
    """Adam written out, and one mask tensor a layer."""
    masks = [torch.ones(model.cfg.d_mlp) for _ in range(model.cfg.n_layers)]

    def objective(values: list[Tensor]) -> Tensor:
        hooks = [
            (hook_name(layer), lambda a, hook, v=value: a * v.clamp(0, 1).to(a)) for layer, value in enumerate(values)
        ]
        return (
            suffix_loss(model, sequence, hooks) + penalty * torch.cat(values).abs().sum() / len(masks) / model.cfg.d_mlp
        )

    return torch.stack(adam(masks, objective, steps, lr)).clamp(0, 1)


def hard_concrete(
    model: HookedTransformer, sequence: MemorizedSequence, steps: int, lr: float, penalty: float, init: float,
    temperature: float, seed: int,
) -> Tensor:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    start = torch.log(torch.tensor((init + 0.1) / 1.2) / (1 - torch.tensor((init + 0.1) / 1.2)))
    alphas = [torch.full((model.cfg.d_mlp,), start.item()) for _ in range(model.cfg.n_layers)]

    def objective(values: list[Tensor]) -> Tensor:
        noise = torch.rand(model.cfg.n_layers, model.cfg.d_mlp, generator=generator).clamp(1e-4, 1 - 1e-4)
        hooks = []
        for layer, alpha in enumerate(values):
            s = torch.sigmoid((noise[layer].log() - (1 - noise[layer]).log() + alpha) / temperature)
            gate = torch.clamp(1.2 * s - 0.1, 0, 1)
            hooks.append((hook_name(layer), lambda a, hook, g=gate: a * g.to(a)))
        open_probability = torch.sigmoid(torch.cat(values) - temperature * torch.log(torch.tensor(0.1 / 1.1)))
        return suffix_loss(model, sequence, hooks) + penalty * open_probability.mean()

    return torch.stack(adam(alphas, objective, steps, lr)).sigmoid()


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
