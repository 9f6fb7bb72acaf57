"""A command that prints its help, or refuses an argument, does not wait for libraries that it does not need."""

import json
import shlex
import subprocess
import sys
from importlib.util import find_spec

from memloc_lens.console import COMMANDS

SLOW = {
    *("transformer_lens", "transformers", "huggingface_hub", "datasets", "pyarrow", "pandas", "sklearn", "scipy"),
    *("matplotlib", "torch._dynamo"),
}
ASK = """
import contextlib, io, json, shlex, sys
from memloc_lens.console import main

for words in sys.argv[1:]:
    sys.argv = ["memloc", *shlex.split(words)]
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        try:
            main()
        except SystemExit as end:
            status = end.code
    print(json.dumps([status, shown.getvalue()]))
print(json.dumps(list(sys.modules)))
"""


def test_help_and_refusals_import_no_library_that_takes_long():
    asked = [*([command, "--help"] for command in COMMANDS), ["del", "--ratios", "2"], ["inj", "--limit", "-1"]]
    done = subprocess.run([sys.executable, "-c", ASK, *map(shlex.join, asked)], capture_output=True, text=True)
    *answers, imported = map(json.loads, done.stdout.splitlines())
    for (command, *_), (status, shown) in zip(asked, answers[: len(COMMANDS)], strict=False):
        assert status == 0
        assert shown.startswith(f"usage: memloc {command}")
    assert [status for status, _ in answers[len(COMMANDS) :]] == [
        "error: the ratio is 2.0; it must be a number above 0 and at most 1",
        "error: limit is -1; it must be a whole number at least 0",
    ]
    assert sorted(SLOW.intersection(imported)) == [], "import it in the function that calls it; see library_types"


def test_libraries_that_take_long_are_there():
    assert all(map(find_spec, SLOW))
