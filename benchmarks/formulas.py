"""The formulas of the localizers, batched as the released code of Chang et al. (2024) batches them.

`speed.py` measures the localizers against these. No prefix is shared, no layer is skipped, every position is
unembedded, and masks train one sequence at a time. Parameters are frozen here too.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformer_lens import HookedTransformer

from memloc_lens import HardConcrete, IntegratedGradients, MemorizedSequence, Slimming, ZeroOut
from memloc_lens.components import Hook, post


def score(localizer: object, model: HookedTransformer, sequences: list[MemorizedSequence]) -> Tensor:
    """Return the scores [sequence, layer, neuron], computed one sequence after the other."""
    model.requires_grad_(False)
    formula = FORMULAS[type(localizer)]
    return torch.stack([formula(localizer, model, sequence) for sequence in sequences])


def suffix_losses(model: HookedTransformer, tokens: Tensor, prompt_len: int, hooks: list[tuple[str, Hook]]) -> Tensor:
    """Return the mean loss of each row's suffix, from the logits of all positions."""
    logits = model.run_with_hooks(tokens, return_type="logits", fwd_hooks=hooks)[:, prompt_len - 1 : -1]
    return cross_entropy(logits.transpose(1, 2), tokens[:, prompt_len:], reduction="none").mean(dim=1)


def integrated_gradients(
    settings: IntegratedGradients, model: HookedTransformer, sequence: MemorizedSequence
) -> Tensor:
    """Run the prefix of every target position, for every layer with all steps together."""
    tokens = sequence.tokens[None].to(model.cfg.device)
    names = [post(layer) for layer in range(model.cfg.n_layers)]
    _, cache = model.run_with_cache(tokens, names_filter=names)
    fractions = torch.linspace(0, 1, settings.steps, device=tokens.device)
    scores = torch.zeros(model.cfg.n_layers, model.cfg.d_mlp, device=tokens.device)
    targets = range(sequence.prompt_len, tokens.shape[1])
    for end in targets:
        for layer, name in enumerate(names):
            own = cache[name][0, end - 1]
            scaled = (fractions[:, None] * own).requires_grad_(True)

            def replace_last(activations: Tensor, hook: object, scaled: Tensor = scaled) -> Tensor:
                return torch.cat([activations[:, :-1], scaled[:, None]], dim=1)

            logits = model.run_with_hooks(
                tokens[:, :end].expand(settings.steps, -1), return_type="logits", fwd_hooks=[(name, replace_last)]
            )
            probability = logits[:, -1].softmax(dim=-1)[:, tokens[0, end]]
            (gradient,) = torch.autograd.grad(probability.sum(), scaled)
            scores[layer] += own * gradient.sum(dim=0) / settings.steps / len(targets)
    return scores


@torch.no_grad()
def zero_out(settings: ZeroOut, model: HookedTransformer, sequence: MemorizedSequence) -> Tensor:
    """Zero the neurons of a layer one by one, in 16 batches of whole sequences."""
    tokens = sequence.tokens[None].to(model.cfg.device)
    clean = suffix_losses(model, tokens, sequence.prompt_len, [])
    scores = torch.zeros(model.cfg.n_layers, model.cfg.d_mlp, device=tokens.device)
    for layer in range(model.cfg.n_layers):
        for neurons in torch.arange(model.cfg.d_mlp, device=tokens.device).chunk(16):

            def zero_one_a_row(activations: Tensor, hook: object, neurons: Tensor = neurons) -> Tensor:
                activations[torch.arange(len(neurons)), :, neurons] = 0
                return activations

            rows = tokens.expand(len(neurons), -1)
            losses = suffix_losses(model, rows, sequence.prompt_len, [(post(layer), zero_one_a_row)])
            scores[layer, neurons] = (losses - clean).float()
    return scores


def slimming(settings: Slimming, model: HookedTransformer, sequence: MemorizedSequence) -> Tensor:
    """Train one mask with Adam."""
    mask = torch.ones(model.cfg.n_layers, model.cfg.d_mlp, device=model.cfg.device, requires_grad=True)
    train(settings, mask, model, sequence, lambda: (mask.clamp(0, 1), mask.abs().mean()))
    return mask.detach().clamp(0, 1)


def hard_concrete(settings: HardConcrete, model: HookedTransformer, sequence: MemorizedSequence) -> Tensor:
    """Train the log_alpha of one mask with Adam, with a new sample of the gates at every step."""
    generator = torch.Generator().manual_seed(settings.seed)
    shape = (model.cfg.n_layers, model.cfg.d_mlp)
    start = torch.logit(torch.tensor((settings.init + 0.1) / 1.2))
    log_alpha = start.repeat(*shape).to(model.cfg.device).requires_grad_(True)
    closed = settings.temperature * torch.log(torch.tensor(0.1 / 1.1)).item()

    def sample() -> tuple[Tensor, Tensor]:
        noise = torch.rand(shape, generator=generator).clamp(1e-4, 1 - 1e-4).to(log_alpha.device)
        gates = torch.sigmoid((noise.log() - (1 - noise).log() + log_alpha) / settings.temperature)
        return (1.2 * gates - 0.1).clamp(0, 1), torch.sigmoid(log_alpha - closed).mean()

    train(settings, log_alpha, model, sequence, sample)
    return log_alpha.detach().sigmoid()


def train(
    settings: Slimming | HardConcrete,
    parameters: Tensor,
    model: HookedTransformer,
    sequence: MemorizedSequence,
    sample: Callable[[], tuple[Tensor, Tensor]],
) -> None:
    """Take the steps of Adam.

    Args:
        settings: of the mask.
        parameters: to be trained.
        model: whose neurons the mask multiplies at every layer.
        sequence: to be kept.
        sample: returns the mask and its regularizer.
    """
    tokens = sequence.tokens[None].to(model.cfg.device)
    optimizer = torch.optim.Adam([parameters], lr=settings.lr)
    for _ in range(settings.steps):
        values, regularizer = sample()
        hooks = [(post(layer), lambda a, hook, v=value: a * v.to(a)) for layer, value in enumerate(values)]
        loss = suffix_losses(model, tokens, sequence.prompt_len, hooks).sum()
        optimizer.zero_grad()
        (loss + settings.penalty * regularizer).backward()
        optimizer.step()


FORMULAS: dict[type, Callable[..., Tensor]] = {
    IntegratedGradients: integrated_gradients,
    ZeroOut: zero_out,
    Slimming: slimming,
    HardConcrete: hard_concrete,
}
"""The formula of each localizer that has one."""
