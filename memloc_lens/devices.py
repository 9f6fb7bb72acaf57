"""Where the parts of a model are: on one device, or on several GPUs that have some of its layers each.

Layers that follow one another are on one GPU. The embeddings are on the first, the final norm and the unembedding on
the last. What is of all layers, scores, masks and losses, is on the first, `model.cfg.device`.
"""

import torch
from jaxtyping import Int, Shaped
from torch import Tensor, nn

from memloc_lens.library_types import HookedModel


def devices_of(model: HookedModel) -> list[torch.device]:
    """Return the devices of a model, the first one first.

    Example:
        >>> from memloc_lens.devices import devices_of
        >>> devices_of(model)
        [device(type='cpu')]
    """
    first = torch.device(model.cfg.device)
    start = first.index or 0
    several = range(start, start + model.cfg.n_devices)
    return [first] if len(several) == 1 else [torch.device(first.type, index) for index in several]


def device_of(part: nn.Module) -> torch.device:
    """Return where the weights of a part are, such as a layer.

    Example:
        >>> from memloc_lens.devices import device_of
        >>> device_of(model.blocks[0])
        device(type='cpu')
    """
    return next(part.parameters()).device


def rows_of(values: Shaped[Tensor, "row ..."], rows: Int[Tensor, " some_row"]) -> Shaped[Tensor, "some_row ..."]:
    """Return some rows; their indices may be on another device, where a GPU would not look for them.

    Example:
        >>> from memloc_lens.devices import rows_of
        >>> rows_of(torch.tensor([5, 6, 7]), torch.tensor([2, 0])).tolist()
        [7, 5]
    """
    return values[rows.to(values.device)]
