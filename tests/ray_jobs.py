"""What workers of ray are sent in tests: they import this module, and nothing else of the tests."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from memloc_lens import Random


@dataclass(frozen=True)
class Mortal(Random):
    """A method that kills its process the first time it is asked."""

    name: ClassVar[str] = "mortal"
    flag: str = ""

    def __call__(self, model, sequence):
        if not Path(self.flag).exists():
            Path(self.flag).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(model, sequence)


@dataclass(frozen=True)
class Unsure(Random):
    """A method whose scores of one sequence are not numbers."""

    name: ClassVar[str] = "unsure"
    of: str = ""

    def __call__(self, model, sequences):
        scores = super().__call__(model, sequences)
        for own, row in zip(sequences, scores, strict=True):
            row *= torch.nan if own.id == self.of else 1
        return scores


def make_work(folder: Path):
    """Make a worker that does what its jobs say, and keeps count of them in a folder."""

    def work(job):
        (name,) = {key[0] for key in job.keys}
        with (folder / name).open("a") as file:
            file.write(f"{os.getpid()}\n")
        for key in job.keys:
            if job.content == "die" and key[1] == "b":
                os.kill(os.getpid(), signal.SIGKILL)
            if job.content == "fail" and key[1] == "b":
                raise ValueError("losses are NaN")
            yield {"name": key[0], "part": key[1], "threads": torch.get_num_threads(), "at": os.getcwd()}

    return work


@dataclass(frozen=True)
class MakeWork:
    folder: Path

    def __call__(self):
        return make_work(self.folder)
