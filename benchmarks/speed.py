"""How fast the localizers are against their formulas written down: same weights, sequences and machine, in one run.

    python benchmarks/speed.py --out benchmarks/results/speed-cpu.json
    python benchmarks/speed.py --shape pythia-6.9b --device cuda --dtype bfloat16 --no-naive

The formulas (`formulas.py`) run on a plain `HookedTransformer`, the localizers on one as `load_model` gives it, with
the same weights. These are random: speed does not depend on them. To tell work saved from faster products, the
formulas run once more on the localizers' model and with their matrix products. Every measurement has a process of its
own, so that its peak of memory is its own. Localizers run three times, of which the median counts, formulas once, and
both once more to count the FLOPs of their matrix products. Results are written after each stage.
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
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformer_lens import HookedTransformer, HookedTransformerConfig

from memloc_lens import (
    HardConcrete,
    IntegratedGradients,
    MemorizedSequence,
    Slimming,
    ZeroOut,
    memory_budget,
    top_neurons,
)
from memloc_lens.models import prepare
from memloc_lens.products import fast_products

sys.path.insert(0, str(Path(__file__).parent))
import formulas


@dataclass(frozen=True)
class Shape:
    """The shape of a model and of the sequences it reads."""

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
class Settings:
    """What to measure.

    Args:
        shape: of the model: a small GPT-2, or those of GPT2-XL and Pythia-6.9B with random weights.
        methods: localizers to measure.
        device: where to run.
        dtype: of weights and computation.
        sequences: that the learned masks train side by side.
        steps: of the learned masks.
        naive: run the formulas too, for the ratio and the agreement.
        scaling: time against the numbers of layers, tokens and neurons too.
        memory: budget of one more run of each localizer, whose peak is then shown; empty leaves it out.
        threads: of the processor; 0 leaves it to torch.
        repeats: runs of each localizer, of which the median counts.
        out: JSON file for the results.
    """

    shape: Literal["small", "gpt2-xl", "pythia-6.9b"] = "small"
    methods: tuple[Literal["integrated-gradients", "zero-out", "slimming", "hard-concrete"], ...] = (
        "integrated-gradients",
        "zero-out",
        "slimming",
        "hard-concrete",
    )
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


@dataclass(frozen=True)
class Job:
    """One measurement, for a process of its own."""

    shape: Shape
    localizer: Any
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
    """A model of a shape with random weights, the same ones each time; as TransformerLens has it, or as we load it."""
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


def measure(job: Job) -> dict[str, float]:
    """Run a job, in its own process: seconds, FLOPs where counted, and peak bytes above the loaded model."""
    if job.threads:
        torch.set_num_threads(job.threads)
    model = build(job.shape, job.device, getattr(torch, job.dtype), plain=job.is_plain)
    draw = torch.Generator().manual_seed(1)
    rows = torch.randint(job.shape.vocabulary, (job.sequences, job.shape.tokens), generator=draw)
    sequences = [MemorizedSequence(row, job.shape.prompt) for row in rows]
    score = partial(formulas.score, job.localizer) if job.is_naive else job.localizer
    score(model, [MemorizedSequence(rows[0, :8], 4)])  # what is set up once
    if job.device == "cuda":
        torch.cuda.reset_peak_memory_stats()

    loaded = _peak(job.device)
    if job.count:
        with FlopCounterMode(
            display=False, custom_mapping={torch.ops.mkldnn._linear_pointwise: _linear_flops}
        ) as counter:
            score(model, sequences)
        return {"flops": counter.get_total_flops()}
    times = []
    in_budget = memory_budget(job.memory, job.device) if job.memory else nullcontext()
    with in_budget, nullcontext() if job.is_plain else fast_products(job.device):
        for _ in range(1 if job.is_naive else job.repeats):
            started = time.perf_counter()
            scores = score(model, sequences).cpu()
            times.append(time.perf_counter() - started)
    seconds = statistics.median(times)
    if job.scores:
        save_file({"scores": scores.contiguous()}, job.scores)
    peak = _peak(job.device)
    return {"seconds": seconds, "peak_bytes": peak, "added_bytes": peak - loaded}


def _linear_flops(left: Any, right: Any, *_: Any, **__: Any) -> int:
    return 2 * left[0] * right[0] * right[1]


def _peak(device: str) -> int:
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def job_of(settings: Settings, localizer: Any, **changes: Any) -> Job:
    """The measurement of a localizer: learned masks on many sequences side by side, the others on one."""
    count = settings.sequences if isinstance(localizer, Slimming | HardConcrete) else 1
    shape = SHAPES[settings.shape]
    job = Job(shape, localizer, count, settings.device, settings.dtype, settings.threads, settings.repeats)
    return replace(job, **changes)


def in_own_process(job: Job) -> dict[str, float]:
    """What `measure` gives, from a new process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (job,))


def product_rate(device: str, dtype: torch.dtype, size: int = 2048) -> float:
    """The FLOPs a second of the machine's matrix product, the best of 7."""
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


def localizers(settings: Settings) -> dict[str, Any]:
    """What is measured, by name; masks run all their steps."""
    every = {
        "integrated-gradients": IntegratedGradients(),
        "zero-out": ZeroOut(),
        "slimming": Slimming(steps=settings.steps, stop_loss=0.0),
        "hard-concrete": HardConcrete(steps=settings.steps, stop_loss=0.0),
    }
    return {name: localizer for name, localizer in every.items() if name in settings.methods}


def compare(settings: Settings, rate: float, folder: Path) -> dict[str, dict[str, float]]:
    """Each localizer against its formula."""
    results = {}
    for name, localizer in localizers(settings).items():
        job = job_of(settings, localizer, scores=str(folder / f"{name}.safetensors"))
        fast = in_own_process(job)
        flops = in_own_process(replace(job, count=True))["flops"]
        row = {"sequences": job.sequences, **fast, "flops": flops, "of_rate": flops / fast["seconds"] / rate}
        if settings.naive:
            slow_job = replace(job, is_naive=True, is_plain=True, scores=str(folder / f"{name}-naive.safetensors"))
            slow = in_own_process(slow_job)
            same_machinery = in_own_process(replace(slow_job, is_plain=False))
            naive_flops = in_own_process(replace(slow_job, count=True))["flops"]
            own, other = (load_file(each.scores)["scores"] for each in (job, slow_job))
            row |= {f"naive_{key}": value for key, value in slow.items()} | {
                "naive_flops": naive_flops,
                "ratio": slow["seconds"] / fast["seconds"],
                "ratio_same_products": same_machinery["seconds"] / fast["seconds"],
                "difference": ((own - other).norm() / other.norm()).item(),
            }
        if settings.memory:
            bounded = in_own_process(replace(job, memory=settings.memory, scores=""))
            row |= {"budget_peak_bytes": bounded["peak_bytes"], "budget_seconds": bounded["seconds"]}
        results[name] = row
        print(f"{name}: {row}", file=sys.stderr)
    return results


def screen(settings: Settings, folder: Path) -> dict[str, dict[str, float]]:
    """ZeroOut on candidates alone: its time, and how much of the exact top 1% it has."""
    results = {}
    exact = load_file(folder / "zero-out.safetensors")["scores"][0]
    for share in (0.05, 0.1, 0.25):
        path = str(folder / "candidates.safetensors")
        seconds = in_own_process(job_of(settings, ZeroOut(candidates=share), scores=path))["seconds"]
        found, wanted = (top_neurons(each, 0.01) for each in (load_file(path)["scores"][0], exact))
        results[str(share)] = {"seconds": seconds, "recall_of_top_1pct": 100 * len(found & wanted) / len(wanted)}
    return results


def scaling(settings: Settings) -> dict[str, dict[str, dict[str, float]]]:
    """Seconds against layers, tokens and neurons, the rest of the shape as it is."""
    base = SHAPES[settings.shape]
    changes = {
        "layers": [2, 4, 8],
        "tokens": [40, 80, 160],
        "neurons": [512, 1024, 2048],
    }
    results: dict[str, dict[str, dict[str, float]]] = {}
    for name, localizer in localizers(settings).items():
        results[name] = {}
        for field, values in changes.items():
            results[name][field] = {}
            for value in values:
                shape = replace(base, prompt=16, **{field: value})
                results[name][field][str(value)] = in_own_process(job_of(settings, localizer, shape=shape))["seconds"]
    return results


def machine(settings: Settings) -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.processor())  # fmt: skip
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "processor": cpu,
        "threads": settings.threads or torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if settings.device == "cuda" else None,
        "torch": torch.__version__,
        "commit": commit,
    }


def show(result: dict[str, Any]) -> None:
    """Print the tables."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    table = Table(title=f"{result['settings']['shape']}: {result['machine']}", title_justify="left")
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
    """Measure, print, and keep the results."""
    settings = tyro.cli(Settings, description=__doc__)
    rate = product_rate(settings.device, getattr(torch, settings.dtype))
    as_text = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(settings).items()}
    result: dict[str, Any] = {"settings": as_text, "machine": machine(settings)}
    result["machine"]["product_gflops"] = round(rate / 1e9, 1)

    def keep(stage: str, figures: dict[str, Any]) -> None:
        result[stage] = figures
        if settings.out:
            settings.out.write_text(json.dumps(result, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        keep("localizers", compare(settings, rate, Path(folder)))
        if "zero-out" in settings.methods:
            keep("candidates", screen(settings, Path(folder)))
    if settings.scaling:
        keep("scaling", scaling(settings))
    show(result)


if __name__ == "__main__":
    main()
