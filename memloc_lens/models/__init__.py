"""Language models as `HookedTransformer`s: the embedded one, and any of transformers' formats."""

from memloc_lens.models.load import EMBEDDED, load_model

__all__ = ["EMBEDDED", "load_model"]
