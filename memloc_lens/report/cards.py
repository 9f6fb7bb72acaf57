"""Cards of the targets of a DEL run: their text token by token, and what the model writes, before and after."""

from typing import Any

import torch
from rapidfuzz.distance import Levenshtein

from memloc_lens.benchmarks.finished_del import targets_of
from memloc_lens.library_types import HookedModel
from memloc_lens.runs.finished import FinishedRun
from memloc_lens.runs.records import LISTS
from memloc_lens.runs.schema import Record
from memloc_lens.runs.visible import visible
from memloc_lens.sequence import MemorizedSequence, decode

LONGEST = 200
"""Characters of a name."""

BLANKS = "\n\t"
"""Control characters that a page shows as they are."""


def sequence_cards(run: FinishedRun, model: HookedModel) -> list[dict[str, Any]]:
    """Return for each target its tokens as text, and for each state the probabilities and the continuation.

    Args:
        run: of DEL.
        model: of the run; without a tokenizer, tokens are shown as numbers.

    Returns:
        A dictionary for each target: `id`, `category`, `prompt` and `suffix` as lists of texts, the state `before`, and
        `after` by method and ratio. A state has `percent`, the probability of each token of the suffix; `written`, what
        greedy decoding writes; and `wrong`, the ranges of characters in it that the suffix does not have. States of
        runs of earlier versions have neither.
    """
    targets = targets_of(run, model, max(run.ratios))
    after: dict[str, dict[str, Any]] = {target.id: {} for target in targets}
    by_id = {target.id: target for target in targets}
    for record in run.records:
        states = after[record["sequence"]].setdefault(record["method"], {})
        states[f"{record['ratio']:g}"] = _state(model, by_id[record["sequence"]], record)
    return [_card(model, target, run.before[target.id], after[target.id]) for target in targets]


def _card(
    model: HookedModel, target: MemorizedSequence, before: Record, after: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    texts = [_text(model, token[None]) for token in target.tokens]
    return {
        "id": label(target.id),
        "category": label(", ".join(target.category)),
        "prompt": texts[: target.prompt_len],
        "suffix": texts[target.prompt_len :],
        "before": _state(model, target, before),
        "after": after,
    }


def _state(model: HookedModel, target: MemorizedSequence, record: Record) -> dict[str, Any]:
    own: dict[str, Any] = {"self": record["self_acc"], "neg": record.get("neg_acc")}
    if not all(name in record for name in LISTS):
        return own
    written = _text(model, torch.tensor(record["written"]))
    return own | {
        "percent": [round(100 * value) for value in record["probabilities"]],
        "written": written,
        "wrong": differing(written, _text(model, target.suffix)),
    }


def label(text: str) -> str:
    """Return a name as a page shows it: control characters visible, and no longer than a line or two.

    Example:
        >>> from memloc_lens.report.cards import label
        >>> label("a" * 1000)[-2:], len(label("a" * 1000))
        ('a…', 201)
    """
    return visible(text) if len(text) <= LONGEST else f"{visible(text[:LONGEST])}…"


def differing(written: str, wanted: str) -> list[list[int]]:
    """Return the ranges of characters of a text that another does not have, of the fewest edits between them.

    Example:
        >>> from memloc_lens.report.cards import differing
        >>> differing("the cat sat", "the hat sat")
        [[4, 5]]
    """
    edits = Levenshtein.opcodes(written, wanted)
    return [[edit.src_start, edit.src_end] for edit in edits if edit.tag in ("replace", "delete")]


def _text(model: HookedModel, tokens: torch.Tensor) -> str:
    if model.tokenizer is None:
        return "".join(f"{token} " for token in tokens.tolist())
    return visible(decode(model, tokens), keep=BLANKS)
