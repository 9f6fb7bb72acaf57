"""Erase sequences from a model: locate, choose one set for all, and write the checkpoint without it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from memloc_lens.checks import check_model
from memloc_lens.components import ComponentName, Scope, component_of
from memloc_lens.erase.checkpoint import check_target, write_checkpoint
from memloc_lens.erase.choosing import Erasure, check_extracted, choose
from memloc_lens.erase.damage import Budget, Spared, Utility
from memloc_lens.library_types import HookedModel
from memloc_lens.localizers import IterativeGradient, Protect
from memloc_lens.localizers.scoring import AnyLocalizer
from memloc_lens.runs.fingerprint import fingerprint
from memloc_lens.runs.methods import checked_scores, configured, context_of, settings_of
from memloc_lens.runs.provenance import provenance
from memloc_lens.runs.settings import identities, identity
from memloc_lens.sequence import MemorizedSequence, check_sequences
from memloc_lens.smallest_set import Until

# chosen on the embedded model's dev sequences: sets of single weights are a few thousandths of all
PRESETS: Mapping[str, Mapping[str, AnyLocalizer]] = {
    "weight": {"iterative-gradient": IterativeGradient(max_ratio=0.02)}
}
"""For each kind of component, the settings of methods that erasing uses."""


def erase_sequences(
    model: HookedModel,
    sequences: Sequence[MemorizedSequence],
    localizer: AnyLocalizer | None = None,
    *,
    spared: Spared,
    context: Sequence[MemorizedSequence] = (),
    budget: Budget = Budget(),  # noqa: B008 (it is frozen)
    until: Until = "unextractable",
    limit: float | None = None,
    first_layer: int = 1,
    scope: Scope = "global",
    component: ComponentName = "weight",
    source: str | Path | None = None,
    out: str | Path | None = None,
) -> Erasure:
    """Choose a set of components without which no sequence can be extracted, and write the checkpoint without it.

    The function is not called `memloc_lens.erase`, since that is the package.

    Args:
        model: as `load_model` returns it; its weights stay as they are.
        sequences: to erase.
        localizer: gets the component, the first layer and the scope, if it has such settings. Default:
            `IterativeGradient`, inside `Protect` if there is a context.
        spared: what should stay as it is, and is measured.
        context: other text that the localizer may read, disjoint from all that is measured.
        budget: how much may be lost.
        until: what must be below the limit with every prompt, as for `choose`.
        limit: in tokens, in points, or a probability, as for `choose`.
        first_layer: layers before it are left alone.
        scope: take the highest scores of every layer, or of all layers together.
        component: kind of component: weight (the least damage), neuron (the least memory), or head.
        source: what `model` was loaded from, as for `load_model`.
        out: folder to write, which must not exist. Default: none is written.

    Returns:
        What was chosen. If it costs more than the budget allows, or a sequence is still extracted, nothing is written:
        see `Erasure.succeeded`.

    Raises:
        ValueError: if an argument cannot be used, none of the sequences can be extracted, or they share text with what
            is spared or the context.

    Example:
        >>> others = load_sequences(model)[100:104]
        >>> erasure = erase_sequences(model, [sequence], spared=Spared(others=others), out="erased")
        >>> erasure.succeeded, Path("erased/model.safetensors").is_file()
        (True, True)
    """
    model, sequences = check_model(model), check_sequences(model, sequences)
    if out is not None:
        check_target(source, Path(out).expanduser())
    localizer = localizer or default_localizer(context, first_layer, scope, component)
    localizer = configured(localizer, component, context, first_layer=first_layer, scope=scope)
    spared.check_disjoint(sequences, context_of(localizer))
    check_extracted(model, sequences, until, limit)
    kind = component_of(component)
    scores = checked_scores(localizer, model, sequences, kind)
    erasure = choose(
        model,
        sequences,
        scores,
        spared,
        budget,
        until=until,
        limit=limit,
        first_layer=first_layer,
        scope=scope,
        component=kind,
    )
    if out is not None and erasure.succeeded:
        about = described(erasure, model, sequences, localizer)
        write_checkpoint(source, out, erasure.components, model=model, about=about)
    return erasure


def default_localizer(
    context: Sequence[MemorizedSequence], first_layer: int, scope: Scope, component: ComponentName
) -> AnyLocalizer:
    """Return iterative gradients, which never choose what a context rests on if there is one.

    Example:
        >>> default_localizer((), 1, "global", "weight").max_ratio
        0.02
    """
    localizer = PRESETS.get(component, {}).get(IterativeGradient.name, IterativeGradient())
    localizer = configured(localizer, component, context, first_layer=first_layer, scope=scope)
    return Protect(localizer, tuple(context)) if context else localizer


def described(
    erasure: Erasure, model: HookedModel, sequences: Sequence[MemorizedSequence], localizer: AnyLocalizer
) -> dict[str, Any]:
    """Return what `erasure.json` says of an erasure: when, how and of what, and what was reached.

    It holds no text: sequences, and those of the context that the method has read, are named by their ids and a hash
    of their tokens.
    """
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "by": provenance(),
        "model": {"name": model.cfg.model_name, "weights": fingerprint(model)},
        "sequences": identities(sequences),
        "method": settings_of(localizer),
        "context": [identity(each) for each in dict.fromkeys(context_of(localizer))],
        **reached(erasure),
    }


def reached(erasure: Erasure) -> dict[str, Any]:
    """Return what an erasure has reached, in plain values."""
    return {
        "succeeded": erasure.succeeded,
        "budget": asdict(erasure.budget),
        "until": erasure.until,
        "before": _means(erasure.before),
        "after": _means(erasure.after),
        "losses": asdict(erasure.losses),
        "targets": [asdict(target) for target in erasure.targets],
        "steps": [{**asdict(step), "utility": _means(step.utility)} for step in erasure.steps],
    }


def _means(utility: Utility) -> dict[str, float | None]:
    return {"perplexity": utility.perplexity, "accuracy": utility.accuracy}
