"""The tests of documentation examples themselves: they fail where an example is wrong."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from test_readme import load

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def examples():
    return load(ROOT / "conftest.py")


def shell(source: str) -> SimpleNamespace:
    return SimpleNamespace(parsed=source)


@pytest.mark.parametrize("command", [
    "memloc del --limit 2 --hard-concrete.lr 0.1",
    "python -m memloc_lens.benchmarks.del --component head \\\n    --ratios 0.1 0.2",
    "memloc agreement runs/del runs/inj",
    "pip install --no-such-option . && memloc inj --keep-norms  # a comment",
    "python -m memloc_lens.training.card --folder FOLDER",
])  # fmt: skip
def test_commands_that_parse(examples, command):
    examples.parse_commands(shell(command))


@pytest.mark.parametrize("command", [
    "memloc del --no-such-option 2",
    "pip install . && memloc inj --limit many",
    "memloc agreement runs/del",
    "python -m memloc_lens.training.card --no-such-option FOLDER",
])  # fmt: skip
def test_commands_that_are_refused(examples, command):
    with pytest.raises(AssertionError, match="is refused"):
        examples.parse_commands(shell(command))


def test_settings_are_checked_too(examples):
    with pytest.raises(ValueError, match="limit is -1"):
        examples.parse_commands(shell("memloc del --limit -1"))


@pytest.mark.parametrize(("printed", "expected", "same"), [
    ("48 % left\n", "48 % left\n", True),
    ("48 % left", "50 % left", True),  # processors round differently
    ("48 % left", "60 % left", False),
    ("48 % left", "48 % right", False),
    ("(4, 5)", "(4,5)", False),
    ("", "something", False),
])  # fmt: skip
def test_outputs_are_compared(examples, printed, expected, same):
    example = SimpleNamespace(parsed=expected, namespace={"_printed": printed})
    assert (examples.compare_output(example) is None) == same
