"""The files of a checkpoint: which hold the weights, which are copied, and how weights in them are set to zero.

A zero is all bytes zero in every format of numbers. So weights of a safetensors file are overwritten where they are,
and all other bytes of it stay.
"""

import json
import math
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from torch import Tensor

SINGLE = ("model.safetensors", "pytorch_model.bin")
"""Files with all weights, in the order in which they are looked for; a sharded one has an index of its name."""

OF_WEIGHTS = frozenset(
    ".safetensors .bin .pt .pth .ckpt .h5 .msgpack .ot .onnx .onnx_data .gguf .ggml .tflite .npz .pkl .mlmodel".split()
)
"""Suffixes of files that may hold the weights once more."""

STALE = ("erasure.json", "audit.json", "AUDIT.md")
"""What an earlier erasure wrote about the checkpoint as it was then."""

MembersOf = Callable[[str, tuple[int, ...]], Bool[Tensor, "out in"] | None]
"""From the name and the shape of a tensor to the weights of it that become zero, None if none do."""


def weight_files(folder: Path) -> list[Path]:
    """Return the files that transformers reads the weights of a checkpoint from.

    Raises:
        ValueError: if there are none, or an index cannot be read or names what is not a file of the folder.

    Example:
        >>> from memloc_lens.models import EMBEDDED
        >>> [file.name for file in weight_files(EMBEDDED)]
        ['model.safetensors']
    """
    for name in SINGLE:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            return [folder / shard for shard in _shards(index)]
    raise ValueError(f"{folder} has no weights in transformers format: no {' and no '.join(SINGLE)}")


def _shards(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index} cannot be read as an index of weights: {error}") from error
    for name in names:
        if Path(name).name != name or not (index.parent / name).is_file():
            raise ValueError(f"{index} names {name!r}, which is not a file of the folder; download it whole")
    return names


def copied_files(folder: Path) -> tuple[list[Path], list[str]]:
    """Return the files of a checkpoint to copy, relative to it, and the names of what is left out.

    Left out are files that may hold the weights once more, in another format or of another time, hidden folders, and
    what an earlier erasure wrote about the checkpoint.

    Example:
        >>> from memloc_lens.models import EMBEDDED
        >>> copied, left_out = copied_files(EMBEDDED)
        >>> Path("tokenizer.json") in copied, left_out
        (True, [])
    """
    read = set(weight_files(folder))
    copied: list[Path] = []
    left_out: list[str] = []
    for at, folders, files in os.walk(folder):
        for name in list(folders):
            if name.startswith(".") or (Path(at) / name).is_symlink():
                folders.remove(name)
                left_out.append(f"{(Path(at) / name).relative_to(folder)}/")
        for file in (Path(at) / name for name in files):
            if file in read or not (file.suffix in OF_WEIGHTS or file.name in STALE):
                copied.append(file.relative_to(folder))
            else:
                left_out.append(str(file.relative_to(folder)))
    return sorted(copied), sorted(left_out)


def copy_file(source: Path, target: Path) -> None:
    """Copy the content of a file, and of a link what it points to, so that it can be written whatever its mode was."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def tensors_of(file: Path) -> Iterator[tuple[str, UInt8[Tensor, "..."]]]:
    """Yield the name of each tensor of a file of weights, and its bytes as a last dimension.

    Those of a safetensors file are read when they are looked at. Bytes tell two files apart whatever their numbers are.

    Example:
        >>> from memloc_lens.models import EMBEDDED
        >>> dict(tensors_of(EMBEDDED / "model.safetensors"))["transformer.h.0.mlp.c_proj.weight"].shape
        torch.Size([768, 192, 4])
    """
    if file.suffix == ".safetensors":
        yield from ((name, torch.from_numpy(content)) for name, content in _mapped(file, "c"))
    else:
        for name, tensor in _loaded(file).items():
            yield name, tensor.detach().contiguous().unsqueeze(-1).view(torch.uint8)


def zero(file: Path, members_of: MembersOf) -> int:
    """Set weights in a file to zero, in place; a file without any of them is not touched.

    Args:
        file: of weights.
        members_of: tells which.

    Returns:
        The number of weights that were set.
    """
    return (_zero_safetensors if file.suffix == ".safetensors" else _zero_pickled)(file, members_of)


def _zero_safetensors(file: Path, members_of: MembersOf) -> int:
    count = 0
    for name, content in _mapped(file, "r+"):
        members = members_of(name, content.shape[:-1])
        if members is not None and members.any():
            content[members.numpy()] = 0
            content.flush()
            count += int(members.sum())
    return count


def _zero_pickled(file: Path, members_of: MembersOf) -> int:
    state, count = _loaded(file), 0
    for name, tensor in state.items():
        members = members_of(name, tuple(tensor.shape))
        if members is not None and members.any():
            tensor.detach()[members] = 0
            count += int(members.sum())
    if count:
        torch.save(state, file)
    return count


def _mapped(file: Path, mode: Literal["c", "r+"]) -> Iterator[tuple[str, np.memmap]]:
    """Yield the name of each tensor of a safetensors file, and its bytes where they are on the disk.

    Raises:
        ValueError: if the file is not one of safetensors.
    """
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length > file.stat().st_size:
                raise ValueError("its header is longer than the file")
            header = json.loads(opened.read(length))
        for name, entry in header.items():
            if name != "__metadata__" and 0 not in entry["shape"]:
                begin, end = entry["data_offsets"]
                size = (end - begin) // math.prod(entry["shape"])
                yield name, np.memmap(file, np.uint8, mode, 8 + length + begin, (*entry["shape"], size))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read as safetensors: {error}") from error


def _loaded(file: Path) -> dict[str, Tensor]:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{file} cannot be read as weights: {error}") from error
