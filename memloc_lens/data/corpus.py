"""The text of a corpus, document by document: files, folders, JSON lines, token tensors, data sets on the hub."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from transformer_lens import HookedTransformer

from memloc_lens.data.files import category_of, hub_rows, is_hub_name, read, read_lines, read_tokens

TEXT_FIELDS = ("text", "all", "definition", "content")


@dataclass(frozen=True)
class Document:
    """A text or its tokens, where it stands, and what it is about."""

    content: str | list[int]
    source: str
    category: tuple[str, ...] = ()


@dataclass(frozen=True)
class Window:
    """Some tokens of a document, from its token number `start` on."""

    tokens: tuple[int, ...]
    source: str
    start: int
    category: tuple[str, ...]


def read_corpus(sources: Sequence[str | Path], names: Sequence[str] = ("*",)) -> Iterator[Document]:
    """The documents of a corpus, always in the same order.

    Args:
        sources: each a text file; a JSON lines file with a text under "text", "all", "definition" or "content" or ids
            under "tokens", and if wanted "category"; a `.pt` file with a tensor of token ids, a row a document; a
            folder of these, in which every subfolder is a category; or owner/name:split of a data set on the hub,
            which is streamed; the split is "train" if left out.
        names: of the files to take from folders, with wildcards. Files that hold no text are passed over there.

    Raises:
        ValueError: for a source that cannot be read, or a line of it: file, line and reason.
    """
    for source in sources:
        path = Path(source).expanduser()
        if path.is_dir():
            for file in sorted(path.rglob("*")):
                if file.is_file() and any(fnmatch(file.name, name) for name in names):
                    yield from _in_folder(file, path)
        elif path.is_file():
            yield from _file(path, ())
        elif is_hub_name(name := str(source).partition(":")[0]):
            split = str(source).partition(":")[2] or "train"
            for number, row in enumerate(hub_rows(name, split, streaming=True), start=1):
                yield _row(row, f"{source}, row {number}", ())
        else:
            raise ValueError(
                f"no corpus at {str(source)!r}: give a text, .jsonl or .pt file, a folder, or owner/name:split of a "
                "data set on the hub"
            )


def windows_of(model: HookedTransformer, documents: Iterable[Document], length: int, stride: int) -> Iterator[Window]:
    """All windows of `length` tokens of the documents, `stride` apart.

    Raises:
        ValueError: if a document is text and the model has no tokenizer.
    """
    for document in documents:
        tokens = document.content
        if isinstance(tokens, str):
            if model.tokenizer is None:
                raise ValueError(f"{model.cfg.model_name} has no tokenizer to read {document.source} with")
            tokens = model.tokenizer(tokens, add_special_tokens=False, verbose=False)["input_ids"]
        for start in range(0, len(tokens) - length + 1, stride):
            yield Window(tuple(tokens[start : start + length]), document.source, start, document.category)


def _in_folder(file: Path, folder: Path) -> Iterator[Document]:
    category = file.relative_to(folder).parts[:-1][:1]
    try:
        yield from _file(file, category)
    except ValueError:
        if file.suffix in (".jsonl", ".pt"):
            raise


def _file(file: Path, category: tuple[str, ...]) -> Iterator[Document]:
    if file.suffix == ".jsonl":
        for number, row in read_lines(file):
            yield _row(row, f"{file}, line {number}", category)
    elif file.suffix == ".pt":
        for number, tokens in enumerate(read_tokens(file).tolist(), start=1):
            yield Document(tokens, f"{file}, row {number}", category)
    else:
        yield Document(read(file), str(file), category)


def _row(row: dict[str, Any], place: str, category: tuple[str, ...]) -> Document:
    try:
        category = category_of(row, category)
        if "tokens" in row:
            tokens = torch.tensor(row["tokens"], dtype=torch.long)
            if tokens.ndim != 1:
                raise ValueError(f"tokens have the shape {list(tokens.shape)}; one row of ids was expected")
            return Document(tokens.tolist(), place, category)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{place}: {error}") from error
    for field in TEXT_FIELDS:
        if isinstance(row.get(field), str):
            return Document(row[field], place, category)
    raise ValueError(f"{place}: no field {' or '.join(map(repr, TEXT_FIELDS))} that holds a string, and no 'tokens'")
