"""Localizers: model + sequence -> one score a neuron, higher is more responsible.

Every localizer is a frozen dataclass whose fields are its hyperparameters and whose call is the method.
"""

from memloc_lens.localizers.activations import Activations
from memloc_lens.localizers.baselines import Random, WeightNorm
from memloc_lens.localizers.integrated_gradients import IntegratedGradients
from memloc_lens.localizers.learned_masks import HardConcrete, Slimming
from memloc_lens.localizers.zero_out import ZeroOut

LOCALIZERS = {
    "hard-concrete": HardConcrete,
    "slimming": Slimming,
    "zero-out": ZeroOut,
    "integrated-gradients": IntegratedGradients,
    "activations": Activations,
    "weight-norm": WeightNorm,
    "random": Random,
}
"""The localizers by their names on the command line."""

__all__ = ["LOCALIZERS", *sorted(localizer.__name__ for localizer in LOCALIZERS.values())]
