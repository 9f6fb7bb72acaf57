"""A row of a data set, whatever format it was read from, and its fields, checked when they are asked for."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from reprlib import repr as shortened
from typing import Required, TypedDict, cast

from memloc_lens.checks import check_characters
from memloc_lens.data.opening import decompressed_name, first_line
from memloc_lens.sequence import subjects

TEXT_FIELDS = ("all", "definition", "text", "content")
"""Fields that may hold the text of a row; the first that holds a string counts."""

CONTENT_FIELDS = frozenset({"tokens", *TEXT_FIELDS})
"""Fields of which a row needs one."""

LARGEST_ID = 2**63 - 1
"""The largest token id that a tensor can hold."""

LISTED_FIELDS = 8
"""Most fields of a row that an error lists."""


class Row(TypedDict, total=False):
    """A row of a data set, with its fields as they were read, not yet checked.

    Args:
        where: the row's file and position, for errors: "FILE, line 3" or "FILE, row 3".
        number: of the line or row, from 1.
        id: label; by default the file's name and the number.
        all: the text of a sequence, prompt and suffix.
        definition: the text to inject, in ECBD.
        text: any other text.
        content: any other text, in data sets of source code.
        prompt: the text of the prompt.
        tokens: token ids; they are used rather than a text.
        prompt_len: number of tokens in the prompt.
        category: subjects, or one subject.
        split: "test", "dev", "control" or another.
    """

    where: Required[str]
    number: Required[int]
    id: Required[str]
    all: str
    definition: str
    text: str
    content: str
    prompt: str
    tokens: list[int]
    prompt_len: int
    category: list[str] | str
    split: str


FIELDS = Row.__optional_keys__ | {"id"}
"""Fields that a source may give."""


def file_row(path: Path, unit: str, number: int, content: object) -> Row:
    """Make a row of what a file holds.

    Args:
        path: of the file.
        unit: what the file is counted in: "line" or "row".
        number: of the line or row, from 1.
        content: the fields.

    Raises:
        ValueError: if the content is no mapping of fields.

    Example:
        >>> file_row(Path("a.jsonl"), "line", 3, {"text": "one"})["where"]
        'a.jsonl, line 3'
    """
    where = f"{path}, {unit} {number}"
    if not isinstance(content, Mapping):
        raise ValueError(f"{where}: a {type(content).__name__} where an object {{...}} was expected")
    return make_row(where, f"{_label(path)}-{number}", number, content)


@lru_cache
def _label(path: Path) -> str:
    """Return the name of a file without its suffixes."""
    return Path(decompressed_name(path)).stem


def make_row(where: str, default_id: str, number: int, content: Mapping[str, object]) -> Row:
    """Make a row; a field that is null counts as absent, because a table has every column in every row."""
    fields = {name: value for name, value in content.items() if value is not None}
    return cast(Row, {**fields, "where": where, "number": number, "id": str(fields.get("id", default_id))})


def with_distinct_ids(data: Iterable[Row]) -> Iterator[Row]:
    """Pass rows on, and refuse an id that an earlier row has.

    Raises:
        ValueError: naming the id and both rows.
    """
    first_rows: dict[str, str] = {}
    for row in data:
        first = first_rows.setdefault(row["id"], row["where"])
        if first != row["where"]:
            raise ValueError(f"{first} and {row['where']} share an id, {row['id']!r}; every row needs its own")
        yield row


def content_of(row: Row) -> str | list[int]:
    """Return the token ids of a row if it has some, otherwise its text.

    Raises:
        ValueError: if it has neither, or a token id is not a whole number.
    """
    if "tokens" not in row:
        text = find_text(row)
        if text is None:
            raise _lacks(row, "neither 'tokens' nor a text")
        return text
    tokens = row["tokens"]
    if not isinstance(tokens, list):
        raise ValueError(f"tokens is {shortened(tokens)}; it must be a list of token ids")
    for token in tokens:
        if type(token) is not int or token < 0:  # True is an instance of int
            raise ValueError(f"{shortened(token)} is no token id; the tokens of a row must be a list of whole numbers")
        if token > LARGEST_ID:
            raise ValueError(f"token id {shortened(token)} overflows 64 bits; was it made with this model's tokenizer?")
    return tokens


def text_of(row: Row) -> str:
    """Return the text of a row, under the first of `TEXT_FIELDS` that it has.

    Raises:
        ValueError: if it has none, or the text cannot be written in UTF-8.
    """
    text = find_text(row)
    if text is None:
        raise _lacks(row, "no text")
    return text


def find_text(row: Row) -> str | None:
    """Return the text of a row, or None if it has none.

    Raises:
        ValueError: if the text cannot be written in UTF-8.
    """
    for field in TEXT_FIELDS:
        text = row.get(field)
        if isinstance(text, str):
            check_characters("the text", text)
            return text
    return None


def category_of(row: Row, default: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return the subjects of a row.

    Args:
        row: with a list of subjects, one subject, or none.
        default: subjects of a row that has none.

    Raises:
        ValueError: if the category is something else.
    """
    return subjects(row.get("category", default))


def split_of(row: Row, default: str) -> str:
    """Return the split of a row.

    Raises:
        ValueError: if it is not a string.
    """
    split = row.get("split", default)
    if not isinstance(split, str):
        raise ValueError(f"split is {shortened(split)}; it must be a string")
    return split


def no_such_split(source: str | Path, split: str, splits: Iterable[str]) -> ValueError:
    """Return the error for a split that a data set does not have, which lists those that it has."""
    present = ", ".join(sorted(map(str, splits)))
    return ValueError(f"{source} has no split {split!r}; it has {present}" if present else f"{source} has no rows")


@contextmanager
def errors_at(where: str) -> Iterator[None]:
    """Put the file and position of a row in front of errors about it."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{where}: {first_line(error)}") from error


def _lacks(row: Row, what: str) -> ValueError:
    present = [field for field in row if field not in ("where", "number", "id")]
    return ValueError(
        f"{what}; give a string as {', '.join(TEXT_FIELDS[:-1])} or {TEXT_FIELDS[-1]}; the row has "
        f"{', '.join(present[:LISTED_FIELDS]) or 'no field'}"
    )
