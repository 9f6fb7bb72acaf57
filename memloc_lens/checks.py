"""Checks of what users hand in: one sentence that states the value, the limit and the fix."""

import math
from collections.abc import Collection
from typing import Any

from torch import Tensor

from memloc_lens.bridge import check_bridge, is_bridge
from memloc_lens.devices import check_several
from memloc_lens.library_types import HookedModel


def check_model(model: object) -> HookedModel:
    """Refuse what is not a `HookedTransformer` that reads tokens from left to right and has MLP layers.

    Args:
        model: that was given.

    Returns:
        The model to run: what `torch.compile` was given if the model is compiled, since hooks act on that alone.

    Raises:
        ValueError: naming what was given, and how to get a model.
    """
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, HookedModel):
        inside = ", the one in its .module" if isinstance(getattr(model, "module", None), HookedModel) else ""
        raise ValueError(
            f"the model is {described(model)}; give a HookedTransformer{inside or ', as load_model(...) returns it'}"
        )
    for kind, (found, limit) in _unsupported(model.cfg).items():
        if found:
            raise ValueError(f"{model.cfg.model_name} has {kind}, {limit}")
    if model.W_E.dtype != model.cfg.dtype:
        raise ValueError(
            f"the weights are {model.W_E.dtype} and model.cfg.dtype is {model.cfg.dtype}; change both with "
            f"model.to({model.W_E.dtype})"
        )
    for name, module in model.named_modules():
        if _is_compiled(module):
            raise ValueError(
                f"{name or 'the model'} was compiled in place, and compiled code does not see hooks; load the model "
                "again, and keep the result of torch.compile(model) beside it"
            )
    if model.cfg.n_devices > 1:
        check_several(model)
    if is_bridge(model):
        check_bridge(model)
    return model


def check_not_compiled(model: object) -> None:
    """Refuse a compiled model where hooks are to act on the user's own calls.

    Raises:
        ValueError: naming the model to give.
    """
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            "the model is compiled, and compiled code does not see the hooks of an ablation; give the model that "
            "torch.compile was given, and run that one"
        )


def _unsupported(cfg: Any) -> dict[str, tuple[bool, str]]:
    """Return what a configuration can have that the methods are not defined for: whether it does, and why not."""
    return {
        "attention layers only": (cfg.attn_only, "and so no MLP neurons to locate or ablate"),
        f"{cfg.num_experts} experts a layer": (bool(cfg.num_experts), "which have no one activation a neuron"),
        f"{cfg.attention_dir} attention": (
            cfg.attention_dir != "causal",
            "in which every position sees the token that it should predict; a causal model is needed",
        ),
        "the position embeddings of shortformer": (
            cfg.positional_embedding_type == "shortformer",
            "which are not in the residual stream, so that its layers cannot run by themselves",
        ),
        f"a vocabulary of {cfg.d_vocab} and predicts one of {cfg.d_vocab_out}": (
            cfg.d_vocab_out != cfg.d_vocab,
            "so that it cannot recite what it reads; both must be the same",
        ),
        "weights in 4 bits": (bool(cfg.load_in_4bit), "which have no rows to read; load them in torch.float32"),
    }


def _is_compiled(module: Any) -> bool:
    forward = vars(module).get("forward")
    return (
        module._compiled_call_impl is not None
        or "_orig_mod" in module._modules
        or hasattr(forward, "_torchdynamo_orig_callable")
    )


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


def in_one_line(error: Exception) -> str:
    """Return the message of an error of another library, short and in one line."""
    return " ".join(str(error).split())[:120]


def reason(error: BaseException) -> str:
    """Return the messages of an error and of what caused it in one line."""
    messages: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        message = " ".join(str(cause).split()) or type(cause).__name__
        if not any(message in earlier for earlier in messages):
            messages.append(message)
        cause = cause.__cause__
    return "; because: ".join(messages)
