"""Passes through some of a model's layers, for `HookedTransformer`s and for `TransformerBridge`s.

A `HookedTransformer` begins and stops at any layer. A `TransformerBridge` runs the model of transformers as a whole.
Here a hook hands it the stream that enters the first wanted layer, and another takes the stream where the last one
ends and breaks off the pass; layers before the first hand on what they are given. What is replaced or taken has passed
all hooks of the user's at that place.
"""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakSet

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from memloc_lens.library_types import HookedModel, TransformerBridge

TOKENS = 8
"""Tokens that a bridge is tried on."""
CLOSE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
"""By precision: how far two ways to compute the same may be apart, as a share of the largest value."""

_usable: WeakSet[nn.Module] = WeakSet()
"""The bridges that were tried and found usable."""
_trying = threading.Lock()
"""A pass of another thread would meet the hooks of a trial."""


def is_bridge(model: object) -> bool:
    """Tell whether a model is a `TransformerBridge`."""
    return isinstance(model, TransformerBridge)


def stream_entering(model: HookedModel, tokens: Int[Tensor, "row pos"], layer: int) -> Float[Tensor, "row pos d_model"]:
    """Return the residual stream that enters a layer, or leaves the last one for the number of layers.

    Args:
        model: used as it is, ablated or not.
        tokens: on any device.
        layer: from 0 to the number of layers.
    """
    tokens = tokens.to(model.cfg.device)
    if not is_bridge(model):
        return model(tokens, return_type="logits", stop_at_layer=layer)
    place = model.blocks[layer].hook_in if layer < model.cfg.n_layers else model.blocks[-1].hook_out
    handle = place.register_forward_hook(_break_off)
    try:
        model(tokens, return_type="logits")
    except _Reached as reached:
        return reached.stream
    finally:
        handle.remove()
    raise ValueError(f"{model.cfg.model_name}: a pass does not reach the end of layer {layer - 1}")


def run_between(
    model: HookedModel, stream: Float[Tensor, "row pos d_model"], start: int, stop: int
) -> Float[Tensor, "row pos d_model"]:
    """Run some layers.

    Args:
        model: used as it is, ablated or not.
        stream: that enters layer `start`.
        start: the first layer to run.
        stop: the layer after the last one to run; the number of layers runs all.
    """
    if start == stop:
        return stream
    if not is_bridge(model):
        return model(stream, start_at_layer=start, stop_at_layer=stop)
    tokens = torch.zeros(stream.shape[:2], dtype=torch.long, device=stream.device)  # their stream is replaced
    with _handing_on(model, start), _replaced(model.blocks[start].hook_in, stream):
        return stream_entering(model, tokens, stop)


def per_head(model: HookedModel, read: Float[Tensor, "row pos *heads"]) -> Float[Tensor, "row pos head d_head"]:
    """Return what heads read from the values, head by head: a bridge has that of all heads side by side."""
    return rearrange(read, "row pos (head d) -> row pos head d", head=model.cfg.n_heads) if read.ndim == 3 else read


def has_forward_hooks(module: nn.Module) -> bool:
    """Tell whether a module has any forward hook, the package's own ones included, a bridge's own ones not."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(not is_of_library(function) for function in hooks)


def is_of_library(function: Any) -> bool:
    """Tell whether a hook is one that a `TransformerBridge`, or transformers, puts on its own parts."""
    return str(getattr(function, "__module__", "")).startswith(("transformer_lens.model_bridge.", "transformers."))


def check_bridge(model: Any) -> None:
    """Refuse a bridge whose layers cannot run by themselves, or whose neurons are not where `W_out` reads them.

    A bridge is tried once.

    Raises:
        ValueError: naming what is different.
    """
    with _trying:
        if model not in _usable:
            _try(model)
            _usable.add(model)


def _try(model: Any) -> None:
    missing = [name for name in ("blocks", "ln_final", "unembed") if name not in model._modules]
    hook_points = model.hook_dict
    missing += [
        name for layer in range(model.cfg.n_layers) if (name := f"blocks.{layer}.mlp.hook_post") not in hook_points
    ]
    if missing:
        raise ValueError(f"{model.cfg.model_name} is a TransformerBridge without {missing[0]}, which is needed")
    try:
        with torch.no_grad(), _evaluating(model):
            _check_layers_alone(model)
            _check_neurons_write(model)
    except ValueError:
        raise
    except Exception as error:  # layers that take or give more than a stream raise whatever meets it first
        said = " ".join(str(error).split())
        raise ValueError(
            f"{model.cfg.model_name} cannot be used as a TransformerBridge: its layers do not run by themselves: {said}"
        ) from error


class _Reached(Exception):
    """Breaks off a pass with the stream that it has come to."""

    def __init__(self, stream: Tensor) -> None:
        super().__init__("the pass has come to the layer where it should stop")
        self.stream = stream


def _break_off(point: Any, given: Any, stream: Tensor) -> None:
    raise _Reached(stream)


@contextmanager
def _replaced(point: nn.Module, stream: Tensor) -> Iterator[None]:
    handle = point.register_forward_hook(lambda point, given, output: stream)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _handing_on(model: Any, start: int) -> Iterator[None]:
    """Let layers before the first one hand on what they are given, so that nothing is computed in vain."""
    with ExitStack() as stack:
        for block in model.blocks[:start]:
            vars(block)["forward"] = lambda stream, *_, **__: stream
            stack.callback(vars(block).pop, "forward")
        yield


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def _check_layers_alone(model: Any) -> None:
    """Refuse a model whose later layers need more than the stream, or whose logits are made of it in another way."""
    count = min(TOKENS, model.cfg.n_ctx)
    tokens = torch.arange(count, device=model.cfg.device)[None] % model.cfg.d_vocab
    whole, middle, last = model(tokens, return_type="logits"), model.cfg.n_layers // 2, model.cfg.n_layers
    stream = run_between(model, stream_entering(model, tokens, middle), middle, last)
    logits = model.unembed(model.ln_final(stream))
    cap = getattr(model.cfg, "output_logits_soft_cap", 0) or 0
    if not _agree(cap * torch.tanh(logits / cap) if cap > 0 else logits, whole):
        raise ValueError(
            f"{model.cfg.model_name} cannot be used as a TransformerBridge: layers {middle} to {last - 1}, given the "
            "stream that enters them, make other logits than the whole model"
        )


def _check_neurons_write(model: Any) -> None:
    """Refuse neurons whose activations times `W_out` are not what the MLP hands on, unless hooks change that."""
    mlp, rows = model.blocks[0].mlp, (2, 3)
    has_hooks = any(map(has_forward_hooks, mlp.modules()))
    tokens = torch.arange(6, device=model.cfg.device).view(rows) % model.cfg.d_vocab
    seen: dict[str, Tensor] = {}

    def keep_and_negate(module: Any, given: Any, written: Tensor) -> Tensor:
        seen["written"] = written
        return -written

    handles = [
        model.hook_dict["blocks.0.mlp.hook_post"].register_forward_hook(
            lambda point, given, output: seen.update(activations=output)
        ),
        mlp.register_forward_hook(keep_and_negate),
    ]
    try:
        negated = model(tokens, return_type="logits")
    finally:
        for handle in handles:
            handle.remove()
    expected = {"activations": (*rows, model.cfg.d_mlp), "written": (*rows, model.cfg.d_model)}
    shapes = {name: tuple(values.shape) for name, values in seen.items()}
    if (
        shapes != expected
        or not (has_hooks or _agree(_written(mlp, seen["activations"]), seen["written"]))
        or torch.equal(negated, model(tokens, return_type="logits"))
    ):
        raise ValueError(
            f"{model.cfg.model_name} cannot be used as a TransformerBridge: blocks.0.mlp.hook_post times W_out is not "
            "what the MLP hands on"
        )


def _written(mlp: Any, activations: Float[Tensor, "row pos neuron"]) -> Float[Tensor, "row pos d_model"]:
    written = activations @ mlp.W_out
    bias = getattr(mlp, "b_out", None)
    return written if bias is None else written + bias


def _agree(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    return bool((one - other).abs().max() <= CLOSE.get(other.dtype, 0.1) * other.abs().max())
