"""Models of a few numbers each, straight from a configuration of TransformerLens."""

import warnings

import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig

from memloc_lens import MemorizedSequence

VOCAB = 31


def tiny_model(**changes) -> HookedTransformer:
    """A random model in float64, with weights large enough that every part of it matters."""
    settings = dict(
        n_layers=2, d_model=8, n_ctx=20, d_head=4, n_heads=2, d_mlp=6, d_vocab=VOCAB, act_fn="gelu",
        normalization_type="LN", seed=0, dtype=torch.float64, device="cpu",
    ) | changes  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "HookedTransformer is deprecated", DeprecationWarning)
        model = HookedTransformer(HookedTransformerConfig(**settings))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = (noise * (0.4 if parameter.ndim > 1 else 0.2) + name.endswith(".w")).to(parameter.dtype)
    return model.eval()


def tiny_sequence(seed: int = 2, length: int = 8, prompt_len: int = 4) -> MemorizedSequence:
    tokens = torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed))
    return MemorizedSequence(tokens, prompt_len, id=f"tiny-{seed}")
