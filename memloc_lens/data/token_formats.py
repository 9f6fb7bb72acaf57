"""Read arrays of token ids [row, pos], as torch and numpy write them, without running code in the files.

Files are mapped into memory, and what they declare is compared with what they hold before anything is made of it.
"""

import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Integer
from torch import Tensor

from memloc_lens.data.opening import LARGEST, parsing
from memloc_lens.data.row import Row, file_row

DEV_ROWS = 5
"""Rows at the start of a published token tensor that are the split `dev`."""

INTEGERS = (
    torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32, torch.int64,
)  # fmt: skip


def token_tensor(path: Path) -> Iterator[Row]:
    """Read a tensor of whole numbers that `torch.save` wrote."""
    with parsing(path, "a tensor that torch.save wrote"):
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=_can_be_mapped(path))
    tokens = _checked(path, value)
    for number in range(1, len(tokens) + 1):
        row = {"tokens": tokens[number - 1].tolist(), "split": published_split(number)}
        yield file_row(path, "row", number, row)


def token_array(path: Path) -> Iterator[Row]:
    """Read an array of whole numbers that `numpy.save` wrote, or both arrays of a prefix and suffix pair."""
    prefix_file, suffix_file = pair_of(path)
    tokens = _mapped(prefix_file)
    if prefix_file == suffix_file:
        return _rows(path, tokens)
    return _pair_rows(prefix_file, f"{prefix_file}", tokens, f"{suffix_file}", _mapped(suffix_file))


def token_arrays(path: Path) -> Iterator[Row]:
    """Read an archive that `numpy.savez` wrote with an array `tokens`, or the arrays `prefix` and `suffix`."""
    format = "an archive that numpy.savez wrote"
    with parsing(path, format), zipfile.ZipFile(path) as archive:
        sizes = {entry.filename.removesuffix(".npy"): entry.file_size for entry in archive.infolist()}
    names = [name for name in ("tokens", "prefix", "suffix") if name in sizes]
    if names not in (["tokens"], ["prefix", "suffix"]):
        raise ValueError(f"{path} holds {', '.join(sizes) or 'nothing'}; it must hold tokens, or prefix and suffix")
    if sum(sizes[name] for name in names) > LARGEST:
        raise ValueError(
            f"{path} holds more than {LARGEST // 2**20} MiB of token ids; save them as .npy, which is not read at once"
        )
    with parsing(path, format), np.load(path, allow_pickle=False) as arrays:
        tensors = {name: torch.from_numpy(arrays[name]) for name in names}
    first, *others = (_checked(f"{path}, {name}", tensor) for name, tensor in tensors.items())
    if not others:
        return _rows(path, first)
    return _pair_rows(path, f"{path}, prefix", first, f"{path}, suffix", others[0])


def published_split(number: int) -> str:
    """Return the split of a row of a published token tensor."""
    return "dev" if number <= DEV_ROWS else "test"


def pair_of(path: Path) -> tuple[Path, Path]:
    """Return the files with the prefixes and the suffixes; they are the same if the file is not half of a pair.

    Example:
        >>> [file.name for file in pair_of(Path("train_suffix.npy"))]
        ['train_prefix.npy', 'train_suffix.npy']
    """
    for half in ("_prefix.npy", "_suffix.npy"):
        if path.name.endswith(half):
            name = path.name.removesuffix(half)
            return path.with_name(f"{name}_prefix.npy"), path.with_name(f"{name}_suffix.npy")
    return path, path


def _can_be_mapped(path: Path) -> bool:
    """Whether the file is an archive, as torch has written since 1.6.

    Raises:
        ValueError: if it is compressed: torch never compresses, and a small file could unpack to any size.
    """
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("it is compressed")
    return True


def _mapped(path: Path) -> Integer[Tensor, "row pos"]:
    with parsing(path, "an array of numbers that numpy.save wrote"):
        array = np.load(path, mmap_mode="c", allow_pickle=False)
        tensor = torch.from_numpy(array)
    return _checked(path, tensor)


def _checked(source: Path | str, value: object) -> Integer[Tensor, "row pos"]:
    """Return what a file holds if it is token ids [row, pos], every one of which is there."""
    if not isinstance(value, Tensor):
        found = type(value).__name__
    elif value.layout is not torch.strided or value.is_meta or value.is_quantized:
        kind = "meta" if value.is_meta else "quantized" if value.is_quantized else "sparse"
        found = f"a {kind} tensor {list(value.shape)}"
    elif value.ndim != 2 or value.dtype not in INTEGERS:
        found = f"a tensor {value.dtype} {list(value.shape)}"
    elif value.numel() == 0:
        found = f"an empty tensor {list(value.shape)}"
    elif value.numel() * value.element_size() > (there := _bytes_of(source, value)):
        found = f"a tensor {list(value.shape)} of {there} bytes, expanded"
    else:
        return value
    raise ValueError(f"{source} holds {found}; a tensor of whole numbers [row, pos] was expected")


def _bytes_of(source: Path | str, tensor: Tensor) -> int:
    """Return how many bytes a tensor has in memory, or in its file if these are fewer: torch pads what is missing."""
    stored = tensor.untyped_storage().nbytes()
    return min(stored, source.stat().st_size) if isinstance(source, Path) else stored


def _rows(path: Path, tokens: Integer[Tensor, "row pos"]) -> Iterator[Row]:
    for number in range(1, len(tokens) + 1):
        yield file_row(path, "row", number, {"tokens": tokens[number - 1].tolist()})


def _pair_rows(
    path: Path,
    prefix_name: str,
    prefixes: Integer[Tensor, "row prefix"],
    suffix_name: str,
    suffixes: Integer[Tensor, "suffix_row suffix"],
) -> Iterator[Row]:
    if len(prefixes) != len(suffixes):
        raise ValueError(
            f"{prefix_name} has {len(prefixes)} rows and {suffix_name} has {len(suffixes)}; they must have the same"
        )
    for number in range(1, len(prefixes) + 1):
        tokens = [*prefixes[number - 1].tolist(), *suffixes[number - 1].tolist()]
        yield file_row(path, "row", number, {"tokens": tokens, "prompt_len": prefixes.shape[1]})
