"""Matmuls with results of another dtype."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from mamba_pretrain.ops import flops
from mamba_pretrain.ops import matmul as module
from mamba_pretrain.ops.matmul import Tile, add_matmul, matmul

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


def described(rows=8192, inner=160, columns=256, dtype=torch.bfloat16, device="cuda"):
    """total, a and b as they are on a device that need not be there."""
    return [torch.empty(shape, device=device, dtype=dtype) for shape in ((rows, columns), (rows, inner), (inner, columns))]


@pytest.fixture
def on_hopper(monkeypatch):
    monkeypatch.setattr(module, "_kernel_runs", lambda device: True)


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(("inner", "dtype"), [(160, torch.bfloat16), (256, torch.float16)])
def test_products_over_few_inner_numbers_are_added_by_the_kernel_and_counted(inner, dtype):
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        total, a, b = described(inner=inner, dtype=dtype)
        assert add_matmul(total, a, b) is total
    counts = {str(operator): n for operator, n in counter.get_flop_counts()["Global"].items()}
    assert counts == {"mamba_pretrain.add_few_inner": flops.linear_flops(8192, inner, 256)}


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(
    "sizes",
    [{"device": "cpu"}, {"dtype": torch.float32}, {"rows": 1024}, {"inner": 272}, {"inner": 24}, {"columns": 250}],
    ids=lambda sizes: ", ".join(map(str, *sizes.items())),
)
def test_others_are_not(sizes):
    with FakeTensorMode():
        assert not module._few_inner(*described(**sizes))


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(
    ("strides", "offset", "dtype", "served"),
    [
        ((160, 1), 0, torch.bfloat16, True),
        ((176, 1), 16, torch.bfloat16, True),
        ((1, 8192), 0, torch.bfloat16, False),
        ((168, 1), 0, torch.bfloat16, False),
        ((176, 1), 8, torch.bfloat16, False),
        ((160, 1), 0, torch.float16, False),
    ],
)
def test_only_vectors_of_one_dtype_are_served(strides, offset, dtype, served):
    with FakeTensorMode():
        total, _, b = described()
        a = torch.empty(8192 * 176 + 16, device="cuda", dtype=dtype).as_strided((8192, 160), strides, offset)
        assert module._few_inner(total, a, b) is served


@pytest.mark.usefixtures("on_hopper")
def test_a_compiler_sees_the_kernel_and_what_it_writes():
    def add(total, a, b):
        return add_matmul(total, a, b)

    with FakeTensorMode():
        graph = make_fx(add)(*described())
    called = [node for node in graph.graph.nodes if node.op == "call_function"]
    assert [node.target for node in called] == [torch.ops.mamba_pretrain.add_few_inner.default]
    assert called[0].target._schema.is_mutable


@pytest.mark.parametrize("inner", range(16, 257, 16))
def test_inner_numbers_fit_in_two_parts(inner):
    first, rest = module._inner_parts(inner)
    assert first & (first - 1) == rest & (rest - 1) == 0
    assert first >= 16
    assert rest == 0 or rest >= 16
    assert inner <= first + rest < 2 * inner


@pytest.mark.parametrize(("rows", "columns"), [(16384, 4096), (32768, 2048), (5000, 48), (4096, 100_000)])
def test_programs_are_equally_many_for_each_block_of_columns(rows, columns):
    tile = Tile(rows=64, columns=128, warps=4, stages=2, resident=2)
    blocks, programs = -(-columns // tile.columns), module._programs(tile, rows, columns, torch.device("cpu"))
    assert programs % blocks == 0
    assert programs <= max(blocks, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_on_a_gpu_are_rounded_once_and_the_same_every_time(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = (5000, 2048), (5000, 96), (96, 2048)
    total, a, b = (torch.randn(shape, generator=generator).to("cuda", dtype) for shape in shapes)
    exact = total.double() + a.double() @ b.double()
    runs = [add_matmul(total.clone(), a, b) for _ in range(3)]
    assert all(torch.equal(runs[0], other) for other in runs[1:])
    torch.testing.assert_close(runs[0].double(), exact, rtol=torch.finfo(dtype).eps / 2 * 1.01, atol=1e-4)
    with FlopCounterMode(display=False) as counter:
        add_matmul(total, a, b)
    assert counter.get_total_flops() == flops.linear_flops(5000, 96, 2048)
