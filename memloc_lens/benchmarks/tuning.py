"""Choose the learned masks' settings on the dev sequences, which no benchmark measures on.

1. Write each dev text into the model, as INJ does.
2. Train every mask of the grid on it: the values that Chang et al. (2024) released for their models. Penalties weigh
   a mean over all neurons, so they are taken per neuron and multiplied by the neurons of the model at hand.
3. Of each method, the settings with the highest recall, as a share of its ceiling, are chosen.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import product
from typing import Any

from tqdm import tqdm
from transformer_lens import HookedTransformer

from memloc_lens.benchmarks.runner import RunSettings, open_folder
from memloc_lens.benchmarks.statistics import summarize
from memloc_lens.injection import Injection
from memloc_lens.localizers import HardConcrete, Slimming
from memloc_lens.metrics import recall, recall_ceiling
from memloc_lens.neurons import top_neurons
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
"""Values to be tried of each method: the released ones for INJ and DEL, penalties divided by the number of neurons."""


InjectCell = Callable[[MemorizedSequence, float, int], AbstractContextManager[Injection]]
"""Opens an injection of a text at a ratio, with the place of the text in the data."""


def tune(
    settings: RunSettings, model: HookedTransformer, texts: list[MemorizedSequence], inject_cell: InjectCell
) -> dict[str, Any]:
    """Try the grid on the dev texts, and write what was chosen to `tuned.toml`, which ``--config`` reads.

    Args:
        settings: of the run that the choice is for; steps and stops of the masks are taken from it.
        model: to inject into.
        texts: of the dev split.
        inject_cell: how to.

    Returns:
        What `summary.json` holds: for each setting `tried` and ratio the share of the ceiling with its interval, in
        points, and the settings `chosen` of each method, with the highest mean over the ratios.

    Raises:
        ValueError: if no learned mask is among the methods, or no injection succeeds.
    """
    grids = {
        method: [*candidates(settings.localizer(method), method, model.cfg.n_layers * model.cfg.d_mlp)]
        for method in settings.methods
        if method in GRIDS
    }
    if not grids:
        raise ValueError(f"methods are {' '.join(settings.methods)}; only {' and '.join(GRIDS)} have a grid to try")
    tried = {name_of(localizer, method): localizer for method in grids for localizer in grids[method]}
    cells = [(place, text, ratio) for place, text in enumerate(texts) for ratio in settings.ratios]
    folder = open_folder(settings, model, texts, [], records=len(cells) * len(tried))
    with tqdm(total=len(cells) * len(tried), initial=len(folder.records), desc="tuning", unit="mask") as progress:
        for place, text, ratio in cells:
            left = [name for name in tried if (text.id, name, ratio) not in folder]
            if not left:
                continue
            with inject_cell(text, ratio, place) as injected:
                for name in left if injected.succeeded else ():
                    found = top_neurons(tried[name](model, text), ratio, rounding="nearest")
                    share = 100 * recall(injected.neurons, found) / recall_ceiling(injected.neurons, ratio)
                    folder.append({"sequence": text.id, "method": name, "ratio": ratio, "recall_of_ceiling": share})
                    progress.update()
    if not folder.records:
        raise ValueError(f"none of the {len(cells)} injections succeeded; take larger ratios")
    results = summarize(folder.records, ["recall_of_ceiling"])
    chosen = {method: max((name_of(each, method) for each in grids[method]), key=_mean_of(results)) for method in grids}
    lines = [
        line
        for method, name in chosen.items()
        for line in (f"[{method}]", *(f"{field} = {getattr(tried[name], field)}" for field in fields_of(method)), "")
    ]
    (settings.out / "tuned.toml").write_text("\n".join(lines))
    summary = {
        "benchmark": "tuning",
        "model": settings.model,
        "sequences": len(texts),
        "tried": results,
        "chosen": chosen,
    }
    folder.write_summary(summary)
    return summary


def _mean_of(results: dict[str, Any]) -> Callable[[str], float]:
    """The mean over the ratios of what a setting reached."""
    return lambda name: sum(cell["recall_of_ceiling"]["mean"] for cell in results[name].values())


def candidates(localizer: HardConcrete | Slimming, method: str, neurons: int) -> Iterator[HardConcrete | Slimming]:
    """The localizer with each combination of its grid; all that the grid does not name stays."""
    grid = GRIDS[method]
    for values in product(*grid.values()):
        named: dict[str, Any] = dict(zip(grid, values, strict=True))
        penalty = float(f"{named.pop('penalty_each') * neurons:.2g}")
        yield replace(localizer, penalty=penalty, **named)


def fields_of(method: str) -> list[str]:
    """The settings of a method that its grid decides."""
    return ["penalty" if name == "penalty_each" else name for name in GRIDS[method]]


def name_of(localizer: HardConcrete | Slimming, method: str) -> str:
    """A localizer with the settings that its grid decides, as one name."""
    return f"{method} " + " ".join(f"{field}={getattr(localizer, field):g}" for field in fields_of(method))
