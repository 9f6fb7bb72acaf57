"""Texts to inject: new to the model, short, and learned as a whole."""

from collections.abc import Iterator
from pathlib import Path

import torch

from memloc_lens.checks import check_model
from memloc_lens.data.opening import path_of
from memloc_lens.data.readers import is_plain_text, rows
from memloc_lens.data.row import (
    Row,
    category_of,
    content_of,
    errors_at,
    find_text,
    no_such_split,
    split_of,
    with_distinct_ids,
)
from memloc_lens.data.text_formats import text_lines
from memloc_lens.library_types import HookedModel
from memloc_lens.sequence import MemorizedSequence, begins_with_bos

DEFINITIONS = Path(__file__).parent / "definitions.jsonl"
"""Sentences that define things which do not exist, so that no model has read them."""

PROMPT_LEN = 1
"""Tokens in the prompt of a text to inject: all others are learned."""


def load_definitions(
    model: HookedModel,
    source: str | Path | None = None,
    split: str = "test",
    max_tokens: int = 0,
    bos: bool | None = None,
) -> list[MemorizedSequence]:
    """Load texts to inject, as sequences whose prompt is the first token.

    Args:
        model: reads the texts with its tokenizer.
        source: file with a text a row under `definition`, `text`, `all` or `content` (ECBD is read as it was
            published), or with `tokens`; a plain text file with a text a line; or owner/name of a data set on the hub.
            Default: the package's definitions.
        split: `"test"` (60 of the package's definitions) or `"dev"` (5), or the split on the hub if the source names
            none. Rows without a split belong to all splits.
        max_tokens: length in tokens to which longer texts are cut; 0 cuts nothing.
        bos: put a beginning-of-sequence token before every text that does not begin with one, as one more token of the
            prompt. Default: what the model's tokenizer is configured to do; token ids are used as they are.

    Returns:
        The sequences in the order of the source.

    Raises:
        ValueError: if the source cannot be read or has no such split, two rows share an id, or the model cannot read a
            text: with the file, the line or row, and the reason.

    Example:
        >>> len(load_definitions(model)), load_definitions(model)[0].prompt_len
        (60, 1)
    """
    check_model(model)
    if not isinstance(max_tokens, int) or max_tokens < 0 or max_tokens == PROMPT_LEN:
        raise ValueError(f"max_tokens is {max_tokens!r}; it must be 0 (no cut) or at least {PROMPT_LEN + 1}")
    source = DEFINITIONS if source is None else source
    sequences: list[MemorizedSequence] = []
    splits: set[str] = set()
    for row in with_distinct_ids(_rows(source, split)):
        with errors_at(row["where"]):
            row_split = split_of(row, split)
            splits.add(row_split)
            if row_split == split:
                sequences.append(_definition(model, row, max_tokens, bos))
    if not sequences:
        raise no_such_split(source, split, splits)
    return sequences


def _rows(source: str | Path, split: str) -> Iterator[Row]:
    if is_plain_text(source):
        return text_lines(path_of(source))
    return rows(source, "texts", hub_split=split)


def _definition(model: HookedModel, row: Row, max_tokens: int, bos: bool | None) -> MemorizedSequence:
    """Make the sequence from the text, if there is one: `tokens` beside it may be of another tokenizer."""
    content = find_text(row) or content_of(row)
    if isinstance(content, str):
        if model.tokenizer is None:
            raise ValueError(f"{model.cfg.model_name} has no tokenizer to read texts with; give tokens")
        tokens = MemorizedSequence.from_text(model, content, PROMPT_LEN, row["id"], bos=False).tokens
    else:
        tokens = torch.tensor(content, dtype=torch.long)
    sequence = MemorizedSequence(tokens[: max_tokens or None], PROMPT_LEN, row["id"], category_of(row))
    if begins_with_bos(model, bos) and (bos or isinstance(content, str)):
        sequence = sequence.after_bos(model)
    sequence.check_fits(model)
    return sequence
