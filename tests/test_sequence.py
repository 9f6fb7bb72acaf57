import pytest
import torch
from conftest import random_sequence

from memloc_lens import MemorizedSequence
from memloc_lens.sequence import equal_length_batches


def test_parts():
    sequence = MemorizedSequence(torch.arange(10), 3)
    assert sequence.prompt.tolist() == [[0, 1, 2]]
    assert sequence.suffix.tolist() == list(range(3, 10))


@pytest.mark.parametrize(
    ("tokens", "prompt_len"), [([1, 2, 3], 3), ([1, 2, 3], 0), ([1, 2, 3], -1), ([], 1), ([[1, 2]], 1)]
)
def test_impossible_sequences_are_refused(tokens, prompt_len):
    with pytest.raises((ValueError, TypeError), match=r"sequence 'x'|pos"):
        MemorizedSequence(torch.tensor(tokens, dtype=torch.long), prompt_len, id="x")


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


def test_batches_hold_every_sequence_once():
    sequences = [
        random_sequence(seed, length, prompt)
        for seed, (length, prompt) in enumerate([(9, 3), (8, 3), (9, 3), (9, 4), (9, 3)])
    ]
    seen = []
    for places, tokens, prompt_len in equal_length_batches(sequences, size=2):
        assert len(places) <= 2
        for place, row in zip(places, tokens, strict=True):
            assert torch.equal(row, sequences[place].tokens)
            assert sequences[place].prompt_len == prompt_len
        seen += places
    assert sorted(seen) == [0, 1, 2, 3, 4]
