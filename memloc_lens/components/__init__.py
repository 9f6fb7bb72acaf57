"""Components of a model: their kinds, sets of them, and how a set is chosen from scores."""

from memloc_lens.components.kinds import (
    COMPONENTS,
    HEADS,
    NEURONS,
    WEIGHTS,
    Component,
    ComponentName,
    Edit,
    Hook,
    check_component,
    component_of,
    post,
)
from memloc_lens.components.selection import Rounding, Scope, count_of, top_components, top_neurons
from memloc_lens.components.sets import ComponentSet, Neurons, set_from_indices

__all__ = [
    "COMPONENTS",
    "HEADS",
    "NEURONS",
    "WEIGHTS",
    "Component",
    "ComponentName",
    "ComponentSet",
    "Edit",
    "Hook",
    "Neurons",
    "Rounding",
    "Scope",
    "check_component",
    "component_of",
    "count_of",
    "post",
    "set_from_indices",
    "top_components",
    "top_neurons",
]
