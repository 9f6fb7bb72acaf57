"""Compare a checkpoint that was written with the model that it should be: the original under `ablate`."""

from pathlib import Path

import torch
from jaxtyping import Bool
from torch import Tensor

from memloc_lens.ablation import ablate
from memloc_lens.components import HEADS, WEIGHTS, ComponentSet
from memloc_lens.library_types import HookedModel
from memloc_lens.models import backend_of, load_model
from memloc_lens.models.verification import LIMITS

TOKENS = 32


@torch.no_grad()
def check_written(model: HookedModel, folder: Path, components: ComponentSet) -> None:
    """Refuse a folder whose weights are not those of the model with the components at zero.

    Args:
        model: the original.
        folder: that was written.
        components: that were erased.

    Raises:
        ValueError: naming the weight that differs, or stating how far the log-probabilities are apart.

    Example:
        >>> from memloc_lens.models import EMBEDDED
        >>> check_written(model, EMBEDDED, Neurons(torch.zeros(6, 768, dtype=torch.bool)))
    """
    where = dict(device=model.cfg.device, n_devices=model.cfg.n_devices)
    written = load_model(folder, **where, dtype=model.cfg.dtype, backend=backend_of(model))
    changed = 0
    for layer, (matrix, expected) in enumerate(
        zip(*(_matrices(part, components) for part in (written, model)), strict=True)
    ):
        without = expected.masked_fill(_members(components, layer).to(expected.device), 0)
        if not torch.equal(matrix, without):
            raise ValueError(f"what was written is not the model without {components!r}: layer {layer} differs")
        changed += int((without != expected).sum())
    originals = dict(model.named_parameters())
    differences = {name: int((weight != originals[name]).sum()) for name, weight in written.named_parameters()}
    if sum(differences.values()) != changed:
        raise ValueError(
            f"what was written is not the model without {components!r}: {sum(differences.values())} values differ in "
            f"{', '.join(name for name, count in differences.items() if count)}, and {changed} should"
        )
    length, drawn = min(TOKENS, model.cfg.n_ctx), torch.Generator("cpu").manual_seed(0)
    tokens = torch.randint(model.cfg.d_vocab, (1, length), generator=drawn, device="cpu")
    with ablate(model, components):
        expected = _log_probs(model, tokens)
    apart = (_log_probs(written, tokens) - expected).abs().max().item()
    if not apart <= LIMITS[model.cfg.dtype] * expected.abs().max().item():  # nor NaN
        raise ValueError(
            f"what was written does not compute what the model computes without {components!r}: log-probabilities "
            f"differ by up to {apart:.2g} nats"
        )


def _matrices(model: HookedModel, components: ComponentSet) -> list[Tensor]:
    """Return the weights that the components of each layer write with."""
    return [block.attn.W_O if components.component is HEADS else block.mlp.W_out for block in model.blocks]


def _members(components: ComponentSet, layer: int) -> Bool[Tensor, "..."]:
    """Return which values of a layer's weights should be zero, in a shape that broadcasts to theirs."""
    members = components.layer(layer)
    missing = 2 if components.component is HEADS else int(components.component is not WEIGHTS)
    return members.view(*members.shape, *[1] * missing)


def _log_probs(model: HookedModel, tokens: Tensor) -> Tensor:
    return model(tokens.to(model.cfg.device), return_type="logits").double().log_softmax(-1)
