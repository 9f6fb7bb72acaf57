"""Settings that DEL and INJ share, and their checks."""

import hashlib
import shutil
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

import torch
import tyro

from memloc_lens.bridge import is_bridge
from memloc_lens.checks import check_choice, check_number
from memloc_lens.components import ComponentName, component_of
from memloc_lens.devices import devices_of
from memloc_lens.library_types import HookedModel
from memloc_lens.memory import memory_budget, parse_memory
from memloc_lens.models import EMBEDDED, Backend, check_backend, check_device, load_model
from memloc_lens.runs.fingerprint import fingerprint
from memloc_lens.runs.folder import PLACES, RunFolder
from memloc_lens.runs.methods import AnyLocalizer, Method, configured, default_methods, name_of, resolve, settings_of
from memloc_lens.runs.parallel import Parallel
from memloc_lens.runs.records import Problem
from memloc_lens.runs.trackers import check_tracker
from memloc_lens.sequence import MemorizedSequence, begins_with_bos

Precision = Literal["float32", "bfloat16", "float16", "float64"]

NOT_IDENTITY = (
    *("out", "config", "n_devices", "backend", "memory", "methods", "limit", "context", "context_sequences"),
    *("until", "until_limit", "until_samples", "prompts", "quiet", "tracker", "parallel"),
)
"""Settings that may differ between two runs in one folder; what they decide of records is recorded in other ways."""


@dataclass(frozen=True)
class RunSettings:
    """Settings of every benchmark.

    Args:
        model: Model: "embedded", "smollm2-135m", a folder in transformers format, a .gguf file or a name on the hub.
        data: Sequences.
        component: Kind of component to locate: MLP neurons, attention heads, or single weights of W_out.
        ratios: Shares of the components.
        limit: Number of sequences.
        out: Folder of the run. An interrupted run resumes when you repeat the command.
        config: TOML file with settings under the names given here, and published figures to print beside the results.
            The command line overrides it.
        device: Device of the model. Default: CUDA if there is one, else the CPU.
        n_devices: Number of GPUs that share the layers of the model, from the device on.
        dtype: Precision of weights and computation.
        backend: What TransformerLens makes of the model: "hooked" for a HookedTransformer, or "bridge" for a
            TransformerBridge, which is slower and knows more architectures. Default: hooked where TransformerLens has
            it, before version 4.
        memory: Maximum memory of the process on the device, or on each of several, such as "8GiB". Default: half of
            the free memory.
        seed: Seed of all draws.
        bos: Put a beginning-of-sequence token before every text, as one more token of the prompt. Default: what the
            model's tokenizer is configured to do.
        context: Text that some methods read besides their targets, to spare what all text needs: a text file, or JSON
            lines with "text". Default: held-out text of the embedded model; for other models none.
        context_sequences: Number of other memorized sequences that they read: those of the split "dev", then of the
            others the last that are neither targets nor measured. Default: 96 with the embedded model's sequences,
            or as many as there are; 0 with other data.
        quiet: Show no progress bars, neither of the run nor of the libraries.
        tracker: Also log every record as it is written: wandb or tensorboard.
        parallel: Who does the work.
        methods: Localizers to compare, by name or with their settings. Default: all that can score the component.
    """

    presets: ClassVar[Mapping[str, Mapping[str, AnyLocalizer]]] = {}
    """For each kind of component, the benchmark's own settings of some methods."""

    model: str = EMBEDDED.name
    data: str | Path | None = None
    component: ComponentName = "neuron"
    ratios: tuple[float, ...] = ()
    limit: int = 0
    out: Path = Path("runs")
    config: Path | None = None
    device: str | None = None
    n_devices: int = 1
    dtype: Precision = "float32"
    backend: Backend | None = None
    memory: str | None = None
    seed: int = 0
    bos: bool | None = None
    context: Path | None = None
    context_sequences: int | None = None
    quiet: bool = False
    tracker: str | None = None
    parallel: Annotated[Parallel, tyro.conf.arg(name="")] = field(default_factory=Parallel)
    methods: Annotated[tuple[Method, ...], tyro.conf.Suppress] = ()

    def __post_init__(self) -> None:
        component_of(self.component)
        check_choice("dtype", self.dtype, get_args(Precision))
        check_device(self.device, self.n_devices)
        self.parallel.check_gpus(self.n_devices)
        check_backend(self.backend)
        check_number("limit", self.limit, least=0, whole=True)
        check_number("seed", self.seed, whole=True)
        if self.context_sequences is not None:
            check_number("context_sequences", self.context_sequences, least=0, whole=True)
        if self.tracker is not None:
            check_tracker(self.tracker)
        for ratio in self.ratios:
            check_number("the ratio", ratio, above=0, most=1)
        if len(set(self.ratios)) < len(self.ratios):
            raise ValueError(f"ratios are {self.ratios}; name each once")
        if self.memory is not None:
            parse_memory(self.memory)
        names = [name_of(localizer) for localizer in self.localizers()]
        if len(set(names)) < len(names):
            raise ValueError(f"methods are {' '.join(names)}; name each once")

    def localizers(self) -> list[AnyLocalizer]:
        """Return the methods of the run with their settings."""
        presets = self.presets.get(self.component, {})
        methods = self.methods or default_methods(self.component, presets)
        return [configured(resolve(method, presets), self.component) for method in methods]

    def load_model(self) -> HookedModel:
        """Load the model of the run."""
        return load_model(
            self.model,
            device=self.device,
            n_devices=self.n_devices,
            dtype=getattr(torch, self.dtype),
            backend=self.backend,
        )

    def memory_budget(self, model: HookedModel) -> AbstractContextManager[None]:
        """Bound the memory of the run, once the model is loaded."""
        return memory_budget(self.memory, devices_of(model)) if self.memory else nullcontext()


def open_folder(
    settings: RunSettings,
    model: HookedModel,
    sequences: list[MemorizedSequence],
    others: list[Any],
    records: int,
    problem: Problem | None = None,
    further: Mapping[str, Any] | None = None,
) -> RunFolder:
    """Open the folder of a run, which is identified by its settings, its methods', the weights, and its data.

    Args:
        settings: of the run.
        model: of the run.
        sequences: that the records are about; a later run may have more.
        others: other content that decides the value of every record.
        records: how many there will be at most with scores of their own.
        problem: tells what is wrong with a record that was read, if anything.
        further: parts of the configuration beside the settings.

    Raises:
        ValueError: if weights are NaN or infinite, the folder is in use or belongs to another configuration, its disk
            has too little free space, or the tracker cannot be opened.
    """
    own = {name: value for name, value in vars(settings).items() if name not in NOT_IDENTITY}
    config = {
        **own,
        "device": str(model.cfg.device),
        **({"backend": "bridge"} if is_bridge(model) else {}),
        "weights": fingerprint(model),
        "begins_with_bos": begins_with_bos(model, settings.bos),
        "data_sha256": hashlib.sha256(repr(others).encode()).hexdigest(),
        "sequences": identities(sequences),
        "methods": {name_of(localizer): settings_of(localizer) for localizer in settings.localizers()},
        **(further or {}),
    }
    folder = RunFolder(settings.out, config, free=PLACES, problem=problem)
    try:
        _check_space(settings, model, records)
        if settings.tracker:
            folder.track(settings.tracker)
    except BaseException:
        folder.close()
        raise
    return folder


def device_elsewhere(config: Mapping[str, Any]) -> str:
    """Return the device of a worker in another process, given the configuration of the run: of the same kind.

    Which GPUs a worker sees is not up to it, so that `cuda:1` may be another one there, or none.

    Example:
        >>> device_elsewhere({"device": "cuda:1"})
        'cuda'
    """
    return torch.device(config["device"]).type


def check_weights(model: HookedModel, config: Mapping[str, Any]) -> None:
    """Refuse a model that a worker has loaded and that is not the one of the run.

    Raises:
        ValueError: naming the host.
    """
    if fingerprint(model) != config["weights"]:
        raise ValueError(
            f"{model.cfg.model_name} has other weights on {socket.gethostname()} than where the run began; put the "
            "same files at the same path on every node"
        )


def _check_space(settings: RunSettings, model: HookedModel, records: int) -> None:
    needed = records * (4 * prod(component_of(settings.component).shape(model)) + 2000)
    free = shutil.disk_usage(settings.out).free
    if free < needed:
        raise ValueError(
            f"the run needs about {needed / 2**20:.0f} MiB and the disk of {settings.out} has {free / 2**20:.0f} free; "
            "choose another --out"
        )


def identities(sequences: Sequence[MemorizedSequence]) -> list[list[str]]:
    """Return the id of each sequence with a hash of what it is."""
    repeated = [id for id, count in Counter(sequence.id for sequence in sequences).items() if count > 1]
    if repeated:
        raise ValueError(f"{repeated[0]!r} is the id of more than one sequence; every record needs its own")
    return [identity(sequence) for sequence in sequences]


def identity(sequence: MemorizedSequence) -> list[str]:
    """Return the id of a sequence with a hash of what it is: its tokens, prompt length and category.

    Example:
        >>> identity(MemorizedSequence([5, 6, 7], prompt_len=1, id="a"))
        ['a', '...']
    """
    content = repr((sequence.tokens.tolist(), sequence.prompt_len, list(sequence.category)))
    return [sequence.id, hashlib.sha256(content.encode()).hexdigest()[:16]]


def batches_of(extents: Sequence[int], size: int) -> list[tuple[int, int]]:
    """Return the first index of each batch of sequences and the index after its last.

    No batch reaches over the end of an earlier run in the folder. So one that is extended keeps the batches it had, and
    a resumed run has those of the run that was interrupted: sums over batches of other sizes are rounded differently.

    Example:
        >>> batches_of([4, 9], size=3)
        [(0, 3), (3, 4), (4, 7), (7, 9)]
    """
    return [
        (start, min(start + size, stop))
        for begin, stop in pairwise([0, *extents])
        for start in range(begin, stop, size)
    ]
