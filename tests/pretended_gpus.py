"""GPUs that are not there: `PretendedGPUs` refuses to mix tensors of different devices, as CUDA does.

All numbers stay on the CPU, and a tag beside each tensor says where it would be: a missing `.to(device)` fails as it
would on GPUs, and `tensor.device` is what it would be there. What backward passes do inside of torch is not seen.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils.weak import WeakTensorKeyDictionary

from memloc_lens import memory
from memloc_lens.library_types import HookedModel
from memloc_lens.models.placement import place

CPU = torch.device("cpu")

OF_MODULES = {torch.device, torch._C._nn._parse_to, torch._has_compatible_shallow_copy_type}
"""What a module that is moved calls beside moving its tensors."""
INDEXING = {Tensor.__getitem__, Tensor.__setitem__}
TO_NUMBERS = {Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__,
              Tensor.__repr__, Tensor.__format__, Tensor.__len__, Tensor.__contains__}  # fmt: skip


def pretended(monkeypatch: pytest.MonkeyPatch, count: int = 1) -> "PretendedGPUs":
    """Let torch count so many GPUs with room on them, and return the mode that pretends them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    monkeypatch.setattr(memory, "_free", lambda device: 2**34)
    monkeypatch.setattr(torch.optim.Optimizer, "_group_tensors_by_device_and_dtype", staticmethod(_grouped))
    return PretendedGPUs()


def placed(gpus: "PretendedGPUs", model: HookedModel) -> HookedModel:
    """Put the layers of a model on two GPUs."""
    with gpus:
        return place(model, torch.device("cuda", 0), 2)


def _grouped(columns: list[list[Tensor]], with_indices: bool = False) -> dict:
    """Group tensors as torch does in C++, where it does not see what is pretended."""
    rows = defaultdict(list)
    for index, tensor in enumerate(columns[0]):
        rows[tensor.device, tensor.dtype].append(index)
    return {key: ([[column[row] for row in own] if column else [] for column in columns], own)
            for key, own in rows.items()}  # fmt: skip


class PretendedGPUs(TorchFunctionMode):
    """Tensors made on "cuda:1" are on the CPU and tagged; operations refuse tensors with different tags."""

    where: ClassVar[WeakTensorKeyDictionary] = WeakTensorKeyDictionary()
    """Of all modes: the package keeps some tensors for as long as a process lasts."""

    def of(self, tensor: Tensor) -> torch.device:
        """Where a tensor is."""
        return self.where.get(tensor, CPU)

    def __torch_function__(self, function, types, given=(), options=None):
        options = dict(options or {})
        if function in OF_MODULES:
            return function(*given, **options)
        if function == Tensor.device.__get__:
            return self.of(given[0])
        if function in (Tensor.is_cuda.__get__, Tensor.is_cpu.__get__):
            return (self.of(given[0]) != CPU) == (function == Tensor.is_cuda.__get__)
        if function is Tensor.numpy and self.of(given[0]) != CPU:
            raise TypeError(f"can't convert {self.of(given[0])} device type tensor to numpy")
        if function == Tensor.data.__set__:
            self.where[given[0]] = self.of(given[1])
            return function(*given)
        tensors = [*_tensors_in(given), *_tensors_in(options)]
        target = self._asked(function, given, options)
        if target is None and function is not torch.autograd.grad:
            target = self._common(function, tensors)
        given, options = tuple(map(_on_cpu, given)), {name: _on_cpu(value) for name, value in options.items()}
        if function is Tensor.cuda:
            function, given = Tensor.clone, given[:1]
        result = function(*given, **options)
        if function is torch.autograd.grad:  # a gradient is where its input is
            inputs = given[1] if isinstance(given[1], list | tuple) else given[1:2]
            for gradient, own in zip(result, inputs, strict=True):
                self.where[gradient] = self.of(own)
            return result
        if any(result is tensor and self.of(tensor) != target for tensor in tensors):  # a move that moved nothing
            result = result.clone()
        for tensor in _tensors_in(result):
            self.where[tensor] = target
        return result

    def _asked(self, function, given, options) -> torch.device | None:
        """Where the result is to be, if the call says so."""
        wanted = options.get("device")
        if function is Tensor.cpu:
            wanted = CPU
        elif function is Tensor.cuda:
            wanted = "cuda"
        elif function is Tensor.to:
            for value in given[1:]:
                if isinstance(value, Tensor):
                    wanted = self.of(value)
                elif isinstance(value, str | torch.device):
                    wanted = value
            wanted = self.of(given[0]) if wanted is None else wanted
        elif function is Tensor.type_as:
            wanted = self.of(given[1])
        elif function is Tensor.copy_:
            wanted = self.of(given[0])
        return None if wanted is None else _indexed(torch.device(wanted))

    def _common(self, function, tensors: list[Tensor]) -> torch.device:
        if function in INDEXING and tensors:  # indices may be on the CPU for a GPU, and numbers on the CPU for all
            first, *others = tensors
            own = self.of(first)
            for other in others:
                if self.of(other) not in (own, CPU):
                    self._refuse(function, {own, self.of(other)})
            if function is Tensor.__setitem__ and others and others[-1].ndim and self.of(others[-1]) != own:
                self._refuse(function, {own, self.of(others[-1])})
            return own
        joins = function in (torch.cat, torch.stack)  # which take no numbers on the CPU
        places = {self.of(tensor) for tensor in tensors if tensor.ndim or joins or self.of(tensor) != CPU}
        if len(places) > 1 and function not in TO_NUMBERS:
            self._refuse(function, places)
        return places.pop() if places else CPU

    def _refuse(self, function, places: set[torch.device]) -> None:
        named = " and ".join(sorted(map(str, places)))
        raise RuntimeError(f"expected all tensors on one device, but {resolve_name(function)} got {named}")


def _tensors_in(value) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(part)


def _indexed(device: torch.device) -> torch.device:
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def _on_cpu(value):
    if isinstance(value, torch.device):
        return CPU
    return "cpu" if isinstance(value, str) and value.split(":")[0] == "cuda" else value
