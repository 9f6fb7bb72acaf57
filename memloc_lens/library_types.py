"""Classes of other libraries to name in annotations and in `isinstance`, without importing the libraries.

Importing TransformerLens and transformers takes seconds. Whoever asks a command for help, or mistypes an option, does
not wait for them: the functions that call them import them.
"""

import sys
from typing import TYPE_CHECKING


class _OfLibrary(type):
    """The type of a class that stands for the one of the same name in a library."""

    def __instancecheck__(cls, instance: object) -> bool:
        own = vars(sys.modules.get(cls.__module__, sys)).get(cls.__name__)
        return own is not None and isinstance(instance, own)  # before it is imported, nothing is an instance


def _stands_for(module: str, name: str) -> type:
    return _OfLibrary(name, (), {"__module__": module})


if TYPE_CHECKING:
    from pyarrow import RecordBatch as RecordBatch
    from transformer_lens import ActivationCache as ActivationCache
    from transformer_lens import HookedTransformer as HookedTransformer
    from transformer_lens import HookedTransformerConfig as HookedTransformerConfig
    from transformer_lens.components import LayerNorm as LayerNorm
    from transformer_lens.hook_points import HookPoint as HookPoint
    from transformer_lens.model_bridge import TransformerBridge as TransformerBridge
    from transformers import PreTrainedModel as PreTrainedModel
    from transformers import PreTrainedTokenizerBase as PreTrainedTokenizerBase
else:
    ActivationCache = _stands_for("transformer_lens", "ActivationCache")
    HookedTransformer = _stands_for("transformer_lens", "HookedTransformer")
    HookedTransformerConfig = _stands_for("transformer_lens", "HookedTransformerConfig")
    HookPoint = _stands_for("transformer_lens.hook_points", "HookPoint")
    LayerNorm = _stands_for("transformer_lens.components", "LayerNorm")
    TransformerBridge = _stands_for("transformer_lens.model_bridge", "TransformerBridge")
    PreTrainedModel = _stands_for("transformers", "PreTrainedModel")
    PreTrainedTokenizerBase = _stands_for("transformers", "PreTrainedTokenizerBase")
    RecordBatch = _stands_for("pyarrow", "RecordBatch")

HookedModel = HookedTransformer | TransformerBridge
"""A model that everything here works with: of TransformerLens before version 4, or of either version."""
