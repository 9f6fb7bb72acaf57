"""DEL: drop the neurons that a localizer names for a memorized sequence; measure forgetting, and the damage.

Chang et al. (2024), sec. 3.2. For each target sequence and method:

1. Localize; take the top share of every layer but the first.
2. Switch these neurons off at every position.
3. Measure on the target (self), on other memorized sequences (neg) and on control sequences the accuracy of the
   suffix and the distance of the text, on the target also in free-running generation, and the perplexity of
   text that nobody memorized. All are recorded as changes from before.

A good localizer lowers self accuracy and leaves the rest alone.
"""

import random
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from memloc_lens.ablation import ablate, mean_activations
from memloc_lens.benchmarks.measurement import (
    METRICS,
    Material,
    State,
    forced_recall,
    metrics_of,
    perplexity_now,
    recall_of,
    text_interval,
)
from memloc_lens.benchmarks.records import RunFolder
from memloc_lens.benchmarks.runner import RunSettings, check, check_ids, command_line, open_folder, published
from memloc_lens.benchmarks.statistics import summarize
from memloc_lens.data import load_sequences, load_texts
from memloc_lens.forward import kept_prefix
from memloc_lens.metrics import free_running, text_rows
from memloc_lens.models import EMBEDDED
from memloc_lens.neurons import Neurons, neurons_taken, top_neurons
from memloc_lens.products import fast_products
from memloc_lens.sequence import MemorizedSequence, equal_length_batches

EMBEDDED_RATIOS, RATIOS = (0.01, 0.05, 0.1), (0.001, 0.005)


@dataclass(frozen=True)
class Settings(RunSettings):
    """One run of the DEL benchmark.

    Args:
        data: Memorized sequences as JSON lines with "all" and "prompt_len"; left out: the embedded model's own.
        ratios: Shares of every layer's neurons to drop. Left out: 0.01 0.05 0.1 for the embedded model, whose
            layers are narrow, 0.001 0.005 (the paper's) for others.
        limit: Target sequences, the first of the data; 0 takes all. As many as two processor cores do in a few
            minutes.
        out: Folder of the run. A run that was stopped goes on where it was when started again with the same
            settings.
        negatives: Other memorized sequences that the damage is measured on, drawn once from all; 0 takes all.
        controls: Control sequences that the damage is measured on, where the data has any; 0 takes all.
        text: Unrelated text for the perplexity: a text file, or JSON lines with "text"; left out: the embedded
            model's held-out text, which is prose about Python.
        text_tokens: Tokens of that text to use.
        first_layer: Layers before it are neither localized in nor dropped; the paper leaves out layer 0. Goes
            before the methods' own settings of this name.
        scope: Take the share of every layer, or of all layers together.
        ablation: Set dropped activations to zero, to their mean over the perplexity text, or halve them.
        seed: Of the draws of negatives and controls, and of the bootstrap.
        batch: Sequences localized side by side, and evaluated at a time.
    """

    data: str | Path | None = None
    ratios: tuple[float, ...] = ()
    limit: int = 8
    out: Path = Path("runs/del")
    negatives: int = 32
    controls: int = 16
    text: Path | None = None
    text_tokens: int = 1024
    first_layer: int = 1
    scope: Literal["layer", "global"] = "layer"
    ablation: Literal["zero", "mean", "scale"] = "zero"
    seed: int = 0
    batch: int = 16

    def localizer(self, method: str) -> Any:
        """The localizer of a method, with the run's `first_layer` where it has one."""
        localizer = super().localizer(method)
        has_first_layer = any(entry.name == "first_layer" for entry in fields(localizer))
        return replace(localizer, first_layer=self.first_layer) if has_first_layer else localizer


def main() -> None:
    """The command line: ``python -m memloc_lens.benchmarks.del --help``."""
    command_line(Settings, "memloc_lens.benchmarks.del", __doc__, run)


def run(settings: Settings) -> dict[str, Any]:
    """Run the benchmark, or what is left of it, and return its summary.

    Args:
        settings: of the run; those that decide records must equal those of an earlier run in the same folder.

    Returns:
        What `summary.json` holds: benchmark, model, the state `before` any ablation, for each method, ratio and metric
        the mean change with its 95% interval, and how well the `text` tells a perplexity. Accuracies are in points,
        distances in characters.

    Raises:
        ValueError: for settings, files or a run folder that cannot be used, before any long work.
    """
    check(settings, counts=("limit", "negatives", "controls"))
    if settings.batch < 1:
        raise ValueError(f"batch is {settings.batch}; it must be at least 1")
    material = _material(settings)
    settings = replace(settings, ratios=settings.ratios or _default_ratios(settings))
    for ratio in settings.ratios:
        width = material.model.cfg.d_mlp
        neurons_taken(
            ratio, width if settings.scope == "layer" else width * (material.model.cfg.n_layers - settings.first_layer)
        )
    total = len(material.targets) * len(settings.methods) * len(settings.ratios)
    content = [] if material.text is None else material.text.tolist()
    folder = open_folder(settings, material.model, material.targets + material.others, content, total)

    with (
        settings.memory_budget(material.model),
        fast_products(material.model.cfg.device),
        kept_prefix(settings.first_layer),
    ):
        before = _run_cases(settings, material, folder, total)
    earlier = [{"method": "before", "ratio": 0.0} | metrics_of(material, target, before) for target in material.targets]
    summary = {
        "benchmark": "del",
        "model": settings.model,
        "sequences": len(material.targets),
        "scope": settings.scope,
        "before": summarize(earlier, METRICS)["before"]["0.0"],
        "methods": summarize(folder.records, METRICS),
        "published": published(settings),
    }
    if material.text is not None:
        summary["text"] = text_interval(material)
    folder.write_summary(summary)
    return summary


def _run_cases(settings: Settings, material: Material, folder: RunFolder, total: int) -> State:
    """Write every record that is not there yet; returns the state before any ablation."""
    free = recall_of(material.model, material.targets, free_running(material.model, material.targets, material.batch))
    before = State(forced_recall(material, material.targets), free, perplexity_now(material))
    with tqdm(total=total, initial=len(folder.records), desc="DEL", unit="record", smoothing=0.1) as progress:
        for cases in _localize(settings, material, folder, progress):
            for case, recalled in zip(cases, _free_recall(settings, material, cases), strict=True):
                if case.key not in folder:
                    folder.append(_record(settings, material, before, case, recalled))
                    progress.update()
    return before


def _default_ratios(settings: Settings) -> tuple[float, ...]:
    return EMBEDDED_RATIOS if settings.model == EMBEDDED.name else RATIOS


def _material(settings: Settings) -> Material:
    model = settings.load_model()
    if not 0 <= settings.first_layer < model.cfg.n_layers:
        raise ValueError(
            f"first_layer is {settings.first_layer}; {settings.model} has layers 0 to {model.cfg.n_layers - 1}"
        )
    memorized = load_sequences(model, settings.data)
    if not memorized:
        raise ValueError(f"{settings.data} holds no test sequence")
    controls = load_sequences(model, settings.data, split="control")
    check_ids(memorized + controls, settings.data)
    text = means = None
    if model.tokenizer is not None:
        text = text_rows(model, load_texts(settings.text or EMBEDDED / "held_out.jsonl"), settings.text_tokens)
    if settings.ablation == "mean" and text is not None:
        means = mean_activations(model, [MemorizedSequence(row, 1) for row in text])
    if text is None and (settings.text or settings.ablation == "mean"):
        raise ValueError(
            f"{settings.model} has no tokenizer to read text with, for the perplexity or the mean ablation"
        )
    return Material(
        model,
        targets=memorized[: settings.limit or None],
        others=_draw(memorized, settings.negatives, settings.seed),
        controls=_draw(controls, settings.controls, settings.seed),
        text=text,
        means=means,
        batch=settings.batch,
    )


def _draw(sequences: list[MemorizedSequence], count: int, seed: int) -> list[MemorizedSequence]:
    if count == 0 or count >= len(sequences):
        return sequences
    chosen = sorted(random.Random(seed).sample(range(len(sequences)), count))
    return [sequences[place] for place in chosen]


@dataclass(frozen=True)
class Case:
    """One record to be: the neurons that a method located for a target at a ratio."""

    target: MemorizedSequence
    method: str
    ratio: float
    neurons: Neurons
    localize_seconds: float

    @property
    def key(self) -> tuple[str, str, float]:
        """What the record is found by."""
        return self.target.id, self.method, self.ratio


def _localize(settings: Settings, material: Material, folder: RunFolder, progress: tqdm) -> Iterator[list[Case]]:
    """The cases of a batch of targets and a method, for all that are not yet recorded.

    Batches are the same in every run, so that a run that goes on gets the scores it would have had.
    """
    for start in range(0, len(material.targets), settings.batch):
        batch = material.targets[start : start + settings.batch]
        for method in settings.methods:
            wanted = [(target.id, method, ratio) for target in batch for ratio in settings.ratios]
            if all(key in folder for key in wanted):
                continue
            progress.set_postfix_str(method)

            def compute(method: str = method, batch: list[MemorizedSequence] = batch) -> dict[str, Tensor]:
                started = time.perf_counter()
                scores = settings.localizer(method)(material.model, batch)
                seconds = (time.perf_counter() - started) / len(batch)
                return {"scores": scores, "seconds_each": torch.tensor(seconds)}

            kept = folder.scores(f"{method}-{start:05d}", compute)
            seconds = round(kept["seconds_each"].item(), 3)
            yield [
                Case(target, method, ratio, top_neurons(scores, ratio, settings.first_layer, settings.scope), seconds)
                for target, scores in zip(batch, kept["scores"], strict=True)
                for ratio in settings.ratios
            ]


def _record(
    settings: Settings, material: Material, before: State, case: Case, free: dict[str, float]
) -> dict[str, Any]:
    started = time.perf_counter()
    target = case.target
    with _ablated(settings, material, case.neurons):
        after = State(forced_recall(material, [target]), {target.id: free}, perplexity_now(material))
    metrics, earlier = metrics_of(material, target, after), metrics_of(material, target, before)
    memorized = dict.fromkeys([target.id, *(other.id for other in material.others)])
    return {
        "sequence": target.id,
        "method": case.method,
        "ratio": case.ratio,
        "neurons": len(case.neurons),
        **{metric: round(metrics[metric] - earlier[metric], 6) for metric in metrics},
        "acc_changes": {id: round(after.forced[id]["acc"] - before.forced[id]["acc"], 4) for id in memorized},
        "localize_seconds": case.localize_seconds,
        "evaluate_seconds": round(time.perf_counter() - started, 3),
    }


def _ablated(settings: Settings, material: Material, neurons: Neurons | list[Neurons]) -> AbstractContextManager[None]:
    return ablate(material.model, neurons, settings.ablation, over=() if material.means is None else material.means)


def _free_recall(settings: Settings, material: Material, cases: list[Case]) -> list[dict[str, float]]:
    """Free-running recall of each case's target, generated side by side with other neurons ablated in each row."""
    recalled: list[dict[str, float]] = [{}] * len(cases)
    targets = [case.target for case in cases]
    for places, _, _ in equal_length_batches(targets, material.batch):
        rows = [targets[place] for place in places]
        with _ablated(settings, material, [cases[place].neurons for place in places]):
            generated = free_running(material.model, rows, batch=len(rows))
        for place, target, suffix in zip(places, rows, generated, strict=True):
            recalled[place] = recall_of(material.model, [target], [suffix])[target.id]
    return recalled
