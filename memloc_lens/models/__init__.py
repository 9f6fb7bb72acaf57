"""Language models as `HookedTransformer`s: the embedded one, and any of transformers' formats."""

from memloc_lens.models.accepted import EMBEDDED, PACKAGED
from memloc_lens.models.load import check_device, generates_with_cache, load_model
from memloc_lens.models.speedups import prepare

__all__ = ["EMBEDDED", "PACKAGED", "check_device", "generates_with_cache", "load_model", "prepare"]
