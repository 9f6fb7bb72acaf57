"""Which neurons hold a sequence that a language model has memorized, and what happens when they are switched off?"""

from memloc_lens.ablation import ablate, mask, mean_activations
from memloc_lens.data import load_definitions, load_sequences
from memloc_lens.injection import Injection, inject
from memloc_lens.localizers import (
    LOCALIZERS,
    Activations,
    HardConcrete,
    IntegratedGradients,
    Random,
    Slimming,
    WeightNorm,
    ZeroOut,
)
from memloc_lens.memory import memory_budget
from memloc_lens.models import load_model
from memloc_lens.neurons import Neurons, top_neurons
from memloc_lens.sequence import MemorizedSequence

__all__ = [
    "LOCALIZERS",
    "Activations",
    "HardConcrete",
    "Injection",
    "IntegratedGradients",
    "MemorizedSequence",
    "Neurons",
    "Random",
    "Slimming",
    "WeightNorm",
    "ZeroOut",
    "ablate",
    "inject",
    "load_definitions",
    "load_model",
    "load_sequences",
    "mask",
    "mean_activations",
    "memory_budget",
    "top_neurons",
]
