"""Texts for a model to learn: new to it, short, and known whole."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformer_lens import HookedTransformer

from memloc_lens.data.files import hub_rows, is_hub_name, read, read_lines
from memloc_lens.sequence import MemorizedSequence

DEFINITIONS = Path(__file__).parent / "definitions.jsonl"
"""Sentences that define things which do not exist, so that no model has read them."""

FIELDS = ("definition", "text", "all")


def load_definitions(
    model: HookedTransformer, source: str | Path | None = None, split: str = "test", max_tokens: int = 0
) -> list[MemorizedSequence]:
    """Texts as sequences that are learned whole: the prompt is the first token alone.

    Args:
        model: whose tokenizer reads the texts.
        source: JSON lines with a text under "definition", "text" or "all" (ECBD is read as it comes); any other
            file, a text a line; or the name of a data set on the hub. Nothing: the package's own definitions.
        split: of the package's own, 5 `"dev"` and 60 `"test"`, or of the data set on the hub. Rows of a JSON lines
            file that name no split belong to all of them.
        max_tokens: longer texts are cut to this many tokens; 0 cuts nothing.

    Raises:
        ValueError: for a source that cannot be read, or a text that the model cannot: file, line and reason.

    Example:
        >>> model = load_model()
        >>> len(load_definitions(model))
        60
    """
    if model.tokenizer is None:
        raise ValueError(f"{model.cfg.model_name} has no tokenizer to read texts with")
    sequences = []
    for place, id, text in _texts(DEFINITIONS if source is None else source, split):
        try:
            sequence = MemorizedSequence.from_text(model, text, prompt_len=1, id=id)
            if max_tokens:
                sequence = MemorizedSequence(sequence.tokens[:max_tokens], 1, id)
            sequence.check_fits(model)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        sequences.append(sequence)
    if not sequences:
        raise ValueError(f"{source} has no text in the split {split!r}")
    return sequences


def _texts(source: str | Path, split: str) -> Iterator[tuple[str, str, str]]:
    """Where each text stands, its id, and the text."""
    path = Path(source)
    if path.is_file() and path.suffix in (".jsonl", ".json"):
        for number, row in read_lines(path):
            if row.get("split", split) == split:
                place = f"{path}, line {number}"
                yield place, str(row.get("id", f"{path.stem}-{number}")), _text(row, place)
    elif path.is_file():
        for number, line in enumerate(read(path).splitlines(), start=1):
            if line.strip():
                yield f"{path}, line {number}", f"{path.stem}-{number}", line.strip()
    elif is_hub_name(str(source)):
        for number, row in enumerate(hub_rows(str(source), split), start=1):
            place = f"{source}, row {number}"
            yield place, str(row.get("id", f"{path.name}-{number}")), _text(row, place)
    else:
        raise ValueError(
            f"no texts at {str(source)!r}: give a .jsonl file with {' or '.join(FIELDS)}, a text file with a text a "
            "line, or the name owner/name of a data set on the hub"
        )


def _text(row: dict[str, Any], place: str) -> str:
    for field in FIELDS:
        if isinstance(row.get(field), str):
            return row[field]
    raise ValueError(f"{place}: no field {' or '.join(map(repr, FIELDS))} that holds a string: {json.dumps(row)[:80]}")
