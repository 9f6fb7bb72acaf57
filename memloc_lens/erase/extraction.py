"""Is a sequence still extracted, by its own prompt or by others?

Each variant of a prompt is followed by the true suffix, so that one teacher-forced pass tells what greedy decoding and
sampling give: see `Recitation`.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from memloc_lens.benchmarks.prompts import PROMPTS, without_first
from memloc_lens.checks import check_model, check_number
from memloc_lens.forward import at_least_float32, final_residual, target_logits
from memloc_lens.generation import rows_for
from memloc_lens.isolation import isolated
from memloc_lens.sequence import MemorizedSequence, check_sequences, decode, equal_length_batches
from memloc_lens.smallest_set import Recitation, recitation_of

Variant = Callable[[HookedTransformer, MemorizedSequence], MemorizedSequence | None]
"""Another prompt for the true suffix; None where there is none: without a tokenizer, or if it changes nothing."""

SHIFT = 3
"""Tokens by which a prompt is shifted."""
TYPO_EVERY = 4
"""One word of so many gets a typo."""
SURROUNDING = (
    "The meeting began a little after nine. Most of those who had been invited were already there, and the rest "
    "followed soon. Before the first point was called, somebody read the following page aloud.\n\n"
)


def own(model: HookedTransformer, sequence: MemorizedSequence) -> MemorizedSequence:
    """Return the sequence as it is."""
    return sequence


def shifted(model: HookedTransformer, sequence: MemorizedSequence) -> MemorizedSequence | None:
    """Return a sequence without the first 3 tokens of its prompt, so that each later one is at another position.

    Example:
        >>> shifted(model, sequence).prompt_len
        29
    """
    return None if sequence.prompt_len == 1 else without_first(model, sequence, SHIFT)


def typos(model: HookedTransformer, sequence: MemorizedSequence) -> MemorizedSequence | None:
    """Return a sequence with two letters swapped in the middle of every 4th word of its prompt.

    Words of fewer than four characters are passed over.

    Example:
        >>> typed = typos(model, sequence)
        >>> torch.equal(typed.suffix, sequence.suffix)
        True
    """
    return _with_text(model, sequence, _mistyped)


def upper(model: HookedTransformer, sequence: MemorizedSequence) -> MemorizedSequence | None:
    """Return a sequence with its prompt in upper case."""
    return _with_text(model, sequence, str.upper)


def lower(model: HookedTransformer, sequence: MemorizedSequence) -> MemorizedSequence | None:
    """Return a sequence with its prompt in lower case."""
    return _with_text(model, sequence, str.lower)


def surrounded(model: HookedTransformer, sequence: MemorizedSequence) -> MemorizedSequence | None:
    """Return a sequence whose prompt comes in the middle of other text: three sentences stand before it.

    Of these the last tokens are taken that the model has room for.
    """
    return _with_text(model, sequence, lambda prompt: SURROUNDING + prompt)


VARIANTS: Mapping[str, Variant] = {
    "own": own,
    "shifted": shifted,
    **PROMPTS,
    "typos": typos,
    "upper": upper,
    "lower": lower,
    "surrounded": surrounded,
}
"""Prompts by name. `cut` and `perturbed` are those of DEL."""


def _mistyped(prompt: str) -> str:
    words = prompt.split(" ")
    long = [index for index, word in enumerate(words) if len(word) > 3]
    for index in long[::TYPO_EVERY]:
        word, middle = words[index], len(words[index]) // 2
        words[index] = word[: middle - 1] + word[middle] + word[middle - 1] + word[middle + 1 :]
    return " ".join(words)


def _with_text(
    model: HookedTransformer, sequence: MemorizedSequence, change: Callable[[str], str]
) -> MemorizedSequence | None:
    """Return the sequence with the text of its prompt changed; of too long a prompt the last tokens that fit."""
    if model.tokenizer is None:
        return None
    first = [token for token in sequence.tokens[:1].tolist() if token == model.tokenizer.bos_token_id]
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


@torch.no_grad()
def recitations(
    model: HookedTransformer, sequences: Sequence[MemorizedSequence], samples: int = 1000, batch: int = 16
) -> list[Recitation]:
    """Return what the model recites of each sequence after its prompt.

    Args:
        model: used as it is, ablated or not.
        sequences: of any lengths.
        samples: number of samples at temperature 1 of which one is to be the exact suffix.
        batch: maximum number of sequences at a time.

    Raises:
        ValueError: if the model cannot read a sequence, or a loss is NaN.

    Example:
        >>> (recitation,) = recitations(model, [sequence])
        >>> recitation.prefix, recitation.strength
        (48, 1.0)
    """
    model = check_model(model)
    sequences = check_sequences(model, sequences)
    check_number("samples", samples, least=1, whole=True)
    found: dict[int, Recitation] = {}
    with isolated(model):
        for indices, group in equal_length_batches(sequences, rows_for(model, sequences, batch)):
            logits: Tensor = target_logits(model, final_residual(model, group), group)
            for index, row in zip(indices, logits, strict=True):
                found[index] = recitation_of(at_least_float32(row), sequences[index], samples)
    return [found[index] for index in range(len(sequences))]


def extraction(
    model: HookedTransformer, sequences: Sequence[MemorizedSequence], samples: int = 1000, batch: int = 16
) -> dict[str, list[Recitation | None]]:
    """Return for each variant of the prompt what the model recites of each sequence; None where it has no such variant.

    Args:
        model: used as it is, ablated or not.
        sequences: of any lengths.
        samples: number of samples at temperature 1 of which one is to be the exact suffix.
        batch: maximum number of sequences at a time.

    Raises:
        ValueError: if the model cannot read a sequence, or a loss is NaN.

    Example:
        >>> found = extraction(model, [sequence])
        >>> list(found)
        ['own', 'shifted', 'cut', 'perturbed', 'typos', 'upper', 'lower', 'surrounded']
        >>> found["own"][0].prefix
        48
    """
    sequences = check_sequences(model, sequences)
    found: dict[str, list[Recitation | None]] = {}
    for name, vary in VARIANTS.items():
        varied = [vary(model, sequence) for sequence in sequences]
        left = iter(recitations(model, [each for each in varied if each], samples, batch))
        found[name] = [next(left) if each else None for each in varied]
    return found
