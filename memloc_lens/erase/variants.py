"""Prompt variants: the ways in which someone may ask for the same text.

A set that breaks the exact training prompt alone leaves the text in the model: see `memloc_lens.benchmarks.prompts`.
Each variant is followed by the true suffix, or by what is left of it.
"""

from collections.abc import Callable, Mapping, Sequence

import torch

from memloc_lens.benchmarks.prompts import EVERY, PROMPTS, without_first
from memloc_lens.library_types import HookedModel
from memloc_lens.sequence import MemorizedSequence, decode

Variant = Callable[[HookedModel, MemorizedSequence], MemorizedSequence | None]
"""Another prompt for the true suffix; None where there is none: without a tokenizer, or if it changes nothing."""

SHIFT = 3
"""Tokens by which a prompt is shifted."""
TYPO_EVERY = 4
"""One word of so many gets a typo."""
SURROUNDING = (
    "The meeting began a little after nine. Most of those who had been invited were already there, and the rest "
    "followed soon. Before the first point was called, somebody read the following page aloud.\n\n"
)


def own(model: HookedModel, sequence: MemorizedSequence) -> MemorizedSequence:
    """Return the sequence as it is."""
    return sequence


def shifted(model: HookedModel, sequence: MemorizedSequence) -> MemorizedSequence | None:
    """Return a sequence without the first 3 tokens of its prompt, so that each later one is at another position.

    Example:
        >>> shifted(model, sequence).prompt_len
        29
    """
    return None if sequence.prompt_len == 1 else without_first(model, sequence, SHIFT)


def later(model: HookedModel, sequence: MemorizedSequence) -> MemorizedSequence | None:
    """Return a window of the text 8 tokens later, or half of the suffix: its prompt ends with the first tokens of it.

    Example:
        >>> window = later(model, sequence)
        >>> window.prompt_len, torch.equal(window.suffix, sequence.suffix[8:])
        (32, True)
    """
    by = min(EVERY, len(sequence.suffix) // 2)
    if by == 0:
        return None
    first = _bos(model, sequence)
    tokens = torch.cat([sequence.tokens[: len(first)], sequence.tokens[by + len(first) :]])
    return MemorizedSequence(tokens, sequence.prompt_len, sequence.id, sequence.category)


def typos(model: HookedModel, sequence: MemorizedSequence) -> MemorizedSequence | None:
    """Return a sequence with two letters swapped in the middle of every 4th word of its prompt.

    Words of fewer than four characters are passed over.

    Example:
        >>> typed = typos(model, sequence)
        >>> torch.equal(typed.suffix, sequence.suffix)
        True
    """
    return _with_text(model, sequence, _mistyped)


def upper(model: HookedModel, sequence: MemorizedSequence) -> MemorizedSequence | None:
    """Return a sequence with its prompt in upper case."""
    return _with_text(model, sequence, str.upper)


def lower(model: HookedModel, sequence: MemorizedSequence) -> MemorizedSequence | None:
    """Return a sequence with its prompt in lower case."""
    return _with_text(model, sequence, str.lower)


def surrounded(model: HookedModel, sequence: MemorizedSequence) -> MemorizedSequence | None:
    """Return a sequence whose prompt comes in the middle of other text: three sentences stand before it.

    Of these the last tokens are taken that the model has room for.
    """
    return _with_text(model, sequence, lambda prompt: SURROUNDING + prompt)


VARIANTS: Mapping[str, Variant] = {
    "own": own,
    "shifted": shifted,
    "later": later,
    **PROMPTS,
    "typos": typos,
    "upper": upper,
    "lower": lower,
    "surrounded": surrounded,
}
"""Prompts by name. `cut` and `perturbed` are those of DEL."""


Prompts = dict[str, list[MemorizedSequence]]
"""By variant: every sequence with that prompt."""


def prompts_of(model: HookedModel, sequences: Sequence[MemorizedSequence]) -> Prompts:
    """Return all variants of some sequences; where there is no such variant, the sequence as it is.

    Example:
        >>> prompts = prompts_of(model, [sequence])
        >>> prompts["shifted"][0].prompt_len
        29
    """
    return {name: [vary(model, own) or own for own in sequences] for name, vary in VARIANTS.items()}


def _mistyped(prompt: str) -> str:
    words = prompt.split(" ")
    long = [index for index, word in enumerate(words) if len(word) > 3]
    for index in long[::TYPO_EVERY]:
        word, middle = words[index], len(words[index]) // 2
        words[index] = word[: middle - 1] + word[middle] + word[middle - 1] + word[middle + 1 :]
    return " ".join(words)


def _with_text(
    model: HookedModel, sequence: MemorizedSequence, change: Callable[[str], str]
) -> MemorizedSequence | None:
    """Return the sequence with the text of its prompt changed; of too long a prompt the last tokens that fit."""
    if model.tokenizer is None:
        return None
    first = _bos(model, sequence)
    text = decode(model, sequence.tokens[len(first) : sequence.prompt_len])
    changed = change(text)
    if changed == text:
        return None
    room = model.cfg.n_ctx - len(first) - len(sequence.suffix)
    prompt = model.tokenizer(changed, add_special_tokens=False, verbose=False)["input_ids"][-room:] if room > 0 else []
    if not prompt:
        return None
    tokens = torch.cat([torch.tensor([*first, *prompt]), sequence.suffix.cpu()])
    return MemorizedSequence(tokens, len(first) + len(prompt), sequence.id, sequence.category)


def _bos(model: HookedModel, sequence: MemorizedSequence) -> list[int]:
    """Return the beginning-of-sequence token of a prompt, if it has one."""
    bos = None if model.tokenizer is None else model.tokenizer.bos_token_id
    return [token for token in sequence.tokens[:1].tolist() if token == bos]
