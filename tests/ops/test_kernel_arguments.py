"""Structs as C lays them out."""

from __future__ import annotations

import ctypes

import pytest
import torch

from mamba_pretrain.ops import c_conv, c_norm, c_scan, c_ssd, cuda_conv_kernels, cuda_scan_kernels
from mamba_pretrain.ops.kernel_arguments import Rows, fields, rows, struct


def test_values_lie_where_c_expects_them():
    declared = {
        **fields("a b", Rows),
        **fields("p q", ctypes.c_void_p),
        "few": ctypes.c_int,
        "many": ctypes.c_int64,
        "real": ctypes.c_float,
    }
    laid_out = type("Laid", (ctypes.Structure,), {"_fields_": tuple(declared.items())})
    values = ((11, 12, 13), (21, 22, 23), 31, 32, 41, 42, 0.5)
    expected = laid_out(Rows(11, 12, 13), Rows(21, 22, 23), *values[2:])
    made = struct("Made", **declared)
    assert made(*values) == bytes(expected)[: len(made(*values))]
    assert made(**dict(zip(declared, values, strict=True))) == made(*values)
    assert made((11, 12, 13), many=42) == made((11, 12, 13), (0, 0, 0), 0, 0, 0, 42, 0.0)


def test_a_missing_or_unknown_field_is_an_error():
    made = struct("Made", **fields("a b", ctypes.c_int))
    with pytest.raises(Exception, match="expected 2"):
        made(1)
    with pytest.raises(Exception, match="expected 2"):
        made(1, 2, c=3)


@pytest.mark.parametrize("module", [c_conv, c_norm, c_scan, c_ssd, cuda_conv_kernels, cuda_scan_kernels])
def test_rows_come_first(module):
    """Only there a nested struct may stand."""
    for made in vars(module).values():
        if isinstance(made, type(struct("Made"))):
            kinds = [type(absent) for absent in made._absent.values()]
            assert kinds == sorted(kinds, key=lambda kind: kind is int)


def test_rows_of_a_strided_tensor():
    whole = torch.zeros(2, 3, 8, dtype=torch.bfloat16)
    assert rows(whole[..., 4:]) == (whole.data_ptr() + 8, 24, 16)
    assert rows(None) == (0, 0, 0)
