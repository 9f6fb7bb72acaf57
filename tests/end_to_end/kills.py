"""Kill runs at random times, resume them, and compare with a run that nobody disturbed.

``python tests/end_to_end/kills.py --kills 50`` prints a line for each kill; the test suite runs a few.

The processes are forked from one that has imported everything, so that a kill costs a second.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

MODULES = {
    "del": "memloc_lens.benchmarks.deletion",
    "inj": "memloc_lens.benchmarks.injection",
    "find": "memloc_lens.data.find",
}
RESULTS = {"del": ["summary.json"], "inj": ["summary.json"], "find": ["sequences.jsonl"]}
SIGNALS = {"KILL": signal.SIGKILL, "TERM": signal.SIGTERM, "INT": signal.SIGINT}
FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(list(MODULES.values()))


def arguments(kind: str, data: Path) -> list[str]:
    """The options of a run of a second."""
    model = f"--model {data / 'model'} --device cpu"
    benchmark = f"{model} --data {data / 'data.jsonl'} --methods random weight-norm activations zero-out --limit 4"
    return {
        "del": f"{benchmark} --ratios 0.1 0.5 --negatives 3 --controls 1 --batch 2",
        "inj": f"{benchmark} --ratios 0.2 0.1 --lr 0.05 --target-loss 1 --max-steps 20",
        "find": f"{model} --corpus {data / 'data.jsonl'} --prompt 6 --suffix 8 --min-distinct 1 --min-accuracy 0.1 "
        "--max-distance -1 --batch 1 --dev 2",
    }[kind].split()


def command(kind: str, options: list[str], said: Path) -> None:
    """Run a command in this process, which writes what it says to a file."""
    import importlib

    import torch

    torch.set_num_threads(1)  # as in the test suite
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test suite in the background has it ignored
    sys.argv = ["command", *options]
    with said.open("w") as file, redirect_stderr(file), redirect_stdout(file):
        try:
            importlib.import_module(MODULES[kind]).main()
        except SystemExit as end:
            if isinstance(end.code, str):
                print(end.code)
            file.flush()
            os._exit(1 if isinstance(end.code, str) else end.code or 0)
        file.flush()
    os._exit(0)


def start(kind: str, data: Path, out: Path, further: Sequence[str] = ()) -> Any:
    """Start a run in a process of its own, with further options."""
    options = [*arguments(kind, data), *further, "--out", str(out)]
    said_by(out).write_text("")
    process = FORKS.Process(target=command, args=(kind, options, said_by(out)))
    process.start()
    return process


def said_by(out: Path) -> Path:
    """What the last run beside a run folder said: elsewhere, as its disk may be full."""
    return out.parent.with_suffix(".said")


def finish(kind: str, data: Path, out: Path, further: Sequence[str] = ()) -> float:
    """Run to the end; return the seconds that it took."""
    started = time.monotonic()
    process = start(kind, data, out, further)
    process.join()
    assert process.exitcode == 0, said_by(out).read_text()
    return time.monotonic() - started


def result(kind: str, out: Path) -> tuple[list[str], list[str]]:
    """The records without their seconds, in any order, and the files that are made of them."""
    records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    untimed = [{name: value for name, value in record.items() if "_seconds" not in name} for record in records]
    return sorted(map(str, untimed)), [(out / name).read_text() for name in RESULTS[kind]]


@dataclass(frozen=True)
class Kill:
    """A kill of a run: which signal, after how many records, how the process ended, and whether the result is exact."""

    kind: str
    signal: str
    records: int
    exitcode: int
    exact: bool
    said: str


def kills(data: Path, folder: Path, count: int, seed: int = 0) -> Iterator[Kill]:
    """Kill runs of all kinds with all signals in turn, and resume each until it is finished."""
    draw = random.Random(seed)
    whole = {kind: folder / f"whole-{kind}" for kind in MODULES}
    warm_up = FORKS.Process(target=int)  # waits for the imports
    warm_up.start()
    warm_up.join()
    lasts = {kind: finish(kind, data, out) for kind, out in whole.items()}
    names = list(SIGNALS)
    pairs = [(kind, names[(turn + shift) % 3]) for shift in range(3) for turn, kind in enumerate(MODULES)]
    made = 0
    while made < count:
        kind, name = pairs[made % len(pairs)]
        out = folder / f"killed-{made}"
        process = start(kind, data, out)
        time.sleep(draw.uniform(0.1, 1.0) * lasts[kind])
        if process.exitcode is None:
            os.kill(process.pid, SIGNALS[name])
        process.join()
        if process.exitcode == 0:  # it was finished before the signal came
            shutil.rmtree(out)
            continue
        said, file = said_by(out).read_text(), out / "records.jsonl"
        records = file.read_bytes().count(b"\n") if file.exists() else 0
        finish(kind, data, out)
        yield Kill(kind, name, records, process.exitcode, result(kind, out) == result(kind, whole[kind]), said)
        made += 1


def two_at_once(kind: str, data: Path, out: Path) -> tuple[list[int], list[str]]:
    """Run two processes in one folder at once; return how they ended, and what they said."""
    options = [*arguments(kind, data), "--out", str(out)]
    said = [out.with_suffix(f".{number}") for number in range(2)]
    processes = [FORKS.Process(target=command, args=(kind, options, file)) for file in said]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes], [file.read_text() for file in said]


def main() -> None:
    """Kill many runs, and print what became of each."""
    import tempfile

    from conftest import make_recited

    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        make_recited(Path(name) / "recited")
        exact = 0
        for kill in kills(Path(name) / "recited", Path(name), options.kills, options.seed):
            exact += kill.exact
            print(
                f"{kill.kind:4} {kill.signal:4} after {kill.records:2} records, exit {kill.exitcode:4}: "
                f"{'exact' if kill.exact else 'NOT EXACT'}",
                flush=True,
            )
        print(f"{exact} of {options.kills} exact")


if __name__ == "__main__":
    main()
