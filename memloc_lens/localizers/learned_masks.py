"""Learned masks: train a mask over the neurons to keep the sequence while most of the mask is driven to zero.

Chang et al. (2024), sec. 4.1. A mask with an entry for each neuron multiplies the activations at every position;
Adam lowers suffix loss + penalty * regularizer, with the model's weights frozen. What the mask holds on to is
what the sequence needs.

* Slimming (Liu et al., 2017): the mask itself is trained, from 1, and multiplies clipped to [0, 1]; the
  regularizer is the mean of its absolute values before clipping; the score is the mask clipped to [0, 1].
* Hard Concrete (Louizos et al., 2018): each entry is a random variable on [0, 1] with mass at both ends. With
  s = sigmoid((logit(u) + log_alpha) / temperature), u uniform, the mask is s stretched to [-0.1, 1.1] and
  clipped; the regularizer is the mean probability of being above 0; the score is sigmoid(log_alpha).

The masks of many sequences train side by side in one batch. Adam works entry by entry and every sequence has a
loss of its own, so they do not touch one another; a sequence that reaches its stop keeps the mask it had then.
Up to the first masked layer nothing changes between steps: a clean pass is run once, and only what follows again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from memloc_lens.ablation import mask, post
from memloc_lens.forward import norm_after_mlp, run_layers, target_loss
from memloc_lens.localizers.scoring import score
from memloc_lens.sequence import MemorizedSequence

STRETCH = 0.1  # of the concrete distribution beyond 0 and 1 (Louizos et al., 2018)
STOP_EVERY = 10  # steps between two looks at the stop


@dataclass(frozen=True)
class Slimming:
    """A mask trained from 1 under an L1 penalty, clipped to [0, 1].

    Args:
        steps: of Adam at the most.
        lr: learning rate of Adam.
        penalty: weight of the mean absolute mask against the suffix loss in nats. Because it weighs a mean, a
            model with more neurons needs a larger one.
        stop_loss: training ends when the mean absolute mask falls under it.
        first_layer: layers before it are left alone, and score 0.
    """

    steps: int = 60
    lr: float = 1e-2
    penalty: float = 100.0
    stop_loss: float = 0.1
    first_layer: int = 0

    def __call__(
        self, model: HookedTransformer, sequences: MemorizedSequence | Sequence[MemorizedSequence]
    ) -> Float[Tensor, "*sequence layer neuron"]:
        """Scores in [0, 1], [layer, neuron], or [sequence, layer, neuron] for a list."""
        return score(model, sequences, self._score_batch, graph_layers=model.cfg.n_layers - self.first_layer)

    def _score_batch(
        self, model: HookedTransformer, tokens: Int[Tensor, "batch pos"], prompt_len: int
    ) -> Float[Tensor, "batch layer neuron"]:
        values = torch.ones(_shape(model, tokens, self.first_layer), device=tokens.device, requires_grad=True)

        def mask_and_regularizer() -> tuple[Tensor, Tensor]:
            return values.clamp(0, 1), values.abs().mean(dim=(1, 2))

        trained = _train(self, values, mask_and_regularizer, model, tokens, prompt_len)
        return _with_untrained_layers(trained.clamp(0, 1), self.first_layer)


@dataclass(frozen=True)
class HardConcrete:
    """A mask of hard concrete gates under an expected-L0 penalty; the score is sigmoid(log_alpha).

    Args:
        steps: of Adam at the most.
        lr: learning rate of Adam.
        penalty: weight of the mean probability of an open gate against the suffix loss in nats. Because it
            weighs a mean, a model with more neurons needs a larger one.
        init: the value of the mask without noise at the start.
        temperature: of the gates; lower is closer to 0 or 1.
        stop_loss: training ends when the mean probability of an open gate falls under it.
        first_layer: layers before it are left exactly alone, and score 0.
        seed: of the gates' noise. All sequences share the noise, so that none depends on its batch.
    """

    steps: int = 200
    lr: float = 1e-2
    penalty: float = 100.0
    init: float = 0.9
    temperature: float = 0.33
    stop_loss: float = 0.1
    first_layer: int = 0
    seed: int = 0

    def __call__(
        self, model: HookedTransformer, sequences: MemorizedSequence | Sequence[MemorizedSequence]
    ) -> Float[Tensor, "*sequence layer neuron"]:
        """Scores in (0, 1), [layer, neuron], or [sequence, layer, neuron] for a list."""
        return score(model, sequences, self._score_batch, graph_layers=model.cfg.n_layers - self.first_layer)

    def _score_batch(
        self, model: HookedTransformer, tokens: Int[Tensor, "batch pos"], prompt_len: int
    ) -> Float[Tensor, "batch layer neuron"]:
        generator = torch.Generator().manual_seed(self.seed)
        start = torch.logit(torch.tensor((self.init + STRETCH) / (1 + 2 * STRETCH)))
        shape = _shape(model, tokens, self.first_layer)
        log_alpha = start.repeat(*shape).to(tokens.device).requires_grad_(True)
        closed = self.temperature * torch.log(torch.tensor(STRETCH / (1 + STRETCH))).item()

        def mask_and_regularizer() -> tuple[Tensor, Tensor]:
            noise = torch.rand(shape[1:], generator=generator).clamp(1e-4, 1 - 1e-4).logit().to(tokens.device)
            gates = torch.sigmoid((noise + log_alpha) / self.temperature)
            open_probability = torch.sigmoid(log_alpha - closed)
            return (gates * (1 + 2 * STRETCH) - STRETCH).clamp(0, 1), open_probability.mean(dim=(1, 2))

        trained = _train(self, log_alpha, mask_and_regularizer, model, tokens, prompt_len)
        return _with_untrained_layers(trained.sigmoid(), self.first_layer)


def _train(
    settings: Slimming | HardConcrete,
    parameters: Float[Tensor, "batch layer neuron"],
    mask_and_regularizer: Callable[[], tuple[Tensor, Tensor]],
    model: HookedTransformer,
    tokens: Int[Tensor, "batch pos"],
    prompt_len: int,
) -> Float[Tensor, "batch layer neuron"]:
    """Run Adam on the parameters until every sequence has reached its stop, or the steps are over."""
    optimizer = torch.optim.Adam([parameters], lr=settings.lr)
    masked = _masked_residual(model, tokens, settings.first_layer, prompt_len)
    result = parameters.detach().clone()
    running = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
    for step in range(settings.steps):
        with torch.enable_grad():
            values, regularizer = mask_and_regularizer()
            if step % STOP_EVERY == 0:
                running &= regularizer.detach() >= settings.stop_loss
                if not running.any():
                    break
            losses = target_loss(model, masked(values), tokens, prompt_len)
            objective = (losses + settings.penalty * regularizer).sum()
        optimizer.zero_grad()
        objective.backward()
        optimizer.step()
        result = torch.where(running[:, None, None], parameters.detach(), result)
    return result


def _masked_residual(
    model: HookedTransformer, tokens: Int[Tensor, "batch pos"], first_layer: int, prompt_len: int
) -> Callable[[Float[Tensor, "batch layer neuron"]], Float[Tensor, "batch suffix d_model"]]:
    """A function from masks to the final residual stream at the targets, which runs only what the masks change.

    Up to the neurons of the first masked layer everything is as in the clean pass, which is run once; masking these
    adds the change of their activations times `W_out` to the stream.
    """
    if norm_after_mlp(model):
        with torch.no_grad():
            before = model(tokens, return_type="logits", stop_at_layer=first_layer)

        def run_all(values: Float[Tensor, "batch layer neuron"]) -> Float[Tensor, "batch suffix d_model"]:
            with mask(model, values, first_layer):
                return run_layers(model, before, first_layer, prompt_len)

        return run_all

    with torch.no_grad():
        names = [post(first_layer), f"blocks.{first_layer}.hook_resid_post"]
        _, cache = model.run_with_cache(tokens, stop_at_layer=first_layer + 1, names_filter=names)
    activations, clean = (cache[name] for name in names)
    rows = model.blocks[first_layer].mlp.W_out

    def run_later(values: Float[Tensor, "batch layer neuron"]) -> Float[Tensor, "batch suffix d_model"]:
        change = activations * (values[:, 0] - 1).to(activations).unsqueeze(1)
        with mask(model, values[:, 1:], first_layer + 1):
            return run_layers(model, clean + change @ rows, first_layer + 1, prompt_len)

    return run_later


def _shape(model: HookedTransformer, tokens: Int[Tensor, "batch pos"], first_layer: int) -> tuple[int, int, int]:
    return len(tokens), model.cfg.n_layers - first_layer, model.cfg.d_mlp


def _with_untrained_layers(
    scores: Float[Tensor, "batch trained neuron"], first_layer: int
) -> Float[Tensor, "batch layer neuron"]:
    return torch.cat([scores.new_zeros(len(scores), first_layer, scores.shape[2]), scores], dim=1)
