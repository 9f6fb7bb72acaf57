"""A memorized sequence: the tokens of a text, split into a prompt that is given and a suffix that is recited."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from reprlib import repr as shortened
from typing import Any, SupportsIndex

import numpy as np
import torch
from jaxtyping import Int, Integer
from torch import Tensor

from memloc_lens.checks import check_model, check_text, described
from memloc_lens.library_types import HookedModel
from memloc_lens.markup import Html, escaped

Tokens = Integer[Tensor, " pos"] | Integer[np.ndarray, " pos"] | Sequence[SupportsIndex]
"""What a sequence can be made from."""
MOST = 120  # characters of an id, and of subjects, that a notebook shows
BLANKS = "\n\t"


@dataclass(frozen=True, eq=False, init=False)
class MemorizedSequence:
    """A text as tokens: a prompt of `prompt_len` tokens, then the suffix that a model may have memorized.

    Args:
        tokens: of the whole text: a tensor, or a list or array of whole numbers.
        prompt_len: number of tokens in the prompt, at least 1 and fewer than all.
        id: label of the sequence in records and files.
        category: subjects of the text, or one subject. Two sequences are related if they share one.

    Raises:
        ValueError: if the tokens are not one row of whole numbers, no token is left after the prompt, or a subject is
            not a string.

    Example:
        >>> MemorizedSequence([5, 6, 7, 8], prompt_len=3).suffix.tolist()
        [8]
    """

    tokens: Int[Tensor, " pos"]
    prompt_len: int
    id: str
    category: tuple[str, ...]

    def __init__(
        self, tokens: Tokens, prompt_len: SupportsIndex, id: str = "", category: str | Sequence[str] = ()
    ) -> None:
        row = _whole_numbers(tokens, id)
        if isinstance(prompt_len, bool) or not isinstance(prompt_len, Integral):
            raise ValueError(f"sequence {id!r} has prompt_len {prompt_len!r}; it must be a whole number")
        given = int(prompt_len)
        if not 1 <= given < len(row):
            raise ValueError(
                f"sequence {id!r} has prompt_len {given} and {len(row)} tokens; prompt_len must be between 1 and "
                f"{len(row) - 1}"
            )
        for name, value in dict(tokens=row, prompt_len=given, id=id, category=subjects(category)).items():
            object.__setattr__(self, name, value)  # the class is frozen

    @classmethod
    def from_text(
        cls,
        model: HookedModel,
        text: str,
        prompt_len: int,
        id: str = "",
        category: str | Sequence[str] = (),
        bos: bool | None = None,
    ) -> "MemorizedSequence":
        """Tokenize a text.

        Args:
            model: whose tokenizer reads the text.
            text: prompt and suffix.
            prompt_len: number of the text's tokens in the prompt.
            id: label of the sequence.
            category: subjects of the text.
            bos: put a beginning-of-sequence token before the text, as one more token of the prompt. Default: what the
                model's tokenizer is configured to do (`model.cfg.default_prepend_bos`).

        Raises:
            ValueError: if the model has no tokenizer, or none with such a token, the text is empty or holds half of a
                character, or the prompt leaves no suffix.

        Example:
            >>> MemorizedSequence.from_text(model, "Return the number of items", prompt_len=2).prompt.shape
            torch.Size([1, 2])
        """
        check_model(model)
        if model.tokenizer is None:
            raise ValueError("the model has no tokenizer; make the sequence from tokens instead")
        check_text(f"the text of sequence {id!r}", text)
        tokens = model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        sequence = cls(torch.tensor(tokens), prompt_len, id, category)
        return sequence.after_bos(model) if begins_with_bos(model, bos) else sequence

    def after_bos(self, model: HookedModel) -> "MemorizedSequence":
        """Return the sequence with a beginning-of-sequence token as the first of its prompt, if it has none there.

        Raises:
            ValueError: if the model's tokenizer has no such token.

        Example:
            >>> sequence = MemorizedSequence([5, 6, 7, 8], prompt_len=3).after_bos(model)
            >>> sequence.tokens.tolist(), sequence.prompt_len
            ([0, 5, 6, 7, 8], 4)
        """
        first = _bos_token(model)
        if int(self.tokens[0]) == first:
            return self
        tokens = torch.cat([torch.tensor([first]), self.tokens])
        return MemorizedSequence(tokens, self.prompt_len + 1, self.id, self.category)

    @property
    def prompt(self) -> Int[Tensor, "1 prompt"]:
        """The prompt as a batch of one row, the input of `model.generate`."""
        return self.tokens[None, : self.prompt_len]

    @property
    def suffix(self) -> Int[Tensor, " suffix"]:
        """The tokens after the prompt."""
        return self.tokens[self.prompt_len :]

    def text(self, model: HookedModel) -> str:
        """Decode prompt and suffix."""
        return decode(model, self.tokens)

    def show(self, model: HookedModel) -> Html:
        """Return the text for a notebook, with the prompt and the suffix told apart.

        Args:
            model: whose tokenizer decodes the tokens.

        Raises:
            ValueError: if the model has no tokenizer.

        Example:
            >>> page = sequence.show(model)
        """
        check_model(model)
        if model.tokenizer is None:
            raise ValueError("the model has no tokenizer to write the tokens with; the sequence itself shows their ids")
        return Html(self._page(decode(model, self.prompt[0]), decode(model, self.suffix)))

    def _repr_html_(self) -> str:
        """Return the token ids for a notebook, with those of the prompt and of the suffix told apart."""
        return self._page(*(" ".join(map(str, part.tolist())) for part in (self.prompt[0], self.suffix)))

    def _page(self, prompt: str, suffix: str) -> str:
        category = f", category {escaped(', '.join(self.category), MOST)}" if self.category else ""
        return (
            f"<div>sequence <b>{escaped(self.id or 'without id', MOST)}</b>{category}</div>"
            + _part("prompt", self.prompt_len, prompt, "transparent")
            + _part("suffix", len(self.suffix), suffix, "rgba(255, 140, 0, .25)")  # on light and on dark pages
        )

    def check_fits(self, model: HookedModel) -> None:
        """Refuse a sequence that the model cannot read.

        Raises:
            ValueError: if it is longer than the model's context, or has tokens outside its vocabulary.
        """
        if len(self.tokens) > model.cfg.n_ctx:
            raise ValueError(
                f"sequence {self.id!r} has {len(self.tokens)} tokens, and the model reads at most {model.cfg.n_ctx}; "
                "shorten it"
            )
        if not 0 <= int(self.tokens.min()) <= int(self.tokens.max()) < model.cfg.d_vocab:
            raise ValueError(
                f"sequence {self.id!r} has tokens from {int(self.tokens.min())} to {int(self.tokens.max())}, and the "
                f"model knows 0 to {model.cfg.d_vocab - 1}; was it made with another tokenizer?"
            )


def _part(label: str, count: int, text: str, colour: str) -> str:
    """Return a part of a sequence as HTML."""
    return (
        f'<div style="display:flex;gap:1em"><small style="flex:0 0 9em">{label}, {count} tokens</small>'
        f'<span style="white-space:pre-wrap;overflow-wrap:anywhere;background:{colour}">{escaped(text, keep=BLANKS)}'
        "</span></div>"
    )


def begins_with_bos(model: HookedModel, bos: bool | None) -> bool:
    """Whether a beginning-of-sequence token comes before the texts of a model.

    Args:
        model: with or without a tokenizer.
        bos: what was asked for. Default: what the model's tokenizer is configured to do.

    Raises:
        ValueError: if one was asked for, and the tokenizer has none.

    Example:
        >>> from memloc_lens.sequence import begins_with_bos
        >>> begins_with_bos(model, None), begins_with_bos(model, True)
        (False, True)
    """
    if bos is not None and not isinstance(bos, bool):
        raise ValueError(f"bos is {bos!r}; it must be True, False, or None for what the tokenizer is configured to do")
    if bos:
        _bos_token(model)
    return bool(model.tokenizer is not None and model.cfg.default_prepend_bos) if bos is None else bos


def _bos_token(model: HookedModel) -> int:
    if model.tokenizer is None or model.tokenizer.bos_token_id is None:
        lacking = "no tokenizer" if model.tokenizer is None else "a tokenizer without a beginning-of-sequence token"
        raise ValueError(f"bos is True, and {model.cfg.model_name} has {lacking}; leave bos out")
    return model.tokenizer.bos_token_id


def subjects(category: object) -> tuple[str, ...]:
    """Return a category as a tuple of subjects; a string is one subject, not its letters.

    Raises:
        ValueError: if it is not made of strings.

    Example:
        >>> from memloc_lens.sequence import subjects
        >>> subjects("physics"), subjects(["physics", "botany"])
        (('physics',), ('physics', 'botany'))
    """
    listed = (category,) if isinstance(category, str) else category
    if not isinstance(listed, list | tuple) or not all(isinstance(subject, str) for subject in listed):
        raise ValueError(f"category is {shortened(category)}; it must be a list of strings")
    return tuple(listed)


def _whole_numbers(tokens: Any, id: str) -> Int[Tensor, " pos"]:
    """Turn a list, an array or a tensor into one row of token ids."""
    truths = (
        [token for token in tokens if isinstance(token, bool | np.bool_)] if isinstance(tokens, list | tuple) else []
    )
    if truths:
        raise ValueError(f"sequence {id!r} has tokens that are {truths[0]}; tokens must be whole numbers")
    try:
        row = tokens if isinstance(tokens, Tensor) else torch.as_tensor(tokens, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        shown = " ".join(str(tokens).split())[:60]
        raise ValueError(f"sequence {id!r} has tokens {shown}; tokens must be whole numbers") from error
    if row.is_floating_point() or row.is_complex() or row.dtype == torch.bool:
        if row.numel():
            raise ValueError(f"sequence {id!r} has tokens of {row.dtype}; tokens must be whole numbers")
        row = row.long()  # an empty list makes a tensor of floats
    if row.ndim != 1 or len(row) == 0:
        raise ValueError(
            f"sequence {id!r} has tokens of shape {list(row.shape)}; a sequence is one row of at least 2 tokens"
        )
    return row.long()


def check_sequences(
    model: HookedModel, sequences: "MemorizedSequence | Sequence[MemorizedSequence]"
) -> list[MemorizedSequence]:
    """Return one sequence or many as a list, after checking that the model can read them.

    Raises:
        ValueError: if something else was given, or the model cannot read a sequence.
    """
    check_model(model)
    listed = [sequences] if isinstance(sequences, MemorizedSequence) else sequences
    wrong = [item for item in listed if not isinstance(item, MemorizedSequence)] if _is_list(listed) else [listed]
    if wrong:
        raise ValueError(
            f"{described(wrong[0])} was given; give a MemorizedSequence or a list of them, as load_sequences(model) "
            "and MemorizedSequence.from_text(model, text, prompt_len) return"
        )
    for sequence in listed:
        sequence.check_fits(model)
    return list(listed)


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple)


def decode(model: HookedModel, tokens: Int[Tensor, " pos"]) -> str:
    """Decode tokens exactly: no clean-up of spaces, special tokens kept."""
    assert model.tokenizer is not None
    return model.tokenizer.decode(tokens.tolist(), clean_up_tokenization_spaces=False)


def drawn(sequences: list[MemorizedSequence], count: int, seed: int) -> list[MemorizedSequence]:
    """Return some of the sequences, drawn at random, in their order.

    Args:
        sequences: to draw from.
        count: number to draw; 0, or as many as there are, takes all.
        seed: of the draw.

    Example:
        >>> from memloc_lens.sequence import drawn
        >>> [own.id for own in drawn(load_sequences(model)[:3], count=2, seed=0)]
        ['passage-012', 'passage-013']
    """
    if count == 0 or count >= len(sequences):
        return sequences
    chosen = sorted(random.Random(seed).sample(range(len(sequences)), count))
    return [sequences[index] for index in chosen]


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences of equal length and prompt length, stacked.

    Args:
        tokens: a row a sequence.
        prompt_len: of every row.
    """

    tokens: Int[Tensor, "row pos"]
    prompt_len: int

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: Any) -> "Batch":
        """Return some of the rows, repeated or reordered as the index says."""
        return Batch(self.tokens[rows], self.prompt_len)

    def to(self, device: Any) -> "Batch":
        """Move the tokens to a device."""
        return Batch(self.tokens.to(device), self.prompt_len)

    @property
    def length(self) -> int:
        """Number of tokens in a row."""
        return self.tokens.shape[1]

    @property
    def suffix(self) -> Int[Tensor, "row suffix"]:
        """The tokens after the prompt."""
        return self.tokens[:, self.prompt_len :]

    @property
    def suffix_len(self) -> int:
        """Number of tokens in a suffix."""
        return self.length - self.prompt_len

    @property
    def targets(self) -> slice:
        """The target positions: each predicts a token of the suffix, one position later."""
        return slice(self.prompt_len - 1, -1)


def equal_length_batches(sequences: Sequence[MemorizedSequence], size: int) -> Iterator[tuple[list[int], Batch]]:
    """Group sequences that share length and prompt length, at most `size` at a time.

    Yields:
        The indices in `sequences` of the rows of a batch, and the batch.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for index, sequence in enumerate(sequences):
        groups.setdefault((len(sequence.tokens), sequence.prompt_len), []).append(index)
    for (_, prompt_len), indices in groups.items():
        for start in range(0, len(indices), size):
            chosen = indices[start : start + size]
            yield chosen, Batch(torch.stack([sequences[index].tokens for index in chosen]), prompt_len)
