"""Do signals of membership still tell erased texts from texts that the model has never seen?"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from memloc_lens.checks import check_model, check_number
from memloc_lens.erase.losses import token_losses, whole
from memloc_lens.isolation import isolated
from memloc_lens.library_types import HookedModel
from memloc_lens.runs.schema import Cells
from memloc_lens.runs.statistics import mean_interval
from memloc_lens.sequence import MemorizedSequence, check_sequences


@torch.no_grad()
def min_k(model: HookedModel, sequences: Sequence[MemorizedSequence], share: float = 0.2) -> Float[Tensor, " sequence"]:
    """Return the mean log-probability of each text's least probable tokens, in nats.

    Over all tokens but the first, of which the share is taken, rounded down, and at least one. With a share of 1 it is
    the mean log-probability of all: the negative loss.

    Source: Shi et al. (2024), "Detecting pretraining data from large language models".

    Args:
        model: used as it is, ablated or not.
        sequences: texts, prompt and suffix alike.
        share: of the tokens, above 0 and at most 1.

    Raises:
        ValueError: if the share is out of range, or the model cannot read a text.

    Example:
        >>> bool(min_k(model, [sequence]) < min_k(model, [sequence], share=1.0))
        True
    """
    model = check_model(model)
    check_number("share", share, above=0, most=1)
    texts = [whole(sequence) for sequence in check_sequences(model, sequences)]
    with isolated(model):
        losses = token_losses(model, texts)
    least = [each.topk(max(1, int(share * len(each)))).values.mean().neg() for each in losses]
    return torch.stack(least).double().cpu() if least else torch.empty(0, dtype=torch.float64, device="cpu")


def membership(
    model: HookedModel,
    targets: Sequence[MemorizedSequence],
    controls: Sequence[MemorizedSequence],
    share: float = 0.2,
) -> Cells:
    """Return how well signals tell targets from controls: the AUROC of the loss and of min-k% probability.

    The AUROC is the probability that a target looks more like a member than a control does. 0.5: they cannot be told
    apart. 1: all targets look like members. Far below 0.5 is a signal, too: a text that the model avoids more than
    text it has never seen. The interval is over targets, with the controls as they are.

    Args:
        model: used as it is, ablated or not.
        targets: at least one.
        controls: texts that the model has never seen, at least one.
        share: of the tokens, for min-k%.

    Raises:
        ValueError: if there are no targets or no controls, or the model cannot read a text.

    Example:
        >>> from memloc_lens import load_sequences
        >>> signals = membership(model, [sequence], load_sequences(model, split="control")[:8])
        >>> signals["loss"]["mean"], signals["min_k"]["mean"]
        (1.0, 1.0)
    """
    if not targets or not controls:
        raise ValueError(f"there are {len(targets)} targets and {len(controls)} controls; give at least one of each")
    signals = {"loss": 1.0, "min_k": share}
    return {
        name: mean_interval(_beaten(min_k(model, targets, part), min_k(model, controls, part)))
        for name, part in signals.items()
    }


def _beaten(targets: Float[Tensor, " target"], controls: Float[Tensor, " control"]) -> list[float]:
    """Return for each target the share of the controls with a lower signal; a tie counts half."""
    higher = np.sign(np.subtract.outer(targets.numpy(), controls.numpy()))
    return ((higher + 1) / 2).mean(axis=1).tolist()
