"""Where the jobs of a run are done: in this process, or by many workers."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, get_args

import torch

from memloc_lens.checks import check_choice, check_number
from memloc_lens.runs.jobs import Engine, serial

EngineName = Literal["serial", "ray"]


@dataclass(frozen=True)
class Parallel:
    """Where the jobs of a run are done. It decides no record, so a run may be resumed with another.

    Args:
        engine: Who does the work: this process ("serial"), or workers with a model each, here or on a cluster ("ray").
        workers: Number of workers. Default: one a GPU, or without GPUs as many as have a core for each thread.
        gpus_per_worker: GPUs that a worker takes; 0.5 puts two on one. Default: as many as the model has (n_devices) on
            CUDA, else 0.
        address: Address of a ray cluster, or "auto" for that of this node. Default: workers on this machine.
    """

    engine: EngineName = "serial"
    workers: int | None = None
    gpus_per_worker: float | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        check_choice("engine", self.engine, get_args(EngineName))
        if self.workers is not None:
            check_number("workers", self.workers, least=1, whole=True)
        if self.gpus_per_worker is not None:
            check_number("gpus_per_worker", self.gpus_per_worker, least=0)
        if self.engine == "serial" and (self.workers, self.gpus_per_worker, self.address) != (None, None, None):
            raise ValueError("engine is 'serial', which has one worker, this process; use --engine ray for others")
        if self.engine == "ray" and find_spec("ray") is None:
            raise ValueError("engine is 'ray', and it is not installed: pip install \"memloc_lens[ray]\"")

    def check_gpus(self, n_devices: int) -> None:
        """Refuse workers with fewer GPUs than share the layers of their model.

        Raises:
            ValueError: stating both numbers.
        """
        if n_devices > 1 and self.gpus_per_worker is not None and self.gpus_per_worker < n_devices:
            raise ValueError(
                f"n_devices is {n_devices} and gpus_per_worker is {self.gpus_per_worker:g}; give every worker as many "
                "GPUs as its model has, or leave out gpus_per_worker"
            )

    def engine_for(self, device: str | torch.device | None, n_devices: int = 1) -> Engine:
        """Return the engine for a run whose model is on a device, or on as many GPUs.

        Example:
            >>> Parallel().engine_for(model.cfg.device) is serial
            True
        """
        if self.engine == "serial":
            return serial
        from memloc_lens.runs.ray_engine import RayEngine

        default = n_devices if torch.device(device or "cpu").type == "cuda" else 0
        gpus = default if self.gpus_per_worker is None else self.gpus_per_worker
        return RayEngine(self.workers, gpus, self.address)
