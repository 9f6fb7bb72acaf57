"""How many copies of a sequence are run at once: as many as memory and caches have room for.

    with memory_budget("8GiB"):
        scores = ZeroOut()(model, sequence)

Without a budget it is what is free on the device. Running out of it on a GPU halves the copies and goes on.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import psutil
import torch
from torch import Tensor
from transformer_lens import HookedTransformer

TOKENS_AT_ONCE = {True: 2560, False: 2**16}
"""Tokens in one pass, on a CPU and elsewhere: more gain nothing, and on a CPU leave its caches."""

UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}

Result = TypeVar("Result")

_room: ContextVar[int | None] = ContextVar("room", default=None)


@contextmanager
def memory_budget(limit: str, device: str | torch.device = "cpu") -> Iterator[None]:
    """Keep what this process takes on a device under a limit, while localizers run inside.

    Args:
        limit: of all that the process takes there, the model included: "8GiB", "500 MB".
        device: where the model is.

    Raises:
        ValueError: if the limit is no amount of memory, or the process takes more already.

    Example:
        >>> with memory_budget("8GiB"):
        ...     scores = ZeroOut()(model, sequence)
    """
    wanted, taken = parse_memory(limit), _taken(torch.device(device))
    if wanted <= taken:
        raise ValueError(f"memory is {limit}, and {taken / 2**30:.2f} GiB are taken by the model and Python already")
    token = _room.set(wanted - taken)
    try:
        yield
    finally:
        _room.reset(token)


def parse_memory(text: str) -> int:
    """An amount of memory in bytes.

    Raises:
        ValueError: if the text is none.

    Example:
        >>> parse_memory("1.5 GiB")
        1610612736
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]+)\s*", text)
    if not match or match[2] not in UNITS or match[1].count(".") > 1:
        raise ValueError(f"memory is {text!r}; write an amount with one of the units {', '.join(UNITS)}, such as 8GiB")
    return int(float(match[1]) * UNITS[match[2]])


def rows_at_once(model: HookedTransformer, length: int, targets: int, graph_layers: int = 0) -> int:
    """How many rows of a batch fit, at least 1.

    Args:
        model: as it is loaded.
        length: tokens of a row.
        targets: positions of a row that are unembedded.
        graph_layers: layers whose activations are kept for a backward pass; 0 keeps none.
    """
    device = torch.device(model.cfg.device)
    room = _room.get()
    if room is None:
        room = _free(device) // 2
    by_memory = room // _row_bytes(model, length, targets, graph_layers)
    return max(1, min(by_memory, TOKENS_AT_ONCE[device.type == "cpu"] // length))


def in_chunks(items: Tensor, size: int, work: Callable[[Tensor], Result]) -> list[Result]:
    """What `work` makes of the items, `size` at a time; where that is too much for a GPU, half as many, and so on."""
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


def _row_bytes(model: HookedTransformer, length: int, targets: int, graph_layers: int) -> int:
    """What a row takes at its peak, counted generously: tensors of TransformerLens' forward pass, by width."""
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
