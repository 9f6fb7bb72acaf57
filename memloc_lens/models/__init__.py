"""Language models as `HookedTransformer`s: the embedded one, and any of transformers' formats."""

from memloc_lens.models.load import EMBEDDED, generates_with_cache, load_model, prepare

__all__ = ["EMBEDDED", "generates_with_cache", "load_model", "prepare"]
