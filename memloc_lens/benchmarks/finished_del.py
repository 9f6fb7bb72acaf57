"""A finished DEL run once more: its model, its targets, and the components that it dropped."""

from collections.abc import Iterator
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor

from memloc_lens.benchmarks.deletion import DeletionSettings, localized_at_once, located
from memloc_lens.checks import check_choice
from memloc_lens.components import ComponentSet
from memloc_lens.data import load_sequences
from memloc_lens.library_types import HookedModel
from memloc_lens.models import load_model
from memloc_lens.runs.fingerprint import fingerprint
from memloc_lens.runs.finished import FinishedRun
from memloc_lens.runs.scores import origin
from memloc_lens.runs.settings import Precision, batches_of, identities
from memloc_lens.sequence import MemorizedSequence

DROPPED_BY = ("component", "first_layer", "scope", "batch")
"""The settings that decide which components a run drops."""


def _check_configured(run: FinishedRun, *names: str) -> None:
    missing = [name for name in names if name not in run.config]
    if missing:
        raise ValueError(f"{run.path / 'config.json'} has no {missing[0]}; run DEL again in a new folder")


def load_same_model(run: FinishedRun, device: str | None = None, n_devices: int = 1) -> HookedModel:
    """Load the model of a run.

    Args:
        run: of DEL.
        device: of the model. Default: CUDA if there is one, else the CPU.
        n_devices: number of GPUs that share its layers.

    Raises:
        ValueError: if the configuration is not complete, or the weights are not those of the run.
    """
    _check_configured(run, "model", *DROPPED_BY, "data")
    dtype = run.config.get("dtype", "float32")
    check_choice("dtype", dtype, get_args(Precision))
    model = load_model(
        run.config["model"],
        device=device,
        n_devices=n_devices,
        dtype=getattr(torch, dtype),
        backend=run.config.get("backend"),
    )
    weights = fingerprint(model)
    if run.config.get("weights", weights) != weights:
        raise ValueError(f"the weights of {run.config['model']} differ from those that {run.path} is a run of")
    return model


def targets_of(run: FinishedRun, model: HookedModel, ratio: float) -> list[MemorizedSequence]:
    """Return the sequences that the run was about, in the order of its scores.

    Raises:
        ValueError: if the data has changed, or a method lacks records at the ratio.
    """
    sequences = load_sequences(
        model, run.config["data"], prompt_len=run.config.get("prompt_len"), bos=run.config.get("bos")
    )
    by_id = {sequence.id: sequence for sequence in sequences}
    in_records = list(dict.fromkeys(record["sequence"] for record in run.records))
    ids = [id for id, _ in run.config.get("sequences", []) if id in in_records] or in_records
    missing = [id for id in ids if id not in by_id]
    if missing:
        raise ValueError(f"{run.config['data']} has no sequence {missing[0]!r}, which {run.path} is about")
    targets = [by_id[id] for id in ids]
    if "sequences" in run.config and identities(targets) != run.config["sequences"][: len(targets)]:
        raise ValueError(f"the sequences of {run.config['data']} differ from those that {run.path} is about")
    for method in run.methods:
        if len(run.at(method, ratio)) < len(targets):
            raise ValueError(
                f"{run.path} has {len(run.at(method, ratio))} of {len(targets)} sequences of {method} at the ratio "
                f"{ratio}; name the method in a run of DEL there to complete it"
            )
    return targets


def dropping(run: FinishedRun) -> DeletionSettings:
    """Return the settings by which a run chose components.

    Raises:
        ValueError: if its configuration lacks one.
    """
    _check_configured(run, *DROPPED_BY)
    return DeletionSettings(**{name: run.config[name] for name in DROPPED_BY})


def target_scores(run: FinishedRun, method: str, targets: int) -> Iterator[Float[Tensor, " layer *unit"]]:
    """Yield the scores that a run kept of each of its targets."""
    dropped = dropping(run)
    batches = batches_of(run.config.get("extents", [targets]), localized_at_once(dropped.component, dropped.batch))
    for start, stop in (batch for batch in batches if batch[0] < targets):
        of = origin(run.config, method, start, stop) if "weights" in run.config else None
        yield from run.scores(method, start, of=of)["scores"][: targets - start]


def located_sets(run: FinishedRun, method: str, ratio: float, targets: int) -> list[ComponentSet]:
    """Return the components that a run dropped for each of its targets."""
    return [located(dropping(run), scores, ratio) for scores in target_scores(run, method, targets)]
