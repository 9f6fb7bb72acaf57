import hashlib
import sys

import pytest
import torch

from memloc_lens import load_model
from memloc_lens.runs import fingerprint as module
from memloc_lens.runs.fingerprint import fingerprint


@pytest.fixture
def model(recited):
    return load_model(recited / "model", device="cpu")


def test_one_model_has_one_fingerprint(model, recited):
    found = fingerprint(model)
    assert found == fingerprint(load_model(recited / "model", device="cpu"))
    assert len(found) == len(hashlib.sha256().hexdigest())


def naive_sum(values: list[int], factors: list[int]) -> int:
    """The sum of a chunk in Python's integers of any size."""
    total = sum(value * factor for value, factor in zip(values, factors, strict=True)) % 2**64
    return total - 2**64 if total >= 2**63 else total


@pytest.mark.parametrize("count", [1, 3, 8, 1001])
def test_a_chunk_is_summed_modulo_two_to_the_64(count):
    values = torch.randn(count, generator=torch.Generator().manual_seed(0))
    content = values.numpy().tobytes()
    content += bytes(-len(content) % 8)
    words = [int.from_bytes(content[at : at + 8], sys.byteorder, signed=True) for at in range(0, len(content), 8)]
    factors = module._factors(torch.device("cpu"))
    assert all(factors % 2 == 1)
    assert module._sums("x", values, factors) == [naive_sum(words, factors[: len(words)].tolist())]


def test_large_parameters_are_summed_in_chunks():
    values = torch.arange(3 * module.CHUNK // 8)  # float32 would be as good
    factors = module._factors(torch.device("cpu"))
    parts = [module._sums("x", part, factors)[0] for part in values.split(module.CHUNK // 8)]
    assert module._sums("x", values, factors) == parts
    assert len(set(parts)) == 3


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
