"""The text on which the embedded model is trained: prose that comes with every Python.

1. Read the language reference (``pydoc_data.topics``), the docstrings and the longer comments of the standard library,
   in chunks of at least a paragraph.
2. Choose passages: openings of chunks that share almost no 5-gram with the other chunks. Assign each passage a number
   of repeats, and remove its chunk.
3. Set some of the other chunks aside as held-out text. The remaining chunks are the background.
4. Lay out rows of equal length. A passage stands at the start of a row, and background fills the row. All other rows
   are background alone, in shuffled epochs.

A passage occurs in its own rows only, so that its number of repeats is the number of times that the model saw it.

``python -m memloc_lens.training.corpus --out FILE`` writes all chunks as JSON lines. Of a chunk that opens with a
passage, training saw the passage only.
"""

import ast
import inspect
import json
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

import torch
from jaxtyping import Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from memloc_lens.data.files import PROMPT_LEN
from memloc_lens.runs.command_line import parser, run_command

END_OF_TEXT = "<|endoftext|>"
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
LEFT_OUT = {"site-packages", "test", "tests", "idle_test", "lib2to3", "ensurepip", "pydoc_data", "__phello__"}
CATEGORIES = {
    "language": "abc ast code codeop contextlib copy dataclasses dis enum functools importlib inspect pickle "
    "pickletools pkgutil pydoc runpy symtable tokenize types typing weakref zipimport",
    "concurrency": "asyncio concurrent multiprocessing queue sched selectors signal subprocess threading",
    "internet": "cgi email ftplib http imaplib ipaddress mailbox nntplib poplib smtplib socket socketserver ssl "
    "telnetlib urllib uuid webbrowser wsgiref xmlrpc",
    "interfaces": "cmd curses getopt idlelib optparse argparse tkinter turtle turtledemo",
    "system": "_pyio distutils fileinput filecmp glob io logging os pathlib platform posixpath ntpath shutil "
    "site sysconfig tarfile tempfile venv zipfile",
    "testing": "bdb cProfile doctest faulthandler pdb profile pstats timeit trace traceback tracemalloc unittest "
    "warnings",
    "numbers": "_pydecimal bisect calendar colorsys datetime decimal fractions heapq numbers random statistics",
    "text": "codecs configparser csv difflib encodings gettext html json locale re shlex string stringprep textwrap "
    "tomllib xml",
}
CATEGORY_OF_MODULE = {module: category for category, modules in CATEGORIES.items() for module in modules.split()}


@dataclass(frozen=True)
class Chunk:
    """Prose of at least a paragraph, and its subject."""

    text: str
    category: str


@dataclass(frozen=True)
class Passage:
    """A text as tokens, and the number of times that training shows it."""

    tokens: tuple[int, ...]
    category: str
    repeats: int


def read_chunks() -> list[Chunk]:
    """Read all prose of the standard library of the running Python, in a fixed order, without exact duplicates."""
    chunks = [
        Chunk(text, "language") for topic in sorted(topics.topics) for text in _paragraph_groups(topics.topics[topic])
    ]
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        if LEFT_OUT.isdisjoint(parts):
            category = CATEGORY_OF_MODULE.get(parts[0].removesuffix(".py"), "other")
            chunks += [Chunk(text, category) for text in _prose_of_source(path)]
    return [chunk for chunk in dict.fromkeys(chunks) if len(chunk.text) >= 60]


def _paragraph_groups(text: str, size: int = 400) -> Iterator[str]:
    group = ""
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        group = f"{group}\n\n{paragraph}" if group else paragraph
        if len(group) >= size:
            yield group
            group = ""
    if group:
        yield group


def _prose_of_source(path: Path) -> Iterator[str]:
    try:
        source = path.read_text("utf-8")
    except UnicodeDecodeError:  # a few codec tables are written in other encodings, and hold no prose
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED) and (docstring := ast.get_docstring(node)):
            yield from _paragraph_groups(docstring)
    for block in re.findall(r"(?:^[ \t]*#[^\n]*\n){3,}", source, re.MULTILINE):
        text = inspect.cleandoc(re.sub(r"^[ \t]*#[#:!]*", "", block, flags=re.MULTILINE))
        if _share_of_prose(text) > 0.75:
            yield text


def _share_of_prose(text: str) -> float:
    return sum(character.isalpha() or character in " ,.\n" for character in text) / max(len(text), 1)


def train_tokenizer(chunks: list[Chunk], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer of `vocab_size` tokens whose token 0 ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((chunk.text for chunk in chunks), trainer)
    return tokenizer


def choose_passages(
    chunks: list[Chunk], tokenizer: Tokenizer, repeats: list[int], per_count: int, length: int, seed: int
) -> tuple[list[Passage], list[Chunk]]:
    """Return passages of `length` tokens that occur nowhere else, and the other chunks.

    Args:
        chunks: the whole corpus.
        tokenizer: tokenizes the text of a passage to the same tokens.
        repeats: numbers of repeats.
        per_count: number of passages for each number of repeats.
        length: number of tokens in a passage.
        seed: of the order in which chunks are tried.

    Raises:
        ValueError: if the corpus has too few such passages.
    """
    encoded = [encoding.ids for encoding in tokenizer.encode_batch([chunk.text for chunk in chunks])]
    occurrences = Counter(gram for tokens in encoded for gram in _five_grams(tokens))
    chosen: list[Passage] = []
    used = set()
    order = list(range(len(chunks)))
    random.Random(seed).shuffle(order)
    for index in order:
        if len(chosen) == per_count * len(repeats):
            break
        tokens = encoded[index][:length]
        repeated = sum(occurrences[gram] > 1 for gram in _five_grams(tokens))
        if len(tokens) == length and repeated <= 4 and _is_clean(tokens, tokenizer):
            chosen.append(Passage(tuple(tokens), chunks[index].category, repeats[len(chosen) % len(repeats)]))
            used.add(index)
    else:
        raise ValueError(f"only {len(chosen)} of {per_count * len(repeats)} passages found; lower per_count")
    return chosen, [chunk for index, chunk in enumerate(chunks) if index not in used]


def _five_grams(tokens: list[int]) -> set[tuple[int, ...]]:
    return set(zip(*(tokens[start:] for start in range(5)), strict=False))


def _is_clean(tokens: list[int], tokenizer: Tokenizer) -> bool:
    text = tokenizer.decode(tokens)
    return (
        text[0].isupper()
        and _share_of_prose(text) > 0.88
        and len(set(tokens[PROMPT_LEN:])) >= 24
        and tokenizer.encode(text).ids == tokens
        and tokenizer.encode(tokenizer.decode(tokens[:PROMPT_LEN])).ids == tokens[:PROMPT_LEN]
    )


def split_held_out(chunks: list[Chunk], tokenizer: Tokenizer, tokens: int, seed: int) -> tuple[list[str], list[Chunk]]:
    """Return whole chunks of at least `tokens` tokens in total that training never sees, and the other chunks."""
    order = list(range(len(chunks)))
    random.Random(seed).shuffle(order)
    held_out: list[int] = []
    total = 0
    while total < tokens:
        held_out.append(order.pop())
        total += len(tokenizer.encode(chunks[held_out[-1]].text).ids)
    return [chunks[index].text for index in held_out], [chunks[index] for index in sorted(order)]


def training_rows(
    passages: list[Passage],
    background: list[Chunk],
    tokenizer: Tokenizer,
    rows: int,
    row_length: int,
    seed: int,
    without: Collection[int] = (),
) -> Int[Tensor, "row pos"]:
    """Return the rows in training order, with every passage as often as its number of repeats says.

    Args:
        passages: with their numbers of repeats.
        background: fills the rows.
        tokenizer: of the background.
        rows: number of rows.
        row_length: number of tokens in a row.
        seed: of both orders.
        without: indices of passages that are left out. Background alone fills their rows; all other rows keep their
            places and their passages.

    Raises:
        ValueError: if the repeats are more than the rows.
    """
    generator = random.Random(seed)
    stream = _background_stream(background, tokenizer, generator)
    repeated = [index for index, passage in enumerate(passages) for _ in range(passage.repeats)]
    if len(repeated) > rows:
        raise ValueError(f"{len(repeated)} repeats do not fit into {rows} rows; train more steps")
    openings = [() if index in without else (*passages[index].tokens, 0) for index in repeated]
    openings += [()] * (rows - len(repeated))
    generator.shuffle(openings)
    return torch.tensor([[*opening, *(next(stream) for _ in range(row_length - len(opening)))] for opening in openings])


def _background_stream(background: list[Chunk], tokenizer: Tokenizer, generator: random.Random) -> Iterator[int]:
    encoded = [encoding.ids for encoding in tokenizer.encode_batch([chunk.text for chunk in background])]
    while True:
        generator.shuffle(encoded)
        for tokens in encoded:
            yield from tokens
            yield 0


@dataclass(frozen=True)
class CorpusSettings:
    """Where to write the corpus.

    Args:
        out: JSON lines file to write the chunks to.
    """

    out: Path


def main() -> None:
    """Run the command line: ``python -m memloc_lens.training.corpus --help``."""
    run_command(parser(CorpusSettings, "python -m memloc_lens.training.corpus", __doc__), write, show)


def write(settings: CorpusSettings) -> int:
    """Write the chunks as JSON lines, and return how many there are."""
    lines = [json.dumps({"text": chunk.text, "category": [chunk.category]}) for chunk in read_chunks()]
    settings.out.write_text("".join(line + "\n" for line in lines), "utf-8")
    return len(lines)


def show(settings: CorpusSettings, count: int) -> None:
    """Print where the chunks are."""
    print(f"{count} chunks: {settings.out}")


if __name__ == "__main__":
    main()
