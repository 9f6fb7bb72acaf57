"""Read sequences and texts: from JSON lines, token tensors, and data sets on the hub.

A line of JSON lines is one object. A sequence is ``{"all": text, "prompt_len": tokens}`` with, if wanted, ``prompt``
(with which `all` must start), ``id``, ``category`` (a list of subjects) and ``split`` (``test`` if left out). In place
of `all`, ``tokens`` may give the token ids. These are the files that Chang et al. (2024) published for GPT2-XL, the
embedded model's, and those that `memloc_lens.data.find` writes.

A token tensor is what they published for Pythia: a `.pt` file with a whole-number tensor [row, pos]. It and rows of
tokens on the hub (`EleutherAI/pythia-memorized-evals:duped.6.9b`) tell neither the prompt's length nor a split: the
prompt is 32 tokens, and the first 5 rows are `dev`.
"""

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from datasets.exceptions import DatasetNotFoundError
from jaxtyping import Int
from torch import Tensor
from transformer_lens import HookedTransformer

from memloc_lens.models import EMBEDDED
from memloc_lens.sequence import MemorizedSequence

PROMPT_LEN, DEV_ROWS = 32, 5
"""Of data sets that are tokens alone, as in the paper."""


def load_sequences(
    model: HookedTransformer, path: str | Path | None = None, split: str = "test"
) -> list[MemorizedSequence]:
    """The sequences of one split of a data set, checked against the model.

    Args:
        model: whose tokenizer reads the texts.
        path: a JSON lines file, a `.pt` file, or owner/name:split of a data set on the hub with a column `tokens`;
            nothing for the sequences of the embedded model.
        split: of the embedded model: `"dev"` and `"test"` are memorized, `"control"` was seen at most once and
            is not memorized, `"partial"` was seen repeatedly and is not (fully) memorized.

    Raises:
        ValueError: for a file that does not exist, or a line or row that holds no sequence for this model: file,
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
    for place, row in _rows(str(path)):
        try:
            sequence = _sequence(model, row, default_id=f"{Path(path).stem}-{row['number']}")
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"{place}: {error}") from error
        if row.get("split", "test") == split:
            sequences.append(sequence)
    return sequences


def _rows(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each row of a data set stands, and the row with its number."""
    path = Path(source).expanduser()
    name, colon, hub_split = source.partition(":")
    if path.suffix == ".pt":
        for number, tokens in enumerate(read_tokens(path).tolist(), start=1):
            yield f"{path}, row {number}", _token_row(tokens, number)
    elif colon and is_hub_name(name):
        for number, row in enumerate(hub_rows(name, hub_split), start=1):
            if "tokens" not in row:
                raise ValueError(f"{source}, row {number}: no column 'tokens', only {', '.join(row)}")
            yield f"{source}, row {number}", _token_row(row["tokens"], number)
    else:
        for number, row in read_lines(path):
            yield f"{path}, line {number}", {**row, "number": number}


def _token_row(tokens: list[int], number: int) -> dict[str, Any]:
    split = "dev" if number <= DEV_ROWS else "test"
    return {"tokens": tokens, "prompt_len": PROMPT_LEN, "split": split, "number": number}


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
    id, category = str(row.get("id", default_id)), category_of(row)
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


def category_of(row: dict[str, Any], default: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The subjects of a row; a `ValueError` if they are not a list of strings, or one string."""
    category = row.get("category", default)
    category = (category,) if isinstance(category, str) else category
    if not isinstance(category, list | tuple) or not all(isinstance(subject, str) for subject in category):
        raise ValueError(f"category is {category!r}; it must be a list of strings")
    return tuple(category)


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


def read_tokens(path: Path) -> Int[Tensor, "row pos"]:
    """The token ids of a `.pt` file, read without running any code of it.

    Raises:
        ValueError: if it is no whole-number tensor with a row for each text.
    """
    try:
        tokens = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except (RuntimeError, EOFError, pickle.UnpicklingError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a tensor that torch.save wrote: {str(error).splitlines()[0]}") from error
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.is_floating_point() or tokens.is_complex():
        found = f"a tensor {tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(f"{path} holds {found}; a tensor of whole numbers [row, pos] was expected")
    return tokens.long()


def is_hub_name(source: str) -> bool:
    """Whether this reads as owner/name of a data set on the hub, and not as a path."""
    is_file_name = Path(source).suffix in (".jsonl", ".json", ".txt", ".md", ".pt")
    return source.count("/") == 1 and not source.startswith(("/", ".", "~")) and not is_file_name


def hub_rows(name: str, split: str, streaming: bool = False) -> Any:
    """The rows of a split of a data set on the hub; a `ValueError` says why they cannot be had."""
    try:
        return load_dataset(name, split=split, streaming=streaming)
    except (DatasetNotFoundError, ConnectionError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"the data set {name!r} with its split {split!r} could not be had: {reason}") from error


def read(path: Path) -> str:
    """The content of a UTF-8 file; a `ValueError` says why it cannot be read."""
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8: {error.reason} at byte {error.start}") from error
