"""Log the records of a run to an experiment tracker as they are written.

A tracker is a function and a line of `TRACKERS`. It gets the numbers of a record once the record is on the disk, and a
run goes on without a tracker that fails.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from memloc_lens.checks import check_choice, in_one_line
from memloc_lens.runs.records import KEY
from memloc_lens.runs.schema import Record
from memloc_lens.runs.visible import visible

Log = Callable[[dict[str, float], int], None]
"""Logs the numbers of a record by their names; the second argument counts the records of the folder from 1."""

OpenTracker = Callable[[Path, Mapping[str, Any]], AbstractContextManager[Log]]
"""Opens a tracker for a run folder, which exists, and its configuration."""


@contextmanager
def to_wandb(folder: Path, config: Mapping[str, Any]) -> Iterator[Log]:
    """Log to Weights & Biases: a run a process, those of a folder in one group; files in `folder/wandb`."""
    import wandb

    with wandb.init(
        project="memloc_lens",
        name=folder.name,
        group=folder.name,
        dir=folder,
        config=dict(config),
        reinit="create_new",  # a run that the user has open stays as it is
    ) as run:
        yield lambda numbers, count: run.log(numbers, step=count)


@contextmanager
def to_tensorboard(folder: Path, config: Mapping[str, Any]) -> Iterator[Log]:
    """Log to files of TensorBoard in `folder/tensorboard`."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder / "tensorboard")) as writer:
        writer.add_text("config", f"```\n{json.dumps(config, indent=1)}\n```")

        def log(numbers: dict[str, float], count: int) -> None:
            for name, number in numbers.items():
                writer.add_scalar(name, number, count)
            writer.flush()

        yield log


TRACKERS: dict[str, OpenTracker] = {"wandb": to_wandb, "tensorboard": to_tensorboard}
"""Trackers by the names of their libraries."""


def check_tracker(name: str) -> None:
    """Refuse a tracker that is not known, or whose library is not installed.

    Raises:
        ValueError: with the command that installs the library.

    Example:
        >>> check_tracker("wandb")
    """
    check_choice("tracker", name, TRACKERS)
    if find_spec(name) is None:
        raise ValueError(f"tracker is {name!r}, and its library is not installed: pip install {name}")


def numbers_of(record: Record) -> dict[str, float]:
    """Return the numbers of a record under method/ratio/metric; lists and tables cannot be logged.

    Example:
        >>> numbers_of({"sequence": "a", "method": "slimming", "ratio": 0.1, "self_acc": -3, "acc_changes": {"b": 0.0}})
        {'slimming/0.1/self_acc': -3.0}
    """
    place = f"{record['method']}/{record['ratio']}"
    return {
        f"{place}/{name}": float(value)
        for name, value in record.items()
        if name not in KEY and isinstance(value, int | float)
    }


class Tracker(AbstractContextManager["Tracker"]):
    """A tracker that is open; one that fails is told of once on stderr, and gets no more records.

    Args:
        name: an entry of `TRACKERS`.
        folder: of the run.
        config: of the run.

    Raises:
        ValueError: if the tracker cannot be opened.
    """

    def __init__(self, name: str, folder: Path, config: Mapping[str, Any]) -> None:
        self._name, self._open, self._works = name, ExitStack(), True
        try:
            self._log = self._open.enter_context(TRACKERS[name](folder, config))
        except Exception as error:
            raise ValueError(f"the tracker {name} cannot be opened: {in_one_line(error)}; run without it") from error

    def __call__(self, record: Record, count: int) -> None:
        """Log a record that is on the disk, as the one with this number."""
        self._attempt(lambda: self._log(numbers_of(record), count))

    def __exit__(self, *error: Any) -> None:
        self._attempt(lambda: self._open.__exit__(*error))

    def _attempt(self, action: Callable[[], object]) -> None:
        if not self._works:
            return
        try:
            action()
        except Exception as error:  # whatever a tracker raises: the records matter more
            self._works = False
            said = visible(in_one_line(error))
            print(f"\nthe tracker {self._name} failed, and the run goes on without it: {said}", file=sys.stderr)
            with suppress(Exception):
                self._open.close()
