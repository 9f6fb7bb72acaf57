"""Measure how long a DEL run takes in one process and on workers of ray, and compare their records.

    python benchmarks/throughput.py --out benchmarks/results/throughput-cpu.json

The embedded model, one run after the other: in one process on one thread, in one process on as many threads as there
are workers, on workers with a thread each, and so again with a worker killed in the middle. Seconds are those of the
whole command. Of them, loading ends with the first record, and starting is from the last record of the state before,
which the command makes itself, to the first that a worker makes.

Records are compared without their seconds with those of one thread: more threads in a process round sums otherwise.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from memloc_lens.checks import check_number
from memloc_lens.runs.command_line import parser, run_command
from memloc_lens.runs.provenance import provenance
from memloc_lens.runs.records import untimed


@dataclass(frozen=True)
class ThroughputSettings:
    """What to run.

    Args:
        limit: Number of sequences.
        methods: Localizers.
        ratios: Shares of the components.
        workers: Number of workers.
        out: JSON file to write the results to.
    """

    limit: int = 40
    methods: tuple[str, ...] = ("activations", "gradient")
    ratios: tuple[float, ...] = (0.05, 0.1)
    workers: int = 2
    out: Path | None = None

    def __post_init__(self) -> None:
        check_number("limit", self.limit, least=1, whole=True)
        check_number("workers", self.workers, least=1, whole=True)

    @property
    def records(self) -> int:
        """How many records a run makes."""
        return self.limit * (1 + len(self.methods) * len(self.ratios))


@dataclass(frozen=True)
class Way:
    """A way to do the run: in one process on some threads, or on workers, of which one may be killed."""

    threads: int = 1
    workers: int = 0
    is_disturbed: bool = False


def ways(settings: ThroughputSettings) -> dict[str, Way]:
    """Return all ways by their names in the table."""
    count = settings.workers
    return {
        "1 thread": Way(),
        f"{count} threads": Way(threads=count),
        f"{count} workers": Way(workers=count),
        f"{count} workers, one killed": Way(workers=count, is_disturbed=True),
    }


def command_of(settings: ThroughputSettings, way: Way, out: Path) -> list[str]:
    """Return the command that does the run in a way."""
    options = [
        "--limit",
        settings.limit,
        "--methods",
        *settings.methods,
        "--ratios",
        *settings.ratios,
        "--device",
        "cpu",
    ]
    engine = ["--engine", "ray", "--workers", way.workers] if way.workers else []
    return [sys.executable, "-m", "memloc_lens.benchmarks.del", *map(str, [*options, *engine, "--quiet", "--out", out])]


def timed(settings: ThroughputSettings, way: Way, out: Path) -> dict[str, Any]:
    """Do the run in a way; return the seconds that it took, and those of its parts."""
    environment = os.environ | {"OMP_NUM_THREADS": str(way.threads)}
    started, seen, is_disturbed = time.perf_counter(), [0.0], False
    process = subprocess.Popen(command_of(settings, way, out), env=environment, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        time.sleep(0.02)
        seen += [time.perf_counter() - started] * (written(out) + 1 - len(seen))  # when each record was first seen
        if way.is_disturbed and not is_disturbed and len(seen) > (settings.limit + settings.records) / 2:
            kill_worker(process.pid)
            is_disturbed = True
    if process.returncode:
        raise ValueError(f"the run in {out} ended with the status {process.returncode}")
    last = settings.limit
    return {"seconds": time.perf_counter() - started, "loading": seen[1], "starting": seen[last + 1] - seen[last]}


def kill_worker(pid: int) -> None:
    """Kill a worker of a run."""
    of_run = psutil.Process(pid).children(recursive=True)
    next(own for own in of_run if "ray::RayWorker" in " ".join(own.cmdline())).kill()


def written(out: Path) -> int:
    """Return how many records a run has written."""
    file = out / "records.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def records_of(out: Path) -> list[str]:
    """Return the records of a run without their seconds, in an order that does not depend on it."""
    return sorted(str(untimed(json.loads(line))) for line in (out / "records.jsonl").read_text().splitlines())


def run(settings: ThroughputSettings) -> dict[str, Any]:
    """Do all runs, and write how long they took."""
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, way in ways(settings).items():
            rows[name] = timed(settings, way, Path(folder) / name)
            rows[name]["equal"] = records_of(Path(folder) / name) == records_of(Path(folder) / "1 thread")
    about = {name: value for name, value in provenance().items() if name in ("commit", "machine")}
    result = {"settings": json.loads(json.dumps(asdict(settings), default=str)), **about, "ways": rows}
    if settings.out:
        settings.out.write_text(json.dumps(result, indent=1) + "\n")
    return result


def show(settings: ThroughputSettings, result: dict[str, Any]) -> None:
    """Print the table."""
    title = f"{settings.records} records of {settings.limit} sequences; {result['machine']}"
    table = Table("", "seconds", "loading", "starting", "same records", title=title, title_justify="left")
    for name, row in result["ways"].items():
        figures = [f"{row[part]:.1f}" for part in ("seconds", "loading", "starting")]
        table.add_row(name, *figures, "yes" if row["equal"] else "no")
    Console().print(table)


def main() -> None:
    """Run the command line: ``python benchmarks/throughput.py --help``."""
    run_command(parser(ThroughputSettings, "python benchmarks/throughput.py", __doc__), run, show)


if __name__ == "__main__":
    main()
