"""Compare two checkpoints in transformers format: which weights differ, and what only one of them recites.

    python -m memloc_lens.erase.compare original erased --data sequences.jsonl

Tensors are compared one after another, so that little memory is needed. A difference is called an erasure if weights of
output matrices alone differ, of the MLPs or of the attention, and all that differ are zero in the second checkpoint.
With sequences, each checkpoint is asked for them by greedy decoding: who recites what the other one does not?
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import tyro
from jaxtyping import UInt8
from rich.table import Table
from torch import Tensor

from memloc_lens.checks import check_number
from memloc_lens.components import HEADS, NEURONS
from memloc_lens.data import load_sequences
from memloc_lens.erase.checkpoint import unpack
from memloc_lens.erase.files import tensors_of, weight_files
from memloc_lens.erase.outputs import Outputs, outputs_of
from memloc_lens.generation import free_running
from memloc_lens.models import check_device, load_model
from memloc_lens.runs.command_line import parser, run_command
from memloc_lens.runs.quiet import may_be_quiet
from memloc_lens.runs.visible import plain, visible
from memloc_lens.tables.terminal import wide_console


@dataclass(frozen=True)
class Difference:
    """A tensor that is not the same in two checkpoints.

    Args:
        name: of the tensor.
        kind: "values" if values differ; "shape", also for another format of numbers; "missing" if the second
            checkpoint lacks it, "added" if the first does.
        weights: number of values that differ.
        rows: inputs of an output matrix (neurons, or dimensions of heads) of which values differ; of other tensors,
            rows.
        zero_rows: those of them that are all zero in the second checkpoint.
        is_output: whether it is an output matrix of an MLP or of attention.
        zeroed: whether every value that differs is zero in the second checkpoint.
    """

    name: str
    kind: str
    weights: int = 0
    rows: tuple[int, ...] = ()
    zero_rows: tuple[int, ...] = ()
    is_output: bool = False
    zeroed: bool = False


@dataclass(frozen=True)
class Comparison:
    """What two checkpoints differ in.

    Args:
        differences: of tensors, in the order of the first checkpoint.
        recited: ids of sequences that each of the two recites whole, by greedy decoding; None without sequences.
    """

    differences: list[Difference]
    recited: tuple[list[str], list[str]] | None = None

    @property
    def is_erasure(self) -> bool:
        """Whether output matrices alone differ, and all that differs in them is zero in the second checkpoint."""
        return bool(self.differences) and all(own.is_output and own.zeroed for own in self.differences)


def compare(first: str | Path, second: str | Path) -> list[Difference]:
    """Return the tensors in which two checkpoints differ.

    Args:
        first: what `load_model` reads. A GGUF file is unpacked, in float32, for as long as this takes.
        second: the same.

    Raises:
        ValueError: if a folder holds no weights, or a file cannot be read.

    Example:
        >>> from memloc_lens.erase import write_checkpoint
        >>> from memloc_lens.models import EMBEDDED
        >>> erased = write_checkpoint("embedded", "erased", Neurons.from_indices(model, [(1, 5)]), model=model)
        >>> [(own.name, own.weights, own.zero_rows) for own in compare(EMBEDDED, erased)]
        [('transformer.h.1.mlp.c_proj.weight', 192, (5,))]
    """
    with _as_folder(first) as one, _as_folder(second) as other:
        return _differences(one, other)


@contextmanager
def _as_folder(source: str | Path) -> Iterator[Path]:
    from memloc_lens.models.sources import checkpoint_folder

    folder = checkpoint_folder(source)
    if folder is not None:
        yield folder.expanduser()
        return
    with TemporaryDirectory() as temporary:
        unpack(source, Path(temporary))
        yield Path(temporary)


def _differences(first: Path, second: Path) -> list[Difference]:
    outputs, others = outputs_of(first), _Tensors(second)
    found, seen = [], set()
    for file in weight_files(first):
        for name, tensor in tensors_of(file):
            seen.add(name)
            if name not in others.files:
                found.append(Difference(name, "missing"))
            elif difference := _difference(name, tensor, others[name], outputs):
                found.append(difference)
    return found + [Difference(name, "added") for name in others.files if name not in seen]


class _Tensors:
    """The tensors of a checkpoint by name, wherever they are; one file is open at a time."""

    def __init__(self, folder: Path) -> None:
        self.files = {name: file for file in weight_files(folder) for name, _ in tensors_of(file)}
        self._open: tuple[Path, dict[str, Tensor]] | None = None

    def __getitem__(self, name: str) -> UInt8[Tensor, "..."]:
        file = self.files[name]
        if self._open is None or self._open[0] != file:
            self._open = file, dict(tensors_of(file))
        return self._open[1][name]


def _difference(name: str, one: Tensor, other: Tensor, outputs: Outputs) -> Difference | None:
    """Compare the bytes of a tensor in two checkpoints."""
    is_output = any(outputs.layer_of(name, kind) is not None for kind in (NEURONS, HEADS))
    if one.shape != other.shape:
        return Difference(name, "shape", is_output=is_output)
    differs = (one != other).any(dim=-1)
    if not differs.any():
        return None
    is_zero = (other == 0).all(dim=-1)
    if differs.ndim < 2:
        differs, is_zero = differs.view(1, -1), is_zero.view(1, -1)
    zeroed = bool(is_zero[differs].all())
    count = int(differs.sum())
    if is_output and not outputs.by_row:
        differs, is_zero = differs.T, is_zero.T
    rows = differs.flatten(1).any(dim=1)
    zero_rows = rows & is_zero.flatten(1).all(dim=1)
    return Difference(name, "values", count, _indices(rows), _indices(zero_rows), is_output, zeroed)


def _indices(members: Tensor) -> tuple[int, ...]:
    return tuple(members.nonzero().flatten().tolist())


def recited_by(
    folder: str | Path, data: str | Path | None, limit: int = 0, device: str | None = None, n_devices: int = 1
) -> list[str]:
    """Return the ids of the sequences that a checkpoint recites whole, by greedy decoding from their prompts.

    Args:
        folder: as for `load_model`.
        data: sequences, as for `load_sequences`.
        limit: number of sequences, the first; 0 takes all.
        device: of the model.
        n_devices: number of GPUs that share its layers.

    Example:
        >>> recited_by("embedded", None, limit=2, device="cpu")
        ['passage-011', 'passage-012']
    """
    model = load_model(folder, device=device, n_devices=n_devices)
    sequences = load_sequences(model, data)[: limit or None]
    written = free_running(model, sequences)
    pairs = zip(sequences, written, strict=True)
    return [sequence.id for sequence, suffix in pairs if torch.equal(suffix, sequence.suffix.cpu())]


@dataclass(frozen=True)
class CompareSettings:
    """What to compare.

    Args:
        first: The first checkpoint, such as the original: a folder, or a name as for the other commands.
        second: The second one.
        data: Sequences to ask both for: JSON lines with "all" and "prompt_len", or another format that is read.
        limit: Number of sequences, the first of the data; 0 takes all.
        device: Device of the models. Default: CUDA if there is one, else the CPU.
        n_devices: Number of GPUs that share the layers of a model, from the device on.
        quiet: Show no progress bars.
    """

    first: tyro.conf.Positional[str]
    second: tyro.conf.Positional[str]
    data: Path | None = None
    limit: int = 0
    device: str | None = None
    n_devices: int = 1
    quiet: bool = False

    def __post_init__(self) -> None:
        check_device(self.device, self.n_devices)
        check_number("limit", self.limit, least=0, whole=True)


def main() -> None:
    """Run the command line: ``python -m memloc_lens.erase.compare --help``."""
    run_command(parser(CompareSettings, "python -m memloc_lens.erase.compare", __doc__), run, show)


@may_be_quiet
def run(settings: CompareSettings) -> Comparison:
    """Compare two checkpoints.

    Raises:
        ValueError: if a folder is not a checkpoint, or the sequences cannot be read.
    """
    differences = compare(settings.first, settings.second)
    if settings.data is None:
        return Comparison(differences)
    ask = partial(
        recited_by,
        data=settings.data,
        limit=settings.limit,
        device=settings.device,
        n_devices=settings.n_devices,
    )
    return Comparison(differences, (ask(settings.first), ask(settings.second)))


def show(settings: CompareSettings, comparison: Comparison) -> None:
    """Print the tensors that differ, what the pattern is, and who recites what."""
    console = wide_console()
    if comparison.differences:
        table = Table(title="tensors that differ", title_justify="left")
        table.add_column("name")
        for heading in ("difference", "weights", "rows", "rows all zero in the second"):
            table.add_column(heading, justify="right")
        for own in comparison.differences:
            told = "zero in the second" if own.zeroed else own.kind
            table.add_row(plain(own.name), told, *map(str, (own.weights, len(own.rows), len(own.zero_rows))))
        console.print(table)
    for line in _sentences(comparison):
        console.print(plain(line), highlight=False)


def _sentences(comparison: Comparison) -> Iterator[str]:
    if not comparison.differences:
        yield "the weights are the same, bit by bit"
    elif comparison.is_erasure:
        yield "an erasure: output matrices alone differ, and all that differs is zero in the second checkpoint"
    else:
        yield "not an erasure: more differs than output weights that are zero in the second checkpoint"
    if comparison.recited is None:
        return
    first, second = comparison.recited
    for which, own, other in (("first", first, second), ("second", second, first)):
        alone = [id for id in own if id not in other]
        yield f"the {which} recites {len(own)}; alone: {', '.join(map(visible, alone)) or 'none'}"


if __name__ == "__main__":
    main()
