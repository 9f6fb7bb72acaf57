"""Hooks on a model that are not this package's own, which fast forms may not pass by.

A fast form leaves out modules, runs them at some positions only, or runs many copies of a sequence. It stays exact
under the package's own edits, which treat every position and every copy alike; hooks of a user may do anything. So a
fast form asks `hooked` about the modules that it treats so, and takes the plain way if there is a hook.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules import module as torch_modules

from memloc_lens.bridge import has_forward_hooks, is_of_library
from memloc_lens.library_types import HookedModel, HookPoint

Function = TypeVar("Function", bound=Callable[..., Any])

END = ("ln_final", "unembed")
"""The modules after the last layer."""


def own(function: Function) -> Function:
    """Mark a hook, or a replaced `forward`, as the package's own: it treats all positions and copies alike."""
    function.__dict__["memloc_own"] = True
    return function


def hooked(model: HookedModel, *parts: str) -> str:
    """Return the name of the first module with a hook that is not the package's own, or nothing.

    Forward and backward hooks count, permanent ones, torch's own, and a replaced `forward`.

    Args:
        model: whose modules are looked at.
        parts: names of modules to look at, with all inside of them; all but the model itself if none is given.

    Example:
        >>> with model.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", lambda activations, hook: activations * 2)]):
        ...     hooked(model), hooked(model, "blocks.0"), hooked(model, "blocks.1")
        ('blocks.1.hook_mlp_out', '', 'blocks.1.hook_mlp_out')
    """
    names = parts or [name for name, _ in model.named_children()]
    inside = (found for part in names for found in _inside(model, part))
    return next((name for name, module in inside if has_hooks(module)), "")


def hooked_at(model: HookedModel, *names: str) -> bool:
    """Tell whether one of these modules itself has any hook, the package's own ones included."""
    modules = [module for name in names if (module := _get(model, name)) is not None]
    return any(has_forward_hooks(module) or has_hooks(module) for module in modules)


def hooked_after_neurons(model: HookedModel, layer: int) -> bool:
    """Tell whether more than a product with `W_out` lies between a layer's neurons and the stream that leaves it."""
    return hooked_at(model, *(f"blocks.{layer}{part}" for part in ("", ".mlp", ".hook_mlp_out", ".hook_resid_post")))


def has_hooks(module: nn.Module) -> bool:
    """Tell whether a module has a hook, or a replaced `forward`, that is not the package's own."""
    if _has_global_hooks() or not _is_own(vars(module).get("forward")):
        return True
    if not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks):
        return False
    known = {handle.hook.id for handle in _handles(module) if _is_own(handle.user_hook)}
    return any(
        not (key in known or _is_own(function))
        for hooks in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
        for key, function in hooks.items()
    )


def check_no_hook_on_itself(model: HookedModel) -> None:
    """Refuse a hook on the whole model, which would also act on a pass through some of its layers.

    Raises:
        ValueError: naming a place for the hook.
    """
    if model._forward_hooks or model._forward_pre_hooks or model._backward_hooks or model._backward_pre_hooks:
        raise ValueError(
            "the model itself has a hook, which would also act on passes through some of its layers; remove it, or "
            "hook a part of the model, such as unembed"
        )


def check_no_backward_hooks(model: HookedModel, names: Iterable[str]) -> None:
    """Refuse backward hooks at hook points where a method changes activations: the change would not pass the hook.

    Raises:
        ValueError: naming the hook point.
    """
    for name in names:
        if model.hook_dict[name]._backward_hooks or model.hook_dict[name]._backward_pre_hooks:
            raise ValueError(
                f"{name} has a backward hook, and this method changes the activations there, which the hook would "
                "miss; remove it"
            )


def _inside(model: HookedModel, part: str) -> Iterator[tuple[str, nn.Module]]:
    module = _get(model, part)
    return iter(()) if module is None else module.named_modules(prefix=part)


def _get(model: HookedModel, name: str) -> nn.Module | None:
    module: Any = model
    for step in name.split("."):
        module = getattr(module, "_modules", {}).get(step)
    return module


def _handles(module: nn.Module) -> list[Any]:
    return [*module.fwd_hooks, *module.bwd_hooks] if isinstance(module, HookPoint) else []


def _has_global_hooks() -> bool:
    """Tell whether every module has a hook of a user's; torch's own ones, as of its counter of FLOPs, only watch."""
    every = (torch_modules._global_forward_hooks, torch_modules._global_forward_pre_hooks)
    return any(not str(hook.__module__).startswith("torch.") for hooks in every for hook in hooks.values())


def _is_own(function: Any) -> bool:
    return function is None or bool(getattr(function, "memloc_own", False)) or is_of_library(function)
