"""Read sequences and texts from JSON lines: one object a line.

A sequence is ``{"all": text, "prompt_len": tokens}`` with, if wanted, ``prompt`` (with which `all` must start),
``id``, ``category`` (a list of subjects) and ``split`` (``test`` if left out). In place of `all`, ``tokens`` may
give the token ids. These are the files that Chang et al. (2024) published for GPT2-XL, and the embedded model's.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformer_lens import HookedTransformer

from memloc_lens.models import EMBEDDED
from memloc_lens.sequence import MemorizedSequence


def load_sequences(
    model: HookedTransformer, path: str | Path | None = None, split: str = "test"
) -> list[MemorizedSequence]:
    """The sequences of one split of a file, checked against the model.

    Args:
        model: whose tokenizer reads the texts.
        path: a JSON lines file; nothing for those of the embedded model.
        split: of the embedded model: `"dev"` and `"test"` are memorized, `"control"` was seen at most once and
            is not memorized, `"partial"` was seen repeatedly and is not (fully) memorized.

    Raises:
        ValueError: for a file that does not exist, or a line that holds no sequence for this model: file, line
            number and reason.

    Example:
        >>> model = load_model()
        >>> load_sequences(model)[0].prompt_len
        32
    """
    if path is None:
        if model.cfg.model_name != EMBEDDED.name:
            raise ValueError(
                f"only the embedded model has sequences of its own; give a data file for {model.cfg.model_name}"
            )
        path = EMBEDDED / "sequences.jsonl"
    sequences = []
    for number, row in read_lines(Path(path)):
        try:
            sequence = _sequence(model, row, default_id=f"{Path(path).stem}-{number}")
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        if row.get("split", "test") == split:
            sequences.append(sequence)
    return sequences


def load_texts(path: str | Path) -> list[str]:
    """Texts from a plain text file, or the field `text` of a JSON lines file.

    Raises:
        ValueError: for a file that does not exist, or a line without text: file, line number and reason.
    """
    path = Path(path)
    if path.suffix not in (".jsonl", ".json"):
        return [read(path)]
    texts = []
    for number, row in read_lines(path):
        if not isinstance(row.get("text"), str):
            raise ValueError(f"{path}, line {number}: no field 'text' that holds a string")
        texts.append(row["text"])
    return texts


def _sequence(model: HookedTransformer, row: dict[str, Any], default_id: str) -> MemorizedSequence:
    prompt_len = row.get("prompt_len")
    if not isinstance(prompt_len, int) or isinstance(prompt_len, bool):
        raise ValueError(f"prompt_len is {prompt_len!r}; it must be a whole number of tokens")
    id, category = str(row.get("id", default_id)), tuple(row.get("category", ()))
    if "tokens" in row:
        sequence = MemorizedSequence(torch.tensor(row["tokens"], dtype=torch.long), prompt_len, id, category)
    elif isinstance(text := row.get("all"), str):
        if not text.startswith(row.get("prompt", "")):
            raise ValueError("the text 'all' does not start with 'prompt'")
        sequence = MemorizedSequence.from_text(model, text, prompt_len, id, category)
    else:
        raise ValueError("neither a text 'all' nor 'tokens'")
    sequence.check_fits(model)
    return sequence


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON lines file with their line numbers; a `ValueError` names the line that is none."""
    for number, line in enumerate(read(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg} at column {error.colno})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: a {type(row).__name__} where an object {{...}} was expected")
        yield number, row


def read(path: Path) -> str:
    """The content of a UTF-8 file; a `ValueError` says why it cannot be read."""
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8: {error.reason} at byte {error.start}") from error
