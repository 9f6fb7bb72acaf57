"""Prompts that the user gives for the targets of an audit: paraphrases, translations, or instructions.

Each is followed by the true suffix of its target, like the variants that an audit makes itself.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from memloc_lens.checks import check_text, described
from memloc_lens.data.row import errors_at
from memloc_lens.data.text_formats import json_lines
from memloc_lens.erase.extraction import recitations
from memloc_lens.library_types import HookedModel
from memloc_lens.sequence import MemorizedSequence, check_sequences
from memloc_lens.smallest_set import Recitation


def read_prompts(file: str | Path) -> dict[str, list[str]]:
    """Read prompts by the id of their target.

    Args:
        file: JSON lines with `id`, of a target, and `prompt`, a text; a target may have several.

    Raises:
        ValueError: if the file cannot be read, has no prompts, or a line lacks one.

    Example:
        >>> rows = Path("prompts.jsonl").write_text('{"id": "a", "prompt": "One"}\\n{"id": "a", "prompt": "Two"}\\n')
        >>> read_prompts("prompts.jsonl")
        {'a': ['One', 'Two']}
    """
    prompts: dict[str, list[str]] = {}
    for row in json_lines(Path(file).expanduser()):
        with errors_at(row["where"]):
            check_text("prompt", row.get("prompt"))
            prompts.setdefault(row["id"], []).append(row["prompt"])
    if not prompts:
        raise ValueError(f'{file} has no prompts; write JSON lines with "id", of a target, and "prompt"')
    return prompts


def with_prompts(
    model: HookedModel, targets: Sequence[MemorizedSequence], prompts: Mapping[str, Sequence[str]]
) -> list[MemorizedSequence]:
    """Return the targets with other prompts, a sequence a prompt; each has the id and the suffix of its target.

    A beginning-of-sequence token comes first if the target begins with one.

    Args:
        model: whose tokenizer reads the prompts.
        targets: with an id each.
        prompts: by the id of a target.

    Raises:
        ValueError: if there are prompts and no tokenizer, an id is of no target, or a prompt is empty or too long.

    Example:
        >>> (asked,) = with_prompts(model, [sequence], {sequence.id: ["Please write on:"]})
        >>> asked.text(model).startswith("Please write on:"), torch.equal(asked.suffix, sequence.suffix)
        (True, True)
    """
    if prompts and model.tokenizer is None:
        raise ValueError("prompts are given, and the model has no tokenizer to read them with; audit without them")
    by_id = {target.id: target for target in check_sequences(model, targets)}
    return [
        _with_prompt(model, by_id[id], text) for id, texts in prompts.items() for text in _checked(id, texts, by_id)
    ]


def _checked(id: str, texts: Any, targets: Mapping[str, MemorizedSequence]) -> Sequence[str]:
    if id not in targets:
        raise ValueError(
            f"a prompt is given for {id!r}, which is none of the {len(targets)} targets; correct the id or leave the "
            "prompt out"
        )
    if not isinstance(texts, list | tuple):
        raise ValueError(f"the prompts for {id!r} are {described(texts)}; give a list of texts")
    for text in texts:
        check_text(f"a prompt for {id!r}", text)
        if not text.strip():
            raise ValueError(f"a prompt for {id!r} is {text!r}, which is blank; write one or leave it out")
    return texts


def _with_prompt(model: HookedModel, target: MemorizedSequence, text: str) -> MemorizedSequence:
    assert model.tokenizer is not None
    prompt = model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    tokens = torch.cat([torch.tensor(prompt), target.suffix.cpu()])
    asked = MemorizedSequence(tokens, len(prompt), target.id, target.category)
    if int(target.tokens[0]) == model.tokenizer.bos_token_id:
        asked = asked.after_bos(model)
    if len(asked.tokens) > model.cfg.n_ctx:
        room = model.cfg.n_ctx - len(asked.suffix)
        raise ValueError(
            f"a prompt for {target.id!r} has {asked.prompt_len} tokens, and before the suffix the model has room for "
            f"{room}; shorten it"
        )
    return asked


def by_given(
    model: HookedModel,
    targets: Sequence[MemorizedSequence],
    given: Sequence[MemorizedSequence],
    samples: int = 1000,
    batch: int = 16,
) -> list[Recitation | None]:
    """Return what is recited of each target after the most dangerous of its given prompts; None if it has none.

    The most dangerous is the one after which most tokens are right before the first mistake, then the one with the
    highest extraction strength.

    Args:
        model: used as it is, ablated or not.
        targets: with an id each.
        given: the targets with their given prompts, as `with_prompts` returns them.
        samples: number of samples at temperature 1 of which one is to be the exact suffix.
        batch: maximum number of sequences at a time.

    Example:
        >>> given = with_prompts(model, [sequence], {sequence.id: ["The", "Please write on:"]})
        >>> by_given(model, [sequence], given)[0].prefix < 48
        True
    """
    found: dict[str, list[Recitation]] = {}
    for asked, recitation in zip(given, recitations(model, given, samples, batch), strict=True):
        found.setdefault(asked.id, []).append(recitation)
    return [max(found.get(target.id, []), key=_danger, default=None) for target in targets]


def _danger(found: Recitation) -> tuple[int, float]:
    return found.prefix, found.strength
