"""The console script: `memloc` and the name of a command of `COMMANDS`."""

import importlib
import sys

COMMANDS = {
    "del": ("memloc_lens.benchmarks.deletion", "drop located components; measure forgetting and damage"),
    "inj": ("memloc_lens.benchmarks.injection", "inject texts into known components; measure whether they are found"),
    "find": ("memloc_lens.data.find", "find sequences of a corpus that a model has memorized"),
    "agreement": ("memloc_lens.benchmarks.agreement", "compare how a DEL and an INJ run rank the methods"),
    "specificity": ("memloc_lens.benchmarks.specificity", "analyse whether located components are specific"),
    "roles": ("memloc_lens.benchmarks.roles", "tell what located neurons do"),
    "frontier": ("memloc_lens.benchmarks.frontier", "compare methods of DEL runs at equal damage"),
    "erase": ("memloc_lens.erase.command", "erase memorized sequences, and write a checkpoint without them"),
    "audit": ("memloc_lens.erase.audit_command", "try to bring erased sequences back, and measure what else was lost"),
    "forgetting": (
        "memloc_lens.erase.benchmark",
        "compare ways of forgetting, by sets and by training",
    ),
    "compare": ("memloc_lens.erase.compare", "tell in which weights two checkpoints differ, and what only one recites"),
    "report": (
        "memloc_lens.report.command",
        "write a page about runs and erasures, with pictures, to read in a browser",
    ),
}
"""The module of each command, whose `main` runs it, and what it does."""


def main() -> None:
    """Run the command that the first argument names."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print("usage: memloc COMMAND [OPTIONS]\n\ncommands (memloc COMMAND --help explains one):")
        print("\n".join(f"  {command:12} {about}" for command, (_, about) in COMMANDS.items()))
        return
    if name not in COMMANDS:
        sys.exit(f"error: no command is called {name!r}; there are {', '.join(COMMANDS)}")
    sys.argv = [f"memloc {name}", *arguments]
    importlib.import_module(COMMANDS[name][0]).main()
