"""Load memorized sequences and texts from files and data sets on the hub; `readers.py` lists the formats."""

from pathlib import Path
from reprlib import repr as shortened

import torch

from memloc_lens.checks import check_characters, check_model, check_number
from memloc_lens.data.readers import is_plain_text, rows
from memloc_lens.data.row import (
    Row,
    category_of,
    content_of,
    errors_at,
    no_such_split,
    split_of,
    text_of,
    with_distinct_ids,
)
from memloc_lens.library_types import HookedModel
from memloc_lens.models import EMBEDDED
from memloc_lens.sequence import MemorizedSequence, decode

PROMPT_LEN = 32
"""Tokens in the prompt of token ids that come without `prompt_len`: the published length."""

DEFAULT_SPLIT = "test"
"""The split of rows that name none."""

OPTIONAL_SPLITS = ("dev", "control", "partial", "guessable")
"""Splits that a data set may lack: an experiment then has none of these sequences. Without `test` it has nothing."""


def load_sequences(
    model: HookedModel,
    path: str | Path | None = None,
    split: str = DEFAULT_SPLIT,
    prompt_len: int | None = None,
    bos: bool | None = None,
) -> list[MemorizedSequence]:
    """Load the sequences of one split of a data set, and check all its rows against the model.

    Args:
        model: reads the texts with its tokenizer.
        path: file, or owner/name:split of a data set on the hub. A row has `tokens`, or a text `all`, and `prompt_len`
            in tokens; optional are `prompt`, `id`, `category` and `split`. Default: the embedded model's sequences.
        split: of the embedded model, `"dev"` and `"test"` are memorized; `"control"` was seen at most once in training
            and is not memorized; `"partial"` was seen repeatedly and is not (fully) memorized.
        prompt_len: number of tokens in the prompt of rows that do not say. Default: 32 for token ids; a text must say.
        bos: put a beginning-of-sequence token before every row that does not begin with one; `prompt_len` does not
            count it. Default: before texts, if the model's tokenizer is configured to; token ids are used as they are.

    Returns:
        The sequences in the order of the file. The list is empty if the data set lacks the split `"dev"`,
        `"control"`, `"partial"` or `"guessable"`.

    Raises:
        ValueError: if the data set cannot be read or has no such split, two rows share an id, a row is no sequence for
            this model, or has another `prompt_len` than was asked for: with the file, the line or row, and the reason.

    Example:
        >>> len(load_sequences(model)), load_sequences(model)[0].prompt_len
        (278, 32)
    """
    check_model(model)
    if prompt_len is not None:
        check_number("prompt_len", prompt_len, least=1, whole=True)
    source = _default_source(model) if path is None else path
    if is_plain_text(source):
        raise ValueError(f"{source} is plain text, which has no prompt_len; give the sequences as .jsonl")
    splits: dict[str, list[MemorizedSequence]] = {}
    for row in with_distinct_ids(rows(source, "sequences")):
        with errors_at(row["where"]):
            splits.setdefault(split_of(row, DEFAULT_SPLIT), []).append(_sequence(model, row, prompt_len, bos))
    if split not in splits and (not splits or split not in OPTIONAL_SPLITS):
        raise no_such_split(source, split, splits)
    return splits.get(split, [])


def load_texts(path: str | Path) -> list[str]:
    """Load texts: the field `text` of every row, or a plain text file as one text.

    Args:
        path: file, or owner/name:split of a data set on the hub. The text of a row may also be called `all`,
            `definition` or `content`.

    Returns:
        The texts in the order of the file.

    Raises:
        ValueError: if the file cannot be read, or a row has no text: with the file, the line or row, and the reason; or
            if there is no text at all.

    Example:
        >>> from memloc_lens.data import load_texts
        >>> from memloc_lens.data.definitions import DEFINITIONS
        >>> load_texts(DEFINITIONS)[0][:30]
        'The Ostrel Bridge is a covered'
    """
    texts = []
    for row in rows(path, "texts"):
        with errors_at(row["where"]):
            texts.append(text_of(row))
    if not any(texts):
        raise ValueError(f"{path} has no text")
    return texts


def _default_source(model: HookedModel) -> Path:
    if model.cfg.model_name != EMBEDDED.name:
        raise ValueError(
            f"only the embedded model has sequences of its own; give a data file for {model.cfg.model_name}"
        )
    return EMBEDDED / "sequences.jsonl"


def _sequence(model: HookedModel, row: Row, asked: int | None, bos: bool | None) -> MemorizedSequence:
    content, category, prompt_len = content_of(row), category_of(row), _prompt_len(row, asked)
    if isinstance(content, str):
        sequence = MemorizedSequence.from_text(model, content, prompt_len, row["id"], category, bos)
    else:
        sequence = MemorizedSequence(content, prompt_len, row["id"], category)
        sequence = sequence.after_bos(model) if bos else sequence
    sequence.check_fits(model)
    _check_prompt(model, row, content, sequence)
    return sequence


def _prompt_len(row: Row, asked: int | None) -> int:
    """Return the row's own prompt length, the one that was asked for, or the default for token ids."""
    own = row.get("prompt_len")
    if own is None and (asked is not None or "tokens" in row):
        return PROMPT_LEN if asked is None else asked
    if not isinstance(own, int) or isinstance(own, bool):
        way_out = "; give it, or one for all rows with --prompt-len" if own is None else ""
        raise ValueError(f"prompt_len is {own!r}; it must be a whole number of tokens{way_out}")
    if asked not in (None, own):
        raise ValueError(f"prompt_len is {own}, and {asked} was asked for; leave --prompt-len out")
    return own


def _check_prompt(model: HookedModel, row: Row, content: str | list[int], sequence: MemorizedSequence) -> None:
    """Refuse a `prompt` that is not the first `prompt_len` tokens: another tokenizer may have counted them."""
    prompt = row.get("prompt", "")
    if not isinstance(prompt, str):
        raise ValueError(f"prompt is {shortened(prompt)}; it must be a string")
    if isinstance(content, str) and not content.startswith(prompt):
        raise ValueError(f"the text does not start with 'prompt', {prompt[:40]!r}")
    if not prompt or model.tokenizer is None:
        return
    check_characters("the prompt", prompt)
    tokens = model.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    given = model.tokenizer.decode(sequence.prompt[0], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if decode(model, torch.tensor(tokens)) not in (decode(model, sequence.prompt[0]), given):
        raise ValueError(
            f"prompt_len is {sequence.prompt_len}, and 'prompt' has {len(tokens)} of this model's tokens; correct one "
            "or leave 'prompt' out"
        )
