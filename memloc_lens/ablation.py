"""Switch neurons off, or turn them down, while a context is open.

Everything here acts through hooks on ``blocks.{layer}.mlp.hook_post``, the neurons' activations just before
`W_out`, at every position: weights are never touched, and closing the context removes the hooks.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint

from memloc_lens.neurons import Neurons
from memloc_lens.sequence import MemorizedSequence, equal_length_batches

Hook = Callable[[Tensor, HookPoint], Tensor | None]


def post(layer: int) -> str:
    """The name of the hook point of a layer's neurons."""
    return f"blocks.{layer}.mlp.hook_post"


@contextmanager
def ablate(
    model: HookedTransformer,
    neurons: Neurons | Sequence[Neurons],
    kind: Literal["zero", "mean", "scale"] = "zero",
    *,
    over: Sequence[MemorizedSequence] | Float[Tensor, "layer neuron"] = (),
    factor: float = 0.5,
) -> Iterator[None]:
    """Ablate neurons at every position, in forward passes, gradients and every step of generation.

    Contexts nest. An exception inside leaves the model as clean as a normal exit.

    Args:
        model: its weights stay as they are.
        neurons: the set to ablate; or a list, with another set for each row of the batches that are run inside.
        kind: set the activations to zero, to their mean over the text `over`, or multiply them by `factor`.
        over: the sequences whose positions the mean is taken over, or what `mean_activations` gave for them;
            needed for `"mean"` alone.
        factor: for `"scale"` alone.

    Raises:
        ValueError: if the neurons have another model's shape, or `"mean"` comes without sequences.

    Example:
        >>> with ablate(model, neurons):
        ...     model.generate(sequence.prompt, max_new_tokens=48)
    """
    all_members = neurons.members if isinstance(neurons, Neurons) else torch.stack([row.members for row in neurons])
    _check_shape(model, all_members)
    if kind == "mean":
        means = over if isinstance(over, Tensor) else mean_activations(model, over)
    hooks: list[tuple[str, Hook]] = []
    for layer, members in enumerate(all_members.unbind(dim=-2)):
        if not members.any():
            continue
        if kind == "zero":
            hooks.append((post(layer), _replacing(members, torch.zeros(()))))
        elif kind == "mean":
            hooks.append((post(layer), _replacing(members, means[layer])))
        elif kind == "scale":
            hooks.append((post(layer), _multiplying(torch.where(members, factor, 1.0))))
        else:
            raise ValueError(f"no ablation is called {kind!r}; there are 'zero', 'mean' and 'scale'")
    with model.hooks(fwd_hooks=hooks):
        yield


@contextmanager
def mask(
    model: HookedTransformer, values: Float[Tensor, "*batch layer neuron"], first_layer: int = 0
) -> Iterator[None]:
    """Multiply the neurons' activations by a mask at every position.

    Args:
        model: its weights stay as they are.
        values: one factor a neuron; with a batch dimension, another mask for each row of the input.
            Layers are counted from `first_layer`. Gradients reach it.
        first_layer: layers before it are left alone.

    Raises:
        ValueError: if the mask has another model's shape.
    """
    _check_shape(model, values, first_layer)
    layers = values.unbind(dim=-2)
    hooks = [(post(first_layer + place), _multiplying(layer)) for place, layer in enumerate(layers)]
    with model.hooks(fwd_hooks=hooks):
        yield


@torch.no_grad()
def mean_activations(model: HookedTransformer, sequences: Sequence[MemorizedSequence]) -> Float[Tensor, "layer neuron"]:
    """Each neuron's activation, averaged over all positions of the sequences.

    Raises:
        ValueError: if there are no sequences.
    """
    if not sequences:
        raise ValueError("a mean ablation needs the text to take the mean over: ablate(..., 'mean', over=sequences)")
    names = [post(layer) for layer in range(model.cfg.n_layers)]
    total = torch.zeros(model.cfg.n_layers, model.cfg.d_mlp, device=model.cfg.device)
    for _, tokens, _ in equal_length_batches(sequences, size=16):
        _, cache = model.run_with_cache(tokens.to(model.cfg.device), return_type=None, names_filter=names)
        total += torch.stack([cache[name].float().sum(dim=(0, 1)) for name in names])
    return total / sum(len(sequence.tokens) for sequence in sequences)


def _replacing(members: Tensor, value: Tensor) -> Hook:
    def hook(activations: Tensor, hook: HookPoint) -> Tensor:
        return torch.where(members.to(activations.device).unsqueeze(-2), value.to(activations), activations)

    return hook


def _multiplying(factors: Tensor) -> Hook:
    def hook(activations: Tensor, hook: HookPoint) -> Tensor:
        return activations * factors.to(activations).unsqueeze(-2)

    return hook


def _check_shape(model: HookedTransformer, values: Tensor, first_layer: int = 0) -> None:
    expected = (model.cfg.n_layers - first_layer, model.cfg.d_mlp)
    if values.shape[-2:] != expected:
        raise ValueError(
            f"neurons of shape {list(values.shape[-2:])} [layer, neuron] do not fit {model.cfg.model_name}, "
            f"which has {list(expected)}"
        )
