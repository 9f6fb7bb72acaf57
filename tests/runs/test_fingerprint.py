import hashlib

import pytest
import torch

from memloc_lens import load_model
from memloc_lens.runs import fingerprint as module
from memloc_lens.runs.fingerprint import fingerprint


@pytest.fixture
def model(recited):
    return load_model(recited / "model", device="cpu")


def test_one_model_has_one_fingerprint(model, recited, monkeypatch):
    found = fingerprint(model)
    assert found == fingerprint(load_model(recited / "model", device="cpu"))
    assert len(found) == len(hashlib.sha256().hexdigest())
    monkeypatch.setattr(module, "CHUNK", 1000)
    assert fingerprint(model) == found  # in chunks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_bit_of_any_weight_is_noticed(recited, dtype):
    model = load_model(recited / "model", device="cpu", dtype=dtype)
    before = fingerprint(model)
    for parameter in model.parameters():
        parameter = parameter.data
        place = tuple(torch.tensor(parameter.shape) - 1)
        value = parameter[place].clone()
        parameter[place] = torch.nextafter(value.float(), torch.tensor(9.0)).to(dtype) if dtype.itemsize == 4 else -9
        assert fingerprint(model) != before
        parameter[place] = value
    assert fingerprint(model) == before


def test_layouts_of_memory_do_not_count(model):
    before = fingerprint(model)
    weight = model.blocks[0].mlp.W_in
    weight.data = weight.data.T.contiguous().T
    assert not weight.is_contiguous()
    assert fingerprint(model) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(model, value):
    model.blocks[1].mlp.W_out.data[3, 4] = value
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.W_out has 1 values that are NaN or infinite"):
        fingerprint(model)
