"""float32 matrix products on a processor by the faster of torch's two libraries.

torch multiplies float32 matrices with MKL, which keeps to 256-bit instructions on processors that are not Intel's.
oneDNN, which torch carries too, uses the 512-bit ones wherever there are any: twice as fast on AMD's Zen 5, with the
same precision.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

WORTHWHILE = 2**20
"""Multiplications of a product from which on oneDNN's longer start pays."""


@contextmanager
def fast_products(device: str | torch.device | None = "cpu") -> Iterator[None]:
    """Leave large float32 products on the CPU, forward and backward, to oneDNN while the context is open.

    Args:
        device: where the model is; on any but the CPU nothing is done.
    """
    if str(device) != "cpu" or not _has_512_bits() or isinstance(_get_current_dispatch_mode(), _ByOneDNN):
        yield
        return
    with _ByOneDNN():
        yield


def _has_512_bits() -> bool:
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


class _ByOneDNN(TorchDispatchMode):
    def __torch_dispatch__(
        self, operation: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        if operation is torch.ops.aten.mm.default and _suits(*arguments):
            left, right = arguments
            return _linear(left, right.t(), None, "none", [], "")
        if operation is torch.ops.aten.addmm.default and not options and _suits(*arguments[1:]):
            bias, left, right = arguments
            if bias.dim() == 1:
                return _linear(left, right.t(), bias, "none", [], "")
        return operation(*arguments, **(options or {}))


_linear: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise


def _suits(left: Tensor, right: Tensor) -> bool:
    return (
        left.dtype == torch.float32
        and left.device.type == "cpu"
        and left.shape[0] * right.numel() >= WORTHWHILE
        and all(part.is_contiguous() or part.t().is_contiguous() for part in (left, right))  # others take 1000 times
    )
