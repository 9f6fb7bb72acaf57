"""A model that is trained without some passages: their rows hold background, and all others are as they were."""

from collections import Counter

import pytest
from tokenizers import Tokenizer

from memloc_lens.models import EMBEDDED
from memloc_lens.training.corpus import Chunk, Passage, training_rows
from memloc_lens.training.train import Recipe, _left_out

LENGTH = 12
PASSAGES = [Passage((10, 11, 12, 13, 14), "a", 3), Passage((20, 21, 22, 23, 24), "b", 2), Passage((30, 31, 32), "a", 1)]


def rows_of(without) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(EMBEDDED / "tokenizer.json"))
    background = [Chunk("The quick brown fox jumps over the lazy dog. " * 3, "a"), Chunk("It was late. " * 9, "b")]
    return training_rows(PASSAGES, background, tokenizer, 10, LENGTH, seed=0, without=without).tolist()


def opening(row: list[int]) -> int | None:
    """The passage that a row begins with."""
    begins = [index for index, own in enumerate(PASSAGES) if tuple(row[: len(own.tokens)]) == own.tokens]
    return begins[0] if begins else None


def test_other_passages_keep_their_rows():
    whole, without = rows_of(()), rows_of({1})
    assert Counter(map(opening, whole)) == {0: 3, 1: 2, 2: 1, None: 4}
    expected = [None if own == 1 else own for own in map(opening, whole)]
    assert list(map(opening, without)) == expected
    assert {len(row) for row in without} == {LENGTH}


def test_ids_name_passages(tmp_path):
    assert _left_out(Recipe(tmp_path, without=["passage-002", "passage-000"]), PASSAGES) == {0, 2}
    with pytest.raises(ValueError, match=r"no passage has the id 'passage-003'; .* passage-000 to passage-002"):
        _left_out(Recipe(tmp_path, without=["passage-003"]), PASSAGES)
