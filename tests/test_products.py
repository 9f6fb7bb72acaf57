import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memloc_lens import products
from memloc_lens.products import WORTHWHILE, fast_products


@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 300),
    inner=st.integers(1, 300),
    columns=st.integers(1, 300),
    order=st.sampled_from(["as stored", "transposed"]),
    has_bias=st.booleans(),
)
def test_products_and_their_gradients_are_those_of_float64(rows, inner, columns, order, has_bias):
    draw = torch.Generator().manual_seed(rows * inner + columns)
    left = torch.randn(rows, inner, generator=draw)
    right = torch.randn(columns, inner, generator=draw).T if order == "transposed" else torch.randn(inner, columns)
    bias, by = torch.randn(columns, generator=draw), torch.randn(rows, columns, generator=draw)

    def product_and_gradients(dtype):
        tensors = [tensor.to(dtype).requires_grad_(True) for tensor in (left, right, bias)]
        product = torch.addmm(tensors[2], *tensors[:2]) if has_bias else tensors[0] @ tensors[1]
        gradients = torch.autograd.grad(product, tensors[: 2 + has_bias], by.to(dtype))
        return [product, *gradients]

    with fast_products():
        own = product_and_gradients(torch.float32)
    for ours, exact in zip(own, product_and_gradients(torch.float64), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.fixture
def calls(monkeypatch):
    shapes = []

    def linear(left, right, *rest):
        shapes.append((tuple(left.shape), tuple(right.shape)))
        return original(left, right, *rest)

    original = products._linear
    monkeypatch.setattr(products, "_linear", linear)
    monkeypatch.setattr(products, "_has_512_bits", lambda: True)
    return shapes


def test_large_float32_products_go_to_onednn_and_others_do_not(calls):
    large, small = torch.randn(128, 128), torch.randn(8, 8)
    assert 128**3 >= WORTHWHILE > 8**3
    with fast_products():
        large @ large
        small @ small
        large.double() @ large.double()
        torch.addmm(large, large, large)  # no bias, but a matrix
    large @ large
    assert calls == [((128, 128), (128, 128))]


def test_products_with_a_part_of_a_matrix_stay_with_torch(calls):
    """oneDNN takes a thousand times as long for a matrix whose neighbours lie apart in both directions."""
    part = torch.randn(128, 384)[:, 128:256]  # as of a matrix for queries, keys and values
    assert not part.is_contiguous()
    assert not part.T.is_contiguous()
    left, bias = torch.randn(128, 128), torch.randn(128)
    with fast_products():
        products = left @ part, part @ left, torch.addmm(bias, left, part)
    assert calls == []
    exact = left.double() @ part.double(), part.double() @ left.double(), left.double() @ part.double() + bias
    for own, expected in zip(products, exact, strict=True):
        torch.testing.assert_close(own.double(), expected, rtol=1e-4, atol=1e-4)


def test_without_512_bits_nothing_is_done(calls, monkeypatch):
    monkeypatch.setattr(products, "_has_512_bits", lambda: False)
    with fast_products():
        torch.randn(128, 128) @ torch.randn(128, 128)
    assert calls == []


def test_for_a_model_elsewhere_nothing_is_done(calls):
    with fast_products("cuda"):
        torch.randn(128, 128) @ torch.randn(128, 128)
    assert calls == []


def test_contexts_within_contexts_do_the_work_once(calls):
    with fast_products(), fast_products(torch.device("cpu")):
        torch.randn(128, 128) @ torch.randn(128, 128)
    assert len(calls) == 1
