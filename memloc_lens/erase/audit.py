"""Try to undo an erasure: extraction, relearning and membership signals, before and after, and the damage beside them.

    found = audit(original, erased, targets, others, controls, text)
    write_audit("erased-model", found)

An audit can show that a text is still there. It cannot show that it is gone: only that these attempts failed.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

from jaxtyping import Int
from torch import Tensor

from memloc_lens.checks import check_model
from memloc_lens.erase.claims import MEASURED, NOT_TRIED
from memloc_lens.erase.given import with_prompts
from memloc_lens.erase.page import page
from memloc_lens.erase.parts import Name, relearning_parts, state_parts
from memloc_lens.erase.relations import Groups, by_category
from memloc_lens.erase.relearning import LESSONS, Relearned, Relearning, resurfacing
from memloc_lens.erase.resuming import measured, records_in
from memloc_lens.erase.schema import Audit, Change, LessonResult
from memloc_lens.erase.state import State, Texts, cells
from memloc_lens.library_types import HookedModel
from memloc_lens.runs.disk import write_whole
from memloc_lens.runs.fingerprint import fingerprint
from memloc_lens.runs.provenance import provenance
from memloc_lens.runs.quiet import without_bars
from memloc_lens.runs.schema import Interval
from memloc_lens.runs.statistics import mean_interval
from memloc_lens.sequence import MemorizedSequence
from memloc_lens.smallest_set import Recitation


def audit(
    original: HookedModel,
    erased: HookedModel,
    targets: Sequence[MemorizedSequence],
    others: Sequence[MemorizedSequence],
    controls: Sequence[MemorizedSequence],
    text: Int[Tensor, "row pos"] | None = None,
    *,
    prompts: Mapping[str, Sequence[str]] | None = None,
    retrained: HookedModel | None = None,
    relearning: Relearning | None = None,
    samples: int = 1000,
    share: float = 0.2,
    batch: int = 16,
    quiet: bool = False,
    work: str | Path | None = None,
) -> Audit:
    """Measure what is left of erased sequences, and what else was lost.

    Args:
        original: before the erasure.
        erased: after it. An ablation that is open on it counts, and stays open during relearning: components that are
            switched off cannot learn, while weights that were set to zero can.
        targets: that were erased.
        others: memorized sequences that should stay.
        controls: texts that the original has never seen, for relearning as many as there are targets.
        text: rows of plain text for the perplexity.
        prompts: other prompts for the targets, by their ids: paraphrases, say. Each is followed by the true suffix.
        retrained: a model that was trained without the targets, if there is one.
        relearning: how the erased model is fine-tuned. Default: `Relearning()`.
        samples: number of samples at temperature 1 of which one is to be the exact suffix.
        share: of the tokens, for min-k%.
        batch: maximum number of sequences at a time.
        quiet: show no progress bar.
        work: folder that keeps each part as soon as it is measured, so that an interrupted audit resumes when it is
            called again. What was measured of other weights, sequences or settings, or by other code, is not read.

    Raises:
        ValueError: if both models are one object, a model cannot read a sequence, a target is among the others or the
            controls, there are no targets or no controls, a prompt cannot be used, a loss is not finite, or the work
            folder is in use; with one, also if a model has a hook.

    Example:
        >>> import copy
        >>> from memloc_lens import load_sequences
        >>> erased = copy.deepcopy(model)
        >>> for block in erased.blocks:
        ...     block.mlp.W_out.data[:100] = 0
        >>> controls = load_sequences(model, split="control")[:2]
        >>> quick = Relearning(lr=1e-3, max_steps=2)
        >>> found = audit(model, erased, [sequence], load_sequences(model)[1:4], controls, relearning=quick, quiet=True)
        >>> found["extraction"]["own"]["before"]["prefix"]["mean"]
        48.0
        >>> sorted(found["relearning"])
        ['half', 'itself']
    """
    if check_model(original) is check_model(erased):
        raise ValueError(
            "original and erased are one model; give two: copy.deepcopy(model) is the original, before the erasure"
        )
    given = with_prompts(check_model(original), targets, prompts or {})
    texts, relearning = Texts(targets, others, controls, text, given), relearning or Relearning()
    models = {"original": original, "erased": erased} | ({} if retrained is None else {"retrained": retrained})
    for model in models.values():
        texts.check(check_model(model))
    weights = {name: fingerprint(model) for name, model in models.items()}
    parts = state_parts(models, weights, texts, samples, share, batch)
    parts |= relearning_parts(models, weights, texts, relearning)
    with without_bars() if quiet else nullcontext(), records_in(work, models) as records:
        found = measured(parts, records)
    about = {name: {"name": str(model.cfg.model_name), "fingerprint": weights[name]} for name, model in models.items()}
    settings = dict(samples=samples, min_k_share=share, relearning=asdict(relearning))
    return _audit(about, settings, texts, found)


def _audit(models: dict[str, dict[str, str]], settings: dict[str, Any], texts: Texts, found: dict[Name, Any]) -> Audit:
    before, after = (State.of_plain(found["state", name, ""]) for name in ("original", "erased"))
    targets, groups = texts.targets, texts.groups()
    named = {"targets": targets} | ({"given prompts": texts.given} if texts.given else {}) | groups
    return Audit(
        models=models,
        provenance=provenance(),
        settings=settings,
        texts={name: [each.id for each in group] for name, group in named.items()},
        extraction={
            name: {"before": cells(before.targets[name]), "after": cells(after.targets[name])}
            for name in before.targets
            if cells(before.targets[name])
        },
        targets={target.id: _of_target(before, after, place) for place, target in enumerate(targets)},
        others={
            name: {"before": cells(_rest(texts, before, group)), "after": cells(_rest(texts, after, group))}
            for name, group in groups.items()
        },
        relearning=_lessons(found),
        membership={"before": before.membership, "after": after.membership},
        accuracy={
            "groups": _accuracy(texts, before, after, groups),
            "categories": _accuracy(texts, before, after, by_category(texts.others)),
        },
        perplexity=_perplexity(before, after),
        measured=dict(MEASURED),
        not_tried=list(NOT_TRIED),
    )


def _rest(texts: Texts, state: State, group: Sequence[MemorizedSequence]) -> list[Recitation]:
    found = dict(zip([*texts.others, *texts.controls], state.rest, strict=True))
    return [found[sequence] for sequence in group]


def _of_target(before: State, after: State, place: int) -> dict[str, dict[str, dict[str, float]]]:
    pairs = {name: (before.targets[name][place], after.targets[name][place]) for name in before.targets}
    return {
        name: {"before": asdict(first), "after": asdict(then)}
        for name, (first, then) in pairs.items()
        if first and then
    }


def _lessons(found: dict[Name, Any]) -> dict[str, LessonResult]:
    results: dict[str, LessonResult] = {}
    for lesson in LESSONS:
        relearned: dict[str, dict[str, Relearned]] = {}
        for (part, kind, sequence), lessons in found.items():
            if part == "relearning" and lesson in lessons:
                relearned.setdefault(kind, {})[sequence] = cast(Relearned, {"steps": None} | lessons[lesson])
        if "erased" in relearned:
            steps = {kind: list(of_kind.values()) for kind, of_kind in relearned.items()}
            ours = steps.pop("erased")
            ratios = {kind: resurfacing(ours, theirs) for kind, theirs in steps.items()}
            results[lesson] = LessonResult(relearned=relearned, resurfacing=ratios)
    return results


def _accuracy(texts: Texts, before: State, after: State, groups: Groups) -> dict[str, Change]:
    def accuracies(state: State, group: list[MemorizedSequence]) -> list[float]:
        return [found.accuracy for found in _rest(texts, state, group)]

    return {name: _change(accuracies(before, group), accuracies(after, group)) for name, group in groups.items()}


def _change(before: Sequence[float], after: Sequence[float]) -> Change:
    differences = [then - first for first, then in zip(before, after, strict=True)]
    return Change(before=mean_interval(before), change=mean_interval(differences))


def _perplexity(before: State, after: State) -> Change | None:
    """Return the perplexity before and its rise in percent; of the mean loss over rows, and of its paired change."""
    if not before.losses:
        return None
    losses = _change(before.losses, after.losses)
    return Change(
        before=_mapped(losses["before"], math.exp),
        change=_mapped(losses["change"], lambda change: 100 * math.expm1(change)),
    )


def _mapped(interval: Interval, rising: Callable[[float], float]) -> Interval:
    return Interval(
        mean=rising(interval["mean"]), low=rising(interval["low"]), high=rising(interval["high"]), n=interval["n"]
    )


def write_audit(folder: str | Path, found: Audit) -> None:
    """Write `audit.json` and `AUDIT.md` into a folder.

    Args:
        folder: made if it is not there; files of these names are replaced.
        found: the result of `audit`.

    Raises:
        OSError: if the folder cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    contents = {"audit.json": json.dumps(found, indent=1, allow_nan=False) + "\n", "AUDIT.md": page(found)}
    for name, content in contents.items():
        write_whole(folder / name, partial(Path.write_text, data=content, encoding="utf-8"))
