import numpy as np
import pytest
import torch

from conftest import random_sequence
from memloc_lens import Activations, MemorizedSequence, Random, Slimming
from memloc_lens.generation import free_running
from memloc_lens.sequence import Batch, check_sequences, equal_length_batches, subjects


def test_parts():
    sequence = MemorizedSequence(torch.arange(10), 3)
    assert sequence.prompt.tolist() == [[0, 1, 2]]
    assert sequence.suffix.tolist() == list(range(3, 10))


@pytest.mark.parametrize(("tokens", "prompt_len"), [([1, 2, 3], 3), ([1, 2, 3], 0), ([1, 2, 3], -1), ([1], 1), ([], 1)])
@pytest.mark.parametrize("make", [list, lambda row: np.array(row, dtype=int), lambda row: torch.tensor(row).long()])
def test_impossible_sequences_are_refused(tokens, prompt_len, make):
    with pytest.raises(ValueError, match=r"sequence 'x' has (prompt_len .* must be between|tokens of shape)"):
        MemorizedSequence(make(tokens), prompt_len, id="x")


TOKENS = [3, 1, 2, 96]


@pytest.mark.parametrize("prompt_len", [2, np.int64(2), np.uint8(2)])
@pytest.mark.parametrize(
    "tokens",
    [TOKENS, tuple(TOKENS), [np.int32(token) for token in TOKENS], [torch.tensor(token) for token in TOKENS],
     *(np.array(TOKENS, dtype=kind) for kind in ("int64", "int32", "int16", "uint8", "uint16", "uint32")),
     *(torch.tensor(TOKENS).to(kind) for kind in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.uint16))],
    ids=lambda tokens: f"{type(tokens).__name__}-{getattr(tokens, 'dtype', type(tokens[0]).__name__)}",
)  # fmt: skip
def test_whole_numbers_of_any_kind_are_tokens(gpt2, tokens, prompt_len):
    sequence, expected = MemorizedSequence(tokens, prompt_len), MemorizedSequence(torch.tensor(TOKENS), 2)
    assert sequence.tokens.dtype == torch.int64
    assert sequence.tokens.tolist() == TOKENS
    assert type(sequence.prompt_len) is int
    for localizer in (Activations(), Slimming(steps=1), Random()):
        assert torch.equal(localizer(gpt2, sequence), localizer(gpt2, expected))
    assert torch.equal(free_running(gpt2, [sequence])[0], free_running(gpt2, [expected])[0])


def test_text_survives_the_tokens(embedded):
    text = "Return the number of items,  and\n\traise an error: naïve"
    sequence = MemorizedSequence.from_text(embedded, text, prompt_len=2)
    assert sequence.text(embedded) == text


def test_texts_that_make_no_sequence_are_refused(embedded, gpt2):
    with pytest.raises(ValueError, match="text of sequence 'a' is empty"):
        MemorizedSequence.from_text(embedded, "", 1, id="a")
    with pytest.raises(ValueError, match="prompt_len must be between 1 and"):
        MemorizedSequence.from_text(embedded, "Return the number", 32)
    with pytest.raises(ValueError, match="no tokenizer"):
        MemorizedSequence.from_text(gpt2, "Return", 1)


@pytest.mark.parametrize("text", ["half \ud83d", "\udc00 a whole one: \U0001f600"])
def test_texts_with_half_of_a_character_are_refused(embedded, text):
    with pytest.raises(
        ValueError, match=r"the text of sequence 'a' has '\\u.*', half of a character, at character"
    ) as error:
        MemorizedSequence.from_text(embedded, text, 1, id="a")
    str(error.value).encode()  # so that it can be printed


def test_batches_hold_every_sequence_once():
    sequences = [
        random_sequence(seed, length, prompt)
        for seed, (length, prompt) in enumerate([(9, 3), (8, 3), (9, 3), (9, 4), (9, 3)])
    ]
    seen = []
    for places, batch in equal_length_batches(sequences, size=2):
        assert len(places) == len(batch) <= 2
        for place, row in zip(places, batch.tokens, strict=True):
            assert torch.equal(row, sequences[place].tokens)
            assert sequences[place].prompt_len == batch.prompt_len
        seen += places
    assert sorted(seen) == [0, 1, 2, 3, 4]


def test_parts_of_a_batch():
    batch = Batch(torch.arange(20).view(2, 10), prompt_len=3)
    assert (len(batch), batch.length, batch.suffix_len) == (2, 10, 7)
    assert batch.suffix.tolist() == [list(range(3, 10)), list(range(13, 20))]
    assert torch.equal(batch.tokens[:, batch.targets] + 1, batch.suffix)  # a target predicts the token after it
    again = batch[torch.tensor([1, 0, 1])]
    assert again.tokens[:, 0].tolist() == [10, 0, 10]
    assert again.prompt_len == 3
    assert batch.to("cpu").tokens.device.type == "cpu"


def test_sequences_that_a_model_cannot_read_are_refused(gpt2):
    sequences = [random_sequence(0), random_sequence(1, length=9)]
    assert check_sequences(gpt2, sequences) == sequences == check_sequences(gpt2, tuple(sequences))
    assert check_sequences(gpt2, sequences[0]) == sequences[:1]
    assert check_sequences(gpt2, []) == []
    with pytest.raises(ValueError, match="has 41 tokens, and the model reads at most 40"):
        check_sequences(gpt2, [*sequences, random_sequence(length=41)])
    for tokens in ([1, 97], [-1, 2]):
        with pytest.raises(ValueError, match="the model knows 0 to 96"):
            check_sequences(gpt2, MemorizedSequence(tokens, 1))


@pytest.mark.parametrize("tokens", [[True, 2], (1, False)])
def test_truth_values_are_no_tokens(tokens):
    with pytest.raises(ValueError, match="tokens must be whole numbers"):
        MemorizedSequence(tokens, 1)


def test_a_category_is_made_of_strings(embedded):
    """A string is one subject: its letters would relate physics to botany."""
    assert MemorizedSequence([1, 2], 1, "a", "physics").category == ("physics",)
    assert MemorizedSequence([1, 2], 1, "a", ["physics", "botany"]).category == ("physics", "botany")
    assert MemorizedSequence.from_text(embedded, "Return the items", 1, "a", "physics").category == ("physics",)
    for category in ([3], None, {"physics": 1}):
        with pytest.raises(ValueError, match=r"category is .*; it must be a list of strings"):
            subjects(category)
