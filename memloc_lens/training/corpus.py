"""The text on which the embedded model is trained: prose that every Python carries.

1. Read the language reference (``pydoc_data.topics``), the docstrings and the longer
   comments of the standard library, in chunks of a paragraph or more.
2. Choose as *passages* the openings of chunks that share almost no 5-gram with anything
   else in the corpus, and assign each a number of repeats. Their chunks leave the rest.
3. Set some chunks aside as held-out text; the remainder is the background.
4. Lay everything out in rows of equal length: a passage stands at the start of its row and
   background fills what is left; all other rows are background alone, in shuffled epochs.

``python -m memloc_lens.models.training.corpus --out FILE`` writes the chunks as JSON lines: a passage is the opening of
its chunk, of which training saw nothing else.

Because a passage occurs nowhere but in its own rows, the number of times the model saw it
is exactly its number of repeats.
"""

import ast
import inspect
import json
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

import torch
import tyro
from jaxtyping import Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

END_OF_TEXT = "<|endoftext|>"
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
PROMPT_LENGTH = 32  # tokens of a passage that are given when it is to be recalled, as in the paper
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
    """A paragraph or more of prose with the subject it is about."""

    text: str
    category: str


@dataclass(frozen=True)
class Passage:
    """A text of known tokens and the number of times that training shows it."""

    tokens: tuple[int, ...]
    category: str
    repeats: int


def read_chunks() -> list[Chunk]:
    """All prose of the standard library of the running Python, in a fixed order, without exact duplicates."""
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
    """A byte-level BPE tokenizer of `vocab_size` tokens whose token 0 ends a text."""
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
    """Passages of `length` tokens that occur nowhere else, and the chunks that are left without them.

    Args:
        chunks: the whole corpus.
        tokenizer: must give back the passage's tokens for the passage's text.
        repeats: the numbers of repeats, each given to `per_count` passages.
        per_count: passages for each number of repeats.
        length: tokens in a passage.
        seed: of the order in which candidates are taken.

    Raises:
        ValueError: if the corpus has too few distinct candidates.
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
        and len(set(tokens[PROMPT_LENGTH:])) >= 24
        and tokenizer.encode(text).ids == tokens
        and tokenizer.encode(tokenizer.decode(tokens[:PROMPT_LENGTH])).ids == tokens[:PROMPT_LENGTH]
    )


def split_held_out(chunks: list[Chunk], tokenizer: Tokenizer, tokens: int, seed: int) -> tuple[list[str], list[Chunk]]:
    """Whole chunks of about `tokens` tokens in all that training never sees, and the other chunks."""
    order = list(range(len(chunks)))
    random.Random(seed).shuffle(order)
    held_out: list[int] = []
    total = 0
    while total < tokens:
        held_out.append(order.pop())
        total += len(tokenizer.encode(chunks[held_out[-1]].text).ids)
    return [chunks[index].text for index in held_out], [chunks[index] for index in sorted(order)]


def training_rows(
    passages: list[Passage], background: list[Chunk], tokenizer: Tokenizer, rows: int, row_length: int, seed: int
) -> Int[Tensor, "row pos"]:
    """`rows` rows in training order: every passage as often as it is to be repeated, background elsewhere."""
    generator = random.Random(seed)
    stream = _background_stream(background, tokenizer, generator)
    repeated = [passage.tokens for passage in passages for _ in range(passage.repeats)]
    if len(repeated) > rows:
        raise ValueError(f"{len(repeated)} repeats do not fit into {rows} rows; raise the number of steps")
    openings: list[tuple[int, ...]] = [(*tokens, 0) for tokens in repeated] + [()] * (rows - len(repeated))
    generator.shuffle(openings)
    return torch.tensor([[*opening, *(next(stream) for _ in range(row_length - len(opening)))] for opening in openings])


def _background_stream(background: list[Chunk], tokenizer: Tokenizer, generator: random.Random) -> Iterator[int]:
    encoded = [encoding.ids for encoding in tokenizer.encode_batch([chunk.text for chunk in background])]
    while True:
        generator.shuffle(encoded)
        for tokens in encoded:
            yield from tokens
            yield 0


def write(out: Path) -> None:
    """Write the chunks as JSON lines.

    Args:
        out: the file.
    """
    lines = (json.dumps({"text": chunk.text, "category": [chunk.category]}) for chunk in read_chunks())
    out.write_text("".join(line + "\n" for line in lines), "utf-8")


if __name__ == "__main__":
    tyro.cli(write)
