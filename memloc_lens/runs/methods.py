"""The methods of a run: by name, from a module of the user's own, or as configured localizers."""

import hashlib
import importlib
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from memloc_lens.components import Component, ComponentName
from memloc_lens.library_types import HookedModel
from memloc_lens.localizers import FURTHER, LOCALIZERS, WRAPPERS
from memloc_lens.localizers.scoring import AnyLocalizer, name_of
from memloc_lens.runs.schema import BEFORE, INJECTION
from memloc_lens.sequence import MemorizedSequence

Method = str | AnyLocalizer
"""A method by name, "package.module:Class", or a localizer with its settings."""


def settings_of(localizer: AnyLocalizer) -> dict[str, Any]:
    """Return what decides the scores of a method: the callable, and the fields of a dataclass."""
    kind = localizer if hasattr(localizer, "__qualname__") else type(localizer)
    own: dict[str, Any] = {}
    if is_dataclass(localizer) and not isinstance(localizer, type):
        own = {entry.name: _identity(getattr(localizer, entry.name)) for entry in fields(localizer)}
    return {"callable": f"{kind.__module__}:{kind.__qualname__}", **own}


def _identity(value: Any) -> Any:
    """Return what stands for the value of a field in a configuration: of sequences their number and a hash."""
    if isinstance(value, list | tuple) and value and all(isinstance(item, MemorizedSequence) for item in value):
        content = [(item.tokens.tolist(), item.prompt_len) for item in value]
        return {"sequences": len(value), "sha256": hashlib.sha256(repr(content).encode()).hexdigest()[:16]}
    if isinstance(value, list | tuple):
        return [_identity(item) for item in value]
    return settings_of(value) if callable(value) else value


def resolve(method: Method, presets: Mapping[str, AnyLocalizer] | None = None) -> AnyLocalizer:
    """Return the localizer that a name stands for, or the localizer itself.

    Args:
        method: a name of the package's own, "package.module:Class" (or a function of a module), or a localizer.
        presets: a benchmark's own settings of some methods.

    Raises:
        ValueError: if there is no such method, the module or class cannot be used, or its name.

    Example:
        >>> resolve("activations")
        Activations(reduction='abs_mean', component='neuron')
    """
    if not isinstance(method, str):
        if isinstance(method, type) or not callable(method):
            raise ValueError(f"method {method!r} is not a localizer; give an instance as HardConcrete(), or a name")
        return _well_named(method, method)
    known = LOCALIZERS | FURTHER
    if method in known:
        return (presets or {}).get(method) or known[method]()
    wrapper, _, inner = method.partition("-")
    if wrapper in WRAPPERS and ":" not in method:
        return WRAPPERS[wrapper](resolve(inner, presets))
    if ":" not in method:
        raise ValueError(
            f"no method is called {method!r}; there are {', '.join(known)}, each also with "
            f"{' or '.join(f'{wrapper}-' for wrapper in WRAPPERS)} before its name, and your own as "
            "package.module:Class"
        )
    return _imported(method)


def _imported(method: str) -> AnyLocalizer:
    module_name, _, attribute = method.partition(":")
    if str(Path.cwd()) not in sys.path:  # `python -m` looks there, a console script does not
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module_name), attribute)
        localizer = found() if isinstance(found, type) else found
    except Exception as error:  # whatever the user's module does when it is imported
        raise ValueError(f"method {method!r} cannot be used: {type(error).__name__}: {error}") from error
    if not callable(localizer):
        raise ValueError(f"method {method!r} is not callable; give a class or function that scores sequences")
    return _well_named(localizer, method)


def _well_named(localizer: AnyLocalizer, method: Method) -> AnyLocalizer:
    """Refuse a name that would be mistaken for another in records, or cannot be an option or part of a file name."""
    name = name_of(localizer)
    if type(localizer) is not (LOCALIZERS | FURTHER).get(name, type(localizer)):
        raise ValueError(f"method {method!r} is called {name!r}, as one of the package; rename it")
    if name in (BEFORE, INJECTION) or not re.fullmatch("[a-z][a-z0-9-]*", name):
        raise ValueError(
            f"method {method!r} is called {name!r}; name it with letters, digits and hyphens, and not {BEFORE} or "
            f"{INJECTION}"
        )
    return localizer


def configured(
    localizer: AnyLocalizer,
    component: ComponentName,
    context: Sequence[MemorizedSequence] = (),
    **settings: Any,
) -> AnyLocalizer:
    """Return a localizer with a run's component and context, and with those of the settings that it has a field for.

    A wrapper's localizer is configured, too. A context of the localizer's own stays.

    Raises:
        ValueError: if it cannot score the component.
    """
    if not is_dataclass(localizer) or isinstance(localizer, type):
        return localizer
    has = {entry.name for entry in fields(localizer)}
    wanted = {"component": component, **settings}
    inner = {"localizer", "localizers"} & has
    for name in inner:
        parts = getattr(localizer, name)
        each = [configured(part, component, context, **settings) for part in _as_tuple(parts)]
        wanted[name] = tuple(each) if isinstance(parts, tuple) else each[0]
    if not inner and component != "neuron" and "component" not in has:
        raise ValueError(f"{name_of(localizer)} scores neurons only, not {component}s")
    if not getattr(localizer, "context", ()):
        wanted["context"] = tuple(context)
    chosen = {name: value for name, value in wanted.items() if name in has}
    return replace(localizer, **chosen) if chosen else localizer


def reads_context(localizer: AnyLocalizer) -> bool:
    """Tell whether a localizer, or one inside it, has a context."""
    return hasattr(localizer, "context") or any(map(reads_context, _parts(localizer)))


def context_of(localizer: AnyLocalizer) -> tuple[MemorizedSequence, ...]:
    """Return what a localizer reads besides its targets; nothing if it has no context."""
    inner = (sequence for part in _parts(localizer) for sequence in context_of(part))
    return (*getattr(localizer, "context", ()), *inner)


def _parts(localizer: AnyLocalizer) -> tuple[AnyLocalizer, ...]:
    """Return the localizers inside one: that of a wrapper, or those of a fusion."""
    return (*_as_tuple(getattr(localizer, "localizer", ())), *getattr(localizer, "localizers", ()))


def _as_tuple(parts: Any) -> tuple[AnyLocalizer, ...]:
    return parts if isinstance(parts, tuple) else (parts,)


def default_methods(component: ComponentName, presets: Mapping[str, AnyLocalizer]) -> tuple[AnyLocalizer, ...]:
    """Return every method of the package that can score the component."""
    found = []
    for name in LOCALIZERS:
        try:
            configured(localizer := resolve(name, presets), component)
        except ValueError:
            continue
        found.append(localizer)
    return tuple(found)


def checked_scores(
    localizer: AnyLocalizer, model: HookedModel, sequences: Sequence[MemorizedSequence], component: Component
) -> Float[Tensor, "sequence layer *unit"]:
    """Score sequences, and refuse scores that cannot be used.

    Raises:
        ValueError: naming the method, if its scores have another shape or device, or are not numbers.
    """
    name = name_of(localizer)
    scores = localizer(model, list(sequences))
    expected = [len(sequences), *component.shape(model)]
    axes = f"sequence, {component.axes.replace(' ', ', ')}"
    if not isinstance(scores, Tensor) or list(scores.shape) != expected:
        found = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"{name} returned {found} for {len(sequences)} sequences; {expected} [{axes}] was expected")
    device = torch.device(model.cfg.device)
    if scores.device.type != device.type:
        raise ValueError(f"{name} returned scores on {scores.device}, and the model is on {device}; move them there")
    if not scores.isfinite().all():
        kind = "NaN" if scores.isnan().any() else "infinite"
        bad = scores.isnan() if scores.isnan().any() else scores.isinf()
        index = int(bad.flatten(1).any(dim=1).nonzero()[0])
        raise ValueError(
            f"{name} returned {int(bad.sum())} {kind} scores, the first for {sequences[index].id}; components cannot "
            "be ranked by them: check its settings, and the precision of the model"
        )
    return scores.detach().float()
