"""DEL: drop the components that a localizer names for a memorized sequence; measure forgetting and damage.

Chang et al. (2024), sec. 3.2. For each target sequence and method:

1. Localize; take the top share of every layer but the first.
2. Switch these components off at every position.
3. Measure the accuracy of the suffix and the distance of the text: on the target (self), on other memorized
   sequences (neg) and on control sequences; on the target also in greedy generation; and the perplexity of text that
   is not memorized. All are recorded as changes from before.

A good localizer lowers self accuracy and nothing else.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from memloc_lens.ablation import ablate, mean_activations
from memloc_lens.benchmarks.adaptive import SMALLEST, print_smallest, summarized
from memloc_lens.benchmarks.context import HELD_OUT, with_context
from memloc_lens.benchmarks.deletion_settings import DeletionSettings
from memloc_lens.benchmarks.measurement import (
    METRICS,
    PROMPT_METRICS,
    Material,
    Recited,
    State,
    measure,
    recited,
    sample,
    text_interval,
)
from memloc_lens.checks import check_first_layer
from memloc_lens.components import ComponentName, ComponentSet, component_of, count_of, top_components
from memloc_lens.data import load_sequences, load_texts
from memloc_lens.forward import PrefixCache
from memloc_lens.library_types import HookedModel
from memloc_lens.metrics import text_rows
from memloc_lens.products import fast_products
from memloc_lens.runs.command_line import benchmark_parser, published, run_command
from memloc_lens.runs.folder import RunFolder, resuming, same_threads
from memloc_lens.runs.jobs import Engine, Job, Worker, kept_open, run_jobs
from memloc_lens.runs.losses import check_losses
from memloc_lens.runs.methods import checked_scores, name_of, reads_context
from memloc_lens.runs.quiet import may_be_quiet
from memloc_lens.runs.records import KEY, foreign, lacks
from memloc_lens.runs.schema import BEFORE, DeletionSummary, Published, Record
from memloc_lens.runs.scores import kept_scores, origin, score_file
from memloc_lens.runs.settings import batches_of, check_weights, device_elsewhere, identities, open_folder
from memloc_lens.runs.statistics import summarize
from memloc_lens.runs.visible import visible
from memloc_lens.sequence import MemorizedSequence, drawn, equal_length_batches
from memloc_lens.tables.terminal import print_comparison


def main() -> None:
    """Run the command line: ``python -m memloc_lens.benchmarks.del --help``."""
    run_command(benchmark_parser(DeletionSettings, "python -m memloc_lens.benchmarks.del", __doc__), run, show)


@may_be_quiet
def run(settings: DeletionSettings, engine: Engine | None = None) -> DeletionSummary:
    """Run the benchmark, or what is left of it, and return its summary.

    Args:
        settings: of the run. Those that decide the values of records must equal those of an earlier run in the same
            folder, to which methods and ratios can be added.
        engine: runs the jobs. Default: that of the settings.

    Returns:
        The content of `summary.json`: the state `before` any ablation, for each method, ratio and metric the mean
        change with its 95% confidence interval, and the perplexity of the `text`. Accuracies are in points, distances
        in characters.

    Raises:
        ValueError: for settings, files or a run folder that cannot be used, before any long work.

    Example:
        >>> settings = DeletionSettings(methods=("random",), limit=1, text_tokens=256, out=Path("runs/example"))
        >>> summary = run(settings)
    """
    figures = published(settings.config)
    with resuming(settings.out):
        material = load_material(settings)
        settings = settings.with_ratios()
        check_ratios(settings, material.model)
        settings = _with_context(settings, material)
        if settings.budget:
            settings.budget.check(material.targets)
        engine = engine or settings.parallel.engine_for(material.model.cfg.device, settings.n_devices)
        with _open_folder(settings, material) as folder:
            return _run_in(folder, settings, material, figures, engine)


def _with_context(settings: DeletionSettings, material: Material) -> DeletionSettings:
    """Give the methods what they may read besides the targets: never what is measured."""
    if not any(map(reads_context, settings.localizers())):
        return settings
    dev = load_sequences(material.model, settings.data, "dev", settings.prompt_len, settings.bos)
    measured = [*material.targets, *material.others, *material.controls]
    return with_context(settings, material.model, [*dev, *reversed(material.memorized)], measured, material.text)


def _open_folder(settings: DeletionSettings, material: Material) -> RunFolder:
    text = [] if material.text is None else material.text.tolist()
    others = [*identities(material.others), *identities(material.controls), *text]
    records = len(material.targets) * len(settings.localizers())
    problem = RecordCheck(settings, [sequence.id for sequence in material.others])
    own = dict(until=settings.until, limit=settings.until_limit, samples=settings.until_samples)
    further = {"smallest_sets": own if settings.until else {}, **({"prompts": True} if settings.prompts else {})}
    return open_folder(settings, material.model, material.targets, others, records, problem, further)


def _run_in(
    folder: RunFolder, settings: DeletionSettings, material: Material, figures: Published, engine: Engine
) -> DeletionSummary:
    """Make the records that the folder lacks, and summarize them."""
    jobs = _jobs(settings, material, folder.config["extents"])
    with settings.memory_budget(material.model), fast_products(material.model.cfg.device):
        keys = tuple((target.id, BEFORE, 0.0) for target in material.targets)
        # one job, which is done here, where the model is loaded already
        before = run_jobs(lambda: partial(_before, material), [Job(keys, BEFORE)], folder)
        make_worker = MakeWorker(settings, folder.config, tuple(before), material)
        run_jobs(make_worker, jobs, folder, engine, description="DEL")
        summary = _summary(settings, material, folder, before)
        summary["published"] = figures
        if material.text is not None:
            summary["text"] = text_interval(material)
    folder.write_summary(summary)
    return summary


def _summary(
    settings: DeletionSettings, material: Material, folder: RunFolder, before: list[Record]
) -> DeletionSummary:
    """Summarize all methods and ratios that the folder has for the targets, in the order of targets."""
    names = [metric.name for metric in (*METRICS, *PROMPT_METRICS)]
    order = {target.id: index for index, target in enumerate(material.targets)}
    methods = list(folder.config["methods"])
    measured = [r for r in folder.records if r["method"] != BEFORE and r["sequence"] in order]
    measured.sort(key=lambda record: (methods.index(record["method"]), order[record["sequence"]]))
    return {
        "benchmark": "del",
        "model": settings.model,
        "component": settings.component,
        "sequences": len(material.targets),
        "scope": settings.scope,
        "before": summarize(before, names)[BEFORE]["0.0"],
        "methods": summarize([record for record in measured if record["ratio"] != SMALLEST], names),
        "published": {},
        **summarized(measured, case_count(settings), names, folder.config["smallest_sets"]),
    }


def check_ratios(settings: DeletionSettings, model: HookedModel) -> None:
    """Refuse ratios that take no component.

    Raises:
        ValueError: stating the smallest ratio that takes one.
    """
    component = component_of(settings.component)
    layers, *unit = component.shape(model)
    width = torch.Size(unit).numel()
    for ratio in settings.ratios:
        total = width if settings.scope == "layer" else width * (layers - settings.first_layer)
        count_of(ratio, total, plural=component.plural)


@may_be_quiet
def load_material(settings: DeletionSettings) -> Material:
    """Load everything that a run reads.

    Raises:
        ValueError: for data or text that cannot be used with the model.
    """
    model = settings.load_model()
    check_first_layer(settings.first_layer, model.cfg.n_layers)
    load = partial(load_sequences, model, settings.data, prompt_len=settings.prompt_len, bos=settings.bos)
    memorized, controls = load(), load("control")
    _check_ids(memorized + controls, settings.data)
    text = means = None
    if model.tokenizer is not None:
        texts = load_texts(settings.text or HELD_OUT)
        text = text_rows(model, texts, settings.text_tokens, bos=settings.bos)
    if settings.ablation == "mean" and text is not None:
        rows = [MemorizedSequence(row, 1) for row in text]
        means = mean_activations(model, rows, component_of(settings.component))
    if text is None and (settings.text or settings.ablation == "mean"):
        raise ValueError(
            f"{settings.model} has no tokenizer to read text with, for the perplexity or the mean ablation"
        )
    return Material(
        model,
        memorized,
        targets=memorized[: settings.limit or None],
        others=drawn(memorized, settings.negatives, settings.seed),
        controls=drawn(controls, settings.controls, settings.seed),
        text=text,
        means=means,
        batch=settings.batch,
        prefix=PrefixCache(model, settings.first_layer),
        prompts=settings.prompts,
    )


def _check_ids(sequences: list[MemorizedSequence], source: object) -> None:
    if len({sequence.id for sequence in sequences}) < len(sequences):
        raise ValueError(f"a test and a control sequence of {source} share an id; every record needs its own")


@dataclass(frozen=True)
class Batched:
    """A method and the sequences that it localizes side by side, by their indices from `start` to before `stop`."""

    method: str
    start: int
    stop: int


def localized_at_once(component: ComponentName, batch: int) -> int:
    """Return how many targets are localized at a time: scores of single weights would be large."""
    return 1 if component == "weight" else batch


def _jobs(settings: DeletionSettings, material: Material, extents: Sequence[int]) -> list[Job]:
    """Return a job for each method and batch of targets, with the keys of those that this run is about."""
    jobs = []
    for start, stop in batches_of(extents, localized_at_once(settings.component, settings.batch)):
        targets = material.targets[start:stop]
        for localizer in settings.localizers() if targets else ():
            method = name_of(localizer)
            keys = tuple((target.id, method, ratio) for target in targets for ratio in settings.measured_at)
            jobs.append(Job(keys, Batched(method, start, stop)))
    return jobs


@dataclass(frozen=True)
class MakeWorker:
    """Make a worker of DEL: in this process with what is loaded, in another one by loading it again.

    Args:
        settings: of the run.
        config: of its folder.
        before: records of the state before any ablation.
        material: loaded from the settings; it stays in this process.
    """

    settings: DeletionSettings
    config: Mapping[str, Any]
    before: tuple[Record, ...]
    material: Material | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return MakeWorker, (self.settings, self.config, self.before)

    def __call__(self) -> Worker:
        """Return a function from jobs to records."""
        if self.material:
            return self._worker(self.material)
        with same_threads(self.config):
            material = load_material(replace(self.settings, device=device_elsewhere(self.config)))
        model, worker = material.model, self._worker(material)
        check_weights(model, self.config)
        budget = self.settings.memory_budget(model)
        return kept_open(worker, same_threads(self.config), budget, fast_products(model.cfg.device))

    def _worker(self, material: Material) -> Worker:
        before = {record["sequence"]: record for record in self.before}
        return partial(_measured, self.settings, self.config, material, before)


def _before(material: Material, job: Job) -> Iterator[Record]:
    """Record the state before any ablation: every metric of each target, and the accuracy of all sequences."""
    check_losses(material.model, material.targets, material.batch)
    free = recited(material, material.targets, material.batch)
    state = State(material, {target.id: own for target, own in zip(material.targets, free, strict=True)})
    for target in material.targets:
        if (target.id, BEFORE, 0.0) in job.keys:
            memorized = {sequence.id: state.forced(sequence).acc for sequence in [target, *material.others]}
            yield {
                "sequence": target.id,
                "method": BEFORE,
                "ratio": 0.0,
                **measure(state, target),
                **sample(state, target),
                "accuracies": memorized,
            }


SECONDS = ("localize_seconds", "evaluate_seconds")


class RecordCheck:
    """Tell what a record of DEL lacks: those of the state before have the accuracies of all sequences, and those of a
    method all metrics that the state before has.

    Args:
        settings: of the run.
        others: ids of the sequences that damage is measured on.
    """

    def __init__(self, settings: DeletionSettings, others: list[str]) -> None:
        self._count, self._others = case_count(settings), others
        self._metrics: dict[str, list[str]] = {}

    def __call__(self, record: Record, config: Mapping[str, Any]) -> str | None:
        """Return what is wrong with a record of a run with a configuration, None if nothing is."""
        ids = [record["sequence"], *self._others]
        if record["method"] == BEFORE:
            self._metrics[record["sequence"]] = [
                name for name, value in record.items() if name not in KEY and isinstance(value, int | float)
            ]
            return lacks(record, ["self_acc", "self_free_acc"], {"accuracies": ids})
        metrics = self._metrics.get(record["sequence"], [])
        own = ["reached"] if record["ratio"] == SMALLEST else []
        return foreign(record, config) or lacks(record, [self._count, *own, *metrics, *SECONDS], {"acc_changes": ids})


@dataclass(frozen=True)
class Case:
    """The components that a method has located for a target at a ratio."""

    target: MemorizedSequence
    method: str
    ratio: float
    located: ComponentSet
    localize_seconds: float
    further: Record = field(default_factory=dict)
    """What the record has beside."""


def _measured(
    settings: DeletionSettings, config: Mapping[str, Any], material: Material, before: dict[str, Record], job: Job
) -> Iterator[Record]:
    """Localize a batch of targets with a method, and measure each target at each ratio that is missing."""
    batched: Batched = job.content
    targets = material.memorized[batched.start : batched.stop]
    localizer = next(method for method in settings.localizers() if name_of(method) == batched.method)

    def compute() -> dict[str, Tensor]:
        started = time.perf_counter()
        scores = checked_scores(localizer, material.model, targets, component_of(settings.component))
        return {"scores": scores, "seconds_each": torch.tensor((time.perf_counter() - started) / len(targets))}

    of = origin(config, batched.method, batched.start, batched.stop)
    kept = kept_scores(score_file(settings.out, batched.method, batched.start), compute, of)
    seconds = round(kept["seconds_each"].item(), 3)
    cases = [
        Case(target, batched.method, ratio, located(settings, scores, ratio), seconds)
        for target, scores in zip(targets, kept["scores"], strict=True)
        for ratio in settings.ratios
    ]
    yield from _records(settings, material, before, job, cases)
    if settings.budget and any(ratio == SMALLEST for *_, ratio in job.keys):
        pairs = zip(targets, kept["scores"], strict=True)
        found = [(target, *settings.budget.located(material, target, scores)) for target, scores in pairs]
        cases = [Case(target, batched.method, SMALLEST, chosen, seconds, own) for target, chosen, own in found]
        yield from _records(settings, material, before, job, cases)


def _records(
    settings: DeletionSettings, material: Material, before: dict[str, Record], job: Job, cases: list[Case]
) -> Iterator[Record]:
    """Measure the cases whose records are missing."""
    if not any((case.target.id, case.method, case.ratio) in job.keys for case in cases):
        return
    # all cases generate together, also when some are recorded, so that a resumed run has the same batches
    for case, free in zip(cases, _free_matches(settings, material, cases), strict=True):
        if (case.target.id, case.method, case.ratio) in job.keys:
            yield _record(settings, material, before[case.target.id], case, free)


def located(settings: DeletionSettings, scores: Tensor, ratio: float) -> ComponentSet:
    """Return the components that a run drops, given the scores of one target."""
    component = component_of(settings.component)
    return top_components(scores, ratio, settings.first_layer, settings.scope, component=component)


def _free_matches(settings: DeletionSettings, material: Material, cases: list[Case]) -> list[Recited]:
    """Return the free-running matches of each case's target, generated side by side, each row with its own ablation."""
    found: dict[int, Recited] = {}
    targets = [case.target for case in cases]
    for indices, _ in equal_length_batches(targets, material.batch):
        rows = [targets[index] for index in indices]
        with _ablated(settings, material, [cases[index].located for index in indices]):
            found |= zip(indices, recited(material, rows, batch=len(rows)), strict=True)
    return [found[index] for index in range(len(cases))]


def _record(settings: DeletionSettings, material: Material, before: Record, case: Case, free: Recited) -> Record:
    started = time.perf_counter()
    with _ablated(settings, material, case.located):
        state = State(material, {case.target.id: free})
        after = measure(state, case.target)
        seen = sample(state, case.target)
        accuracies = {id: state.forced(sequence).acc for id, sequence in _memorized(material, case.target).items()}
    return {
        "sequence": case.target.id,
        "method": case.method,
        "ratio": case.ratio,
        case_count(settings): len(case.located),
        **case.further,
        **{name: round(value - before[name], 6) for name, value in after.items() if name in before},
        **seen,
        "acc_changes": {id: round(value - before["accuracies"][id], 4) for id, value in accuracies.items()},
        "localize_seconds": case.localize_seconds,
        "evaluate_seconds": round(time.perf_counter() - started, 3),
    }


def case_count(settings: DeletionSettings) -> str:
    """Return the name of the field with the number of dropped components: neurons, heads or weights."""
    return component_of(settings.component).plural


def _memorized(material: Material, target: MemorizedSequence) -> dict[str, MemorizedSequence]:
    return {sequence.id: sequence for sequence in [target, *material.others]}


def _ablated(
    settings: DeletionSettings, material: Material, components: ComponentSet | list[ComponentSet]
) -> AbstractContextManager[None]:
    return ablate(material.model, components, settings.ablation, over=() if material.means is None else material.means)


def show(settings: DeletionSettings, summary: DeletionSummary) -> None:
    """Print the table of a run, one block a ratio."""
    plural = component_of(summary["component"]).plural
    whose: Literal["all", "each layer's"] = "all" if summary["scope"] == "global" else "each layer's"
    print_comparison(
        summary,
        f"DEL on {summary['model']}, {summary['sequences']} sequences: change when the located {plural} are dropped "
        "(accuracies in points, distances in characters)",
        lambda ratio: f"{100 * float(ratio):g}% of {whose} {plural}",
        lambda ratio: METRICS,
        [
            f"PPL is of {text['tokens']} tokens: {text['mean']:.1f} before, 95% interval {text['low']:.1f} to "
            f"{text['high']:.1f} over rows of the text"
            for text in [summary.get("text")]
            if text
        ],
    )
    if "smallest_sets" in summary:
        print_smallest(summary, METRICS)
    print(f"\nrecords, scores and summary: {visible(settings.out)}")
