"""How many copies of a sequence run at once: as many as memory and caches have room for.

    with memory_budget("8GiB"):
        scores = ZeroOut()(model, sequence)

Default: half of the free memory of the device. If a GPU runs out of memory, half as many copies are tried.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import psutil
import torch
from torch import Tensor

from memloc_lens.devices import devices_of
from memloc_lens.library_types import HookedModel

CPU_TOKENS_AT_ONCE, GPU_TOKENS_AT_ONCE = 2560, 2**16
"""Tokens in one pass: more gain nothing, and on a CPU they no longer fit its caches."""

BYTES_OF_A_PARAMETER = 4 * 8
"""In float32: the entry, its gradient, two moments of Adam, the best so far, and what the forward pass makes of it."""

UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}

Result = TypeVar("Result")

_rooms: list[int] = []
"""Bytes that the open budgets leave, outermost first. Memory belongs to the process, and so does its budget: worker
threads keep to it too."""


@contextmanager
def memory_budget(limit: str, device: str | torch.device | Sequence[torch.device] = "cpu") -> Iterator[None]:
    """Bound the memory that this process takes on a device while localizers run inside, in any of its threads.

    Args:
        limit: of all memory that the process takes there, the model included: "8GiB", "500 MB".
        device: where the model is; of several GPUs, the limit is that of each.

    Raises:
        ValueError: if the limit is not an amount of memory, or the process takes more already.

    Example:
        >>> with memory_budget("64GiB"):
        ...     scores = ZeroOut(candidates=0.01)(model, sequence)
    """
    devices = [torch.device(device)] if isinstance(device, str | torch.device) else device
    wanted, taken = parse_memory(limit), max(map(_taken, devices))
    if wanted <= taken:
        raise ValueError(
            f"memory is {limit}, and {taken / 2**30:.2f} GiB are taken by the model and Python already; allow more"
        )
    room = wanted - taken
    _rooms.append(room)
    try:
        yield
    finally:
        _rooms.remove(room)


def parse_memory(text: str) -> int:
    """Return an amount of memory in bytes.

    Raises:
        ValueError: if the text is not a number with a unit.

    Example:
        >>> parse_memory("1.5 GiB")
        1610612736
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]+)\s*", str(text))
    if not match or match[2] not in UNITS or match[1].count(".") > 1:
        raise ValueError(f"memory is {text!r}; write an amount with one of the units {', '.join(UNITS)}, such as 8GiB")
    return int(float(match[1]) * UNITS[match[2]])


def rows_at_once(model: HookedModel, length: int, targets: int, graph_layers: int = 0, parameters: int = 0) -> int:
    """Return how many rows of a batch fit, at least 1.

    Args:
        model: the model that runs.
        length: tokens in a row.
        targets: positions of a row that are unembedded.
        graph_layers: layers whose activations are kept for a backward pass; 0 keeps none.
        parameters: trained for each row, as the entries of a mask.
    """
    devices = devices_of(model)
    room = _rooms[-1] if _rooms else min(map(_free, devices)) // 2
    row_bytes = _row_bytes(model, length, targets, graph_layers) + BYTES_OF_A_PARAMETER * parameters
    tokens_at_once = CPU_TOKENS_AT_ONCE if devices[0].type == "cpu" else GPU_TOKENS_AT_ONCE
    return max(1, min(room // row_bytes, tokens_at_once // length))


def in_chunks(items: Tensor, size: int, work: Callable[[Tensor], Result]) -> list[Result]:
    """Apply `work` to the items, `size` at a time; where a GPU has no room for so many, to half as many, and so on."""
    results: list[Result] = []
    start = 0
    while start < len(items):
        try:
            results.append(work(items[start : start + size]))
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        else:
            start += size
            continue
        # outside of the handler, whose traceback holds the tensors that did not fit
        torch.cuda.empty_cache()
        size = (size + 1) // 2
    return results


def _row_bytes(model: HookedModel, length: int, targets: int, graph_layers: int) -> int:
    """Estimate the peak memory of a row, generously: the tensors of TransformerLens' forward pass, by width."""
    cfg = model.cfg
    assert cfg.d_mlp is not None
    size = model.W_E.element_size()
    attention = 3 * cfg.n_heads * length * max(size, 4)
    passing = length * (size * (12 * cfg.d_model + 4 * cfg.d_mlp) + attention)
    kept = length * (size * (18 * cfg.d_model + 6 * cfg.d_mlp) + 2 * attention)
    logits = targets * cfg.d_vocab * 4
    return passing + graph_layers * kept + (4 if graph_layers else 1) * logits


def _taken(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def _free(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
