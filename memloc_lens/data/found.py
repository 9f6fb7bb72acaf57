"""What `find` is told to search for, and what it finds."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, get_args

import torch
import tyro

from memloc_lens.checks import check_choice, check_number
from memloc_lens.library_types import HookedModel
from memloc_lens.models import EMBEDDED, Backend, check_backend, check_device, load_model
from memloc_lens.runs.parallel import Parallel
from memloc_lens.runs.quiet import may_be_quiet
from memloc_lens.runs.settings import Precision

Split = Literal["guessable", "dev", "test"]

Counts = dict[str, int]
"""The number of windows or sequences that every step left, in the order of the steps."""


@dataclass(frozen=True)
class FindSettings:
    """What to search, and what counts as memorized.

    Args:
        corpus: Files, folders of files, or owner/name:split of data sets on the hub. Files hold plain text, rows with a
            text or "tokens" (JSON lines, CSV, Parquet and others), or token ids (.pt, .npy, .npz, .csv).
        model: Model: "embedded", "smollm2-135m", a folder in transformers format, a .gguf file or a name on the hub.
        out: Folder of the run and of its result, sequences.jsonl. An interrupted run resumes when you repeat the
            command.
        names: Names of the files to read in folders, with wildcards.
        prompt: Number of tokens in the prompt.
        suffix: Number of tokens in the suffix.
        stride: Number of tokens from the start of a window to the start of the next; 0 takes the length of a window,
            so that windows do not overlap.
        limit: Maximum number of different windows to search; 0 searches all.
        min_accuracy: Minimum share (0 to 1) of the suffix that the model predicts, teacher-forced; the paper's is 0.9.
        max_distance: Maximum Levenshtein distance of the generated suffix from the true one, in characters, or in
            tokens for a model without a tokenizer; the paper's is 20. A negative number sets no limit.
        min_distinct: Minimum number of different tokens in the suffix, both the true and the generated one.
        near_duplicate: Jaccard index of 5-grams above which two sequences are near-duplicates.
        dev: Number of sequences to set aside for choosing settings, drawn at random.
        seed: Seed of that draw and of the shuffled prompts.
        batch: Maximum number of windows at a time.
        device: Device of the model. Default: CUDA if there is one, else the CPU.
        n_devices: Number of GPUs that share the layers of the model, from the device on.
        dtype: Precision of weights and computation.
        backend: What TransformerLens makes of the model: "hooked" for a HookedTransformer, or "bridge" for a
            TransformerBridge, which is slower and knows more architectures. Default: hooked where TransformerLens has
            it, before version 4.
        bos: Put a beginning-of-sequence token before every window; `prompt` does not count it. Default: what the
            model's tokenizer is configured to do.
        quiet: Show no progress bars, neither of the run nor of the libraries.
        parallel: Who does the work.
    """

    corpus: tuple[str, ...]
    model: str = EMBEDDED.name
    out: Path = Path("runs/found")
    names: tuple[str, ...] = ("*",)
    prompt: int = 32
    suffix: int = 48
    stride: int = 0
    limit: int = 0
    min_accuracy: float = 0.9
    max_distance: int = 20
    min_distinct: int = 16
    near_duplicate: float = 0.05
    dev: int = 5
    seed: int = 0
    batch: int = 32
    device: str | None = None
    n_devices: int = 1
    dtype: Precision = "float32"
    backend: Backend | None = None
    bos: bool | None = None
    quiet: bool = False
    parallel: Annotated[Parallel, tyro.conf.arg(name="")] = field(default_factory=Parallel)

    def __post_init__(self) -> None:
        if not self.corpus:
            raise ValueError("no corpus was given; name files, folders, or data sets on the hub")
        if not self.names:
            raise ValueError('names is empty; give "*" to read every file in folders')
        for name in ("prompt", "suffix", "batch"):
            check_number(name, getattr(self, name), least=1, whole=True)
        for name in ("stride", "limit", "min_distinct", "dev"):
            check_number(name, getattr(self, name), least=0, whole=True)
        for name in ("max_distance", "seed"):
            check_number(name, getattr(self, name), whole=True)
        for name in ("min_accuracy", "near_duplicate"):
            check_number(name, getattr(self, name), least=0, most=1)
        if self.min_distinct > self.suffix:
            raise ValueError(
                f"min_distinct is {self.min_distinct}, and the suffix has only {self.suffix} tokens; lower it"
            )
        check_device(self.device, self.n_devices)
        self.parallel.check_gpus(self.n_devices)
        check_backend(self.backend)
        check_choice("dtype", self.dtype, get_args(Precision))

    @property
    def length(self) -> int:
        """Number of tokens in a window."""
        return self.prompt + self.suffix

    @may_be_quiet
    def load_model(self) -> HookedModel:
        """Load the model of the run."""
        return load_model(
            self.model,
            device=self.device,
            n_devices=self.n_devices,
            dtype=getattr(torch, self.dtype),
            backend=self.backend,
        )

    def as_json(self) -> dict[str, Any]:
        """Return the settings as JSON has them."""
        return json.loads(json.dumps(asdict(self), default=str))


class Measured(TypedDict, total=False):
    """What the steps after the scan find out about a window.

    Args:
        distance: of the greedy suffix from the true one, in characters or tokens.
        distinct: number of different tokens in the greedy suffix.
        shuffled_distance: the distance if the tokens of the prompt are shuffled.
        foreign_distance: the distance from the prompt of another window.
        guessable: why the suffix can be guessed; empty if it is memorized.
        split: of the data set.
    """

    distance: int
    distinct: int
    shuffled_distance: int
    foreign_distance: int
    guessable: list[str]
    split: Split


class FoundWindow(Measured):
    """A window that the model predicts.

    Args:
        tokens: ids of prompt and suffix.
        source: file of the document, and its line or row.
        start: index in the document of the first token.
        category: subjects of the document.
        accuracy: of the suffix, teacher-forced, in points.
    """

    tokens: list[int]
    source: str
    start: int
    category: list[str]
    accuracy: float


class FoundSequence(FoundWindow, total=False):
    """A line of `sequences.jsonl`: the sequence, its source, and every number that decided its split."""

    id: str
    prompt: str
    all: str
    prompt_len: int


class Report(TypedDict):
    """`report.json`: the settings, the unit of distances, and how many windows or sequences every step left."""

    settings: dict[str, Any]
    unit: Literal["characters", "tokens"]
    counts: Counts
