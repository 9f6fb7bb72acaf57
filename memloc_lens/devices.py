"""Where the parts of a model are: on one device, or on several GPUs that have some of its layers each.

Layers that follow one another are on one GPU. The embeddings are on the first, the final norm and the unembedding on
the last. What is of all layers, scores, masks and losses, is on the first, `model.cfg.device`.
"""

import torch
from jaxtyping import Int, Shaped
from torch import Tensor, nn

from memloc_lens.library_types import HookedModel, TransformerBridge


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


def check_several(model: HookedModel) -> None:
    """Refuse a model on several devices whose layers are not where its forward pass sends the residual stream.

    Raises:
        ValueError: naming the layer, or a `TransformerBridge`.
    """
    from transformer_lens.utilities.multi_gpu import get_device_for_block_index

    name, count = model.cfg.model_name, model.cfg.n_devices
    if isinstance(model, TransformerBridge):
        raise ValueError(
            f"{name} is a TransformerBridge on {count} devices, and it must be on one; load it without n_devices and "
            "device_map"
        )
    for layer, block in enumerate(model.blocks):
        here, wanted = device_of(block), get_device_for_block_index(layer, model.cfg)
        if here != wanted:
            raise ValueError(
                f"layer {layer} of {name} is on {here}, and with n_devices {count} its input goes to {wanted}; load "
                f"the model with load_model(..., n_devices={count}), and leave it there"
            )
