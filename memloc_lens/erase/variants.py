"""Prompt variants that an erasure is tried with: the ways in which someone may ask for the same text.

A set that breaks the exact training prompt alone leaves the text in the model: see `memloc_lens.benchmarks.prompts`.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens import HookedTransformer

from memloc_lens.benchmarks.prompts import EVERY, PROMPTS
from memloc_lens.generation import Predictions
from memloc_lens.sequence import MemorizedSequence, decode

OWN = "own"
LEAD = "As somebody wrote elsewhere, and others have repeated since: "
"""Other text that comes before a prompt."""

Variant = Callable[[HookedTransformer, MemorizedSequence], MemorizedSequence]


def own(model: HookedTransformer, sequence: MemorizedSequence) -> MemorizedSequence:
    """Return the sequence itself."""
    return sequence


def shifted(model: HookedTransformer, sequence: MemorizedSequence) -> MemorizedSequence:
    """Return a window of the text that begins up to 8 tokens later: its prompt has the first tokens of the suffix.

    Example:
        >>> later = shifted(model, sequence)
        >>> later.prompt_len, torch.equal(later.tokens, sequence.tokens[8:])
        (32, True)
    """
    by = min(EVERY, len(sequence.suffix) - 1)
    return _like(sequence, sequence.tokens[by:], sequence.prompt_len)


def in_other_text(model: HookedTransformer, sequence: MemorizedSequence) -> MemorizedSequence:
    """Return the sequence after a few words of other text; without a tokenizer, after the end of its own prompt.

    Example:
        >>> print(in_other_text(model, sequence).text(model)[:24])
        As somebody wrote elsewh
    """
    first, prompt = _after_bos(model, sequence)
    lead = prompt[-EVERY:] if model.tokenizer is None else _tokens(model, LEAD)
    return _with_prompt(model, sequence, torch.cat([first, lead, prompt]))


def other_case(model: HookedTransformer, sequence: MemorizedSequence) -> MemorizedSequence:
    """Return the sequence with its prompt in the other case, before the same suffix; itself without a tokenizer.

    Example:
        >>> other_case(model, sequence).text(model)[:10], sequence.text(model)[:10]
        ('tHE MODULE', 'The module')
    """
    if model.tokenizer is None:
        return sequence
    first, prompt = _after_bos(model, sequence)
    return _with_prompt(model, sequence, torch.cat([first, _tokens(model, decode(model, prompt).swapcase())]))


VARIANTS: Mapping[str, Variant] = {
    OWN: own,
    **PROMPTS,
    "shifted": shifted,
    "in other text": in_other_text,
    "other case": other_case,
}
"""The variants by name."""


def longest_run(written: Int[Tensor, " _"], suffix: Int[Tensor, " _"]) -> int:
    """Return the length of the longest part of a suffix that was written, wherever it begins in either.

    A model that goes on after one wrong token, or a few tokens later, still recites.

    Example:
        >>> longest_run(torch.tensor([9, 1, 2, 3]), torch.tensor([1, 2, 3, 4]))
        3
    """
    same = written[:, None] == suffix[None]
    lengths = torch.zeros(len(suffix) + 1, dtype=torch.long)
    longest = 0
    for row in same:
        lengths[1:] = (lengths[:-1] + 1) * row
        longest = max(longest, int(lengths.max()))
    return longest


def runs(predictions: Predictions, sequences: Sequence[MemorizedSequence]) -> list[int]:
    """Return the longest run of each sequence's suffix in what was generated for it."""
    return [
        longest_run(written, sequence.suffix.cpu()) for written, sequence in zip(predictions, sequences, strict=True)
    ]


def _after_bos(model: HookedTransformer, sequence: MemorizedSequence) -> tuple[Tensor, Tensor]:
    """Return the beginning-of-sequence token of a prompt, if it has one, and what comes after."""
    prompt = sequence.prompt[0]
    has = model.tokenizer is not None and int(prompt[0]) == model.tokenizer.bos_token_id
    return prompt[: int(has)], prompt[int(has) :]


def _tokens(model: HookedTransformer, text: str) -> Int[Tensor, " _"]:
    assert model.tokenizer is not None
    return torch.tensor(model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)


def _with_prompt(model: HookedTransformer, sequence: MemorizedSequence, prompt: Int[Tensor, " _"]) -> MemorizedSequence:
    """Return a sequence with another prompt, of which the last tokens stay if the model does not read more."""
    prompt = prompt[-(model.cfg.n_ctx - len(sequence.suffix)) :]
    return _like(sequence, torch.cat([prompt, sequence.suffix]), len(prompt))


def _like(sequence: MemorizedSequence, tokens: Int[Tensor, " _"], prompt_len: int) -> MemorizedSequence:
    return MemorizedSequence(tokens, prompt_len, sequence.id, sequence.category)
