"""Write a checkpoint without some of its components: a copy of its own files, with their weights at zero.

Neurons lose their row of the MLP's output matrix, heads their rows of the attention's, single weights themselves. The
result computes what the model computes under `ablate`. Nothing is saved anew: numbers, shards, tokenizer and licence
stay as they came, byte for byte.

The folder is written under a hidden name beside its place, `config.json` last, compared with the ablated model, and
moved: whatever ends the process, there is no folder that loads and is not whole.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from memloc_lens.components import ComponentSet
from memloc_lens.erase.files import copied_files, copy_file, weight_files, zero
from memloc_lens.erase.outputs import OUTPUTS, Outputs, outputs_of
from memloc_lens.erase.verification import check_written
from memloc_lens.library_types import HookedModel
from memloc_lens.models import load_model

CONFIG = "config.json"
ERASURE = "erasure.json"


def write_checkpoint(
    source: str | Path | None,
    target: str | Path,
    components: ComponentSet,
    *,
    model: HookedModel | None = None,
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Write a copy of a model's checkpoint without some components, as a folder in transformers format.

    Args:
        source: as for `load_model`. The files of a folder are copied, of a model on the hub those in the cache; a GGUF
            file is unpacked in the precision of `model`.
        target: folder that does not exist yet.
        components: neurons, heads or single weights of the model.
        model: the source as `load_model` returns it. Default: it is loaded.
        about: what `erasure.json` in the folder says beside the components.

    Returns:
        The folder.

    Raises:
        ValueError: if the target exists, lies inside the source or cannot be written, the source is not a model, the
            components are another model's, or what was written does not compute what the ablated model computes.

    Example:
        >>> from memloc_lens.erase import write_checkpoint
        >>> neurons = Neurons.from_indices(model, [(1, 5), (3, 700)])
        >>> erased = load_model(write_checkpoint("embedded", "erased", neurons), device="cpu")
        >>> int((erased.W_out == 0).all(dim=-1).sum())
        2
    """
    from memloc_lens.models.sources import checkpoint_folder

    target = Path(target).expanduser()
    check_target(source, target)
    model = model or load_model(source)
    components.component.check_shape(model, components.shape)
    folder = checkpoint_folder(source)
    with _whole_folder(target) as part:
        if folder is None:
            left_out = []
            unpack(source, part, components, model.cfg.dtype)
        else:
            left_out = _copy(folder, part, components)
        told = {**(about or {}), **_described(components), "left_out": left_out}
        (part / ERASURE).write_text(json.dumps(told, indent=1) + "\n", "utf-8")
        if folder is not None:
            copy_file(folder / CONFIG, part / CONFIG)
        check_written(model, part, components)
    return target


def check_target(source: str | Path | None, target: Path) -> None:
    """Refuse a folder that a checkpoint cannot be written to, before any long work.

    Args:
        source: as for `load_model`; a model on the hub has been loaded before.
        target: that `check_free` does not refuse.

    Raises:
        ValueError: if it lies inside the source, its disk has too little space, or the source has no folder.
    """
    from memloc_lens.models.sources import checkpoint_folder

    check_free(target)
    folder = checkpoint_folder(source)
    if folder is None:
        return
    if target.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{target} is inside the model's own folder {folder}; write to a folder outside of it")
    needed, free = sum(file.stat().st_size for file in weight_files(folder)), shutil.disk_usage(target.parent).free
    if free < needed:
        raise ValueError(f"{target} needs {needed / 2**20:.0f} MiB and its disk has {free / 2**20:.0f} free")


def check_free(target: Path) -> None:
    """Refuse a folder that exists or cannot be made.

    Raises:
        ValueError: saying which.
    """
    if os.path.lexists(target):
        raise ValueError(f"{target} exists; name a folder that does not, or remove it")
    with _cannot_write(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent).cleanup()


@contextmanager
def _whole_folder(target: Path) -> Iterator[Path]:
    """Make a folder that appears at its place when the context closes, and not at all after an error."""
    part = _part_of(target)
    with _cannot_write(target):
        shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
        part.mkdir(parents=True)
        try:
            yield part
            for path in (*part.rglob("*"), part):
                _to_disk(path)
            part.rename(target)
            _to_disk(target.parent)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise


def _part_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.part")


def _to_disk(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


@contextmanager
def _cannot_write(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{target} cannot be written: {error.strerror or error}; name a folder on a disk that has room and that "
            "you may write to"
        ) from error


def _copy(folder: Path, part: Path, components: ComponentSet) -> list[str]:
    """Copy all files but the configuration, set the weights to zero, and return what was left out."""
    copied, left_out = copied_files(folder)
    for name in copied:
        if name != Path(CONFIG):
            copy_file(folder / name, part / name)
    for file in weight_files(folder):
        zero(part / file.name, partial(_members, outputs_of(folder), components))
    return left_out


def unpack(
    source: str | Path | None, folder: Path, components: ComponentSet | None = None, dtype: torch.dtype = torch.float32
) -> None:
    """Write the folder of a model that has none, as one in a GGUF file.

    Args:
        source: as for `load_model`.
        folder: that is written to.
        components: whose weights are set to zero in memory first.
        dtype: of the numbers.
    """
    from memloc_lens.models.sources import read_original

    original = read_original(source, None, dtype)
    outputs = OUTPUTS[type(original.model).__name__]
    with torch.no_grad():
        for name, weight in original.model.named_parameters():
            members = None if components is None else _members(outputs, components, name, tuple(weight.shape))
            if members is not None:
                weight[members] = 0
    _as_unquantized(original.model).save_pretrained(folder)
    if original.tokenizer is not None:
        original.tokenizer.save_pretrained(folder)


def _as_unquantized(model: Any) -> Any:
    """Return a model whose weights transformers has unpacked, and which it would not save for what they were."""
    model.hf_quantizer = None
    vars(model.config).pop("quantization_config", None)
    return model


def _members(
    outputs: Outputs, components: ComponentSet, name: str, shape: tuple[int, ...]
) -> Bool[Tensor, "out in"] | None:
    layer = outputs.layer_of(name, components.component)
    return None if layer is None or layer >= components.shape[0] else outputs.members(components, layer, shape)


def _described(components: ComponentSet) -> dict[str, Any]:
    """Return what a set is, with the indices of its members by layer."""
    return {
        "component": components.component.name,
        "count": len(components),
        "of": prod(components.shape),
        "layers": {str(layer): own for layer, own in enumerate(components.per_layer()) if own},
    }
