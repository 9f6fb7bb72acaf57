"""A model whose layers are on two pretended GPUs: everything gives what it gives on the CPU."""

import pytest
import torch
from pretended_gpus import PretendedGPUs, pretended
from test_surroundings import SEQUENCES, everything
from tiny import tiny_model

from memloc_lens.models.placement import place

FIRST, SECOND = (torch.device("cuda", index) for index in range(2))

SHAPES = {
    "GPT-2": dict(),
    "Llama": dict(positional_embedding_type="rotary", rotary_dim=4, normalization_type="RMS", gated_mlp=True,
                  n_key_value_heads=1, output_logits_soft_cap=2.0),
    "Gemma": dict(positional_embedding_type="rotary", rotary_dim=4, use_normalization_before_and_after=True,
                  normalization_type="RMS", attn_scores_soft_cap=2.0),
}  # fmt: skip


@pytest.fixture
def gpus(monkeypatch) -> PretendedGPUs:
    return pretended(monkeypatch, 2)


def placed(gpus: PretendedGPUs, **changes):
    with gpus:
        return place(tiny_model(**changes), FIRST, 2)


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_everything(gpus, changes):
    expected = everything(tiny_model(**changes), SEQUENCES)
    model = placed(gpus, **changes)
    with gpus:
        found = everything(model, SEQUENCES)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one.double(), other.double(), atol=1e-9)
