"""Make a `TransformerBridge` of a model of transformers, without asking the hub and without processing weights."""

from typing import Any

import torch

from memloc_lens.library_types import HookedModel, PreTrainedModel, PreTrainedTokenizerBase
from memloc_lens.models.verification import check_bridge_same, sample_of


def bridged(
    original: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, dtype: torch.dtype, begins_with_bos: bool
) -> HookedModel:
    """Return a `TransformerBridge` around a model, which it shares the weights with.

    Args:
        original: on the CPU, with eager attention, the only one whose patterns hooks can see.
        tokenizer: of the model, if it has one.
        dtype: of the weights.
        begins_with_bos: whether strings get a beginning-of-sequence token.

    Raises:
        ValueError: if TransformerLens has no bridge for the architecture, or one that computes something else.
    """
    from transformer_lens.model_bridge import TransformerBridge

    tokens, expected = sample_of(original)
    original.config.architectures = [type(original).__name__]
    model: Any = TransformerBridge.boot_transformers(
        "", hf_model=original, device="cpu", dtype=dtype, tokenizer=tokenizer or _no_tokenizer()
    )
    if tokenizer is None:
        model.tokenizer = None
    model.cfg.default_prepend_bos = begins_with_bos
    check_bridge_same(model, tokens, expected)
    return model


def _no_tokenizer() -> PreTrainedTokenizerBase:
    """Return a tokenizer that stands for none: without one TransformerLens looks for one on the hub."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"none": 0}, unk_token="none"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="none", pad_token="none", unk_token="none")
