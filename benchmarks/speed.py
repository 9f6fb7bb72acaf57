"""Measure how fast the localizers are against their formulas, on the same weights, sequences and machine, in one run.

    python benchmarks/speed.py --out benchmarks/results/speed-cpu.json
    python benchmarks/speed.py --shape pythia-6.9b --device cuda --dtype bfloat16 --no-naive

1. The formulas (`formulas.py`) run on a plain `HookedTransformer`, the localizers on one as `load_model` returns it.
   Both have the same random weights, on which speed does not depend.
2. The formulas run once more on the localizers' model with the localizers' matrix products. This tells work saved from
   faster products.
3. Localizers run three times, of which the median counts; formulas run once. Both run once more to count the FLOPs of
   their matrix products.

Every measurement runs in its own process, so that its peak memory is its own. Results are written after every stage.
"""

import json
import multiprocessing
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformer_lens import HookedTransformer, HookedTransformerConfig

from memloc_lens import (
    HardConcrete,
    Localizer,
    MemorizedSequence,
    Slimming,
    ZeroOut,
    memory_budget,
    top_neurons,
)
from memloc_lens.checks import check_choice, check_number
from memloc_lens.memory import parse_memory
from memloc_lens.models import check_device, prepare
from memloc_lens.products import fast_products
from memloc_lens.runs.command_line import parser, run_command

sys.path.insert(0, str(Path(__file__).parent))
import formulas

METHODS = {localizer.name: localizer for localizer in formulas.FORMULAS}
"""The localizers that can be measured, by name: those with a formula."""


@dataclass(frozen=True)
class Shape:
    """The shape of a model and of the sequences that it reads."""

    layers: int = 4
    width: int = 256
    heads: int = 4
    neurons: int = 1024
    vocabulary: int = 5000
    rotary: bool = False
    tokens: int = 80
    prompt: int = 32


SHAPES = {
    "small": Shape(),
    "gpt2-xl": Shape(48, 1600, 25, 6400, 50257),
    "pythia-6.9b": Shape(32, 4096, 32, 16384, 50432, rotary=True),
}


@dataclass(frozen=True)
class SpeedSettings:
    """What to measure.

    Args:
        shape: Shape of the model: a small GPT-2, or that of GPT2-XL or Pythia-6.9B, with random weights.
        methods: Localizers to measure. Default: all that have a formula.
        device: Device of the model.
        dtype: Precision of weights and computation.
        sequences: Number of sequences that the learned masks train side by side.
        steps: Number of training steps of the learned masks.
        naive: Also run the formulas, for the ratio and the agreement.
        scaling: Also measure the time against the numbers of layers, tokens and neurons.
        memory: Memory budget of one more run of each localizer, whose peak is then shown; empty leaves the run out.
        threads: Number of CPU threads; 0 leaves it to torch.
        repeats: Number of runs of each localizer, of which the median counts.
        out: JSON file to write the results to.
    """

    shape: Literal[tuple(SHAPES)] = "small"  # type: ignore[valid-type]
    methods: tuple[Literal[tuple(METHODS)], ...] = tuple(METHODS)  # type: ignore[valid-type]
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    sequences: int = 16
    steps: int = 60
    naive: bool = True
    scaling: bool = True
    memory: str = "1GiB"
    threads: int = 0
    repeats: int = 3
    out: Path | None = None

    def __post_init__(self) -> None:
        check_choice("shape", self.shape, SHAPES)
        check_choice("dtype", self.dtype, ("float32", "bfloat16"))
        for method in self.methods:
            check_choice("the method", method, METHODS)
        for name in ("sequences", "steps", "repeats"):
            check_number(name, getattr(self, name), least=1, whole=True)
        check_number("threads", self.threads, least=0, whole=True)
        check_device(self.device)
        if self.memory:
            parse_memory(self.memory)


@dataclass(frozen=True)
class Measurement:
    """One measurement, for its own process.

    Args:
        shape: of the model and the sequences.
        localizer: to measure.
        sequences: number of sequences to score together.
        device: of the model.
        dtype: of weights and computation.
        threads: number of CPU threads; 0 leaves it to torch.
        repeats: number of runs, of which the median counts.
        is_naive: run the formula in place of the localizer.
        is_plain: run on a plain `HookedTransformer`, with torch's own matrix products.
        count: count FLOPs instead of seconds.
        memory: budget of the run; empty for none.
        scores: file to write the scores to; empty for none.
    """

    shape: Shape
    localizer: Localizer
    sequences: int
    device: str
    dtype: str
    threads: int
    repeats: int
    is_naive: bool = False
    is_plain: bool = False
    count: bool = False
    memory: str = ""
    scores: str = ""


def build(shape: Shape, device: str, dtype: torch.dtype, plain: bool) -> HookedTransformer:
    """Return a model with random weights, always the same: plain, or prepared as `load_model` does."""
    cfg = HookedTransformerConfig(
        n_layers=shape.layers,
        d_model=shape.width,
        n_heads=shape.heads,
        d_head=shape.width // shape.heads,
        d_mlp=shape.neurons,
        d_vocab=shape.vocabulary,
        n_ctx=max(shape.tokens, 128),
        act_fn="gelu" if shape.rotary else "gelu_new",
        normalization_type="LN",
        positional_embedding_type="rotary" if shape.rotary else "standard",
        rotary_dim=shape.width // shape.heads // 4 if shape.rotary else None,
        parallel_attn_mlp=shape.rotary,
        initializer_range=1.5 / shape.width**0.5,
        default_prepend_bos=False,
        device=device,
        dtype=dtype,
        seed=0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = HookedTransformer(cfg)
    if not plain:
        prepare(model)
    return model.eval()


def measure(wanted: Measurement) -> dict[str, float]:
    """Measure in this process: FLOPs, or seconds and the peak memory in bytes, in total and above the loaded model."""
    if wanted.threads:
        torch.set_num_threads(wanted.threads)
    model = build(wanted.shape, wanted.device, getattr(torch, wanted.dtype), plain=wanted.is_plain)
    draw = torch.Generator().manual_seed(1)
    rows = torch.randint(wanted.shape.vocabulary, (wanted.sequences, wanted.shape.tokens), generator=draw)
    sequences = [MemorizedSequence(row, wanted.shape.prompt) for row in rows]
    score = partial(formulas.score, wanted.localizer) if wanted.is_naive else wanted.localizer
    score(model, [MemorizedSequence(rows[0, :8], 4)])  # what is set up once
    if wanted.count:
        return {"flops": count_flops(partial(score, model, sequences))}
    return time_and_memory(wanted, partial(score, model, sequences))


def count_flops(score: Callable[[], Tensor]) -> float:
    """Count the FLOPs of the matrix products of a run."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    unknown = {
        torch.ops.mkldnn._linear_pointwise: _linear_flops,
        attention: lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value),
        attention_backward: lambda by, query, key, value, *_, **__: sdpa_backward_flop_count(by, query, key, value),
    }
    with FlopCounterMode(display=False, custom_mapping=unknown) as counter:
        score()
    return counter.get_total_flops()


def time_and_memory(wanted: Measurement, score: Callable[[], Tensor]) -> dict[str, float]:
    """Measure the seconds and the peak memory of runs, and write the scores of the last one."""
    if wanted.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    loaded = _peak(wanted.device)
    times = []
    in_budget = memory_budget(wanted.memory, wanted.device) if wanted.memory else nullcontext()
    with in_budget, nullcontext() if wanted.is_plain else fast_products(wanted.device):
        for _ in range(1 if wanted.is_naive else wanted.repeats):
            started = time.perf_counter()
            scores = score().cpu()
            times.append(time.perf_counter() - started)
    peak = _peak(wanted.device)
    if wanted.scores:
        save_file({"scores": scores.contiguous()}, wanted.scores)
    return {"seconds": statistics.median(times), "peak_bytes": peak, "added_bytes": peak - loaded}


def _linear_flops(left: Any, right: Any, *_: Any, **__: Any) -> int:
    return 2 * left[0] * right[0] * right[1]


def _peak(device: str) -> int:
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measurement_of(settings: SpeedSettings, localizer: Localizer, **changes: Any) -> Measurement:
    """Return the measurement of a localizer: learned masks on many sequences side by side, the others on one."""
    count = settings.sequences if isinstance(localizer, Slimming | HardConcrete) else 1
    shape = SHAPES[settings.shape]
    wanted = Measurement(shape, localizer, count, settings.device, settings.dtype, settings.threads, settings.repeats)
    return replace(wanted, **changes)


def in_own_process(wanted: Measurement) -> dict[str, float]:
    """Measure in a new process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (wanted,))


def product_rate(device: str, dtype: torch.dtype, size: int = 2048) -> float:
    """Return how many FLOPs a second the machine's matrix product reaches, the best of 7."""
    if device == "cuda":
        size *= 4
    one, other = torch.randn(2, size, size, device=device).to(dtype)
    times = []
    with fast_products(device):
        for _ in range(7):
            started = time.perf_counter()
            one @ other
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
    return 2 * size**3 / min(times)


def localizers(settings: SpeedSettings) -> dict[str, Localizer]:
    """Return the localizers to measure by name; masks train all their steps."""
    all_steps = {"steps": settings.steps, "stop_loss": 0.0}
    return {
        name: localizer(**all_steps) if localizer in (Slimming, HardConcrete) else localizer()
        for name, localizer in METHODS.items()
        if name in settings.methods
    }


def compare(settings: SpeedSettings, rate: float, folder: Path) -> dict[str, dict[str, float]]:
    """Measure the localizers against their formulas."""
    results = {}
    for name, localizer in localizers(settings).items():
        wanted = measurement_of(settings, localizer, scores=str(folder / f"{name}.safetensors"))
        fast = in_own_process(wanted)
        flops = in_own_process(replace(wanted, count=True))["flops"]
        row = {"sequences": wanted.sequences, **fast, "flops": flops, "of_rate": flops / fast["seconds"] / rate}
        if settings.naive:
            row |= against_formula(wanted, fast["seconds"], str(folder / f"{name}-naive.safetensors"))
        if settings.memory:
            bounded = in_own_process(replace(wanted, memory=settings.memory, scores=""))
            row |= {"budget_peak_bytes": bounded["peak_bytes"], "budget_seconds": bounded["seconds"]}
        results[name] = row
        print(f"{name}: {row}", file=sys.stderr)
    return results


def against_formula(wanted: Measurement, seconds: float, scores: str) -> dict[str, float]:
    """Measure the formula of a localizer, given the seconds and the scores of the localizer itself."""
    naive = replace(wanted, is_naive=True, is_plain=True, scores=scores)
    slow = in_own_process(naive)
    same_machinery = in_own_process(replace(naive, is_plain=False))
    flops = in_own_process(replace(naive, count=True))["flops"]
    own, other = load_file(wanted.scores)["scores"], load_file(naive.scores)["scores"]
    return {f"naive_{name}": value for name, value in slow.items()} | {
        "naive_flops": flops,
        "ratio": slow["seconds"] / seconds,
        "ratio_same_products": same_machinery["seconds"] / seconds,
        "difference": ((own - other).norm() / other.norm()).item(),
    }


def screen(settings: SpeedSettings, folder: Path) -> dict[str, dict[str, float]]:
    """Measure ZeroOut on candidates alone: its time, and how much of the exact top 1% it finds."""
    results = {}
    exact = top_neurons(load_file(folder / "zero-out.safetensors")["scores"][0], 0.01)
    for share in (0.05, 0.1, 0.25):
        path = str(folder / "candidates.safetensors")
        seconds = in_own_process(measurement_of(settings, ZeroOut(candidates=share), scores=path))["seconds"]
        found = top_neurons(load_file(path)["scores"][0], 0.01)
        results[str(share)] = {"seconds": seconds, "recall_of_top_1pct": 100 * len(found & exact) / len(exact)}
    return results


def scaling(settings: SpeedSettings) -> dict[str, dict[str, dict[str, float]]]:
    """Measure the seconds against layers, tokens and neurons; the rest of the shape stays as it is."""
    base = SHAPES[settings.shape]
    changes = {"layers": (2, 4, 8), "tokens": (40, 80, 160), "neurons": (512, 1024, 2048)}
    results: dict[str, dict[str, dict[str, float]]] = {}
    for name, localizer in localizers(settings).items():
        results[name] = {}
        for field, values in changes.items():
            results[name][field] = {}
            for value in values:
                shape = replace(base, prompt=16, **{field: value})
                wanted = measurement_of(settings, localizer, shape=shape)
                results[name][field][str(value)] = in_own_process(wanted)["seconds"]
    return results


def machine(settings: SpeedSettings) -> dict[str, Any]:
    """Describe what the figures are measured on."""
    cpu_info = Path("/proc/cpuinfo")  # Linux only
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    cpu = names[0] if names else platform.processor()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "processor": cpu,
        "threads": settings.threads or torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if settings.device == "cuda" else None,
        "torch": torch.__version__,
        "commit": commit,
    }


def show(settings: SpeedSettings, result: dict[str, Any]) -> None:
    """Print the tables."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    table = Table(title=f"{settings.shape}: {result['machine']}", title_justify="left")
    for heading in ("", "seconds", "naive", "ratio", "same products", "difference", "GFLOP", "naive GFLOP",
                    "of product rate", "MiB added", "naive MiB", "MiB in all, in budget"):  # fmt: skip
        table.add_column(heading, justify="right" if heading else "left")
    for name, row in result["localizers"].items():
        get = row.get
        table.add_row(
            f"{name} x {row['sequences']}",
            f"{row['seconds']:.2f}",
            f"{row['naive_seconds']:.1f}" if get("ratio") else "",
            f"{row['ratio']:.1f}" if get("ratio") else "",
            f"{row['ratio_same_products']:.1f}" if get("ratio") else "",
            f"{row['difference']:.0e}" if get("ratio") else "",
            f"{row['flops'] / 1e9:.0f}",
            f"{row['naive_flops'] / 1e9:.0f}" if get("ratio") else "",
            f"{row['of_rate']:.0%}",
            f"{row['added_bytes'] / 2**20:.0f}",
            f"{row['naive_added_bytes'] / 2**20:.0f}" if get("ratio") else "",
            f"{row['budget_peak_bytes'] / 2**20:.0f}" if get("budget_seconds") else "",
        )
    console.print(table)
    for share, row in result.get("candidates", {}).items():
        kept = f"has {row['recall_of_top_1pct']:.0f}% of the exact top 1%"
        console.print(f"zero-out, candidates={share}: {row['seconds']:.2f} s, {kept}", highlight=False)
    for name, fields in result.get("scaling", {}).items():
        for field, times in fields.items():
            line = ", ".join(f"{value}: {seconds:.2f} s" for value, seconds in times.items())
            console.print(f"{name}, {field}: {line}", highlight=False)


def main() -> None:
    """Run the command line: ``python benchmarks/speed.py --help``."""
    run_command(parser(SpeedSettings, "python benchmarks/speed.py", __doc__), run, show)


def run(settings: SpeedSettings) -> dict[str, Any]:
    """Measure everything, and write the results after every stage."""
    rate = product_rate(settings.device, getattr(torch, settings.dtype))
    result: dict[str, Any] = {
        "settings": json.loads(json.dumps(asdict(settings), default=str)),
        "machine": machine(settings) | {"product_gflops": round(rate / 1e9, 1)},
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        keep(settings, result, "localizers", compare(settings, rate, folder))
        if "zero-out" in settings.methods:
            keep(settings, result, "candidates", screen(settings, folder))
    if settings.scaling:
        keep(settings, result, "scaling", scaling(settings))
    return result


def keep(settings: SpeedSettings, result: dict[str, Any], stage: str, figures: dict[str, Any]) -> None:
    """Add the figures of a stage to the result, and write it."""
    result[stage] = figures
    if settings.out:
        settings.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
