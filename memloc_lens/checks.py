"""Checks of what users hand in: one sentence that states the value, the limit and the fix."""

import math
from collections.abc import Collection
from typing import Any

from torch import Tensor
from transformer_lens import HookedTransformer


def check_model(model: object) -> None:
    """Refuse what is not a `HookedTransformer` with MLP layers.

    Raises:
        ValueError: naming what was given, and how to get a model.
    """
    if not isinstance(model, HookedTransformer):
        raise ValueError(f"the model is {described(model)}; give a HookedTransformer, as load_model(...) returns it")
    if model.cfg.attn_only:
        raise ValueError(f"{model.cfg.model_name} has attention layers only, and so no MLP neurons to locate or ablate")


def check_tensor(name: str, value: object, axes: str) -> None:
    """Refuse what is not a tensor; `axes` says which shape was expected.

    Raises:
        ValueError: naming the argument and what was given.
    """
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is {described(value)}; a tensor [{axes}] was expected")


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Refuse a value that is not among the choices.

    Raises:
        ValueError: naming the choices.

    Example:
        >>> check_choice("scope", "layer", ("layer", "global"))
    """
    if not isinstance(value, str) or value not in choices:
        given = repr(value) if isinstance(value, str) else described(value)
        raise ValueError(f"{name} is {given}; it must be one of {', '.join(map(repr, choices))}")


def check_text(name: str, value: object) -> None:
    """Refuse what a tokenizer cannot read: no string, an empty one, or one with half of a character.

    Raises:
        ValueError: naming what was given.

    Example:
        >>> check_text("the text", "Return the number of items")
    """
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} is {'empty' if value == '' else described(value)}; give a string")
    check_characters(name, value)


def check_characters(name: str, value: str) -> None:
    """Refuse half of a character (a lone surrogate), which JSON can hold and a tokenizer cannot read.

    Raises:
        ValueError: naming the character and where it is.
    """
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} has {value[error.start]!r}, half of a character, at character {error.start}; remove it"
        ) from error


def check_number(
    name: str,
    value: object,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
    whole: bool = False,
) -> None:
    """Refuse what is not a finite number within the limits.

    Args:
        name: of the setting, for the error.
        value: that was given.
        above: the value must be larger.
        least: the value must be at least this.
        below: the value must be smaller.
        most: the value must be at most this.
        whole: the value must be an integer.

    Raises:
        ValueError: stating the value and the limits.

    Example:
        >>> check_number("steps", 20, least=1, whole=True)
    """
    limits = [
        f"{word} {limit:g}"
        for word, limit in (("above", above), ("at least", least), ("below", below), ("at most", most))
        if limit is not None
    ]
    kind = "a whole number" if whole else "a number"
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if (
        not isinstance(value, int | float)
        or not (is_whole or (isinstance(value, float) and not whole and math.isfinite(value)))
        or (above is not None and not value > above)
        or (least is not None and not value >= least)
        or (below is not None and not value < below)
        or (most is not None and not value <= most)
    ):
        raise ValueError(f"{name} is {value!r}; it must be {kind}{' ' if limits else ''}{' and '.join(limits)}")


def check_first_layer(first_layer: int, layers: int) -> None:
    """Refuse a first layer that the model does not have.

    Raises:
        ValueError: stating the layers there are.
    """
    check_number("first_layer", first_layer, least=0, whole=True)
    if first_layer >= layers:
        raise ValueError(f"first_layer is {first_layer}; the model has layers 0 to {layers - 1}")


def described(value: Any) -> str:
    """Return in a few words what was given instead of what was expected."""
    if isinstance(value, str):
        return f"the string {value!r}"
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return "nothing" if value is None else f"of type {type(value).__module__}.{type(value).__qualname__}"
