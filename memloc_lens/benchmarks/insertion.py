"""INJ: write a new text into known neurons; see whether a localizer finds them.

Chang et al. (2024), sec. 3.1. For each text and ratio:

1. Draw the share of all neurons, across all layers: the gold set. Train their rows of W_out, and nothing else, until
   the model knows the text by heart. An injection that fails is recorded as failed and not scored.
2. Localize the text in the changed model with every method.
3. Take the top k of every layer and measure the recall of the gold set: at the ratio, twice and five times it.
   Perfect scores do not reach 100 at the ratio, since some layers hold more gold than their share: the table has
   recall as a share of that ceiling, and AUROC and average precision, which have none.

Whether the answer can be read off the weights alone is recorded for each injection: the AUROC of the norm of each
row of W_out, which needs no text at all, and of how much longer the row became. "AUROC net" is what a method has
beyond the first.
"""

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm
from transformer_lens import HookedTransformer

from memloc_lens.benchmarks.records import Record, RunFolder
from memloc_lens.benchmarks.runner import RunSettings, check, check_ids, command_line, open_folder, published
from memloc_lens.benchmarks.statistics import mean_interval, summarize
from memloc_lens.benchmarks.tuning import tune
from memloc_lens.data import load_definitions
from memloc_lens.injection import Injection, inject
from memloc_lens.localizers import HardConcrete, Slimming, WeightNorm
from memloc_lens.metrics import auroc, average_precision, recall, recall_ceiling
from memloc_lens.models import EMBEDDED
from memloc_lens.neurons import Neurons, neurons_taken, top_neurons
from memloc_lens.products import fast_products
from memloc_lens.sequence import MemorizedSequence

EMBEDDED_RATIOS, RATIOS = (0.01, 0.05), (0.01, 0.001)
TIMES = (1, 2, 5)
"""Recall is measured at these times the ratio, as in the paper."""
CURVE = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""And at these shares of every layer: the recall curve."""
INJECTION = "injection"
"""What stands in place of the method in the record of an injection itself."""
LEAKS = ("loss", "steps", "auroc_weight_norm", "auroc_norm_change")


@dataclass(frozen=True)
class Settings(RunSettings):
    """One run of the INJ benchmark.

    Args:
        data: Texts to inject: JSON lines with "definition", "text" or "all", any other file with a text a line, or
            the name owner/name of a data set on the hub. Left out: 60 definitions of things that do not exist.
        ratios: Shares of all neurons to write a text into. Left out: 0.01 0.05 for the embedded model, where 0.001
            would be 5 neurons, too few for a sentence; 0.01 0.001 (the paper's) for others.
        limit: Texts, the first of the data; 0 takes all. As many as two processor cores do in a few minutes.
        out: Folder of the run. A run that was stopped goes on where it was when started again with the same
            settings.
        max_tokens: Cut longer texts to this many tokens; 0 cuts nothing, and refuses what the model cannot read
            whole.
        lr: Learning rate of the injection; 0 takes the paper's: 0.01 for ratios of 1% and more, 0.05 for smaller
            ones.
        max_steps: Steps of the injection, at the most.
        target_loss: The injection ends, and has succeeded, when the loss of the text is under it, in nats.
        keep_norms: Hold every row of W_out at its length while injecting, so that its norm tells nothing. Not in
            the paper.
        tune: Instead of running, try the released settings of the learned masks on the 5 texts of the split "dev"
            (of the package's own or a hub data set; of another file the first 5), and write the best to
            OUT/tuning/tuned.toml.
        seed: Of the draw of the gold neurons, to which the place of the text in the data is added.
    """

    data: str | Path | None = None
    ratios: tuple[float, ...] = ()
    limit: int = 10
    out: Path = Path("runs/inj")
    max_tokens: int = 0
    lr: float = 0.0
    max_steps: int = 200
    target_loss: float = 0.05
    keep_norms: bool = False
    tune: bool = False
    seed: int = 0
    # chosen for the embedded model by --tune: benchmarks/results/tuning.md
    hard_concrete: HardConcrete = field(default_factory=lambda: HardConcrete(penalty=120.0))
    slimming: Slimming = field(default_factory=lambda: Slimming(steps=200, lr=1e-3, penalty=1200.0))


@dataclass(frozen=True)
class Cell:
    """One injection: a text, the ratio it is written at, and its place in the data."""

    text: MemorizedSequence
    ratio: float
    place: int


def main() -> None:
    """The command line: ``python -m memloc_lens.benchmarks.inj --help``."""
    command_line(Settings, "memloc_lens.benchmarks.inj", __doc__, run)


def run(settings: Settings) -> dict[str, Any]:
    """Run the benchmark, or what is left of it, and return its summary.

    Args:
        settings: of the run; those that decide records must equal those of an earlier run in the same folder.

    Returns:
        What `summary.json` holds: benchmark, model, for each method, ratio and metric the mean over texts with its
        95% interval (recall in points, AUROC and average precision in [0, 1]), and for each ratio what the
        `injections` were like and which failed.

    Raises:
        ValueError: for settings, files or a run folder that cannot be used, before any long work.
    """
    check(settings, counts=("limit", "max_tokens"))
    if settings.lr < 0:
        raise ValueError(f"lr is {settings.lr}; it must be above 0, or 0 for the paper's")
    for name in ("max_steps", "target_loss"):
        if not getattr(settings, name) > 0:
            raise ValueError(f"{name} is {getattr(settings, name)}; it must be above 0")
    model = settings.load_model()
    ratios = settings.ratios or (EMBEDDED_RATIOS if settings.model == EMBEDDED.name else RATIOS)
    settings = replace(settings, ratios=ratios)
    for ratio in ratios:
        neurons_taken(ratio, model.cfg.n_layers * model.cfg.d_mlp, "nearest")
        neurons_taken(ratio, model.cfg.d_mlp, "nearest")
        if ratio >= 1:
            raise ValueError(
                f"the ratio is {ratio}; with every neuron gold there is nothing to find: take a smaller one"
            )
    texts = load_definitions(model, settings.data, "dev" if settings.tune else "test", settings.max_tokens)
    check_ids(texts, settings.data)
    inject_cell = partial(_inject, settings, model)
    if settings.tune:
        with settings.memory_budget(model), fast_products(model.cfg.device):
            return tune(replace(settings, out=settings.out / "tuning"), model, texts[:5], inject_cell)
    texts = texts[: settings.limit or None]
    folder = open_folder(settings, model, texts, [], records=len(texts) * len(ratios) * len(settings.methods))

    cells = [Cell(text, ratio, place) for place, text in enumerate(texts) for ratio in ratios]
    left = [cell for cell in cells if not _is_done(folder, settings, cell)]
    with (
        settings.memory_budget(model),
        tqdm(total=len(cells), initial=len(cells) - len(left), desc="INJ", unit="injection") as progress,
    ):
        for cell in left:
            progress.set_postfix_str("injecting")
            started = time.perf_counter()
            with inject_cell(cell.text, cell.ratio, cell.place) as injected:
                seconds = time.perf_counter() - started
                if (cell.text.id, INJECTION, cell.ratio) not in folder:
                    folder.append(_injection_record(model, cell, injected, seconds))
                if injected.succeeded:
                    _score_methods(folder, settings, model, cell, injected, progress)
            progress.update()
    summary = {
        "benchmark": "inj",
        "model": settings.model,
        "sequences": len(texts),
        "injections": {str(ratio): _injections(folder, ratio) for ratio in sorted(ratios)},
        "methods": _methods(folder),
        "published": published(settings),
    }
    folder.write_summary(summary)
    return summary


def _is_done(folder: RunFolder, settings: Settings, cell: Cell) -> bool:
    """Whether all records of an injection are there; of one that failed there is no other."""
    of_cell = [
        record for record in folder.records if (record["sequence"], record["ratio"]) == (cell.text.id, cell.ratio)
    ]
    failed = any(record["method"] == INJECTION and not record["succeeded"] for record in of_cell)
    return failed or {INJECTION, *settings.methods} <= {record["method"] for record in of_cell}


def _inject(
    settings: Settings, model: HookedTransformer, text: MemorizedSequence, ratio: float, place: int
) -> AbstractContextManager[Injection]:
    return inject(
        model,
        text,
        ratio,
        seed=settings.seed + place,
        lr=settings.lr or (0.01 if ratio >= 0.01 else 0.05),
        max_steps=settings.max_steps,
        target_loss=settings.target_loss,
        keep_norms=settings.keep_norms,
    )


def _score_methods(
    folder: RunFolder,
    settings: Settings,
    model: HookedTransformer,
    cell: Cell,
    injected: Injection,
    progress: tqdm,
) -> None:
    """Write the records of an injection that are not there yet, in the order of the methods."""
    by_norm = auroc(WeightNorm()(model, cell.text), injected.neurons)
    for method in settings.methods:
        if (cell.text.id, method, cell.ratio) in folder:
            continue
        progress.set_postfix_str(method)
        name = f"{method}-{cell.ratio:g}-{cell.place:05d}"
        kept = folder.scores(name, partial(_localize, settings, method, model, cell.text, injected.neurons))
        metrics = score_metrics(kept["scores"], injected.neurons, cell.ratio)
        metrics["auroc_net"] = metrics["auroc"] - by_norm
        folder.append(
            {"sequence": cell.text.id, "method": method, "ratio": cell.ratio}
            | {metric: round(value, 6) for metric, value in metrics.items()}
            | {"localize_seconds": round(kept["seconds"].item(), 3)}
        )


def _localize(
    settings: Settings, method: str, model: HookedTransformer, text: MemorizedSequence, gold: Neurons
) -> dict[str, Tensor]:
    started = time.perf_counter()
    scores = settings.localizer(method)(model, text)
    return {"scores": scores, "gold": gold.members, "seconds": torch.tensor(time.perf_counter() - started)}


def _injection_record(model: HookedTransformer, cell: Cell, injected: Injection, seconds: float) -> Record:
    return {
        "sequence": cell.text.id,
        "method": INJECTION,
        "ratio": cell.ratio,
        "neurons": len(injected.neurons),
        "loss": round(injected.loss, 6),
        "steps": injected.steps,
        "succeeded": injected.succeeded,
        "auroc_weight_norm": round(auroc(WeightNorm()(model, cell.text), injected.neurons), 6),
        "auroc_norm_change": round(auroc(injected.norm_change, injected.neurons), 6),
        "inject_seconds": round(seconds, 3),
    }


def score_metrics(scores: Float[Tensor, "layer neuron"], gold: Neurons, ratio: float) -> dict[str, float]:
    """How well scores find the gold neurons of an injection.

    Args:
        scores: of any localizer.
        gold: where the text is.
        ratio: share of all neurons that the gold set is.

    Returns:
        `recall@k` of the top share k of every layer, for the ratio, twice and five times it and the recall curve;
        `recall_global@k` at the ratio, of all layers together; `recall_ceiling` at the ratio, and
        `recall_of_ceiling`, all in points; `auroc` and `average_precision` in [0, 1].
    """
    smallest = 0.5 / scores.shape[1]  # share that still takes a neuron, to the nearest number
    shares = {round(times * ratio, 9) for times in TIMES} | {share for share in CURVE if share > smallest}
    metrics = {
        f"recall@{share:g}": recall(gold, top_neurons(scores, share, rounding="nearest"))
        for share in sorted(shares)
        if share <= 1
    }
    ceiling = recall_ceiling(gold, ratio)
    return metrics | {
        f"recall_global@{ratio:g}": recall(gold, top_neurons(scores, ratio, scope="global", rounding="nearest")),
        "recall_ceiling": ceiling,
        "recall_of_ceiling": 100 * metrics[f"recall@{ratio:g}"] / ceiling,
        "auroc": auroc(scores, gold),
        "average_precision": average_precision(scores, gold),
    }


def _methods(folder: RunFolder) -> dict[str, Any]:
    records = [record for record in folder.records if record["method"] != INJECTION]
    about = {"sequence", "method", "ratio", "localize_seconds"}
    return summarize(records, list(dict.fromkeys(name for record in records for name in record if name not in about)))


def _injections(folder: RunFolder, ratio: float) -> dict[str, Any]:
    """What the injections of a ratio were like: how many succeeded, which failed, and what their norms give away."""
    records = [record for record in folder.records if record["method"] == INJECTION and record["ratio"] == ratio]
    return {
        "texts": len(records),
        "succeeded": sum(record["succeeded"] for record in records),
        "failed": [record["sequence"] for record in records if not record["succeeded"]],
        **{name: mean_interval([record[name] for record in records]) for name in LEAKS},
    }
