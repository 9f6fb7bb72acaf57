"""Try to undo an erasure: extraction, relearning and membership signals, before and after, and the damage beside them.

    found = audit(original, erased, targets, others, controls, text)
    write_audit("erased-model", found)

An audit can show that a text is still there. It cannot show that it is gone: only that these attempts failed.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformer_lens import HookedTransformer

from memloc_lens.checks import check_model
from memloc_lens.erase.claims import MEASURED, NOT_TRIED
from memloc_lens.erase.page import page
from memloc_lens.erase.relearning import LESSONS, Relearned, Relearning, relearn, resurfacing
from memloc_lens.erase.schema import Audit, Change, LessonResult
from memloc_lens.erase.state import State, Texts, cells, state_of
from memloc_lens.runs.disk import write_whole
from memloc_lens.runs.fingerprint import fingerprint
from memloc_lens.runs.jobs import InMemory, Job, run_jobs
from memloc_lens.runs.provenance import provenance
from memloc_lens.runs.quiet import without_bars
from memloc_lens.runs.schema import Interval, Record
from memloc_lens.runs.statistics import mean_interval
from memloc_lens.sequence import MemorizedSequence
from memloc_lens.smallest_set import Recitation


def audit(
    original: HookedTransformer,
    erased: HookedTransformer,
    targets: Sequence[MemorizedSequence],
    others: Sequence[MemorizedSequence],
    controls: Sequence[MemorizedSequence],
    text: Int[Tensor, "row pos"] | None = None,
    *,
    retrained: HookedTransformer | None = None,
    relearning: Relearning | None = None,
    samples: int = 1000,
    share: float = 0.2,
    batch: int = 16,
    quiet: bool = False,
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
        retrained: a model that was trained without the targets, if there is one.
        relearning: how the erased model is fine-tuned. Default: `Relearning()`.
        samples: number of samples at temperature 1 of which one is to be the exact suffix.
        share: of the tokens, for min-k%.
        batch: maximum number of sequences at a time.
        quiet: show no progress bar.

    Raises:
        ValueError: if both models are one object, a model cannot read a sequence, a target is among the others or the
            controls, there are no targets or no controls, or a loss is not finite.

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
    texts, relearning = Texts(targets, others, controls, text), relearning or Relearning()
    models = {"original": original, "erased": erased} | ({} if retrained is None else {"retrained": retrained})
    for model in models.values():
        texts.check(check_model(model))
    parts = _parts(models, texts, relearning, partial(state_of, texts=texts, samples=samples, share=share, batch=batch))
    with without_bars() if quiet else nullcontext():
        found = _run(parts)
    settings = dict(samples=samples, min_k_share=share, relearning=asdict(relearning))
    return _audit(models, settings, texts, found)


Parts = dict[tuple[str, str, str], Callable[[], Any]]
"""Functions that measure something, by what it is, the model or kind of text, and the id of a sequence."""


def _parts(
    models: dict[str, HookedTransformer], texts: Texts, relearning: Relearning, state: Callable[..., State]
) -> Parts:
    parts: Parts = {("state", name, ""): partial(state, models[name]) for name in ("original", "erased")}
    kinds = {"erased": ("erased", texts.targets), "new": ("erased", texts.controls[: len(texts.targets)])}
    if "retrained" in models:
        kinds["retrained"] = ("retrained", texts.targets)
    groups = texts.groups()
    away = groups.get("related", []) + groups.get("unrelated", [])  # near-duplicates would give the targets away
    for kind, (name, sequences) in kinds.items():
        for sequence in sequences:
            related = [other for other in away if set(other.category) & set(sequence.category)]
            parts["relearning", kind, sequence.id] = partial(relearn, relearning, models[name], sequence, related)
    return parts


def _run(parts: Parts) -> dict[tuple[str, str, str], Any]:
    def worker(job: Job) -> Iterator[Record]:
        part, method, sequence = job.content
        yield {"part": part, "method": method, "sequence": sequence, "found": parts[job.content]()}

    jobs = [Job((key,), key) for key in parts]
    records = run_jobs(lambda: worker, jobs, InMemory("part", "method", "sequence"), description="audit", unit="part")
    return {(record["part"], record["method"], record["sequence"]): record["found"] for record in records}


def _audit(
    models: dict[str, HookedTransformer],
    settings: dict[str, Any],
    texts: Texts,
    found: dict[tuple[str, str, str], Any],
) -> Audit:
    before, after = found["state", "original", ""], found["state", "erased", ""]
    targets, groups = texts.targets, texts.groups()
    return Audit(
        models={
            name: {"name": str(model.cfg.model_name), "fingerprint": fingerprint(model)}
            for name, model in models.items()
        },
        provenance=provenance(),
        settings=settings,
        texts={name: [each.id for each in group] for name, group in ({"targets": targets} | groups).items()},
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
        accuracy={"groups": _accuracy(texts, before, after, groups), "categories": _by_category(texts, before, after)},
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


def _lessons(found: dict[tuple[str, str, str], Any]) -> dict[str, LessonResult]:
    results: dict[str, LessonResult] = {}
    for lesson in LESSONS:
        relearned: dict[str, dict[str, Relearned]] = {}
        for (part, kind, sequence), lessons in found.items():
            if part == "relearning" and lesson in lessons:
                relearned.setdefault(kind, {})[sequence] = lessons[lesson]
        if "erased" in relearned:
            steps = {kind: list(of_kind.values()) for kind, of_kind in relearned.items()}
            ours = steps.pop("erased")
            ratios = {kind: resurfacing(ours, theirs) for kind, theirs in steps.items()}
            results[lesson] = LessonResult(relearned=relearned, resurfacing=ratios)
    return results


def _accuracy(
    texts: Texts, before: State, after: State, groups: dict[str, list[MemorizedSequence]]
) -> dict[str, Change]:
    def accuracies(state: State, group: list[MemorizedSequence]) -> list[float]:
        return [found.accuracy for found in _rest(texts, state, group)]

    return {name: _change(accuracies(before, group), accuracies(after, group)) for name, group in groups.items()}


def _by_category(texts: Texts, before: State, after: State) -> dict[str, Change]:
    categories: dict[str, list[MemorizedSequence]] = {}
    for other in texts.others:
        for category in other.category:
            categories.setdefault(category, []).append(other)
    return _accuracy(texts, before, after, categories)


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
    content = json.dumps(found, indent=1, allow_nan=False) + "\n"
    write_whole(folder / "audit.json", lambda part: part.write_text(content, encoding="utf-8"))
    write_whole(folder / "AUDIT.md", lambda part: part.write_text(page(found), encoding="utf-8"))
