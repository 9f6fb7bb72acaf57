"""Choose the settings of the learned masks on the dev sequences, on which no benchmark measures.

1. Inject each dev text into the model, as INJ does.
2. Train every mask of the grid on it: the settings that Chang et al. (2024) released for their models. A penalty
   weighs a mean over all components, so the grid holds penalties a component, to be multiplied by their number.
3. Of each method, the settings with the highest recall, as a share of its ceiling, are chosen.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import product
from math import prod
from typing import Any

from memloc_lens.components import component_of, top_components
from memloc_lens.injection import Injection
from memloc_lens.library_types import HookedModel
from memloc_lens.localizers import HardConcrete, Slimming
from memloc_lens.metrics import recall, recall_ceiling
from memloc_lens.runs.jobs import Engine, Job, Worker, run_jobs, serial
from memloc_lens.runs.methods import name_of
from memloc_lens.runs.records import lacks
from memloc_lens.runs.schema import ByMethod, Record, TuningSummary
from memloc_lens.runs.settings import RunSettings, open_folder
from memloc_lens.runs.statistics import summarize
from memloc_lens.sequence import MemorizedSequence

GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
    "hard-concrete": {
        "lr": (5e-3, 1e-2),
        "penalty_each": (0.0015, 0.0027, 0.0061, 0.027),
        "init": (0.2, 0.5, 0.9),
        "temperature": (0.33, 0.67),
    },
    "slimming": {"lr": (1e-3, 5e-3, 1e-2), "penalty_each": (0.019, 0.092, 0.26, 0.41)},
}
"""Values to try of each method: the released ones for INJ and DEL, penalties divided by the number of neurons."""

InjectText = Callable[[int, float], AbstractContextManager[Injection]]
"""Opens an injection of the text with an index, at a ratio."""


def tune(
    settings: RunSettings,
    model: HookedModel,
    texts: list[MemorizedSequence],
    inject_text: InjectText,
    engine: Engine = serial,
) -> TuningSummary:
    """Try the grid on the dev texts, and write the chosen settings to `tuned.toml`, which ``--config`` reads.

    Args:
        settings: of the run that the choice is for; steps and stops of the masks are taken from it.
        model: to inject into.
        texts: of the dev split.
        inject_text: injects one of them.
        engine: runs the jobs.

    Returns:
        The content of `summary.json`: for each setting `tried` and ratio the share of the ceiling with its confidence
        interval, in points, and the settings `chosen` of each method, with the highest mean over the ratios.

    Raises:
        ValueError: if no injection succeeds.
    """
    components = prod(component_of(settings.component).shape(model))
    grids = {
        name_of(localizer): list(candidates(localizer, components))
        for localizer in settings.localizers()
        if isinstance(localizer, HardConcrete | Slimming)
    }
    tried = {label_of(localizer): localizer for grid in grids.values() for localizer in grid}
    cells = [(index, ratio) for index in range(len(texts)) for ratio in settings.ratios]
    jobs = [Job(tuple((texts[index].id, label, ratio) for label in tried), (index, ratio)) for index, ratio in cells]

    def make_worker() -> Worker:
        return lambda job: _records(model, texts, tried, inject_text, job)

    with open_folder(settings, model, texts, [], len(cells) * len(tried), _problem) as folder:
        records = run_jobs(make_worker, jobs, folder, engine, description="tuning", unit="mask")
        if not records:
            raise ValueError(f"none of the {len(cells)} injections succeeded; take larger ratios")
        results = summarize(records, ["recall_of_ceiling"])
        chosen = {
            method: max(map(label_of, grid), key=lambda label: _sum(results, label)) for method, grid in grids.items()
        }
        lines = [
            line
            for method, label in chosen.items()
            for line in (f"[{method}]", *(f"{name} = {getattr(tried[label], name)}" for name in fields_of(method)), "")
        ]
        folder.write("tuned.toml", "\n".join(lines))
        summary: TuningSummary = {
            "benchmark": "tuning",
            "model": settings.model,
            "sequences": len(texts),
            "tried": results,
            "chosen": chosen,
        }
        folder.write_summary(summary)
    return summary


def _problem(record: Record, config: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a record, None if nothing is."""
    return lacks(record, ["recall_of_ceiling"], {})


def _records(
    model: HookedModel,
    texts: list[MemorizedSequence],
    tried: dict[str, HardConcrete | Slimming],
    inject_text: InjectText,
    job: Job,
) -> Iterator[Record]:
    index, ratio = job.content
    with inject_text(index, ratio) as injected:
        gold = injected.ground_truth
        for id, label, _ in job.keys if injected.succeeded else ():
            scores = tried[label](model, texts[index])
            found = top_components(scores, ratio, rounding="nearest", component=gold.component)
            share = 100 * recall(gold, found) / recall_ceiling(gold, ratio)
            yield {"sequence": id, "method": label, "ratio": ratio, "recall_of_ceiling": share}


def _sum(results: ByMethod, label: str) -> float:
    """Add up what a setting reached at the ratios."""
    return sum(cell["recall_of_ceiling"]["mean"] for cell in results[label].values())


def candidates(localizer: HardConcrete | Slimming, components: int) -> Iterator[HardConcrete | Slimming]:
    """Yield the localizer with every combination of its grid; its other settings stay."""
    grid = GRIDS[name_of(localizer)]
    for values in product(*grid.values()):
        named: dict[str, Any] = dict(zip(grid, values, strict=True))
        penalty = float(f"{named.pop('penalty_each') * components:.2g}")
        yield replace(localizer, penalty=penalty, **named)


def fields_of(method: str) -> list[str]:
    """Return the settings of a method that its grid decides."""
    return ["penalty" if name == "penalty_each" else name for name in GRIDS[method]]


def label_of(localizer: HardConcrete | Slimming) -> str:
    """Return a label for a localizer with the settings that its grid decides."""
    method = name_of(localizer)
    return f"{method} " + " ".join(f"{name}={getattr(localizer, name):g}" for name in fields_of(method))
