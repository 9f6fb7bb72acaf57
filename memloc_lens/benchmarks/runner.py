"""What the benchmarks share: settings and their checks, configuration files, and the command line."""

import argparse
import hashlib
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
import tyro
from transformer_lens import HookedTransformer

from memloc_lens.benchmarks.records import RunFolder
from memloc_lens.localizers import (
    LOCALIZERS,
    Activations,
    HardConcrete,
    IntegratedGradients,
    Random,
    Slimming,
    ZeroOut,
)
from memloc_lens.memory import memory_budget, parse_memory
from memloc_lens.models import EMBEDDED, load_model
from memloc_lens.report.table import print_table
from memloc_lens.sequence import MemorizedSequence

Method = Literal[
    "hard-concrete", "slimming", "zero-out", "integrated-gradients", "activations", "weight-norm", "random"
]


@dataclass(frozen=True)
class RunSettings:
    """Settings of every benchmark.

    Args:
        model: The model: "embedded", a folder in transformers format, a .gguf file or a name on the hub.
        data: The sequences.
        methods: Localizers to compare.
        ratios: Shares of the neurons.
        limit: Sequences to take.
        out: Folder of the run. A run that was stopped goes on where it was when started again with the same
            settings.
        config: A TOML file with settings by the names given here, and published figures to print beside the run's
            own; what the command line says goes before it.
        device: Left out: CUDA where there is one, else the CPU.
        dtype: Precision of weights and computation.
        memory: Keep all that the process takes on the device under this, as "8GiB"; left out: half of what is free.
    """

    model: str = EMBEDDED.name
    data: str | Path | None = None
    methods: tuple[Method, ...] = get_args(Method)
    ratios: tuple[float, ...] = ()
    limit: int = 0
    out: Path = Path("runs")
    config: Path | None = None
    device: str | None = None
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    memory: str | None = None
    seed: int = 0
    hard_concrete: HardConcrete = field(default_factory=HardConcrete)
    slimming: Slimming = field(default_factory=Slimming)
    zero_out: ZeroOut = field(default_factory=ZeroOut)
    integrated_gradients: IntegratedGradients = field(default_factory=IntegratedGradients)
    activations: Activations = field(default_factory=Activations)
    random: Random = field(default_factory=Random)

    def localizer(self, method: str) -> Any:
        """The localizer of a method, with its settings of this run."""
        return getattr(self, method.replace("-", "_"), None) or LOCALIZERS[method]()

    def load_model(self) -> HookedTransformer:
        """The model, on the device and in the precision of this run."""
        return load_model(self.model, device=self.device, dtype=getattr(torch, self.dtype))

    def memory_budget(self, model: HookedTransformer) -> AbstractContextManager[None]:
        """What the run keeps to, once the model is loaded."""
        return memory_budget(self.memory, model.cfg.device) if self.memory else nullcontext()


S = TypeVar("S", bound=RunSettings)


def check(settings: RunSettings, counts: Iterable[str] = ("limit",)) -> None:
    """Raise a `ValueError` for settings that are wrong whatever the model and the data."""
    for method in settings.methods:
        if method not in LOCALIZERS:
            raise ValueError(f"no method is called {method!r}; there are {', '.join(LOCALIZERS)}")
    if not settings.methods or len(set(settings.methods)) < len(settings.methods):
        raise ValueError(f"methods are {' '.join(settings.methods) or 'none'}; name each wanted one once")
    if len(set(settings.ratios)) < len(settings.ratios):
        raise ValueError(f"ratios are {settings.ratios}; name each once")
    if settings.memory is not None:
        parse_memory(settings.memory)
    for name in counts:
        if getattr(settings, name) < 0:
            raise ValueError(f"{name} is {getattr(settings, name)}; it must be 0 (all) or more")


def check_ids(sequences: list[MemorizedSequence], source: object) -> None:
    """Raise a `ValueError` if two sequences share an id."""
    if len({sequence.id for sequence in sequences}) < len(sequences):
        raise ValueError(f"two sequences of {source} share an id; every record needs its own")


def open_folder(
    settings: RunSettings, model: HookedTransformer, sequences: list[MemorizedSequence], text: list[Any], records: int
) -> RunFolder:
    """The folder of a run, which belongs to all that decides its records: the settings, and the content of the data.

    Args:
        settings: of the run; its place, the file they came from and the memory it may take do not matter.
        model: of the run.
        sequences: that the records are about.
        text: other content that decides records.
        records: how many there will be, each with scores of its own at the most.

    Raises:
        ValueError: if the folder belongs to another configuration, or its disk has too little space left.
    """
    config = {name: value for name, value in asdict(settings).items() if name not in ("out", "config", "memory")}
    config = {name: str(value) if isinstance(value, Path) else value for name, value in config.items()}
    config["device"] = str(model.cfg.device)
    content = [(sequence.id, sequence.tokens.tolist(), sequence.prompt_len) for sequence in sequences]
    config["data_sha256"] = hashlib.sha256(repr((content, text)).encode()).hexdigest()
    config["memloc_lens"] = version("memloc-lens")
    folder = RunFolder(settings.out, config)
    needed = records * (4 * model.cfg.n_layers * model.cfg.d_mlp + 2000)
    free = shutil.disk_usage(settings.out).free
    if free < needed:
        raise ValueError(
            f"the run needs about {needed / 2**20:.0f} MiB and the disk of {settings.out} has {free / 2**20:.0f} free"
        )
    return folder


def published(settings: RunSettings) -> dict[str, Any]:
    """`{method: {ratio: {metric: figure}}}` from the configuration file, empty without one."""
    return _read_toml(settings.config).get("published", {}) if settings.config else {}


def command_line(settings_class: type[S], door: str, about: str | None, run: Callable[[S], dict[str, Any]]) -> None:
    """Read the settings, run, and print the table; an error is one line, and Ctrl-C says how to go on.

    Args:
        settings_class: whose fields are the options.
        door: the module that `python -m` was given.
        about: shown by ``--help``.
        run: the benchmark, from settings to summary.
    """
    try:
        settings = parse(settings_class, sys.argv[1:], door, about)
        summary = run(settings)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped; what was recorded is kept: the same command goes on from there")
    print_table(summary)
    print(f"\nrecords, scores and summary: {settings.out}")


def parse(settings_class: type[S], arguments: list[str], door: str, about: str | None = None) -> S:
    """The settings of a command line; those of the file that ``--config`` names come first, so that others win.

    Raises:
        ValueError: if the file cannot be read.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    config = first.parse_known_args(arguments)[0].config
    table = _read_toml(config) if config else {}
    table.pop("published", None)
    return tyro.cli(settings_class, prog=f"python -m {door}", description=about, args=[*_options(table), *arguments])


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"the configuration {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"the configuration {path} is not TOML: {error}") from error


def _options(table: dict[str, Any], prefix: str = "--") -> Iterator[str]:
    """A table of settings as the options that say the same."""
    for name, value in table.items():
        option = name.replace("_", "-")
        if isinstance(value, dict):
            yield from _options(value, f"{prefix}{option}.")
        elif isinstance(value, bool):
            yield f"{prefix}{'' if value else 'no-'}{option}"
        else:
            yield prefix + option
            yield from map(str, value if isinstance(value, list) else [value])
