"""float32 matrix products on a processor by the faster of torch's two libraries.

torch multiplies float32 matrices with MKL, which keeps to 256-bit instructions on processors that are not Intel's.
oneDNN, which torch carries too, uses the 512-bit ones wherever there are any: twice as fast on AMD's Zen 5, with the
same precision.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

WORTHWHILE = 2**20
"""Multiplications of a product from which on oneDNN's longer start pays."""

_open: list[object] = []
"""One entry for each context that is open, in any thread."""


@contextmanager
def fast_products(device: str | torch.device | None = "cpu") -> Iterator[None]:
    """Leave large float32 products on the CPU, forward and backward, to oneDNN while the context is open.

    Args:
        device: where the model is; on any but the CPU nothing is done.
    """
    if str(device) != "cpu" or not _has_512_bits():
        yield
        return
    _register()
    _open.append(None)
    try:
        yield
    finally:
        _open.pop()


def _has_512_bits() -> bool:
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


@cache
def _register() -> torch.library.Library:
    """Let torch call the functions below for every product of matrices on a CPU.

    They stay, and do as torch does while no context is open: another thread may be in one when a context closes.
    """
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*overrid", UserWarning)
        library.impl("mm", _mm, "CPU")
        library.impl("addmm", _addmm, "CPU")
    return library


def _mm(left: Tensor, right: Tensor) -> Tensor:
    if _suits(left, right):
        return _linear(left, right.t(), None, "none", [], "")
    return torch.ops.aten.mm.out(left, right, out=left.new_empty(len(left), right.shape[1]))


def _addmm(bias: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if beta == alpha == 1 and bias.dim() == 1 and len(bias) == right.shape[1] and _suits(left, right):
        return _linear(left, right.t(), bias, "none", [], "")
    out = left.new_empty(len(left), right.shape[1])
    return torch.ops.aten.addmm.out(bias, left, right, beta=beta, alpha=alpha, out=out)


def gelu_of_product(
    bias: Float[Tensor, " right"], left: Float[Tensor, "left inner"], right: Float[Tensor, "inner right"]
) -> Float[Tensor, "left right"] | None:
    """Return the GELU, by tanh, of a product plus a bias, in one go; nothing where `fast_products` has no part in it.

    It has no gradient.
    """
    return _linear(left, right.t(), bias, "gelu", [], "tanh") if _suits(left, right) else None


_linear: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise


def _suits(left: Tensor, right: Tensor) -> bool:
    return (
        bool(_open)
        and left.dtype == torch.float32
        and left.device.type == "cpu"
        and len(left) * right.numel() >= WORTHWHILE
        and all(part.is_contiguous() or part.t().is_contiguous() for part in (left, right))  # others take 1000 times
    )
