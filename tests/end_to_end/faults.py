"""Disturb runs on workers of ray, once each, resume those that end, and compare with runs that nobody disturbed.

``python tests/end_to_end/faults.py --faults 50`` prints a line for each fault; the test suite makes a few.

1. A worker is killed, or its node with all that is on it: the run goes on by itself.
2. The command is killed, or told to end, or its disk is full: none of its processes is left, and the same command
   resumes the run. A full disk is one error.

Mounting a small disk takes the rights of root.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle, islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
from ray.cluster_utils import Cluster

sys.path.insert(0, str(Path(__file__).parent))

import kills

from memloc_lens.runs.records import KEY

RAY = "--engine ray --workers 2".split()
FURTHER = {"del": "--methods random activations zero-out hard-concrete slimming".split(), "inj": [], "find": []}
"""DEL has a method that takes a while; INJ trains for every injection."""
KEYS = {"del": KEY, "inj": KEY, "find": ("step", "tokens_sha256")}
PATIENCE = 240
"""Seconds after which a run hangs."""
NODE = dict(num_cpus=1, object_store_memory=2**27)


@dataclass(frozen=True)
class Site:
    """Where runs are disturbed.

    Args:
        disk: a small one, for run folders only.
        stack: undoes what was set up.
    """

    disk: Path
    stack: ExitStack

    @property
    def filler(self) -> Path:
        """A file that takes all room of the disk."""
        return self.disk / "filler"

    @cached_property
    def cluster(self) -> Cluster:
        """Two nodes, each with room for a worker."""
        # "auto" still finds the cluster of the user; paths of sockets have to be short
        own = self.stack.enter_context(tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True))
        self.stack.enter_context(patch.dict(os.environ, RAY_TMPDIR=own))
        cluster = Cluster(initialize_head=True, head_node_args=NODE | dict(include_dashboard=False))
        self.stack.callback(cluster.shutdown)
        cluster.add_node(**NODE)
        return cluster

    def mend(self) -> None:
        """Make room on the disk, and replace a node that is lost."""
        self.filler.unlink(missing_ok=True)
        if "cluster" in vars(self) and not self.cluster.worker_nodes:
            self.cluster.add_node(**NODE)


@contextmanager
def made_site(folder: Path) -> Iterator[Site]:
    """Mount a disk in a folder, and undo all that was set up.

    Raises:
        PermissionError: if no disk can be mounted.
    """
    (disk := folder / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        raise PermissionError(f"no disk can be mounted: {mounted.stderr}")
    with ExitStack() as stack:
        stack.callback(subprocess.run, ["umount", "--lazy", str(disk)], check=True)
        yield Site(disk, stack)


def workers() -> list[psutil.Process]:
    """The workers of ray that this process and those that it started have."""
    return [own for own in psutil.Process().children(recursive=True) if command_of(own).startswith("ray::RayWorker")]


def command_of(process: psutil.Process) -> str:
    """What a process runs; nothing if it has ended."""
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def kill_worker(site: Site, pid: int) -> None:
    """Kill a worker."""
    workers()[0].kill()


def kill_node(site: Site, pid: int) -> None:
    """Kill the node that is not the head."""
    site.cluster.remove_node(*site.cluster.worker_nodes, allow_graceful=False)


def replace_node(site: Site, pid: int) -> None:
    """Kill the node that is not the head, and let another one join."""
    kill_node(site, pid)
    site.mend()


def kill_command(site: Site, pid: int) -> None:
    """Kill the process of the command."""
    os.kill(pid, signal.SIGKILL)


def end_command(site: Site, pid: int) -> None:
    """Tell the command to end."""
    os.kill(pid, signal.SIGTERM)


def fill_disk(site: Site, pid: int) -> None:
    """Leave no room on the disk."""
    with suppress(OSError), site.filler.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


FAULTS: dict[str, tuple[Callable[[Site, int], None], int]] = {
    "worker": (kill_worker, 0),
    "node": (kill_node, 0),
    "KILL": (kill_command, -signal.SIGKILL),
    "replaced": (replace_node, 0),
    "disk": (fill_disk, 1),
    "TERM": (end_command, 128 + signal.SIGTERM),
}
"""What disturbs a run, and the exit status that it then has."""


@dataclass(frozen=True)
class Fault:
    """How a run was disturbed: after how many records, how it ended, what it said, and all that is wrong."""

    kind: str
    name: str
    records: int
    exitcode: int | None
    said: str
    wrong: list[str]


def faults(data: Path, site: Site, pairs: Iterable[tuple[str, str]], seed: int = 0) -> Iterator[Fault]:
    """Disturb a run for each pair of a kind and a fault, and resume it, if it ends, until it is finished."""
    draw = random.Random(seed)
    for kind, name in pairs:
        whole = site.disk.with_name(f"whole-{kind}")
        if not whole.exists():
            kills.finish(kind, data, whole, FURTHER[kind])
        while not (fault := disturbed(kind, name, data, site, whole, draw)):
            pass
        yield fault


def pairs_in_turn() -> Iterator[tuple[str, str]]:
    """All pairs of a kind of run and a fault, over and over."""
    for turn, name in enumerate(cycle(FAULTS)):
        yield list(kills.MODULES)[(turn + turn // len(FAULTS)) % len(kills.MODULES)], name


def disturbed(kind: str, name: str, data: Path, site: Site, whole: Path, draw: random.Random) -> Fault | None:
    """Disturb a run and have it finished; none if it was finished before it could be disturbed."""
    out, (strike, expected) = site.disk / "run", FAULTS[name]
    shutil.rmtree(out, ignore_errors=True)
    on_cluster = ["--address", site.cluster.address] if strike in (kill_node, replace_node) else []
    options = [*FURTHER[kind], *RAY, *on_cluster]
    process = kills.start(kind, data, out, options)
    wait(process, out, len(lines_of(whole)), expected != 0, draw)
    records, struck = len(lines_of(out)), False
    if process.exitcode is None and (expected or workers()):
        with suppress(IndexError, psutil.NoSuchProcess):  # the worker has just ended
            strike(site, process.pid)
            struck = True
    process.join(PATIENCE)
    lines, said = lines_of(out), kills.said_by(out).read_text()
    site.mend()
    if process.exitcode == 0 and (expected or not struck):  # what was left to do was little
        return None
    wrong = list(wrong_end(process, expected, said))
    if process.exitcode:
        kills.finish(kind, data, out, options)
    return Fault(kind, name, records, process.exitcode, said, wrong + list(differences(kind, out, lines, whole)))


def wait(process: Any, out: Path, most: int, may_start: bool, draw: random.Random) -> None:
    """Wait until a run has a random number of records and a worker, or is somewhere in its start; or has ended."""
    records = draw.randrange(-most // 8, most)
    starts = may_start and records < 0
    while process.exitcode is None and not (
        (out / "config.json").exists() and len(lines_of(out)) >= records and (starts or workers())
    ):
        time.sleep(0.005)
    time.sleep(draw.uniform(0, 6) if starts else draw.expovariate(5))


def wrong_end(process: Any, expected: int, said: str) -> Iterator[str]:
    """What is wrong with how a run has ended."""
    if process.exitcode is None:
        yield "it hangs"
        process.kill()
        process.join()
    elif process.exitcode != expected:
        yield f"the exit status is {process.exitcode}"
    if expected == 1 and ("Traceback" in said or sum(line.startswith("error: ") for line in said.splitlines()) != 1):
        yield "no single error"
    if psutil.wait_procs(workers(), timeout=30)[1]:
        yield "workers are left"


def lines_of(out: Path) -> list[bytes]:
    """The whole lines of the records that a run has written so far."""
    file = out / "records.jsonl"
    return file.read_bytes().split(b"\n")[:-1] if file.exists() else []


def differences(kind: str, out: Path, lines: list[bytes], whole: Path) -> Iterator[str]:
    """What is lost of the lines that a run had, or is not as in a run that nobody disturbed."""
    if lines_of(out)[: len(lines)] != lines:
        yield "records are lost"
    keys, expected = (keys_of(kind, run) for run in (out, whole))
    if len(set(keys)) < len(keys):
        yield "records are written twice"
    if set(keys) != set(expected):
        yield "records are missing, or more than there should be"
    if kills.result(kind, out) != kills.result(kind, whole):
        yield "the result is another"


def keys_of(kind: str, out: Path) -> list[tuple[Any, ...]]:
    """What identifies each record of a run."""
    records = map(json.loads, lines_of(out))
    return [tuple(record[name] for name in KEYS[kind]) for record in records]


def main() -> None:
    """Disturb many runs, and print what became of each."""
    from conftest import make_recited

    parser = argparse.ArgumentParser()
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, made_site(Path(name)) as site:
        (data := Path(name) / "recited").mkdir()
        make_recited(data)
        exact = 0
        for fault in faults(data, site, islice(pairs_in_turn(), options.faults), options.seed):
            exact += not fault.wrong
            print(
                f"{fault.kind:4} {fault.name:8} after {fault.records:2} records, exit {fault.exitcode:4}: "
                f"{'; '.join(fault.wrong) or 'exact'}",
                flush=True,
            )
        print(f"{exact} of {options.faults} exact")


if __name__ == "__main__":
    main()
