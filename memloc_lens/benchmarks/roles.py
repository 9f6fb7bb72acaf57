"""What do the located neurons do: when do they fire, what do they promote, and are they those that all text needs?

``python -m memloc_lens.benchmarks.roles RUN_DEL``

From the scores of a DEL run on neurons, for each method, as means over its targets:

1. Firing: how much larger the mean absolute activation is on the target's suffix than on other text, as the geometric
   mean of the ratios. 1 for neurons that fire alike on both.
2. Promotion: how many neurons write in favour of the suffix. A neuron promotes the 10 tokens whose unembedding has the
   largest product with what it writes on the suffix, its row of `W_out` with the sign of its mean activation there; it
   counts if one of them is in the suffix.
3. Massive: how many are among the 1% of their layer that write most on other text, by mean absolute activation times
   the norm of the row of `W_out`.

The row `all neurons` is what a random choice would give.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TypedDict

import torch
import tyro
from jaxtyping import Bool, Float, Int
from rich.console import Console
from rich.table import Table
from torch import Tensor

from memloc_lens.benchmarks.context import HELD_OUT
from memloc_lens.benchmarks.finished_del import load_same_model, located_sets, targets_of
from memloc_lens.components import NEURONS, post, top_neurons
from memloc_lens.data import load_texts
from memloc_lens.library_types import HookedModel
from memloc_lens.localizers.baselines import output_norms
from memloc_lens.metrics import text_rows
from memloc_lens.models import check_device
from memloc_lens.runs.command_line import parser, run_command
from memloc_lens.runs.finished import read_run
from memloc_lens.runs.jobs import Engine, InMemory, Job, run_jobs, serial
from memloc_lens.runs.quiet import may_be_quiet
from memloc_lens.runs.schema import Record
from memloc_lens.runs.visible import plain
from memloc_lens.sequence import MemorizedSequence
from memloc_lens.tables.terminal import wide_console

PROMOTED = 10
MASSIVE = 0.01
TEXT_TOKENS = 1024
ALL = "all neurons"


@dataclass(frozen=True)
class RolesSettings:
    """What to analyse.

    Args:
        run: Folder of a finished DEL run on neurons.
        ratio: Ratio of the run. Default: its largest.
        text: Other text: a text file, or JSON lines with "text". Default: held-out text of the embedded model.
        device: Device of the model. Default: CUDA if there is one, else the CPU.
        n_devices: Number of GPUs that share the layers of the model, from the device on.
        quiet: Show no progress bars, neither of the run nor of the libraries.
        out: JSON file to write the result to.
    """

    run: tyro.conf.Positional[Path]
    ratio: float | None = None
    text: Path | None = None
    device: str | None = None
    n_devices: int = 1
    quiet: bool = False
    out: Path | None = None

    def __post_init__(self) -> None:
        check_device(self.device, self.n_devices)


class Roles(TypedDict):
    """What the neurons of a method do: a ratio of activations, and two shares in points."""

    firing: float
    promoting: float
    massive: float


def main() -> None:
    """Run the command line."""
    run_command(parser(RolesSettings, "python -m memloc_lens.benchmarks.roles", __doc__), analyse, show)


@may_be_quiet
def analyse(settings: RolesSettings, engine: Engine = serial) -> dict[str, Roles]:
    """Tell what the neurons do that the methods of a DEL run have located.

    Returns:
        For each method, and for all neurons, means over targets: `firing`, a ratio, and `promoting` and `massive` in
        points.

    Raises:
        ValueError: if the folder holds no such run on neurons, or lacks the ratio, or the model has no tokenizer.
    """
    run = read_run(settings.run, "del")
    if run.config.get("component", NEURONS.name) != NEURONS.name:
        raise ValueError(f"{settings.run} is a run on {run.config['component']}s; give one on neurons")
    ratio = run.check_ratio(settings.ratio, max(run.ratios, default=None))
    model = load_same_model(run, settings.device, settings.n_devices)
    targets = targets_of(run, model, ratio)
    rows = text_rows(model, load_texts(settings.text or HELD_OUT), TEXT_TOKENS, bos=run.config.get("bos"))
    on_text = _sizes(model, [MemorizedSequence(row, 1) for row in rows])
    massive = top_neurons(on_text * output_norms(model, NEURONS), MASSIVE, rounding="nearest").members

    promoted = _promoted(model)
    of_targets = [_of_target(model, target, on_text, promoted) for target in targets]
    everything = torch.ones_like(massive)
    everything[: run.config["first_layer"]] = False

    def worker(job: Job) -> Iterator[Record]:
        for (method,) in job.keys:
            sets = [everything] * len(targets)
            if method != ALL:
                sets = [found.members.to(massive.device) for found in located_sets(run, method, ratio, len(targets))]
            yield {"method": method, "roles": _means(sets, of_targets, massive)}

    jobs = [Job(tuple((method,) for method in (*run.methods, ALL)))]
    records = run_jobs(lambda: worker, jobs, InMemory("method"), engine, "roles", "method")
    return {record["method"]: record["roles"] for record in records}


def _means(
    sets: list[Bool[Tensor, "layer neuron"]],
    of_targets: list[tuple[Float[Tensor, "layer neuron"], Bool[Tensor, "layer neuron"]]],
    massive: Bool[Tensor, "layer neuron"],
) -> Roles:
    pairs = list(zip(sets, of_targets, strict=True))
    return {
        "firing": fmean(firing[members].mean().exp2().item() for members, (firing, _) in pairs),
        "promoting": 100 * fmean(promotes[members].float().mean().item() for members, (_, promotes) in pairs),
        "massive": 100 * fmean(massive[members].float().mean().item() for members in sets),
    }


@torch.no_grad()
def _of_target(
    model: HookedModel,
    target: MemorizedSequence,
    on_text: Float[Tensor, "layer neuron"],
    promoted: Int[Tensor, "sign layer neuron token"],
) -> tuple[Float[Tensor, "layer neuron"], Bool[Tensor, "layer neuron"]]:
    """Return for every neuron how much more it fires on the target, as a power of 2, and whether it promotes it."""
    names = [post(layer) for layer in range(model.cfg.n_layers)]
    _, cache = model.run_with_cache(target.tokens[None].to(model.cfg.device), return_type=None, names_filter=names)
    read = (cache[name][0, target.prompt_len - 1 : -1].float() for name in names)
    on_suffix = torch.stack([values.to(on_text.device) for values in read])
    firing = (on_suffix.abs().mean(dim=1) / on_text.clamp(min=1e-9)).clamp(min=1e-9).log2()
    wanted = torch.zeros(model.cfg.d_vocab_out, dtype=torch.bool, device=firing.device)
    wanted[target.suffix.to(firing.device)] = True
    positive, negative = wanted[promoted].any(dim=-1)
    return firing, torch.where(on_suffix.mean(dim=1) > 0, positive, negative)


@torch.no_grad()
def _promoted(model: HookedModel) -> Int[Tensor, "sign layer neuron token"]:
    """Return the tokens that every neuron promotes most, with a positive and with a negative activation."""
    by_layer = []
    for block in model.blocks:
        written = block.mlp.W_out.float().to(model.W_U.device) @ model.W_U.float()
        promoted = torch.stack([(sign * written).topk(PROMOTED, dim=1).indices for sign in (1, -1)])
        by_layer.append(promoted.to(model.cfg.device))
    return torch.stack(by_layer, dim=1)


@torch.no_grad()
def _sizes(model: HookedModel, sequences: list[MemorizedSequence]) -> Float[Tensor, "layer neuron"]:
    """Return the mean absolute activation of every neuron over all positions."""
    names = [post(layer) for layer in range(model.cfg.n_layers)]
    total = []
    for sequence in sequences:
        _, cache = model.run_with_cache(
            sequence.tokens[None].to(model.cfg.device), return_type=None, names_filter=names
        )
        sizes = (cache[name][0].float().abs().mean(dim=0) for name in names)
        total.append(torch.stack([values.to(model.cfg.device) for values in sizes]))
    return torch.stack(total).mean(dim=0)


def show(settings: RolesSettings, result: dict[str, Roles]) -> None:
    """Print the result, and write it to a file if one is given."""
    print_roles(result)
    if settings.out:
        settings.out.write_text(json.dumps(result, indent=1) + "\n")


def print_roles(result: dict[str, Roles], console: Console | None = None) -> None:
    """Print a row for each method, and one for all neurons."""
    table = Table(title="What the located neurons do", title_justify="left")
    table.add_column("method")
    for heading in ("firing on the suffix (x)", "promoting it (%)", "massive (%)"):
        table.add_column(heading, justify="right")
    for method, own in result.items():
        table.add_row(plain(method), f"{own['firing']:.2f}", f"{own['promoting']:.1f}", f"{own['massive']:.1f}")
    wide_console(console).print(table)


if __name__ == "__main__":
    main()
