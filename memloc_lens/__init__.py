"""Locate the parts of a language model that hold a sequence it has memorized, and switch them off."""

from memloc_lens.ablation import ablate, mask, mean_activations
from memloc_lens.components import (
    COMPONENTS,
    HEADS,
    NEURONS,
    WEIGHTS,
    Component,
    ComponentSet,
    Neurons,
    set_from_indices,
    top_components,
    top_neurons,
)
from memloc_lens.data import load_definitions, load_sequences
from memloc_lens.erase import erase_sequences
from memloc_lens.injection import Injection, inject
from memloc_lens.localizers import (
    LOCALIZERS,
    Activations,
    BalancedSubnet,
    Contrast,
    DropMask,
    Gradient,
    HardConcrete,
    IntegratedGradients,
    IterativeGradient,
    Localizer,
    Protect,
    Random,
    Slimming,
    WeightNorm,
    ZeroOut,
)
from memloc_lens.localizers.fusion import Fusion, fit_fusion
from memloc_lens.memory import memory_budget
from memloc_lens.models import load_model
from memloc_lens.sequence import MemorizedSequence
from memloc_lens.smallest_set import SmallestSet, smallest_set

__all__ = [
    "COMPONENTS",
    "HEADS",
    "LOCALIZERS",
    "NEURONS",
    "WEIGHTS",
    "Activations",
    "BalancedSubnet",
    "Component",
    "ComponentSet",
    "Contrast",
    "DropMask",
    "Fusion",
    "Gradient",
    "HardConcrete",
    "Injection",
    "IntegratedGradients",
    "IterativeGradient",
    "Localizer",
    "MemorizedSequence",
    "Neurons",
    "Protect",
    "Random",
    "Slimming",
    "SmallestSet",
    "WeightNorm",
    "ZeroOut",
    "ablate",
    "erase_sequences",
    "fit_fusion",
    "inject",
    "load_definitions",
    "load_model",
    "load_sequences",
    "mask",
    "mean_activations",
    "memory_budget",
    "set_from_indices",
    "smallest_set",
    "top_components",
    "top_neurons",
]
