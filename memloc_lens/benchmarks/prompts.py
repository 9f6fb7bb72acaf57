"""Other prompts for the same suffix: is a target extracted although its own prompt is not what the model gets?

A model that continues only its exact training context has forgotten less than it seems once a component for that very
context is gone; one that continues other prompts, too, remembers more.
"""

import random
from collections.abc import Callable, Mapping

from memloc_lens.library_types import HookedModel
from memloc_lens.sequence import MemorizedSequence

EVERY = 8
"""One token of so many is replaced."""


def cut(model: HookedModel, sequence: MemorizedSequence) -> MemorizedSequence:
    """Return a sequence with the last half of its prompt alone, rounded up.

    A beginning-of-sequence token stays at the beginning, in place of the first token there.

    Example:
        >>> shorter = cut(model, sequence)
        >>> sequence.prompt_len, shorter.prompt_len, torch.equal(shorter.suffix, sequence.suffix)
        (32, 16, True)
    """
    return without_first(model, sequence, sequence.prompt_len // 2)


def without_first(model: HookedModel, sequence: MemorizedSequence, count: int) -> MemorizedSequence:
    """Return a sequence without the first tokens of its prompt, of which at least one is left.

    A beginning-of-sequence token stays at the beginning, in place of the first token that is left.

    Example:
        >>> without_first(model, sequence, 3).prompt_len
        29
    """
    start = min(count, sequence.prompt_len - 1)
    tokens = sequence.tokens[start:].clone()
    if model.tokenizer is not None and int(sequence.tokens[0]) == model.tokenizer.bos_token_id:
        tokens[0] = sequence.tokens[0]
    return MemorizedSequence(tokens, sequence.prompt_len - start, sequence.id, sequence.category)


def perturbed(model: HookedModel, sequence: MemorizedSequence) -> MemorizedSequence:
    """Return a sequence with every 8th token of its prompt replaced by another one, drawn from the vocabulary.

    The draw depends on the tokens of the sequence alone. Of a prompt of fewer tokens the last one is replaced.

    Example:
        >>> other = perturbed(model, sequence)
        >>> int((other.tokens != sequence.tokens).sum()), torch.equal(other.suffix, sequence.suffix)
        (4, True)
    """
    draw = random.Random(repr(sequence.tokens.tolist()))
    tokens = sequence.tokens.clone()
    for position in range(min(EVERY, sequence.prompt_len) - 1, sequence.prompt_len, EVERY):
        tokens[position] = (int(tokens[position]) + draw.randrange(1, model.cfg.d_vocab)) % model.cfg.d_vocab
    return MemorizedSequence(tokens, sequence.prompt_len, sequence.id, sequence.category)


PROMPTS: Mapping[str, Callable[[HookedModel, MemorizedSequence], MemorizedSequence]] = {
    "cut": cut,
    "perturbed": perturbed,
}
"""The other prompts by name."""
