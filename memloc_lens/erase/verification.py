"""Compare a checkpoint that was written with the model that it should be: the original under `ablate`."""

from pathlib import Path

import torch
from jaxtyping import Bool
from torch import Tensor

from memloc_lens.ablation import ablate
from memloc_lens.components import HEADS, WEIGHTS, ComponentSet
from memloc_lens.library_types import HookedModel
from memloc_lens.models import load_model
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
    written = load_model(folder, device=model.cfg.device, dtype=model.cfg.dtype)
    for name, weight in written.named_parameters():
        expected = model.get_parameter(name)
        members = _members(name, components)
        if members is not None:
            expected = expected.masked_fill(members.to(expected.device), 0)
        if not torch.equal(weight, expected):
            raise ValueError(f"what was written is not the model without {components!r}: {name} differs")
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


def _members(name: str, components: ComponentSet) -> Bool[Tensor, "..."] | None:
    """Return which values of a weight should be zero, in its shape or one that broadcasts to it."""
    matrix = "attn.W_O" if components.component is HEADS else "mlp.W_out"
    if not name.endswith(matrix):
        return None
    members = components.layer(int(name.split(".")[1]))
    missing = 2 if components.component is HEADS else int(components.component is not WEIGHTS)
    return members.view(*members.shape, *[1] * missing)


def _log_probs(model: HookedModel, tokens: Tensor) -> Tensor:
    return model(tokens.to(model.cfg.device), return_type="logits").double().log_softmax(-1)
