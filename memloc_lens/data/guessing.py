"""Tell memorized text from text that can be guessed: prompts of other text, and suffixes that copy.

A model has memorized a suffix if it needs the prompt to generate it. If it comes as close from the prompt of another
window, or from the same prompt with its tokens shuffled, the suffix can be guessed; so can one that mostly copies what
stands before it.
"""

import random
from collections.abc import Sequence

from memloc_lens.data.found import FindSettings, FoundWindow

COPIED_GRAM = 3
"""Tokens of an n-gram: its last token is copied if the n-gram has occurred before."""

COPIED_SHARE = 0.5
"""Share of copied tokens that makes a suffix repetitive."""


def why_guessable(settings: FindSettings, window: FoundWindow) -> list[str]:
    """Return why a suffix can be guessed: the prompts that suffice, and whether it repeats itself; else nothing.

    Args:
        settings: of the run.
        window: with its distances from all prompts.
    """
    near = max(window["distance"], settings.max_distance)
    reasons = []
    if window["shuffled_distance"] <= near:
        reasons.append("shuffled prompt")
    if window.get("foreign_distance", near + 1) <= near:
        reasons.append("foreign prompt")
    if is_repetitive(window["tokens"], settings.prompt):
        reasons.append("repetitive")
    return reasons


def shuffled_prompts(prompts: Sequence[list[int]], seed: int) -> list[list[int]]:
    """Return the prompts, the tokens of each in random order."""
    draw = random.Random(seed)
    return [draw.sample(prompt, len(prompt)) for prompt in prompts]


def foreign_prompts(prompts: Sequence[list[int]]) -> list[list[int]]:
    """Return for each prompt the next one, for the last the first; none if there is only one.

    Example:
        >>> from memloc_lens.data.guessing import foreign_prompts
        >>> foreign_prompts([[1, 2], [3, 4], [5, 6]])
        [[3, 4], [5, 6], [1, 2]]
    """
    return [*prompts[1:], prompts[0]] if len(prompts) > 1 else []


def is_repetitive(tokens: Sequence[int], prompt_len: int) -> bool:
    """Return whether most of a suffix is copied from what stands before it."""
    return copied_share(tokens, prompt_len) >= COPIED_SHARE


def copied_share(tokens: Sequence[int], prompt_len: int) -> float:
    """Return the share of a suffix that copies: tokens that follow the same two tokens as they did before.

    Args:
        tokens: of prompt and suffix.
        prompt_len: number of tokens in the prompt.

    Example:
        >>> from memloc_lens.data.guessing import copied_share
        >>> copied_share([1, 2, 3, 1, 2, 3, 1, 2], prompt_len=4)
        0.75
    """
    seen: set[tuple[int, ...]] = set()
    copied = 0
    for end in range(COPIED_GRAM, len(tokens) + 1):
        gram = tuple(tokens[end - COPIED_GRAM : end])
        copied += end > prompt_len and gram in seen
        seen.add(gram)
    return copied / (len(tokens) - prompt_len)
