"""A memorized sequence: the tokens of a text, of which the prompt is given and the suffix recalled."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens import HookedTransformer


@dataclass(frozen=True, eq=False)
class MemorizedSequence:
    """A text as tokens: a prompt of `prompt_len` tokens, then the suffix that a model may know by heart.

    Args:
        tokens: the whole text.
        prompt_len: tokens given to the model, at least 1 and fewer than there are.
        id: a name that records and files are labelled with.
        category: subjects the text belongs to; two sequences are related if they share one.

    Raises:
        ValueError: if there are no tokens, or no token is left after the prompt.
    """

    tokens: Int[Tensor, " pos"]
    prompt_len: int
    id: str = ""
    category: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.tokens.ndim != 1 or len(self.tokens) == 0:
            raise ValueError(
                f"sequence {self.id!r} has tokens of shape {list(self.tokens.shape)}; "
                "a sequence is one row of at least 2"
            )
        if not 1 <= self.prompt_len < len(self.tokens):
            raise ValueError(
                f"sequence {self.id!r} has prompt_len {self.prompt_len} and {len(self.tokens)} tokens; "
                f"prompt_len must be between 1 and {len(self.tokens) - 1}"
            )

    @classmethod
    def from_text(
        cls, model: HookedTransformer, text: str, prompt_len: int, id: str = "", category: tuple[str, ...] = ()
    ) -> "MemorizedSequence":
        """Tokenize a text as it stands, with no token put before it.

        Raises:
            ValueError: if the model has no tokenizer, the text is empty, or the prompt leaves no suffix.
        """
        if model.tokenizer is None:
            raise ValueError("the model has no tokenizer; make the sequence from tokens instead")
        if not text:
            raise ValueError(f"the text of sequence {id!r} is empty")
        tokens = model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return cls(torch.tensor(tokens), prompt_len, id, category)

    @property
    def prompt(self) -> Int[Tensor, "1 prompt"]:
        """The given tokens, as a batch of one: what `model.generate` takes."""
        return self.tokens[None, : self.prompt_len]

    @property
    def suffix(self) -> Int[Tensor, " suffix"]:
        """The tokens to be recalled."""
        return self.tokens[self.prompt_len :]

    def text(self, model: HookedTransformer) -> str:
        """Prompt and suffix as the model's tokenizer writes them."""
        return decode(model, self.tokens)

    def check_fits(self, model: HookedTransformer) -> None:
        """Raise a `ValueError` if the model cannot read the sequence: too long, or with unknown tokens."""
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


def decode(model: HookedTransformer, tokens: Int[Tensor, " pos"]) -> str:
    """The tokens as text, exactly: no clean-up of spaces, special tokens kept."""
    assert model.tokenizer is not None
    return model.tokenizer.decode(tokens.tolist(), clean_up_tokenization_spaces=False)


def equal_length_batches(
    sequences: Sequence[MemorizedSequence], size: int
) -> Iterator[tuple[list[int], Int[Tensor, "batch pos"], int]]:
    """Group sequences that share length and prompt length, at most `size` at a time.

    Yields:
        The places of the batch's members in `sequences`, their stacked tokens, and their prompt length.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for place, sequence in enumerate(sequences):
        groups.setdefault((len(sequence.tokens), sequence.prompt_len), []).append(place)
    for (_, prompt_len), places in groups.items():
        for start in range(0, len(places), size):
            batch = places[start : start + size]
            yield batch, torch.stack([sequences[place].tokens for place in batch]), prompt_len
