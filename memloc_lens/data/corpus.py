"""Read a corpus document by document, and cut documents into windows of tokens."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from memloc_lens.data.column_formats import is_saved_data_set
from memloc_lens.data.opening import NotText, exists, path_of
from memloc_lens.data.readers import is_plain_text, rows
from memloc_lens.data.row import Row, category_of, content_of, errors_at
from memloc_lens.data.token_formats import pair_of
from memloc_lens.library_types import HookedModel
from memloc_lens.sequence import subjects


@dataclass(frozen=True)
class Document:
    """A document of a corpus.

    Args:
        content: its text, or its token ids.
        source: its file, and its line or row.
        category: its subjects, or one subject.
    """

    content: str | list[int]
    source: str
    category: str | tuple[str, ...] = ()


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of a document.

    Args:
        tokens: ids.
        source: file of the document, and its line or row.
        start: index in the document of the first token.
        category: subjects of the document.
    """

    tokens: tuple[int, ...]
    source: str
    start: int
    category: tuple[str, ...]


def read_corpus(sources: Sequence[str | Path], names: Sequence[str] = ("*",)) -> Iterator[Document]:
    """Read the documents of a corpus, always in the same order.

    Args:
        sources: files (`readers.py` lists the formats; a plain text file is one document), folders of files, or
            owner/name:split of data sets on the hub, which are streamed; the default split is "train". A row has a
            text or `tokens`, and optionally a `category`; in a folder the default category is the subfolder.
        names: patterns of the files to read in folders. Plain files there that are not text in UTF-8 are skipped.

    Returns:
        The documents.

    Raises:
        ValueError: if a source cannot be read, or a row has no content: with the file, the line or row, and the reason.

    Example:
        >>> from memloc_lens.data.corpus import read_corpus
        >>> from memloc_lens.data.definitions import DEFINITIONS
        >>> len(list(read_corpus([DEFINITIONS])))
        65
    """
    for source in sources:
        folder = path_of(source)
        if exists(folder) and folder.is_dir() and not is_saved_data_set(folder):
            yield from _folder(folder, names)
        else:
            yield from map(_document, rows(source, "corpus", streaming=True))


def windows_of(model: HookedModel, documents: Iterable[Document], length: int, stride: int) -> Iterator[Window]:
    """Cut documents into windows.

    Args:
        model: reads the texts with its tokenizer.
        documents: to cut. Those with fewer than `length` tokens have no window.
        length: tokens in a window.
        stride: tokens from the start of one window to the start of the next.

    Returns:
        The windows in the order of the documents.

    Raises:
        ValueError: if a document is text and the model has no tokenizer.

    Example:
        >>> from memloc_lens.data.corpus import Document, windows_of
        >>> windows = windows_of(model, [Document([5, 6, 7, 8, 9], "here")], length=3, stride=2)
        >>> [window.tokens for window in windows]
        [(5, 6, 7), (7, 8, 9)]
    """
    for document in documents:
        tokens, category = document.content, subjects(document.category)
        if isinstance(tokens, str):
            if model.tokenizer is None:
                raise ValueError(f"{model.cfg.model_name} has no tokenizer to read {document.source} with")
            tokens = model.tokenizer(tokens, add_special_tokens=False, verbose=False)["input_ids"]
        for start in range(0, len(tokens) - length + 1, stride):
            yield Window(tuple(tokens[start : start + length]), document.source, start, category)


def _folder(folder: Path, names: Sequence[str]) -> Iterator[Document]:
    for file in sorted(folder.rglob("*")):
        is_wanted = any(fnmatch(file.name, name) for name in names) and not _is_second_half(file)
        if is_wanted and exists(file) and file.is_file():
            category = file.relative_to(folder).parts[:-1][:1]
            yield from _file_in_folder(file, category)


def _is_second_half(file: Path) -> bool:
    """Whether the file was read with its other half."""
    first, second = pair_of(file)
    return file == second != first and first.exists()


def _file_in_folder(file: Path, category: tuple[str, ...]) -> Iterator[Document]:
    """Read a file of a folder. What looks like plain text may be a picture or a program: skip it."""
    try:
        for row in rows(file, "corpus"):
            yield _document(row, category)
    except ValueError as error:
        if not (isinstance(error, NotText) and is_plain_text(file)):
            raise ValueError(f"{error}; to leave the file out, choose files with names") from error


def _document(row: Row, category: tuple[str, ...] = ()) -> Document:
    with errors_at(row["where"]):
        return Document(content_of(row), row["where"], category_of(row, category))
