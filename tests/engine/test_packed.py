"""Packed weights: the same products as torch's own over plain weights, and plain weights where oneDNN has no product."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from engine.layers.packed import PackedLinear, linear, pack, pack_linears

PACKED = [torch.float32, *([torch.bfloat16] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else [])]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, dtype=torch.float64).to(dtype), requires_grad=False)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("dtype", PACKED)
@given(rows=st.integers(0, 70), in_features=st.integers(1, 80), out_features=st.integers(1, 80), has_bias=st.booleans())
def test_a_packed_product_equals_the_plain_one(dtype: torch.dtype, rows: int, in_features: int, out_features: int, has_bias: bool) -> None:
    torch.manual_seed(rows)
    weight = parameter(out_features, in_features, dtype=dtype)
    bias = parameter(out_features, dtype=dtype) if has_bias else None
    x = torch.randn(rows, in_features).to(dtype)
    packed = pack(weight)

    assert packed.is_mkldnn
    assert packed.shape == weight.shape
    torch.testing.assert_close(linear(x, packed, bias), F.linear(x, weight, bias), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_inputs_may_be_views_and_have_more_dimensions() -> None:
    weight = parameter(24, 16)
    x = torch.randn(3, 5, 32)[..., ::2]

    torch.testing.assert_close(linear(x, pack(weight)), F.linear(x, weight))


@pytest.mark.parametrize(
    "weight", [parameter(8, 8, dtype=torch.float64), parameter(0, 8), parameter(8, 0)], ids=["float64", "no rows", "empty"]
)
def test_what_cannot_be_packed_stays_as_it_is(weight: nn.Parameter) -> None:
    assert pack(weight) is weight
    assert linear(torch.ones(2, weight.shape[1], dtype=weight.dtype), weight).shape == (2, weight.shape[0])


def test_plain_linears_of_a_module_are_replaced_and_their_subclasses_are_not() -> None:
    class Special(nn.Linear): ...

    module = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 4, bias=False), Special(4, 4))).requires_grad_(False)
    x = torch.randn(3, 8)
    expected = module(x)

    pack_linears(module)

    assert isinstance(module[0], PackedLinear)
    assert isinstance(module[1][0], PackedLinear)
    assert type(module[1][1]) is Special
    torch.testing.assert_close(module(x), expected)
