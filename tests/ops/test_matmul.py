"""Matmuls with results of another dtype."""

from __future__ import annotations

import pytest
import torch

from mamba_pretrain.ops.matmul import add_matmul, matmul

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Operands' and result's dtype, and the relative error of the result: on CUDA a 16-bit product in fp32 is not rounded to 16 bits on its way.
CASES = [
    (torch.float64, torch.float64, {"cpu": 1e-12, "cuda": 1e-12}),
    (torch.float32, torch.float32, {"cpu": 1e-5, "cuda": 1e-5}),
    (torch.bfloat16, torch.bfloat16, {"cpu": 1e-2, "cuda": 1e-2}),
    (torch.bfloat16, torch.float32, {"cpu": 1e-2, "cuda": 1e-4}),
    (torch.float16, torch.float32, {"cpu": 1e-3, "cuda": 1e-4}),
    (torch.float32, torch.bfloat16, {"cpu": 1e-2, "cuda": 1e-2}),
]


def operands(device, dtype):
    """a (33, 64) with strided rows, b (64, 24)."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(64, 40, generator=generator)[:, :33].t(), torch.randn(64, 24, generator=generator)
    return a.to(device, dtype), b.to(device, dtype)


def error(found, exact):
    return ((found.double() - exact).abs().max() / exact.abs().max()).item()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "result", "tolerance"), CASES)
def test_a_product_made_anew_written_and_added(device, dtype, result, tolerance):
    a, b = operands(device, dtype)
    exact = a.double() @ b.double()
    product = matmul(a, b, result)
    assert product.dtype == result
    assert error(product, exact) < tolerance[device]
    table = torch.full((40, 24), 7.0, device=device, dtype=result)
    matmul(a, b, result, out=table[3:36])
    assert torch.equal(table[3:36], product)
    assert torch.all(table[:3] == 7)
    assert torch.all(table[36:] == 7)
    total = torch.ones_like(product)
    assert add_matmul(total, a, b).data_ptr() == total.data_ptr()
    assert error(total, exact + 1) < tolerance[device]
