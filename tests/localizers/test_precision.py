"""Scores in half precision are those of float32, and those of float64 are not rounded on the way."""

import naive
import pytest
import torch
from tiny import tiny_model, tiny_sequence

from memloc_lens import (
    Activations,
    HardConcrete,
    IntegratedGradients,
    MemorizedSequence,
    Slimming,
    WeightNorm,
    ZeroOut,
    load_model,
    load_sequences,
)
from memloc_lens.metrics import suffix_loss

LOCALIZERS = [
    Activations(),
    WeightNorm(),
    IntegratedGradients(steps=2, first_layer=4),
    ZeroOut(component="head"),
    ZeroOut(candidates=0.02, first_layer=4),
    Slimming(steps=2),
    HardConcrete(steps=2),
]


@pytest.fixture(scope="module")
def short(embedded) -> MemorizedSequence:
    return MemorizedSequence(load_sequences(embedded)[0].tokens[:12], prompt_len=6)


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float16], ids=str)
def half(request):
    return load_model(device="cpu", dtype=request.param)


@pytest.mark.parametrize("localizer", LOCALIZERS, ids=lambda localizer: localizer.name)
def test_half_precision(embedded, half, short, localizer):
    scores, expected = localizer(half, short), localizer(embedded, short)
    assert scores.dtype == torch.float32
    count = round(0.05 * expected.numel())
    top, expected_top = (set(values.flatten().topk(count).indices.tolist()) for values in (scores, expected))
    if not isinstance(localizer, ZeroOut) or localizer.candidates == 1:
        assert torch.corrcoef(torch.stack([scores.flatten(), expected.flatten()]))[0, 1] >= 0.98
        assert len(top & expected_top) >= 0.7 * count
    else:  # the rest get the lowest score
        both = (scores > scores.amin(dim=1, keepdim=True)) & (expected > expected.amin(dim=1, keepdim=True))
        assert torch.corrcoef(torch.stack([scores[both], expected[both]]))[0, 1] >= 0.98


def test_the_weights_stay_in_half_precision(half, short):
    before = {name: (value.data_ptr(), value.dtype) for name, value in half.state_dict().items()}
    dtype = half.cfg.dtype
    ZeroOut(component="head")(half, short)
    assert half.cfg.dtype == dtype
    assert {name: (value.data_ptr(), value.dtype) for name, value in half.state_dict().items()} == before


def test_float64_is_kept():
    """Rises of the loss are differences: of losses in float32, they would be right to four digits only."""
    model, sequence = tiny_model(), tiny_sequence()
    assert suffix_loss(model, [sequence]).dtype == torch.float64
    assert torch.allclose(suffix_loss(model, [sequence])[0], naive.suffix_loss(model, sequence), rtol=1e-13)
    for component in ("neuron", "head"):
        scores, expected = ZeroOut(component=component)(model, sequence), naive.zero_out(model, sequence, component)
        assert ((scores - expected).abs() <= 2e-7 * expected.abs() + 1e-12).all()
