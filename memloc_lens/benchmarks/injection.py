"""INJ: inject a new text into known components; measure whether localizers find them.

Chang et al. (2024), sec. 3.1. For each text and ratio:

1. Draw the share of all neurons, across all layers: the ground truth. Train their rows of W_out, and nothing else,
   until the model has memorized the text. With ``--component weight`` the ground truth is a share of the single
   weights of W_out. A failed injection is recorded as failed and not scored.
2. Localize the text in the changed model with every method.
3. Take the top k of every layer and measure the recall of the ground truth: at the ratio, twice and five times it.
   Perfect scores do not reach 100 at the ratio, since some layers hold more of the ground truth than their share: the
   table has recall as a share of that ceiling, and AUROC and average precision, which have none.

The weights alone can give the ground truth away (leakage). So every injection records the AUROC of the norm of what
each component writes with, which needs no text at all, and of how much it grew. "AUROC net" is a method's AUROC less
the first.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from memloc_lens.benchmarks.context import with_context
from memloc_lens.benchmarks.injection_settings import InjectionSettings
from memloc_lens.benchmarks.tuning import tune
from memloc_lens.components import ComponentSet, component_of, count_of, top_components
from memloc_lens.data import load_definitions, load_sequences
from memloc_lens.injection import Injection, inject
from memloc_lens.library_types import HookedModel
from memloc_lens.localizers import WeightNorm
from memloc_lens.metrics import auroc, average_precision, recall, recall_ceiling
from memloc_lens.models import EMBEDDED
from memloc_lens.products import fast_products
from memloc_lens.runs.command_line import benchmark_parser, published, run_command
from memloc_lens.runs.folder import RunFolder, resuming, same_threads
from memloc_lens.runs.jobs import Engine, Job, Worker, kept_open, run_jobs
from memloc_lens.runs.methods import AnyLocalizer, checked_scores, name_of
from memloc_lens.runs.quiet import may_be_quiet
from memloc_lens.runs.records import foreign, lacks
from memloc_lens.runs.schema import INJECTION, InjectionsSummary, InjectionSummary, Record, TuningSummary
from memloc_lens.runs.scores import kept_scores, origin, score_file
from memloc_lens.runs.settings import check_weights, device_elsewhere, open_folder
from memloc_lens.runs.statistics import mean_interval, summarize
from memloc_lens.runs.visible import visible
from memloc_lens.sequence import MemorizedSequence
from memloc_lens.tables.terminal import print_comparison, print_tuning

INJECTED = ("loss", "steps", "auroc_weight_norm", "auroc_norm_change")
"""What is recorded of an injection, and summarized."""
TIMES = (1, 2, 5)
"""Recall is measured at these multiples of the ratio, as in the paper."""
CURVE = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""And at these shares of every layer: the recall curve."""


@dataclass(frozen=True)
class Cell:
    """One injection: the index of a text in the data, and the ratio."""

    index: int
    ratio: float


@dataclass(frozen=True)
class Material:
    """Everything that a run reads."""

    model: HookedModel
    texts: list[MemorizedSequence]


def main() -> None:
    """Run the command line: ``python -m memloc_lens.benchmarks.inj --help``."""
    run_command(benchmark_parser(InjectionSettings, "python -m memloc_lens.benchmarks.inj", __doc__), run, show)


@may_be_quiet
def run(settings: InjectionSettings, engine: Engine | None = None) -> InjectionSummary | TuningSummary:
    """Run the benchmark, or what is left of it, and return its summary.

    Args:
        settings: of the run. Those that decide the values of records must equal those of an earlier run in the same
            folder, to which methods and ratios can be added.
        engine: runs the jobs. Default: that of the settings.

    Returns:
        The content of `summary.json`: for each method, ratio and metric the mean over texts with its 95% confidence
        interval (recall in points, AUROC and average precision in [0, 1]), and for each ratio how the `injections`
        went and which failed.

    Raises:
        ValueError: for settings, files or a run folder that cannot be used, before any long work.
    """
    figures = published(settings.config)
    with resuming(settings.out / "tuning" if settings.tune else settings.out):
        material = load_material(settings)
        model, texts = material.model, material.texts
        settings = settings.with_ratios()
        check_ratios(settings, model)
        settings = _with_context(settings, material)
        engine = engine or settings.parallel.engine_for(model.cfg.device, settings.n_devices)
        with settings.memory_budget(model), fast_products(model.cfg.device):
            if settings.tune:
                tuning = replace(settings, out=settings.out / "tuning")
                return tune(tuning, model, texts, partial(_inject, settings, material), engine)
            cells = [Cell(index, ratio) for index in range(len(texts)) for ratio in settings.ratios]
            records = len(cells) * len(settings.localizers())
            with open_folder(settings, model, texts, [], records, partial(_problem, settings, model)) as folder:
                jobs = [_job(settings, texts, cell, folder) for cell in cells]
                run_jobs(MakeWorker(settings, folder.config, material), jobs, folder, engine, description="INJ")
                summary = _summary(settings, texts, folder)
                summary["published"] = figures
                folder.write_summary(summary)
                return summary


def _with_context(settings: InjectionSettings, material: Material) -> InjectionSettings:
    """Give the methods what they may read besides the injected texts: nothing unless it is asked for.

    An injection makes its components matter for all text: sparing what other text needs spares the ground truth.
    """
    if settings.context is None and settings.context_sequences is None:
        return settings
    memorized = load_sequences(material.model, bos=settings.bos) if settings.model == EMBEDDED.name else []
    return with_context(settings, material.model, memorized[::-1], material.texts)


@may_be_quiet
def load_material(settings: InjectionSettings) -> Material:
    """Load everything that a run reads.

    Raises:
        ValueError: for data that cannot be used with the model.
    """
    model = settings.load_model()
    split = "dev" if settings.tune else "test"
    texts = load_definitions(model, settings.data, split, settings.max_tokens, settings.bos)
    return Material(model, texts[: 5 if settings.tune else settings.limit or None])


def check_ratios(settings: InjectionSettings, model: HookedModel) -> None:
    """Refuse ratios that take no component of the model, or none of a layer.

    Raises:
        ValueError: stating the smallest ratio that takes one.
    """
    component = component_of(settings.component)
    layers, *unit = component.shape(model)
    width = torch.Size(unit).numel()
    for ratio in settings.ratios:
        count_of(ratio, layers * width, "nearest", component.plural)
        count_of(ratio, width, "nearest", component.plural)


def _job(settings: InjectionSettings, texts: list[MemorizedSequence], cell: Cell, folder: RunFolder) -> Job:
    """Return the job of an injection: its own record and those of the methods; of one that failed there are none."""
    id = texts[cell.index].id
    own = (id, INJECTION, cell.ratio)
    failed = own in folder and not folder[own]["succeeded"]
    methods = () if failed else tuple((id, name_of(localizer), cell.ratio) for localizer in settings.localizers())
    return Job((own, *methods), cell)


@dataclass(frozen=True)
class MakeWorker:
    """Make a worker of INJ: in this process with what is loaded, in another one by loading it again.

    Args:
        settings: of the run.
        config: of its folder.
        material: loaded from the settings; it stays in this process.
    """

    settings: InjectionSettings
    config: Mapping[str, Any]
    material: Material | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return MakeWorker, (self.settings, self.config)

    def __call__(self) -> Worker:
        """Return a function from jobs to records."""
        if self.material:
            return partial(_records, self.settings, self.config, self.material)
        material = load_material(replace(self.settings, device=device_elsewhere(self.config)))
        model, worker = material.model, partial(_records, self.settings, self.config, material)
        check_weights(model, self.config)
        budget = self.settings.memory_budget(model)
        return kept_open(worker, same_threads(self.config), budget, fast_products(model.cfg.device))


def _records(settings: InjectionSettings, config: Mapping[str, Any], material: Material, job: Job) -> Iterator[Record]:
    """Inject a text; record the injection, then every method that is missing."""
    cell: Cell = job.content
    model, text = material.model, material.texts[cell.index]
    started = time.perf_counter()
    with _inject(settings, material, cell.index, cell.ratio) as injected:
        seconds = time.perf_counter() - started
        by_norm = auroc(WeightNorm(component=settings.component)(model, text), injected.ground_truth)
        if (text.id, INJECTION, cell.ratio) in job.keys:
            yield {
                "sequence": text.id,
                "method": INJECTION,
                "ratio": cell.ratio,
                component_of(settings.component).plural: len(injected.ground_truth),
                "loss": round(injected.loss, 6),
                "steps": injected.steps,
                "succeeded": injected.succeeded,
                "auroc_weight_norm": round(by_norm, 6),
                "auroc_norm_change": round(auroc(injected.norm_change, injected.ground_truth), 6),
                "inject_seconds": round(seconds, 3),
            }
        for localizer in settings.localizers() if injected.succeeded else ():
            key = (text.id, name_of(localizer), cell.ratio)
            if key in job.keys:
                kept = kept_scores(
                    score_file(settings.out, name_of(localizer), cell.ratio, cell.index),
                    partial(_localize, settings, localizer, model, text, injected.ground_truth),
                    origin(config, name_of(localizer), cell.index, cell.index + 1),
                )
                metrics = score_metrics(kept["scores"], injected.ground_truth, cell.ratio)
                metrics["auroc_net"] = metrics["auroc"] - by_norm
                yield {
                    "sequence": text.id,
                    "method": name_of(localizer),
                    "ratio": cell.ratio,
                    **{name: round(value, 6) for name, value in metrics.items()},
                    "localize_seconds": round(kept["seconds"].item(), 3),
                }


def _problem(settings: InjectionSettings, model: HookedModel, record: Record, config: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a record of a run with a configuration, None if nothing is."""
    if record["method"] == INJECTION:
        whole = [component_of(settings.component).plural, *INJECTED, "succeeded", "inject_seconds"]
        return lacks(record, whole, {})
    _, *unit = component_of(settings.component).shape(model)
    metrics = [metric.name for metric in metrics_at(record["ratio"]) if _takes_some(metric, record["ratio"], unit)]
    return foreign(record, config) or lacks(record, [*metrics, "localize_seconds"], {})


def _inject(
    settings: InjectionSettings, material: Material, index: int, ratio: float
) -> AbstractContextManager[Injection]:
    return inject(
        material.model,
        material.texts[index],
        ratio,
        seed=settings.seed + index,
        lr=settings.lr or (0.01 if ratio >= 0.01 else 0.05),
        max_steps=settings.max_steps,
        target_loss=settings.target_loss,
        keep_norms=settings.keep_norms,
        component=settings.component,
    )


def _localize(
    settings: InjectionSettings,
    localizer: AnyLocalizer,
    model: HookedModel,
    text: MemorizedSequence,
    gold: ComponentSet,
) -> dict[str, Tensor]:
    started = time.perf_counter()
    scores = checked_scores(localizer, model, [text], component_of(settings.component))[0]
    return {"scores": scores, "gold": gold.members, "seconds": torch.tensor(time.perf_counter() - started)}


@dataclass(frozen=True)
class Metric:
    """A metric of INJ: see `measurement.Metric` of DEL.

    Args:
        name: in records and summaries.
        heading: of its column in tables; a metric without a heading is recorded only.
        measure: its value, from scores and the ground truth.
        better: 1 if a higher value is better, -1 if a lower one is.
        form: format of the printed value.
    """

    name: str
    heading: str
    measure: Callable[[Tensor, ComponentSet], float] | None
    better: Literal[1, -1] = 1
    form: str = ".1f"


def metrics_at(ratio: float) -> tuple[Metric, ...]:
    """Return the metrics of INJ at a ratio, in the order of tables."""
    return (
        *(_recall_at(round(times * ratio, 9), f"R@{100 * times * ratio:g}%") for times in TIMES),
        Metric(
            "recall_of_ceiling",
            "of ceiling",
            lambda scores, gold: 100 * _found(scores, gold, ratio) / recall_ceiling(gold, ratio),
        ),
        Metric(
            f"recall_global@{ratio:g}",
            "R global",
            lambda scores, gold: recall(
                gold, top_components(scores, ratio, scope="global", rounding="nearest", component=gold.component)
            ),
        ),
        Metric("auroc", "AUROC", auroc, form=".3f"),
        Metric("auroc_net", "AUROC net", None, form="+.3f"),  # less that of WeightNorm, which an injection shares
        Metric("average_precision", "AP", average_precision, form=".3f"),
        Metric("recall_ceiling", "", lambda scores, gold: recall_ceiling(gold, ratio)),
        *(_recall_at(share) for share in CURVE if share not in {round(times * ratio, 9) for times in TIMES}),
    )


def _recall_at(share: float, heading: str = "") -> Metric:
    return Metric(f"recall@{share:g}", heading, lambda scores, gold: _found(scores, gold, share))


def _found(scores: Tensor, gold: ComponentSet, share: float) -> float:
    return recall(gold, top_components(scores, share, rounding="nearest", component=gold.component))


def score_metrics(scores: Float[Tensor, " layer *unit"], gold: ComponentSet, ratio: float) -> dict[str, float]:
    """Measure how well scores find the ground truth of an injection.

    Args:
        scores: of any localizer.
        gold: the ground truth.
        ratio: share of all components that it is.

    Returns:
        `recall@k` of the top share k of every layer, for the ratio, twice and five times it and the recall curve;
        `recall_global@k` at the ratio, of all layers together; `recall_ceiling` at the ratio, and
        `recall_of_ceiling`, all in points; `auroc` and `average_precision` in [0, 1].
    """
    return {
        metric.name: metric.measure(scores, gold)
        for metric in metrics_at(ratio)
        if metric.measure is not None and _takes_some(metric, ratio, scores.shape[1:])
    }


def _takes_some(metric: Metric, ratio: float, unit: Sequence[int]) -> bool:
    """Return whether the share that a metric is about takes a component of a layer, to the nearest number."""
    return 0.5 / prod(unit) < float(metric.name.partition("recall@")[2] or ratio) <= 1


def _summary(settings: InjectionSettings, texts: list[MemorizedSequence], folder: RunFolder) -> InjectionSummary:
    """Summarize all methods and ratios that the folder has for the texts, in the order of texts and ratios."""
    order = {text.id: index for index, text in enumerate(texts)}
    methods = [INJECTION, *folder.config["methods"]]
    records = [record for record in folder.records if record["sequence"] in order]
    records.sort(key=lambda record: (methods.index(record["method"]), order[record["sequence"]], record["ratio"]))
    scored = [record for record in records if record["method"] != INJECTION]
    about = {"sequence", "method", "ratio", "localize_seconds"}
    names = dict.fromkeys(name for record in scored for name in record if name not in about)
    ratios = sorted({record["ratio"] for record in records})
    return {
        "benchmark": "inj",
        "model": settings.model,
        "component": settings.component,
        "sequences": len(texts),
        "injections": {
            str(ratio): _injections([r for r in records if (r["method"], r["ratio"]) == (INJECTION, ratio)])
            for ratio in ratios
        },
        "methods": summarize(scored, list(names)),
        "published": {},
    }


def _injections(records: list[Record]) -> InjectionsSummary:
    """Tell how injections went: how many succeeded, which failed, and what the norms of the weights give away."""
    return {
        "texts": len(records),
        "succeeded": sum(record["succeeded"] for record in records),
        "failed": [record["sequence"] for record in records if not record["succeeded"]],
        "loss": mean_interval([record["loss"] for record in records]),
        "steps": mean_interval([record["steps"] for record in records]),
        "auroc_weight_norm": mean_interval([record["auroc_weight_norm"] for record in records]),
        "auroc_norm_change": mean_interval([record["auroc_norm_change"] for record in records]),
    }


def show(settings: InjectionSettings, summary: InjectionSummary | TuningSummary) -> None:
    """Print the table of a run, one block a ratio, or that of ``--tune``."""
    if summary["benchmark"] == "tuning":
        print_tuning(summary)
        print(f"\nchosen settings: {visible(settings.out / 'tuning' / 'tuned.toml')}")
        return
    injected = component_of(summary["component"]).plural
    print_comparison(
        summary,
        f"INJ on {summary['model']}, {summary['sequences']} texts: how many of the {injected} that a text was written "
        "into are found (recall in points)",
        partial(_title, summary, injected),
        lambda ratio: metrics_at(float(ratio)),
        [
            f"{100 * float(ratio):g}% of all {injected} were too few for {', '.join(injections['failed'])}"
            for ratio, injections in summary["injections"].items()
            if injections["failed"]
        ],
    )
    print(f"\nrecords, scores and summary: {visible(settings.out)}")


def _title(summary: InjectionSummary, injected: str, ratio: str) -> str:
    made, share = summary["injections"][ratio], f"{100 * float(ratio):g}%"
    ceiling = next(cells[ratio]["recall_ceiling"]["mean"] for cells in summary["methods"].values() if ratio in cells)
    return (
        f"{share} of all {injected}: {made['succeeded']} of {made['texts']} texts injected, in "
        f"{made['steps']['mean']:.0f} steps on average; ceiling of R@{share} {ceiling:.1f}; AUROC of W_out's "
        f"norms {made['auroc_weight_norm']['mean']:.3f}, of their change {made['auroc_norm_change']['mean']:.3f}"
    )
