"""Language models as `HookedTransformer`s: the embedded one, and any of transformers' formats."""

from memloc_lens.models.accepted import EMBEDDED, PACKAGED, Backend
from memloc_lens.models.load import backend_of, check_backend, generates_with_cache, load_model
from memloc_lens.models.placement import check_device
from memloc_lens.models.speedups import prepare

__all__ = [
    "EMBEDDED",
    "PACKAGED",
    "Backend",
    "backend_of",
    "check_backend",
    "check_device",
    "generates_with_cache",
    "load_model",
    "prepare",
]
