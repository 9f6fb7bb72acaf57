"""Localizers: model + sequence -> one score a component, higher is more responsible.

Every localizer is a frozen dataclass whose fields are its settings and whose call is the method. A new one is a file
with such a class, and its line in `METHODS`: names, command lines and ``--help`` follow from it.
"""

from memloc_lens.localizers.activations import Activations
from memloc_lens.localizers.baselines import Random, WeightNorm
from memloc_lens.localizers.drop_masks import BalancedSubnet, DropMask
from memloc_lens.localizers.gradients import Gradient, IterativeGradient
from memloc_lens.localizers.integrated_gradients import IntegratedGradients
from memloc_lens.localizers.learned_masks import HardConcrete, Slimming
from memloc_lens.localizers.scoring import Localizer
from memloc_lens.localizers.wrappers import Contrast, Protect
from memloc_lens.localizers.zero_out import ZeroOut

METHODS: tuple[type[Localizer], ...] = (
    HardConcrete,
    Slimming,
    ZeroOut,
    IntegratedGradients,
    Activations,
    Gradient,
    IterativeGradient,
    WeightNorm,
    Random,
)
"""The localizers of the package, in the order of tables."""

LOCALIZERS: dict[str, type[Localizer]] = {localizer.name: localizer for localizer in METHODS}
"""The localizers by their names on the command line."""

FURTHER: dict[str, type[Localizer]] = {localizer.name: localizer for localizer in (DropMask, BalancedSubnet)}
"""Localizers that run where they are named, and not by default: they train for minutes."""

WRAPPERS: dict[str, type[Protect] | type[Contrast]] = {"protect": Protect, "contrast": Contrast}
"""Wrappers by what they put before the name of a localizer, as in protect-slimming."""
