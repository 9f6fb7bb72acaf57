"""What do located neurons hold: this sequence, its kind, or whatever is memorized?

``python -m memloc_lens.benchmarks.specificity RUN_DEL``

Chang et al. (2024), sec. 6, find that the neurons located for one sequence cost others of its kind accuracy too. From
the records and scores of a DEL run, for each method:

1. The confusion matrix: what dropping each target's neurons does to the accuracy of every sequence.
2. How often the target loses more than another sequence: 100 for neurons of the target alone, 50 for neurons of
   nothing in particular.
3. How much the neurons of two sequences overlap (Jaccard), of the same category and of different ones.
4. The neurons that most sequences share, with the tokens on which they fire most.
"""

import json
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import tyro
from jaxtyping import Float
from numpy import ndarray
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformer_lens import HookedTransformer

from memloc_lens.ablation import post
from memloc_lens.data import load_sequences
from memloc_lens.models import load_model
from memloc_lens.neurons import Neurons, top_neurons
from memloc_lens.sequence import MemorizedSequence, decode

CONTEXT = 4  # tokens shown before one on which a neuron fires


@dataclass(frozen=True)
class Settings:
    """What to look at.

    Args:
        run: folder of a finished DEL run.
        ratio: of the run; left out: its largest.
        method: whose confusion matrix and shared neurons are printed; left out: the one that loses the targets the
            most accuracy.
        shared: neurons to list, those that most sequences share.
        tokens: to show for each of them, those on which it fires most.
        device: left out: CUDA where there is one, else the CPU.
        out: a JSON file to write everything to, for all methods.
    """

    run: tyro.conf.Positional[Path]
    ratio: float | None = None
    method: str | None = None
    shared: int = 5
    tokens: int = 6
    device: str | None = None
    out: Path | None = None


def main() -> None:
    """The command line."""
    settings = tyro.cli(Settings, prog="python -m memloc_lens.benchmarks.specificity", description=__doc__)
    try:
        result = analyse(settings)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print_specificity(result, settings.method)
    if settings.out:
        settings.out.write_text(json.dumps(result, indent=1) + "\n")


def analyse(settings: Settings) -> dict[str, Any]:
    """The specificity of every method of a DEL run at one ratio.

    Returns:
        `sequences`, the targets' ids, and for each of the `methods` the `matrix` of accuracy changes in points (rows
        are targets, columns sequences), its means `self`, `related` (another of the target's category) and `unrelated`,
        `target_loses_more` in points, the `overlap` of neuron sets, and the most `shared` neurons.

    Raises:
        ValueError: if the folder holds no such run, or lacks the ratio or the method.
    """
    config, records = _read_run(settings.run)
    ratios = sorted({record["ratio"] for record in records})
    ratio = ratios[-1] if settings.ratio is None else settings.ratio
    methods = list(dict.fromkeys(record["method"] for record in records))
    if ratio not in ratios:
        raise ValueError(f"{settings.run} has no records at the ratio {ratio}; it has {', '.join(map(str, ratios))}")
    if settings.method not in (None, *methods):
        raise ValueError(f"{settings.run} has no method {settings.method!r}; it has {', '.join(methods)}")
    model = load_model(config["model"], device=settings.device)
    by_id = {sequence.id: sequence for sequence in load_sequences(model, config["data"])}
    targets = [by_id[id] for id in dict.fromkeys(record["sequence"] for record in records)]
    result: dict[str, Any] = {"run": str(settings.run), "ratio": ratio, "sequences": [each.id for each in targets]}
    result["categories"] = [list(each.category) for each in targets]
    result["methods"] = {}
    for method in methods:
        at_ratio = {each["sequence"]: each for each in records if (each["method"], each["ratio"]) == (method, ratio)}
        matrix = np.array([[at_ratio[row.id]["acc_changes"].get(column.id, np.nan) for column in targets]
                           for row in targets])  # fmt: skip
        located = _located(settings.run, config, method, ratio, len(targets))
        result["methods"][method] = {
            "matrix": matrix.tolist(),
            **_losses(matrix, targets),
            "overlap": _overlap(located, targets),
            "shared": _shared(model, located, targets, settings),
        }
    return result


def _read_run(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    try:
        config = json.loads((folder / "config.json").read_text())
        summary = json.loads((folder / "summary.json").read_text())
        records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    except OSError as error:
        raise ValueError(f"{folder} holds no finished run: {error.filename}: {error.strerror}") from error
    if summary["benchmark"] != "del":
        raise ValueError(f"{folder} is a run of {summary['benchmark']}; give one of del")
    if any("acc_changes" not in record for record in records):
        raise ValueError(f"the records of {folder} do not tell sequences apart; make them again")
    return config, records


def _located(folder: Path, config: dict[str, Any], method: str, ratio: float, targets: int) -> list[Neurons]:
    """The neurons that a run dropped for each of its targets."""
    located = []
    for start in range(0, targets, config["batch"]):
        file = folder / "scores" / f"{method}-{start:05d}.safetensors"
        try:
            scores = load_file(file)["scores"]
        except (FileNotFoundError, SafetensorError) as error:
            raise ValueError(f"{file} holds no scores: {error}") from error
        located += [top_neurons(each, ratio, config["first_layer"], config["scope"]) for each in scores]
    return located


def _related(one: MemorizedSequence, other: MemorizedSequence) -> bool:
    return bool(set(one.category) & set(other.category))


def _losses(matrix: Float[ndarray, "target sequence"], targets: list[MemorizedSequence]) -> dict[str, float | None]:
    """Means of the matrix on and off its diagonal, and how often the diagonal is lowest, in points."""
    own = np.diag(matrix)[:, None]
    apart = ~np.eye(len(targets), dtype=bool) & ~np.isnan(matrix)
    related = np.array([[_related(row, column) for column in targets] for row in targets]) & apart
    wins = ((own < matrix) + 0.5 * (own == matrix))[apart]
    return {
        "self": float(own.mean()),
        "related": float(matrix[related].mean()) if related.any() else None,
        "unrelated": float(matrix[apart & ~related].mean()) if (apart & ~related).any() else None,
        "target_loses_more": 100 * float(wins.mean()) if apart.any() else None,
    }


def _overlap(located: list[Neurons], targets: list[MemorizedSequence]) -> dict[str, float | None]:
    """Mean Jaccard index of the neurons of two sequences, in points: of one category, of two, and by chance."""
    values: dict[str, list[float]] = {"related": [], "unrelated": []}
    for one, other in combinations(range(len(targets)), 2):
        kind = "related" if _related(targets[one], targets[other]) else "unrelated"
        values[kind].append(100 * located[one].overlap(located[other]))
    means = {kind: fmean(each) if each else None for kind, each in values.items()}
    members = located[0].members
    layers = members[members.any(dim=1)]
    both = (layers.sum(dim=1).double() ** 2 / layers.shape[1]).sum().item()  # of two random sets as large
    return {**means, "chance": 100 * both / (2 * len(located[0]) - both)}


@torch.no_grad()
def _shared(
    model: HookedTransformer, located: list[Neurons], targets: list[MemorizedSequence], settings: Settings
) -> list[dict[str, Any]]:
    """The neurons that belong to most sequences, and the tokens on which they fire most in all of these."""
    counts = Counter(
        (layer, neuron)
        for neurons in located
        for layer, members in enumerate(neurons.per_layer())
        for neuron in members
    )
    shared = counts.most_common(settings.shared)
    names = {post(layer) for (layer, _), _ in shared}
    firing: dict[tuple[int, int], list[tuple[float, str]]] = {place: [] for place, _ in shared}
    for sequence in targets if model.tokenizer is not None else ():
        _, cache = model.run_with_cache(
            sequence.tokens[None].to(model.cfg.device), return_type=None, names_filter=lambda name: name in names
        )
        for (layer, neuron), found in firing.items():
            values = cache[post(layer)][0, :, neuron].tolist()
            found += [(value, _in_context(model, sequence, position)) for position, value in enumerate(values)]
    strongest = {
        place: sorted(found, key=lambda each: -abs(each[0]))[: settings.tokens] for place, found in firing.items()
    }
    return [
        {
            "layer": layer,
            "neuron": neuron,
            "sequences": count,
            "fires_on": [{"activation": round(value, 3), "text": text} for value, text in strongest[layer, neuron]],
        }
        for (layer, neuron), count in shared
    ]


def _in_context(model: HookedTransformer, sequence: MemorizedSequence, position: int) -> str:
    """A token with those before it, marked as in ``of the [Software]``."""
    before = decode(model, sequence.tokens[max(0, position - CONTEXT) : position])
    return f"{before}[{decode(model, sequence.tokens[position : position + 1])}]"


def print_specificity(result: dict[str, Any], method: str | None = None, console: Console | None = None) -> None:
    """Print the methods side by side, then the confusion matrix and the shared neurons of one."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=160)
    methods = result["methods"]
    table = Table(
        title=f"{100 * result['ratio']:g}% of neurons dropped: change of accuracy (points), and overlap of the neurons "
        "(Jaccard, points)",
        title_justify="left",
    )
    for heading in ("method", "target", "its category", "others", "target loses more", "overlap in category", "across",
                    "by chance"):  # fmt: skip
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for name, row in methods.items():
        values = (row["self"], row["related"], row["unrelated"], row["target_loses_more"])
        overlaps = (row["overlap"][kind] for kind in ("related", "unrelated", "chance"))
        table.add_row(name, *("" if value is None else f"{value:.1f}" for value in (*values, *overlaps)))
    console.print(table)
    chosen = method or min(methods, key=lambda name: methods[name]["self"])
    console.print(f"\n{chosen}: accuracy lost (points); rows are targets, columns sequences", highlight=False)
    console.print(matrix_text(methods[chosen]["matrix"]), highlight=False, markup=False)
    for number, id in enumerate(result["sequences"], start=1):
        console.print(f"{number:3} {id} {' '.join(result['categories'][number - 1])}", highlight=False, markup=False)
    console.print(f"\n{chosen}: the neurons of most sequences, and where they fire most", highlight=False)
    for neuron in methods[chosen]["shared"]:
        console.print(
            f"layer {neuron['layer']}, neuron {neuron['neuron']}: {neuron['sequences']} of {len(result['sequences'])}",
            highlight=False,
        )
        for fires in neuron["fires_on"]:
            console.print(f"  {fires['activation']:+8.2f}  {fires['text']!r}", highlight=False, markup=False)


def matrix_text(matrix: list[list[float]]) -> str:
    """A matrix of accuracy changes as whole points lost, in columns; a gain has a plus, a loss no sign."""
    heads = "    " + "".join(f"{column:4}" for column in range(1, len(matrix[0]) + 1))
    rows = (
        f"{row:4}" + "".join("   ." if value != value else f"{_lost(value):>4}" for value in values)
        for row, values in enumerate(matrix, start=1)
    )
    return "\n".join((heads, *rows))


def _lost(change: float) -> str:
    points = round(change)
    return f"+{points}" if points > 0 else str(-points)


if __name__ == "__main__":
    main()
